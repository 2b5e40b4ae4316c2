"""Modules of main memory as far as a system tells them without root: number, channels, kind, speed. No torch.

The error counters (EDAC) in /sys are readable by all where their driver is loaded; the firmware's table (SMBIOS) only
where somebody allowed it. Serial numbers stand in that table and are not read.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

# SMBIOS 3.7, 7.18.2: type of a memory device.
KINDS = {0x18: "DDR3", 0x1A: "DDR4", 0x1E: "LPDDR4", 0x20: "HBM", 0x21: "HBM2", 0x22: "DDR5", 0x23: "LPDDR5"}
MEMORY_DEVICE, SIZE_AT, KIND_AT, SPEED_AT, CONFIGURED_AT = 17, 0x0C, 0x12, 0x15, 0x20


def _structures(table: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and formatted part of each SMBIOS structure; strings behind it end with two zero bytes and are skipped."""
    place = 0
    while place + 4 <= len(table):
        kind, length = table[place], table[place + 1]
        end = table.find(b"\0\0", place + length)
        if length < 4 or end < 0:
            return
        yield kind, table[place : place + length]
        place = end + 2


def of_table(table: bytes) -> dict[str, object]:
    """Occupied modules, their kind and the transfers a second they run at, of an SMBIOS table."""
    modules = [
        part
        for kind, part in _structures(table)
        if kind == MEMORY_DEVICE and len(part) > SPEED_AT + 1 and struct.unpack_from("<H", part, SIZE_AT)[0]
    ]
    kinds = {KINDS.get(part[KIND_AT]) for part in modules}
    speeds = []
    for part in modules:
        at = CONFIGURED_AT if len(part) > CONFIGURED_AT + 1 else SPEED_AT
        megatransfers = struct.unpack_from("<H", part, at)[0]
        speeds += [megatransfers] if 0 < megatransfers < 0xFFFF else []
    return {
        "memory_n_modules": len(modules) or None,
        "memory_kind": kinds.pop() if len(kinds) == 1 else None,
        "memory_transfers_per_s": min(speeds) * 1e6 if speeds else None,
    }


def of_edac(folder: Path) -> dict[str, object]:
    """Modules, channels and kind that the kernel's error counters know."""
    n_modules, channels, kinds = 0, set(), set()
    for module in sorted(folder.glob("mc*/dimm*")) + sorted(folder.glob("mc*/rank*")):
        try:
            size, kind = (module / "size").read_text().strip(), (module / "dimm_mem_type").read_text().strip()
            location = (module / "dimm_location").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if not size.isdecimal() or int(size) == 0:
            continue
        n_modules += 1
        kinds.add(kind)
        channel = re.search(r"channel (\d+)", location)
        channels.add((module.parent.name, channel[1] if channel else module.name))
    return {
        "memory_n_modules": n_modules or None,
        "memory_n_channels": len(channels) or None,
        "memory_kind": kinds.pop() if len(kinds) == 1 else None,
    }


def memory_modules(edac: Path, table: Path) -> dict[str, object]:
    """What either source tells, the firmware's table first; null where neither does."""
    try:
        from_table = of_table(table.read_bytes())
    except OSError:
        from_table = {}
    found: dict[str, object] = dict.fromkeys(
        ("memory_n_modules", "memory_n_channels", "memory_kind", "memory_transfers_per_s")
    )
    for source in (of_edac(edac), from_table):
        found.update({key: value for key, value in source.items() if value is not None})
    return found
