"""Folders of captures and of saved baselines as people hand them over, some in a zip archive."""

import zipfile
from pathlib import Path, PurePosixPath

from perfmodel.capture_lines import CALIBRATION, LEFT_OUT, MANIFEST, OBSERVATIONS_FILE, WORKLOADS
from perfmodel.errors import InputError
from perfmodel.regression.saved.stored import HEAD, PENDING, is_baseline

FILES = (MANIFEST, WORKLOADS, OBSERVATIONS_FILE, CALIBRATION, LEFT_OUT)  # all that a comparison reads of a capture
MAX_UNPACKED_BYTES, MAX_BASELINE_BYTES = 64 * 2**20, 8 * 2**20
MAX_CAPTURES = 32  # and saved baselines of one archive
MAX_LINES = 100_000  # of a file of somebody unknown; a day of measuring makes some thousands


def folders_below(place: Path) -> list[Path]:
    """The folders of captures and of saved baselines anywhere below a folder, by path."""
    return sorted({file.parent for name in (MANIFEST, HEAD, PENDING) for file in place.rglob(name)})


def unpack_sides(archive: str | Path, into: str | Path) -> list[Path]:
    """The folders of captures and of saved baselines of a zip archive, unpacked below `into`, by name; other files of
    the archive stay packed.

    One at the top of the archive takes the archive's name. Raises InputError for what is no zip archive, is damaged or
    locked, holds none or more than MAX_CAPTURES of them, or unpacks to more than MAX_UNPACKED_BYTES.
    """
    archive = Path(archive)
    left, folders = MAX_UNPACKED_BYTES, []
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [PurePosixPath(name.replace("\\", "/")) for name in packed.namelist()]
            stored = dict(zip(members, packed.infolist(), strict=True))
            parents = sorted({member.parent for member in members if member.name in (MANIFEST, HEAD, PENDING)})
            if len(parents) > MAX_CAPTURES:
                raise InputError(f"{archive.name} holds {len(parents)} captures, expected at most {MAX_CAPTURES}")
            for i, parent in enumerate(parents):
                is_saved = bool({parent / HEAD, parent / PENDING} & stored.keys())
                folder = Path(into) / str(i) / (archive.stem if parent.name in ("", "..") else parent.name)
                folder.mkdir(parents=True)
                folders.append(folder)
                for member, entry in stored.items():
                    is_read = member.suffix == ".json" if is_saved else member.name in FILES
                    if member.parent != parent or not is_read:
                        continue
                    with packed.open(entry) as file:
                        content = file.read(left + 1)
                    left -= len(content)
                    if left < 0:
                        limit = MAX_UNPACKED_BYTES // 2**20
                        raise InputError(f"{archive.name} unpacks to more than {limit} MiB; use the command line")
                    (folder / member.name).write_bytes(content)
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive.name} is no zip archive that can be read: {type(error).__name__}") from None
    if not folders:
        raise InputError(f"{archive.name} holds no capture and no saved baseline: found no {MANIFEST} or {HEAD} in it")
    return sorted(folders, key=lambda folder: folder.name)


def refuse_large(folder: Path) -> None:
    """Raise InputError where a capture or saved baseline of somebody unknown has more lines or bytes than a server
    should read."""
    is_saved = is_baseline(folder)
    names = [file.name for file in folder.glob("*.json")] if is_saved else FILES
    files = [file for file in (folder / name for name in names) if file.is_file()]
    limit = MAX_BASELINE_BYTES if is_saved else MAX_UNPACKED_BYTES
    if sum(file.stat().st_size for file in files) > limit:
        raise InputError(f"{folder.name} has more than {limit // 2**20} MiB; use the command line")
    for file in files:
        n_lines = file.read_bytes().count(b"\n")
        if n_lines > MAX_LINES:
            raise InputError(f"{folder.name}/{file.name} has more than {MAX_LINES} lines; use the command line")
