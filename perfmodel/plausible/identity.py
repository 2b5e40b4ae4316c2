"""Does a capture say whose machine it is, and is it a folder one can hand on: identity, size, strange files."""

import contextlib
import getpass
import gzip
import re
import socket
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from perfmodel.capture_lines import CALIBRATION, LEFT_OUT, MANIFEST, OBSERVATIONS_FILE, PLAN, PROFILES, WORKLOADS
from perfmodel.plausible.folder import ERROR, WARNING, Finding, Folder
from perfmodel.text import n_bytes

MAX_FOLDER_BYTES = 2_000_000  # captures travel with the project and by mail
MAX_UNPACKED_BYTES = 400_000_000  # of one profile: beyond it is no profile of a few steps, or a bomb
KNOWN_FILES = (MANIFEST, WORKLOADS, PLAN, OBSERVATIONS_FILE, CALIBRATION, LEFT_OUT, "README.md")
KNOWN_PROFILES = (".trace.json.gz", ".sqlite")

# A name that half the world's machines and accounts bear says nothing, and stands in many innocent words.
COMMON_NAMES = ("root", "user", "ubuntu", "admin", "localhost", "vm", "gpu", "node", "runner", "test", "docker")
SHORT_NAME = 4  # names shorter than this count only where they are a whole string

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
_ADDRESS = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_PRIVATE = r"(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01])|100\.(?:6[4-9]|[7-9]\d|1[01]\d|12[0-7])|169\.254)\."
# Numbers with dots under a key of software are versions, whatever they look like: cuBLAS 13.1.0.3 is no address.
_VERSION = re.compile(
    r'"[^"]*(?:version|cuda|cudnn|cublas|cufft|curand|cusparse|cusolver|nccl|driver|kernel|python|torch|numpy|nsys|mkl|'
    r'onednn|triton|nvtx|toolkit|runtime|firmware|release)[^"]*"\s*:\s*"[\w.+-]*"',
    re.I,
)
_PATH = r"(?<![\w./:<>*&)\]~-])/(?!proc/|sys/|dev/){}(?:[\w.@+-]+/)+[\w.@+-]+"
_SOFTWARE_PLACE = r"(?:usr|opt|lib|lib64|bin)/"
PATTERNS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    (ERROR, "an absolute path", re.compile(_PATH.format(f"(?!{_SOFTWARE_PLACE})"))),
    (WARNING, "a path of installed software", re.compile(_PATH.format(f"(?={_SOFTWARE_PLACE})"))),
    (ERROR, "a home folder", re.compile(r"/(?:home|Users)/[\w.-]+|/root/[\w.-]+|[A-Z]:\\\\?Users\\\\?[\w.-]+")),
    (ERROR, "an e-mail address", re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[a-z0-9-]+\.)+[a-z]{2,}(?![\w(])")),
    (ERROR, "a UUID", re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.I)),
    (ERROR, "a MAC address", re.compile(r"(?<![0-9a-f:-])(?:[0-9a-f]{2}:){5}[0-9a-f]{2}(?![0-9a-f:-])", re.I)),
    (ERROR, "an IP address", re.compile(rf"(?<![\w.-])(?:(?<=//)|(?={_PRIVATE})){_ADDRESS}(?!\.?\w)")),
    (WARNING, "an IP address or a version", re.compile(rf"(?<![\w./-])(?!{_PRIVATE}){_ADDRESS}(?!\.?\w)")),
    (
        ERROR,
        "a key of identity",
        re.compile(
            r'"(?:\w+_)?(?:serial|serial_number|serialNumber|uuid|host_?name|user_?name|login|machine_id|mac_address|'
            r'ip_address|traceName|cwd|argv|command_line)"\s*:\s*"[^"]+"'
        ),
    ),
)
HARMLESS_ADDRESSES = re.compile(r"(?:0\.0\.0\.0|127\.\d+\.\d+\.\d+|255\.[\d.]+)")


def present_names() -> list[str]:
    """The names of this machine and of whoever runs this, as far as they would give somebody away."""
    names = [socket.gethostname(), socket.gethostname().partition(".")[0]]
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user that no list of users knows
        names.append(getpass.getuser())
    return sorted({name for name in names if name})


def identity_in(text: str, names: list[str]) -> Iterator[tuple[str, str, str]]:
    """Severity, kind and excerpt of everything in a text that says whose machine it was; one of each excerpt."""
    text = _VERSION.sub('""', text.replace("\\/", "/"))
    for severity, kind, pattern in PATTERNS:
        seen = set()
        for match in pattern.finditer(text):
            excerpt = match[0]
            if excerpt not in seen and not HARMLESS_ADDRESSES.fullmatch(excerpt):
                seen.add(excerpt)
                yield severity, kind, excerpt
    for name in names:
        is_common = name.lower() in COMMON_NAMES or len(name) < SHORT_NAME
        pattern = re.compile(f'"{re.escape(name)}"' if is_common else rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        # A common name as a key or as a word of a table of its own is what it says, not whose machine it is.
        if any(not text[m.end() :].lstrip().startswith(":") for m in pattern.finditer(text)):
            yield ERROR, "the name of this machine or user", name


def _text_of(file: Path) -> str:
    """The content of a file as text, unpacked; of a database every printable run. Raises OSError or EOFError."""
    if file.suffix != ".gz":
        return file.read_bytes().decode("latin-1" if file.suffix == ".sqlite" else "utf-8", errors="replace")
    with gzip.open(file) as packed:
        content = packed.read(MAX_UNPACKED_BYTES + 1)
    if len(content) > MAX_UNPACKED_BYTES:
        raise OSError(f"more than {n_bytes(MAX_UNPACKED_BYTES)} unpacked")
    return content.decode("utf-8", errors="replace")


def files_of(folder: Path) -> list[Path]:
    """Every file of a capture folder in order, links among them."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def identity(folder: Folder) -> Iterator[Finding]:
    """No file names a host, a user, a folder, an address, a serial number or a UUID; profiles are unpacked for it."""
    names = present_names()
    for file in files_of(folder.path):
        where = str(file.relative_to(folder.path))
        if file.is_symlink():
            continue  # said by `files`
        try:
            text = _text_of(file)
        except (OSError, EOFError, zlib.error) as error:
            yield Finding(ERROR, "identity", "unreadable", f"the file cannot be looked into: {error}", where)
            continue
        for severity, kind, excerpt in identity_in(text, names):
            shown = "".join(c if c.isprintable() else "?" for c in excerpt[:80])
            yield Finding(severity, "identity", kind, f"{kind}: {shown}", where)
        for severity, kind, excerpt in identity_in(f'"{file.name}"', names):
            yield Finding(severity, "identity", kind, f"{kind} in the name of the file: {excerpt}", where)


def files(folder: Folder) -> Iterator[Finding]:
    """The folder is small and holds what a capture holds, nothing else."""
    sizes: dict[str, int] = defaultdict(int)
    for file in files_of(folder.path):
        inside = file.relative_to(folder.path)
        is_profile = len(inside.parts) == 2 and inside.parts[0] == PROFILES and file.name.endswith(KNOWN_PROFILES)
        if file.is_symlink():
            yield Finding(ERROR, "size", "link", "a link is no part of a capture", str(inside))
        elif file.name.endswith(".part"):
            words = "a file that a kill left half-written; the same command that made the capture mends it"
            yield Finding(WARNING, "size", "half-written file", words, str(inside))
        elif str(inside) not in KNOWN_FILES and not is_profile:
            yield Finding(WARNING, "size", "strange file", "the file is no part of a capture", str(inside))
        sizes[inside.parts[0]] += 0 if file.is_symlink() else file.stat().st_size
    total = sum(sizes.values())
    if total > MAX_FOLDER_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        words = (
            f"the folder takes {n_bytes(total)}, expected at most {n_bytes(MAX_FOLDER_BYTES)}; most of it: {largest}"
        )
        yield Finding(WARNING, "size", "size", words, folder.path.name, total, MAX_FOLDER_BYTES)


def profiles(folder: Folder) -> Iterator[Finding]:
    """Every profile holds the named ranges that tell one layer from another, and kernels where a GPU computed."""
    for file in sorted((folder.path / PROFILES).glob("*")):
        where = str(file.relative_to(folder.path))
        try:
            text = _text_of(file) if file.name.endswith(KNOWN_PROFILES) and not file.is_symlink() else None
        except (OSError, EOFError, zlib.error):
            text = None  # said by `identity`
        if text is None:
            continue
        if "perfmodel::" not in text:
            yield Finding(WARNING, "form", "profile", "the profile has no range named perfmodel::...", where)
        is_trace = file.suffix == ".gz"
        kernels = r'"cat"\s*:\s*"kernel"' if is_trace else "CUPTI_ACTIVITY_KIND_KERNEL"
        if folder.is_cuda and not re.search(kernels, text):
            yield Finding(WARNING, "form", "profile", "the profile has no kernel of the GPU", where)


CHECKS = (identity, files, profiles)
