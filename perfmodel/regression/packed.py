"""Capture folders that come in a zip archive, as people hand them over."""

import zipfile
from pathlib import Path, PurePosixPath

from perfmodel.capture_lines import CALIBRATION, LEFT_OUT, MANIFEST, OBSERVATIONS_FILE, WORKLOADS
from perfmodel.errors import InputError

FILES = (MANIFEST, WORKLOADS, OBSERVATIONS_FILE, CALIBRATION, LEFT_OUT)  # all that a comparison reads
MAX_UNPACKED_BYTES = 64 * 2**20
MAX_CAPTURES = 32  # of one archive
MAX_LINES = 100_000  # of a file of somebody unknown; a day of measuring makes some thousands


def unpack_captures(archive: str | Path, into: str | Path) -> list[Path]:
    """The capture folders of a zip archive, unpacked below `into`, by name; other files of the archive stay packed.

    A capture at the top of the archive takes the archive's name. Raises InputError for what is no zip archive, is
    damaged or locked, holds no capture or more than MAX_CAPTURES, or unpacks to more than MAX_UNPACKED_BYTES.
    """
    archive = Path(archive)
    left, folders = MAX_UNPACKED_BYTES, []
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [PurePosixPath(name.replace("\\", "/")) for name in packed.namelist()]
            stored = dict(zip(members, packed.infolist(), strict=True))
            manifests = sorted(member for member in members if member.name == MANIFEST)
            if len(manifests) > MAX_CAPTURES:
                raise InputError(f"{archive.name} holds {len(manifests)} captures, expected at most {MAX_CAPTURES}")
            for i, manifest in enumerate(manifests):
                name = manifest.parent.name
                folder = Path(into) / str(i) / (archive.stem if name in ("", "..") else name)
                folder.mkdir(parents=True)
                folders.append(folder)
                for file in FILES:
                    if manifest.parent / file in stored:
                        with packed.open(stored[manifest.parent / file]) as member:
                            content = member.read(left + 1)
                        left -= len(content)
                        if left < 0:
                            limit = MAX_UNPACKED_BYTES // 2**20
                            raise InputError(f"{archive.name} unpacks to more than {limit} MiB; use the command line")
                        (folder / file).write_bytes(content)
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{archive.name} is no zip archive that can be read: {type(error).__name__}") from None
    if not folders:
        raise InputError(f"{archive.name} holds no capture: found no {MANIFEST} in it")
    return sorted(folders, key=lambda folder: folder.name)


def refuse_large(folder: Path) -> None:
    """Raise InputError where a capture of somebody unknown has more lines or bytes than a server should read."""
    files = [file for file in (folder / name for name in FILES) if file.is_file()]
    n_bytes = sum(file.stat().st_size for file in files)
    if n_bytes > MAX_UNPACKED_BYTES:
        raise InputError(f"{folder.name} has more than {MAX_UNPACKED_BYTES // 2**20} MiB; use the command line")
    for file in files:
        n_lines = file.read_bytes().count(b"\n")
        if n_lines > MAX_LINES:
            raise InputError(f"{folder.name}/{file.name} has more than {MAX_LINES} lines; use the command line")
