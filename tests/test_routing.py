"""Routing patterns, files and statistics: conservation, hand examples, and an obvious count beside the fast one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from perfmodel import moe
from perfmodel import routing as rt
from perfmodel.errors import InputError
from perfmodel.routing.named import Hints, recording_of

names = st.sampled_from(
    [*rt.PATTERNS, "power-law:0", "power-law:2.5", "zipf:0.6", "pareto:1.01/3", "coverage:0.8/0.25", "one-hot:3"]
)
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zeta", "unknown routing 'zeta'; known: uniform, power-law\\[:EXPONENT\\], .* or a file"),
        ("uniform:2", "found '2' after the colon, expected nothing"),
        ("mmlu-like:1", "found '1' after the colon, expected nothing"),
        ("power-law:1/2", "found '1/2' after the colon, expected EXPONENT"),
        ("power-law:x", "'x' is no exponent; write for example power-law:1$"),
        ("power-law:-1", "exponent -1 is outside 0 to 10"),
        ("zipf:nan", "exponent nan is outside 0 to 10"),
        ("pareto:1.2/0.5", "ratio 0.5 is outside 1 to 1e\\+09"),
        ("coverage:0.9/1", "experts 1 is outside 0.001 to 0.999"),
        ("coverage:0.9/", "'' is no experts; write for example coverage:0.9/0.65"),
        ("coverage:0.5/0.6", "the hottest 0.6 of experts cannot receive only 0.5 of assignments"),
        ("link-skew:1/0.2", "the hottest 0.8 of experts cannot receive only 0.5 of assignments"),
        ("one-hot:0", "n 0 is outside 1"),
        ("one-hot:1.5", "1.5 hot experts, expected a whole number"),
    ],
)
def test_unknown_patterns_are_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        rt.pattern_shares(name, 8)


def test_every_pattern_says_how_it_is_written_and_works_by_its_bare_name() -> None:
    assert len(rt.pattern_usages()) == len(rt.PATTERNS)
    for usage, name in zip(rt.pattern_usages(), rt.PATTERNS, strict=True):
        assert usage.partition("[")[0] == name
        assert rt.is_pattern(name) and rt.is_pattern(f"{name}:1") and not rt.is_pattern(f"./{name}")
        shares = rt.pattern_shares(name, 48)
        assert shares.shape == (1, 48)
        assert shares.sum() == pytest.approx(1)
        assert rt.pattern_shares(name, 1).tolist() == [[pytest.approx(1)]]


def test_zipf_is_the_power_law_and_mmlu_like_a_case_of_coverage() -> None:
    for argument in ("", ":0.7"):
        assert rt.pattern_shares("zipf" + argument, 9).tolist() == rt.pattern_shares("power-law" + argument, 9).tolist()
    assert rt.pattern_shares("coverage:0.9/0.65", 64).tolist() == rt.mmlu_like_shares(64).tolist()


def test_coverage_puts_the_stated_tokens_on_the_stated_experts() -> None:
    assert rt.pattern_shares("coverage:0.8/0.5", 4)[0] == pytest.approx([0.4, 0.4, 0.1, 0.1])
    # A quarter of 6 experts is 1.5: the hot share per expert is 0.7 / 1.5, the cold 0.3 / 4.5, the second half of each.
    hot, cold = 0.7 / 1.5, 0.3 / 4.5
    assert rt.pattern_shares("coverage:0.7/0.25", 6)[0] == pytest.approx([hot, (hot + cold) / 2, *[cold] * 4])
    assert rt.pattern_shares("coverage:0.5/0.5", 4)[0] == pytest.approx([0.25] * 4)


def test_link_skew_loads_both_memories_in_proportion_to_their_bandwidth() -> None:
    # 3:1 between the memories, half of the experts cold: 3/4 of assignments on 4 experts, 1/4 on the other 4.
    assert rt.pattern_shares("link-skew:3/0.5", 8)[0] == pytest.approx([3 / 16] * 4 + [1 / 16] * 4)
    # GH200: 4000 / (4000 + 450) = 0.899 stays on the device when the cold 5/16 of experts are offloaded.
    assert rt.pattern_shares("link-skew", 64)[0, :44].sum() == pytest.approx(0.8989, abs=5e-5)


def test_pareto_weights_follow_their_density() -> None:
    # Density x^-1 from 1 to 16: the logarithm is even, so four quantiles are 16^(1/8), 16^(3/8), 16^(5/8), 16^(7/8).
    by_hand = np.array([2**3.5, 2**2.5, 2**1.5, 2**0.5])
    assert rt.pattern_shares("pareto:1/16", 4)[0] == pytest.approx(by_hand / by_hand.sum())
    # Density x^-2 from 1 to 2 has the distribution function 2 - 2 / x: quantiles 1 / (1 - u / 2) at u = 1/4, 3/4.
    assert rt.pattern_shares("pareto:2/2", 2)[0] == pytest.approx(np.array([8 / 5, 8 / 7]) / (8 / 5 + 8 / 7))
    assert rt.pattern_shares("pareto:3/1", 5)[0] == pytest.approx([0.2] * 5)
    near = rt.pattern_shares("pareto:1.0000001/100", 32)[0]  # continuous where the formula changes
    assert near == pytest.approx(rt.pattern_shares("pareto:1/100", 32)[0], rel=1e-5)


def test_pareto_is_as_skewed_as_the_published_measurements() -> None:
    # design/latency-model.md section 1: of 128 experts at 1024 tokens the top 65 % hold 99 % of assignments.
    name = rt.pareto_name(128, 8, 1024)
    assert name == "pareto:1.2/819.2"
    assert rt.pattern_shares(name, 128)[0, :83].sum() == pytest.approx(0.99, abs=0.005)
    # Against the seeded draws that the pattern stands for: half of 128 experts, in 400 draws by the inverse function.
    u = np.random.default_rng(0).random((400, 128))
    drawn = -np.sort(-((1 - u * (1 - 819.2**-0.2)) ** -5.0), axis=1)
    covered = (drawn / drawn.sum(axis=1, keepdims=True))[:, :64].sum(axis=1)
    assert rt.pattern_shares(name, 128)[0, :64].sum() == pytest.approx(covered.mean(), abs=3 * covered.std())
    assert rt.pareto_name(64, 8, 8) == "pareto:1.2/200"  # 64 assignments are no more than 64 experts: 0.01 to 2
    assert rt.pareto_name(8, 8, 2, 1.01) == "pareto:1.01/1.6"


def test_one_hot_experts_take_every_token_and_the_others_what_is_left() -> None:
    assert rt.expected_counts(rt.pattern_shares("one-hot:2", 4), 6, 1).tolist() == [[3, 3, 0, 0]]
    assert rt.expected_counts(rt.pattern_shares("one-hot", 4), 6, 2).tolist() == [[6, 2, 2, 2]]
    counts = rt.routing("one-hot:2", 10, 4, 400).counts
    assert (counts[:, :2] == 400).all()
    assert counts[:, 2:].min() > 50  # 100 each on average: the others are drawn evenly, not the first ones always
    assert rt.pattern_shares("one-hot:8", 2).tolist() == [[0.5, 0.5]]


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
        ("empty.csv", b"", "is empty"),
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
    with pytest.raises(InputError, match="no routing file 'zeta', and no pattern of that name; patterns: uniform, "):
        rt.routing("zeta", 8, 2, 10)


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


def test_a_layer_is_chosen_by_its_number(tmp_path: Path) -> None:
    source = save(tmp_path / "two.npz", a=COUNTS, b=np.stack([COUNTS[:, ::-1]] * 2))
    assert rt.read_shares(f"{source}#a@1").tolist() == [SHARES[1]]
    assert rt.read_shares(f"{source}#b@0")[0] == pytest.approx([0.1, 0.3, 0.6])
    assert rt.layer_shares(f"{source}#a").tolist() == [SHARES[0]]
    assert rt.layer_shares(f"{source}#a@1").tolist() == [SHARES[1]]
    assert rt.read_shares(save(tmp_path / "flat.csv", COUNTS[:1]) + "@0").tolist() == [SHARES[0]]
    with pytest.raises(InputError, match=r"two\.npz has no layer 2; its layers are 0 to 1"):
        rt.read_shares(f"{source}#a@2")
    with pytest.raises(InputError, match=r"two\.npz holds a, b; choose one as two\.npz#a"):
        rt.layer_shares(f"{source}@0")
    with pytest.raises(InputError, match=r"two\.npz holds a, b; choose one"):
        rt.read_shares(f"{source}#a@-1")
    batch = rt.routing(f"{source}#a@1", 3, 1, 10**6)
    assert batch.counts.tolist() == [[250_000, 250_000, 500_000]]


def test_a_layer_without_tokens_harms_only_who_asks_for_it(tmp_path: Path) -> None:
    source = save(tmp_path / "idle.npy", np.array([[1, 3], [0, 0]]))
    assert rt.layer_shares(f"{source}@0").tolist() == [[0.25, 0.75]]
    for asked in (source, f"{source}@1"):
        with pytest.raises(InputError, match="not all zero in a layer"):
            rt.read_shares(asked)


def test_signs_in_file_names_and_folders_are_no_keys_or_layers(tmp_path: Path) -> None:
    folder = tmp_path / "run@3#x"
    folder.mkdir()
    source = save(folder / "counts#1@2.npy", COUNTS)
    assert rt.read_shares(source).tolist() == [pytest.approx(row) for row in SHARES]
    assert rt.read_shares(f"{source}@1").tolist() == [SHARES[1]]


def test_keys_of_a_file(tmp_path: Path, shared: Path) -> None:
    assert rt.routing_keys(save(tmp_path / "two.npz", b=COUNTS, layers=COUNTS)) == ["b", "layers"]
    assert rt.routing_keys(save(tmp_path / "one.npy", COUNTS)) == []
    assert rt.routing_keys(save(tmp_path / "one.csv", COUNTS)) == []
    with pytest.raises(InputError, match="no routing file"):
        rt.routing_keys(tmp_path / "none.npz")
    real = shared / "data" / "routing_olmoe_mixtral.npz"
    keys = rt.routing_keys(real)
    assert "olmoe-1b-7b__wikipedia" in keys and "mixtral-8x7b__c4" in keys
    for key in keys:
        assert rt.layer_shares(f"{real}#{key}@2").sum() == pytest.approx(1)


def test_written_counts_are_read_back_by_their_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "made.npz"
    counts = np.stack([2 * np.array([[1, 2, 1], [0, 2, 2]]), np.array([[1, 2, 1], [2, 2, 0]])])
    rt.write_counts(path, counts, np.array([1, 3]), 2, np.array([4, 2]))
    assert [file.name for file in tmp_path.iterdir()] == ["made.npz"]
    assert rt.routing_keys(path) == ["counts"]
    np.testing.assert_allclose(rt.read_shares(str(path)), [[0.25, 0.5, 0.25], [2 / 12, 6 / 12, 4 / 12]])
    with np.load(path) as arrays:
        assert {key: arrays[key].dtype.name for key in arrays} == dict.fromkeys(
            ("counts", "layers", "top_k", "n_tokens"), "int64"
        )
        assert (arrays["counts"] == counts).all()
        assert (arrays["layers"].tolist(), int(arrays["top_k"]), arrays["n_tokens"].tolist()) == ([1, 3], 2, [4, 2])


def test_counts_that_do_not_add_up_are_never_written(tmp_path: Path) -> None:
    counts = np.array([[[1, 2, 1]]])
    for path, top_k, n_tokens, layers, words in (
        ("made.npz", 2, [3], [0], "are not its tokens x top-k"),
        ("made.npz", 2, [2, 2], [0], "1 layers and 2 steps, expected \\[steps, layers, experts\\]"),
        ("made.npz", 2, [2], [0, 1], "2 layers and 1 steps"),
        ("made.csv", 2, [2], [0], "ends in .npz"),
        ("none/made.npz", 2, [2], [0], "cannot be written: No such file"),
    ):
        with pytest.raises(InputError, match=words):
            rt.write_counts(tmp_path / path, counts, np.array(layers), top_k, np.array(n_tokens))
    assert not list(tmp_path.iterdir())


# Several layers and steps


@given(
    st.sampled_from([*rt.PATTERNS, *rt.FAMILIES, "layered:0", "layered:1", "temporal:1", "temporal:9"]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_synthetic_counts_are_conserved(
    name: str, n_steps: int, n_layers: int, size: tuple[int, int], n_tokens: int, seed: int
) -> None:
    n_experts, top_k = size
    shares = rt.synthetic_steps(name, n_steps, n_layers, n_experts, seed)
    assert shares.shape == (n_steps, n_layers, n_experts)
    np.testing.assert_allclose(shares.sum(axis=2), 1)
    assert shares.min() >= 0
    np.testing.assert_array_equal(shares, rt.synthetic_steps(name, n_steps, n_layers, n_experts, seed))
    counts = rt.synthetic_counts(shares, n_tokens, top_k, seed)
    assert (counts.sum(axis=2) == n_tokens * top_k).all()
    assert counts.min() >= 0 and counts.max() <= n_tokens
    np.testing.assert_array_equal(counts, rt.synthetic_counts(shares, n_tokens, top_k, seed))


def test_large_steps_are_expected_counts_and_small_ones_differ() -> None:
    shares = rt.synthetic_steps("power-law", 3, 2, 16, 0)
    n_tokens = rt.MAX_DRAWN // 16 + 1
    large = rt.synthetic_counts(shares, n_tokens, 2, 0)
    np.testing.assert_array_equal(large[2, 1], rt.expected_counts(rt.power_law_shares(16), n_tokens, 2)[0])
    small = rt.synthetic_counts(shares, 32, 2, 0)
    assert len(np.unique(small.reshape(6, 16), axis=0)) == 6


def test_a_pattern_is_the_same_in_every_step_and_layer() -> None:
    shares = rt.synthetic_steps("coverage:0.8/0.5", 2, 3, 4, 1)
    assert (shares == rt.pattern_shares("coverage:0.8/0.5", 4)).all()


def test_layers_have_an_exponent_and_an_order_of_their_own() -> None:
    shares = rt.synthetic_steps("layered:0.5", 2, 200, 16, 7)
    assert (shares[0] == shares[1]).all()
    ranked = -np.sort(-shares[0], axis=1)
    exponents = np.log(ranked[:, 0] / ranked[:, 1]) / np.log(2)  # rank 1 over rank 2 is 2^exponent
    assert 0.5 <= exponents.min() < 0.52 and 1.48 < exponents.max() <= 1.5
    assert exponents.mean() == pytest.approx(1, abs=4 * (1 / np.sqrt(12)) / np.sqrt(200))
    for row, exponent in zip(ranked, exponents, strict=True):
        np.testing.assert_allclose(row, rt.power_law_shares(16, exponent)[0])
    hottest = np.bincount(shares[0].argmax(axis=1), minlength=16)
    assert hottest.max() < 30 and np.count_nonzero(hottest) > 12  # 12.5 each on average
    assert (np.sort(rt.synthetic_steps("layered:0", 1, 2, 8, 0)) == np.sort(rt.power_law_shares(8)[0])).all()


def test_temporal_experts_are_used_as_often_as_gem_saw() -> None:
    n_steps, n_experts = 20_000, 32
    shares = rt.synthetic_steps("temporal:4", n_steps, 1, n_experts, 3)[:, 0]
    used = shares > 20 * shares.min(axis=1, keepdims=True)  # an unused expert has 1/100 or 1/300 of the weight
    often = used.mean(axis=0)
    consistent = often > 0.5
    assert consistent.sum() == 16
    # Standard error of a fraction; a burst of 4 steps is about one observation for temporal experts.
    np.testing.assert_allclose(often[consistent], 0.85, atol=5 * np.sqrt(0.85 * 0.15 / n_steps))
    np.testing.assert_allclose(often[~consistent], 0.17, atol=5 * np.sqrt(0.17 * 0.83 / (n_steps / 8)))
    both = used[:, consistent].any(axis=1) & used[:, ~consistent].any(axis=1)
    ratio = shares[both][:, ~consistent].max(axis=1) / shares[both][:, consistent].max(axis=1)
    np.testing.assert_allclose(ratio, 3)
    # Groups of four are used in the same steps, for four steps on average, and groups have nothing to do with another.
    temporal = used[:, ~consistent]
    alike = (temporal[:, :, None] == temporal[:, None, :]).all(axis=0)
    assert alike.sum(axis=1).tolist() == [4] * 16
    n_bursts = (np.diff(temporal.astype(int), axis=0) == 1).sum()
    assert temporal.sum() / n_bursts == pytest.approx(4, rel=0.1)
    together = np.corrcoef(temporal.T)
    assert np.abs(together[~alike]).max() < 5 / np.sqrt(n_steps / 8)


def test_skewed_bursts_are_bursts_times_layers_that_differ() -> None:
    skewed, alike = (rt.synthetic_steps(name, 40, 2, 16, 5) for name in ("skewed-temporal:2", "temporal:2"))
    factor = skewed / alike
    factor /= factor[..., :1]  # each step has a sum of its own
    np.testing.assert_allclose(factor, np.broadcast_to(factor[:1], factor.shape))
    for row in -np.sort(-factor[0], axis=1):  # a power law of ranks, with an exponent of the layer's own
        exponent = np.log2(row[0] / row[1])
        assert 0.5 <= exponent <= 1.5
        np.testing.assert_allclose(row / row.sum(), rt.power_law_shares(16, exponent)[0])
    assert not np.allclose(np.sort(factor[0, 0]), np.sort(factor[0, 1]))


@pytest.mark.parametrize(
    ("name", "sizes", "words"),
    [
        ("zeta", (1, 1, 8), r"unknown routing 'zeta'; known: uniform, .*layered\[:SPREAD\], temporal\[:BURST\]"),
        ("layered:2", (1, 1, 8), "spread 2 is outside 0 to 1"),
        ("layered:0.1/3", (1, 1, 8), "found '0.1/3' after the colon, expected SPREAD"),
        ("temporal:0", (1, 1, 8), "burst 0 is outside 1 to"),
        ("temporal:x", (1, 1, 8), "'x' is no burst; write for example temporal:4"),
        ("power-law:-1", (1, 1, 8), "exponent -1 is outside"),
        ("uniform", (0, 1, 8), "the number of steps is 0, expected at least 1"),
        ("temporal", (1, 0, 8), "the number of layers is 0"),
        ("layered", (1, 1, 0), "the number of experts is 0"),
    ],
)
def test_impossible_families_are_refused(name: str, sizes: tuple[int, int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        rt.synthetic_steps(name, *sizes, 0)


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


@pytest.mark.parametrize("name", ["power-law:" + "9" * 5000, "x" * 5000, "power-law:1#" + "k" * 5000])
def test_names_longer_than_files_may_have_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        recording_of(name, Hints(moe.shape("poster")))


def test_a_table_of_more_columns_than_experts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wide_made.csv"
    path.write_text(",".join(f"e{i}" for i in range(200_000)) + "\n")
    with pytest.raises(InputError, match="more columns than 16384 experts"):
        rt.read_recording(str(path))
