"""docs/balance-study.md as text: every number on it is computed here by `study`, or read from a table that it wrote."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from perfmodel import moe
from perfmodel.markdown import table, wrapped
from perfmodel.placement.staircase import saved_frac

from .compare import BALANCED, LINEAR, N_STEPS
from .study import (
    AS_MEASURED,
    BATCHES,
    BURSTY,
    LASTING,
    LONG_WINDOW,
    MACHINE,
    MODELS,
    N_GPUS,
    N_LAYERS,
    N_TOKENS,
    ROUTINGS,
    SKEWED,
    SPREADS,
    against_the_best,
    by_history,
    gain,
    judged_otherwise,
    latencies,
    loads_of,
    measured_latencies,
    measured_shares,
    staircase_of,
    turns,
)

# Of latency end to end, and of the 90th percentile of the time per output token.
PUBLISHED_MEAN_FRAC, PUBLISHED_MAX_FRAC, PUBLISHED_QWEN_FRAC, PUBLISHED_P90_FRAC = 0.079, 0.165, 0.015, 0.091
FFN_FRAC = 2 / 3  # of the compute of a token are at most the experts, as GEM's introduction has it
SEVERAL = ROUTINGS[1:]  # routings with something to gain
GROWING = (LASTING, BURSTY, SKEWED)  # those of which the page asks whether gains grow with the spread
NODE, FLEET = SPREADS[1:]

HEAD = """# Experts on GPUs of unequal speed: what comes out of it

Made by `python docs/regenerate.py`; do not edit. GEM (arXiv 2605.19945) puts experts on GPUs so that none is waited
for, and reports what that gains on four GPUs. This page asks what our reading of it gains where the published traces
and times are not to be had. Nothing here was measured by us, and nothing was tuned to the published numbers.
[balance.md](balance.md) has the definitions.
"""


def page() -> str:
    """The page."""
    sections = [HEAD, _setting(), _by_routing(), _by_spread(), _claims(), _by_batch(), _unseen(), _histories(), _best()]
    blocks = "\n".join([*sections, _measured(), _plan()]).split("\n\n")
    return "\n\n".join(map(wrapped, blocks)).rstrip("\n") + "\n"


def write(docs: Path) -> None:
    """Write balance-study.md into a folder."""
    (docs / "balance-study.md").write_text(page(), encoding="utf-8")


def _percent(value: float) -> str:
    return f"{100 * value + 0.0:.1f}".replace("-0.0", "0.0")


def _gains(model: str, routing: str, spread_frac: float, n_tokens: int = N_TOKENS) -> tuple[float, float]:
    """What the search saves over linear and over token-balanced maps."""
    found = latencies(model, routing, spread_frac, n_tokens)["mean"]
    return gain(found, "gem", LINEAR), gain(found, "gem", BALANCED)


def _names(routings: Sequence[str]) -> str:
    return " / ".join(f"`{routing}`" for routing in routings)


def _pair(gains: tuple[float, float]) -> str:
    return " / ".join(map(_percent, gains))


def _setting() -> str:
    return f"""## One setting for everything below

On {N_GPUS} GPUs: the times of `{MACHINE}` by its data sheet with default constants (no fitted model), from the
router's logits on; bf16; {N_TOKENS:,} tokens a step over all GPUs; {N_LAYERS} layers of each model; {N_STEPS} steps, of
which 16 make the map and the others judge it. Speeds lie evenly apart over the spread (ours), and each result is the
mean of four turns in which each GPU is the fastest once: token balance puts the hottest expert on the first GPU, and
whether that one is fast is chance. Gains are shares of the latency of the routed experts, in per cent. Routings are
those of [routing.md](routing.md); the bursty ones copy what GEM reports of real traces and are no traces.
"""


def _by_routing() -> str:
    rows = [[name, *(_pair(_gains(name, routing, FLEET)) for routing in ROUTINGS)] for name in MODELS]
    shares = [latencies(name, routing, FLEET)["mean"] for name in MODELS for routing in SEVERAL]
    n_below = sum(found["gem"] < found["lpt-speed"] for found in shares)
    return f"""## By routing, at a spread of {_percent(FLEET)} %

Saved by the search over the linear map / over the token-balanced map (longest first, equally many experts each).

{table(["model", *(f"`{routing}`" for routing in ROUTINGS)], rows)}
Under `temporal` most of what is gained over the linear map is token balance, which knows no speeds. What speeds add is
the second number, and it needs experts that are not alike: `layered` has them, the same in every step, and
`skewed-temporal`, which is the product of both, in bursts. Experts of real models differ and are bursty, so that this
is the routing closest to GEM's. Longest first by the speeds of GPUs (`lpt-speed`), which knows only sums, is the better
map in {len(shares) - n_below} of {len(shares)} cases. With eight experts on four GPUs there are few maps to choose
from, and the slowest GPU has to take two.
"""


def _by_spread() -> str:
    rows = [[name, *(_pair(_gains(name, r, spread)) for r in GROWING for spread in SPREADS)] for name in MODELS]
    header = ["model", *(f"`{routing}`, {_percent(spread)} %" for routing in GROWING for spread in SPREADS)]
    return f"""## By spread of speeds

Saved over linear / over token-balanced maps. {_percent(NODE)} % is what GEM measured in one node of eight L40s,
{_percent(FLEET)} % over 128 of them.

{table(header, rows)}
Under `{BURSTY}` the gain over the linear map falls with the spread: its experts of a kind are alike, so that of equally
many experts the slowest GPU can hardly be given less; whatever the map, some burst meets it, and the slower it is the
more often all maps wait for it. Where experts differ too, the slowest GPU gets those that seldom matter.
"""


def _claims() -> str:
    even = max(abs(value) for name in MODELS for value in _gains(name, "uniform", 0.0))
    uniform = max(abs(value) for name in MODELS for value in _gains(name, "uniform", FLEET))
    grows = [
        f"{sum(all(a < b for a, b in pairwise(_gains(m, r, spread)[over] for spread in SPREADS)) for m in MODELS)}"
        for over in (0, 1)
        for r in GROWING
    ]
    over_linear = {routing: [_gains(name, routing, FLEET)[0] for name in MODELS] for routing in SEVERAL}
    p90 = {
        routing: [gain(latencies(name, routing, FLEET)["p90"], "gem", LINEAR) for name in MODELS] for routing in SEVERAL
    }
    over_lpt = {routing: [_gains(name, routing, FLEET)[1] for name in MODELS] for routing in SEVERAL}

    def several(values: dict[str, list[float]], of: str) -> str:
        figures = [getattr(np, of)(found) for found in values.values()]
        return " / ".join(f"{_percent(x)} ({_percent(FFN_FRAC * x)})" for x in figures)

    qwen = [r for r, found in over_linear.items() if found[MODELS.index("qwen3-30b-a3b")] == min(found)]
    rows = [
        ["equal GPUs, even routing: nothing", f"at most {_percent(even)} either way"],
        ["uniform routing, unequal GPUs: nearly nothing", f"at most {_percent(uniform)} either way"],
        [
            "the gain grows with the spread",
            f"of {len(MODELS)} models under {_names(GROWING)}: over linear {' / '.join(grows[: len(GROWING)])}, "
            f"over token balance {' / '.join(grows[len(GROWING) :])}",
        ],
        [f"mean {_percent(PUBLISHED_MEAN_FRAC)} % end to end", several(over_linear, "mean")],
        [f"at most {_percent(PUBLISHED_MAX_FRAC)} % end to end", several(over_linear, "max")],
        [f"mean {_percent(PUBLISHED_P90_FRAC)} % of the p90 time per output token", several(p90, "mean")],
        ["mean end to end against token balance", several(over_lpt, "mean")],
        [
            f"Qwen3-30B-A3B gains least, {_percent(PUBLISHED_QWEN_FRAC)} % end to end",
            f"least of the five over linear under {_names(qwen) or 'none'}",
        ],
    ]
    return f"""## What GEM states, and what comes out

Gains in the last rows are over the linear map at a spread of {_percent(FLEET)} %, under {_names(SEVERAL)}. In
parentheses: the same if experts are two thirds of the time, the most that GEM's introduction grants; attention and
communication, which no map of experts shortens, are not modelled.

{table(["statement", "comes out, per cent"], rows)}
Against the linear map more comes out than is published; against token balance somewhat less where experts differ
(`layered`, `skewed-temporal`), and next to nothing where those of a kind are alike. That proves little either way: the
routing decides, and that of the paper's tasks is not published; nor are its GPUs' speeds, its batches, or, as far as we
could read, against which map it compares. Qwen3-30B-A3B is said to gain little because its routing is nearly uniform,
which is the `uniform` column; made as bursty as the others it gains least, or nearly so, all the same, for a GPU's many
small experts average out.
"""


def _by_batch() -> str:
    rows = [[name, *(_pair(_gains(name, BURSTY, FLEET, n_tokens)) for n_tokens in BATCHES)] for name in MODELS]
    return f"""## By batch, `{BURSTY}` at a spread of {_percent(FLEET)} %

{table(["model", *(f"{n:,} tokens" for n in BATCHES)], rows)}
Small batches read weights: time then follows the experts that are woken and not the tokens, and a staircase of tokens
is the wrong profile (next section).
"""


def _unseen() -> str:
    rows = []
    for name in MODELS:
        row = [name]
        for n_tokens in (BATCHES[0], N_TOKENS):
            window, by_rows = judged_otherwise(name, n_tokens)
            for found in (window, latencies(name, BURSTY, FLEET, n_tokens)["mean"], by_rows):
                row.append(_pair((gain(found, "gem", LINEAR), gain(found, "gem", BALANCED))))
        rows.append(row)
    header = [f"{n:,} tokens: {how}" for n in (BATCHES[0], N_TOKENS) for how in ("on the window", "later", "by rows")]
    return f"""## What a window promises, and what a staircase does not see

The same maps, judged on the 16 steps that made them; on later steps; and on later steps by the latency model with the
rows of every expert, tile by tile, where a staircase knows only how many tokens a GPU has. `{BURSTY}`, spread
{_percent(FLEET)} %, over linear / over token-balanced.

{table(["model", *header], rows)}
The window flatters, and by how much is what bursts cost: a map that fits 16 steps fits the next ones less. At
{N_TOKENS:,} tokens the rows of experts change little. At {BATCHES[0]} they undo it: a GPU with few tokens may have as
many experts to read as one with many, so that maps made from tokens lose. GEM's profile is one for large
batches; `perfmodel balance` shows both times and chooses by rows.
"""


def _histories() -> str:
    found = {(name, routing): by_history(name, routing) for name in MODELS for routing in (BURSTY, SKEWED)}
    words = list(next(iter(found.values())))
    rows = [[name, f"`{r}`", *(_percent(one[history]) for history in words)] for (name, r), one in found.items()]
    n_better = [sum(one[history] > one[words[0]] for one in found.values()) for history in words]
    return f"""## Other histories than a window

What the search saves over the token-balanced map of a window of 16 steps, on the same later steps at a spread of
{_percent(FLEET)} %, when it is given that window; its loads smoothed, half way to the mean of each expert; that mean in
every step; or the {LONG_WINDOW} steps that end with the window.

{table(["model", "routing", *words], rows)}
More steps are better than the window in {n_better[3]} of {len(rows)} cases, smoothed ones in {n_better[1]}, means in
{n_better[2]}. So what bursts happened together is worth knowing, though chance is part of it, and the remedy for chance
is a longer window, not a smoother one.
"""


def _best() -> str:
    rows = []
    for name in MODELS[:2]:
        best, found, is_best = against_the_best(name, FLEET)
        rows.append([name, _percent(best), _percent(found), f"{100 * is_best:.0f} %"])
    return f"""## Against the best of all maps

Eight experts on four GPUs have 2,520 maps, which can all be tried. Saved on the window itself over linear, `{BURSTY}`,
spread {_percent(FLEET)} %.

{table(["model", "best of all", "search", "layers in which the search found it"], rows)}"""


def measured_row(model: str, text: str) -> dict[tuple[str, float], tuple[float, float]]:
    """What the search saves on measured shares over linear and over token-balanced maps, by routing and spread."""
    columns = [(routing, spread) for routing in (AS_MEASURED, BURSTY) for spread in SPREADS]
    found = {column: measured_latencies(model, text, *column) for column in columns}
    return {column: (gain(one, "gem", LINEAR), gain(one, "gem", BALANCED)) for column, one in found.items()}


def _measured() -> str:
    gains = {(model, text): measured_row(model, text) for model, text in measured_shares()}
    body = [[model, text, *map(_pair, one.values())] for (model, text), one in gains.items()]
    header = [f"{routing}, {_percent(spread)} %" for routing, spread in next(iter(gains.values()))]
    n_grows = sum(
        all(a[1] < b[1] for a, b in pairwise(one[BURSTY, spread] for spread in SPREADS)) for one in gains.values()
    )
    means = {r: tuple(np.mean([one[r, FLEET] for one in gains.values()], axis=0)) for r in (AS_MEASURED, BURSTY)}
    times = {r: _pair((FFN_FRAC * means[r][0], FFN_FRAC * means[r][1])) for r in means}
    return f"""## Measured shares

Shares of three layers each that others measured over whole texts, drawn as steps of {N_TOKENS:,} tokens: real skew, as
measured without bursts, and times the bursts of `{BURSTY}`, which are made. Over linear / over token-balanced maps.

{table(["model", "text", *header], body)}
Means at {_percent(FLEET)} %: {_pair(means[AS_MEASURED])} as measured, {_pair(means[BURSTY])} with bursts; if experts
are two thirds of the time, {times[AS_MEASURED]} and {times[BURSTY]}, where GEM states {_percent(PUBLISHED_MEAN_FRAC)}
for its own models, tasks and GPUs. With bursts the gain over token balance grows with the spread in {n_grows} of
{len(gains)} rows.
"""


def _plan() -> str:
    rows = []
    for name in MODELS:
        loads = loads_of(name, BURSTY, N_TOKENS)
        counts = staircase_of(name, loads, turns(0.0)[0]).boundaries
        most = moe.shape(name).top_k * N_TOKENS
        rows.append([name, f"{most:,}", str(len(counts)), _percent(saved_frac(counts))])
    return f"""## What timing at tile boundaries saves

{table(["model", "most assignments of a step", "token counts to time", "saved against every count"], rows)}
GEM times its GPUs in 2.13 minutes and maps Llama-4-Scout in 8.8 seconds. The search here takes a second or a few for
all layers of a model, on one core.
"""
