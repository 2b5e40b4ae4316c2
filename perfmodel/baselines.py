"""What a model must beat: a constant, the sharp roofline, interpolation in tables, and trees on raw columns."""

from collections.abc import Callable

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import threadpool_limits

from perfmodel.latency import LatencyModel, work_of
from perfmodel.physics import Array, Work, ideal_work
from perfmodel.text import NS_PER_S

Rows = NDArray[np.int64]
SLICE = ("op", "hidden", "inter", "n_experts", "top_k", "n_gemms", "gemm_k", "gemm_n", "launch")


class Baselines:
    """Predictions of simple methods for the rows `test` of a table from its rows `train`; times ns `[test row]`."""

    def __init__(self, model: LatencyModel, observations: pl.DataFrame) -> None:
        work = work_of(observations)
        flops, weight_bytes = (work.mean(x) for x in ideal_work(work))
        roof = model.roof
        self.roofline_ns = np.maximum(flops / roof.flops_per_s, weight_bytes / roof.bytes_per_s) * NS_PER_S
        self.measured_ns = observations["time_ns"].to_numpy()
        self.raw = _raw(work, observations)
        self.rows = observations.select(*SLICE, "routing", "n_tokens").to_dicts()
        self.methods: dict[str, Callable[[Rows, Rows], Array]] = {
            "constant": self.constant,
            "roofline_only": self.roofline,
            "interpolation": self.interpolation,
            "gradient_boosting": self.gradient_boosting,
        }

    def constant(self, train: Rows, test: Rows) -> Array:
        """The median time of the training rows."""
        return np.full(len(test), np.median(self.measured_ns[train]))

    def roofline(self, train: Rows, test: Rows) -> Array:
        """The larger of compute and weight traffic at the ceilings, times one fitted factor."""
        factor = np.exp(np.median(np.log(self.measured_ns[train] / self.roofline_ns[train])))
        return np.asarray(factor * self.roofline_ns[test])

    def gradient_boosting(self, train: Rows, test: Rows) -> Array:
        """Boosted trees on the logarithm of the time from sizes and statistics of the routing, no physics."""
        trees = HistGradientBoostingRegressor(max_iter=300, max_leaf_nodes=15, random_state=0, early_stopping=False)
        with threadpool_limits(1):
            trees.fit(self.raw[train], np.log(self.measured_ns[train]))
        return np.asarray(np.exp(trees.predict(self.raw[test])))

    def interpolation(self, train: Rows, test: Rows) -> Array:
        """Linear in tokens between measurements of the same sizes and routing; beyond them the share of the roofline
        stays; where nothing was measured the sizes with another routing, then the nearest sizes by share of the
        roofline (as aiconfigurator documents its own tables)."""
        tables: dict[tuple[object, ...], dict[str, list[int]]] = {}
        for i in train:
            row = self.rows[i]
            tables.setdefault(tuple(row[name] for name in SLICE), {}).setdefault(row["routing"], []).append(int(i))
        curves = {key: {name: self._curve(rows) for name, rows in one.items()} for key, one in tables.items()}
        sizes = list(curves)
        vectors = np.array([_size(key) for key in sizes])
        found = np.empty(len(test))
        for j, i in enumerate(test):
            row = self.rows[i]
            key = tuple(row[name] for name in SLICE)
            if key not in curves:
                key = sizes[int(np.abs(vectors - _size(key)).sum(axis=1).argmin())]
            of = curves[key]
            tokens, times, shares = of.get(row["routing"]) or next(iter(of.values()))
            n = row["n_tokens"]
            same = key == tuple(row[name] for name in SLICE)
            if same and tokens[0] <= n <= tokens[-1]:
                found[j] = np.interp(n, tokens, times)
            else:
                found[j] = np.interp(n, tokens, shares) * self.roofline_ns[i]
        return found

    def _curve(self, rows: list[int]) -> tuple[Array, Array, Array]:
        """Tokens, times, and times over the roofline of a slice, by rising tokens."""
        n_tokens = np.array([self.rows[i]["n_tokens"] for i in rows], dtype=np.float64)
        order = np.argsort(n_tokens, kind="stable")
        chosen = np.array(rows)[order]
        return n_tokens[order], self.measured_ns[chosen], self.measured_ns[chosen] / self.roofline_ns[chosen]


def _size(key: tuple[object, ...]) -> Array:
    """The sizes of a slice as logarithms, for distances; calls of another kind are far."""
    numbers = [np.log2(float(x) + 1) if isinstance(x, int) else 0.0 for x in key]
    return np.array([*numbers, 100.0 * (key[0] == "grouped_gemm")])


def _raw(work: Work, observations: pl.DataFrame) -> Array:
    columns = observations.select(
        pl.col("hidden", "inter", "n_experts", "top_k", "n_gemms", "gemm_k", "gemm_n", "n_tokens")
        .cast(pl.Float64)
        .fill_null(0.0)
    ).to_numpy()
    n_rows, n_active = work.n_rows, work.n_active
    routing = [n_active / work.n_experts, work.counts.max_rows[work.routing_of] * work.n_experts / n_rows]
    layer = (observations["op"].cast(pl.String) != "grouped_gemm").to_numpy().astype(np.float64)
    return np.column_stack([columns, layer, *(work.mean(x) for x in routing)])
