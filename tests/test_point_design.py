"""Which points a design takes: those that tell most, cheaply, any one of which may fail; and what its plan becomes."""

import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from collectors import plan as plans
from perfmodel.cli import adapting  # noqa: F401  its commands join the application
from perfmodel.cli.shell import app
from perfmodel.design import Field, _greedy, _loss, _robust, design, field_of, grid, write_plan
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.latency import LatencyModel, save_model
from tests.adapt_made import synthetic_candidates, synthetic_model, synthetic_times


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    return synthetic_model()


@pytest.fixture(scope="module")
def candidates(model: LatencyModel) -> pl.DataFrame:
    return synthetic_candidates(model)


def synthetic_field(slopes: list[list[float]], ns: list[float], spread: list[float]) -> Field:
    n = len(slopes)
    names = tuple(f"c{i}" for i in range(len(spread)))
    return Field(names, np.array(slopes), np.full(n, 0.1), np.arange(n), np.array(ns), np.array(spread))


def test_information_of_one_point_by_hand() -> None:
    field = synthetic_field([[1.0]], [1.0], [0.3])
    # Variance 0.09 becomes 1 / (1 / 0.09 + 1 / 0.01) = 0.009: a tenth, half of log2(10) bits.
    assert field.covariance([0])[0, 0] == pytest.approx(0.009)
    assert field.information([0]) == pytest.approx(math.log2(10) / 2)
    assert field.open_variance([]) == pytest.approx(0.09)


def test_of_points_as_good_the_cheapest_is_taken() -> None:
    field = synthetic_field([[1.0], [1.0], [0.2]], [500.0, 20.0, 1.0], [0.3])
    assert _greedy(field, range(3), 1) == [1]


def test_a_constant_that_is_known_is_not_asked_about() -> None:
    field = synthetic_field([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [1.0, 1.0, 1.0], [0.02, 0.5])
    assert set(_greedy(field, range(3), 2)) == {1, 2}


def test_any_one_point_may_fail(model: LatencyModel, candidates: pl.DataFrame) -> None:
    field = field_of(model, candidates)
    greedy = _greedy(field, range(candidates.height), 6)
    robust = _robust(field, greedy)
    assert len(set(robust)) == 6
    assert _loss(field, robust) <= _loss(field, greedy)
    worst = max(field.open_variance([c for c in robust if c != lost]) for lost in robust)
    assert worst < 0.25 * field.open_variance([])


def test_designed_points_tell_more_than_random_ones(model: LatencyModel, candidates: pl.DataFrame) -> None:
    field = field_of(model, candidates)
    chosen = design(model, 8, candidates)["candidate"].to_list()
    random = [np.random.default_rng(i).choice(candidates.height, 8, replace=False).tolist() for i in range(20)]
    assert field.open_variance(chosen) < min(field.open_variance(one) for one in random)


def test_a_design_says_what_each_point_is_for(model: LatencyModel) -> None:
    table = design(model, 6, profile=hardware("h200-sxm"), shapes=["olmoe", "mixtral-8x7b"])
    assert table.height == 6
    assert set(table["shape"]) <= {"olmoe", "mixtral-8x7b"}
    assert set(table["pins"]) <= {row for row in vars(model.constants_)}
    assert (table["spread_after"] < table["spread_before"]).all()
    assert (table["information_bits"] > 0).all()
    assert (table["predicted_ns"] > 0).all()
    for name, reason in table.select("pins", "reason").iter_rows():
        assert name in reason
    assert design(model, 6, profile=hardware("h200-sxm"), shapes=["olmoe", "mixtral-8x7b"]).equals(table)


def test_the_grid_keeps_to_memory_tokens_and_operations(model: LatencyModel) -> None:
    small = grid(model, ["olmoe"])
    assert set(small["op"]) == {"grouped_gemm", "moe_layer"}
    assert small.filter(pl.col("op") == "moe_layer")["gemm_k"].null_count() == small.filter(op="moe_layer").height
    assert set(small.filter(n_tokens=1)["routing"]) == {"uniform"}
    for counts, n_tokens, top_k in small.select("tokens_per_expert", "n_tokens", "top_k").iter_rows():
        assert sum(counts) == n_tokens * top_k
    with pytest.raises(InputError, match="found 4 candidates for 200 points"):
        design(model, 200, small[:4])
    with pytest.raises(InputError, match="expected 1 to 200"):
        design(model, 0)
    with pytest.raises(InputError, match="unknown shape"):
        design(model, 5, shapes=["no-such-model"])


def test_collectors_measure_the_plan_that_was_written(model: LatencyModel, tmp_path: Path) -> None:
    table = design(model, 8, shapes=["olmoe", "qwen3-30b-a3b"])
    write_plan(table, tmp_path / "plan.jsonl")
    points = plans.read_points(tmp_path / "plan.jsonl")
    request = plans.Request("cuda", "bfloat16", (), (), points=points)
    planned = plans.plan(request, None).workloads
    assert len(planned) == 8
    for w, row in zip(planned, table.to_dicts(), strict=True):
        assert (w.op, w.shape, w.n_tokens, w.routing) == (row["op"], row["shape"], row["n_tokens"], row["routing"])
        assert (w.gemm_k, w.gemm_n, w.dtype, w.launch) == (row["gemm_k"], row["gemm_n"], "bf16", "graph")
        assert sum(w.tokens_per_expert) == w.n_tokens * w.top_k
    assert plans.plan(request, 1e9).skipped
    with pytest.raises(InputError, match="nothing to measure"):
        plans.plan(request, 1e3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "line 1, is no point"),
        ('{"op": "moe_layer"}', "line 1, is no point"),
        ("", "points of 0 dtypes"),
    ],
)
def test_files_that_are_no_plan_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "plan.jsonl").write_text(content)
    with pytest.raises(InputError, match=words):
        plans.read_points(tmp_path / "plan.jsonl")


def test_a_gemm_that_is_none_of_the_layer_is_refused(model: LatencyModel, tmp_path: Path) -> None:
    write_plan(design(model, 3, grid(model, ["olmoe"]).filter(op="grouped_gemm")), tmp_path / "plan.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    lines[1]["gemm_k"] += 16
    (tmp_path / "plan.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match="line 2"):
        plans.read_points(tmp_path / "plan.jsonl")


def test_points_that_collectors_cannot_measure_are_not_planned(tmp_path: Path) -> None:
    model = synthetic_model(("fused_moe",))
    with pytest.raises(InputError, match="the collectors measure grouped_gemm and moe_layer"):
        write_plan(design(model, 3, shapes=["olmoe"]), tmp_path / "plan.jsonl")


def as_moe_perf(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows as a moe_perf table names them; the times stay made up."""
    return rows.select(
        framework=pl.lit("synthetic"),
        version=pl.lit("1"),
        device=pl.lit("NVIDIA H200"),
        op_name=pl.lit("moe"),
        kernel_source=pl.lit("cutlass"),
        moe_dtype=pl.lit("bfloat16"),
        distribution=pl.lit("balanced"),
        num_tokens="n_tokens",
        hidden_size="hidden",
        inter_size="inter",
        topk="top_k",
        num_experts="n_experts",
        moe_tp_size=pl.lit(1),
        moe_ep_size=pl.lit(1),
        latency=pl.col("time_ns") / 1e6,
    )


def test_the_two_commands(tmp_path: Path) -> None:
    model = synthetic_model(("fused_moe",))
    model.errors_, model.points_ = None, None
    save_model(model, tmp_path / "model.json")
    runner = CliRunner()
    words = ["design", str(tmp_path / "model.json"), "--points", "6", "--hardware", "h200-sxm", "--shape", "olmoe"]
    shown = runner.invoke(app, [*words, "--json"])
    assert len(json.loads(shown.stdout)["points"]) == 6
    assert "pins" in runner.invoke(app, words).stdout
    rows = grid(model, ["olmoe", "qwen3-30b-a3b", "deepseek-v2-lite"]).filter(routing="uniform")
    model.profile = hardware("h200-sxm")
    as_moe_perf(synthetic_times(model, rows, noise=0.02, layer_ns=2.0)).write_parquet(tmp_path / "points.parquet")
    words = ["calibrate", *(str(tmp_path / name) for name in ("model.json", "points.parquet")), "--out"]
    shown = runner.invoke(app, [*words, str(tmp_path / "new.json")])
    assert shown.exit_code == 0, shown.output
    assert "layer_ns" in shown.stdout
    assert "on h200-sxm: from a model of" in shown.stdout
    shown = runner.invoke(app, [*words, str(tmp_path / "new.json"), "--json"])
    said = json.loads(shown.stdout)
    layer = next(row for row in said["constants"] if row["name"] == "layer_ns")
    assert layer["after"] > 1.5 * layer["before"]
    assert runner.invoke(app, [*words, str(tmp_path / "no" / "new.json")]).exit_code != 0
