"""Boosted trees as arrays: a tree made by hand, agreement with scikit-learn, and files that no tree could have made."""

import json

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor

from perfmodel.latency import trees as trees_module
from perfmodel.latency.trees import Trees, grow, trees_from_json

# Two trees by hand. The first: feature 0 at most 1.5 gives 10, else feature 1 at most 0 gives 20, else 30. The second
# is a leaf alone.
BY_HAND = Trees(
    base=1.0,
    depth=2,
    feature=np.array([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]),
    threshold=np.array([[1.5, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]),
    left=np.array([[1, 1, 3, 3, 4], [0, 1, 2, 3, 4]]),
    right=np.array([[2, 1, 4, 3, 4], [0, 1, 2, 3, 4]]),
    value=np.array([[0.0, 10.0, 0.0, 20.0, 30.0], [0.5, 0.0, 0.0, 0.0, 0.0]]),
)
ROWS = np.array([[1.5, 9.0], [1.6, 0.0], [1.6, 0.1], [-5.0, -5.0]])


def made_up_table(n_rows: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    features = np.random.default_rng(seed).normal(size=(n_rows, 4))
    return features, np.where(features[:, 0] > 0.3, 1.0, 0.0) + 0.5 * features[:, 2]


def test_a_tree_made_by_hand_is_followed_to_its_leaves() -> None:
    assert BY_HAND.predict(ROWS).tolist() == [11.5, 21.5, 31.5, 11.5]
    assert BY_HAND.predict(ROWS[:0]).shape == (0,)


def test_trees_grow_the_same_and_learn_a_step_and_a_slope() -> None:
    features, target = made_up_table()
    grown = grow(features, target, n_trees=60, least=20)
    assert np.abs(grown.predict(features) - target).mean() < 0.15
    assert np.abs(target - np.median(target)).mean() > 0.4
    again = grow(features, target, n_trees=60, least=20)
    assert again.predict(features).tolist() == grown.predict(features).tolist()


def test_arrays_say_what_scikit_learn_says_of_rows_it_never_saw() -> None:
    features, target = made_up_table()
    boosted = HistGradientBoostingRegressor(loss="absolute_error", max_iter=40, early_stopping=False, random_state=0)
    boosted.fit(features, target)
    unseen, _ = made_up_table(seed=1)
    assert trees_module._arrays(boosted).predict(unseen) == pytest.approx(boosted.predict(unseen), rel=1e-9)


def test_json_brings_back_the_very_same_trees() -> None:
    features, target = made_up_table()
    grown = grow(features, target, n_trees=30)
    back = trees_from_json(json.loads(json.dumps(grown.to_json(), allow_nan=False)))
    assert back.predict(features).tolist() == grown.predict(features).tolist()
    assert trees_from_json(BY_HAND.to_json()).predict(ROWS).tolist() == BY_HAND.predict(ROWS).tolist()


def test_few_digits_send_no_row_of_the_table_to_another_leaf() -> None:
    """With more values than bins many a threshold is a value of the table; rounded down, its row would move."""
    features, target = made_up_table(600)
    boosted = HistGradientBoostingRegressor(
        loss="absolute_error",
        max_iter=30,
        max_leaf_nodes=15,
        min_samples_leaf=20,
        l2_regularization=5.0,
        early_stopping=False,
        random_state=0,
    ).fit(features, target)
    grown = grow(features, target, n_trees=30, least=20)
    assert grown.predict(features) == pytest.approx(boosted.predict(features), rel=1e-5, abs=1e-6)
    assert all(x == float(f"{x:.7g}") for x in np.concatenate([grown.threshold.ravel(), grown.value.ravel()]))


@pytest.mark.parametrize("value", [1.23456789, -1.23456789, 9.99999999, -9.99999999, 1e-7 / 3, 12345678.9, 0.0, 2.5])
def test_a_threshold_is_rounded_up_in_its_seventh_digit_at_most(value: float) -> None:
    (rounded,) = trees_module._rounded_up(np.array([[value]]))[0]
    assert value <= rounded <= value + 1.0001e-6 * abs(value)
    assert rounded == float(f"{rounded:.7g}")


def test_too_few_rows_or_columns_that_say_nothing_make_leaves_alone() -> None:
    features, target = made_up_table(20)
    few = grow(features, target, n_trees=5)  # fewer rows than two leaves need
    assert few.depth == 0 and len(set(few.predict(features))) == 1
    constant = grow(np.ones((300, 2)), np.arange(300.0), n_trees=5)
    assert constant.predict(np.ones((3, 2))) == pytest.approx(149.5)
    one = grow(np.ones((1, 1)), np.array([3.0]), n_trees=2)
    assert one.predict(np.ones((1, 1))).tolist() == [3.0]


def test_another_scikit_learn_that_keeps_trees_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees_module, "_arrays", lambda boosted: BY_HAND)
    with pytest.raises(RuntimeError, match="keeps boosted trees in a form that is not known"):
        grow(*made_up_table(), n_trees=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("left", [[1, 1, 3, 3, 5], [0, 1, 2, 3, 4]]),
        ("right", [[-1, 1, 4, 3, 4], [0, 1, 2, 3, 4]]),
        ("feature", [[0, 0, 2, 0, 0], [0] * 5]),
        ("feature", [[-1, 0, 1, 0, 0], [0] * 5]),
        ("feature", [[0, 0, 1.5, 0, 0], [0] * 5]),
        ("value", [[0.0, 10.0, 0.0, 20.0, float("nan")], [0.0] * 5]),
        ("threshold", [[float("inf")] + [0.0] * 4, [0.0] * 5]),
        ("value", [[0.0, 10.0], [0.0, 1.0]]),
        ("value", [1.0, 2.0]),
        ("value", [["x"] * 5, [0.0] * 5]),
        ("value", None),
        ("base", "x"),
        ("base", float("nan")),
        ("depth", -1),
        ("depth", 10**9),
        ("depth", None),
        ("depth", 1.5),
    ],
)
def test_what_no_trees_could_have_written_is_refused(key: str, value: object) -> None:
    assert trees_from_json(BY_HAND.to_json(), n_features=2).depth == 2
    with pytest.raises((ValueError, TypeError)):
        trees_from_json({**BY_HAND.to_json(), key: value}, n_features=2)
    with pytest.raises(KeyError):
        trees_from_json({k: v for k, v in BY_HAND.to_json().items() if k != key}, n_features=2)
