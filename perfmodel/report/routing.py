"""The page about how a recording spreads its tokens over experts, and whether that is worth anything."""

import numpy as np

from perfmodel import text
from perfmodel.report.words import BARS, table, wrapped
from perfmodel.routing import COVERED_FRACS, Comparison, Recording, RoutingSummary, Shares, served_curves
from perfmodel.routing.verdict import LEAST_GAIN, NONE, UNCLEAR, gain_over_size

MOST_LAYERS = 20  # rows of the table of layers
N_BARS = 12
RULE_OF_THREE = 3.0  # what n tokens never did, they do with less than 3 / n of probability (95 % confidence)
NINETY = COVERED_FRACS.index(0.9)


def routing_page(summary: RoutingSummary, width: int, n_rows: int = MOST_LAYERS) -> str:
    """The verdict first, then what it rests on: layers, resident fractions, decode batches, time, other recordings."""
    parts = [
        _header(summary.recording, width),
        wrapped(summary.verdict.reason, width),
        _layers(summary, width, n_rows),
        _warnings(summary, width),
        _resident(summary),
        _decode(summary, width),
        _time(summary, width),
        *(_against(each, width) for each in summary.comparisons),
    ]
    return "\n\n".join(part for part in parts if part)


def _header(recording: Recording, width: int) -> str:
    n_steps, n_layers, n_experts = recording.loads.shape
    places = recording.layers
    known = [
        text.counted(n_steps, "step"),
        f"{text.counted(n_layers, 'layer')} ({places.min()}{f' to {places.max()}' if n_layers > 1 else ''})",
        text.counted(n_experts, "expert"),
        "top-k unknown" if recording.top_k is None else f"top-{recording.top_k}",
    ]
    n_tokens = recording.n_tokens
    if n_tokens is not None:
        known.append(text.counted(int(n_tokens.sum()), "token"))
    else:
        loads = recording.loads.sum(axis=(0, 2))
        known.append(f"{text.count(float(loads.mean()))} assignments a layer, tokens unknown")
    lines = [wrapped(f"{recording.name}: {', '.join(known)}", width, "", "  ")]
    if n_steps > 1 and not recording.is_ordered:
        lines.append("the steps are in no known order: nothing is said of time")
    return "\n".join([*lines, *(wrapped(f"note: {note}", width, "", "  ") for note in recording.notes)])


def load_bars(shares: Shares, n_bars: int = N_BARS) -> str:
    """The loads of one layer `[expert]`, hottest to coldest, as bars against the hottest; no load has none."""
    curve = served_curves(shares[None, :])[0]
    edges = np.linspace(0, len(shares), min(n_bars, len(shares)) + 1)
    heights = np.diff(np.interp(edges, np.arange(len(curve)), curve))
    places = np.ceil(heights / heights.max() * len(BARS) - 1e-9).astype(int)
    return "".join(f" {BARS}"[place] for place in places)


def _layers(summary: RoutingSummary, width: int, n_rows: int) -> str:
    found, sampling = summary.layers, summary.verdict.sampling
    shares = summary.recording.shares
    n_layers = len(found.layers)
    columns = [
        found.n_active, found.covering_frac[:, NINETY], found.hottest_frac, found.hottest_tenth_frac,
        found.hottest_quarter_frac, found.coldest_half_frac, found.max_over_mean,
        sampling.uniform_max_over_mean_high if sampling else np.full(n_layers, np.nan),
        found.variation, found.gini, found.n_effective,
    ]  # fmt: skip
    shown = np.unique(np.linspace(0, n_layers - 1, min(max(n_rows, 1), n_layers)).round().astype(int))
    rows = [
        [f"{found.layers[i]}", *_cells([float(column[i]) for column in columns]), load_bars(shares[i])] for i in shown
    ]
    if n_layers > 1:
        mean = _cells([float(column.mean()) for column in columns])
        rows.append(["mean", *mean, load_bars(np.diff(served_curves(shares).mean(axis=0)))])
    header = ["layer", "active", "90 % on", "hottest", "top 10 %", "top 25 %", "cold half", "max/mean", "chance", "CV",
              "Gini", "effective", "hot to cold"]  # fmt: skip
    lines = [table(rows, header)]
    if len(shown) < n_layers:
        lines.append(f"{len(shown)} of {n_layers} layers; --top {n_layers} shows all, the mean is over all")
    covering = found.covering_frac.mean(axis=0)
    parts = [
        f"{text.frac(float(frac))} for {100 * part:.0f} %" for part, frac in zip(COVERED_FRACS, covering, strict=True)
    ]
    covered = f"experts that serve a part of assignments, mean of layers: {', '.join(parts)}"
    lines.append(wrapped(covered, width, "", "  "))
    lines.append(wrapped(_depth(summary), width, "", "  "))
    return "\n".join(line for line in lines if line)


def _cells(values: list[float]) -> list[str]:
    n_active, ninety, hottest, tenth, quarter, cold, busiest, chance, variation, gini, effective = values
    return [
        f"{n_active:,.0f}" if n_active == int(n_active) else f"{n_active:,.1f}",
        f"{100 * ninety:.0f} %",
        *(text.frac(value) for value in (hottest, tenth, quarter, cold)),
        f"{busiest:.2f}",
        "n/a" if np.isnan(chance) else f"{chance:.2f}",
        f"{variation:.2f}", f"{gini:.2f}", f"{effective:,.1f}",
    ]  # fmt: skip


def _depth(summary: RoutingSummary) -> str:
    found = summary.layers
    gains = summary.verdict.layer_gain_frac
    if len(gains) < 2 or summary.verdict.label == UNCLEAR:
        return ""
    steep, flat = int(np.argmax(found.gini)), int(np.argmin(found.gini))
    return (
        f"most concentrated: layer {found.layers[steep]} (90 % of assignments on "
        f"{text.frac(float(found.covering_frac[steep, NINETY]))} of experts), least: layer {found.layers[flat]} "
        f"({text.frac(float(found.covering_frac[flat, NINETY]))}); in {int((gains >= LEAST_GAIN).sum())} of "
        f"{text.counted(len(gains), 'layer')} the hot set saves {100 * LEAST_GAIN:.0f} % or more"
    )


def _warnings(summary: RoutingSummary, width: int) -> str:
    found, sampling = summary.layers, summary.verdict.sampling
    n_experts = summary.recording.loads.shape[2]
    lines = []
    if sampling is None:
        lines.append("the loads are no whole numbers: how far chance made them cannot be told")
    n_unused = int((n_experts - found.n_active).sum())
    if n_unused and sampling is None:
        lines.append(f"never used: {text.counted(n_unused, 'expert')} over all layers")
    elif n_unused and sampling is not None:
        n_tokens = float(found.n_assignments.min()) / (summary.recording.top_k or 1)
        by_chance, n_unseen = float(sampling.n_unused_by_chance.sum()), float(sampling.n_unseen.sum())
        unseen, unnoticed = float(sampling.unseen_frac.mean()), min(RULE_OF_THREE / n_tokens, 1.0)
        lines.append(
            f"never used: {text.counted(n_unused, 'expert')} over all layers. Small samples miss experts: "
            f"uniform routing of as many tokens would leave out {by_chance:,.0f}. Of these, more would wake at least "
            f"{n_unseen:,.0f} (Chao), for {text.frac(unseen)} of further assignments (Good-Turing), and any may serve "
            f"{100 * unnoticed:.2g} % of tokens unnoticed"
        )
    return "\n".join(wrapped(line, width, "", "  ") for line in lines)


def _resident(summary: RoutingSummary) -> str:
    rows = [
        [
            text.frac(gain.resident_frac), f"{gain.n_resident}", text.frac(gain.served_frac),
            text.frac(gain.held_out_frac), text.frac(gain.by_size_frac), _saved(gain.gain_frac),
        ]
        for gain in summary.verdict.gains
    ]  # fmt: skip
    header = ["resident", "experts", "hottest serve", "of unseen tokens", "uniform", "offloaded assignments saved"]
    return table(rows, header)


def _saved(gain_frac: float) -> str:
    return "none" if gain_frac < 0.0005 else text.frac(gain_frac)


def _decode(summary: RoutingSummary, width: int) -> str:
    decode, top_k = summary.verdict.decode, summary.recording.top_k
    resident = text.frac(summary.resident_frac)
    if top_k is None:
        return "active experts by batch size: top-k is not known; give --top-k"
    if summary.verdict.label == UNCLEAR:
        return "active experts by batch size: nothing is said for so small a sample"
    rows = [
        [
            text.count(row.n_tokens), f"{row.n_active:,.1f}", f"{row.n_active_uniform:,.1f}",
            f"{row.n_offloaded_active:,.1f}", f"{row.n_offloaded_active_by_size:,.1f}", _saved(row.gain_frac),
        ]
        for row in decode
    ]  # fmt: skip
    header = ["batch tokens", "active experts", "uniform", f"offloaded, hottest {resident} kept", "by size", "saved"]
    return f"{table(rows, header)}\n{wrapped(_decode_words(summary), width)}"


def _decode_words(summary: RoutingSummary) -> str:
    if summary.verdict.label == NONE:
        return "In decode the hot set saves no more than that, and less the larger the batch."
    most, least = summary.verdict.n_decode_tokens, f"{100 * LEAST_GAIN:.0f} %"
    if most is None:
        return f"Decode: the hot set saves {least} or more of the experts to be copied, however large the batch."
    first = (
        f"Decode: up to {text.counted(most, 'token')} a step the hot set saves {least} or more of the experts to copy."
        if most
        else f"Even a single token uses too many experts for the hot set to save {least} of those to copy."
    )
    return (
        f"{first} In larger batches and in prefill nearly as many are active with it as without, and copying offloaded "
        "weights costs the same; it then only saves assignments that are computed off the device."
    )


def _time(summary: RoutingSummary, width: int) -> str:
    lines = []
    if len(summary.recording.loads) > 1:
        words = f"a step used {summary.n_active_per_step:,.1f} experts of a layer"
        if summary.n_active_independent is not None:
            words += f"; independent tokens would use {summary.n_active_independent:,.1f}"
        lines.append(words)
    if summary.overlaps:
        rows = [
            [
                text.counted(row.window_steps, "step"), f"{row.n_windows}", f"{row.jaccard:.2f}",
                *(text.frac(part) for part in (row.last_frac, row.average_frac, row.static_frac, row.oracle_frac,
                                               row.random_frac)),
            ]
            for row in summary.overlaps
        ]  # fmt: skip
        header = ["window", "windows", "Jaccard", "last window's", "moving average's", "first half's", "its own",
                  "random"]  # fmt: skip
        lines.append(
            f"what the hot {text.frac(summary.overlaps[0].hot_frac)} of experts serve of later windows\n"
            + table(rows, header)
        )
    elif summary.recording.is_ordered and len(summary.recording.loads) > 1:
        lines.append("too few steps to say whether the hot set moves")
    experts = summary.experts
    if experts is None:
        return "\n\n".join(lines)
    n_temporal = experts.is_temporal.sum(axis=1)
    words = (
        f"consistent experts (used in nearly every {'step' if experts.joined_steps == 1 else 'window'}): "
        f"{experts.is_consistent.sum(axis=1).mean():.1f} of a layer; temporal (rarely, then much): "
        f"{n_temporal.mean():.1f}"
    )
    if n_temporal.any():
        words += f", with {np.nanmean(experts.temporal_weight):.1f} times a uniform share when used"
    if experts.joined_steps > 1:
        words += f"; {experts.joined_steps} steps taken together, as single ones have too few tokens"
    groups = [group for layer in experts.groups for group in layer]
    if groups:
        pair = experts.pairs[0]
        words += (
            f". Hot together: {text.counted(len(groups), 'group')} over all layers of {len(min(groups, key=len))} to "
            f"{len(max(groups, key=len))} experts (mean correlation {np.nanmean(experts.group_correlation):.2f}), most "
            f"of all {pair.experts[0]} and {pair.experts[1]} of layer {pair.layer} ({pair.correlation:.2f})"
        )
    return "\n\n".join([*lines, wrapped(words, width)])


def _against(comparison: Comparison, width: int) -> str:
    known = comparison.rank_correlation[~np.isnan(comparison.rank_correlation)]
    rho = f"rank correlation of experts {known.mean():.2f} (least {known.min():.2f}); " if len(known) else ""
    served, own = float(comparison.served_frac.mean()), float(comparison.own_frac.mean())
    kept = comparison.kept_frac
    words = "" if kept is None else f", which is {100 * kept:.0f} % of what its own would gain over placing by size"
    if gain_over_size(own, comparison.by_size_frac) >= LEAST_GAIN > gain_over_size(served, comparison.by_size_frac):
        words += ": a placement chosen here is of no use there"
    return wrapped(
        f"against {comparison.name}: {rho}the hot set chosen here serves {text.frac(served)} of its assignments, its "
        f"own {text.frac(own)}, as many at random {text.frac(comparison.by_size_frac)}{words}",
        width,
        "",
        "  ",
    )
