"""Measured phases of expert-parallel steps beside predicted ones, as a page and as plain values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from perfmodel import ep_steps, text
from perfmodel.ep_capture import EpCapture, EpWorkload
from perfmodel.report.words import WIDTH, ratio, table, wrapped

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which reading a trace does not need
    from perfmodel.schedule.captured import Beside

N_MISSES = 3


def phases_json(pages: "Sequence[Beside]", chosen: Sequence[EpWorkload] | None = None) -> dict[str, Any]:
    """Captures with their predictions as plain values, of one workload of each or (null) all measured ones."""
    from perfmodel.schedule.captured import overlap_efficiencies

    efficiency = overlap_efficiencies([one.capture for one in pages])
    wanted = [None] * len(pages) if chosen is None else [[one] for one in chosen]
    told = [_json(page, only) for page, only in zip(pages, wanted, strict=True)]
    return {"captures": told, "overlap_efficiency": efficiency.to_dicts()}


def phases_page(beside: "Beside", model: str | None = None) -> str:
    """What a capture covers, how long steps take and are predicted to take, phase by phase, who waits for whom."""
    blocks = [
        *_coverage(beside, model),
        "",
        _summary(beside),
        "",
        "error of phases (of each rank; of a collective from when all ranks are there) and of whole steps",
        _errors(beside),
        "",
        "time of steps by phase, summed over workloads: the rank that takes longest, and collectives",
        _totals(beside),
        *(["", "who waits for whom in bulk, and the slowest rank's time over the fastest's", _waits(beside)]),
        "",
        *_misses(beside),
    ]
    return "\n".join(blocks)


def workload_head(capture: EpCapture, workload: EpWorkload) -> str:
    """One workload of a capture in one line."""
    number = capture.measured.index(workload) + 1
    return (
        f"{capture.name} {number}: {workload.shape} on {text.counted(capture.n_ranks, 'rank')}, "
        f"{text.counted(workload.tokens_per_gpu, 'token')} on each, {workload.routing}, {workload.way}"
    )


def workload_page(beside: "Beside", workload: EpWorkload) -> str:
    """One workload: each phase of each rank, measured and predicted, and what each rank waits and hides."""
    capture = beside.capture
    of_it = pl.col("workload") == workload.workload
    facts = _facts(beside).row(by_predicate=of_it, named=True)
    ranks = range(capture.n_ranks)
    cells = {(r["phase"], r["rank"]): r for r in beside.table.filter(of_it).iter_rows(named=True)}
    rows = []
    for phase in dict.fromkeys(phase for phase, _ in cells):
        one = cells.get((phase, None))
        each = [] if one is not None else [cells[phase, rank] for rank in ranks]
        worst = one or max(each, key=lambda row: row["measured_ns"] or 0.0)
        pairs = [_pair(row) for row in each] or [""] * capture.n_ranks
        rows.append([phase, *pairs, _pair(worst), _error(worst)])
    sums = ep_steps.overlaps(capture).filter(of_it).group_by("rank").agg(pl.col("^.*_ns$").median()).sort("rank")
    names = ("span_ns", "compute_ns", "hidden_ns", "exposed_ns", "idle_ns")
    doing = [[f"rank {row['rank']}", *(text.ns(row[name]) for name in names)] for row in sums.iter_rows(named=True)]
    lines = [
        f"{workload_head(capture, workload)}; id {workload.workload}",
        f"latency    measured {text.ns(facts['measured_ns'])} (p10 {text.ns(facts['p10_ns'])}, p90 "
        f"{text.ns(facts['p90_ns'])} of {facts['n_steps']} steps), predicted {text.ns(facts['predicted_ns'])}",
        f"rows       received by each rank: {', '.join(map(text.count, _received(workload)))}",
        "",
        "measured / predicted",
        table(rows, ["phase", *(f"rank {rank}" for rank in ranks), "longest", "error"]),
        "",
        table(doing, ["median of steps", *(name.removesuffix("_ns") for name in names)]),
        "",
        _waits(beside, workload),
    ]
    return "\n".join(lines)


def phase_pairs(beside: "Beside", workload: EpWorkload) -> list[tuple[str, float | None, float]]:
    """Phase, measured and predicted time of one workload: of the rank that takes longest, each for itself, and of
    collectives; null where no such phase is measured. The latency comes last."""
    return _totals_of(beside.table.filter(pl.col("workload") == workload.workload))


def efficiency_page(captures: Sequence[EpCapture], only: Sequence[EpWorkload] | None = None) -> str | None:
    """O_e of workloads that captures of several numbers of ranks share, of `only` one of each or (null) all, and why
    there is none where there is none; null for a single capture."""
    from perfmodel.schedule.captured import overlap_efficiencies

    if len(captures) == 1:
        return None
    found = overlap_efficiencies(captures)
    if only is not None:
        pairs = [(capture.name, one.workload) for capture, one in zip(captures, only, strict=True)]
        wanted = pl.DataFrame(pairs, schema=["capture", "workload"], orient="row")
        found = found.join(wanted, on=["capture", "workload"], how="semi", maintain_order="left")
    if not found.height:
        return wrapped(
            "no overlap efficiency: it needs captures of 2 and of more ranks with workloads of the same shape, tokens "
            "of each rank, routing and schedule",
            WIDTH,
        )
    rows, last = [], None
    for row in found.iter_rows(named=True):
        what = [row["shape"], text.count(row["tokens_per_gpu"]), row["routing"]]
        rows.append(
            [
                *(["", "", ""] if what == last else what),
                row["way"],
                str(row["n_ranks"]),
                text.ns(row["latency_2_ranks_ns"]),
                text.ns(row["latency_ns"]),
                f"{row['overlap_efficiency']:.2f}",
            ]
        )
        last = what
    head = "overlap efficiency O_e = T(2) / T(N), the same tokens on each rank: 1 where more ranks cost nothing"
    detail = table(rows, ["shape", "tokens", "routing", "schedule", "ranks N", "T(2)", "T(N)", "O_e"])
    lines = [
        head,
        "",
        "median over shapes and routings, least to most, of how many",
        _efficiency_by_tokens(found),
        "",
        detail,
    ]
    for one in captures:
        settings, cores = one.manifest.settings, one.manifest.machine.get("n_cores")
        if settings.device == "cpu" and isinstance(cores, int) and one.n_ranks * (settings.threads or 1) > cores:
            said = (
                f"{one.name}: {text.counted(one.n_ranks, 'rank')} share {text.counted(cores, 'core')}, so that its O_e"
            )
            lines.append(wrapped(f"{said} falls by what the cores do, not by communication alone", WIDTH))
    return "\n".join(lines)


def _efficiency_by_tokens(found: pl.DataFrame) -> str:
    """O_e by tokens and schedule: the median over shapes and routings, and the least and the most."""
    value = pl.col("overlap_efficiency")
    by = ["capture", "n_ranks", "tokens_per_gpu"]
    groups = found.group_by(*by, "way").agg(median=value.median(), low=value.min(), high=value.max(), n=pl.len())
    ways = sorted(found["way"].unique().to_list())
    cells = {tuple(key): f"{median:.2f} ({low:.2f} to {high:.2f}, {n})" for *key, median, low, high, n in groups.rows()}
    rows = [
        [name, str(n), text.count(tokens), *(cells.get((name, n, tokens, way), "") for way in ways)]
        for name, n, tokens in groups.select(by).unique().sort(by).rows()
    ]
    return table(rows, ["capture", "ranks", "tokens", *ways])


def _json(beside: "Beside", chosen: Sequence[EpWorkload] | None) -> dict[str, Any]:
    from perfmodel.schedule.captured import errors_of, last_at_combine, late_collectives, with_factors

    capture, settings = beside.capture, beside.capture.manifest.settings
    ids = [one.workload for one in (capture.measured if chosen is None else chosen)]
    details = {
        "phases": beside.table.drop("shape"),
        "ranks": ep_steps.overlaps(capture).group_by("workload", "rank").agg(pl.col("^.*_ns$").median()).sort("rank"),
        "waits": ep_steps.waits(capture),
        "stragglers": ep_steps.stragglers(capture),
    }

    def of(name: str) -> dict[str, Any]:
        only = pl.col("workload") == name
        return {key: found.filter(only).drop("workload").to_dicts() for key, found in details.items()}

    rows = {row["workload"]: row for row in _facts(beside).iter_rows(named=True)}
    return {
        "capture": capture.name,
        "n_ranks": capture.n_ranks,
        "threads": settings.threads,
        "device": settings.device,
        "dtype": capture.dtype,
        "backend": settings.backend,
        "clock_error_ns": capture.clock_error_ns,
        "machine": {key: one.value for key, one in beside.profile.quantities.items()},
        "workloads": [rows[name] | of(name) for name in ids if name in rows],
        "errors": beside.errors.to_dicts(),
        "noise": beside.noise.to_dicts(),
        "errors_with_factors": errors_of(with_factors(beside.table)).to_dicts(),
        "late_collectives": late_collectives(beside).to_dicts(),
        "last_at_combine": last_at_combine(beside).to_dicts(),
    }


def _facts(beside: "Beside") -> pl.DataFrame:
    from perfmodel.schedule.captured import summary

    return summary(beside)


def _coverage(beside: "Beside", model: str | None) -> list[str]:
    from perfmodel.schedule.probed import crowds

    capture, settings = beside.capture, beside.capture.manifest.settings
    measured, n_steps = capture.measured, ep_steps.latencies(capture)["n_steps"].to_list()
    n_shapes = len({one.shape for one in measured})
    threads = "" if settings.threads is None else f" of {text.counted(settings.threads, 'thread')}"
    cores = capture.manifest.machine.get("n_cores")
    of_cores = f" on {text.counted(cores, 'core')}" if settings.device == "cpu" and isinstance(cores, int) else ""
    left = len(capture.workloads) - len(measured)
    shared = [
        f"cores of ranks {', '.join(map(str, one.ranks))} hold {one.at_once:g} at once" for one in crowds(capture)
    ]
    crowd = "".join(f"; {words}" for words in shared)
    clock_ns, numbers = capture.clock_error_ns, beside.profile.quantities
    rates = {key: one for key, one in numbers.items() if not key.endswith("count")}
    machine = [text.in_unit(one.value, _suffix(key)) + f" {_short(key)}" for key, one in rates.items()]
    return [
        f"{capture.name}: {text.counted(capture.n_ranks, 'rank')}{threads}{of_cores}, {settings.backend} on "
        f"{settings.device}, {capture.dtype}",
        f"covers     {text.counted(len(measured), 'workload')} of {text.counted(n_shapes, 'shape')}, "
        f"{' to '.join(dict.fromkeys(map(str, (min(n_steps), max(n_steps)))))} steps each, every rank in each"
        + (f"; {text.counted(left, 'workload')} without a step" if left else ""),
        f"clocks     of two ranks within {text.ns(clock_ns)}"
        + (f"; {text.counted(len(capture.traces), 'workload')} with profiled traces" if capture.traces else ""),
        wrapped(
            f"a rank has {', '.join(machine)} (probes of all ranks at once{crowd})", WIDTH, "machine    ", " " * 11
        ),
        f"model      {model or 'default constants'}; nothing is fitted on the steps",
    ]


def _suffix(key: str) -> str:
    return next(s for s in ("flops_per_s", "bytes_per_s", "ns") if key.endswith(s))


def _short(key: str) -> str:
    return key.removesuffix(f"_{_suffix(key)}").replace("_", " ")


def _summary(beside: "Beside") -> str:
    rows = []
    for number, row in enumerate(_facts(beside).iter_rows(named=True), start=1):
        way = beside.capture.by_id[row["workload"]].way
        gains = [row[name] for name in ("faster_than_bulk", "predicted_faster_than_bulk") if row[name]]
        rows.append(
            [
                f"{number:>3}  {row['shape']}",
                text.count(row["tokens_per_gpu"]),
                row["routing"],
                way,
                text.ns(row["measured_ns"]),
                f"{(row['p90_ns'] - row['p10_ns']) / row['measured_ns']:.0%}",
                text.ns(row["predicted_ns"]),
                f"{100 * row['error_frac']:+.0f} %",
                *("n/a" if row[name] is None else f"{row[name]:.0%}" for name in ("exposed_frac", "hidden_frac")),
                "n/a" if row["n_computing"] is None else f"{row['n_computing']:.1f}",
                "/".join(f"{gain:.2f}" for gain in gains),
            ]
        )
    head = ["  #  shape", "tokens", "routing", "schedule", "measured", "p10-p90", "predicted", "error"]
    return table(rows, [*head, "exposed", "hidden", "at once", "vs bulk"])


def _errors(beside: "Beside") -> str:
    from perfmodel.schedule.captured import errors_of, with_factors

    held_out = {row["phase"]: row for row in errors_of(with_factors(beside.table)).iter_rows(named=True)}
    noise = {row["phase"]: row for row in beside.noise.iter_rows(named=True)}
    rows = []
    for row in beside.errors.iter_rows(named=True):
        told = (row, noise.get(row["phase"], {}), held_out.get(row["phase"], {}))
        errors = [text.frac(one.get(key)) for one in told for key in ("median_error_frac", "p90_error_frac")]
        rows.append([row["phase"], str(row["n"]), ratio(row["median_ratio"]), *errors])
    head = ["phase", "n", "predicted/measured", "median", "p90", "half of steps", "p90", "with a factor", "p90"]
    return table(rows, head)


def error_rows(beside: "Beside") -> tuple[list[str], list[list[str]]]:
    """Header and rows of a small table: by phase, the errors of the model over all workloads of a capture."""
    rows = [
        [
            row["phase"],
            ratio(row["median_ratio"]),
            text.frac(row["median_error_frac"]),
            text.frac(row["p90_error_frac"]),
        ]
        for row in beside.errors.iter_rows(named=True)
    ]
    return ["phase", "predicted/measured", "median error", "p90"], rows


def miss_words(beside: "Beside", workload: EpWorkload) -> str:
    """How well the step of one workload was predicted, and what was missed most, in a sentence."""
    *phases, (_, seen, said) = phase_pairs(beside, workload)
    off = {name: ns - known for name, known, ns in phases if known is not None}
    worst = max(off, key=lambda name: abs(off[name]))
    words = f"predicted {text.ns(said)}, measured {text.ns(seen)}"
    words += f" ({100 * (said / seen - 1):+.0f} %)" if seen else ""
    way = "long" if off[worst] > 0 else "short"
    return f"The whole step: {words}. Most is missed in {worst}, {text.ns(abs(off[worst]))} too {way}."


def _totals(beside: "Beside") -> str:
    sums = _totals_of(beside.table)
    steps = next(row[1] for row in sums if row[0] == "latency") or 1.0
    rows = [
        [phase, text.ns(seen), text.ns(said), text.frac(None if seen is None else seen / steps)]
        for phase, seen, said in sums
    ]
    return table(rows, ["phase", "measured", "predicted", "of steps"])


def _totals_of(table: pl.DataFrame) -> list[tuple[str, float | None, float]]:
    """Phase, measured and predicted time, summed over workloads; null where no such phase is measured."""
    longest = table.group_by("workload", "phase", maintain_order=True).agg(pl.col("measured_ns", "predicted_ns").max())
    measured = pl.when(pl.col("measured_ns").is_not_null().any()).then(pl.col("measured_ns").sum())
    sums = longest.group_by("phase", maintain_order=True).agg(measured, pl.col("predicted_ns").sum())
    return list(sums.iter_rows())


def _waits(beside: "Beside", only: EpWorkload | None = None) -> str:
    capture = beside.capture
    seen = ep_steps.waits(capture).rows_by_key(["workload", "phase"], named=True)
    unequal = {(w, p): (m, h) for w, p, m, h in ep_steps.stragglers(capture).iter_rows()}
    rows = []
    for number, one in enumerate(capture.measured, start=1):
        if (one is not only) if only is not None else one.schedule != "bulk":
            continue
        for phase in ("dispatch", "combine"):
            found = seen.get((one.workload, phase), [])
            if not found:
                continue
            most = max(found, key=lambda row: float(row["last_frac"]))
            waits = sorted(row["wait_ns"] for row in found if row is not most)
            span = " to ".join(dict.fromkeys(text.ns(wait) for wait in (waits[:1] + waits[-1:]))) or "n/a"
            last = f"{most['rank']} ({most['last_frac']:.0%})" if most["last_frac"] else "none"
            cells = [f"{number:>3}  {one.shape}", one.way, phase, last, span]
            for key in (phase, ep_steps.COMPUTE):
                cells += [ratio(value) for value in unequal.get((one.workload, key), (None, None))]
            rows.append(cells)
    head = ["  #  shape", "schedule", "at", "last rank", "others wait", "in it, t/t_a", "p95", "computing", "p95"]
    return table(rows, head)


def _misses(beside: "Beside") -> list[str]:
    """Where predicted and measured time part most, as sentences."""
    from perfmodel.schedule.captured import last_at_combine, late_collectives
    from perfmodel.schedule.probed import SLICE_NS

    off = {name: said - seen for name, seen, said in _totals_of(beside.table) if name != "latency" and seen is not None}
    worst = sorted(off, key=lambda name: -abs(off[name]))[:N_MISSES]
    words = [f"{name} by {text.ns(abs(off[name]))} ({'long' if off[name] > 0 else 'short'})" for name in worst]
    lines = [wrapped(f"most is missed in {', '.join(words)}, over all workloads", WIDTH)]
    found = last_at_combine(beside).drop_nulls()
    if found.height:
        right = int((found["predicted_rank"] == found["measured_rank"]).sum())
        lines.append(
            f"the rank that all wait for at combine is the predicted one in {right} of {found.height} workloads in bulk"
        )
    for phase, n, late_frac, prompt_ratio in late_collectives(beside).iter_rows():
        lines.append(
            f"{phase} in bulk: {late_frac:.0%} of {n} end more than {text.ns(SLICE_NS / 2)} later than predicted; the "
            f"prediction is {ratio(prompt_ratio)} of the others"
        )
    said = {name: time_ns for name, _, time_ns in _totals_of(beside.table)}
    if "sharing" in said:
        share = said["sharing"] / said["latency"]
        lines.append(f"waiting for cores is {text.frac(share)} of predicted steps; it is measured in other phases")
    gains = [row for row in _facts(beside).iter_rows(named=True) if row["faster_than_bulk"] is not None]
    if gains:
        n_faster = sum(row["faster_than_bulk"] > 1 for row in gains)
        n_said = sum(row["predicted_faster_than_bulk"] > 1 for row in gains)
        lines.append(f"chunks are faster than bulk in {n_faster} of {len(gains)} workloads; predicted in {n_said}")
    return lines


def _received(workload: EpWorkload) -> list[int]:
    sums = [sum(column) for column in zip(*workload.rows, strict=True)]
    ranks = range(len(workload.rows))
    return [sum(n for n, owner in zip(sums, workload.gpu_of, strict=True) if owner == rank) for rank in ranks]


def _pair(row: dict[str, Any]) -> str:
    return f"{text.ns(row['measured_ns'])} / {text.ns(row['predicted_ns'])}"


def _error(row: dict[str, Any]) -> str:
    return f"{100 * (row['predicted_ns'] / row['measured_ns'] - 1):+.0f} %" if row["measured_ns"] else "n/a"
