"""Which spans of a trace are MoE layer passes: by the names of ranges and operators, else by kernels in their order."""

import re
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel import text
from perfmodel.classify import KERNEL_CLASS, Rules, classify
from perfmodel.errors import InputError
from perfmodel.intervals import DEVICE, THREAD, held, overlap_ns, parents
from perfmodel.launch import call_starts, joined_work

# Names without numbers. Of a layer: `FusedMoE`, `moe_layer`, `Qwen3MoeSparseMoeBlock`, `vllm::moe_forward`; not
# `Qwen3MoeAttention`, `Qwen3MoeForCausalLM`, `moe_align_block_size`. Of its experts: `mlp.experts`, `fused_experts`.
_LAYER = re.compile(r"moe(?:[\W_]*(?:layer|block|ffn|feed_?forward|forward|fwd|module|kernel)|[\W_]+mlp)*[\W_]*$", re.I)
_EXPERTS = re.compile(r"(?<![a-z])experts?(?:[\W_]*(?:forward|fwd))*[\W_]*$|(?-i:[a-z])Experts$", re.I)
_CIRCUMSTANCES = re.compile(r"\||, op_id = ")  # what collectors, and emit_nvtx, write behind a name
_NUMBERS = re.compile(r"[\W_]*\d+")

MOE_CLASSES = ("grouped_gemm", "moe_dispatch", "moe_all_to_all")
# Kernels of NCCL that an all-to-all is made of.
ALL_TO_ALL = r"(?i)all_?to_?all|SendRecv"
_COLLECTIVE_NAME = r'^\["([^"]+)"'  # in the column `collective`
# What else mixes tokens between MoE layers, where a model has more than attention.
_MIXERS = r"(?i)delta_?rule|selective_?scan|mamba|linear_?attn|rwkv|causal_conv1d"
# Kernels that are a pass by themselves.
_WHOLE_LAYER = r"(?i)flashmoe::moe::forward|mega_?moe"
LONG_GAP_NS = 10**6  # an assumed bound: no host needs as long to launch the next kernel of one layer

_NOTHING = (
    "found no MoE layer pass: no range or operator has a name such as moe_layer or experts, and no kernel is a grouped "
    "GEMM, a MoE dispatch or a MoE all-to-all; name the ranges with --range (`perfmodel analyze` lists them)"
)


@dataclass(frozen=True)
class Found:
    """The passes of a trace before anything is measured.

    `how` is `ranges` (of the host, with the device work that was launched in them), `kernels` (groups in the order of a
    device) or `host` (ranges of a trace without device work). `spans` has a row a pass: `pass`, `rank`, `process`,
    `thread`, `device`, `name`, `start_ns`, `dur_ns`; of ranges the times are those on the host, and `device` is null.
    `work` is `joined_work` with the number of its `pass`, null where it belongs to none; `notes` say how sure it is.
    """

    how: str
    spans: pl.DataFrame
    work: pl.DataFrame
    notes: tuple[str, ...]


def find_passes(events: pl.DataFrame, pattern: str | None = None, rules: Rules | None = None) -> Found:
    """Which are the MoE layer passes of a trace: named ranges and operators, else groups of kernels.

    `pattern` is a regular expression for names of ranges and operators, instead of what ours know. Raises InputError
    where it is none, matches nothing, or where nothing in the trace looks like a MoE layer.
    """
    work = joined_work(events)
    ranges = _named(events, _LAYER if pattern is None else compiled(pattern))
    if ranges.is_empty() and pattern is None:
        ranges = _named(events, _EXPERTS)
    if ranges.is_empty() and pattern is not None:
        raise InputError(
            f"no range or operator has a name in which {pattern!r} is found; `perfmodel analyze` lists them"
        )
    passes = _outermost(ranges, drop_wrappers=pattern is None)
    if not passes.is_empty() and work.is_empty():
        return Found("host", passes, work.with_columns(**{"pass": pl.lit(None, pl.Int64)}), _range_notes(passes, None))
    if not passes.is_empty():
        launched = _launched_in(passes, work)
        if launched["pass"].count():
            return Found("ranges", passes, launched, _range_notes(passes, launched))
        if pattern is not None:
            raise InputError(
                f"{text.counted(passes.height, 'range')} in whose name {pattern!r} is found launched no device work"
            )
    grouped = _grouped(work, rules)
    if grouped is None:
        raise InputError(_NOTHING)
    return grouped


def bare_name(name: str) -> str:
    """What is a range or operator called without what collectors write behind its name and without numbers."""
    return _NUMBERS.sub("", _CIRCUMSTANCES.split(name, maxsplit=1)[0])


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression; raises InputError where the text is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression ({error})") from None


def exchanges(work: pl.DataFrame) -> pl.Series:
    """Which work is an all-to-all: by the collective that is recorded, else by its name.

    A kernel that sends and receives may also be a pipeline's, and RCCL's generic kernels say nothing.
    """
    said = pl.col("collective").cast(pl.String).str.extract(_COLLECTIVE_NAME)
    name = pl.coalesce(said, pl.col("name").cast(pl.String))
    return work.select(name.str.contains(ALL_TO_ALL)).to_series()


def _named(events: pl.DataFrame, pattern: re.Pattern[str]) -> pl.DataFrame:
    """The ranges and operators in whose name a pattern is found: in their bare name where the pattern is ours."""
    named = events.select("kind", "name", *THREAD, "start_ns", "dur_ns").filter(
        pl.col("kind").is_in(["range", "op"]) & pl.col("thread").is_not_null()
    )
    is_ours = pattern in (_LAYER, _EXPERTS)
    names = named["name"].unique().cast(pl.String)
    kept = [name for name in names if pattern.search(bare_name(name) if is_ours else name)]
    found = named.filter(pl.col("name").cast(pl.String).is_in(kept)).with_columns(pl.col("name").cast(pl.String))
    return found.drop("kind").sort("rank", "process", "start_ns", "dur_ns", descending=[False, False, False, True])


def _outermost(ranges: pl.DataFrame, drop_wrappers: bool) -> pl.DataFrame:
    """The ranges that lie in no other, numbered; what holds several of the others is around passes and none itself."""
    while drop_wrappers:
        held_by = parents(ranges)
        n_held = held_by.drop_nulls().value_counts().filter(pl.col("count") > 1)["parent"]
        if n_held.is_empty():
            break
        ranges = ranges.filter(~pl.int_range(pl.len()).is_in(n_held.implode()))
    outer = ranges.filter(parents(ranges).is_null()).sort("start_ns", maintain_order=True)
    number = pl.int_range(pl.len(), dtype=pl.Int64)
    return outer.select(
        **{"pass": number}, rank="rank", process="process", thread="thread",
        device=pl.lit(None, pl.Int64), name="name", start_ns="start_ns", dur_ns="dur_ns",
    )  # fmt: skip


def _launched_in(passes: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """Device work with the pass in which its launch call began."""
    starts = call_starts(work).with_row_index("row").filter(pl.col("at_ns").is_not_null())
    pairs = held(passes, starts).unique("point", keep="first", maintain_order=True)
    number = pl.repeat(None, work.height, dtype=pl.Int64, eager=True)
    number = number.scatter(starts["row"].gather(pairs["point"]), passes["pass"].gather(pairs["interval"]))
    return work.with_columns(number.alias("pass"))


def _grouped(work: pl.DataFrame, rules: Rules | None) -> Found | None:
    """Passes as groups of MoE kernels in the order of each device; None where there is no such kernel.

    Between two kernels of attention (or what a model has in its place) lies one pass, from its first MoE kernel to its
    last. A device without attention is cut at long gaps, and where its MoE kernels repeat with a period.
    """
    kernels = work.with_row_index("row").filter(pl.col("kind") == "kernel").sort(*DEVICE, "start_ns", "row")
    names = kernels["name"].cast(pl.String)
    kind = classify(kernels["name"], rules)
    is_core = kind.is_in(list(MOE_CLASSES))
    if not is_core.any():
        return None
    is_mixer = (kind == pl.Series(["attention"], dtype=KERNEL_CLASS)) | names.str.contains(_MIXERS)
    end = (pl.col("start_ns") + pl.col("dur_ns")).cum_max().shift(1).over(DEVICE)
    table = kernels.select("row", *DEVICE, "start_ns", end_ns=pl.col("start_ns") + pl.col("dur_ns")).with_columns(
        is_core=is_core,
        is_moe=is_core | exchanges(kernels),
        is_mixer=is_mixer,
        name=kernels["name"],
        is_late=kernels.select(late=(pl.col("start_ns") - end).fill_null(0) > LONG_GAP_NS)["late"],
    )
    has_mixer = pl.col("is_mixer").any().over(DEVICE)
    table = table.with_columns(cut=pl.when(has_mixer).then("is_mixer").otherwise("is_late"), has_mixer=has_mixer)
    table = table.with_columns(segment=pl.struct(*DEVICE, pl.col("cut").cum_sum().over(DEVICE)).rle_id())
    timed = table.with_columns(dur_ns=pl.col("end_ns") - pl.col("start_ns"))
    are_mixed = overlap_ns(timed.filter("is_moe"), timed.filter("is_mixer")).sum() > 0
    table = table.filter(~pl.col("is_mixer") & pl.col("is_core").any().over("segment"))
    at = pl.int_range(pl.len())
    moe_at = at.filter(pl.col("is_moe"))
    table = table.filter(at.is_between(moe_at.first(), moe_at.last()).over("segment"))
    table = table.with_columns(turn=_turns(table)).with_columns(key=pl.struct("segment", "turn").rle_id())
    table = table.filter(pl.col("is_core").any().over("key"))
    spans = (
        table.group_by("key", maintain_order=True)
        .agg(
            pl.first(*DEVICE),
            pl.col("name").filter(pl.col("is_moe")).first().cast(pl.String),
            pl.min("start_ns"),
            dur_ns=pl.max("end_ns") - pl.min("start_ns"),
            chain=pl.col("name").filter(pl.col("is_moe")).cast(pl.String).str.join("\n"),
        )
        .sort("start_ns", *DEVICE)
        .with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("pass"))
    )
    numbers = table.join(spans.select("key", "pass"), on="key", maintain_order="left")
    number = pl.repeat(None, work.height, dtype=pl.Int64, eager=True).scatter(numbers["row"], numbers["pass"])
    nowhere = pl.lit(None, pl.Int64)
    rows = spans.select("pass", "rank", process=nowhere, thread=nowhere, device="device", name="name",
                        start_ns="start_ns", dur_ns="dur_ns")  # fmt: skip
    return Found("kernels", rows, work.with_columns(number.alias("pass")), _kernel_notes(spans, table, are_mixed))


def _turns(table: pl.DataFrame) -> pl.Series:
    """Which repetition of the MoE kernels' period is each kernel in, where nothing else tells passes apart; else 0.

    A period of one name says nothing, for a layer launches its grouped GEMM more than once, unless it is a whole layer.
    """
    turn = np.zeros(table.height, np.int64)
    is_whole = pl.col("name").cast(pl.String).str.contains(_WHOLE_LAYER)
    segments = table.select("segment", "has_mixer", "is_moe", code=pl.col("name").to_physical(), is_whole=is_whole)
    segments = segments.with_row_index("at")
    for part in segments.filter(~pl.col("has_mixer")).partition_by("segment"):
        is_moe = part["is_moe"].to_numpy()
        codes = part["code"].to_numpy()[is_moe]
        period = _period(codes)
        if period > 1 or (period and part["is_whole"].any()):
            nth = np.maximum(np.cumsum(is_moe) - 1, 0) // period
            turn[part["at"].to_numpy()] = nth
    return pl.Series(turn)


def _period(codes: NDArray[np.uint32]) -> int:
    """The shortest period of a sequence that runs through it at least twice; 0 where there is none.

    It is the length without the longest beginning that is an end as well (Knuth, Morris and Pratt).
    """
    border = [0] * len(codes)
    n = 0
    for i in range(1, len(codes)):
        while n and codes[i] != codes[n]:
            n = border[n - 1]
        n += bool(codes[i] == codes[n])
        border[i] = n
    period = len(codes) - n
    return period if period <= len(codes) // 2 else 0


def _n_passes(n: int) -> str:
    return f"{text.count(n)} MoE layer {'pass' if n == 1 else 'passes'}"


def _range_notes(passes: pl.DataFrame, work: pl.DataFrame | None) -> tuple[str, ...]:
    names = sorted({bare_name(name) for name in passes["name"]})
    shown = ", ".join(text.shortened(name, 60) for name in names[:3]) + (" ..." if len(names) > 3 else "")
    notes = [f"{_n_passes(passes.height)} told by the ranges or operators named {shown}"]
    if work is not None:
        n_empty = passes.height - work["pass"].drop_nulls().n_unique()
        notes += [f"{n_empty} of them launched no device work and are left out"] if n_empty else []
    return tuple(notes)


def _kernel_notes(spans: pl.DataFrame, table: pl.DataFrame, are_mixed: bool) -> tuple[str, ...]:
    most = spans["chain"].value_counts(sort=True)["count"][0]
    by = (
        "between kernels of attention" if table["has_mixer"].all() else "by gaps and repetition, attention being absent"
    )
    sure = f"{most} of them with the same MoE kernels in the same order"
    notes = [
        f"{_n_passes(spans.height)} told from kernels {by}, {sure}; each from its first MoE kernel to its last, "
        "without gate GEMM and all-reduce around them"
    ]
    if are_mixed:
        notes.append(
            "attention runs beside MoE kernels, so micro-batches overlap and passes told from kernels mix them; name "
            "ranges with --range"
        )
    if 2 * most <= spans.height:
        notes.append("fewer than half of the passes are alike, so their bounds are unsure; name ranges with --range")
    return tuple(notes)
