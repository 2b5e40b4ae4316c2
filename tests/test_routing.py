"""Routing patterns, files and statistics: conservation, hand examples, and an obvious count beside the fast one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from perfmodel import routing as rt
from perfmodel.errors import InputError

names = st.sampled_from(["uniform", "mmlu-like", "power-law", "power-law:0", "power-law:2.5"])
sizes = st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n), st.integers(1, 3000)))


@given(names, sizes)
def test_expected_counts_are_conserved_and_capped(name: str, size: tuple[int, int, int]) -> None:
    n_experts, top_k, n_tokens = size
    counts = rt.expected_counts(rt.pattern_shares(name, n_experts), n_tokens, top_k)
    assert counts.shape == (1, n_experts)
    assert counts.sum() == n_tokens * top_k
    assert counts.min() >= 0
    assert counts.max() <= n_tokens
    assert (np.diff(counts[0]) <= 0).all()  # patterns list the hottest expert first


@given(names, sizes)
def test_routing_is_conserved_in_every_draw(name: str, size: tuple[int, int, int]) -> None:
    n_experts, top_k, n_tokens = size
    batch = rt.routing(name, n_experts, top_k, n_tokens)
    assert (batch.counts.sum(axis=1) == n_tokens * top_k).all()
    assert batch.counts.shape[1] == n_experts
    assert batch.counts.max() <= n_tokens
    np.testing.assert_allclose(batch.popularity.sum(axis=1), 1)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12).filter(any), st.integers(1, 500))
def test_expected_counts_against_rounding_by_hand(weights: list[int], n_tokens: int) -> None:
    # Exact integers: largest remainders, with top-1 so that no expert is capped.
    total = sum(weights)
    counts = [weight * n_tokens // total for weight in weights]
    remainders = [weight * n_tokens % total for weight in weights]
    for expert in sorted(range(len(weights)), key=lambda e: (-remainders[e], e))[: n_tokens - sum(counts)]:
        counts[expert] += 1
    found = rt.expected_counts(np.array([weights]) / total, n_tokens, 1)[0]
    np.testing.assert_array_less(np.abs(found - np.array(counts)), 2)  # equal remainders may round either way
    ideal = np.array(weights) * n_tokens / total
    assert np.abs(found - ideal).sum() == pytest.approx(np.abs(np.array(counts) - ideal).sum(), abs=1e-6)


def test_uniform_is_balanced() -> None:
    assert rt.expected_counts(rt.uniform_shares(8), 100, 2).tolist() == [[25] * 8]
    assert rt.expected_counts(rt.uniform_shares(8), 10, 1).tolist() == [[2, 2, 1, 1, 1, 1, 1, 1]]
    batch = rt.routing("uniform", 8, 1, 10)
    assert (np.sort(batch.counts, axis=1) == [1, 1, 1, 1, 1, 1, 2, 2]).all()


def test_mmlu_like_sends_90_percent_to_65_percent() -> None:
    # 13 of 20 experts are 65 %: their share is exact.
    assert rt.mmlu_like_shares(20)[0, :13].sum() == pytest.approx(0.9)
    # Of 64 experts 41.6 are hot. 11648 tokens x top-8 = 93184: a hot one gets 0.9 / 41.6 of that, a cold one
    # 0.1 / 22.4, the one in between 0.6 of the one and 0.4 of the other.
    counts = rt.expected_counts(rt.mmlu_like_shares(64), 11648, 8)[0]
    assert counts.tolist() == [2016] * 41 + [1376] + [416] * 22


def test_power_law_halves_from_rank_one_to_two() -> None:
    shares = rt.power_law_shares(4)[0]
    np.testing.assert_allclose(shares / shares[3], [4, 2, 4 / 3, 1])
    assert rt.expected_counts(rt.pattern_shares("power-law", 4), 25, 1).tolist() == [[12, 6, 4, 3]]
    steep = rt.pattern_shares("power-law:2", 3)[0]
    np.testing.assert_allclose(steep[0] / steep, [1, 4, 9])
    np.testing.assert_allclose(rt.pattern_shares("power-law:0", 5), rt.uniform_shares(5))


@given(names, st.integers(1, 40), st.data())
def test_one_token_wakes_exactly_top_k_experts(name: str, n_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    batch = rt.routing(name, n_experts, top_k, 1)
    assert ((batch.counts > 0).sum(axis=1) == top_k).all()


def test_cap_spreads_the_excess() -> None:
    # 10 tokens x top-2 at shares 0.8, 0.1, 0.1: the first takes all 10 tokens, the others 5 each.
    assert rt.expected_counts(np.array([[0.8, 0.1, 0.1]]), 10, 2).tolist() == [[10, 5, 5]]
    # Experts that were never chosen join only when the others are full.
    assert rt.expected_counts(np.array([[1.0, 0.0, 0.0]]), 4, 2).tolist() == [[4, 2, 2]]
    assert rt.expected_counts(np.array([[0.5, 0.5, 0.0]]), 4, 2).tolist() == [[4, 4, 0]]
    assert rt.expected_counts(np.array([[0.7, 0.2, 0.1]]), 4, 3).tolist() == [[4, 4, 4]]


@pytest.mark.parametrize(
    ("n_tokens", "top_k", "words"),
    [
        (0, 1, "number of tokens is 0, expected at least 1"),
        (4, 0, "top-k 0 is outside 1 to the number of experts, 3"),
        (4, 4, "top-k 4 is outside"),
    ],
)
def test_impossible_batches_are_refused(n_tokens: int, top_k: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rt.expected_counts(rt.uniform_shares(3), n_tokens, top_k)


@pytest.mark.parametrize("name", ["zipf", "uniform:2", "mmlu-like:1", "power-law:x", "power-law:-1", "power-law:nan"])
def test_unknown_patterns_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown routing|is no exponent|is outside 0 to 10"):
        rt.pattern_shares(name, 8)


# Sampling


def test_choices_are_distinct_and_reproducible() -> None:
    shares = rt.power_law_shares(16)
    choices = rt.sample_choices(shares, 500, 4, seed=7)
    assert choices.shape == (500, 4)
    assert (np.diff(np.sort(choices, axis=1), axis=1) > 0).all()
    np.testing.assert_array_equal(choices, rt.sample_choices(shares, 500, 4, seed=7))
    assert (choices != rt.sample_choices(shares, 500, 4, seed=8)).any()


def test_choices_follow_the_shares() -> None:
    shares = rt.power_law_shares(4)
    frequency = np.bincount(rt.sample_choices(shares, 40_000, 1, seed=0)[:, 0], minlength=4) / 40_000
    np.testing.assert_allclose(frequency, shares[0], atol=4 * 0.5 / 200)  # four standard errors of a fraction
    # Top-2 of shares 1/2, 1/4, 1/4 without replacement: the first is in with 1/2 + 2 x 1/4 x (1/2) / (3/4) = 5/6.
    choices = rt.sample_choices(np.array([[0.5, 0.25, 0.25]]), 40_000, 2, seed=1)
    assert (choices == 0).any(axis=1).mean() == pytest.approx(5 / 6, abs=4 * 0.4 / 200)


def test_experts_without_share_are_not_drawn() -> None:
    assert set(rt.sample_choices(np.array([[0.5, 0.0, 0.5, 0.0]]), 200, 2, seed=0).ravel()) == {0, 2}


def test_small_batches_are_drawn_and_large_ones_expected() -> None:
    small, again = rt.routing("power-law", 16, 2, 32), rt.routing("power-law", 16, 2, 32)
    np.testing.assert_array_equal(small.counts, again.counts)
    assert len(small.counts) >= rt.N_DRAWS
    assert len(np.unique(small.counts, axis=0)) > 1
    n_tokens = rt.MAX_DRAWN // 16 + 1
    large = rt.routing("power-law", 16, 2, n_tokens)
    np.testing.assert_array_equal(large.counts, rt.expected_counts(rt.power_law_shares(16), n_tokens, 2))
    assert rt.drawn_counts(rt.power_law_shares(16)[0], 32, 2, seed=3).tolist() == small.counts[3].tolist()


def test_routing_refuses_what_does_not_add_up() -> None:
    rt.Routing("good", np.array([[2, 1, 1]]), n_tokens=2, top_k=2)
    for counts, words in (
        ([[2, 1, 0]], "a layer sums to 3 assignments, expected tokens x top-k = 4"),
        ([[3, 1, 0]], "an expert has fewer than 0 or more than 2 tokens"),
        ([[-1, 3, 2]], "fewer than 0"),
        ([2, 1, 1], "counts have 1 dimensions, expected \\[layer, expert\\]"),
    ):
        with pytest.raises(InputError, match=f"routing 'bad': .*{words}"):
            rt.Routing("bad", np.array(counts), n_tokens=2, top_k=2)


def test_popularity_falls_back_on_the_counts() -> None:
    batch = rt.Routing("by hand", np.array([[3, 1], [2, 2]]), n_tokens=4, top_k=1)
    assert batch.popularity.tolist() == [[0.75, 0.25], [0.5, 0.5]]


# Files

COUNTS = np.array([[6, 3, 1], [5, 5, 10]])
SHARES = [[0.6, 0.3, 0.1], [0.25, 0.25, 0.5]]


def save(path: Path, *arrays: NDArray[np.generic], **named: NDArray[np.generic]) -> str:
    if path.suffix == ".npz":
        np.savez(path, *arrays, **named)
    elif path.suffix == ".npy":
        np.save(path, arrays[0])
    else:
        np.savetxt(path, arrays[0], delimiter=",", fmt="%d")
    return str(path)


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv"])
def test_shares_from_each_kind_of_file(tmp_path: Path, suffix: str) -> None:
    np.testing.assert_allclose(rt.read_shares(save(tmp_path / f"counts.{suffix}", COUNTS)), SHARES)


def test_steps_are_summed_and_one_layer_may_be_flat(tmp_path: Path) -> None:
    steps = np.stack([COUNTS, np.zeros_like(COUNTS), 2 * COUNTS])
    np.testing.assert_allclose(rt.read_shares(save(tmp_path / "steps.npy", steps)), SHARES)
    np.testing.assert_allclose(rt.read_shares(save(tmp_path / "flat.npy", COUNTS[0])), SHARES[:1])


def test_one_array_of_several_is_chosen_by_key(tmp_path: Path) -> None:
    source = save(tmp_path / "two.npz", a=COUNTS, b=COUNTS[:, ::-1])
    np.testing.assert_allclose(rt.read_shares(f"{source}#b")[0], [0.1, 0.3, 0.6])
    with pytest.raises(InputError, match=r"two\.npz holds a, b; choose one as two\.npz#a"):
        rt.read_shares(source)
    with pytest.raises(InputError, match=r"holds a, b; choose one"):
        rt.read_shares(f"{source}#c")
    with pytest.raises(InputError, match=r"counts\.npy holds one array without a name, so leave out #a"):
        rt.read_shares(save(tmp_path / "counts.npy", COUNTS) + "#a")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("text.npy", b"hello", "is not a routing file"),
        ("torn.npz", b"PK\x03\x04torn", "is not a routing file"),
        ("empty.npz", b"PK\x05\x06" + bytes(18), "holds no arrays"),
        ("words.csv", b"expert,count\n0,3\n", "is not a routing file"),
        ("ragged.csv", b"1,2\n3\n", "is not a routing file"),
        ("empty.csv", b"", "expected counts"),
        ("negative.csv", b"1,-2\n", "must be 0 to"),
        ("idle.csv", b"1,2\n0,0\n", "not all zero in a layer"),
        ("nan.csv", b"1,nan\n", "must be 0 to"),
        ("binary.csv", b"\xff\xfe\x00", "is not a routing file"),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        rt.read_shares(str(tmp_path / name))
    assert words in str(caught.value)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [np.ones((1, 2, 3, 4)), np.array(3), np.array([["a", "b"]]), np.ones((0, 4)), np.ones((2, 2), dtype=bool)],
    ids=["four-dimensional", "scalar", "words", "no layers", "masks"],
)
def test_unusable_arrays_are_refused(tmp_path: Path, array: NDArray[np.generic]) -> None:
    with pytest.raises(InputError, match=r"^a\.npy"):
        rt.read_shares(save(tmp_path / "a.npy", array))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"object\.npy is not a routing file"):
        rt.read_shares(str(tmp_path / "object.npy"))


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "counts.npy", COUNTS)
    assert rt.routing(source, 3, 2, 10).counts.shape[1] == 3
    with pytest.raises(InputError, match="is for 3 experts, the model shape has 8"):
        rt.routing(source, 8, 2, 10)
    with pytest.raises(InputError, match="no routing file 'zipf', and no pattern of that name; patterns: uniform, "):
        rt.routing("zipf", 8, 2, 10)


def test_real_routing_is_as_skewed_as_published(shared: Path) -> None:
    real = shared / "data" / "routing_olmoe_mixtral.npz"
    wikipedia = rt.read_shares(f"{real}#olmoe-1b-7b__wikipedia")
    assert wikipedia.shape == (3, 64)
    with np.load(real) as arrays:
        per_layer = {
            domain: [rt.experts_for_coverage(arrays[f"olmoe-1b-7b__{domain}"][[layer]], 0.9) for layer in range(3)]
            for domain in ("wikipedia", "c4")
        }
        mixtral = [rt.max_over_mean(arrays[key]) for key in arrays if key.startswith("mixtral")]
        olmoe = [rt.max_over_mean(arrays[key][[layer]]) for key in arrays if "olmoe" in key for layer in range(3)]
    np.testing.assert_allclose(per_layer["wikipedia"], [0.77, 0.67, 0.42], atol=0.006)
    np.testing.assert_allclose(per_layer["c4"], [0.86, 0.81, 0.77], atol=0.006)
    assert min(mixtral) > 1.1
    assert max(mixtral) < 1.3
    assert (round(min(olmoe), 1), round(max(olmoe), 1)) == (2.5, 7.8)
    batch = rt.routing(f"{real}#olmoe-1b-7b__wikipedia", 64, 8, 16384)
    assert batch.counts.shape == (3, 64)
    np.testing.assert_allclose(batch.counts / batch.counts.sum(axis=1, keepdims=True), wikipedia, atol=1e-3)


# Statistics

BY_HAND = np.array([[6, 3, 1, 0], [4, 4, 1, 1]])


def test_experts_for_coverage() -> None:
    # 90 % of the first layer needs 2 of 4 experts (6 + 3), of the second 3 (4 + 4 + 1).
    assert rt.experts_for_coverage(BY_HAND[:1], 0.9) == 0.5
    assert rt.experts_for_coverage(BY_HAND[1:], 0.9) == 0.75
    assert rt.experts_for_coverage(BY_HAND, 0.9) == 0.625
    assert rt.experts_for_coverage(BY_HAND[:1], 1.0) == 0.75
    assert rt.experts_for_coverage(rt.mmlu_like_shares(20) * 1000, 0.9) == 0.65


def test_max_over_mean() -> None:
    assert rt.max_over_mean(BY_HAND) == (6 / 2.5 + 4 / 2.5) / 2
    assert rt.max_over_mean(np.full((1, 8), 5)) == 1


def test_coverage_curve() -> None:
    experts, assignments = rt.coverage_curve(BY_HAND)
    np.testing.assert_allclose(experts, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(assignments, [0, 0.5, 0.85, 0.95, 1])  # means of 0.6, 0.9, 1, 1 and 0.4, 0.8, 0.9, 1


@given(names, sizes)
def test_coverage_curve_bends_upwards_only(name: str, size: tuple[int, int, int]) -> None:
    n_experts, top_k, n_tokens = size
    experts, assignments = rt.coverage_curve(rt.expected_counts(rt.pattern_shares(name, n_experts), n_tokens, top_k))
    assert (assignments[0], experts[-1]) == (0, 1)
    assert assignments[-1] == pytest.approx(1)
    assert (np.diff(np.diff(assignments)) <= 1e-12).all()
    assert (assignments >= experts - 1e-12).all()
