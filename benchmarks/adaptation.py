"""What do k measured points make of a fitted model on something it was not fitted on?

    python benchmarks/adaptation.py TABLE.parquet [--repeats 12] [--only WORD]
    python benchmarks/adaptation.py CAPTURE CAPTURE     # two real machines, each from the other's model

TABLE is a moe_perf table of one GPU. No second GPU is in it, so other kernels, other dtypes and held-out shapes stand
in for a new machine, and a made-up one: times of a kernel scaled by the model's own ratio between two profiles, real
residuals kept (named synthetic). Sources are fitted on screened rows. Of each target 1,000 rows are predicted (half
of a smaller one), and points come from the others: at random, or by `design` from 400 of them. A row: median and 90th
percentile of absolute errors (mean over repeats), the worst median of a repeat, coverage and half-width of the 90 %
intervals.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from perfmodel.adapt import calibrate
from perfmodel.design import design
from perfmodel.hardware import HardwareProfile, hardware
from perfmodel.latency import LatencyModel, work_of
from perfmodel.sources import Source, read_sources
from perfmodel.transfer import transferred

N_TEST, N_CANDIDATES, N_FOLDS = 1000, 400, 6
RANDOM, DESIGNED = (5, 10, 20), (5, 10, 20)
TRT, VLLM = "trtllm/1.3.0rc20/moe_torch_flow_cutlass", "vllm/0.24.0/vllm_unquantizedfusedmoe_triton_tritonexperts"
VLLM_FP8, SGLANG = "vllm/0.24.0/vllm_fp8moe_triton_tritonexperts", "sglang/0.5.14/sglang_fused_moe_triton"
FASTER_MEMORY = 1.43  # H200 over H100


@dataclass(frozen=True, eq=False)
class Case:
    """A fitted source, and the measurements of what stands for a new machine."""

    name: str
    model: LatencyModel
    rows: pl.DataFrame
    profile: HardwareProfile
    kernel: str


def screened(source: Source) -> pl.DataFrame:
    """The rows that no other kernel shows to be a failed configuration."""
    return source.observations.filter(source.is_screened)


def fitted(source: Source, rows: pl.DataFrame | None = None) -> LatencyModel:
    """A model of a source, or of some of its rows."""
    model = LatencyModel(source.profile, source.dtype, source.kernel)
    return model.fit(screened(source) if rows is None else rows, n_folds=N_FOLDS)


def faster(profile: HardwareProfile, factor: float) -> HardwareProfile:
    """A made-up machine whose memory is faster by a factor."""
    quantities = dict(profile.quantities)
    for key in ("memory_peak_bytes_per_s", "memory_stream_bytes_per_s"):
        quantities[key] = replace(quantities[key], value=quantities[key].value * factor, kind="assumed")
    return replace(profile, name=f"synthetic-memory-x{factor:g}", quantities=quantities)


def synthetic(model: LatencyModel, rows: pl.DataFrame, truth: LatencyModel) -> pl.DataFrame:
    """Times as on a made-up machine: measured ones, times what `truth` predicts over what the model does."""
    work = work_of(rows, model.tiles_)
    ratio = truth.forecast(work).ns / model.forecast(work).ns
    return rows.with_columns(time_ns=pl.col("time_ns") * pl.Series(ratio))


def cases(sources: dict[str, Source]) -> Iterator[Case]:
    """All stand-ins, one after the other."""
    trt, vllm, sglang = (sources[f"{kernel}/bf16"] for kernel in (TRT, VLLM, SGLANG))
    models = {one.kernel: fitted(one) for one in (trt, vllm)}
    for name, a, b in (("trtllm -> vllm", trt, vllm), ("vllm -> trtllm", vllm, trt), ("vllm -> sglang", vllm, sglang)):
        yield Case(name, models[a.kernel], screened(b), b.profile, b.kernel)
    yield Case("vllm -> trtllm, all rows", models[vllm.kernel], trt.observations, trt.profile, trt.kernel)
    for name, a, b in (
        ("trtllm bf16 -> fp8", trt, f"{TRT}/fp8"),
        ("vllm bf16 -> fp8_block", vllm, f"{VLLM_FP8}/fp8_block"),
    ):
        yield Case(name, models[a.kernel], screened(sources[b]), a.profile, b)
    for one in (trt, vllm):
        rows = screened(one)
        names = rows["shape"].unique().sort().to_list()
        known = fitted(one, rows.filter(pl.col("shape").is_in(names[::2])))
        yield Case(
            f"{one.kernel[:4]} unseen shapes",
            known,
            rows.filter(pl.col("shape").is_in(names[1::2])),
            one.profile,
            one.kernel,
        )
    # Half of the shapes make the source, the other half the made-up machine, so that residuals are real ones.
    rows = screened(trt)
    names = rows["shape"].unique().sort().to_list()
    known = fitted(trt, rows.filter(pl.col("shape").is_in(names[::2])))
    others = rows.filter(pl.col("shape").is_in(names[1::2]))
    told = faster(trt.profile, FASTER_MEMORY)
    truth = transferred(known, told)
    yield Case("synthetic x1.43, profile right", known, synthetic(known, others, truth), told, trt.kernel)
    slower = replace(
        truth.constants_, eff_memory=0.85 * truth.constants_.eff_memory, layer_ns=0.7 * truth.constants_.layer_ns
    )
    truth.constants_ = slower
    yield Case("synthetic x1.43, other constants", known, synthetic(known, others, truth), told, trt.kernel)
    yield Case("same kernel, nothing new", models[trt.kernel], screened(trt), hardware("h100-sxm"), trt.kernel)


def between(a: Source, b: Source) -> Iterator[Case]:
    """Each of two real machines from the other."""
    for one, other in ((a, b), (b, a)):
        yield Case(f"to {other.profile.name}", fitted(one), screened(other), other.profile, other.kernel)


def judged(model: LatencyModel, rows: pl.DataFrame) -> list[float]:
    """Median and 90th percentile of absolute errors, coverage and median half-width of intervals, as fractions."""
    forecast = model.forecast(work_of(rows, model.tiles_))
    measured = rows["time_ns"].to_numpy()
    ape = np.abs(forecast.ns / measured - 1)
    sure = np.isfinite(forecast.log_half_width)
    inside = np.abs(np.log(forecast.ns / measured))[sure] <= forecast.log_half_width[sure]
    return [
        float(np.median(ape)),
        float(np.quantile(ape, 0.9)),
        float(inside.mean()),
        float(np.expm1(np.median(forecast.log_half_width[sure]))),
    ]


def run(case: Case, n_repeats: int) -> None:
    """Print the rows of a case."""
    order = np.random.default_rng(0).permutation(case.rows.height)
    n_test = min(N_TEST, case.rows.height // 2)
    test, rest = case.rows[np.sort(order[:n_test])], case.rows[np.sort(order[n_test:])]
    start = transferred(case.model, case.profile, dtype=case.rows["dtype"][0], kernel=case.kernel)
    show(case.name, "0", [judged(start, test)])
    for k in RANDOM:
        found = []
        for i in range(n_repeats):
            points = rest[np.random.default_rng(i).choice(rest.height, k, replace=False)]
            found.append(judged(calibrate(case.model, points, case.profile, case.kernel), test))
        show("", f"{k} random", found)
    for k in DESIGNED:
        found = []
        for i in range(max(2, n_repeats // 3)):
            pool = rest[np.random.default_rng(i).choice(rest.height, min(N_CANDIDATES, rest.height), replace=False)]
            chosen = design(start, k, pool)["candidate"].to_list()
            found.append(judged(calibrate(case.model, pool[chosen], case.profile, case.kernel), test))
        show("", f"{k} designed", found)


def show(name: str, points: str, found: list[list[float]]) -> None:
    """One row of the table."""
    table = 100 * np.array(found)
    median, p90, coverage, width = table.mean(axis=0)
    print(
        f"{name:34}{points:>12} {median:6.1f} {p90:6.1f} {table[:, 0].max():6.1f} {coverage:5.0f} {width:6.1f}",
        flush=True,
    )


def main() -> None:
    """Read the table and run all cases."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("sources", nargs="+", metavar="TABLE or CAPTURE CAPTURE")
    words.add_argument("--repeats", type=int, default=12)
    words.add_argument("--only", default="", help="cases whose name contains this")
    args = words.parse_args()
    if len(args.sources) == 2:
        every = between(*(read_sources([path])[0] for path in args.sources))
    else:
        every = cases({one.kernel: one for one in read_sources(args.sources)})
    print(f"{'':34}{'points':>12} {'median':>6} {'p90':>6} {'worst':>6} {'cover':>5} {'+-':>6}")
    for case in every:
        if args.only in case.name:
            run(case, args.repeats)


if __name__ == "__main__":
    main()
