"""What variability-aware maps gain on five models, by routing, spread of speeds and batch (docs/balance-study.md).

Nothing here is fitted to the numbers of GEM (arXiv 2605.19945); they are compared with what comes out.
"""

from dataclasses import replace
from functools import cache

import numpy as np

from perfmodel import moe
from perfmodel.hardware import hardware
from perfmodel.physics import Array
from perfmodel.placement.gem import WINDOW_STEPS, best_map, straggler_ns
from perfmodel.placement.staircase import SPREAD_IN_FLEET_FRAC, SPREAD_IN_NODE_FRAC, Staircase, spread_speeds
from perfmodel.predict import Basis, basis_of
from perfmodel.routing import SHIPPED, Shares, synthetic_counts, synthetic_steps

from .compare import BALANCED, LINEAR, N_STEPS, compare, made, steps_of
from .profiles import layer_ns_by_rows, predicted_staircase

MACHINE, N_GPUS, N_TOKENS, N_LAYERS = "h100-sxm", 4, 4096, 6
MODELS = ("mixtral-8x7b", "mixtral-8x22b", "llama-4-scout", "hunyuan-a13b", "qwen3-30b-a3b")
LASTING, BURSTY, SKEWED = "layered", "temporal:1", "skewed-temporal:1"
ROUTINGS = ("uniform", LASTING, BURSTY, "temporal:4", SKEWED, "skewed-temporal:4")
MEASURED = {"olmoe-1b-7b": "olmoe", "mixtral-8x7b": "mixtral-8x7b"}  # names of the catalogue by those in the file
AS_MEASURED = "as measured"  # of shares: the same in every step
LONG_WINDOW = 3 * WINDOW_STEPS  # beside the published one, to tell what a window of 16 steps fits by chance
SPREADS = (0.0, SPREAD_IN_NODE_FRAC, SPREAD_IN_FLEET_FRAC)
BATCHES = (64, 1024, 4096, 16_384)
STUDIED = (LINEAR, BALANCED, "lpt-speed", "gem")
Latencies = dict[str, float]  # ns of a layer by policy


def basis(model: str) -> Basis:
    """What times are predicted with: the machine's data sheet and default constants, no fitted model."""
    return basis_of(hardware(MACHINE), moe.shape(model), None)


def turns(spread_frac: float) -> list[Array]:
    """The speeds of GPUs with each of them the fastest once, for what a policy puts on the first GPU is chance."""
    speeds = spread_speeds(N_GPUS, spread_frac)
    return [np.roll(speeds, turn) for turn in range(N_GPUS if spread_frac else 1)]


@cache
def loads_of(model: str, routing: str, n_tokens: int, n_steps: int = N_STEPS) -> Array:
    """The loads of so many steps of N_LAYERS layers, `[step, layer, expert]`."""
    return steps_of(routing, replace(moe.shape(model), n_layers=N_LAYERS), n_tokens, n_steps).loads


def staircase_of(model: str, loads: Array, speeds: Array) -> Staircase:
    """The staircases of GPUs of these speeds for a model, up to all assignments of a step."""
    shares = loads.sum(axis=0) / loads.sum(axis=(0, 2))[:, None]
    return predicted_staircase(basis(model), moe.shape(model), speeds, shares, int(loads.sum(axis=2).max()))


@cache
def latencies(model: str, routing: str, spread_frac: float, n_tokens: int = N_TOKENS) -> dict[str, Latencies]:
    """The `mean` time of a layer and the `p90` over steps of the time of all layers, ns, under each policy, on the
    steps that judge; mean over the turns of speeds."""
    return _latencies(model, loads_of(model, routing, n_tokens), spread_frac)


def _latencies(model: str, loads: Array, spread_frac: float) -> dict[str, Latencies]:
    found = []
    for speeds in turns(spread_frac):
        done = compare(loads, staircase_of(model, loads, speeds), STUDIED)
        found.append([[one.layer_ns, one.step_ns["p90"]] for one in done.outcomes])
    mean, p90 = np.mean(found, axis=0).T.tolist()
    return {"mean": dict(zip(STUDIED, mean, strict=True)), "p90": dict(zip(STUDIED, p90, strict=True))}


def gain(found: Latencies, policy: str, over: str) -> float:
    """The share of the latency of one policy that another saves."""
    return 1.0 - found[policy] / found[over]


def judged_otherwise(model: str, n_tokens: int = N_TOKENS) -> tuple[Latencies, Latencies]:
    """The same as `latencies` of bursty routing at the spread of a fleet, but judged in two other ways: on the window
    that made the maps, and by each GPU's time for the rows of each of its experts, which a staircase does not see."""
    loads = loads_of(model, BURSTY, n_tokens)
    found = []
    for speeds in turns(SPREAD_IN_FLEET_FRAC):
        stairs = staircase_of(model, loads, speeds)
        maps = compare(loads, stairs, STUDIED).maps
        window, judged = loads[:WINDOW_STEPS], loads[WINDOW_STEPS:]
        seen = [float(straggler_ns(one.tokens(window), stairs).mean()) for one in maps]
        found.append([seen, [layer_ns_by_rows(one, judged, basis(model), moe.shape(model), speeds) for one in maps]])
    on_window, by_rows = np.mean(found, axis=0).tolist()
    return dict(zip(STUDIED, on_window, strict=True)), dict(zip(STUDIED, by_rows, strict=True))


def by_history(model: str, routing: str) -> dict[str, float]:
    """What maps searched on other histories than a window save over the token-balanced map of that window, on later
    steps at the spread of a fleet: by words for the history; mean over turns.

    Smoothed loads lie half way to the expert's mean in the window, even ones are that mean in all steps.
    """
    loads = loads_of(model, routing, N_TOKENS, LONG_WINDOW + N_STEPS - WINDOW_STEPS)
    history, judged = np.split(loads, [LONG_WINDOW])
    window = history[-WINDOW_STEPS:]
    even = np.broadcast_to(window.mean(axis=0), window.shape)
    histories = {
        f"{WINDOW_STEPS} steps": window,
        "smoothed": (window + even) / 2,
        "even": even,
        f"{LONG_WINDOW} steps": history,
    }
    found = []
    for speeds in turns(SPREAD_IN_FLEET_FRAC):
        stairs = staircase_of(model, loads, speeds)
        maps = [made(BALANCED, window, stairs), *(made("gem", one, stairs) for one in histories.values())]
        found.append([float(straggler_ns(one.tokens(judged), stairs).mean()) for one in maps])
    balanced, *others = np.mean(found, axis=0).tolist()
    return {words: 1.0 - ns / balanced for words, ns in zip(histories, others, strict=True)}


def against_the_best(model: str, spread_frac: float) -> tuple[float, float, float]:
    """What of a window the best of all maps and the search save over linear, and the share of layers in which the
    search found the best; mean over turns. For models of few experts."""
    loads = loads_of(model, BURSTY, N_TOKENS)[:WINDOW_STEPS]
    rows = []
    for speeds in turns(spread_frac):
        stairs = staircase_of(model, loads, speeds)
        maps = (made(LINEAR, loads, stairs), best_map(loads, stairs), made("gem", loads, stairs))
        rows.append([straggler_ns(one.tokens(loads), stairs).sum(axis=0) for one in maps])
    linear, best, found = np.array(rows).transpose(1, 0, 2)
    is_best = float((found <= best * (1 + 1e-9)).mean())
    return float(1 - best.sum() / linear.sum()), float(1 - found.sum() / linear.sum()), is_best


@cache
def measured_shares() -> dict[tuple[str, str], Shares]:
    """Shares `[layer, expert]` that others measured, by model of the catalogue and text."""
    with np.load(SHIPPED) as recorded:
        keys = [(key, *key.split("__")) for key in recorded.files]
        return {(MEASURED[model], text): recorded[key] for key, model, text in keys if model in MEASURED}


def measured_latencies(model: str, text: str, routing: str, spread_frac: float) -> Latencies:
    """The time of a layer, ns, under each policy on measured shares, drawn in steps as they are (AS_MEASURED), or times
    the bursts of BURSTY."""
    shares = measured_shares()[model, text]
    n_layers, n_experts = shares.shape
    steps = np.broadcast_to(shares, (N_STEPS, n_layers, n_experts))
    if routing == BURSTY:
        steps = steps * synthetic_steps(BURSTY, N_STEPS, n_layers, n_experts, seed=0)
    each = steps / steps.sum(axis=2, keepdims=True)
    loads = synthetic_counts(each, N_TOKENS, moe.shape(model).top_k, seed=0).astype(np.float64)
    return _latencies(model, loads, spread_frac)["mean"]
