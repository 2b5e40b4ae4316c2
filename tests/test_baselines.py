"""Simple methods that a model must beat, by hand: interpolation inside, outside and elsewhere, constant, roofline."""

import numpy as np
import polars as pl
import pytest

from perfmodel.baselines import Baselines
from tests.made_up import made_up_observations, new_model

ONE = ((1024, 512, 16, 2),)


def baselines(observations: pl.DataFrame, times_ns: list[float]) -> Baselines:
    return Baselines(new_model(), observations.with_columns(time_ns=pl.Series(times_ns)))


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_the_constant_is_the_median_of_what_was_measured() -> None:
    simple = baselines(made_up_observations(ONE, (1, 2, 4, 8), ("balanced",)), [1.0, 3.0, 100.0, 7.0])
    assert simple.constant(rows(0, 1, 2), rows(3)).tolist() == [3.0]


def test_the_roofline_is_the_larger_side_times_one_factor() -> None:
    simple = baselines(made_up_observations(ONE, (8, 65_536), ("balanced",)), [1e5, 1e9])
    # 8 tokens wake all 16 experts and read three matrices of each; 65,536 tokens are bound by computing.
    reading = 16 * 3 * 1024 * 512 * 2 / 2.5e12 * 1e9
    computing = 2 * 65_536 * 2 * 3 * 1024 * 512 / 6e14 * 1e9
    assert simple.roofline_ns.tolist() == pytest.approx([reading, computing])
    assert simple.roofline(rows(0), rows(1)).tolist() == pytest.approx([1e5 / reading * computing])


def test_between_measured_batches_times_are_interpolated_and_beyond_them_the_share_of_the_roofline_stays() -> None:
    simple = baselines(made_up_observations(ONE, (16, 64, 32, 128, 8), ("balanced",)), [100.0, 300.0, 0.0, 0.0, 0.0])
    roof = simple.roofline_ns
    train = rows(0, 1)
    found = simple.interpolation(train, rows(2, 3, 4))
    assert found[0] == pytest.approx(100 + (32 - 16) / (64 - 16) * 200)
    assert found[1] == pytest.approx(300 / roof[1] * roof[3])
    assert found[2] == pytest.approx(100 / roof[0] * roof[4])
    assert simple.interpolation(train, train).tolist() == pytest.approx([100.0, 300.0])


def test_measurements_need_no_order() -> None:
    simple = baselines(made_up_observations(ONE, (64, 16, 32), ("balanced",)), [300.0, 100.0, 0.0])
    assert simple.interpolation(rows(0, 1), rows(2)) == pytest.approx(100 + 200 / 3)


def test_of_sizes_with_this_routing_nothing_another_routing_speaks() -> None:
    observations = made_up_observations(ONE, (16, 64), ("balanced", "power_law_1.2"))
    simple = baselines(observations, [100.0, 300.0, 7.0, 9.0])
    assert simple.interpolation(rows(0, 1), rows(2, 3)).tolist() == pytest.approx([100.0, 300.0])
    assert simple.interpolation(rows(0, 1, 2, 3), rows(2, 3)).tolist() == pytest.approx([7.0, 9.0])


def test_sizes_that_were_never_measured_have_the_share_of_the_roofline_of_the_nearest() -> None:
    sizes = ((1024, 512, 16, 2), (8192, 4096, 16, 2), (1024, 640, 16, 2))
    simple = baselines(made_up_observations(sizes, (64,), ("balanced",)), [100.0, 5000.0, 0.0])
    roof = simple.roofline_ns
    assert simple.interpolation(rows(0, 1), rows(2)).tolist() == pytest.approx([100.0 / roof[0] * roof[2]])


def test_a_bare_gemm_is_no_neighbour_of_a_layer() -> None:
    layers = made_up_observations(((1024, 512, 16, 2), (8192, 4096, 16, 2)), (64,), ("balanced",))
    bare = layers[:1].with_columns(op=pl.lit("grouped_gemm"), gemm_k="hidden", gemm_n="inter")
    simple = baselines(pl.concat([layers, bare]), [100.0, 5000.0, 1.0])
    roof = simple.roofline_ns
    assert simple.interpolation(rows(1, 2), rows(0)).tolist() == pytest.approx([5000.0 / roof[1] * roof[0]])


def test_boosted_trees_learn_from_sizes_alone() -> None:
    observations = made_up_observations()
    simple = baselines(observations, observations["time_ns"].to_list())
    every = np.arange(observations.height)
    train, test = every[every % 3 != 0], every[every % 3 == 0]
    off = np.abs(np.log(simple.gradient_boosting(train, test) / simple.measured_ns[test]))
    constant = np.abs(np.log(simple.constant(train, test) / simple.measured_ns[test]))
    assert np.median(off) < 0.25 < np.median(constant)
    assert np.isfinite(simple.raw).all()
    assert simple.gradient_boosting(train[:2], test[:1]).shape == (1,)
