"""Who waits for whom: collectives matched over ranks, how long each rank waits in them, and which comes last.

A collective of ranks that exchange data ends for all of them at about the same time, since none can end before the
last has come. So a rank's wait is its own duration minus the shortest one, and who has the shortest came last. Only
durations are compared, never times of different ranks: clocks need not agree. What this assumes, and where it fails:

- It holds where every rank needs data of every other: all-reduce, all-gather, all-to-all, barrier. The root of a
  broadcast, or a rank of a pipeline, may end early; these are matched too, if they pass the check below.
- The shortest duration counts as transfer. Where it was longer than that, the excess is nobody's wait.
- A wait that compute of another stream hides costs nothing; it is a wait of the collective, not of the rank.
- Occurrences are matched by their order in a step. Where the trace records process groups (Kineto, NCCL) they are
  matched within one. Else all members must show as many of a name in a step, and clocks must be possible by which
  what is matched ran at the same time; two groups that run in step cannot be told apart even so.
"""

import json
from dataclasses import dataclass

import numpy as np
import polars as pl

from perfmodel import text
from perfmodel.classify import COMMUNICATION, Rules, classify
from perfmodel.ep_steps import straggler_ratios
from perfmodel.groups import step_at
from perfmodel.intervals import DEVICE, busy_ns, parents
from perfmodel.launch import joined_kernels
from perfmodel.passes.measured import Floats, host_communication, host_compute

MEMBER = DEVICE  # who takes part in a collective: a device of a rank, or the rank itself where it has none
# What is told of one rank: its collectives, how long it computed in each step, and with what.
COLLECTIVES = pl.Schema(
    {"rank": pl.Int32(), "device": pl.Int64(), "step": pl.Int64(), "name": pl.String(), "group": pl.String(),
     "start_ns": pl.Int64(), "dur_ns": pl.Int64()}
)  # fmt: skip
COMPUTE = pl.Schema(
    {"rank": pl.Int32(), "device": pl.Int64(), "step": pl.Int64(), "class": pl.String(), "time_ns": pl.Int64()}
)
SLACK_NS = 50_000  # by how much a member may seem to end before another begins, for jitter of clocks; assumed
LEAST_AGREEING_FRAC = 0.9  # of the occurrences of one name, below which they are not taken for the same collectives
LEAST_CHECKED = 3  # occurrences from which a difference of clocks can be told from a wrong match
_NAMES_SHOWN = 40
BUSY = ""  # the class under which COMPUTE has the union of all classes


@dataclass(frozen=True)
class Waits:
    """Collectives matched over members, and what follows from them.

    `occurrences` has a row for each member of each matched collective: `step`, `name`, `group`, `nth` in its step, the
    member, `dur_ns`, `wait_ns` and `is_last`. `notes` say what was left out and what could not be checked.
    """

    occurrences: pl.DataFrame
    notes: tuple[str, ...]


def collectives(events: pl.DataFrame, rules: Rules | None = None) -> pl.DataFrame:
    """Which collectives did the devices of a trace run, or its host where no device did: the table COLLECTIVES.

    On devices kernels of the classes `classify.COMMUNICATION`, named by the collective where it is recorded, on hosts
    ranges such as `gloo:all_to_all`. `group` is the process group with its ranks as JSON, null where not recorded.
    """
    kernels = joined_kernels(events)
    if kernels.is_empty():  # ranges of a host that launches kernels tell when it issued them
        ranges = host_communication(events).filter(pl.col("kind") == "range")
        at = step_at(events, ranges.rename({"start_ns": "at_ns"}))
        ranges = ranges.with_columns(at, device=pl.lit(None, pl.Int64), group=pl.lit(None, pl.String))
        return ranges.match_to_schema(COLLECTIVES, extra_columns="ignore").sort("start_ns")
    kernels = kernels.filter(classify(kernels["name"], rules).is_in(list(COMMUNICATION)))
    said = kernels["collective"].cast(pl.String)
    names = {one: _name_and_group(one) for one in said.drop_nulls().unique()}
    named = {one: name for one, (name, _) in names.items()}
    grouped = {one: group for one, (_, group) in names.items()}
    begins = kernels.select("rank", process="launch_process", at_ns="launch_start_ns")
    return kernels.select(
        *MEMBER,
        step_at(events, begins),
        pl.coalesce(said.replace_strict(named, default=None, return_dtype=pl.String), kernels["name"].cast(pl.String))
        .alias("name"),
        said.replace_strict(grouped, default=None, return_dtype=pl.String).alias("group"),
        "start_ns",
        "dur_ns",
    ).sort("start_ns")  # fmt: skip


def compute_of_steps(events: pl.DataFrame, rules: Rules | None = None) -> pl.DataFrame:
    """How long did each device (or host) compute in each step, and with what: the table COMPUTE.

    Classes of kernels other than communication, summed; on a host its outermost operators by name. The rows whose class
    is empty have the union of all of them.
    """
    kernels = joined_kernels(events)
    if kernels.is_empty():
        work = host_compute(events)
        work = work.filter(parents(work).is_null()).with_columns(device=pl.lit(None, pl.Int64))
        work = work.with_columns(step_at(events, work.rename({"start_ns": "at_ns"}))).rename({"name": "class"})
    else:
        kind = classify(kernels["name"], rules)
        begins = kernels.select("rank", process="launch_process", at_ns="launch_start_ns")
        work = kernels.with_columns(step_at(events, begins), kind.cast(pl.String).alias("class"))
        work = work.filter(~kind.is_in(list(COMMUNICATION)))
    by = [*MEMBER, "step"]
    classes = work.group_by(*by, "class").agg(time_ns=pl.sum("dur_ns"))
    union = busy_ns(work.select(*by, "start_ns", "dur_ns"), by).select(*by, time_ns="busy_ns")
    union = union.with_columns(pl.lit(BUSY).alias("class"))
    both = [table.select(pl.col(name).cast(dtype) for name, dtype in COMPUTE.items()) for table in (classes, union)]
    return pl.concat(both).sort(*by, "class")


def matched_waits(found: pl.DataFrame, members: pl.DataFrame) -> Waits:
    """Which collectives of different members are the same, and how long did each member wait in them.

    `found` is COLLECTIVES of all members together, `members` the distinct MEMBER that were read. A name of which
    members show different numbers in a step, or whose matched occurrences did not run together, is left out.
    """
    keys, kind = ["step", "name", "group"], ["name", "group"]
    nth = pl.int_range(pl.len()).over(*keys, *MEMBER)
    table = found.sort("start_ns", maintain_order=True).with_columns(nth=nth)
    is_alike = _is_alike(table, members, keys)
    good, bad = is_alike.filter("is_alike"), is_alike.filter(~pl.col("is_alike"))
    table = table.join(good, on=keys, how="semi", nulls_equal=True)
    checked, unsure = _agreeing(table)
    refused = table.join(checked, on=kind, how="anti", nulls_equal=True)
    notes = {
        f"{_listed(bad['name'])} left out in {text.counted(bad['step'].n_unique(), 'step')}: ranks show different "
        "numbers of them": bad.height and members.height > 1,
        f"{_listed(refused['name'])} left out: what would be matched does not run together, so ranks call it in "
        "different groups or a different order": refused.height,
        f"whether all ranks mean the same by {_listed(unsure['name'])} could not be checked, there being fewer than "
        f"{LEAST_CHECKED} of them": unsure.height,
    }
    table = table.join(checked, on=kind, how="semi", nulls_equal=True)
    one = [*keys, "nth"]
    table = table.with_columns(wait_ns=pl.col("dur_ns") - pl.col("dur_ns").min().over(one))
    table = table.sort(*one, *MEMBER)
    is_last = pl.int_range(pl.len()).over(one) == pl.col("dur_ns").arg_min().over(one)
    return Waits(
        table.select(*one, *MEMBER, "dur_ns", "wait_ns", is_last=is_last), tuple(n for n, told in notes.items() if told)
    )


def waits_of_steps(waits: Waits) -> pl.DataFrame:
    """How long did each member wait in each step, and how long others for it: one row for each step and member.

    Columns `step`, the member, `n_collectives`, `communication_ns` (summed durations), `wait_ns`, `n_last` and
    `caused_ns`, the waits of all others in the collectives to which it came last.
    """
    one = ["step", "name", "group", "nth"]
    table = waits.occurrences.with_columns(all_ns=pl.col("wait_ns").sum().over(one))
    return (
        table.group_by("step", *MEMBER)
        .agg(
            n_collectives=pl.len().cast(pl.Int64),
            communication_ns=pl.sum("dur_ns"),
            wait_ns=pl.sum("wait_ns"),
            n_last=pl.sum("is_last").cast(pl.Int64),
            caused_ns=pl.col("all_ns").filter("is_last").sum(),
        )
        .sort("step", *MEMBER)
    )


def late_members(by_step: pl.DataFrame, compute: pl.DataFrame) -> pl.DataFrame:
    """Whom do the others wait for in each step, and what did it do longer: one row a step, from both tables above.

    Columns `step`, the member with the largest `caused_ns`, which has `caused_ns` and `n_last`, `wait_ns` of all
    members together, and `class`, what it did longer than the median of the other members by most, with `longer_ns`;
    null where it did nothing longer. `busy_longer_ns` is how much longer it computed in all, negative where shorter.
    """
    first = pl.col("caused_ns").arg_max()
    late = by_step.group_by("step", maintain_order=True).agg(
        *(pl.col(name).get(first) for name in (*MEMBER, "caused_ns", "n_last")), wait_ns=pl.sum("wait_ns")
    )
    members = by_step.select("step", *MEMBER)
    grid = members.join(compute.select("step", "class").unique(), on="step", nulls_equal=True)
    keys = [*MEMBER, "step", "class"]
    full = grid.join(compute, on=keys, how="left", nulls_equal=True).with_columns(pl.col("time_ns").fill_null(0))
    mine = full.join(late.select("step", *MEMBER), on=["step", *MEMBER], how="semi", nulls_equal=True)
    others = full.join(late.select("step", *MEMBER), on=["step", *MEMBER], how="anti", nulls_equal=True)
    median = others.group_by("step", "class").agg(median_ns=pl.median("time_ns"))
    longer = mine.join(median, on=["step", "class"], nulls_equal=True).select(
        "step", "class", longer_ns=pl.col("time_ns") - pl.col("median_ns")
    )
    most = (
        longer.filter((pl.col("class") != BUSY) & (pl.col("longer_ns") > 0))
        .sort("longer_ns", "class", descending=[True, False])
        .unique("step", keep="first", maintain_order=True)
    )
    in_all = longer.filter(pl.col("class") == BUSY).select("step", busy_longer_ns="longer_ns")
    for part in (most, in_all):
        late = late.join(part, on="step", how="left", nulls_equal=True, maintain_order="left")
    return late


def straggler_statistics(times: pl.DataFrame, of: list[str]) -> dict[str, float | int | None]:
    """How much longer does the slowest member take than the fastest, over many occurrences (FlashMoE, Table 2).

    `times` has `dur_ns` of each member of each occurrence `of`. `n` occurrences of two members or more, `ratio_median`
    and `ratio_p95` of t / t_a, slowest over fastest, and `delay_max_ns`, the largest t - t_a; null where there is none.
    An occurrence whose fastest took no time has a delay and no ratio.
    """
    each = (
        times.group_by(of).agg(fastest=pl.min("dur_ns"), slowest=pl.max("dur_ns"), n=pl.len()).filter(pl.col("n") > 1)
    )
    ratios = straggler_ratios(each["slowest"].to_numpy(), each["fastest"].to_numpy())
    return {
        "n": each.height,
        "ratio_median": ratios and ratios[0],
        "ratio_p95": ratios and ratios[1],
        "delay_max_ns": each.select((pl.col("slowest") - pl.col("fastest")).max()).item(),
    }


def _is_alike(table: pl.DataFrame, members: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """In which steps does every member that must take part in a collective show as many of it: `keys`, `is_alike`.

    That are those of its process group that were read, or all where no group is recorded; where a group is known by
    name alone, those that show it. What the only member of a group that was read does alone is left out.
    """
    present = {rank for rank in members["rank"] if rank is not None}
    ranks = {one: json.loads(one)[1] for one in table["group"].drop_nulls().unique()}
    n_expected = {one: len(present & set(listed)) for one, listed in ranks.items() if listed is not None}
    is_named = pl.col("group").is_in([one for one, listed in ranks.items() if listed is None])
    known = pl.col("group").replace_strict(n_expected, default=None, return_dtype=pl.Int64)
    known = pl.when(is_named).then(pl.col("n_members").cast(pl.Int64)).otherwise(known)
    return (
        table.group_by(*keys, *MEMBER)
        .agg(n=pl.len())
        .group_by(keys)
        .agg(n_different=pl.col("n").n_unique(), n_members=pl.len())
        .with_columns(n_expected=known.fill_null(members.height))
        .filter(pl.col("n_expected") > 1)
        .select(*keys, is_alike=(pl.col("n_different") == 1) & (pl.col("n_members") == pl.col("n_expected")))
    )


def _agreeing(table: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Names and groups whose matched occurrences can be the same collectives, and those of them too rare to tell.

    There must be a clock for each member by which the last to come began before the first has ended, or SLACK_NS after
    it at most.
    """
    kept, unsure = [], []
    for kind, of_kind in table.partition_by("name", "group", as_dict=True).items():
        first = of_kind.group_by(MEMBER).agg(first_ns=pl.min("start_ns")).sort(MEMBER).with_row_index("member")
        part = of_kind.sort("step", "nth").with_columns(occurrence=pl.struct("step", "nth").rle_id())
        part = part.join(first, on=MEMBER, nulls_equal=True)
        at = part["occurrence"].to_numpy(), part["member"].to_numpy()
        start = np.full((at[0].max() + 1, first.height), np.nan)
        start[at] = (part["start_ns"] - part["first_ns"]).to_numpy()  # so that no clock is too large for a float
        end = start.copy()
        end[at] += part["dur_ns"].to_numpy()
        shift = _clock_shifts(start, end)
        is_one = np.nanmax(start - shift, axis=1) <= np.nanmin(end - shift, axis=1) + SLACK_NS
        if is_one.mean() >= LEAST_AGREEING_FRAC:
            kept.append(kind)
            unsure += [kind] if len(is_one) < LEAST_CHECKED else []
    schema = {"name": pl.String, "group": pl.String}
    return pl.DataFrame(kept, schema, orient="row"), pl.DataFrame(unsure, schema, orient="row")


def _clock_shifts(start: Floats, end: Floats) -> Floats:
    """By how much is each member's clock ahead, so that occurrences [occurrence, member] can overlap; NaN: not there.

    Member i begins before j ends, so shift_i - shift_j >= start_i - end_j: constraints of differences, which longest
    paths solve, to member 0 and from it, and so does the mean of both. A few occurrences may be odd. Ends alone do not
    tell clocks: where hosts communicate, one may have received all its rows long before the others have.
    """
    n_odd = int((len(start) - 1) * (1 - LEAST_AGREEING_FRAC) / 2)
    least = np.empty((start.shape[1], start.shape[1]))
    for i in range(len(least)):
        apart = np.nan_to_num(start[:, i, None] - end, nan=-1e18)  # members that share none bind each other to nothing
        least[i] = -np.partition(-apart, n_odd, axis=0)[n_odd] - SLACK_NS
    np.fill_diagonal(least, 0)
    for via in range(len(least)):
        least = np.maximum(least, least[:, via, None] + least[via])
        if (np.diag(least) > 0).any():  # a cycle that no clocks satisfy
            break
    shift: Floats = (least[:, 0] - least[0]) / 2
    return shift


def _name_and_group(collective: str) -> tuple[str | None, str | None]:
    """The name of a collective and its process group, `[name, ranks]`, from the column `collective` of EVENTS.

    Ranks are null where they are not all written, as torch does of large groups; the group is null without a name too.
    """
    try:
        name, group, ranks = json.loads(collective)
    except ValueError:
        return None, None
    try:
        ranks = json.loads(ranks) if isinstance(ranks, str) else ranks
    except ValueError:
        ranks = None
    is_listed = isinstance(ranks, list) and all(type(rank) is int for rank in ranks) and len(ranks) > 0
    known = [None if group is None else str(group), sorted(ranks) if is_listed else None]
    return (str(name) if name else None), None if known == [None, None] else json.dumps(known)


def _listed(names: pl.Series) -> str:
    shown = [text.shortened(name, _NAMES_SHOWN) for name in names.unique().sort()[:3]]
    return ", ".join(shown) + (" ..." if names.n_unique() > 3 else "")
