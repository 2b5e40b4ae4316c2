"""Counts of published measurements, rebuilt: against the loops of their definition, and what must hold of them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from perfmodel import routing
from perfmodel.errors import InputError
from perfmodel.routing import published, published_counts

TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768)
SIZES = ((8, 2), (16, 1), (16, 5), (128, 4), (128, 6), (160, 8), (256, 8), (512, 22), (6, 6))


def repaired_slowly(weights: NDArray[np.float64], top_k: int, n_tokens: int) -> list[int]:
    """One row of counts by the definition, token by token."""
    total = n_tokens * top_k
    counts = [round(float(x)) for x in weights / weights.sum() * total]  # halves to even, as the collectors round
    overflow = sum(max(count - n_tokens, 0) for count in counts)
    counts = [min(count, n_tokens) for count in counts]

    def give(n_units: int) -> None:
        for _ in range(n_units):
            free = [i for i, count in enumerate(counts) if count < n_tokens]
            if free:
                counts[min(free, key=lambda i: (counts[i], i))] += 1

    give(overflow)
    give(total - sum(counts))
    while sum(counts) > total:
        counts[max(range(len(counts)), key=lambda i: (counts[i], -i))] -= 1
    return counts


def test_repair_equals_the_loop_token_by_token() -> None:
    rng = np.random.default_rng(1)
    repaired = {"overflow": 0, "missing": 0, "too much": 0}
    for _ in range(300):
        n_experts = int(rng.integers(1, 40))
        top_k, n_tokens = int(rng.integers(1, n_experts + 1)), int(rng.integers(1, 60))
        weights = published.power_law_weights(rng.random((3, n_experts)), rng.choice([0.0, 1.0, 1.2, 2.5]), 0.01, 40.0)
        counts = published.repaired_counts(weights, top_k, n_tokens)
        assert counts.tolist() == [repaired_slowly(row, top_k, n_tokens) for row in weights]
        rounded = np.rint(weights / weights.sum(axis=1, keepdims=True) * n_tokens * top_k).sum(axis=1)
        repaired["missing"] += int((rounded < n_tokens * top_k).sum())
        repaired["too much"] += int((rounded > n_tokens * top_k).sum())
        repaired["overflow"] += int((weights / weights.sum(axis=1, keepdims=True) * top_k > 1).any(axis=1).sum())
    assert min(repaired.values()) > 50  # every kind of repair was compared


def test_filling_equals_adding_unit_by_unit() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        levels = rng.integers(-9, 9, size=(4, int(rng.integers(1, 12))))
        n_units = rng.integers(0, 60, size=4)
        slowly = levels.copy()
        for row, n in zip(slowly, n_units, strict=True):
            for _ in range(n):
                row[np.argmin(row)] += 1
        np.testing.assert_array_equal(published.fill_lowest(levels, n_units), slowly)


def balanced_slowly(n_experts: int, top_k: int, n_tokens: int) -> list[int]:
    stride = -(-n_experts // top_k)
    counts = [0] * n_experts
    for t in range(n_tokens):
        first = t if n_tokens >= stride else t * stride / n_tokens
        for j in range(top_k):
            counts[int((first + j * stride) % n_experts)] += 1
    return counts


@pytest.mark.parametrize("n_tokens", TOKENS)
def test_balanced_equals_the_loop(n_tokens: int) -> None:
    for n_experts, top_k in ((8, 2), (16, 1), (128, 4), (128, 6), (160, 8), (256, 8), (512, 22), (6, 6)):
        counts = published_counts("balanced", n_experts, top_k, n_tokens)
        assert counts.shape == (1, n_experts)
        assert counts.tolist() == [balanced_slowly(n_experts, top_k, n_tokens)]


def test_few_balanced_tokens_do_not_crowd_on_the_first_experts() -> None:
    counts = published_counts("balanced", 16, 2, 2)[0]  # stride 8: tokens begin at experts 0 and 4, not 0 and 1
    assert np.flatnonzero(counts).tolist() == [0, 4, 8, 12]


def test_a_balanced_token_selects_no_expert_twice() -> None:
    """With 16 experts and top-5 the stride is 4, and the fifth selection would be the first expert again."""
    assert published_counts("balanced", 16, 5, 1)[0].tolist() == [1, 1, 0, 0] + [1, 0, 0, 0] * 3


@pytest.mark.parametrize("distribution", ["balanced", "power_law_1.01", "power_law_1.2", "power_law_1", "power_law_0"])
@pytest.mark.parametrize(("n_experts", "top_k"), SIZES)
def test_every_row_is_a_batch_that_can_be(distribution: str, n_experts: int, top_k: int) -> None:
    for n_tokens in TOKENS:
        counts = published_counts(distribution, n_experts, top_k, n_tokens)
        assert counts.dtype == np.int64
        assert counts.shape == (1 if distribution == "balanced" else 8, n_experts)
        routing.Routing(distribution, counts, n_tokens, top_k)  # refuses sums and counts that no batch has


def test_weights_have_the_density_they_are_named_after() -> None:
    """The share of values below the middle of the range is what the integral of x^-a says."""
    for exponent in (1.01, 1.2, 2.0):
        weights = published.power_law_weights(np.linspace(0, 1, 100001), exponent, 1.0, 100.0)
        assert (weights.min(), weights.max()) == (1.0, pytest.approx(100.0))
        x = np.linspace(1.0, 100.0, 1_000_001)
        density = x**-exponent
        below = density[x <= 10].sum() / density.sum()
        assert (weights <= 10).mean() == pytest.approx(below, abs=1e-3)


def test_an_exponent_of_one_is_the_limit() -> None:
    quantiles = np.linspace(0, 1, 11)
    at = published.power_law_weights(quantiles, 1.0, 1.0, 50.0)
    np.testing.assert_allclose(at, published.power_law_weights(quantiles, 1.0 + 1e-6, 1.0, 50.0), rtol=1e-5)


def test_the_two_ranges_of_weights_meet_where_assignments_pass_the_experts() -> None:
    """Up to as many assignments as experts weights are 0.01 to 2, a ratio of 200; one token more and it is 13.6."""
    at = published_counts("power_law_1.2", 128, 8, 16, n_draws=200)  # 128 assignments
    past = published_counts("power_law_1.2", 128, 8, 17, n_draws=200)  # 136
    assert past.max(axis=1).mean() < at.max(axis=1).mean()


def test_it_is_steeper_than_a_power_law_of_ranks() -> None:
    counts = published_counts("power_law_1.2", 128, 8, 1024, n_draws=64)
    hottest = np.sort(counts, axis=1)[:, ::-1][:, : round(0.65 * 128)].sum(axis=1) / (1024 * 8)
    assert hottest.mean() == pytest.approx(0.98, abs=0.01)


def test_the_same_arguments_give_the_same_counts_and_others_do_not() -> None:
    counts = published_counts("power_law_1.2", 64, 8, 256)
    np.testing.assert_array_equal(counts, published_counts("power_law_1.20", 64, 8, 256))
    np.testing.assert_array_equal(counts[:3], published_counts("power_law_1.2", 64, 8, 256, n_draws=3))
    assert (counts != published_counts("power_law_1.2", 64, 8, 256, seed=1)).any()
    assert (counts != published_counts("power_law_1.01", 64, 8, 256)).any()
    assert len(np.unique(counts, axis=0)) == 8


def test_known_names() -> None:
    known = ("balanced", "power_law_1.01", "power_law_1.2", "power_law_0", "power_law_2")
    assert all(routing.is_published(name) for name in known)
    unknown = ("", "uniform", "power_law", "power_law_", "power_law_x", "power_law_nan", "power_law_-1", "power_law_11")
    assert not any(routing.is_published(name) for name in unknown)
    for name in unknown:
        with pytest.raises(InputError, match=r"unknown published distribution .*; known: balanced, power_law_EXPONENT"):
            published_counts(name, 8, 2, 4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((8, 9, 4), "top-k 9 is outside 1 to the number of experts, 8"),
        ((8, 0, 4), "top-k 0 is outside"),
        ((8, 2, 0), "found 0 tokens and 8 draws, expected at least 1 of each"),
        ((8, 2, 4, 0), "found 4 tokens and 0 draws"),
    ],
)
def test_sizes_that_cannot_be_are_refused(numbers: tuple[int, ...], words: str) -> None:
    for name in ("balanced", "power_law_1.2"):
        with pytest.raises(InputError, match=words):
            published_counts(name, *numbers)
