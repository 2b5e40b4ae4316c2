"""Maps of experts to GPUs, their comparison, the command and the study: hand-computed cases, bounds, conservation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import moe
from perfmodel.balance import (
    POLICIES,
    Slots,
    compare,
    device_ns,
    layer_ns_by_rows,
    observed_staircase,
    predicted_staircase,
    steps_of,
    study_page,
)
from perfmodel.balance.compare import made
from perfmodel.balance.profiles import _prefixes
from perfmodel.balance.study import MODELS, ROUTINGS, SKEWED, SPREADS, by_history, gain, latencies, measured_shares
from perfmodel.capture import OBSERVATIONS, load_capture, shipped_captures
from perfmodel.cli.main import main
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.latency import load_model
from perfmodel.moe import MoEShape
from perfmodel.placement.balance import (
    imbalance,
    linear,
    longest_first,
    map_of,
    map_of_slots,
    round_robin,
    token_balanced,
)
from perfmodel.placement.eplb import rebalance
from perfmodel.placement.staircase import spread_speeds
from perfmodel.predict import basis_of
from perfmodel.routing import synthetic_counts, synthetic_steps
from tests.balance_made import bursty, straight
from tests.conftest import ROOT


def test_longest_first_by_hand_with_and_without_room() -> None:
    weights = np.array([[2.0, 7.0, 3.0, 3.0, 1.0, 8.0]])
    pack_of, number = longest_first(weights, 2)  # 8 | 7, then 3 to the lighter, 3 to the other, 2, 1
    assert pack_of.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert number.tolist() == [[2, 0, 1, 1, 2, 0]]
    pack_of, _ = longest_first(np.array([[9.0, 1.0, 1.0, 1.0]]), 2, 2)
    assert pack_of.tolist() == [[0, 1, 1, 0]], "the last goes where there is room, though the pack is the heavier"


def test_a_pack_twice_as_fast_takes_twice_as_much() -> None:
    pack_of, _ = longest_first(np.ones((1, 6)), 2, speeds=np.array([1.0, 0.5]))
    assert np.bincount(pack_of[0]).tolist() == [4, 2]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.integers(1, 4))
def test_longest_first_stays_within_grahams_bound_of_the_optimum(weights: list[int], n_packs: int) -> None:
    pack_of, _ = longest_first(np.array([weights], dtype=np.float64), n_packs)
    held = np.bincount(pack_of[0], weights, minlength=n_packs)
    assert held.sum() == sum(weights)
    states = {(0,) * n_packs}
    for weight in weights:
        states = {tuple(sorted((*s[:i], s[i] + weight, *s[i + 1 :]))) for s in states for i in range(n_packs)}
    optimum = min(max(state) for state in states)
    assert held.max() <= (4 / 3 - 1 / (3 * n_packs)) * optimum + 1e-9


def test_linear_and_round_robin_by_hand() -> None:
    assert linear(1, 6, 3).phy2log.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert round_robin(1, 6, 3).phy2log.tolist() == [[0, 3, 1, 4, 2, 5]]
    loads = np.array([[[5.0, 1, 1, 1, 1, 3]], [[0, 0, 2, 0, 0, 0]]])
    assert linear(1, 6, 3).tokens(loads).tolist() == [[[6, 2, 4]], [[0, 2, 0]]]
    assert round_robin(1, 6, 3).tokens(loads).tolist() == [[[6, 2, 4]], [[0, 0, 2]]]


def test_even_maps_hold_equally_many_experts_and_free_ones_as_many_as_balance_asks() -> None:
    loads = np.array([[10.0, 1, 1, 1, 1, 1, 1, 4]])
    even, free = token_balanced(loads, 2), token_balanced(loads, 2, is_even=False)
    assert even.is_even and not free.is_even
    assert even.tokens(loads[None])[0, 0].tolist() == [13, 7]
    assert free.tokens(loads[None])[0, 0].tolist() == [10, 10]


@given(st.integers(0, 10_000))
def test_every_token_is_computed_once_and_every_expert_held_once(seed: int) -> None:
    loads = np.random.default_rng(seed).pareto(1.5, (4, 3, 12))
    for one in (linear(3, 12, 4), round_robin(3, 12, 4), token_balanced(loads.sum(axis=0), 4)):
        assert one.tokens(loads).sum(axis=2) == pytest.approx(loads.sum(axis=2))
        assert one.shares.sum(axis=2) == pytest.approx(1)
        assert np.sort(one.phy2log, axis=1).tolist() == [list(range(12))] * 3


def test_slots_in_turn_and_experts_by_gpu_are_the_same_map() -> None:
    by_gpu = map_of("any", np.array([[1, 0, 1, 0]]), 2)
    by_slot = map_of_slots("any", np.array([[1, 3, 0, 2]]), np.zeros((1, 4), dtype=np.int64), 2)
    assert by_gpu.phy2log.tolist() == by_slot.phy2log.tolist()
    assert by_gpu.gpu_of.tolist() == by_slot.gpu_of.tolist() == [[0, 0, 1, 1]]


def test_imbalance_is_the_mean_of_max_over_mean_where_there_are_tokens() -> None:
    assert imbalance(np.array([[[3.0, 1.0]], [[2.0, 2.0]], [[0.0, 0.0]]])) == pytest.approx(1.25)


def test_gpus_that_do_not_divide_experts_are_refused() -> None:
    for make in (linear, round_robin):
        with pytest.raises(InputError, match="10 experts cannot be shared evenly by 4 GPUs"):
            make(1, 10, 4)
    with pytest.raises(InputError, match="10 experts cannot be shared evenly by 4 GPUs"):
        token_balanced(np.ones((1, 10)), 4)


def test_equal_gpus_and_even_loads_leave_nothing_to_gain_and_all_wait_equally() -> None:
    loads = np.full((24, 2, 16), 32.0)
    done = compare(loads, straight(512, np.ones(4), 64))
    for one in done.outcomes:
        if one.policy != "lpt-free":
            assert one.gain_frac == {"linear": 0, "lpt": 0}
            assert one.imbalance == 1
            assert one.straggler_frac == (0.25,) * 4 and one.idle_frac == (0,) * 4
    assert (done.n_fitted, done.n_judged) == (16, 8)


def test_even_loads_on_unequal_gpus_wait_for_the_slowest_whatever_the_map() -> None:
    loads = np.full((24, 2, 16), 32.0)
    done = compare(loads, straight(512, np.array([1.0, 1.0, 1.0, 0.8])), ("linear", "gem"))
    assert done.outcomes[1].gain_frac["linear"] == pytest.approx(0)
    assert done.outcomes[1].straggler_frac == (0, 0, 0, 1)
    assert done.outcomes[1].idle_frac == pytest.approx((0.2, 0.2, 0.2, 0))


def test_gain_over_token_balance_grows_with_the_spread_of_speeds() -> None:
    shares = synthetic_steps("layered:0.3", 48, 4, 64, seed=3)
    loads = synthetic_counts(shares, 1024, 4, seed=4).astype(np.float64)
    gains = []
    for spread in (
        0.0,
        0.077,
        0.277,
    ):  # each GPU the fastest once: token balance begins with the first
        turns = [straight(4096, np.roll(spread_speeds(4, spread), i), 16) for i in range(4)]
        done = [compare(loads, stairs, ("gem",)).outcomes[0].gain_frac["lpt"] for stairs in turns]
        gains.append(float(np.mean(done)))
    assert gains[0] < gains[1] < gains[2]
    assert gains[0] < 0.02 < gains[2]


def test_step_times_are_those_of_all_layers_of_the_model() -> None:
    loads = np.zeros((4, 2, 2))
    loads[:, :, 0] = [[1, 1], [1, 1], [2, 4], [6, 4]]
    done = compare(loads, straight(8, np.ones(2)), ("linear",), n_model_layers=6)
    one = done.outcomes[0]
    assert one.layer_ns == 4
    assert one.step_ns == {"mean": 24, "p50": 24, "p90": pytest.approx(18 + 0.9 * 12), "p99": pytest.approx(29.88)}


def test_a_single_step_and_unknown_policies_are_refused() -> None:
    with pytest.raises(InputError, match="a single step"):
        compare(np.ones((1, 1, 4)), straight(8, np.ones(2)))
    idle = np.ones((20, 1, 4))
    idle[16:] = 0
    with pytest.raises(InputError, match="no expert was used in the steps"):
        compare(idle, straight(8, np.ones(2)))
    with pytest.raises(InputError, match="unknown policy 'magic'; known: linear, "):
        made("magic", np.ones((2, 1, 4)), straight(8, np.ones(2)))


def test_copies_let_eplb_halve_a_single_hot_expert() -> None:
    loads = np.ones((20, 1, 4))
    loads[:, :, 0] = 9
    stairs = straight(16, np.ones(2))
    plain = compare(loads, stairs, ("eplb",)).outcomes[0]
    copied = compare(loads, stairs, ("eplb",), Slots(6)).outcomes[0]
    assert plain.layer_ns == 10 and copied.layer_ns == 7, "two thirds of the hot one and one other; a third and two"


def test_every_policy_makes_a_map_that_computes_every_token_once() -> None:
    loads = bursty(16, 4, 3, 256, 2)
    for policy in POLICIES:
        found = made(policy, loads, straight(512, spread_speeds(4, 0.1)), Slots(20, 4, 2))
        assert found.policy == policy
        assert found.tokens(loads).sum(axis=2) == pytest.approx(loads.sum(axis=2))


SXM = hardware("h100-sxm")


@pytest.mark.parametrize("model", [None, "h100-sxm-vllm-triton-bf16"])
def test_a_predicted_staircase_rises_and_scales_with_speed(model: str | None) -> None:
    shape = moe.shape("olmoe")
    basis = basis_of(SXM, shape, load_model(model) if model else None)
    speeds = np.array([1.0, 1.0, 1.0, 0.5])
    stairs = predicted_staircase(basis, shape, speeds, np.full((2, 64), 1 / 64), 8192)
    assert stairs.boundaries[-1] >= 8192
    assert (np.diff(stairs.ns, axis=1) >= 0).all()
    assert stairs.ns[3] == pytest.approx(2 * stairs.ns[0])
    assert stairs.ns[0, -1] > 1.5 * stairs.ns[0, 0]


def rows_made(n_experts: int, times: dict[int, float], op: str = "moe_layer", gemm: int | None = None) -> pl.DataFrame:
    """Observations of a made-up machine at several token counts, top-1."""
    row = {"op": op, "shape": "made-up", "n_experts": n_experts, "top_k": 1, "hidden": 64, "inter": 32, "n_gemms": 3}
    row |= {"access": "resident", "offload_frac": 0.0, "gemm_k": gemm}
    rows = [{**row, "n_tokens": n, "time_ns": ns} for n, ns in times.items()]
    return pl.DataFrame(rows, schema_overrides=dict(OBSERVATIONS)).match_to_schema(
        OBSERVATIONS, missing_columns="insert"
    )


SMALL = MoEShape("small-made", n_experts=8, top_k=2, hidden=64, inter=32)


def test_a_measured_staircase_has_one_row_for_each_capture_at_shared_counts() -> None:
    first = rows_made(4, {16: 100.0, 32: 90.0, 64: 200.0})
    other = rows_made(4, {16: 120.0, 64: 260.0, 128: 300.0})
    stairs = observed_staircase([first, other], SMALL, 2)
    assert stairs.boundaries.tolist() == [16, 64]
    assert stairs.ns.tolist() == [[100, 200], [120, 260]]
    assert stairs.spreads == pytest.approx([0.2, 0.3])
    alone = observed_staircase([first], SMALL, 2, np.array([1.0, 0.5]))
    assert alone.ns.tolist() == [[95, 95, 200], [190, 190, 400]], "a fall becomes the mean of both"


def test_grouped_gemms_of_a_layer_add_up() -> None:
    both = pl.concat(
        [
            rows_made(4, {16: 10.0, 32: 20.0}, "grouped_gemm", 64),
            rows_made(4, {16: 5.0, 32: 6.0, 64: 9.0}, "grouped_gemm", 32),
        ]
    )
    assert observed_staircase([both], SMALL, 2).ns[0].tolist() == [15, 26]


def test_captures_that_do_not_fit_are_refused_with_what_they_hold() -> None:
    with pytest.raises(InputError, match=r"no two token counts of .* 4 experts x 64 x 32 .* capture: 8 x 64 x 32"):
        observed_staircase([rows_made(8, {16: 1.0, 32: 2.0})], SMALL, 2)
    with pytest.raises(InputError, match="found 3 captures for 2 GPUs"):
        observed_staircase([rows_made(4, {16: 1.0, 32: 2.0})] * 3, SMALL, 2)
    with pytest.raises(InputError, match="share fewer than two token counts"):
        observed_staircase([rows_made(4, {16: 1.0, 32: 2.0}), rows_made(4, {16: 1.0, 64: 2.0})], SMALL, 2)


def test_a_shipped_capture_makes_a_staircase() -> None:
    path = next(path for path in shipped_captures() if path.name == "epyc-zen5-2c-bf16")
    shape = MoEShape("wide", n_experts=64, top_k=1, hidden=512, inter=816)
    stairs = observed_staircase([load_capture(path).observations], shape, 4, spread_speeds(4, 0.077))
    assert len(stairs.boundaries) >= 5
    assert stairs.spreads == pytest.approx(0.077)


def test_routings_come_as_steps_from_patterns_and_files(tmp_path: Path) -> None:
    shape = MoEShape("small-made", n_experts=8, top_k=2, hidden=64, inter=32, n_layers=3)
    drawn = steps_of("temporal:4", shape, 64, 20)
    assert drawn.loads.shape == (20, 3, 8) and (drawn.loads.sum(axis=2) == 128).all()
    counts = np.random.default_rng(0).integers(1, 9, (5, 2, 8))
    np.savez(tmp_path / "steps.npz", counts=counts)
    read = steps_of(str(tmp_path / "steps.npz"), shape, 64)
    assert read.loads.shape == (5, 2, 8)
    assert read.loads.sum(axis=2) == pytest.approx(128)
    assert read.loads[0, 0] / 128 == pytest.approx(counts[0, 0] / counts[0, 0].sum())
    np.save(tmp_path / "layers.npy", counts[0])
    assert steps_of(str(tmp_path / "layers.npy"), shape, 64, 6).loads.shape == (6, 2, 8)
    with pytest.raises(InputError, match="found experts 8, expected 16"):
        steps_of(str(tmp_path / "layers.npy"), MoEShape("other", 16, 2, 64, 32), 64)
    with pytest.raises(InputError, match="no routing file 'nothing', and no routing of that name; known: layered"):
        steps_of("nothing", shape, 64)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr("sys.argv", ["perfmodel", "balance", *words])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


def test_the_command_compares_policies_and_writes_the_best_map(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [
        "--routing",
        "temporal:1",
        "--shape",
        "mixtral-8x7b",
        "--gpus",
        "4",
        "--spread",
        "27.7%",
        "--tokens",
        "512",
    ]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and all(f"\n{policy} " in out for policy in POLICIES)
    assert "maps from 16 steps, judged by 32 later ones" in out and "27.7 % faster" in out
    code, out, err = run(capsys, monkeypatch, *words, "--json", "--out", str(tmp_path / "map.json"))
    found = json.loads(out)
    assert code == 0 and "wrote" in err
    rows = {row["policy"]: row for row in found["policies"]}
    assert found["best"] == min(rows, key=lambda policy: rows[policy]["layer_ns"])
    assert rows["linear"]["gain_over_linear_frac"] == 0
    assert sum(rows["gem"]["straggler_frac"]) == pytest.approx(1)
    assert found["token_counts"] == [*(2**i for i in range(6)), *range(64, 1025, 64)]  # of 512 tokens with top-2
    written = json.loads((tmp_path / "map.json").read_text())
    assert written["policy"] == found["best"]
    assert np.sort(written["physical_to_logical_map"], axis=1).tolist() == [list(range(8))] * 32
    assert list(tmp_path.iterdir()) == [tmp_path / "map.json"]


def test_the_command_gives_eplbs_map_of_a_file_in_the_words_of_engines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 12, "num_experts_per_tok": 1, "hidden_size": 64}
    config |= {"intermediate_size": 128, "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    counts = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    np.save(tmp_path / "counts.npy", np.stack([counts, counts]))
    words = ["--routing", str(tmp_path / "counts.npy"), "--shape", str(tmp_path / "config.json"), "--policy", "eplb"]
    words += ["--gpus", "8", "--nodes", "2", "--groups", "4", "--replicas", "16", "--out"]
    code, out, _ = run(capsys, monkeypatch, *words, str(tmp_path / "map.json"))
    assert code == 0 and "n/a" in out, "12 experts have no linear map on 8 GPUs"
    written = json.loads((tmp_path / "map.json").read_text())
    assert written["physical_to_logical_map"][0] == [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]
    assert written["logical_to_physical_map"][0][5] == [0, 2]


def test_measured_times_come_from_captures_and_many_gpus_are_summed_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 64, "num_experts_per_tok": 1, "hidden_size": 512}
    config |= {"intermediate_size": 816, "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    capture = str(next(path for path in shipped_captures() if path.name == "epyc-zen5-2c-bf16"))
    words = ["--routing", "layered:0.2", "--shape", str(tmp_path / "config.json"), "--tokens", "1024"]
    code, out, _ = run(capsys, monkeypatch, *words, "--gpus", "4", "--spread", "10%", "--capture", capture)
    assert code == 0 and "10.0 % faster" in out
    assert "by rows" not in out.splitlines()[-1] and out.count("n/a") >= len(POLICIES), "a capture knows no rows"
    code, out, _ = run(capsys, monkeypatch, *words, "--gpus", "16", "--policy", "lpt")
    assert code == 0 and "GPU waited for most" in out


@pytest.mark.parametrize("n_most", [1000, 2**21])
def test_rows_of_a_profile_are_prefixes_of_one_sequence(n_most: int) -> None:
    counts = np.array([10, 500, n_most])
    rows = _prefixes(np.array([0.5, 0.25, 0.25]), counts, 0)
    assert rows.sum(axis=1) == pytest.approx(counts)
    assert (np.diff(rows, axis=0) >= 0).all()
    assert rows[2] / n_most == pytest.approx([0.5, 0.25, 0.25], abs=0.04)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--gpus 3", "8 experts cannot be shared evenly by 3 GPUs"),
        ("--gpus 4 --policy eplb --replicas 6", "6 replicas do not divide over 4 GPUs"),
        ("--gpus 4 --policy eplb --replicas 4", "4 replicas are fewer than the 8 experts"),
        ("--gpus 4 --policy eplb --groups 3", "8 experts do not divide into 3 groups"),
        ("--gpus 4 --policy eplb --nodes 3", "4 GPUs do not divide over 3 nodes"),
        ("--gpus 4 --policy best", "unknown policy 'best'; known: linear, "),
        ("--gpus 4 --speeds 1,0.9", "--speeds names 2 GPUs, --gpus 4"),
        ("--gpus 4 --speeds 1,0.9,x,1", "--speeds is 'x', expected a positive number"),
        ("--gpus 4 --speeds 1,1,1,1 --spread 3%", "--spread or --speeds, not both"),
        ("--gpus 4 --spread -3%", "the spread of speeds is -0.03, expected at least 0"),
        ("--gpus 4 --steps 1", "a single step"),
        ("--gpus 4 --capture nowhere", "is not a capture folder"),
        ("--gpus 4 --capture nowhere --tile-rows 64", "leave out --model and --tile-rows"),
        ("--gpus 4 --out /nowhere/map.json", "map.json cannot be written"),
    ],
)
def test_mistakes_get_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, sentence: str
) -> None:
    fixed = ["--routing", "uniform", "--shape", "mixtral-8x7b", "--tokens", "64"]
    code, _, err = run(capsys, monkeypatch, *fixed, *words.split())
    assert code == 2
    assert sentence in err and err.count("\n") == 1


def test_times_by_rows_are_those_of_each_gpus_own_experts() -> None:
    shape = moe.shape("olmoe")
    basis = basis_of(SXM, shape, None)
    speeds = np.array([1.0, 0.8, 1.0, 0.5])
    loads = bursty(64, 3, 2, 128, 8)
    for one in (linear(2, 64, 4), token_balanced(loads.sum(axis=0), 4), rebalance(loads.sum(axis=0), 80, 8, 2, 4)):
        slowest = []
        for step in loads:
            for layer in range(2):
                rows = [
                    [step[layer, e] / one.logcnt[layer, e] for e in one.phy2log[layer][one.gpu_of[layer] == gpu]]
                    for gpu in range(4)
                ]
                local = replace(shape, n_experts=len(rows[0]), top_k=1)
                ns = [device_ns(basis, local, np.array([own]))[0] for own in rows]
                slowest.append(max(t / s for t, s in zip(ns, speeds, strict=True)))
        assert layer_ns_by_rows(one, loads, basis, shape, speeds) == pytest.approx(np.mean(slowest))
    free = token_balanced(loads.sum(axis=0), 4, is_even=False)
    assert layer_ns_by_rows(free, loads, basis, shape, speeds) > 0


def test_a_gpu_without_rows_takes_no_time_by_rows() -> None:
    shape = moe.shape("mixtral-8x7b")
    loads = np.zeros((2, 1, 8))
    loads[:, :, 0] = 64
    made_linear = linear(1, 8, 4)
    basis = basis_of(SXM, shape, None)
    slow = layer_ns_by_rows(made_linear, loads, basis, shape, np.array([1.0, 1e-9, 1e-9, 1e-9]))
    assert slow == pytest.approx(layer_ns_by_rows(made_linear, loads, basis, shape, np.ones(4)))


def test_the_catalogues_hunyuan_is_that_of_its_config() -> None:
    read, kept = resolve(str(ROOT / "tests" / "data" / "configs" / "hunyuan-a13b.json")), moe.shape("hunyuan-a13b")
    assert replace(read, name="", source="") == replace(kept, name="", source="")
    assert kept.n_layers * kept.layer_bytes / 2 == pytest.approx(77.3e9, rel=1e-3), "of 80 B parameters"


STUDY = (ROOT / "docs" / "balance-study.md").read_text(encoding="utf-8")


def test_the_study_page_says_what_is_computed() -> None:
    for model in MODELS[:2]:
        rows = {r: latencies(model, r, SPREADS[2])["mean"] for r in ROUTINGS}
        cells = [f"{100 * gain(f, 'gem', 'linear'):.1f} / {100 * gain(f, 'gem', 'lpt'):.1f}" for f in rows.values()]
        assert f"| {model} | {' | '.join(cells)} |".replace("-0.0", "0.0") in STUDY, "run `python docs/regenerate.py`"


def test_the_page_has_what_measured_shares_give_as_they_are_and_with_bursts() -> None:
    assert len(measured_shares()) == 11 and {model for model, _ in measured_shares()} == {"olmoe", "mixtral-8x7b"}
    row = study_page.measured_row("mixtral-8x7b", "github")
    assert len(row) == 2 * len(SPREADS)
    cells = " | ".join(map(study_page._pair, row.values()))
    assert f"| mixtral-8x7b | github | {cells} |" in STUDY, "run `python docs/regenerate.py`"


def test_what_the_paper_states_of_the_extremes_comes_out() -> None:
    for model in ("mixtral-8x7b", "llama-4-scout", "qwen3-30b-a3b"):
        uniform = latencies(model, "uniform", SPREADS[2])["mean"]
        assert abs(gain(uniform, "gem", "linear")) < 0.01, "uniform routing leaves nearly nothing to gain"
        grown = [gain(latencies(model, "layered", spread)["mean"], "gem", "lpt") for spread in SPREADS]
        assert grown == sorted(grown) and grown[0] < 0.01 < grown[2], "the gain grows with the spread"
        bursts = [gain(latencies(model, SKEWED, spread)["mean"], "gem", "lpt") for spread in SPREADS]
        assert bursts == sorted(bursts) and bursts[2] > bursts[0] + 0.03, "with bursts too, where experts differ"


def test_a_longer_history_is_worth_more_than_a_smoother_one() -> None:
    found = by_history("llama-4-scout", SKEWED)
    assert found["48 steps"] > found["16 steps"] > found["even"]
    cells = " | ".join(f"{100 * value:.1f}" for value in found.values())
    assert f"| llama-4-scout | `{SKEWED}` | {cells} |" in STUDY, "run `python docs/regenerate.py`"
