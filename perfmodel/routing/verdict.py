"""Is there a hot set worth exploiting: what keeping the hottest experts resident saves over placing by size alone.

The rule and its constants are in docs/routing.md; they are the same for every recording.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from perfmodel import text

from .patterns import Shares
from .recording import Recording
from .sampling import SamplingError, held_out_curves, is_counted, sampling_error
from .statistics import active_chances, n_resident_of, selection_chances, served_curves
from .temporal import WINDOWS, HotSetOverlap, hot_set_overlap

RESIDENT_FRAC = 0.5  # of experts, where nothing else is asked for
RESIDENT_FRACS = (0.25, 0.5, 0.75)
MOST_TOKENS = 2**20  # of a batch: a gain that is left here stays
LEAST_GAIN = 0.10  # less of the offloaded assignments saved than this is no benefit ...
LARGE_GAIN = 0.25  # ... and less than this is a slight one
N_SIGMA = 3.0  # by so many standard deviations a following hot set must do better than chance
CERTAIN = 0.01  # the chance of as much skew under uniform routing from which on skew is taken for real
MOST_NAMED = 4  # layers
TINY = 1e-12  # where nothing is offloaded, nothing is saved
HOT, SLIGHT, MOVING, NONE, UNCLEAR = "hot set", "slight hot set", "moving hot set", "no benefit", "unclear"

Part = TypeVar("Part", float, Shares)


@dataclass(frozen=True)
class ResidentGain:
    """What the hottest n_resident experts of each layer serve when they are resident, mean over layers.

    `served_frac` of the assignments of the sample they were chosen in, `held_out_frac` of others (null for weights, of
    which no sample can be held out), `by_size_frac` what as many serve under uniform routing. `gain_frac` is how much
    of the offloaded assignments is saved against that, held out where known; `most_gain_frac` in the sample.
    """

    resident_frac: float
    n_resident: int
    served_frac: float
    held_out_frac: float | None
    by_size_frac: float
    gain_frac: float
    most_gain_frac: float


@dataclass(frozen=True)
class DecodeGain:
    """What the hot set saves in a batch of few tokens, where each active offloaded expert costs once: means of layers.

    Experts expected to be active, under the recorded and under uniform routing; active offloaded ones with the hottest
    resident and with as many experts resident without regard to routing; the part of them that is saved.
    """

    n_tokens: int
    n_active: float
    n_active_uniform: float
    n_offloaded_active: float
    n_offloaded_active_by_size: float
    gain_frac: float


@dataclass(frozen=True)
class Verdict:
    """Whether a hot set is worth exploiting: a label, a reason in plain words, and the figures behind them.

    `label` is `hot set`, `slight hot set`, `moving hot set` (worth a cache, not a placement), `no benefit` or
    `unclear` (too small a sample). `layer_gain_frac[layer]` is the gain it is judged by. `decode` is empty where top-k
    is unknown; `n_decode_tokens` is the largest batch in which the hot set saves LEAST_GAIN of the active offloaded
    experts, null where any does or top-k is unknown. `overlap` is of the windows whose last hot set serves the next
    best, null for too few steps; `sampling` is null for weights.
    """

    label: str
    reason: str
    gains: tuple[ResidentGain, ...]
    layer_gain_frac: Shares
    decode: tuple[DecodeGain, ...]
    n_decode_tokens: int | None
    overlap: HotSetOverlap | None
    sampling: SamplingError | None


def gain_over_size(served_frac: Part, by_size_frac: float) -> Part:
    """How much of the offloaded assignments is saved where resident experts serve more than their part by size."""
    return (served_frac - by_size_frac) / max(1.0 - by_size_frac, TINY)  # 1 - (1 - served) / (1 - by size)


def judge(
    recording: Recording,
    n_tokens: Sequence[int] = (),
    resident_frac: float = RESIDENT_FRAC,
    windows: Sequence[int] = WINDOWS,
) -> Verdict:
    """Whether a hot set of this recording is worth exploiting with resident_frac of experts in device memory.

    `n_tokens` are batches of decode to judge, where top-k is known. `windows` are steps whose hot set is tried on the
    next ones. Raises InputError for a fraction outside 0 to 1.
    """
    counts = recording.loads.sum(axis=0)
    n_experts = counts.shape[1]
    served, held_out = served_curves(counts), held_out_curves(recording.loads)
    fracs = sorted({*RESIDENT_FRACS, resident_frac})
    gains = tuple(_resident_gain(frac, served, held_out) for frac in fracs)
    judged = gains[fracs.index(resident_frac)]
    sampling = sampling_error(counts, recording.top_k) if is_counted(recording.loads) else None
    overlap = None
    if recording.is_ordered:
        found = [hot_set_overlap(recording.loads, window, judged.n_resident) for window in windows]
        overlap = max((each for each in found if each), key=lambda each: each.last_frac, default=None)
    decode, n_decode_tokens = _decode(recording, n_tokens, judged.n_resident)
    by_layer = (served if held_out is None else held_out)[:, judged.n_resident]
    layer_gain_frac = gain_over_size(by_layer, judged.by_size_frac)
    label, reason = _judged(judged, n_experts, sampling, overlap)
    if label in (NONE, SLIGHT, HOT):
        reason += _few_layers(layer_gain_frac, recording.layers, sampling)
    return Verdict(label, reason, gains, layer_gain_frac, decode, n_decode_tokens, overlap, sampling)


def _resident_gain(frac: float, served: Shares, held_out: Shares | None) -> ResidentGain:
    n_experts = served.shape[1] - 1
    n_resident = n_resident_of(frac, n_experts)
    by_size = n_resident / n_experts
    in_sample = float(served[:, n_resident].mean())
    unseen = None if held_out is None else float(held_out[:, n_resident].mean())
    most = gain_over_size(in_sample, by_size)
    least = most if unseen is None else min(gain_over_size(unseen, by_size), most)
    return ResidentGain(frac, n_resident, in_sample, unseen, by_size, least, most)


def _decode(
    recording: Recording, n_tokens: Sequence[int], n_resident: int
) -> tuple[tuple[DecodeGain, ...], int | None]:
    """The gains of batches, and the largest batch with a gain of LEAST_GAIN; it falls as batches grow."""
    if recording.top_k is None:
        return (), None
    shares, top_k = recording.shares, recording.top_k
    ranked = np.sort(selection_chances(shares, top_k), axis=1)[:, ::-1]
    uniform = selection_chances(np.full((1, shares.shape[1]), 1.0 / shares.shape[1]), top_k)

    def of(n: int) -> DecodeGain:
        chances = active_chances(ranked, n)
        n_active = float(chances.sum(axis=1).mean())
        offloaded = float(chances[:, n_resident:].sum(axis=1).mean())
        by_size = n_active * (1.0 - n_resident / shares.shape[1])
        gain = (by_size - offloaded) / max(by_size, TINY)
        return DecodeGain(n, n_active, float(active_chances(uniform, n).sum()), offloaded, by_size, gain)

    found = tuple(of(n) for n in n_tokens)
    if of(MOST_TOKENS).gain_frac >= LEAST_GAIN:
        return found, None
    return found, bisect.bisect_left(range(1, MOST_TOKENS), True, key=lambda n: of(n).gain_frac < LEAST_GAIN)


def _chance(sampling: SamplingError) -> float:
    """How likely uniform routing is as uneven, all layers taken together (Fisher's method)."""
    from scipy.stats import combine_pvalues

    return float(combine_pvalues(np.maximum(sampling.p_value, TINY)).pvalue)


def _few_layers(gain_frac: Shares, layers: NDArray[np.int64], sampling: SamplingError | None) -> str:
    """Which layers have a large gain, where they are the smaller part of them."""
    is_large = gain_frac >= LARGE_GAIN
    if sampling is not None:
        is_large &= sampling.p_value <= CERTAIN
    found = layers[is_large]
    if not 0 < len(found) < len(layers) / 2:
        return ""
    names = ", ".join(map(str, found[:MOST_NAMED])) + (", ..." if len(found) > MOST_NAMED else "")
    return (
        f" Only {len(found)} of {len(layers)} layers {'gain' if len(found) > 1 else 'gains'} much "
        f"({'layers' if len(found) > 1 else 'layer'} {names}): there the hot set saves "
        f"{text.frac(float(gain_frac[is_large].mean()))}."
    )


def _unproven(gain: ResidentGain, hot: str, served: str, even: str, is_chance: bool) -> tuple[str, str] | None:
    """The label and reason where the sample shows no gain, or one that is chance or not there elsewhere; else null."""
    chosen = f"{hot} serve {text.frac(gain.served_frac)} of the assignments they were chosen by"
    if gain.most_gain_frac < LEAST_GAIN:
        saved = text.frac(max(gain.most_gain_frac, 0.0))
        return NONE, (
            f"No benefit: {chosen}, against {even} by size alone: {saved} of offloaded assignments saved at most. "
            "Place by size, not by popularity."
        )
    if not is_chance and (gain.gain_frac + gain.most_gain_frac) / 2 < LEAST_GAIN:
        changes = " What is hot in one half is not in the other." if gain.gain_frac < gain.most_gain_frac / 2 else ""
        return NONE, (
            f"No benefit: {chosen} and {served} of others, against {even} by size alone.{changes} Place by size, not "
            "by popularity."
        )
    if not is_chance and gain.gain_frac >= LEAST_GAIN:
        return None
    also = ", and uniform routing of as few tokens could look as uneven" if is_chance else ""
    return UNCLEAR, (
        f"The sample is too small to say: {chosen}, but {served} of others ({even} by size alone){also}. Record more "
        "tokens; until then place by size."
    )


def _over_time(gain: ResidentGain, overlap: HotSetOverlap | None, is_sample: bool) -> tuple[float, float, float]:
    """Gains in the second half of hot sets chosen in the first and anew from the last window, and what of it is sure.

    Chance alone lets any set serve N_SIGMA standard deviations more; weights are taken for exact.
    """
    if overlap is None:
        return gain.gain_frac, gain.gain_frac, -1.0
    by_size = gain.by_size_frac
    deviation = np.sqrt(by_size * (1.0 - by_size) / max(overlap.n_judged, 1.0)) if is_sample else 0.0
    served = overlap.static_frac, overlap.last_frac, overlap.last_frac - N_SIGMA * float(deviation)
    kept, moved, surely_moved = (gain_over_size(each, by_size) for each in served)
    return kept, moved, surely_moved


def _judged(
    gain: ResidentGain, n_experts: int, sampling: SamplingError | None, overlap: HotSetOverlap | None
) -> tuple[str, str]:
    """The label and the reason; the first rule that holds decides (docs/routing.md, Statistics)."""
    if gain.n_resident in (0, n_experts):
        return NONE, f"With {gain.n_resident} of {n_experts} experts resident there is nothing to choose."
    hot, even = f"the hottest {gain.n_resident} of {n_experts} experts of each layer", text.frac(gain.by_size_frac)
    kept, moved, surely_moved = _over_time(gain, overlap, sampling is not None)
    if overlap is not None and kept < LEAST_GAIN <= surely_moved:
        return MOVING, (
            f"The hot set moves: {hot} in the first half of the recording serve {text.frac(overlap.static_frac)} of "
            f"assignments in the second, against {even} by size alone; chosen anew from the last "
            f"{'step' if overlap.window_steps == 1 else f'{overlap.window_steps} steps'} "
            f"{text.frac(overlap.last_frac)}. A static placement is not worth it; a cache that follows may be."
        )
    served = text.frac(gain.served_frac if gain.held_out_frac is None else gain.held_out_frac)
    figures = (
        f"{hot} serve {served} of assignments, against {even} under uniform routing: "
        f"{text.frac(max(gain.gain_frac, 0.0))} of offloaded assignments saved"
    )
    unproven = _unproven(gain, hot, served, even, sampling is not None and _chance(sampling) > CERTAIN)
    if unproven is not None:
        return unproven
    if overlap is not None and kept < LEAST_GAIN:
        return UNCLEAR, (
            f"Too few steps to say: {figures}, but those of the first half serve {text.frac(overlap.static_frac)} of "
            f"the second and those of the last window {text.frac(overlap.last_frac)}. Record more steps; until then "
            "place by size."
        )
    label, words = (HOT, "a hot set") if min(gain.gain_frac, kept) >= LARGE_GAIN else (SLIGHT, "a slight hot set")
    reason = f"There is {words}: {figures}."
    if moved >= kept + LEAST_GAIN:
        reason += (
            f" It moves over time: chosen in the first half it saves {text.frac(kept)} in the second, chosen anew from "
            f"the last window {text.frac(moved)}, so that a cache may do better than a placement."
        )
    return label, reason
