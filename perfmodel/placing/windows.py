"""Steps of a batch from a recording: windows to decide on, and a later one to judge by."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.routing import Counts, Recording, Shares, drawn_counts, expected_counts

N_STEPS = 32  # of a window at least: of 8 steps the fastest placement is fast by chance
N_SEEN = 16  # assignments to the mean expert in a window: of small batches it takes more steps to see as many
MAX_STEPS = (32, 64, 64)  # of a window at most: of what is searched, of what chooses, of what judges
FITTED_FRAC = 0.5  # of the recorded steps that decide; the others judge
CHUNK_TOKENS = 8192  # of a prompt in one pass: what vLLM and SGLang set for large devices
N_FEW = 4  # recorded batches that decide: fewer may be of one topic, and what is best in them no better elsewhere
DRAWN_ONE_BY_ONE = 2**15  # tokens x experts up to which each token draws its experts without repeating one


@dataclass(frozen=True, eq=False)
class Batch:
    """Passes of so many tokens: `searched[step, layer, expert]` counts that our search goes by, `fitted` those by which
    the best of all placements is chosen, `held_out` those it is judged by. All are few of the recorded steps or drawn
    from them; the shares of experts in all steps that decide are `fitted_shares[layer, expert]`, in those that judge
    `held_out_shares`. Each pass counts `n_passes` among batches of several sizes."""

    n_tokens: int
    n_passes: float
    searched: Counts
    fitted: Counts
    held_out: Counts
    fitted_shares: Shares
    held_out_shares: Shares


def drift(batch: Batch) -> float | None:
    """How far the shares of the steps that judge are from those that choose, over how far the steps that are searched
    are from these: about 1 where routing stays as it is, more where it moved between the halves.

    Distances are total variation, means over layers, each over what the numbers of steps make of chance; null where the
    two windows that decide are the same steps.
    """

    def distance(one: Counts, other: Counts) -> float:
        first, second = (counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, None] for counts in (one, other))
        return float(np.abs(first - second).sum(axis=1).mean() / math.sqrt(1 / len(one) + 1 / len(other)))

    within = distance(batch.searched, batch.fitted)
    return distance(batch.fitted, batch.held_out) / within if within else None


def passes_of(n_prompt_tokens: int, n_output_tokens: int, n_sequences: int) -> dict[int, float]:
    """The passes that serve as many requests as there are sequences at a time, tokens: passes.

    Each prompt is a pass of its own, or several of at most CHUNK_TOKENS; it gives the first token of the output, and
    each further one is a pass over all sequences.
    """
    n_chunks, rest = divmod(n_prompt_tokens, CHUNK_TOKENS)
    found = {CHUNK_TOKENS: float(n_chunks * n_sequences)} if n_chunks else {}
    for n_tokens, n_passes in ((rest, n_sequences), (n_sequences, n_output_tokens - 1)):
        if n_tokens and n_passes:
            found[n_tokens] = found.get(n_tokens, 0.0) + n_passes
    return found


def batches(
    recording: Recording,
    sizes: dict[int, float],
    top_k: int,
    n_steps: int | None = None,
    later: Recording | None = None,
    seed: int = 0,
) -> tuple[tuple[Batch, ...], str]:
    """Batches of each size (tokens: passes) with all windows, and in words what they rest on.

    The first half of the recorded steps decides, the second judges; or all decide, and those of `later` judge. Of those
    that decide every second one is searched, and the others choose among what was found: a search fits the steps that
    it has seen too well. Where only sums were recorded, all windows are drawn from them. Within a half, consecutive
    steps are joined until they have as many tokens as the batch. Counts are taken as recorded where steps have
    exactly the tokens of the batch, else drawn from the steps' shares. A window has n_steps steps (null: N_STEPS, of
    small batches up to MAX_STEPS), or as many as were recorded.
    """
    if top_k > recording.loads.shape[2]:
        raise InputError(f"{recording.name} has {recording.loads.shape[2]} experts, fewer than top-k {top_k}")
    if later is not None and later.loads.shape[1:] != recording.loads.shape[1:]:
        raise InputError(
            f"{later.name} has {later.loads.shape[1]} layers of {later.loads.shape[2]} experts, "
            f"{recording.name} {recording.loads.shape[1]} of {recording.loads.shape[2]}"
        )
    n_recorded = len(recording.loads)
    n_fitted = max(1, round(FITTED_FRAC * n_recorded))
    if later is not None:
        parts = [(recording, slice(None)), (later, slice(None))]
    elif n_recorded > 1:
        parts = [(recording, slice(n_fitted)), (recording, slice(n_fitted, None))]
    else:
        parts = [(recording, slice(None))] * 2
    found, words = [], [_words(recording, later)]
    for number, (n_tokens, n_passes) in enumerate(sizes.items()):
        rng = np.random.default_rng([seed, number])
        decides, judges = (_joined_steps(whole, steps, n_tokens) for whole, steps in parts)
        if len(decides) < N_FEW and n_recorded > 1:
            few = "1 recorded batch" if len(decides) == 1 else f"{len(decides)} recorded batches"
            verb = "decides" if len(decides) == 1 else "decide"
            words.append(
                f"only {few} of {text.counted(n_tokens, 'token')} {verb}: what is best in so few may be chance"
            )
        halves = (decides[::2], decides[1::2]) if len(decides) > 1 else (decides, decides)
        n_enough = max(N_STEPS, math.ceil(N_SEEN * recording.loads.shape[2] / (n_tokens * top_k)))
        searched, fitted, held_out = (
            _window(steps, n_tokens, top_k, n_steps or min(n_enough, n_most), rng)
            for steps, n_most in zip((*halves, judges), MAX_STEPS, strict=True)
        )
        shares = (_shares(whole, steps) for whole, steps in parts)
        found.append(Batch(n_tokens, n_passes, searched, fitted, held_out, *shares))
    return tuple(found), "; ".join(words)


def _shares(recording: Recording, steps: slice) -> Shares:
    """The share of each expert in its layer in some steps, `[layer, expert]`; of a layer that sleeps there, in all."""
    loads = recording.loads[steps].sum(axis=0)
    loads = np.where(loads.sum(axis=1, keepdims=True) > 0, loads, recording.loads.sum(axis=0))
    shares: Shares = loads / loads.sum(axis=1, keepdims=True)
    return shares


def _words(recording: Recording, later: Recording | None) -> str:
    if later is not None:
        return f"decided on {recording.name}, judged by {later.name}"
    if len(recording.loads) > 1:
        order = "the first half" if recording.is_ordered else "one half (steps are in no order)"
        return f"decided on {order} of {recording.name}, judged by the other"
    return (
        f"{recording.name} has no steps to hold out: all windows are drawn from the same shares, which says nothing "
        "of routing that changes"
    )


def _joined_steps(recording: Recording, steps: slice, n_tokens: int) -> NDArray[np.float64]:
    """Loads `[group, layer, expert]` of some steps, consecutive ones joined until they have n_tokens tokens at least,
    the rest with the last; as recorded where tokens are not known.

    A layer that no step of a group loads has its load of all steps.
    """
    loads = recording.loads[steps]
    if recording.n_tokens is not None:
        starts, n_joined = [0], 0
        for step, n_more in enumerate(recording.n_tokens[steps].tolist()):
            if n_joined >= n_tokens:
                starts.append(step)
                n_joined = 0
            n_joined += n_more
        if n_joined < n_tokens and len(starts) > 1:
            starts.pop()
        loads = np.add.reduceat(loads, starts, axis=0)
    empty = loads.sum(axis=2) == 0
    return np.where(empty[:, :, None], recording.loads.sum(axis=0), loads) if empty.any() else loads


def _window(steps: NDArray[np.float64], n_tokens: int, top_k: int, n_steps: int, rng: np.random.Generator) -> Counts:
    """Counts `[step, layer, expert]` of n_steps batches, from steps spread evenly over those recorded."""
    chosen = steps[np.linspace(0, len(steps) - 1, n_steps).round().astype(int)] if len(steps) > n_steps else steps
    if (chosen.sum(axis=2) == n_tokens * top_k).all() and (chosen == chosen.round()).all() and chosen.max() <= n_tokens:
        return chosen.astype(np.int64)
    chosen = chosen[np.arange(n_steps) % len(chosen)]
    shares: Shares = chosen / chosen.sum(axis=2, keepdims=True)
    rows = shares.reshape(-1, shares.shape[2])
    if n_tokens * rows.shape[1] <= DRAWN_ONE_BY_ONE:
        seeds = rng.integers(2**31, size=len(rows))
        counts = np.stack([drawn_counts(row, n_tokens, top_k, int(s)) for row, s in zip(rows, seeds, strict=True)])
    else:
        counts = rng.multinomial(n_tokens * top_k, rows).astype(np.int64)
        over = counts.max(axis=1) > n_tokens  # a token selects an expert once
        if over.any():
            counts[over] = expected_counts(rows[over], n_tokens, top_k)
    return counts.reshape(shares.shape)
