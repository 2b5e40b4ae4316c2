"""Which files of a folder are the ranks of one run, which rank is each, and how do they become one Trace."""

import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from perfmodel.cache import SUFFIX
from perfmodel.errors import InputError, TooLargeError, about
from perfmodel.readers.limits import Limits
from perfmodel.trace import EVENTS, MAX_RANK, Trace
from perfmodel.workers import ON_THIS_MACHINE, PROCESSES, Lost, Progress, run_on_all

_PACKINGS = (".gz", ".zip", ".zst")
_FORMATS = (".json", ".sqlite", ".nsys-rep")  # of one trace kept twice, the first in this order is read
_DOCUMENT_BYTES = 2**20  # a shorter JSON document without events is a manifest or settings, not a broken trace
_RANK_WORD = re.compile(r"(?<![a-z])(?<!local)(?<!local[-_. ])rank[-_. ]?(\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"(\d+)")
_MAX_ID = 2**40  # ids of one rank beyond this are numbered anew, lest thousands of ranks overflow
# Times since 1970 lie between the years 2000 and 2116; smaller ones count from somewhere else.
_EPOCH_NS = range(946_684_800 * 10**9, 2**62)
_BYTES_PER_WORKER = 4 * 2**20  # a process takes about as long to start as to read this much
_N_NAMED = 5
_TASK = "perfmodel.readers.folder:write_part"


def find_ranks(folder: Path) -> tuple[list[Path], list[str]]:
    """Which files of a folder are traces, in the order of the numbers in their names, and which others lie there.

    Where the folder itself holds no trace, those in its subfolders count (one for each machine). Hidden files and our
    own caches are in neither list. Raises InputError where there is no trace.
    """
    try:
        files, others = _split(folder)
        subfolders = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=_natural)
        if files:
            others += subfolders
        else:
            for subfolder in subfolders:
                try:
                    more, rest = _split(subfolder)
                except OSError:
                    more, rest = [], [subfolder]
                files, others = files + more, others + rest
    except OSError as error:
        raise InputError(f"a folder that cannot be read: {error.strerror or error}") from None
    ignored = [str(path.relative_to(folder)) for path in others]
    if not files:
        raise InputError(
            f"a folder without traces (found {listed(ignored) if ignored else 'nothing'}); expected one PyTorch "
            "profiler (.json, .json.gz) or Nsight Systems (.sqlite) file for each rank"
        )
    return files, ignored


def resolve_ranks(names: Sequence[str], recorded: Sequence[int | None]) -> tuple[list[int], list[str]]:
    """Which rank is each file, in order: what it recorded, else what its name says, else a free number; with notes.

    Names are believed where they say `rank-12`, `rank12` or `rank_12`, or where all differ in one small number alone;
    a process id in a name is none. Where several files claim one rank, names decide if they are unambiguous; else the
    first keeps it and the others get numbers after the highest.
    """
    named = _ranks_in_names(names)
    claims = [there if there is not None else name for there, name in zip(recorded, named, strict=True)]
    notes = []
    if _repeats(claims) and None not in named and not _repeats(named):
        notes.append("several files recorded the same rank, so ranks were taken from the names of the files")
        claims = named
    ranks: dict[int, int] = {}
    homeless = []
    for i, claim in enumerate(claims):
        if claim is None or claim in ranks.values():
            homeless.append(i)
        else:
            ranks[i] = claim
    for i in homeless:
        ranks[i] = max(ranks.values(), default=-1) + 1
        claim = claims[i]
        why = "does not say its rank" if claim is None else f"says rank {claim}, as another file does"
        notes.append(f"{names[i]} {why}; it is counted as rank {ranks[i]}")
    if len(homeless) == len(names) > 1:
        notes = [f"no file says its rank; they are numbered in the order of their names, {names[0]} being rank 0"]
    return [ranks[i] for i in range(len(names))], notes


def time_base_ns(trace: Trace) -> int | None:
    """How many ns after the start of 1970 is the zero of a trace's times; null where that is not known.

    Kineto says it (`baseTimeNanoseconds`) or, in files of 2024 and before, counts from 1970 itself, which is 0; Nsight
    Systems says when its session began.
    """
    first, last = trace.events.select(first=pl.min("start_ns"), last=pl.max("start_ns")).row(0)
    if first is None or not -_EPOCH_NS.stop < first <= last < _EPOCH_NS.stop:
        return None  # no time, or such that moving it might overflow
    for key in ("baseTimeNanoseconds", "session_start_ns"):
        base = trace.meta.get(key)
        if type(base) is int and base in _EPOCH_NS:
            return base
    return 0 if first in _EPOCH_NS else None


def time_origin_ns(bases_ns: Sequence[int | None], firsts_ns: Sequence[int | None]) -> int | None:
    """From which moment do the times of all ranks count: the earliest base, null where some rank's base is not known.

    Where times count from 1970 it is the earliest event instead, so that numbers stay small. `firsts_ns` are the first
    starts of the ranks in their own time.
    """
    known = [base for base in bases_ns if base is not None]
    if len(known) < len(bases_ns) or not known:
        return None
    if min(known) > 0:
        return min(known)
    return min((b + first for b, first in zip(known, firsts_ns, strict=True) if first is not None), default=0)


def recorded_rank(trace: Trace) -> int | None:
    """Which rank a file of one rank says it is; null where it says none or several."""
    found = trace.events["rank"].drop_nulls().unique()
    return int(found[0]) if len(found) == 1 else None


def rank_in_name(name: str) -> int | None:
    """Which rank the name of a file says in so many words (`rank-12`, `rank12`, `rank_12`); null for none."""
    word = _RANK_WORD.search(Path(name).name)
    return int(word[1]) if word and int(word[1]) <= MAX_RANK else None


def n_workers_for(files: Sequence[Path], backend: str, n_workers: int | None) -> int | None:
    """How many workers reading some files is worth: what is asked for, else no more processes than pay."""
    if backend == "sequential":
        return 1
    if backend != PROCESSES:
        return n_workers
    if n_workers is not None:
        return min(n_workers, len(files))
    from joblib import cpu_count

    n_bytes = sum(file.stat().st_size for file in files)
    return min(int(cpu_count()), len(files), 1 + n_bytes // _BYTES_PER_WORKER)


def read_ranks(
    folder: str | Path,
    cache: str | Path | None = None,
    backend: str = PROCESSES,
    n_workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress = lambda _: None,
    limits: Limits | None = None,
) -> Trace:
    """The ranks of a folder as one Trace: `rank` set, links unique, times from one origin, coverage summed.

    Workers (see `workers.run_on_all`) read each file into its Parquet part in `cache`, "beside" or a folder that they
    all see; without one, parts lie in a temporary folder, which workers elsewhere could not see. A file that cannot be
    read is left out with a note. `meta` has `folder`, `time_origin_ns` (ns since 1970; null where ranks share no clock:
    then times are those of the files), `ranks` (`rank`, `file`, `time_base_ns`, `meta` of each) and whatever else all
    ranks agree on. Raises InputError where no file can be read, and on a cluster without `cache`. With `limits` this
    process reads one file after the other, and raises TooLargeError where they hold too much together.
    """
    folder = Path(folder)
    with about(folder):
        if cache is None and backend not in ON_THIS_MACHINE:
            raise InputError(
                f"reading on {backend} needs a cache folder that all its workers see, to pass on what they read"
            )
        files, ignored = find_ranks(folder)
        n_workers = 1 if limits is not None else n_workers_for(files, backend, n_workers)
        with _parts(cache, n_workers) as parts:
            outcomes: list[Any] = [None] * len(files)
            if n_workers != 1:
                calls = [(str(file), str(parts)) for file in files]
                outcomes = run_on_all(_TASK, calls, backend, n_workers, scheduler, progress)
            traces: dict[str, Trace] = {}
            failures = {}
            for file, outcome in zip(files, outcomes, strict=True):
                name = str(file.relative_to(folder))
                trace = read_or_why(file, parts, limits) if outcome is None else outcome
                if isinstance(trace, Trace):
                    traces[name] = trace
                    if limits is not None:
                        limits.refuse_events(sum(one.n_events for one in traces.values()))
                else:
                    failures[name] = why_not(trace)
                if n_workers == 1:
                    progress(f"{len(traces) + len(failures)} of {len(files)}: {file}")
        refuse_if_all_failed(failures, len(files))
        left_out = [f"{name} is left out: {why}" for name, why in failures.items()]
        return _together(str(folder), traces, ignored_note(ignored) + left_out)


def write_part(file: str, parts: str) -> str | None:
    """Read one rank into its Parquet part, for a worker; returns why that cannot be done, null where it was."""
    outcome = read_or_why(Path(file), parts)
    return outcome if isinstance(outcome, str) else None


def read_or_why(file: Path, cache: str | Path | None, limits: Limits | None = None) -> Trace | str:
    """The trace in one file of many, or the sentence that says why there is none, without the file's name.

    Raises TooLargeError where it takes more than `limits` allow.
    """
    from perfmodel.readers import read_trace  # which reads folders with this module

    try:
        return read_trace(file, cache, limits)
    except TooLargeError:
        raise
    except InputError as error:
        return str(error).removeprefix(f"{file}: ")
    except Exception as error:  # a defect of ours in one rank must not cost the others
        return f"the reader failed ({type(error).__name__}: {error}), which is a defect"


def figures_of_files(
    task: str,
    files: Mapping[str, Path],
    cache: str | Path | None,
    more: Sequence[str | None] = (),
    backend: str = PROCESSES,
    n_workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress = lambda _: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What a task, called by workers with each file, the cache and `more`, says of each file, and why of others not.

    `files` are named as results shall be; a task returns figures as a dict, or a sentence. Raises InputError where
    there are figures of none, and what `run_on_all` raises.
    """
    calls = [(str(file), None if cache is None else str(cache), *more) for file in files.values()]
    outcomes = run_on_all(
        task, calls, backend, n_workers_for([*files.values()], backend, n_workers), scheduler, progress
    )
    read = {name: outcome for name, outcome in zip(files, outcomes, strict=True) if isinstance(outcome, dict)}
    failed = {name: why_not(outcome) for name, outcome in zip(files, outcomes, strict=True) if name not in read}
    refuse_if_all_failed(failed, len(files))
    return read, failed


def why_not(outcome: str | Lost) -> str:
    """Why a file has no result: what its worker said, or that every worker which had it died."""
    if isinstance(outcome, str):
        return outcome
    return f"every worker that read it died, for want of memory perhaps ({outcome.reason})"


def refuse_if_all_failed(failures: Mapping[str, str], n_files: int) -> None:
    """Raise InputError where there is nothing left to report."""
    if len(failures) == n_files:
        name, why = next(iter(failures.items()))
        raise InputError(f"none of its {n_files} traces can be read; {name}: {why}")


def ignored_note(ignored: Sequence[str]) -> list[str]:
    """What lies in a folder and was not read, as a note; none where that is nothing."""
    return [f"not read: {listed(ignored)}"] if ignored else []


def listed(names: Sequence[str]) -> str:
    """Some names in words, not more than a sentence bears."""
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    return ", ".join(names[:_N_NAMED]) + more


def _split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The traces that lie in one folder, each once, and its other files."""
    by_stem: dict[str, list[Path]] = {}
    others = []
    for entry in sorted((entry for entry in folder.iterdir() if not entry.is_dir()), key=_natural):
        if entry.name.startswith(".") or entry.name.endswith(SUFFIX):
            continue
        stem, kind = _stem(entry.name)
        if entry.is_file() and kind in _FORMATS and not _is_other_document(entry):  # no pipe, no link to nothing
            by_stem.setdefault(stem, []).append(entry)
        else:
            others.append(entry)
    kept = [min(same, key=lambda e: (_FORMATS.index(_stem(e.name)[1]), len(e.name))) for same in by_stem.values()]
    return kept, others + [entry for same in by_stem.values() for entry in same if entry not in kept]


def _stem(name: str) -> tuple[str, str]:
    """The name of a trace without how it is packed and its format, and that format; `.json` for unnamed packed ones."""
    packing = next((end for end in _PACKINGS if name.lower().endswith(end)), "")
    bare = name[: len(name) - len(packing)]
    kind = next((end for end in _FORMATS if bare.lower().endswith(end)), "")
    if not kind and packing and not bare.lower().endswith(".tar"):
        return bare, ".json"
    return bare[: len(bare) - len(kind)], kind


def _is_other_document(path: Path) -> bool:
    """Whether a file is a short JSON object that holds no events: a manifest, settings."""
    if path.suffix.lower() != ".json" or path.stat().st_size > _DOCUMENT_BYTES:
        return False
    text = path.read_bytes().removeprefix(BOM_UTF8).lstrip()
    return text.startswith(b"{") and b'"traceEvents"' not in text


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which rank-2 comes before rank-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(path.name)]


def _ranks_in_names(names: Sequence[str]) -> list[int | None]:
    said = [rank_in_name(name) for name in names]
    if any(_RANK_WORD.search(Path(name).name) for name in names):
        return said
    parts = [_NUMBER.split(Path(name).name) for name in names]
    if len({len(part) for part in parts}) == 1 and len(names) > 1:
        differing = [i for i in range(len(parts[0])) if len({part[i] for part in parts}) > 1]
        if len(differing) == 1 and differing[0] % 2:  # odd places hold the numbers
            numbers = [int(part[differing[0]]) for part in parts]
            if max(numbers) < 2 * len(names) and not _repeats(numbers):
                return list(numbers)
    return [None] * len(names)


def _repeats(ranks: Sequence[int | None]) -> bool:
    return any(n > 1 for rank, n in Counter(ranks).items() if rank is not None)


@contextmanager
def _parts(cache: str | Path | None, n_workers: int | None) -> Iterator[str | Path | None]:
    """Where workers leave what they read: the cache, else a folder for a while; nowhere for one worker."""
    if cache is not None or n_workers == 1:
        yield cache
        return
    with TemporaryDirectory(prefix="perfmodel-") as folder:
        yield folder


def _together(folder: str, traces: dict[str, Trace], notes: list[str]) -> Trace:
    """One Trace of the traces of all ranks, by the names of their files; empties `traces` to hold each event once."""
    names = list(traces)
    ranks, rank_notes = resolve_ranks(names, [recorded_rank(trace) for trace in traces.values()])
    bases = [time_base_ns(trace) for trace in traces.values()]
    origin = time_origin_ns(bases, [trace.events["start_ns"].min() for trace in traces.values()])  # type: ignore[misc]
    if origin is None and len(names) > 1:
        unknown = [str(rank) for rank, base in zip(ranks, bases, strict=True) if base is None]
        rank_notes.append(
            f"rank {listed(unknown)}: the file does not say when its times begin, so the times of ranks are not aligned"
        )
    in_order = sorted(zip(ranks, names, bases, strict=True))
    sources = sorted({trace.source for trace in traces.values()})
    n_events, n_dropped, n_repaired = (
        sum(getattr(trace, count) for trace in traces.values()) for count in ("n_events", "n_dropped", "n_repaired")
    )
    own_notes = _notes_of_ranks([(rank, traces[name].notes) for rank, name, _ in in_order])
    meta = _meta_of_ranks([(rank, name, base, traces[name].meta) for rank, name, base in in_order])
    frames = []
    next_free: dict[str, int] = {}
    for rank, name, base in in_order:
        shift_ns = 0 if origin is None or base is None else base - origin
        frames.append(_as_rank(traces.pop(name).events, rank, shift_ns, next_free))
    return Trace(
        pl.concat(frames),
        "+".join(sources),
        n_events,
        n_dropped,
        n_repaired,
        notes=(*notes, *rank_notes, *own_notes),
        meta={**meta, "folder": folder, "time_origin_ns": origin},
    )


def _notes_of_ranks(notes: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
    """What the files say, each sentence once with the ranks that say it."""
    by_note: dict[str, list[str]] = {}
    for rank, sentences in notes:
        for note in sentences:
            by_note.setdefault(note, []).append(str(rank))
    return [f"rank {listed(ranks)}: {note}" for note, ranks in by_note.items()]


def _meta_of_ranks(ranks: Sequence[tuple[int, str, int | None, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the files record, once where all ranks agree, else in `ranks` beside rank, file and time base of each."""
    _, _, _, first = ranks[0]
    common = {k: v for k, v in first.items() if all(k in meta and meta[k] == v for *_, meta in ranks)}
    own = [
        {
            "rank": rank,
            "file": name,
            "time_base_ns": base,
            "meta": {k: v for k, v in meta.items() if k not in common},
        }
        for rank, name, base, meta in ranks
    ]
    return {**common, "ranks": own}


def _as_rank(events: pl.DataFrame, rank: int, shift_ns: int, next_free: dict[str, int]) -> pl.DataFrame:
    """The events of one rank in the time of all, with links and operator ids that no rank before used."""
    columns = [pl.lit(rank, EVENTS["rank"]).alias("rank"), pl.col("start_ns") + shift_ns]
    for id_column in ("link", "external"):
        low, high = events.select(low=pl.min(id_column), high=pl.max(id_column)).row(0)
        if low is None:
            continue
        ids = pl.col(id_column)
        if low < 0 or high > _MAX_ID:
            ids = ids.rank("dense").cast(pl.Int64) - 1
            low, high = 0, events.height
        shift = max(next_free.get(id_column, 0) - low, 0)  # the first rank keeps its ids
        next_free[id_column] = high + shift + 1
        columns.append(ids + shift)
    return events.with_columns(columns)
