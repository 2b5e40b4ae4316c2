"""What measurements a model can be fitted to or judged by: capture folders and aiconfigurator tables, by kernel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from perfmodel import text
from perfmodel.capture import (
    IS_OFFLOADED,
    Capture,
    fingerprint_differences,
    fitted_rows,
    load_capture,
    per_workload,
    profile_of,
)
from perfmodel.errors import InputError, NotComparableError
from perfmodel.evaluation import slower_than_peers
from perfmodel.hardware import HardwareProfile, hardware, profile_name
from perfmodel.moe_perf import read_moe_perf

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Source:
    """Measurements of one kernel on one machine in one dtype: `observations` with every expert resident, `offloaded`
    with some elsewhere (may be empty), one row a workload; `is_screened` is false where peers show a failed
    configuration; `evidence` says what they are. `other_launch` are resident workloads that were launched in the rarer
    way: no model of resident experts pools them, but offloaded experts are held against those launched as they were."""

    name: str
    kernel: str
    profile: HardwareProfile
    dtype: str
    observations: pl.DataFrame
    offloaded: pl.DataFrame
    is_screened: pl.Series
    evidence: dict[str, Any] = field(default_factory=dict)
    other_launch: pl.DataFrame | None = None

    @property
    def every(self) -> pl.DataFrame:
        """All workloads, resident and offloaded."""
        others = [] if self.other_launch is None else [self.other_launch]
        return pl.concat([self.observations, *others, self.offloaded])


def read_sources(
    paths: Sequence[str],
    kernel: str | None = None,
    machine: HardwareProfile | None = None,
    progress: Progress = lambda _: None,
    *,
    must_agree: bool = False,
    any_version: bool = False,
) -> list[Source]:
    """The measurements of capture folders and tables, one Source for each kernel on each machine, by name.

    Captures of one machine, kernel and dtype are pooled; tables are split by kernel. What captures measured in a dtype
    other than that of their settings is a kernel of its own, to be asked for. `kernel` keeps the one of that
    name, else those whose name contains it, in any case; with `any_version`, else the kernels of a table that differ
    from it in the framework's version alone. `machine` stands for the GPU of a table where no shipped
    profile does. Raises NotComparableError for captures that differ and `must_agree`, and InputError for what is no
    source or where nothing is left.
    """
    folders = [path for path in paths if Path(path).is_dir()]
    captures = [
        one for group in _groups(folders, must_agree=must_agree) for one in _of_captures(group, kernel, progress)
    ]
    tables = [_Table(path, *one) for path in paths if path not in folders for one in _by_kernel(path, progress)]
    names = sorted({*(one.kernel for one in captures), *(one.kernel for one in tables)})
    chosen = names if kernel is None else [name for name in names if name.lower() == kernel.lower()]
    if not chosen:
        chosen = [name for name in names if str(kernel).lower() in name.lower()]
    if not chosen and any_version:
        chosen = [name for name in names if _without_version(name) == _without_version(str(kernel))]
    if not chosen:
        raise InputError(f"no kernel contains {kernel!r}; there are {', '.join(names)} (choose with --kernel)")
    found = [one for one in captures if one.kernel in chosen]
    found += [_of_table(one, machine) for one in tables if one.kernel in chosen]
    return sorted(found, key=lambda one: (one.kernel, one.profile.name))


def _without_version(kernel: str) -> list[str]:
    """The parts of framework/version/kernel/dtype but the version; of other names all."""
    parts = kernel.lower().split("/")
    return parts[:1] + parts[2:] if len(parts) == 4 else parts


def only_source(sources: Sequence[Source]) -> Source:
    """The single source there is; raises InputError naming the kernels where there are several, never to be pooled."""
    if len(sources) > 1:
        names = ", ".join(f"{one.kernel} on {one.profile.name}" for one in sources)
        if len({one.kernel for one in sources}) == 1:
            raise InputError(f"several machines cannot share a model, give the measurements of one: {names}")
        raise InputError(f"{len(sources)} kernels cannot share a model, choose one with --kernel: {names}")
    return sources[0]


def _groups(folders: Sequence[str], *, must_agree: bool) -> list[list[Capture]]:
    """Captures of one machine, kernel and dtype together; where all must agree, the first that differs is named."""
    groups: list[list[Capture]] = []
    for capture in map(load_capture, folders):
        for group in groups:
            if capture.digest in {one.digest for one in group}:
                raise InputError(f"capture {capture.name!r} holds the same measurements as one given before it")
            differences = fingerprint_differences(group[0], capture)
            if not differences:
                group.append(capture)
                break
            if must_agree:
                key, (a, b) = next(iter(differences.items()))
                raise NotComparableError(
                    f"captures {group[0].name!r} and {capture.name!r} differ in {key} ({a!r}, {b!r}) and cannot share "
                    "a model"
                )
        else:
            groups.append([capture])
    return groups


def _of_captures(captures: Sequence[Capture], kernel: str | None, progress: Progress) -> list[Source]:
    """The measurements of captures in the dtype of their settings; where a kernel is asked for, those of each further
    dtype too, as a kernel of its own: `kernel/dtype`."""
    first = captures[0]
    every = per_workload(pl.concat([capture.observations for capture in captures]))
    resident = every.filter(~IS_OFFLOADED)
    name, further = str(first.manifest["kernel"]), sorted({*resident["dtype"].unique()} - {first.dtype})
    if kernel is None:
        found = [_of_dtype(captures, every, first.dtype, name, progress)]
        if further:
            progress(f"for measurements in another dtype add --kernel {further[0]}")
        return found
    found, is_main = [], kernel.lower() in name.lower()
    for dtype in [first.dtype, *further]:
        told = progress if is_main == (dtype == first.dtype) else lambda _: None
        found.append(_of_dtype(captures, every, dtype, name if dtype == first.dtype else f"{name}/{dtype}", told))
    return found


def _of_dtype(captures: Sequence[Capture], every: pl.DataFrame, dtype: str, kernel: str, progress: Progress) -> Source:
    first = captures[0]
    name = ", ".join(capture.name for capture in captures)
    observations, n_left_out = fitted_rows(every, dtype)
    mine = every.filter(pl.col("dtype") == dtype)
    other_launch = mine.filter(~IS_OFFLOADED).join(observations.select("workload"), on="workload", how="anti")
    _tell(n_left_out, progress)
    if not observations.height:
        raise InputError(f"{name}: no resident {dtype} workload to fit a model on")
    progress(f"{observations.height} workloads of {observations['shape'].n_unique()} shapes")
    evidence = {
        "captures": [{"name": c.name, "digest": c.digest, "n_observations": c.observations.height} for c in captures],
        "n_workloads": observations.height,
        "launch": observations["launch"][0],
        "machine": dict(first.manifest["machine"]),
        "software": dict(first.manifest["software"]),
    }
    screened = pl.repeat(value=True, n=observations.height, dtype=pl.Boolean, eager=True)
    offloaded = mine.filter(IS_OFFLOADED)
    return Source(name, kernel, profile_of(first), dtype, observations, offloaded, screened, evidence, other_launch)


class _Table(NamedTuple):
    """The rows of one kernel on one GPU, as its driver names it, in a table of measurements."""

    path: str
    kernel: str
    gpu: str
    rows: pl.DataFrame


def _by_kernel(path: str, progress: Progress) -> list[tuple[str, str, pl.DataFrame]]:
    table, n_left_out = read_moe_perf(path)
    _tell(n_left_out, progress)
    table = table.with_columns(is_screened=~slower_than_peers(table))
    return [(str(name), str(gpu), rows) for (name, gpu), rows in table.group_by("kernel", "machine")]


def _of_table(table: _Table, machine: HardwareProfile | None) -> Source:
    name, known = Path(table.path).name, profile_name(table.gpu)
    if machine is None and known is None:
        raise InputError(
            f"{name}: no shipped hardware profile is called for by {table.gpu!r}; give one with --hardware"
        )
    ordered = table.rows.sort("shape", "hidden", "inter", "routing", "n_tokens")
    rows, screened = ordered.drop("is_screened", "kernel", "machine", "tp"), ordered["is_screened"]
    evidence = {"table": name, "n_workloads": rows.height, "launch": "graph", "machine": table.gpu}
    profile = machine or hardware(str(known))
    return Source(name, table.kernel, profile, rows["dtype"][0], rows, rows[:0], screened, evidence)


def _tell(n_left_out: dict[str, int], progress: Progress) -> None:
    for reason, n in n_left_out.items():
        progress(f"left out: {text.counted(n, 'measurement')} {reason}")
