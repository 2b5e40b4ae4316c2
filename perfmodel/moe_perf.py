"""Published MoE kernel measurements: a `moe_perf` table of ai-dynamo/aiconfigurator, read in the terms of captures.

Each row of such a table is the time of one whole fused MoE layer on one GPU, replayed from a CUDA graph: top-k,
permutation, both grouped GEMMs, activation and combination; no gate, no communication.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from perfmodel import text
from perfmodel.capture import OBSERVATIONS
from perfmodel.capture_lines import GRAPH, RESIDENT
from perfmodel.errors import InputError, about, first_line
from perfmodel.routing import is_published

FUSED_MOE = "fused_moe"
TEXTS = ("framework", "version", "device", "op_name", "kernel_source", "moe_dtype", "distribution")
SIZES = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
LATENCY = "latency"  # ms
NEEDED = (*TEXTS, *SIZES, LATENCY)
TABLE_SUFFIXES, TEXT_SUFFIXES = (".parquet",), (".txt", ".csv")
LFS_POINTER = b"version https://git-lfs"  # what a checkout has in a file's place where large files were not fetched
LONGEST_HEADER = 2**16  # characters
LARGEST_SIZE = 2**31

# One row: one measurement. Columns of OBSERVATIONS mean what they mean there, except that `op` is `fused_moe`, no
# counts were kept (`routing` names how `routing.published_counts` rebuilds them), and `hidden` x `inter` is the part of
# an expert on this GPU. `shape` names the model's layer before its experts were split `tp` ways. `kernel` is
# framework/version/kernel/dtype: kernels differ by more than twice on one shape, and must never be pooled.
MOE_PERF = pl.Schema(
    {
        **{key: OBSERVATIONS[key] for key in ("workload", "op", "shape", "n_experts", "top_k", "hidden", "inter")},
        **{key: OBSERVATIONS[key] for key in ("n_gemms", "gemm_k", "gemm_n", "dtype", "device", "n_tokens", "routing")},
        **{key: OBSERVATIONS[key] for key in ("tokens_per_expert", "access", "offload_frac", "offloaded", "launch")},
        "time_ns": OBSERVATIONS["time_ns"],
        "op": pl.String(),
        "kernel": pl.String(),
        "machine": pl.String(),  # the GPU, as its driver names it
        "tp": pl.Int64(),
    }
)
CONTENT = tuple(key for key in MOE_PERF if key not in ("workload", "time_ns", "kernel", "machine", "tp"))

# How the project calls the weights of a moe_dtype (perfmodel.moe.WEIGHT_BYTES). The collectors quantise int4 weights in
# groups of 128; only Kimi-K2.5 has groups of 32, which no column tells.
WEIGHTS: dict[str, str] = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "int4_wo": "int4-g128",
    "w4afp8": "int4-g128",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_fp8": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4",
}
# In a kernel's name the dtype stays as it was written, because it says more than the weights: fp8 with one scale a
# tensor and fp8_block run different kernels. These two are mere spellings.
SPELLINGS = {"bfloat16": "bf16", "float16": "fp16"}

# Layers whose experts are plain (up, down; no gate) though no column says so: (hidden, inter, top-k, experts) of the
# Nemotron-H family, whose config.json has two projections an expert and squared ReLU. Those with latent experts were
# measured at the model's width as well as at the latent one.
NON_GATED: dict[tuple[int, int, int, int], str] = {
    (2688, 1856, 6, 128): "Nemotron 3 Nano",
    (1024, 2688, 22, 512): "Nemotron 3 Super, latent width",
    (4096, 2688, 22, 512): "Nemotron 3 Super, model width",
    (2048, 5120, 22, 512): "Nemotron 3 Ultra, latent width",
    (8192, 5120, 22, 512): "Nemotron 3 Ultra, model width",
}
NON_GATED_KERNEL = "nongated"  # in kernel_source

MEASURED_AGAIN = "that repeat a measurement, of which the median is kept"


def is_moe_perf(path: str | Path) -> bool:
    """Whether a file is such a table: it can be read and has all its columns. Never raises."""
    try:
        return set(NEEDED) <= set(_columns(Path(path)))
    except InputError:
        return False


def read_moe_perf(path: str | Path) -> tuple[pl.DataFrame, dict[str, int]]:
    """The measurements of a table (MOE_PERF), and how many of its rows are not among them, by the reason.

    A parquet file, or the older .txt or .csv; columns in any order, further ones ignored, numbers also as text. Left
    out are rows that cannot be read or compared (see `_refusals`); of equal keys the median time is kept. Raises
    InputError for a file that is no such table, or has no row left.
    """
    path = Path(path)
    with about(path):
        missing = set(NEEDED) - set(_columns(path))
        if missing:
            names = ", ".join(name for name in NEEDED if name in missing)
            raise InputError(f"is no moe_perf table: it lacks the columns {names}")
        rows = _read(path)
        n_left_out: dict[str, int] = {}
        for reason, condition in _refusals(rows).items():
            kept = rows.filter(~condition)
            if kept.height < rows.height:
                n_left_out[reason] = rows.height - kept.height
            rows = kept
        if rows.is_empty():
            found = "; ".join(f"{n} {reason}" for reason, n in n_left_out.items()) or "no row at all"
            raise InputError(f"has no measurement that can be used: {found}")
        table = _named(_measurements(rows))
        keys = [key for key in MOE_PERF if key != "time_ns"]
        once = table.group_by(keys, maintain_order=True).agg(pl.col("time_ns").median()).select(list(MOE_PERF))
        if once.height < table.height:
            n_left_out[MEASURED_AGAIN] = table.height - once.height
        return once, n_left_out


def kernels(table: pl.DataFrame) -> list[str]:
    """The kernels of a table of measurements, in the order of their names."""
    return sorted(table["kernel"].unique())


def _columns(path: Path) -> list[str]:
    """The names of the columns of a table; InputError, without the path, where the file has none."""
    if not path.is_file():
        raise InputError("no such file")
    if path.suffix not in (*TABLE_SUFFIXES, *TEXT_SUFFIXES):
        raise InputError(f"ends in {path.suffix!r}, expected {', '.join((*TABLE_SUFFIXES, *TEXT_SUFFIXES))}")
    try:
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError("is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
        if path.suffix in TABLE_SUFFIXES:
            return list(pl.read_parquet_schema(path))
        with path.open(encoding="utf-8", newline="") as lines:
            return next(csv.reader([lines.readline(LONGEST_HEADER)]), [])
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot be read as a table: {first_line(error)}") from None


def _read(path: Path) -> pl.DataFrame:
    """The columns that are needed: texts stripped, empty ones null, and numbers, null where one cannot be read."""
    try:
        if path.suffix in TABLE_SUFFIXES:
            raw = pl.read_parquet(path, columns=list(NEEDED))
        else:
            raw = pl.read_csv(path, columns=list(NEEDED), infer_schema=False)
        words = raw.select(pl.col(NEEDED).cast(pl.String).str.strip_chars())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"cannot be read as a table: {first_line(error)}") from None
    numbers = pl.col(*SIZES, LATENCY).cast(pl.Float64, strict=False)
    return words.with_columns(pl.col(TEXTS).replace("", None), numbers).with_columns(
        pl.col("moe_dtype").str.to_lowercase()
    )


def _refusals(rows: pl.DataFrame) -> dict[str, pl.Expr]:
    """Why a row is not used, each reason for those that no earlier one took: reason -> condition, never null."""
    distributions = [name for name in rows["distribution"].unique() if name is not None and is_published(name)]
    is_size = pl.all_horizontal(
        (pl.col(size) == pl.col(size).floor()) & (pl.col(size) >= 1) & (pl.col(size) < LARGEST_SIZE) for size in SIZES
    )
    is_whole = (is_size & (pl.col("topk") <= pl.col("num_experts"))).fill_null(value=False)
    identity = pl.all_horizontal(pl.col("framework", "version", "device", "kernel_source").is_not_null())
    is_timed = (pl.col(LATENCY).is_finite() & (pl.col(LATENCY) > 0)).fill_null(value=False)
    return {
        "of an op_name other than moe": pl.col("op_name").ne_missing("moe"),
        "without framework, version, device or kernel_source": ~identity,
        "with sizes that no layer has": ~is_whole,
        "of one of several expert-parallel ranks (moe_ep_size above 1)": pl.col("moe_ep_size") > 1,
        "of a moe_dtype that is not known": ~pl.col("moe_dtype").is_in(list(WEIGHTS)).fill_null(value=False),
        "of a distribution that cannot be rebuilt": ~pl.col("distribution").is_in(distributions).fill_null(value=False),
        "with an inter_size that moe_tp_size does not divide": pl.col("inter_size") % pl.col("moe_tp_size") != 0,
        "without a positive latency": ~is_timed,
    }


def _measurements(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows that can be used, in the columns of MOE_PERF; `workload` is not among them yet."""
    model = [pl.col(size) for size in ("hidden_size", "inter_size", "topk", "num_experts")]
    is_plain = pl.col("kernel_source").str.to_lowercase().str.contains(NON_GATED_KERNEL, literal=True)
    for sizes in NON_GATED:
        is_plain |= pl.all_horizontal(column == size for column, size in zip(model, sizes, strict=True))
    framework, dtype = pl.col("framework").str.to_lowercase(), pl.col("moe_dtype").replace(SPELLINGS)
    return rows.with_columns(pl.col(SIZES).cast(pl.Int64)).select(
        op=pl.lit(FUSED_MOE),
        shape=pl.format("h{}-i{}-k{}-e{}", *model),
        n_experts="num_experts",
        top_k="topk",
        hidden="hidden_size",
        inter=pl.col("inter_size") // pl.col("moe_tp_size"),
        n_gemms=pl.when(is_plain).then(2).otherwise(3).cast(pl.Int64),
        gemm_k=pl.lit(None, dtype=MOE_PERF["gemm_k"]),
        gemm_n=pl.lit(None, dtype=MOE_PERF["gemm_n"]),
        dtype=pl.col("moe_dtype").replace_strict(WEIGHTS, return_dtype=pl.String),
        device=pl.lit("cuda"),
        n_tokens="num_tokens",
        routing="distribution",
        tokens_per_expert=pl.lit(None, dtype=MOE_PERF["tokens_per_expert"]),
        access=pl.lit(RESIDENT),
        offload_frac=pl.lit(0.0),
        offloaded=pl.lit(None, dtype=MOE_PERF["offloaded"]),
        launch=pl.lit(GRAPH),
        time_ns=pl.col(LATENCY) * text.to_base(1.0, "ms")[0],
        kernel=pl.concat_str(framework, "version", "kernel_source", dtype, separator="/"),
        machine="device",
        tp="moe_tp_size",
    )


def _named(table: pl.DataFrame) -> pl.DataFrame:
    """The table with `workload`: a hash of what was computed, whatever computed it."""
    content = table.select(CONTENT).unique(maintain_order=True)
    told = [key for key in CONTENT if content[key].null_count() < content.height]

    def name(row: Mapping[str, object]) -> str:
        return text.short_name({key: row[key] for key in told})

    names = [name(row) for row in content.iter_rows(named=True)]
    keyed = content.select(told).with_columns(workload=pl.Series(names, dtype=pl.String))
    return table.join(keyed, on=told, how="left", maintain_order="left").select(list(MOE_PERF)).cast(MOE_PERF)
