"""What nvidia-smi tells of one GPU: settings, clocks under load, links. Needs no torch and no root; ids are not kept.

A field that a driver does not know makes nvidia-smi refuse the whole question, so fields are then asked one by one.
"""

import functools
import re
import statistics
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

Answer = dict[str, object]
Ask = Callable[[Sequence[str]], str | None]

ASK_S, SAMPLE_EVERY_S = 20.0, 0.2
STATIC = {
    "driver": "driver_version",
    "power_limit_watts": "power.limit",
    "power_limit_default_watts": "power.default_limit",
    "pcie_gen_max": "pcie.link.gen.max",
    "pcie_width_max": "pcie.link.width.max",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_max_mhz": "clocks.max.mem",
    "ecc": "ecc.mode.current",
    "persistence": "persistence_mode",
    "compute_mode": "compute_mode",
    "mig": "mig.mode.current",
    "addressing": "addressing_mode",
}
SEEN = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "temperature_c": "temperature.gpu",
    "pcie_gen": "pcie.link.gen.current",
    "pcie_width": "pcie.link.width.current",
    "clock_reasons": "clocks_event_reasons.active",
}
OLD_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}  # before driver 535
# nvml.h, nvmlClocksEventReason*: why clocks are what they are.
CLOCK_REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def ask(arguments: Sequence[str]) -> str | None:
    """What nvidia-smi prints, or null when it is missing, refuses or hangs."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout


def number(words: str) -> object:
    """A field as an integer or a float where it is one, null where nvidia-smi has nothing to say, else its words."""
    words = words.strip()
    if not words or words.startswith("[") or words in ("N/A", "Unknown Error"):
        return None
    if re.fullmatch(r"\d+", words):
        return int(words)
    return float(words) if re.fullmatch(r"\d+\.\d+", words) else words


def _values(gpu_id: str, names: Sequence[str], asker: Ask) -> list[str] | None:
    answer = asker([f"--id={gpu_id}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"])
    parts = [part.strip() for part in (answer or "").strip().split(",")]
    return parts if answer is not None and len(parts) == len(names) else None


def known(gpu_id: str, fields: Mapping[str, str], asker: Ask = ask) -> dict[str, str]:
    """The fields that this driver answers, older names where it has only those; empty without nvidia-smi or the GPU."""
    if _values(gpu_id, list(fields.values()), asker) is not None:
        return dict(fields)
    if _values(gpu_id, ["name"], asker) is None:
        return {}
    found = {}
    for key, name in fields.items():
        for candidate in (name, OLD_NAMES.get(name)):
            if candidate and _values(gpu_id, [candidate], asker) is not None:
                found[key] = candidate
                break
    return found


def query(gpu_id: str, fields: Mapping[str, str], asker: Ask = ask) -> Answer:
    """Known fields of one GPU, keyed by our names, null where the driver does not tell; empty when it refuses."""
    values = _values(gpu_id, list(fields.values()), asker) if fields else None
    # A version is words even where it looks like a number.
    return {key: v if key == "driver" else number(v) for key, v in zip(fields, values, strict=True)} if values else {}


def gpu_smi(uuid: str, asker: Ask = ask) -> Answer:
    """Driver, limits, modes and the widest link of one GPU; empty when nvidia-smi cannot be asked."""
    return query(uuid, known(uuid, STATIC, asker), asker)


def reasons(mask: object) -> list[str]:
    """The words for a mask of clock reasons, `0x0000000000000004` -> power cap; empty for none and for null."""
    bits = int(mask, 16) if isinstance(mask, str) and re.fullmatch(r"0x[0-9a-fA-F]+", mask) else 0
    return [words for bit, words in CLOCK_REASONS.items() if bits & bit]


def modes(uuid: str, asker: Ask = ask) -> Answer:
    """Virtualisation, C2C links with their summed nominal rate, and confidential computing; null where not told."""
    page = asker(["-q", f"--id={uuid}"]) or ""
    virtual = re.search(r"Virtualization Mode\s*:\s*(.+)", page)
    # The answer of `c2c` names each GPU and its UUID: only the rates of the first are taken.
    links = asker(["c2c", "-s", "-i", uuid]) or asker(["c2c", "-s"]) or ""
    first = re.split(r"^\s*GPU \d+:", links, flags=re.MULTILINE)[:2][-1]
    c2c = re.findall(r"Link\s+\d+:\s*([\d.]+)\s*GB/s", first)
    confidential = re.search(r"CC status\s*:\s*(\w+)", asker(["conf-compute", "-f"]) or "", re.IGNORECASE)
    return {
        "virtualization": virtual[1].strip() if virtual else None,
        "c2c_n_links": len(c2c) or None,
        "c2c_peak_bytes_per_s": sum(float(rate) for rate in c2c) * 1e9 if c2c else None,
        "confidential_compute": confidential[1].lower() if confidential else None,
    }


def seen(samples: Sequence[Answer]) -> Answer:
    """Samples under load as one: medians of the numbers, all clock reasons that were active in any of them."""
    found: Answer = {"n_samples": len(samples)}
    for key in SEEN:
        if key == "clock_reasons":
            found[key] = sorted({words for sample in samples for words in reasons(sample.get(key))})
            continue
        numbers = [value for sample in samples if isinstance(value := sample.get(key), int | float)]
        found[key] = statistics.median(numbers) if numbers else None
    return found


@functools.cache
def known_seen(gpu_id: str, asker: Ask) -> dict[str, str]:
    """The fields of `SEEN` that nvidia-smi answers, asked once: where it is missing or hangs, it costs that once."""
    return known(gpu_id, SEEN, asker)


class Sampler:
    """Asks nvidia-smi again and again in a thread, from entering to leaving; `samples` grows meanwhile.

    One process a sample, not one that repeats: what a repeating one prints may wait in its buffer when it is ended.
    """

    def __init__(self, gpu_id: str, asker: Ask = ask) -> None:
        self.samples: list[Answer] = []
        self._gpu_id, self._asker, self._stop = gpu_id, asker, threading.Event()
        self._fields = known_seen(gpu_id, asker)
        self.failed = not self._fields
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while not self.failed and not self._stop.is_set():
            sample = query(self._gpu_id, self._fields, self._asker)
            self.samples += [sample] if sample else []
            self.failed = not sample
            self._stop.wait(SAMPLE_EVERY_S)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(ASK_S)
