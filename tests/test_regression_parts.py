"""What changed between two captures: each part is named where it changed, and no other, on made-up captures."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from perfmodel import report
from perfmodel.capture import Capture, load_capture, shipped_captures
from perfmodel.figures.checks import changed_parts
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.physics import Array, Ceilings
from perfmodel.regression import check, compare, of_capture
from perfmodel.regression.changes.alone import what_they_share
from perfmodel.regression.changes.attributed import Attribution, _agreement, _confirmed, attribute
from perfmodel.regression.changes.calibrated import Moved, moved_quantities
from perfmodel.regression.changes.division import Division, Group, divide
from perfmodel.regression.changes.factors import Sides, _leak, fit_changes
from perfmodel.regression.changes.profiled import profile_details
from perfmodel.regression.spread import OVERALL
from tests import captures_made
from tests.captures_made import ROOF, SHAPES, TRUE_CONSTANTS, noise, write_gpu_capture, write_synthetic_capture

MARGIN = 0.03


def attributed(a: Capture, b: Capture) -> Attribution:
    sides = of_capture(a), of_capture(b)
    return attribute(*sides, check(*sides), moved_quantities(a, b), MARGIN)


def factors(found: Attribution) -> dict[str, float]:
    return {part.part: part.factor for part in found.parts if part.factor is not None}


def blamed(found: Attribution) -> set[str]:
    """The parts that are said to take longer."""
    return {part.part for part in found.parts if "longer in the sweep" in part.evidence}


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """The made-up CPU before anything changed."""
    return load_capture(write_synthetic_capture(tmp_path_factory.mktemp("cpu") / "base", noise=noise(1, 0.01)))


def changed_cpu(
    path: Path, patch: pytest.MonkeyPatch, compute: float = 1, memory: float = 1, calls: float = 1
) -> Capture:
    """The made-up CPU whose parts take so many times as long; its calibration says so of the rates."""
    patch.setattr(captures_made, "ROOF", Ceilings(ROOF.flops_per_s / compute, ROOF.bytes_per_s / memory, ()))
    names = ("active_ns", "expert_ns", "call_ns", "layer_ns")
    slower = replace(TRUE_CONSTANTS, **{name: getattr(TRUE_CONSTANTS, name) * calls for name in names})
    patch.setattr(captures_made, "TRUE_CONSTANTS", slower)
    return load_capture(write_synthetic_capture(path / "cand", noise=noise(2, 0.01)))


@pytest.mark.parametrize(("part", "change"), [("compute", {"compute": 1.5}), ("memory", {"memory": 1.6})])
def test_a_rate_that_fell_is_named_with_its_calibration(
    tmp_path: Path, cpu: Capture, monkeypatch: pytest.MonkeyPatch, part: str, change: dict[str, float]
) -> None:
    found = attributed(cpu, changed_cpu(tmp_path, monkeypatch, **change))
    assert blamed(found) == {part}
    assert factors(found)[part] == pytest.approx(change[part], rel=0.1)
    named = next(one for one in found.parts if one.part == part)
    assert f"fell to {1 / change[part]:.2f}x" in named.evidence
    assert set(found.part_of.values()) <= {part, None} and part in found.part_of.values()


def test_calls_that_cost_more_are_launch_although_no_calibration_says_so(
    tmp_path: Path, cpu: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = attributed(cpu, changed_cpu(tmp_path, monkeypatch, calls=1.8))
    assert blamed(found) == {"launch"} and found.part_of[OVERALL] == "launch"
    assert factors(found)["launch"] == pytest.approx(1.8, rel=0.1)
    assert set(found.part_of.values()) <= {"launch", None}


def test_parts_and_what_they_leave_sum_to_the_change(
    tmp_path: Path, cpu: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = changed_cpu(tmp_path, monkeypatch, compute=1.3, calls=1.5)
    found = attributed(cpu, other)
    a, b = (of_capture(one).workloads for one in (cpu, other))
    logs = [np.mean(np.log(list(b[key].run_ns.values()))) - np.mean(np.log(list(a[key].run_ns.values()))) for key in a]
    assert found.unexplained_frac is not None
    assert sum(part.change_frac for part in found.parts) + found.unexplained_frac == pytest.approx(
        np.expm1(logs).mean(), rel=1e-6
    )
    assert abs(found.unexplained_frac) < 0.02
    assert blamed(found) == {"compute", "launch"}


def test_nothing_is_blamed_where_nothing_changed(tmp_path: Path, cpu: Capture) -> None:
    for seed in range(8):
        again = load_capture(write_synthetic_capture(tmp_path / str(seed), noise=noise(100 + seed, 0.03)))
        found = attributed(cpu, again)
        assert not blamed(found) and not found.part_of and not found.findings


def test_shares_sum_to_one_and_follow_the_roofs(cpu: Capture) -> None:
    """Times are homogeneous in what they are made of (Euler); one token reads weights, 512 tokens compute."""
    division = divide(cpu, list(of_capture(cpu).workloads))
    assert division.shares.sum(axis=1) == pytest.approx(np.ones(len(division.keys)), abs=1e-3)
    by_part = dict(zip(division.causes, division.shares.T, strict=True))
    tokens = division.facts["n_tokens"].to_numpy()
    assert by_part["memory"][tokens == 1].mean() > by_part["compute"][tokens == 1].mean()
    assert by_part["compute"][tokens == 512].mean() > by_part["compute"][tokens == 1].mean()


def test_what_each_part_adds_sums_to_what_all_add(cpu: Capture) -> None:
    division = divide(cpu, list(of_capture(cpu).workloads))
    changes = np.log([1.7 if cause == "memory" else 1.2 for cause in division.causes])
    added = division.added(changes)
    whole = np.expm1(division.log_ns(changes) - division.log_ns(np.zeros(len(changes))))
    assert added.sum(axis=1) == pytest.approx(whole)
    alone = np.where(np.array(division.causes) == "memory", np.log(1.7), 0.0)
    assert (division.added(alone)[:, np.array(division.causes) != "memory"] == 0).all()


def test_all_parts_alike_is_said_to_be_the_machine(tmp_path: Path, cpu: Capture) -> None:
    slow = load_capture(write_synthetic_capture(tmp_path / "slow", noise=noise(3, 0.01, 1.4)))
    found = attributed(cpu, slow)
    assert found.findings[0].startswith("All parts take longer alike, about 1.4")


def only_slower(capture: Capture, path: Path, factor: float, is_slower: pl.Expr) -> Capture:
    """A copy of a capture in which these workloads alone take longer."""
    slow = capture.observations.filter(is_slower)["workload"].unique().to_list()
    times = capture.observations.with_columns(
        time_ns=pl.col("time_ns") * pl.when(pl.col("workload").is_in(slow)).then(factor).otherwise(1.0)
    )
    made = replace(capture, name=path.name, path=path)
    return replace(made, observations=times)


def test_a_shape_that_is_slower_alone_is_no_part(tmp_path: Path, cpu: Capture) -> None:
    found = attributed(cpu, only_slower(cpu, tmp_path / "odd", 1.6, pl.col("shape") == "synthetic-b"))
    assert not blamed(found)
    assert set(found.part_of.values()) == {None}
    assert found.findings == (
        "All 8 workloads of shape synthetic-b are slower for themselves: no part of the time explains them.",
    )


def test_what_sets_workloads_apart_is_found_and_nothing_else() -> None:
    """Twelve workloads of two shapes, two operators and three batches: facts alone, in pairs, and none at all."""
    rows = [(shape, op, n) for shape in ("a", "b") for op in ("moe_layer", "grouped_gemm") for n in (1, 8, 64)]
    facts = pl.DataFrame(rows, schema=["shape", "op", "n_tokens"], orient="row").with_columns(
        dtype=pl.lit("fp32"),
        launch=pl.lit(None, pl.String),
        access=pl.lit("resident"),
        residency=pl.lit(None, pl.String),
        routing=pl.lit("uniform"),
    )

    def said(keep: Callable[[tuple[Any, ...]], bool]) -> list[str]:
        return what_they_share(facts, np.array([keep(row) for row in rows]))

    assert "All 6 workloads of op moe_layer " in said(lambda row: row[1] == "moe_layer")[0]
    assert "All 4 workloads of 64 tokens and more " in said(lambda row: row[2] == 64)[0]
    assert "All 3 workloads of shape b, op grouped_gemm " in said(lambda row: row[:2] == ("b", "grouped_gemm"))[0]
    assert said(lambda row: row == ("a", "moe_layer", 8)) == [
        "1 workload slower alone, with nothing in common: moe_layer a, 8 tokens."
    ]
    assert said(lambda row: False) == []


def divided(shares: dict[str, list[float]]) -> Division:
    """A made-up division of workloads into parts with these shares, `[workload]` of each."""
    n, causes = len(next(iter(shares.values()))), tuple(shares)
    table = np.column_stack([shares[cause] for cause in causes])

    def times(changes: dict[str, float]) -> Array:
        return 1e6 * table @ np.exp([changes.get(cause, 0.0) for cause in causes])

    group = Group(np.arange(n), times, causes)
    return Division(tuple(map(str, range(n))), causes, table, np.zeros(n), pl.DataFrame(), {}, (group,))


def test_a_part_is_not_named_where_another_division_gives_its_time_to_another_part() -> None:
    """Nine of ten workloads read weights for as long as they compute, and no baseline says which of the two it is."""
    launch = [0.1] * 9 + [0.9]
    one = divided({"launch": launch, "compute": [0.9] * 9 + [0.1]})
    other = divided({"launch": launch, "memory": [0.9] * 9 + [0.1]})
    ratio, noise, shapes = np.log([1.45] * 9 + [1.05]), np.full(10, 1e-4), np.arange(10)
    fit, again = (fit_changes(ratio, noise, division, shapes) for division in (one, other))
    sides, states = Sides((np.zeros((10, 5)), np.zeros((10, 5))), 1e-6, np.full(10, 1e-6)), ["open", "longer"]
    added = one.added(fit.changes).mean(axis=0)
    assert _confirmed(states, one, added, other, again, sides, MARGIN) == ["open", "open"]
    assert _confirmed(states, one, added, one, fit, sides, MARGIN) == states


def test_compute_and_memory_may_be_taken_for_each_other_also_where_they_never_meet() -> None:
    """Three workloads of compute, three of memory, no launch in the last: 30 % of the difference of their changes."""
    shares = np.array([[0.9, 0.0, 0.1]] * 3 + [[0.0, 1.0, 0.0]] * 3)
    found = _leak(np.array([0.5, 0.1, 0.0]), shares, ("compute", "memory", "launch"))
    assert found[:2] == pytest.approx([0.3 * 0.4, 0.3 * 0.4])
    # Launch meets compute alone, and lies in no more than a ninth of it.
    assert found[2] == pytest.approx(0.3 * 0.5)
    apart = _leak(np.array([0.5, 0.1, 0.0]), shares, ("compute", "link", "launch"))
    assert apart == pytest.approx([0.3 * 0.5 / 9, 0.0, 0.3 * 0.5])


def test_one_workload_cannot_tell_parts_apart(tmp_path: Path) -> None:
    """A single workload: whatever its time consists of, no other says which part it was."""
    for name, factor in (("a", 1.0), ("b", 1.5)):
        write_synthetic_capture(tmp_path / name, shapes=SHAPES[:1], noise=noise(4, 0.01, factor))
    a, b = (load_capture(tmp_path / name) for name in "ab")
    few = a.observations.filter(pl.col("n_tokens") == 64, pl.col("routing") == "uniform")["workload"].unique().to_list()
    a, b = (replace(one, observations=one.observations.filter(pl.col("workload").is_in(few))) for one in (a, b))
    found = attributed(a, b)
    assert not blamed(found) and set(found.part_of.values()) == {None}
    assert "these workloads cannot tell which" in found.findings[0]


GPU = {"compute": 1.0, "memory": 1.0, "link": 1.0, "floor_ns": 0.0, "overlap": 0.0}


def gpu_time_ns(w: dict[str, Any], **changes: float) -> float:
    """The time of captures_made, with parts that take longer and a floor that is higher where the host launches."""
    at = GPU | changes
    weights = w["gemm_k"] * w["gemm_n"] if w["gemm_k"] else w["n_gemms"] * w["hidden"] * w["inter"]
    per_expert = weights * WEIGHT_BYTES[w["dtype"]]
    active = {i for i, n in enumerate(w["tokens_per_expert"]) if n > 0}
    gone = active & set(w.get("offloaded", ()))
    on_host = w["access"] == "cpu"
    n_rows = sum(n for i, n in enumerate(w["tokens_per_expert"]) if not (on_host and i in gone))
    n_away = w["n_tokens"] * w["top_k"] - n_rows
    here_s = max(
        2.0 * n_rows * weights / 4e14 * at["compute"],
        (len(active) - len(gone)) * per_expert / 2.4e12 * at["memory"],
    )
    floor_ns = (6_000.0 if w.get("launch") else 15_000.0 + at["floor_ns"]) * (3 if w["op"] == "moe_layer" else 1)
    away_s = len(gone) * per_expert / 45e9 * at["link"]
    if on_host:
        return floor_ns + max(here_s, len(gone) * per_expert / 150e9, 2.0 * n_away * weights / 8e12) * 1e9
    hidden_s = at["overlap"] * min(here_s, away_s) if w["access"] == "copy-overlap" else 0.0
    return floor_ns + (here_s + away_s - hidden_s) * 1e9


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """The made-up GPU before anything changed."""
    with pytest.MonkeyPatch.context() as patch:
        return changed_gpu(tmp_path_factory.mktemp("gpu"), patch)


def changed_gpu(path: Path, patch: pytest.MonkeyPatch, **changes: float) -> Capture:
    patch.setattr(captures_made, "_gpu_time_ns", lambda w: gpu_time_ns(w, **changes))
    return load_capture(write_gpu_capture(path / "cand"))


def of_bf16(capture: Capture) -> Capture:
    """Its workloads of one dtype, which halves what is fitted."""
    return replace(capture, observations=capture.observations.filter(dtype="bf16"))


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("link", {"link": 1.8}),
        ("launch", {"floor_ns": 15_000.0}),
        ("memory", {"memory": 1.6}),
        ("compute", {"compute": 1.7}),
    ],
)
def test_each_part_of_a_gpu_is_named_and_no_other(
    tmp_path: Path, gpu: Capture, monkeypatch: pytest.MonkeyPatch, part: str, changes: dict[str, float]
) -> None:
    found = attributed(of_bf16(gpu), of_bf16(changed_gpu(tmp_path, monkeypatch, **changes)))
    assert blamed(found) == {part}
    named = [one for one in found.part_of.values() if one]
    assert set(named) == {part} and len(named) >= 0.8 * len(found.part_of)


def test_a_dtype_whose_kernel_became_slower_is_no_part(
    tmp_path: Path, gpu: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures_made, "_gpu_time_ns", lambda w: gpu_time_ns(w) * (1.5 if w["dtype"] == "fp8" else 1.0))
    found = attributed(gpu, load_capture(write_gpu_capture(tmp_path / "cand")))
    assert not blamed(found) and set(found.part_of.values()) == {None}
    assert found.findings == (
        "All 30 workloads of dtype fp8 are slower for themselves: no part of the time explains them.",
    )


def test_the_older_of_two_measured_machines_lacks_memory_bandwidth_and_its_own_runs_lack_nothing() -> None:
    a, b = (
        load_capture(path) for path in shipped_captures() if path.name in ("epyc-zen4-2c-fp32", "epyc-zen5-2c-fp32")
    )
    sides = of_capture(b), of_capture(a)
    found = attribute(*sides, check(*sides, axes=["machine", "software"]), moved_quantities(b, a), MARGIN)
    assert found.part_of[OVERALL] == "memory" and "fell to 0.63x" in found.parts[0].evidence
    assert abs(found.unexplained_frac or 1.0) < 0.03
    halves = [a.observations.filter(pl.col("run") % 2 == half) for half in (0, 1)]
    assert not blamed(attributed(*(replace(a, observations=half) for half in halves)))


def test_a_capture_without_ceilings_says_why_nothing_can_be_divided(cpu: Capture) -> None:
    bare = replace(cpu, manifest={**cpu.manifest, "calibration": {}})
    found = attributed(bare, cpu)
    assert found.parts == () and found.unexplained_frac is None
    assert found.findings == (
        "What the change consists of is not known: hardware 'base' has no compute rate for fp32; it has n_cores_count.",
    )


def test_copies_that_no_longer_hide_are_copy_exposure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, copies ran beside the experts on the device; now one after another."""
    before = changed_gpu(tmp_path / "before", monkeypatch, overlap=1.0, compute=4.0)
    after = changed_gpu(tmp_path / "after", monkeypatch, compute=4.0)
    found = attributed(of_bf16(before), of_bf16(after))
    assert blamed(found) == {"copy exposure"}
    assert set(found.part_of.values()) <= {"copy exposure", None}


def write_profile(path: Path, mm_us: int, n_kernels: int) -> None:
    """A made-up profile of two steps on a CPU: one operator for products and one for copies."""
    events: list[dict[str, Any]] = []
    for step in range(2):
        at = step * 10_000
        events.append({"ph": "X", "cat": "user_annotation", "name": f"ProfilerStep#{step}", "ts": at, "dur": 9000})
        for i in range(n_kernels):
            events.append({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": at + 100 + i * 2000, "dur": mm_us})
        events.append({"ph": "X", "cat": "cpu_op", "name": "aten::copy_", "ts": at + 8000, "dur": 500})
    content = {"traceEvents": [{"pid": 1, "tid": 1, **event} for event in events]}
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        json.dump(content, file)


def test_profiles_tell_where_the_share_of_an_operator_moved_and_no_times(tmp_path: Path) -> None:
    sides = []
    for name, mm_us in (("a", 500), ("b", 1500)):
        path = write_synthetic_capture(tmp_path / name)
        write_profile(path / "profiles" / "moe_layer-made-up.trace.json.gz", mm_us, 2)
        sides.append(load_capture(path))
    details = {one.name: one for one in profile_details(sides[0], sides[1])}
    # Two products of 500 of 1500 us in operators, then of 1500 of 3500 us.
    assert details["aten::mm self_frac"].baseline == pytest.approx(1000 / 1500)
    assert details["aten::mm self_frac"].candidate == pytest.approx(3000 / 3500)
    assert details["aten::copy_ self_frac"].candidate == pytest.approx(500 / 3500)
    assert {one.change_frac for one in details.values()} == {None} and not any("_ns" in name for name in details)
    assert profile_details(sides[0], sides[0]) == ()
    (tmp_path / "b" / "profiles" / "moe_layer-made-up.trace.json.gz").write_bytes(b"no gzip")
    assert profile_details(sides[0], sides[1]) == ()


@pytest.mark.parametrize(
    ("state", "factors_90", "ratio", "words"),
    [
        ("longer", (1.4, 1.7), 0.65, ""),  # 1 / 0.65 is 1.54 times the time
        ("longer", (1.4, 1.7), 0.40, ", more than the sweep shows"),
        ("longer", (1.4, 1.7), 0.90, ", which accounts for a part of it"),
        ("longer", (1.4, 1.7), 1.20, ", which does not account for it"),
        ("shorter", (0.6, 0.7), 1.2, ", which accounts for a part of it"),
        ("open", (0.9, 1.1), 0.5, ", which the sweep does not show"),
        ("open", (0.9, 1.3), 0.8, ""),
    ],
)
def test_a_calibrated_rate_agrees_with_a_factor_or_does_not(
    state: str, factors_90: tuple[float, float], ratio: float, words: str
) -> None:
    low, high = np.log(factors_90)
    rate = Moved("memory_stream_bytes_per_s", "", 1.0, ratio, ratio, "slower", None, None)
    assert _agreement(state, ((low + high) / 2, low, high), [rate]) == words


def test_pages_files_and_the_figure_tell_the_parts(
    tmp_path: Path, cpu: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compare(of_capture(cpu), of_capture(changed_cpu(tmp_path, monkeypatch, calls=1.8)))
    page, markdown = report.check_page(found), report.check_markdown(found, ["regressed"])
    for words in (page, markdown):
        assert "most of it in launch" in words and "longer in the sweep" in words
    assert found.overall.part == "launch" and "most of it in launch" in report.check_junit(found, ["regressed"])
    figure = changed_parts(found)
    (bars,) = figure.data
    assert sum(bars.x) == pytest.approx(sum(part.change_frac for part in found.parts) + (found.unexplained_frac or 0))
    names = list(figure.layout.yaxis.ticktext)
    assert names[-1] == "not explained" and len(names) == len(bars.x) == len(found.parts) + 1
    assert f"launch<br>takes {found.parts[0].factor:.2f}x" in names[0]
    content = found.to_json()
    assert content["parts"][0]["part"] == "launch" and content["verdicts"][0]["part"] == "launch"
