"""What do the MoE layer passes of several ranks cost, and who waits for whom: figures of ranks, never their events."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from perfmodel.classify import rules_before_shipped
from perfmodel.errors import InputError, about
from perfmodel.passes import MEDIANS, moe_passes
from perfmodel.passes.found import compiled
from perfmodel.readers import is_folder_of_ranks
from perfmodel.readers.folder import (
    figures_of_files,
    find_ranks,
    ignored_note,
    listed,
    read_or_why,
    recorded_rank,
    resolve_ranks,
)
from perfmodel.trace import Trace
from perfmodel.waits import (
    BUSY,
    COLLECTIVES,
    COMPUTE,
    MEMBER,
    collectives,
    compute_of_steps,
    late_members,
    matched_waits,
    straggler_statistics,
    waits_of_steps,
)
from perfmodel.workers import PROCESSES, Progress

_TASK = "perfmodel.passes.ranks:layers_of_file"
_TIMES = pl.Schema({"rank": pl.Int32(), "device": pl.Int64(), "step": pl.Int64(), "dur_ns": pl.Int64()})
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class LayerRanks:
    """What is known of the MoE layer passes of all members (a device of a rank, or a rank without devices) of a run.

    `members` has a row for each: its `rank` and `device`, `n_passes`, its median pass (`passes.MEDIANS`,
    `communication_hidden_frac`, `idle_frac`); null where it has no pass. `waits` is `waits.waits_of_steps`, `late`
    `waits.late_members`, `stragglers` `waits.straggler_statistics` by what was compared: `collectives`, `passes`,
    `compute` of steps. `latency_ns` is the median pass, each as long as its slowest member; where passes of members
    cannot be matched, that of the slowest member; null without passes.
    """

    source: str
    members: pl.DataFrame
    waits: pl.DataFrame
    late: pl.DataFrame
    stragglers: dict[str, dict[str, float | int | None]]
    latency_ns: float | None
    failed: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self, step: int | None = None) -> dict[str, Any]:
        """The run as a dict that JSON can hold; only one step of what is told by steps, if it is given."""
        by_step = {"waits": self.waits, "late": self.late}
        if step is not None:
            by_step = {name: table.filter(pl.col("step") == step) for name, table in by_step.items()}
        return {
            "source": self.source,
            "members": self.members.to_dicts(),
            **{name: table.to_dicts() for name, table in by_step.items()},
            "stragglers": self.stragglers,
            "latency_ns": self.latency_ns,
            "failed": dict(self.failed),
            "notes": list(self.notes),
        }


def summarise_layers(
    source: str | Path,
    pattern: str | None = None,
    cache: str | Path | None = None,
    backend: str = PROCESSES,
    n_workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress = lambda _: None,
    rules: str | None = None,
) -> LayerRanks:
    """How do the ranks of a run compare in their MoE layer passes and collectives, read by workers (`run_on_all`).

    `source` is a folder with a trace for each rank, or one trace whose devices are compared. `pattern` and `rules` are
    those of `passes.moe_passes`, as text. Ranks without passes are compared by their collectives alone. Raises
    InputError where no trace can be read, or none has either.
    """
    source = Path(source)
    if rules is not None:
        rules_before_shipped(rules)
    if pattern is not None:
        compiled(pattern)
    with about(source):
        files, ignored = find_ranks(source) if is_folder_of_ranks(source) else ([source], [])
        named = {file.name if file == source else str(file.relative_to(source)): file for file in files}
        more = (pattern, rules)
        read, failed = figures_of_files(_TASK, named, cache, more, backend, n_workers, scheduler, progress)
        return _together(str(source), read, failed, ignored_note(ignored), pattern)


def compare_devices(trace: Trace, name: str, pattern: str | None = None, rules: str | None = None) -> LayerRanks:
    """How do the devices of one trace that is read already compare; `name` stands for it; else `summarise_layers`."""
    return _together(name, {name: layers_of(trace, pattern, rules)}, {}, [], pattern)


def layers_of_file(file: str, cache: str | None, pattern: str | None, rules: str | None) -> dict[str, Any] | str:
    """The figures of one rank, for a worker; the sentence that says why there are none, where it cannot be read."""
    trace = read_or_why(Path(file), cache)
    return trace if isinstance(trace, str) else layers_of(trace, pattern, rules)


def layers_of(trace: Trace, pattern: str | None = None, rules: str | None = None) -> dict[str, Any]:
    """The figures of one rank that are compared with those of others, as plain values."""
    known = None if rules is None else rules_before_shipped(rules)
    members, notes, times = [], [], pl.DataFrame(schema=_TIMES)
    try:
        found = moe_passes(trace, pattern, known)
        notes = list(found.notes)
        times = found.passes.select(_TIMES.names())
        for part in found.passes.partition_by("rank", "device", maintain_order=True):
            one = found.medians(part)
            members.append({"device": part["device"][0], "n_passes": part.height, **one})
        why = None
    except InputError as error:
        why = str(error)
    return {
        "rank": recorded_rank(trace),
        "why": why,
        "notes": notes,
        "members": members,
        "times": times.to_dict(as_series=False),
        "collectives": collectives(trace.events, known).to_dict(as_series=False),
        "compute": compute_of_steps(trace.events, known).to_dict(as_series=False),
    }


def _together(
    source: str, read: dict[str, dict[str, Any]], failed: dict[str, str], notes: list[str], pattern: str | None = None
) -> LayerRanks:
    """One LayerRanks of the figures of all files, by their names."""
    names, found = list(read), list(read.values())
    numbers, rank_notes = resolve_ranks(names, [one["rank"] for one in found])
    ranks: list[int | None] = list(numbers)
    if len(names) == 1:  # nothing tells it from others
        ranks, rank_notes = [found[0]["rank"]], []
    order = sorted(range(len(names)), key=lambda i: numbers[i])
    schemas = {"collectives": COLLECTIVES, "compute": COMPUTE, "times": _TIMES}
    tables = {
        key: pl.concat([_of_rank(found[i][key], ranks[i], schema) for i in order]) for key, schema in schemas.items()
    }
    rows = [{"rank": ranks[i], **row} for i in order for row in found[i]["members"]]
    schema = {"rank": pl.Int32, "device": pl.Int64, "n_passes": pl.Int64, **dict.fromkeys(_FIGURES, pl.Float64)}
    here = pl.concat([tables[key].select(MEMBER) for key in schemas]).unique().sort(MEMBER)
    devices = here.filter(pl.col("device").is_not_null())
    if devices.height:  # a rank is its devices, where it has any; without one it took no part
        here = devices
    whys = {one["why"] for one in found if one["why"]}
    if not rows and (pattern is not None or here.height < 2 or tables["collectives"].is_empty()):
        raise InputError(sorted(whys)[0])
    matched = matched_waits(tables["collectives"].join(here, on=MEMBER, how="semi", nulls_equal=True), here)
    waits = waits_of_steps(matched)
    passes, pass_notes = _matched_passes(tables["times"])
    own = sorted({note for one in found for note in one["notes"]})
    lacking = [f"rank {ranks[i]}" for i in order if found[i]["why"]]
    if lacking:
        own.append(f"{listed(lacking) if len(names) > 1 else 'the trace'}: {sorted(whys)[0]}")
    members = pl.DataFrame(rows, schema=schema)
    return LayerRanks(
        source,
        here.join(members, on=MEMBER, how="left", nulls_equal=True, maintain_order="left"),
        waits,
        late_members(waits, tables["compute"]),
        {
            "collectives": straggler_statistics(matched.occurrences, ["step", "name", "group", "nth"]),
            "passes": straggler_statistics(passes, ["step", "nth"]),
            "compute": _of_steps(tables["compute"]),
        },
        _latency_ns(passes, members),
        failed,
        (*notes, *rank_notes, *own, *pass_notes, *matched.notes),
    )


_FIGURES = (*MEDIANS, "idle_frac", "communication_hidden_frac")


def _of_rank(columns: Columns, rank: int | None, schema: pl.Schema) -> pl.DataFrame:
    """A table that a worker sent, under the rank that its file has among the others."""
    table = pl.DataFrame(columns, schema=schema)
    return table.with_columns(pl.lit(rank, pl.Int32).alias("rank"))


def _matched_passes(times: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """The passes of members by their order in a step, with `nth`; none, and a note, where members differ in number."""
    table = times.with_columns(nth=pl.int_range(pl.len()).over("step", *MEMBER))
    counted = table.group_by("step", *MEMBER).agg(n=pl.len()).group_by("step").agg(pl.n_unique("n"), members=pl.len())
    n_members = times.select(MEMBER).n_unique()
    odd = counted.filter((pl.col("n") > 1) | (pl.col("members") < n_members))
    notes = [f"passes are not compared in {odd.height} of {counted.height} steps: ranks have different numbers of them"]
    return table.join(odd, on="step", how="anti", nulls_equal=True), notes if odd.height else []


def _of_steps(compute: pl.DataFrame) -> dict[str, float | int | None]:
    """The straggler statistics of how long members compute in a step; outside of steps nothing can be compared."""
    whole = compute.filter((pl.col("class") == BUSY) & pl.col("step").is_not_null())
    return straggler_statistics(whole.rename({"time_ns": "dur_ns"}), ["step"])


def _latency_ns(passes: pl.DataFrame, members: pl.DataFrame) -> float | None:
    if passes.height:
        return passes.group_by("step", "nth").agg(pl.max("dur_ns"))["dur_ns"].median()  # type: ignore[return-value]
    return members["dur_ns"].max()  # type: ignore[return-value]
