"""Which experts will be hot, warm or cold in the next step: a moving average of loads, and how often it is right."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.physics import Array
from perfmodel.routing import Loads

CLASSES = ("cold", "warm", "hot")
COLD, WARM, HOT = range(len(CLASSES))
Classes = NDArray[np.int64]

NEW_FRAC = 0.3  # of the newest step in the moving average (arXiv 2603.01058: 0.3 new + 0.7 old)
# Bounds between classes, in mean loads of a layer's experts; ours, for the paper's are not published. They lie midway,
# on a log scale, between the mean loads of the classes as it describes them (cold 0.08 / 0.72 of the mean, warm 0.70 /
# 0.25, hot 0.22 / 0.03), rounded.
COLD_BELOW, HOT_FROM = 0.5, 4.0


@dataclass(frozen=True)
class Bounds:
    """Where classes begin, in mean loads of a layer: below `cold_below` an expert is cold, from `hot_from` on hot."""

    cold_below: float = COLD_BELOW
    hot_from: float = HOT_FROM

    def __post_init__(self) -> None:
        if not 0 <= self.cold_below <= self.hot_from:
            raise InputError(
                f"classes begin at {self.cold_below:g} and {self.hot_from:g} mean loads, expected two ascending "
                "numbers from 0 on"
            )


BOUNDS = Bounds()


def classify(loads: Loads, bounds: Bounds = BOUNDS) -> Classes:
    """The class of each expert, `[..., expert]`, by its load against the mean of its layer."""
    mean = loads.mean(axis=-1, keepdims=True)
    return np.asarray((loads >= bounds.cold_below * mean).astype(np.int64) + (loads >= bounds.hot_from * mean))


def ema(loads: Loads, start: Array | None = None, new_frac: float = NEW_FRAC) -> Array:
    """What is predicted of each step from those before it, `[step + 1, layer, expert]`; the last is of one step more.

    `start[layer, expert]` is predicted of the first step; null: the first step itself, of which then nothing is
    predicted but what it was.
    """
    if not 0 < new_frac <= 1:
        raise InputError(f"the newest step has a part of {new_frac:g} in the moving average, expected above 0 to 1")
    found = np.empty((len(loads) + 1, *loads.shape[1:]))
    found[0] = loads[0] if start is None else start
    for step, load in enumerate(loads):
        found[step + 1] = new_frac * load + (1 - new_frac) * found[step]
    return found


@dataclass(frozen=True)
class Accuracy:
    """How often the class predicted of an expert is the class it then has, over steps, layers and experts.

    `repeated_frac` is how often the class of the step before is right, `usual_frac` the class of the mean load of all
    steps before. `migration_frac` is how often a prediction is right that differs from the prediction before it, which
    is what moves an expert; null without one. `recall_frac` is how many experts of each class were predicted to be.
    """

    right_frac: float
    repeated_frac: float
    usual_frac: float
    migration_frac: float | None
    n_migrations: int
    recall_frac: dict[str, float | None]


def accuracy(loads: Loads, bounds: Bounds = BOUNDS, new_frac: float = NEW_FRAC) -> Accuracy:
    """How well a moving average predicts the classes of `loads[step, layer, expert]`, each step from those before it.

    Judged from the third step on, where all three ways know something. Raises InputError for fewer than three steps.
    """
    if len(loads) < 3:
        raise InputError(f"{len(loads)} steps, expected at least 3 to judge predictions of each from those before")
    actual = classify(loads, bounds)[2:]
    predicted = classify(ema(loads, new_frac=new_frac), bounds)
    before, now = predicted[1:-2], predicted[2:-1]
    means = np.cumsum(loads, axis=0) / np.arange(1, len(loads) + 1)[:, None, None]
    right = now == actual
    moved = now != before
    recall = {
        name: float(right[actual == number].mean()) if (actual == number).any() else None
        for number, name in enumerate(CLASSES)
    }
    return Accuracy(
        right_frac=float(right.mean()),
        repeated_frac=float((classify(loads, bounds)[1:-1] == actual).mean()),
        usual_frac=float((classify(means, bounds)[1:-1] == actual).mean()),
        migration_frac=float(right[moved].mean()) if moved.any() else None,
        n_migrations=int(moved.sum()),
        recall_frac=recall,
    )
