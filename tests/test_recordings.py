"""Recordings of serving engines and other tools, made up in their formats: what is read, and every trap in them."""

import base64
import json
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from perfmodel import routing as rt
from perfmodel.errors import InputError
from perfmodel.routing import Recording, read_recording
from perfmodel.routing.selections import kind_of

torch = pytest.importorskip("torch")

N_LAYERS, N_EXPERTS, TOP_K = 5, 16, 4


def ids_made_up(n_tokens: int, seed: int = 0, layers: int = N_LAYERS, top_k: int = TOP_K) -> NDArray[np.int32]:
    """Ids `[token, layer, slot]` of a made-up router, skewed and all different for one token and layer."""
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(n_tokens, layers, N_EXPERTS)) + np.log(1 / np.arange(1, N_EXPERTS + 1))
    return np.argsort(-keys, axis=2)[:, :, :top_k].astype(np.int32)


def counted_by_hand(ids: NDArray[Any], n_experts: int = N_EXPERTS) -> NDArray[np.float64]:
    """Counts `[layer, expert]` of ids, one by one; those below 0 are none."""
    counts = np.zeros((ids.shape[1], n_experts))
    for token in ids:
        for layer, slots in enumerate(token):
            for expert in slots[slots >= 0]:
                counts[layer, expert] += 1
    return counts


def noted(recording: Recording, words: str) -> bool:
    return any(words in note for note in recording.notes)


def save_torch(path: Path, value: object) -> str:
    torch.save(value, path)
    return str(path)


def save_json(path: Path, *values: object) -> str:
    path.write_text("\n".join(map(json.dumps, values)) + "\n", encoding="utf-8")
    return str(path)


def save_npz(path: Path, **arrays: NDArray[Any]) -> str:
    np.savez(path, **arrays)
    return str(path)


# SGLang's buffers of counts


def stat_made_up(path: Path, counts: NDArray[Any]) -> str:
    value = {"rank": 0, "logical_count": torch.tensor(counts, dtype=torch.int32)}
    return save_torch(path, {**value, "average_utilization_rate_over_window": None})


def counts_made_up(n_steps: int, n_tokens: int = 30) -> NDArray[np.float64]:
    return np.stack([counted_by_hand(ids_made_up(n_tokens, seed)) for seed in range(n_steps)])


def test_a_buffer_loses_its_empty_steps_and_dense_layers(tmp_path: Path) -> None:
    counts = counts_made_up(3)
    buffer = np.zeros((8, N_LAYERS + 2, N_EXPERTS))
    buffer[:3, 2:] = counts  # two dense layers at the beginning
    recording = read_recording(stat_made_up(tmp_path / "stat.pt", buffer), top_k=TOP_K)
    np.testing.assert_array_equal(recording.loads, counts)
    assert recording.layers.tolist() == [2, 3, 4, 5, 6]
    assert recording.top_k == TOP_K and recording.n_tokens is not None and recording.n_tokens.tolist() == [30] * 3
    assert recording.is_ordered and noted(recording, "5 of 8 steps of the buffer are empty")
    assert noted(recording, "2 layers (0 to 1) have no load")
    np.testing.assert_allclose(rt.read_shares(str(tmp_path / "stat.pt")), counts.sum(axis=0) / (3 * 30 * TOP_K))
    assert rt.read_shares(str(tmp_path / "stat.pt@2")).shape == (1, N_EXPERTS)  # rows of the file, dense ones too
    with pytest.raises(InputError, match="not all zero in a layer"):
        read_recording(str(tmp_path / "stat.pt@1"))


def test_a_buffer_begins_after_its_gap_and_a_full_one_has_no_order(tmp_path: Path) -> None:
    counts = counts_made_up(6)
    wrapped = np.concatenate([counts[4:], np.zeros((3, N_LAYERS, N_EXPERTS)), counts[:4]])
    recording = read_recording(stat_made_up(tmp_path / "wrapped.pt", wrapped))
    np.testing.assert_array_equal(recording.loads, counts)
    assert recording.is_ordered and recording.top_k is None and recording.n_tokens is None
    full = read_recording(stat_made_up(tmp_path / "full.pt", np.roll(counts, 2, axis=0)))
    assert not full.is_ordered and noted(full, "may have wrapped")
    np.testing.assert_array_equal(full.shares, recording.shares)
    gaps = np.insert(wrapped, 1, 0, axis=0)
    recording = read_recording(stat_made_up(tmp_path / "gaps.pt", gaps))
    assert not recording.is_ordered and noted(recording, "several gaps")
    assert len(read_recording(stat_made_up(tmp_path / "one.pt", counts[:1])).notes) == 0


def test_counts_of_several_tensor_parallel_ranks_are_divided(tmp_path: Path) -> None:
    counts = counts_made_up(2)
    recording = read_recording(stat_made_up(tmp_path / "tp.pt", 8 * counts), top_k=TOP_K)
    np.testing.assert_array_equal(recording.loads, counts)
    assert recording.n_tokens is not None and recording.n_tokens.tolist() == [30, 30]
    assert noted(recording, "all counts are multiples of 8") and noted(recording, "are divided by it")
    few = np.zeros((1, 2, 4))
    few[:, :, :2] = 2  # four counts that share a factor prove nothing
    recording = read_recording(stat_made_up(tmp_path / "few.pt", few))
    assert recording.loads.sum() == 8 and noted(recording, "perhaps because")


def test_fused_shared_experts_at_the_end_are_left_out_and_named(tmp_path: Path) -> None:
    counts = counts_made_up(2)
    shared = np.concatenate([counts, np.full((2, N_LAYERS, 1), 30)], axis=2)
    recording = read_recording(stat_made_up(tmp_path / "fused.pt", shared), n_experts=N_EXPERTS, top_k=TOP_K)
    np.testing.assert_array_equal(recording.loads, counts)
    assert noted(recording, "fused shared experts") and recording.top_k == TOP_K
    untold = read_recording(str(tmp_path / "fused.pt"))
    assert untold.loads.shape[2] == 17 and noted(untold, "expert 16 has the same load in every layer of a step")
    even = read_recording(stat_made_up(tmp_path / "even.pt", np.full((2, N_LAYERS, 4), 30)))
    assert not noted(read_recording(stat_made_up(tmp_path / "other.pt", counts)), "same load")
    assert not noted(even, "same load")
    with pytest.raises(InputError, match=r"fused\.pt: found experts 17, expected 8"):
        read_recording(str(tmp_path / "fused.pt"), n_experts=8)
    with pytest.raises(
        InputError, match=r"other\.pt: found experts 16, expected 15"
    ):  # another model, not a shared expert
        read_recording(stat_made_up(tmp_path / "other.pt", counts), n_experts=15)


def test_a_top_k_that_does_not_fit_the_counts_is_noted(tmp_path: Path) -> None:
    recording = read_recording(stat_made_up(tmp_path / "stat.pt", counts_made_up(2)), top_k=7)
    assert recording.top_k is None and recording.n_tokens is None
    assert noted(recording, "no whole number of tokens x top-k 7")


def test_an_empty_buffer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.pt recorded nothing"):
        read_recording(stat_made_up(tmp_path / "nothing.pt", np.zeros((4, 2, 4))))


def test_the_json_that_servers_start_from_is_read_and_a_placement_is_not(tmp_path: Path) -> None:
    counts = counts_made_up(2)
    for name, value in (("steps.json", counts), ("sums.json", counts.sum(axis=0))):
        recording = read_recording(save_json(tmp_path / name, {"logical_count": value.astype(int).tolist()}))
        np.testing.assert_array_equal(recording.loads.sum(axis=0), counts.sum(axis=0))
    plain = [list(range(N_EXPERTS))] * N_LAYERS
    for value in ({"physical_to_logical_map": plain}, {"expert_to_ep_rank": [0, 1]}):
        with pytest.raises(InputError, match=r"map\.json says where experts are placed and not how often"):
            read_recording(save_json(tmp_path / "map.json", value))
    with pytest.raises(InputError, match="says where experts are placed"):
        read_recording(f"{tmp_path / 'steps.json'}#physical_to_logical_map".replace("steps", "map"))


# SGLang's dumps of forward passes

SLOTS = np.array([[3, 1, 0, 2, 3, 0], [0, 1, 2, 3, 1, 1]])  # two layers, four experts, six slots


def pass_made_up(number: int, rank: int, counts: NDArray[Any], **more: object) -> dict[str, object]:
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": torch.tensor(counts, dtype=torch.int32),
        **more,
    }


def dump_made_up(path: Path, records: list[dict[str, object]], slots: NDArray[Any] = SLOTS) -> str:
    return save_torch(path, {"records": records, "last_physical_to_logical_map": torch.tensor(slots)})


PASSES = [np.array([[1, 2, 0, 3, 4, 2], [2, 4, 2, 0, 1, 3]]), np.array([[0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1]])]
# By hand, adding slots of the same expert: layer 0 of the first pass is 0 + 2, 2, 3, 1 + 4.
LOGICAL = [[[2, 2, 3, 5], [2, 8, 2, 0]], [[1, 1, 1, 1], [1, 1, 1, 1]]]


def test_replicas_are_added_to_their_expert(tmp_path: Path) -> None:
    records = [pass_made_up(7 - i, 0, counts) for i, counts in enumerate(PASSES)]  # the later pass first
    recording = read_recording(dump_made_up(tmp_path / "dump_0.pt", records), top_k=2)
    assert recording.loads.tolist() == LOGICAL[::-1]
    assert recording.n_tokens is not None and recording.n_tokens.tolist() == [2, 6] and recording.top_k == 2
    assert noted(recording, "rank 0 recorded; other ranks") and noted(recording, "passes before a rebalancing")


def test_ranks_that_counted_the_same_tokens_are_counted_once(tmp_path: Path) -> None:
    for folder, factors in (("tp", (1, 1, 1)), ("dp", (1, 2, 1)), ("ep", (1, 0, 0))):
        (tmp_path / folder).mkdir()
        for rank, factor in enumerate(factors):
            records = [pass_made_up(i, rank, factor * counts) for i, counts in enumerate(PASSES)]
            dump_made_up(tmp_path / folder / f"expert_distribution_recorder_1.5_{rank}.pt", records)
        recording = read_recording(str(tmp_path / folder))
        expected = {"tp": 1, "dp": 3, "ep": 1}[folder]
        np.testing.assert_array_equal(recording.loads, expected * np.array(LOGICAL))
        assert noted(recording, f"3 ranks recorded the tokens of {len(set(factors))}, which are counted once")
    late = [pass_made_up(0, 0, PASSES[0]), *(pass_made_up(i, 1, counts) for i, counts in enumerate(PASSES))]
    recording = read_recording(dump_made_up(tmp_path / "late.pt", late))  # one rank stopped a pass later
    assert recording.loads.tolist() == LOGICAL and noted(recording, "2 ranks recorded the tokens of 1")
    other = [pass_made_up(0, 0, PASSES[0]), pass_made_up(0, 1, PASSES[1])]
    recording = read_recording(dump_made_up(tmp_path / "other.pt", other))
    assert recording.loads.tolist() == [np.add(*LOGICAL).tolist()] and noted(recording, "2 ranks recorded is added up")
    whole = [pass_made_up(i, rank, counts) for rank in (0, 1) for i, counts in enumerate(PASSES)]
    assert read_recording(dump_made_up(tmp_path / "both.pt", whole)).loads.tolist() == LOGICAL
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"^none is a folder without \.pt dumps"):
        read_recording(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("records", "slots", "words"),
    [
        ([], SLOTS, "has no records of forward passes"),
        ([7], SLOTS, "has no records of forward passes"),
        ([{"rank": 0}], SLOTS, "a record has no forward_pass_id or global_physical_count; its keys are rank"),
        ([pass_made_up(0, 0, PASSES[0])] * 2, SLOTS, "rank 0 recorded pass 0 twice"),
        ([pass_made_up(0, 0, PASSES[0][:, :4])], SLOTS, "2 layers and 4 slots, the map of experts of 2 and 6"),
        ([pass_made_up(0, 0, -PASSES[0])], SLOTS, "counts must be 0 to"),
        ([pass_made_up(0, 0, 0 * PASSES[0])], SLOTS, "recorded nothing"),
        ([pass_made_up(0, 0, PASSES[0])], SLOTS[0], "in 1 dimensions as its map of experts"),
        ([pass_made_up(0, 0, PASSES[0])], SLOTS * 10**6, "names expert 3000000, expected below"),
    ],
)
def test_damaged_dumps_are_refused(tmp_path: Path, records: list[Any], slots: NDArray[Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"^bad\.pt.*{words}"):
        read_recording(dump_made_up(tmp_path / "bad.pt", records, slots))


def tokens_made_up(number: int, ids: NDArray[Any], mode: int, rank: int = 0) -> dict[str, object]:
    """A pass of the per_token recorder: ids of slots `[layer, token, 8]`, padded with -1."""
    n_tokens, n_layers, top_k = ids.shape
    padded = np.full((n_layers, n_tokens, 8), -1)
    padded[:, :, :top_k] = ids.transpose(1, 0, 2)
    return pass_made_up(
        number,
        rank,
        np.zeros((n_layers, 3)),
        input_ids=[0] * n_tokens,
        positions=[0] * n_tokens,
        extend_seq_lens=[n_tokens] if mode == 1 else None,
        forward_mode=mode,
        topk_ids_of_layer=torch.tensor(padded, dtype=torch.int32),
        misc_objects=[Path("unreadable")],
    )


def test_tokens_of_each_pass_are_counted_as_the_models_experts(tmp_path: Path) -> None:
    slots = np.stack([np.random.default_rng(layer).permutation(N_EXPERTS) for layer in range(N_LAYERS + 1)])
    sizes = ((40, 1), (3, 2), (5, 2), (7, 4))
    of_pass = [ids_made_up(n, seed, N_LAYERS + 1) for seed, (n, _) in enumerate(sizes)]
    for ids in of_pass:
        ids[:, 0] = -1  # a dense layer is never written
    records = [tokens_made_up(i, of_pass[i], mode) for i, (_, mode) in enumerate(sizes)]
    source = dump_made_up(tmp_path / "tokens.pt", records, slots)
    recording = read_recording(source)
    assert recording.top_k == TOP_K and recording.n_tokens is not None
    assert recording.n_tokens.tolist() == [40, 3, 5, 7] and recording.layers.tolist() == [1, 2, 3, 4, 5]
    for step, ids in enumerate(of_pass):
        logical = np.stack([slots[layer][ids[:, layer]] for layer in range(1, N_LAYERS + 1)], axis=1)
        np.testing.assert_array_equal(recording.loads[step], counted_by_hand(logical))
    decode = read_recording(source, phase="decode")
    np.testing.assert_array_equal(decode.loads, recording.loads[1:3])
    assert noted(decode, "2 of 4 passes are decode")
    assert read_recording(source, phase="prefill").loads.sum() == 40 * N_LAYERS * TOP_K
    for path in (
        dump_made_up(tmp_path / "pass.pt", [pass_made_up(0, 0, PASSES[0])]),
        stat_made_up(tmp_path / "s.pt", counts_made_up(1)),
    ):
        with pytest.raises(InputError, match=r"which of its tokens are decode|whether they are decode"):
            read_recording(path, phase="decode")
    with pytest.raises(InputError, match=r"one\.pt has no decode pass among its 1"):
        read_recording(dump_made_up(tmp_path / "one.pt", records[:1], slots), phase="decode")


def test_eight_recorded_experts_may_be_more_and_ids_beyond_the_slots_are_shared_experts(tmp_path: Path) -> None:
    plain = np.tile(np.arange(N_EXPERTS), (N_LAYERS, 1))
    eight = read_recording(dump_made_up(tmp_path / "8.pt", [tokens_made_up(0, ids_made_up(9, top_k=8), 2)], plain))
    assert eight.top_k == 8 and noted(eight, "keeps 8 experts of a token, so a larger top-k")
    ids = ids_made_up(9, top_k=4)
    fused = np.concatenate([ids, np.full((9, N_LAYERS, 1), N_EXPERTS)], axis=2)
    recording = read_recording(dump_made_up(tmp_path / "fused.pt", [tokens_made_up(0, fused, 2)], plain))
    np.testing.assert_array_equal(recording.loads[0], counted_by_hand(ids))
    assert recording.top_k == 4 and noted(recording, f"{9 * N_LAYERS} selections of ids from 16 on are left out")


# Ids of tokens


def test_ids_of_tokens_become_steps(tmp_path: Path) -> None:
    ids = ids_made_up(1100)
    np.save(tmp_path / "a.npy", ids)
    source = save_npz(tmp_path / "a.npz", routed_experts=ids)
    for recording in (
        read_recording(source, n_experts=N_EXPERTS),
        read_recording(str(tmp_path / "a.npy"), n_experts=N_EXPERTS),
        read_recording(str(tmp_path / "a.npy"), kind="ids", top_k=TOP_K),
    ):
        assert recording.n_tokens is not None and recording.n_tokens.tolist() == [512, 512, 76]
        assert recording.top_k == TOP_K and recording.is_ordered
        for step in range(3):
            np.testing.assert_array_equal(recording.loads[step], counted_by_hand(ids[512 * step : 512 * (step + 1)]))
    assert noted(read_recording(source), "the largest id makes it 16")
    assert noted(read_recording(str(tmp_path / "a.npy")), "read as ids of experts")
    assert len(read_recording(source, step_tokens=100).loads) == 11
    with pytest.raises(InputError, match=r"a\.npz: found top-k 4, expected 2"):
        read_recording(source, top_k=2)
    np.testing.assert_allclose(rt.read_shares(source), counted_by_hand(ids) / (1100 * TOP_K))


def test_a_name_says_that_numbers_are_ids(tmp_path: Path) -> None:
    ids = ids_made_up(3)
    for name in ("routed_experts.npy", "run7_topk_ids.npy"):
        np.save(tmp_path / name, ids)
        np.testing.assert_array_equal(
            read_recording(str(tmp_path / name), n_experts=N_EXPERTS).loads[0], counted_by_hand(ids)
        )
    counts = counted_by_hand(ids)
    for array in (counts, counts[None].astype(int)):
        np.save(tmp_path / "routed_experts_counts.npy", array)
        np.testing.assert_array_equal(read_recording(str(tmp_path / "routed_experts_counts.npy")).loads[0], counts)


def test_a_model_says_how_many_experts_ids_are_of(tmp_path: Path) -> None:
    ids = np.minimum(ids_made_up(200, top_k=1), 9)  # the last experts are never selected
    source = save_npz(tmp_path / "a.npz", routed_experts=ids)
    assert rt.read_shares(source).shape == (N_LAYERS, 10)
    assert rt.routing(source, N_EXPERTS, 2, 64).counts.shape[1] == N_EXPERTS
    with pytest.raises(InputError, match="names expert 9, expected 0 to 8"):  # by some tokens, so not a shared expert
        rt.routing(source, 9, 2, 64)
    with pytest.raises(InputError, match="names expert 9, expected 0 to 3"):
        rt.routing(source, 4, 2, 64)


def test_requests_follow_each_other_and_one_may_be_chosen(tmp_path: Path) -> None:
    ids = ids_made_up(90)
    source = save_npz(tmp_path / "two.npz", routed_experts_0=ids[:30], routed_experts_1=ids[30:])
    recording = read_recording(source, step_tokens=50)
    assert recording.n_tokens is not None and recording.n_tokens.tolist() == [50, 40]
    np.testing.assert_array_equal(recording.loads.sum(axis=0), counted_by_hand(ids))
    assert read_recording(f"{source}#routed_experts_0").loads.sum() == 30 * N_LAYERS * TOP_K
    padded = np.full((2, 60, N_LAYERS, TOP_K), -1)
    padded[0, :30], padded[1] = ids[:30], ids[30:]
    stacked = read_recording(save_npz(tmp_path / "stacked.npz", routed_experts=padded), step_tokens=50)
    np.testing.assert_array_equal(stacked.loads, recording.loads)


def test_layers_that_hold_only_zeros_are_dense(tmp_path: Path) -> None:
    for top_k in (1, 4):
        ids = ids_made_up(200, layers=3, top_k=top_k)
        ids[:, 0] = 0
        recording = read_recording(save_npz(tmp_path / "dense.npz", routed_experts=ids))
        assert recording.layers.tolist() == [1, 2] and noted(recording, "layer 0 has no load")
        assert recording.top_k == top_k


def test_ids_that_no_router_selects_are_named(tmp_path: Path) -> None:
    ids = ids_made_up(50)
    ids[3, 1] = 7  # one expert four times, which is three repetitions for one token and layer
    recording = read_recording(save_npz(tmp_path / "twice.npz", topk_ids=ids))
    assert noted(recording, "1 times a token names an expert twice") and recording.top_k == TOP_K
    with pytest.raises(InputError, match=r"twice\.npz names expert 15, expected 0 to 7"):
        read_recording(str(tmp_path / "twice.npz"), n_experts=8)
    ids[5, 2, 3] = -1
    recording = read_recording(save_npz(tmp_path / "less.npz", topk_ids=ids))
    assert recording.top_k is None and noted(recording, "different numbers of experts")
    for bad in (-2, 10**6):
        with pytest.raises(InputError, match=rf"{bad} is no expert id"):
            read_recording(save_npz(tmp_path / "bad.npz", topk_ids=np.where(ids < 0, bad, ids)))
    with pytest.raises(InputError, match="holds no selected expert"):
        read_recording(save_npz(tmp_path / "none.npz", topk_ids=np.full((2, 3, 4), -1)))
    with pytest.raises(InputError, match="expected expert ids"):
        read_recording(save_npz(tmp_path / "float.npz", topk_ids=np.ones((2, 3, 4))))


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(2, 12), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_counts_of_ids_against_counting_one_by_one(
    n_tokens: int, n_layers: int, n_experts: int, step_tokens: int, seed: int
) -> None:
    from perfmodel.routing.recording import Hints
    from perfmodel.routing.selections import draft_of_ids

    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, n_experts, size=(n_tokens, n_layers, 3))
    ids[0] = n_experts - 1
    kept = ids[(ids >= 0).any(axis=(1, 2))]
    draft = draft_of_ids("made_up", ids, Hints(n_experts=n_experts, step_tokens=step_tokens))
    for step, loads in enumerate(draft.loads):
        np.testing.assert_array_equal(
            loads, counted_by_hand(kept[step * step_tokens : (step + 1) * step_tokens], n_experts)
        )
    assert len(draft.loads) == -(-len(kept) // step_tokens)


def test_many_ids_are_counted_in_seconds() -> None:
    from perfmodel.routing.recording import Hints
    from perfmodel.routing.selections import draft_of_ids

    ids = np.tile(ids_made_up(2000, layers=25), (50, 1, 1))  # ten million
    start = time.perf_counter()
    draft = draft_of_ids("made_up", ids, Hints(n_experts=N_EXPERTS))
    assert draft.loads.sum() == ids.size
    assert time.perf_counter() - start < 10


# Counts or ids


def test_counts_are_never_taken_for_ids() -> None:
    rng = np.random.default_rng(1)
    for n_experts in (4, 8, 32):
        steps = rng.multinomial(400, rng.dirichlet(np.ones(n_experts)), size=(100, 6))
        assert kind_of(steps) == "counts"
        assert kind_of(steps.astype(np.float64)) == "counts"
        lossy = np.maximum(steps - (rng.random(steps.shape) < 0.02), 0)  # a few tokens are lost
        assert kind_of(lossy) in ("counts", None)
    assert kind_of(rng.integers(0, 9, size=(100, 3, 64))) == "counts"  # no token selects 64 experts
    assert kind_of(np.array([[[5, 3, 1], [2, 6, 1]]])) == "counts"


def test_ids_are_known_by_their_numbers_where_there_are_enough() -> None:
    assert kind_of(ids_made_up(200)) == "ids"
    dense = ids_made_up(200)
    dense[:, 0] = 0
    assert kind_of(dense) == "ids"
    assert kind_of(ids_made_up(2)) is None
    assert kind_of(ids_made_up(500, layers=1)) is None


def test_what_may_be_either_is_refused_until_it_is_said(tmp_path: Path) -> None:
    ids = ids_made_up(2)
    source = save_npz(tmp_path / "few.npz", a=ids)
    with pytest.raises(InputError, match=r"few\.npz: whole numbers of shape \(2, 5, 4\) may be counts .* say which"):
        read_recording(source)
    assert read_recording(source, kind="ids").loads.sum() == ids.size
    np.testing.assert_array_equal(read_recording(source, kind="counts").loads, ids)
    np.testing.assert_allclose(rt.read_shares(source)[0], ids.sum(axis=0)[0] / ids.sum(axis=0)[0].sum())


# Responses


def base64_of(ids: NDArray[Any]) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def response(ids: NDArray[Any], **meta: object) -> dict[str, object]:
    return {"text": "made up", "meta_info": {"id": "1", "routed_experts": base64_of(ids), **meta}}


def test_responses_are_found_wherever_they_are(tmp_path: Path) -> None:
    ids = ids_made_up(90)
    one, two = response(ids[:30]), response(ids[30:])
    for source in (
        save_json(tmp_path / "lines.jsonl", one, two),
        save_json(tmp_path / "list.json", [one, two]),
        save_json(tmp_path / "deep.json", {"data": [{"answers": [one]}, {"answers": [two]}]}),
        save_json(
            tmp_path / "nested.json", [{"routed_experts": ids[:30].tolist()}, {"routed_experts": ids[30:].tolist()}]
        ),
        save_json(tmp_path / "some.jsonl", {"routed_experts": None}, one, {"error": 1}, two),
    ):
        recording = read_recording(source, n_layers=N_LAYERS, top_k=TOP_K, step_tokens=60)
        assert recording.n_tokens is not None and recording.n_tokens.tolist() == [60, 30]
        np.testing.assert_array_equal(recording.loads.sum(axis=0), counted_by_hand(ids))
        assert noted(recording, "2 requests, one after the other")


def test_the_shape_of_base64_comes_from_elsewhere(tmp_path: Path) -> None:
    ids = ids_made_up(30)
    bare = save_json(tmp_path / "bare.json", response(ids))
    for known in ({}, {"n_layers": N_LAYERS}, {"top_k": TOP_K}):
        with pytest.raises(InputError, match=r"base64 does not say its shape; give n_layers .* and top_k"):
            read_recording(bare, **known)
    counted = save_json(tmp_path / "counted.json", response(ids, prompt_tokens=21, completion_tokens=10))
    for known in ({"n_layers": N_LAYERS}, {"top_k": TOP_K}):
        recording = read_recording(counted, **known)
        assert recording.top_k == TOP_K and len(recording.layers) == N_LAYERS
    with pytest.raises(InputError, match="600 ids, no multiple of 7 layers x top-k 4"):
        read_recording(bare, n_layers=7, top_k=4)
    for routed in ("?", "AAA", 7, [[1, 2]], [[[0.5]]], [["a"]]):
        with pytest.raises(InputError, match=r"^bad\.json"):
            read_recording(save_json(tmp_path / "bad.json", {"routed_experts": routed}), n_layers=1, top_k=1)


# Passes, traces and windows of others


def test_passes_with_counts_are_read_and_utilisation_alone_is_not(tmp_path: Path) -> None:
    counts = counts_made_up(3).astype(int)
    rows = [
        {"forward_pass_id": i, "batch_size": 1, "forward_mode": mode, "expert_counts": counts[i].tolist()}
        for i, mode in enumerate(("prefill", "decode", "decode"))
    ]
    source = save_json(tmp_path / "cap.jsonl", *rows)
    recording = read_recording(source)
    np.testing.assert_array_equal(recording.loads, counts)
    assert recording.is_ordered
    np.testing.assert_array_equal(read_recording(source, phase="decode").loads, counts[1:])
    assert not read_recording(save_json(tmp_path / "back.jsonl", *rows[::-1])).is_ordered
    np.testing.assert_array_equal(read_recording(save_json(tmp_path / "cap.json", rows)).loads, counts)
    with pytest.raises(InputError, match=r"all\.jsonl: none of its passes is prefill"):
        read_recording(save_json(tmp_path / "all.jsonl", *rows[1:]), phase="prefill")
    with pytest.raises(InputError, match=r"null\.jsonl: row 2 has no forward_pass_id"):
        read_recording(save_json(tmp_path / "null.jsonl", rows[0], None, rows[1]))
    with pytest.raises(InputError, match=r"use\.jsonl: row 1 has no expert_counts .* does not say which"):
        read_recording(save_json(tmp_path / "use.jsonl", {"forward_pass_id": 0, "expert_utilization": 0.4}))
    with pytest.raises(InputError, match="row 2 has no forward_pass_id"):
        read_recording(save_json(tmp_path / "odd.jsonl", rows[0], {"a": 1}))


def test_a_window_of_slots_needs_its_map(tmp_path: Path) -> None:
    window = np.stack([PASSES[0], np.zeros_like(PASSES[0]), PASSES[1]])
    arrays = {"expert_load_window": window, "physical_to_logical_map": SLOTS}
    recording = read_recording(save_npz(tmp_path / "window.npz", **arrays))
    assert recording.loads.tolist() == LOGICAL[::-1]  # the gap is before the oldest
    with pytest.raises(InputError, match="not how often they are used"):
        read_recording(save_npz(tmp_path / "map.npz", physical_to_logical_map=SLOTS))


def test_loads_by_pairs_of_layer_and_expert(tmp_path: Path) -> None:
    source = save_json(tmp_path / "snapshot.json", {"version": 1, "expert_loads": {"0:1": 2.5, "2:0": 1, "2:3": 3}})
    recording = read_recording(source, n_experts=6)
    assert recording.loads.tolist() == [[[0, 2.5, 0, 0, 0, 0], [1, 0, 0, 3, 0, 0]]]
    assert recording.layers.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["activation_freq", "weight", "counts"])
def test_arrays_under_known_names_in_each_kind_of_file(tmp_path: Path, name: str) -> None:
    counts = counts_made_up(1)[0]
    for source in (
        save_npz(tmp_path / "a.npz", other=np.ones(3), **{name: counts}),
        save_torch(tmp_path / "a.pt", {"other": torch.ones(3), name: torch.tensor(counts)}),
        save_json(tmp_path / "a.json", {"other": [1, 1, 1], name: counts.tolist()}),
    ):
        np.testing.assert_array_equal(read_recording(source).loads, counts[None])
        assert read_recording(f"{source}#other").loads.tolist() == [[[1, 1, 1]]]
        with pytest.raises(InputError, match=r"holds other, .*; choose one as a\.\w+#other"):
            read_recording(f"{source}#neither")
    assert rt.routing_keys(tmp_path / "a.pt") == ["other", name]
    bare = save_torch(tmp_path / "bare.pt", torch.tensor(counts))
    np.testing.assert_array_equal(read_recording(bare).loads, counts[None])
    assert rt.routing_keys(bare) == rt.routing_keys(tmp_path / "a.json") == []


@pytest.mark.parametrize("name", ["{}", "layer_{}", "model.layers.{}.mlp.gate"])
def test_arrays_of_one_layer_each_are_put_together(tmp_path: Path, name: str) -> None:
    rows = {11: [5, 0, 1], 2: [0, 3, 4]}
    arrays = {name.format(layer): np.array(row) for layer, row in rows.items()}
    found = [
        read_recording(save_npz(tmp_path / "layers.npz", **arrays)),
        read_recording(save_torch(tmp_path / "layers.pt", {key: torch.tensor(row) for key, row in arrays.items()})),
        read_recording(save_json(tmp_path / "layers.json", {key: row.tolist() for key, row in arrays.items()})),
    ]
    for recording in found:
        assert recording.loads.tolist() == [[rows[2], rows[11]]] and recording.layers.tolist() == [2, 11]
        assert noted(recording, "its 2 arrays are read as a layer each")
    assert read_recording(f"{tmp_path / 'layers.npz'}#{name.format(2)}").loads.tolist() == [[rows[2]]]
    alone = read_recording(save_torch(tmp_path / "list.pt", [torch.tensor(row) for row in rows.values()]))
    assert alone.loads.tolist() == [[rows[11], rows[2]]] and alone.layers.tolist() == [0, 1]
    with pytest.raises(InputError, match="choose one as"):  # not as long as each other
        read_recording(save_npz(tmp_path / "other.npz", a0=np.ones(3), a1=np.ones(4)))


def test_the_routers_weight_of_a_selection_is_no_count(tmp_path: Path) -> None:
    rows = "token,layer,expert,weight\n0,0,2,0.75\n0,0,0,0.25\n1,0,2,0.5\n1,0,1,0.5\n"
    (tmp_path / "rows.csv").write_text(rows)
    recording = read_recording(str(tmp_path / "rows.csv"))
    assert recording.loads.tolist() == [[[1, 1, 2]]] and recording.top_k == 2


def test_our_own_files_say_everything(tmp_path: Path) -> None:
    counts = counts_made_up(3).astype(np.int64)
    path = tmp_path / "own.npz"
    rt.write_counts(path, counts, np.array([1, 3, 5, 7, 9]), TOP_K, np.full(3, 30))
    recording = read_recording(str(path))
    np.testing.assert_array_equal(recording.loads, counts)
    assert (recording.layers.tolist(), recording.top_k, recording.is_ordered) == ([1, 3, 5, 7, 9], TOP_K, True)
    assert recording.n_tokens is not None and recording.n_tokens.tolist() == [30] * 3 and recording.notes == ()
    one = read_recording(f"{path}@1")
    assert one.layers.tolist() == [3] and (one.loads == counts[:, 1:2]).all()
    with pytest.raises(InputError, match=r"odd\.npz: its layers, top_k and n_tokens do not belong"):
        read_recording(
            save_npz(tmp_path / "odd.npz", counts=counts, layers=np.arange(2), top_k=np.int64(2), n_tokens=np.ones(3))
        )


def test_empty_steps_and_idle_layers_are_left_out_of_arrays(tmp_path: Path) -> None:
    traces = np.zeros((9, 3, 4))
    traces[:2, 1:] = [[[1, 2, 3, 4], [4, 3, 2, 1]], [[2, 2, 2, 2], [8, 0, 0, 0]]]
    np.save(tmp_path / "traces.npy", traces)
    recording = read_recording(str(tmp_path / "traces.npy"))
    np.testing.assert_array_equal(recording.loads, traces[:2, 1:])
    assert noted(recording, "7 of 9 steps are empty") and noted(recording, "layer 0 has no load")


# Tables


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_of_selections_and_of_counts(tmp_path: Path, suffix: str) -> None:
    ids = ids_made_up(20)
    rows = [(token, layer, int(e)) for token in range(20) for layer in range(N_LAYERS) for e in ids[token, layer]]
    selected = pl.DataFrame(rows, schema=["token", "layer", "expert"], orient="row")
    counted = selected.group_by("layer", "expert").len("count")
    stepped = selected.with_columns(step=pl.col("token") // 8).group_by("step", "layer", "expert").len("count")
    path = tmp_path / f"rows.{suffix}"

    def read(table: pl.DataFrame, **known: Any) -> Recording:
        table.write_csv(path) if suffix == "csv" else table.write_parquet(path)
        return read_recording(str(path), n_experts=N_EXPERTS, **known)

    for table in (
        selected.select("layer", "expert"),
        counted,
        selected.select("expert", "layer").rename({"layer": "Layer_ID"}),
    ):
        np.testing.assert_array_equal(read(table).loads[0], counted_by_hand(ids))
    for recording in (read(stepped), read(selected, step_tokens=8)):
        assert len(recording.loads) == 3
        np.testing.assert_array_equal(recording.loads[1], counted_by_hand(ids[8:16]))
    assert recording.top_k == TOP_K and recording.n_tokens is not None and recording.n_tokens.tolist() == [8, 8, 4]
    wide = pl.DataFrame({f"expert_{e}": counted_by_hand(ids)[:, e] for e in reversed(range(N_EXPERTS))})
    np.testing.assert_array_equal(read(wide).loads[0], counted_by_hand(ids))
    labelled = read(wide.insert_column(0, pl.Series("layer", [9, 7, 5, 3, 1])))
    assert labelled.layers.tolist() == [1, 3, 5, 7, 9]
    np.testing.assert_array_equal(labelled.loads[0], counted_by_hand(ids)[::-1])


def test_rows_without_a_header_are_selections_where_they_cannot_be_counts(tmp_path: Path) -> None:
    ids = ids_made_up(40)
    rows = [f"{layer},{e}" for token in ids for layer, slots in enumerate(token) for e in slots]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(rows))  # 800 rows: more than any model has layers
    np.testing.assert_array_equal(read_recording(str(path), n_experts=N_EXPERTS).loads[0], counted_by_hand(ids))
    path.write_text("\n".join(rows[:100]))
    assert read_recording(str(path), kind="ids", n_experts=N_EXPERTS).loads.sum() == 100
    with pytest.raises(InputError, match=r"trace\.csv: rows of 2 numbers may be .* say which"):
        read_recording(str(path))
    assert read_recording(str(path), kind="counts").loads.shape[2] == 2
    path.write_text("0,1,0\n0,2,0\n0,1,1\n")
    recording = read_recording(str(path), kind="ids")
    assert recording.loads.tolist() == [[[0, 1, 1]], [[0, 1, 0]]] and noted(recording, "largest id makes it 3")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,expert\n", "has no rows"),
        ("layer,expert\n0,x\n", "column expert has no number in 1 of 1 rows"),
        ("layer,expert\n0,\n", "no number in 1 of 1 rows"),
        ("layer,expert\n0,-1\n", "column expert must hold whole numbers from 0"),
        ("layer,expert\n0.5,1\n", "column layer must hold whole numbers"),
        ("layer,expert,count\n0,1,-3\n", "counts must be 0 to"),
        ("layer,expert\n0,1\n2\n3,4,5\n", "rows.csv"),
        ("step,expert_0,expert_1\n0,1,2\n", "has a step and no layer"),
        ("layer,expert_0,expert_1\n0,1,2\n0,3,4\n", "two rows for the same step and layer"),
        ("name,age\nx,3\n", "its columns are name, age, expected layer, expert"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(InputError, match=rf"^rows\.csv.*{words}|^{words}"):
        read_recording(str(tmp_path / "rows.csv"))


def test_a_mark_of_the_byte_order_at_the_beginning_is_read_past(tmp_path: Path) -> None:
    for text, loads in (("layer,expert\n0,1\n", [[0, 1]]), ("1,2,3,4\n5,6,7,8\n", [[1, 2, 3, 4], [5, 6, 7, 8]])):
        (tmp_path / "excel.csv").write_text(text, encoding="utf-8-sig")
        assert read_recording(str(tmp_path / "excel.csv")).loads.tolist() == [loads]


@pytest.mark.parametrize("sign", [",", ", ", ";", "\t", " "])
def test_columns_are_divided_by_commas_semicolons_tabs_or_blanks(tmp_path: Path, sign: str) -> None:
    path, rows = tmp_path / "rows.txt", [[3, 1, 4, 1], [5, 9, 2, 6]]
    path.write_text("# made up\n" + "\n".join(sign.join(map(str, row)) for row in rows) + "\n")
    assert read_recording(str(path)).loads.tolist() == [rows]
    long = [["Count", "LAYER", "expert"], *([n, i, j] for i, row in enumerate(rows) for j, n in enumerate(row))]
    path.write_text("\n".join(sign.join(map(str, row)) for row in long))
    assert read_recording(str(path)).loads.tolist() == [rows]
    path.write_text("\n".join(f"{row % 2}{sign}{row % 3}" for row in range(600)))
    assert read_recording(str(path)).loads.tolist() == [[[100, 100, 100]] * 2]  # more rows than a model has layers


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nothing.npz", b"", "nothing.npz is empty"),
        ("comments.csv", b"# 1,2\n\n", "comments.csv holds no numbers"),
        ("counts.csv.gz", b"\x1f\x8b\x08\x00", "counts.csv.gz is compressed by gzip; unpack it first"),
        ("gaps.csv", b"layer,expert,count\n0,1,\n0,2,3\n", "column count has no number in 1 of 2 rows"),
        ("idle.jsonl", b'{"forward_pass_id": 1, "expert_counts": [0, 0]}', "recorded nothing: all its counts are zero"),
    ],
)
def test_files_without_numbers_say_so(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)):
        read_recording(str(tmp_path / name))


def test_a_zip_of_other_files_and_layers_named_twice_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no array")
    with pytest.raises(InputError, match=r"other\.zip holds no arrays"):
        read_recording(str(tmp_path / "other.zip"))
    own = {"counts": np.ones((1, 2, 4), int), "top_k": np.int64(2), "n_tokens": np.array([2])}
    with pytest.raises(InputError, match=r"its layers are \[3, 3\], expected a place of its own for each"):
        read_recording(save_npz(tmp_path / "own.npz", layers=np.array([3, 3]), **own))


def test_a_key_is_refused_where_nothing_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("layer,expert\n0,1\n")
    dump_made_up(tmp_path / "dump_0.pt", [pass_made_up(0, 0, PASSES[0])])
    save_json(tmp_path / "one.json", {"routed_experts": ids_made_up(3).tolist()})
    pl.DataFrame({"layer": [0], "expert": [1]}).write_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "dump_0.pt", "one.json", "rows.parquet", ""):
        with pytest.raises(InputError, match="holds no arrays by name, so leave out #a"):
            read_recording(f"{tmp_path / name}#a")
        read_recording(str(tmp_path / name))


# What is none of these


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pt", b"hello"),
        ("a.parquet", b"hello"),
        ("b.parquet", b"PAR1 and no more"),
        ("a.json", b"hello"),
        ("b.json", b"{"),
        ("c.json", b'{"a": "b"}'),
        ("d.json", b"[" * 100_000),
        ("e.json", b"[[1, 2], [3]]"),
        ("f.json", b"[]"),
        ("b.jsonl", b'{"counts": [1, 2]}\n{"counts": [1, 2]}'),
        ("a.jsonl", b'{"routed_experts": null}\n{'),
        ("a.bin", bytes(range(256))),
        ("a.txt", b"once upon a time\nthere was a router\n"),
        ("empty.pt", b""),
        ("a", b""),
    ],
)
def test_unknown_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_recording(str(tmp_path / name))
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"top_k": 0}, "top_k is 0, expected a whole number"),
        ({"n_experts": 2.5}, "n_experts is 2.5"),
        ({"step_tokens": -1}, "step_tokens is -1"),
        ({"kind": "id"}, "kind is 'id', expected counts or ids"),
        ({"phase": "both"}, "phase is 'both', expected prefill or decode"),
    ],
)
def test_impossible_arguments_are_refused(known: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_recording("nothing", **known)


def test_arguments_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    source = save_npz(tmp_path / "a.npz", counts=counts_made_up(1)[0])
    with pytest.raises(InputError, match=r"a\.npz: found experts 16, expected 8"):
        read_recording(source, n_experts=8)
    with pytest.raises(InputError, match=r"a\.npz does not say which of its tokens are decode"):
        read_recording(source, phase="decode")


def made_up_files(folder: Path) -> list[Path]:
    """A small file of each form but Parquet: where that is damaged, polars may end the process."""
    folder.mkdir()
    ids = ids_made_up(20)
    stat_made_up(folder / "stat.pt", counts_made_up(2))
    dump_made_up(folder / "dump.pt", [pass_made_up(0, 0, PASSES[0])])
    save_json(folder / "lines.jsonl", response(ids), response(ids))
    save_json(folder / "pairs.json", {"expert_loads": {"0:1": 2.5, "2:0": 1}})
    save_json(folder / "cap.jsonl", {"forward_pass_id": 0, "expert_counts": [[1, 2], [3, 4]]})
    save_npz(folder / "window.npz", expert_load_window=np.stack(PASSES), physical_to_logical_map=SLOTS)
    np.save(folder / "ids.npy", ids)
    (folder / "rows.csv").write_text("layer,expert,count\n0,1,2\n0,0,3\n1,1,4\n")
    (folder / "bare.csv").write_text("1,2,3,4\n5,6,7,8\n")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, bytes]]:
    made_up = made_up_files(tmp_path_factory.mktemp("files") / "made_up")
    return [(path.name, path.read_bytes()) for path in made_up]


@settings(max_examples=400, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_damaged_files_give_a_recording_or_one_sentence(
    files: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name, content = data.draw(st.sampled_from(files))
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(0, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    kept = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(changed[:kept])
    read: list[Callable[[], object]] = [
        lambda: read_recording(str(path), n_layers=N_LAYERS, top_k=TOP_K),
        lambda: read_recording(str(path), kind="ids"),
        lambda: rt.read_shares(str(path)),
        lambda: rt.routing_keys(path),
    ]
    for one in read:
        try:
            one()
        except InputError as error:
            assert "\n" not in str(error)
