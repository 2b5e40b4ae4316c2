"""Boosted trees as plain arrays: scikit-learn grows them, JSON keeps them, numpy evaluates them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from perfmodel.physics import Array

SIGNIFICANT = 7  # digits that thresholds and leaves are kept with


@dataclass(frozen=True, eq=False)
class Trees:
    """A sum of regression trees, arrays `[tree, node]`: a row goes left where its feature is at most the threshold.
    A leaf points at itself, so that every row may take `depth` steps."""

    base: float
    depth: int
    feature: NDArray[np.int64]
    threshold: Array
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    value: Array

    def predict(self, features: Array) -> Array:
        """The sum of the leaves that each row reaches, `[row]`, of features `[row, feature]`."""
        tree = np.arange(len(self.value))
        node = np.zeros((len(features), len(self.value)), dtype=np.int64)
        row = np.arange(len(features))[:, None]
        for _ in range(self.depth):
            goes_left = features[row, self.feature[tree, node]] <= self.threshold[tree, node]
            node = np.where(goes_left, self.left[tree, node], self.right[tree, node])
        return np.asarray(self.base + self.value[tree, node].sum(axis=1))

    def to_json(self) -> dict[str, Any]:
        """The arrays as lists; what `grow` made has few digits and comes back from JSON as it was."""
        return {
            "base": self.base,
            "depth": self.depth,
            "feature": self.feature.tolist(),
            "threshold": self.threshold.tolist(),
            "left": self.left.tolist(),
            "right": self.right.tolist(),
            "value": self.value.tolist(),
        }


def trees_from_json(content: dict[str, Any], n_features: int | None = None) -> Trees:
    """What `to_json` gave; raises ValueError, KeyError or TypeError on what it could not have given, trees that ask for
    more than `n_features` features among it."""
    real = {name: np.array(content[name], dtype=np.float64) for name in ("threshold", "value")}
    given = {name: np.array(content[name], dtype=np.float64) for name in ("feature", "left", "right")}
    shapes = {array.shape for array in (*given.values(), *real.values())}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError("shape")
    n_nodes = next(iter(shapes))[1]
    limits = {"feature": np.inf if n_features is None else n_features, "left": n_nodes, "right": n_nodes}
    for name, array in given.items():
        if not (np.isfinite(array) & (array >= 0) & (array < limits[name]) & (array == np.floor(array))).all():
            raise ValueError(name)
    base, depth = float(content["base"]), content["depth"]
    if not (np.isfinite(base) and all(np.isfinite(array).all() for array in real.values())):
        raise ValueError("value")
    if not isinstance(depth, int) or not 0 <= depth < n_nodes:
        raise ValueError("depth")
    feature, left, right = (given[name].astype(np.int64) for name in ("feature", "left", "right"))
    return Trees(base, depth, feature, real["threshold"], left, right, real["value"])


def grow(features: Array, target: Array, *, n_trees: int = 150, n_leaves: int = 15, least: int = 40) -> Trees:
    """Trees that predict `target[row]` from `features[row, feature]` by least absolute error (histogram gradient
    boosting, Ke et al., NeurIPS 2017), the same for the same data.

    Raises RuntimeError where the installed scikit-learn keeps its trees in another form than the one read here.
    """
    boosted = HistGradientBoostingRegressor(
        loss="absolute_error",
        max_iter=n_trees,
        max_leaf_nodes=n_leaves,
        min_samples_leaf=least,
        l2_regularization=5.0,
        early_stopping=False,
        random_state=0,
    )
    with threadpool_limits(1):  # a few thousand rows: threads would wait for each other
        boosted.fit(features, target)
    trees = _arrays(boosted)
    if not np.allclose(trees.predict(features), boosted.predict(features), rtol=1e-6, atol=1e-9):
        raise RuntimeError(f"scikit-learn {sklearn.__version__} keeps boosted trees in a form that is not known here")
    return replace(trees, threshold=_rounded_up(trees.threshold), value=_rounded(trees.value))


def _rounded(values: Array) -> Array:
    """Values with SIGNIFICANT digits, so that a file is short and says the same as what is in memory."""
    return np.array([[float(f"{value:.{SIGNIFICANT}g}") for value in row] for row in values])


def _rounded_up(thresholds: Array) -> Array:
    """The same, but never less: many a threshold is the very value of a row, which must stay at or below it."""
    near = _rounded(thresholds)
    size = np.floor(np.log10(np.maximum(np.abs(near), np.finfo(np.float64).tiny)))
    return np.where(near < thresholds, _rounded(near + 10.0 ** (size - SIGNIFICANT + 1)), near)


def _arrays(boosted: HistGradientBoostingRegressor) -> Trees:
    """The nodes of the fitted trees. scikit-learn has no public way to them, so `grow` checks what comes of it."""
    nodes = [stage[0].nodes for stage in boosted._predictors]
    n_nodes = max(len(one) for one in nodes)
    own = np.tile(np.arange(n_nodes), (len(nodes), 1))
    feature, left, right = np.zeros_like(own), own.copy(), own.copy()
    threshold, value = np.zeros(own.shape), np.zeros(own.shape)
    for i, one in enumerate(nodes):
        inner = one["is_leaf"] == 0
        here = np.flatnonzero(inner)
        feature[i, here] = one["feature_idx"][inner]
        threshold[i, here] = one["num_threshold"][inner]
        left[i, here], right[i, here] = one["left"][inner], one["right"][inner]
        value[i, : len(one)] = np.where(inner, 0.0, one["value"])
    depth = max(int(one["depth"].max()) for one in nodes)
    return Trees(float(np.ravel(boosted._baseline_prediction)[0]), depth, feature, threshold, left, right, value)
