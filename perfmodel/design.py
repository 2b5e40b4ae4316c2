"""Which few points to measure on a new machine, so that a fitted model says the most about it afterwards."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.hf_config import resolve
from perfmodel.latency import LatencyModel, work_of
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.routing import routing
from perfmodel.transfer import Physics, covariance, sigma_of, spread_of, transferred

MOST_POINTS = 200
N_SHAPES = 8  # of the catalogue, where nobody says which
TOKENS = tuple(4**i for i in range(8))
ROUTINGS = ("uniform", "power-law:1.2", "mmlu-like")
MEMORY_FRAC = 0.6  # of the machine's memory, what the weights of a layer may take
NOT_A_MODEL = "poster"  # a reading of an unpublished shape
AS_GOOD = 0.95  # of the best gain: of such points the cheapest is taken
N_RIVALS = 24  # candidates tried in place of each chosen point
MEASURED_OPS = ("grouped_gemm", "moe_layer")  # what the collectors can measure
# What one measurement line of a plan says; the collectors draw the batch (docs/captures.md).
PLAN_KEYS = (
    "op", "shape", "n_experts", "top_k", "hidden", "inter", "n_gemms", "gemm_k", "gemm_n", "dtype", "n_tokens",
    "routing", "launch", "reason",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Field:
    """Candidates as the design sees them: slopes of log latency `[candidate, name]`, the deviation of a measurement,
    which shape each is of, predicted ns, and the prior spread of each constant."""

    names: tuple[str, ...]
    slopes: Array
    sigma: Array
    shape_of: NDArray[np.int64]
    ns: Array
    spread: Array

    def covariance(self, chosen: Sequence[int]) -> Array:
        """What is left open of the constants once these candidates are measured, `[name, name]`."""
        rows = list(chosen)
        return covariance(self.slopes[rows], self.spread, self.sigma[rows], self.shape_of[rows])

    def open_variance(self, chosen: Sequence[int]) -> float:
        """The variance of log latency, over all candidates on average, that unknown constants leave (model A6)."""
        return float((self.covariance(chosen) * self.asked).sum())

    def information(self, chosen: Sequence[int]) -> float:
        """What these say of all constants together, in bits: half the log of how much their joint volume shrinks."""
        shrunk = 2 * np.log(self.spread).sum() - np.linalg.slogdet(self.covariance(chosen))[1]
        return float(shrunk / 2 / math.log(2))

    @property
    def asked(self) -> Array:
        """The mean outer product of the candidates' slopes, `[name, name]`."""
        return np.asarray(self.slopes.T @ self.slopes / len(self.slopes))


def design(
    model: LatencyModel,
    n_points: int,
    candidates: pl.DataFrame | None = None,
    profile: HardwareProfile | None = None,
    *,
    shapes: Sequence[str] = (),
    n_shapes: int = N_SHAPES,
) -> pl.DataFrame:
    """The points to measure on another machine, the most telling first, one row each.

    Chosen from `candidates` (columns of OBSERVATIONS without times), or from the grid of `grid` over `shapes`, else
    over `n_shapes` of the catalogue. Columns: those of a plan, candidate
    (its row there), predicted_ns, information_bits (what the point adds),
    pins (the constant it narrows most), spread_before, spread_after (one sigma in logs), reason. Bayesian V-optimal:
    least expected variance of predictions over the candidates under the prior of `transfer`, greedy, then exchanged
    so that the loss of any one point hurts least. Raises InputError where no candidate is left.
    """
    if not 1 <= n_points <= MOST_POINTS:
        raise InputError(f"found {n_points} points, expected 1 to {MOST_POINTS}")
    moved = transferred(model, profile or model.profile)
    table = grid(moved, shapes, n_shapes) if candidates is None else candidates
    if table.height < n_points:
        raise InputError(f"found {table.height} candidates for {n_points} points; name more shapes with --shape")
    field = field_of(moved, table)
    chosen = _ordered(field, _robust(field, _greedy(field, range(table.height), n_points)))
    rows = table[chosen].select([key for key in PLAN_KEYS if key in table.columns and key != "reason"])
    index = pl.DataFrame({"candidate": chosen}, schema={"candidate": pl.Int64})
    return pl.concat([rows, index, pl.DataFrame(_said(field, chosen))], how="horizontal")


def field_of(model: LatencyModel, candidates: pl.DataFrame) -> Field:
    """Candidates beside a transferred model."""
    work = work_of(candidates, model.tiles_)
    physics = Physics(model, work)
    return Field(
        names=physics.at.names,
        slopes=physics.slopes(physics.z),
        sigma=sigma_of(model, work),
        shape_of=candidates["shape"].rank("dense").to_numpy().astype(np.int64) - 1,
        ns=np.exp(physics.log_ns(physics.z)),
        spread=spread_of(model, physics.at),
    )


def _greedy(field: Field, among: Sequence[int], n_points: int) -> list[int]:
    """Candidates one by one, each the one that lowers the open variance most; of those as good, the cheapest."""
    chosen: list[int] = []
    while len(chosen) < n_points:
        before = field.open_variance(chosen)
        left = [c for c in among if c not in chosen]
        gain = np.array([before - field.open_variance([*chosen, c]) for c in left])
        good = np.flatnonzero(gain >= AS_GOOD * gain.max())
        chosen.append(left[int(good[np.argmin(field.ns[[left[i] for i in good]])])])
    return chosen


def _loss(field: Field, chosen: Sequence[int]) -> float:
    """The open variance of a design, half as it is and half after the loss of its most needed point."""
    if len(chosen) < 2:
        return field.open_variance(chosen)
    worst = max(field.open_variance([c for c in chosen if c != lost]) for lost in chosen)
    return (field.open_variance(chosen) + worst) / 2


def _robust(field: Field, chosen: Sequence[int]) -> list[int]:
    """The design with points exchanged, one pass, where that lowers the loss; rivals are those that gain most in the
    place of the point."""
    found = list(chosen)
    best = _loss(field, found)
    for place in range(len(found)):
        others = found[:place] + found[place + 1 :]
        rest = [c for c in range(len(field.ns)) if c not in found]
        open_with = np.array([field.open_variance([*others, c]) for c in rest])
        for i in np.argsort(open_with, kind="stable")[:N_RIVALS]:
            tried = [*others[:place], rest[i], *others[place:]]
            loss = _loss(field, tried)
            if loss < best * (1 - 1e-3):
                found, best = tried, loss
    return found


def _ordered(field: Field, chosen: Sequence[int]) -> list[int]:
    """The same points, the most telling first, so that a plan cut short is still the best of its length."""
    return _greedy(field, sorted(chosen), len(chosen))


def _said(field: Field, chosen: Sequence[int]) -> dict[str, list[Any]]:
    """For each point in turn what it adds and which constant it narrows most, in numbers and words."""
    said: dict[str, list[Any]] = {
        key: [] for key in ("predicted_ns", "information_bits", "pins", "spread_before", "spread_after", "reason")
    }
    for i, c in enumerate(chosen):
        before, after = (np.sqrt(np.diag(field.covariance(part))) for part in (chosen[:i], chosen[: i + 1]))
        which = int(np.argmax(before / after))
        name = field.names[which]
        again = "narrows further" if name in said["pins"] else "pins"
        said["predicted_ns"].append(float(field.ns[c]))
        said["information_bits"].append(field.information(chosen[: i + 1]) - field.information(chosen[:i]))
        said["pins"].append(name)
        said["spread_before"].append(float(before[which]))
        said["spread_after"].append(float(after[which]))
        said["reason"].append(
            f"{again} {name}: +-{100 * math.expm1(before[which]):.2g} % to +-{100 * math.expm1(after[which]):.2g} %"
        )
    return said


def grid(model: LatencyModel, shapes: Sequence[str] = (), n_shapes: int = N_SHAPES) -> pl.DataFrame:
    """What a user may ask of a machine, as rows to choose from: shapes by batch sizes, routings, and the operations
    that the model knows. Shapes that fit its memory; batches within what the model was fitted on.

    `shapes` are catalogue names or paths of config.json; without any, `n_shapes` of the catalogue spread by size.
    """
    named = [resolve(name) for name in shapes]
    limit = model.profile.quantities.get("memory_capacity_bytes")
    every = [replace(shape, dtype=model.dtype) for shape in named or map(moe.shape, moe.names())]
    fitting = [shape for shape in every if limit is None or shape.layer_bytes <= MEMORY_FRAC * limit.value]
    if not fitting:
        raise InputError(f"no shape fits the memory of {model.profile.name}; name smaller ones with --shape")
    if not named:
        fitting = _spread_by_size([shape for shape in fitting if shape.name != NOT_A_MODEL], n_shapes)
    tokens = [n for n in TOKENS if _knows(model, n)] or [TOKENS[0]]
    rows = [row for shape in fitting for n in tokens for row in _points(model, shape, n)]
    return pl.DataFrame(rows, infer_schema_length=None).cast({"gemm_k": pl.Int64, "gemm_n": pl.Int64})


def _knows(model: LatencyModel, n_tokens: int) -> bool:
    if model.confidence_ is None:
        return True
    low, high = model.confidence_.ranges["n_tokens"]
    return bool(low <= n_tokens <= high)


def _spread_by_size(shapes: Sequence[MoEShape], n: int) -> list[MoEShape]:
    """At most n shapes, evenly among all by the size of a layer."""
    ranked = sorted(shapes, key=lambda shape: (shape.layer_bytes, shape.name))
    return [ranked[i] for i in sorted(set(np.linspace(0, len(ranked) - 1, min(n, len(ranked))).round().astype(int)))]


def _points(model: LatencyModel, shape: MoEShape, n_tokens: int) -> list[dict[str, Any]]:
    """The rows of one shape and batch size."""
    found = []
    # One token wakes top-k experts under any routing.
    for name in ROUTINGS if n_tokens > 1 else ROUTINGS[:1]:
        batch = routing(name, shape.n_experts, shape.top_k, n_tokens)
        for op in model.ops_:
            gemms = shape.gemms if op == "grouped_gemm" else ((None, None),)
            for gemm_k, gemm_n in gemms:
                found.append(
                    {
                        "op": op, "shape": shape.name, "n_experts": shape.n_experts, "top_k": shape.top_k,
                        "hidden": shape.hidden, "inter": shape.inter, "n_gemms": shape.n_gemms, "gemm_k": gemm_k,
                        "gemm_n": gemm_n, "dtype": model.dtype, "n_tokens": n_tokens, "routing": name,
                        "device": "cuda" if model.profile.device == "gpu" else "cpu",
                        "launch": model.evidence_.get("launch"),
                        "tokens_per_expert": batch.counts[0].tolist(),
                    }
                )  # fmt: skip
    return found


def write_plan(points: pl.DataFrame, path: str | Path) -> None:
    """Write a design as a plan that `python -m collectors sweep --points FILE` measures: one JSON object a line.

    Raises InputError for operations that the collectors do not measure, and where the file cannot be written.
    """
    strange = sorted(set(points["op"].unique()) - set(MEASURED_OPS))
    if strange:
        raise InputError(
            f"the collectors measure {' and '.join(MEASURED_OPS)}, and this model was fitted on {', '.join(strange)}; "
            "measure its points with the framework they come from"
        )
    lines = [json.dumps({key: row[key] for key in PLAN_KEYS if row.get(key) is not None}) for row in points.to_dicts()]
    try:
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the plan to {str(path)!r}: {error.strerror}") from None
