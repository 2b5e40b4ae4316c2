"""What a machine that has just arrived is like, without a baseline: what it reaches, how it is set, how steady it is,
and whether the sweep is as fast as a model says."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import polars as pl

from perfmodel.capture import IS_OFFLOADED, Capture, load_capture, per_workload, profile_of, shipped_captures
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel, load_model, shipped_models
from perfmodel.physics import transferred_ceilings
from perfmodel.plausible import Finding, check_capture
from perfmodel.regression.against import (
    OUTSIDE_MODEL,
    SLOWER_THAN_MODEL,
    Expectation,
    against_model,
    datasheet_of,
    fitted_on,
    judged_rows,
)
from perfmodel.regression.verdicts import DEFAULT_MARGIN_FRAC
from perfmodel.roofline import DEVICE_MEMORY, Roofline, points, roofline

from .circumstances import fact_items, n_runs_wanted, steadiness_items
from .items import HEALTHY, LOOK_AT, OPEN, ROOFLINE, SWEEP, Item, held
from .rates import apart_frac, rate_items

NEW_MACHINE_SCHEMA = 1
OVERHEAD, MEMORY, COMPUTE = "overhead-bound", "memory-bound", "compute-bound"
NEXT: dict[str, tuple[str, ...]] = {
    OVERHEAD: (
        "what a call costs: clock and governor of the host, versions of torch and driver, threads bound to cores",
    ),
    MEMORY: ("memory: other load, NUMA binding, huge pages, memory clock",),
    COMPUTE: ("kernels that the libraries pick (instruction sets, versions), clocks and power cap under load",),
}
SEE_RATES: tuple[str, ...] = ("the calibrated rates above that deserve a look",)
LEAST_IN_GROUP = 3  # fewer workloads say little of their kind


@dataclass(frozen=True)
class NewMachine:
    """A machine judged by one capture: the items in the order of their sections.

    `model` judged the sweep (null: none could) and `chosen` says why that one, or why none; `expectations` are its
    answers, all workloads together first. `datasheet` names the profile with nominal rates, null without one.
    `n_runs_wanted` runs on each side tell a change of `margin_frac` from none by the spread between runs (null with
    one run), which `is_enough` unless runs of one occasion hide what changes between occasions. `points` is what was
    measured under the roofs, null where the machine has no roof.
    """

    capture: str
    items: tuple[Item, ...]
    model: str | None
    chosen: str
    expectations: tuple[Expectation, ...]
    datasheet: str | None
    margin_frac: float
    n_runs_wanted: int | None
    is_enough: bool
    points: Roofline | None

    def of(self, verdict: str) -> list[Item]:
        """The items with a verdict."""
        return [item for item in self.items if item.verdict == verdict]

    @property
    def exit_code(self) -> int:
        """What a command ends with: 1 where anything is to be looked at, else 0."""
        return 1 if self.of(LOOK_AT) else 0

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values; the roofline has a command of its own."""
        return {
            "schema_version": NEW_MACHINE_SCHEMA,
            "capture": self.capture,
            "n_healthy": len(self.of(HEALTHY)),
            "n_look_at": len(self.of(LOOK_AT)),
            "n_not_judged": len(self.of(OPEN)),
            "items": [asdict(item) | {"next_steps": list(item.next_steps)} for item in self.items],
            "model": self.model,
            "chosen": self.chosen,
            "datasheet": self.datasheet,
            "margin_frac": self.margin_frac,
            "n_runs_wanted": self.n_runs_wanted,
            "is_enough": self.is_enough,
            "expectations": [asdict(one) | {"measured_over_model": one.ratio} for one in self.expectations],
        }


def new_machine(
    capture: Capture,
    datasheet: HardwareProfile | None = None,
    model: LatencyModel | None = None,
    *,
    with_model: bool = True,
    findings: Sequence[Finding] | None = None,
) -> NewMachine:
    """A machine judged by a capture of it alone.

    `datasheet` holds nominal rates, null for the shipped profile of its GPU, if there is one; `model` judges the sweep,
    null for the shipped one that is most alike. `findings` are those of `check_capture`, null to read them from the
    capture's folder. Raises InputError for a datasheet or model that does not fit the capture.
    """
    models, shipped = _shipped()
    others = [one for one in shipped if one.digest != capture.digest]
    findings = check_capture(capture.path) if findings is None else findings
    nominal = datasheet or datasheet_of(capture)
    items = rate_items(capture, nominal, _same_processor(capture, models.values()), is_given=datasheet is not None)
    items += fact_items(capture, findings)
    items += steadiness_items(capture, findings, others)
    judge, chosen = model, "no model was asked for"
    if model is not None:
        chosen = f"as was asked for (kernel {model.kernel})"
    elif with_model:
        judge, chosen = _model_of(capture, models)
    expectations: list[Expectation] = []
    try:
        if judge is not None:
            swept, expectations = _sweep(capture, judge, nominal)
            items += swept
    except InputError as error:
        if model is not None:
            raise
        judge, chosen = None, str(error)
    if judge is None:
        items.append(Item(SWEEP, "all workloads", OPEN, f"{chosen}; name a model with --model"))
    found = _points(capture)
    items += _roofline_items(capture, found, others)
    n_runs, is_enough = n_runs_wanted(capture)
    return NewMachine(
        capture=capture.name,
        items=tuple(items),
        model=None if judge is None else judge.profile.name if judge is model else _name_of(judge, models),
        chosen=chosen,
        expectations=tuple(expectations),
        datasheet=None if nominal is None else nominal.name,
        margin_frac=DEFAULT_MARGIN_FRAC,
        n_runs_wanted=n_runs,
        is_enough=is_enough,
        points=found,
    )


@cache
def _shipped() -> tuple[dict[str, LatencyModel], list[Capture]]:
    """The models and the captures that come with the project."""
    return {name: load_model(name) for name in shipped_models()}, [load_capture(path) for path in shipped_captures()]


def _name_of(model: LatencyModel, models: dict[str, LatencyModel]) -> str:
    return next(name for name, one in models.items() if one is model)


def _is_own(capture: Capture, model: LatencyModel) -> bool:
    """Whether a model was fitted on this very capture."""
    return capture.digest in fitted_on(model)


def _is_same_processor(capture: Capture, model: LatencyModel) -> bool:
    """Whether a model was fitted on a CPU of the same maker, family and model."""
    machine, other = capture.manifest["machine"], model.evidence_.get("machine")
    keys = ("cpu_vendor", "cpu_family", "cpu_model_number")
    if model.profile.device != "cpu" or not isinstance(other, dict) or machine.get("cpu_family") is None:
        return False
    return all(machine.get(key) == other.get(key) for key in keys)


def _same_processor(capture: Capture, models: Any) -> list[LatencyModel]:
    """The shipped models of the same processor that were not fitted on this capture; none for GPUs."""
    if capture.manifest["settings"]["device"] == "cuda":
        return []
    return [one for one in models if _is_same_processor(capture, one) and not _is_own(capture, one)]


def _model_of(capture: Capture, models: dict[str, LatencyModel]) -> tuple[LatencyModel | None, str]:
    """The shipped model that is most alike, and why: of the same kind of device and dtype, then of the same processor,
    then of the same kernel, then the surest; never the one that was fitted on this capture."""
    device = profile_of(capture).device
    dtypes = set(capture.observations["dtype"].unique())
    fitting = {name: one for name, one in models.items() if one.profile.device == device and one.dtype in dtypes}
    known = {name: one for name, one in fitting.items() if not _is_own(capture, one)}
    if not known:
        only = f", and {', '.join(fitting)} was fitted on this capture" if fitting else ""
        return None, f"no other shipped model is of a {device} and of {', '.join(sorted(dtypes))}{only}"
    kernel = str(capture.manifest["kernel"])

    def rank(name: str) -> tuple[bool, bool, bool, float]:
        one = known[name]
        width = one.typical_half_width_
        return (
            one.dtype != capture.dtype,
            not _is_same_processor(capture, one),
            one.kernel != kernel,
            float("inf") if width is None else width,
        )

    best = min(sorted(known), key=rank)
    _, is_other_processor, is_other_kernel, _ = rank(best)
    why = "another kernel" if is_other_kernel else "the same kernel"
    if device == "cpu":
        why = f"{'another' if is_other_processor else 'the same'} processor, {why}"
    own = [name for name, one in fitting.items() if _is_own(capture, one)]
    left = f"; {own[0]} was fitted on this capture and is no judge of it" if own else ""
    return known[best], f"the shipped model most alike: {why}, {known[best].dtype}{left}"


def _sweep(
    capture: Capture, model: LatencyModel, nominal: HardwareProfile | None
) -> tuple[list[Item], list[Expectation]]:
    """The sweep against a model on the machine as calibrated, as its datasheet has it, and by operation and regime."""
    capture = _seen_by(capture, model)
    found = against_model(capture, model)
    overall = found[0]
    items = [_expected("all workloads", overall, NEXT[MEMORY] + NEXT[COMPUTE], len(found) - 1)]
    if nominal is not None:
        sheet = against_model(capture, model, nominal)[0]
        item = _expected(f"all workloads, at the rates of {nominal.name}", sheet, (), len(found) - 1)
        items.append(_told_apart(item, sheet, overall))
    for name, regime, keys in _groups(capture, model):
        one = against_model(capture, model, None, keys)[0]
        items.append(_expected(name, one, NEXT[regime], len(keys)))
    return items, found


def _told_apart(item: Item, sheet: Expectation, calibrated: Expectation) -> Item:
    """The item of the datasheet with what both answers say together."""
    if item.verdict != LOOK_AT:
        return item
    words, steps = "as fast as its own calibration lets expect: silicon or its settings", SEE_RATES
    if calibrated.verdict == SLOWER_THAN_MODEL:
        words, steps = "slow by its own calibration too: software", (*NEXT[COMPUTE], *NEXT[OVERHEAD])
    return Item(item.section, item.name, LOOK_AT, f"{item.words}; {words}", steps, item.frac, item.least_frac)


def _expected(name: str, one: Expectation, steps: tuple[str, ...], n_workloads: int) -> Item:
    words = f"{one.verdict}: {one.ratio:.2f}x of what the model expects, over {n_workloads} workloads"
    if one.model_high_ns is None or one.verdict == OUTSIDE_MODEL:
        return Item(SWEEP, name, OPEN, f"{words}: {one.reason}")
    most = one.model_high_ns / one.model_ns
    words += f" (90 % interval up to {most:.2f}x)"
    is_slow = one.verdict == SLOWER_THAN_MODEL
    verdict = LOOK_AT if is_slow else HEALTHY
    return Item(SWEEP, name, verdict, words, steps if is_slow else (), 1 / one.ratio, 1 / most)


def _seen_by(capture: Capture, model: LatencyModel) -> Capture:
    """The capture with what a GPU's model can know alone: the operations it was fitted on, and calls launched as those
    were (by the host, or replayed from a graph); the whole where nothing is left, for then the model says why."""
    if model.profile.device != "gpu":
        return capture
    is_known = pl.col("launch").eq_missing(pl.lit(model.evidence_.get("launch")))
    if "grouped_gemm" not in model.ops_:
        is_known &= pl.col("op") != "grouped_gemm"
    rows = capture.observations.filter(is_known, ~IS_OFFLOADED, pl.col("dtype") == model.dtype)
    return capture if rows.is_empty() else replace(capture, observations=rows)


def _groups(capture: Capture, model: LatencyModel) -> list[tuple[str, str, list[str]]]:
    """The workloads by operation and by what bounds them: name, regime, workloads.

    Overhead where the model has most of the time in launches and calls, else the roof that is lower for the workload.
    """
    rows = judged_rows(capture, model)
    profile = profile_of(capture)
    is_here = profile.own_quantities == model.profile.own_quantities
    work = model.work(rows, None if is_here else profile)
    roof = model.roof if is_here else transferred_ceilings(profile, model.dtype, model.profile)
    parts = {name: work.mean(part) for name, part in model.form.resident_parts(work, roof, model.constants_).items()}
    fixed_ns = sum(parts[name] for name in ("overhead", "launch") if name in parts)
    table = points(rows, profile).select("op", pl.format("{}-bound", "bound").alias("regime"))
    is_fixed = pl.Series(2 * np.asarray(fixed_ns) > np.add.reduce(list(parts.values())))
    table = table.with_columns(
        rows["workload"], regime=pl.when(is_fixed).then(pl.lit(OVERHEAD)).otherwise(pl.col("regime"))
    )
    return [
        (f"{op}, {regime}", regime, keys.to_list())
        for op in table["op"].unique(maintain_order=True)
        for regime in NEXT
        if len(keys := table.filter(op=op, regime=regime)["workload"]) >= LEAST_IN_GROUP
    ]


def _points(capture: Capture, only: Collection[str] | None = None) -> Roofline | None:
    """What was measured of resident experts in the capture's dtype, of these workloads `only` where they are given,
    under the roofs of its machine; null where it has none."""
    rows = per_workload(capture.observations).filter(pl.col("dtype") == capture.dtype, pl.col("offload_frac") == 0)
    if only is not None:
        rows = rows.filter(pl.col("workload").is_in(list(only)))
    try:
        return roofline(profile_of(capture), capture.dtype, observations=rows) if rows.height else None
    except InputError:  # no rate for the dtype, or no bandwidth
        return None


def best_fracs(found: Roofline | None) -> dict[str, float]:
    """The best share of the roof that any grouped GEMM reached in each regime (`memory`, `compute`)."""
    if found is None:
        return {}
    rows = found.points.filter(op="grouped_gemm", tier=DEVICE_MEMORY).group_by("bound").agg(pl.max("roof_frac"))
    return dict(rows.iter_rows())


def _under_nominal(found: Roofline) -> Roofline | None:
    """The same points as shares of the nominal roof, null where that is not known."""
    nominal = found.nominal
    tiers = [] if nominal is None else [tier for tier in nominal.tiers if tier.name == DEVICE_MEMORY]
    if nominal is None or not tiers:
        return None
    roof = pl.min_horizontal(pl.col("flops_per_byte") * tiers[0].bytes_per_s, pl.lit(nominal.flops_per_s))
    bound = pl.when(roof < nominal.flops_per_s).then(pl.lit("memory")).otherwise(pl.lit("compute"))
    return replace(found, points=found.points.with_columns(roof_frac=pl.col("flops_per_s") / roof, bound=bound))


def _roofline_items(capture: Capture, found: Roofline | None, others: Sequence[Capture]) -> list[Item]:
    """How near to its roof the best grouped GEMM came in each regime, beside what shipped captures reached with the
    same workloads: which shapes and batches were measured decides how near any can come."""
    names = {"memory": "best memory-bound GEMM", "compute": "best compute-bound GEMM"}
    if found is None:
        words = f"the capture has no calibrated {capture.dtype} rate and bandwidth, and so no roof"
        return [Item(ROOFLINE, name, OPEN, words) for name in names.values()]
    best, nominal, pairs = best_fracs(found), best_fracs(_under_nominal(found)), _in_common(capture, others)
    items = []
    for bound, name in names.items():
        if bound not in best:
            items.append(Item(ROOFLINE, name, OPEN, f"no {bound}-bound grouped GEMM was measured"))
            continue
        words = f"{100 * best[bound]:.0f} % of the calibrated roof"
        words += f", {100 * nominal[bound]:.0f} % of the nominal one" if bound in nominal else ""
        shares = [(own[bound] / other[bound], one) for one, own, other in pairs if bound in own and bound in other]
        if not shares:
            words += "; no other shipped capture measured these workloads"
            items.append(Item(ROOFLINE, name, OPEN, words, (), best[bound]))
            continue
        share, who = max(shares)
        words += f"; with the same workloads {share:.2f}x of what {who} reached"
        least = 1 - apart_frac("bytes_per_s" if bound == "memory" else "flops_per_s", "roof")
        items.append(held(ROOFLINE, name, words, share, least, NEXT[MEMORY if bound == "memory" else COMPUTE]))
    return items


def _in_common(capture: Capture, others: Sequence[Capture]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Each shipped capture that measured some of the same workloads: its name, and the best shares of both in these."""
    mine = set(capture.observations["workload"])
    found = []
    for one in others:
        common = mine & set(one.observations["workload"])
        if common and one.dtype == capture.dtype:
            found.append((one.name, best_fracs(_points(capture, common)), best_fracs(_points(one, common))))
    return found
