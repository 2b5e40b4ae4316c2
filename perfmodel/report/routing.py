"""The page about how a recording spreads its tokens over experts, and whether that is worth anything."""

from collections.abc import Sequence

import numpy as np

from perfmodel import text
from perfmodel.report.words import BARS, table, wrapped
from perfmodel.routing import COVERED_FRACS, Comparison, ExpertsInTime, Recording, RoutingSummary, Shares, served_curves
from perfmodel.routing.verdict import LEAST_GAIN, MOVING, NONE, UNCLEAR, gain_over_size

MOST_LAYERS = 20  # rows of the table of layers
N_BARS = 12
RULE_OF_THREE = 3.0  # what n tokens never did, they do with less than 3 / n of probability (95 % confidence)
NINETY = COVERED_FRACS.index(0.9)
LEAST_COLUMNS = ("CV", "top 10 %", "effective", "cold half", "top 25 %", "chance", "Gini", "hot to cold")
LEGEND = (
    "90 % on: the fewest experts that serve 90 % of assignments; max/mean: the busiest expert over the mean, chance: "
    "what uniform routing of as many tokens exceeds in one sample of twenty; CV: standard deviation over mean; Gini: 0 "
    "even, 1 all on one; effective: as many evenly used experts would be as uncertain"
)


def routing_page(summary: RoutingSummary, width: int, n_rows: int = MOST_LAYERS) -> str:
    """The verdict first, then what it rests on: layers, resident fractions, decode batches, time, other recordings."""
    parts = [
        _header(summary.recording, width),
        wrapped(summary.verdict.reason, width),
        _layers(summary, width, n_rows),
        _warnings(summary, width),
        _resident(summary, width),
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
        lines.append(wrapped("the steps are in no known order: nothing is said of time", width))
    return "\n".join([*lines, *(wrapped(f"note: {note}", width, "", "  ") for note in recording.notes)])


def _fitting(rows: list[list[str]], header: list[str], width: int, least: Sequence[str]) -> str:
    """A table as wide as the page at most: columns of `least` are left out in their order, and named."""
    for n_out in range(len(least) + 1):
        kept = [i for i, title in enumerate(header) if title not in least[:n_out]]
        found = table([[row[i] for i in kept] for row in rows], [header[i] for i in kept])
        if max(map(len, found.splitlines())) <= width:
            break
    if not n_out:
        return found
    words = f"a wider page also has: {', '.join(least[:n_out])}"
    return f"{found}\n{wrapped(words, width, '', '  ')}"


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
    lines = [_fitting(rows, header, width, LEAST_COLUMNS)]
    if len(shown) < n_layers:
        words = f"{len(shown)} of {n_layers} layers; --top {n_layers} shows all, the mean is over all"
        lines.append(wrapped(words, width))
    covering = found.covering_frac.mean(axis=0)
    parts = [
        f"{text.frac(float(frac))} for {100 * part:.0f} %" for part, frac in zip(COVERED_FRACS, covering, strict=True)
    ]
    covered = f"experts that serve a part of assignments, mean of layers: {', '.join(parts)}"
    lines.append(wrapped(covered, width, "", "  "))
    lines.append(wrapped(_depth(summary), width, "", "  "))
    lines.append(wrapped(LEGEND, width, "", "  "))
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
    words = (
        f"most concentrated: layer {found.layers[steep]} (90 % of assignments on "
        f"{text.frac(float(found.covering_frac[steep, NINETY]))} of experts), least: layer {found.layers[flat]} "
        f"({text.frac(float(found.covering_frac[flat, NINETY]))})"
    )
    if summary.verdict.label == MOVING:  # what it saves over all steps, no placement can
        return words
    return (
        f"{words}; in {int((gains >= LEAST_GAIN).sum())} of {text.counted(len(gains), 'layer')} the hot set saves "
        f"{100 * LEAST_GAIN:.0f} % or more"
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
            f"never used: {text.counted(n_unused, 'expert')} over all layers; uniform routing of as many tokens would "
            f"leave out {by_chance:,.0f} by chance. With more tokens at least {n_unseen:,.0f} of them would be used "
            f"(Chao), by {text.frac(unseen)} of further assignments (Good-Turing); an expert not seen here may still "
            f"be selected by {100 * unnoticed:.2g} % of tokens (95 % confidence)"
        )
    return "\n".join(wrapped(line, width, "", "  ") for line in lines)


def _resident(summary: RoutingSummary, width: int) -> str:
    rows = [
        [
            text.frac(gain.resident_frac), f"{gain.n_resident}", text.frac(gain.served_frac),
            text.frac(gain.held_out_frac), text.frac(gain.by_size_frac), _saved(gain.gain_frac),
        ]
        for gain in summary.verdict.gains
    ]  # fmt: skip
    header = ["resident", "experts", "in the sample", "of unseen tokens", "by size", "saved"]
    words = "assignments that the hottest experts serve if they are resident, and the part of offloaded ones that saves"
    if summary.verdict.label == MOVING:
        words += "; over all steps at once, which no placement knows beforehand"
    return f"{wrapped(words, width, '', '  ')}\n{_fitting(rows, header, width, ('in the sample',))}"


def _saved(gain_frac: float) -> str:
    return "none" if gain_frac < 0.0005 else text.frac(gain_frac)


def _decode(summary: RoutingSummary, width: int) -> str:
    decode, top_k = summary.verdict.decode, summary.recording.top_k
    resident = text.frac(summary.resident_frac)
    if top_k is None:
        return wrapped("active experts by batch size: top-k is not known; give --top-k", width)
    if summary.verdict.label == UNCLEAR:
        return wrapped("active experts by batch size: nothing is said for so small a sample", width)
    rows = [
        [
            text.count(row.n_tokens), f"{row.n_active:,.1f}", f"{row.n_active_uniform:,.1f}",
            f"{row.n_offloaded_active:,.1f}", f"{row.n_offloaded_active_by_size:,.1f}", _saved(row.gain_frac),
        ]
        for row in decode
    ]  # fmt: skip
    words = f"experts of a layer active in a batch, and how many of them are offloaded with {resident} resident"
    header = ["tokens", "active", "if uniform", "offloaded: hottest kept", "by size", "saved"]
    found = _fitting(rows, header, width, ("if uniform",))
    return f"{wrapped(words, width, '', '  ')}\n{found}\n{wrapped(_decode_words(summary), width)}"


def _decode_words(summary: RoutingSummary) -> str:
    if summary.verdict.label == MOVING:
        return "These are for the hot set of all steps at once; as it moves, only a cache that follows saves as much."
    if summary.verdict.label == NONE:
        return "In decode the hot set saves as little, and less the larger the batch."
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
        lines.append(wrapped(words, width))
    if summary.overlaps:
        rows = [
            [
                text.counted(row.window_steps, "step"), f"{row.n_windows}", f"{row.jaccard:.2f}",
                *(text.frac(part) for part in (row.last_frac, row.average_frac, row.static_frac, row.oracle_frac,
                                               row.random_frac)),
            ]
            for row in summary.overlaps
        ]  # fmt: skip
        header = ["window", "windows", "Jaccard", "last window", "average", "first half", "itself", "random"]
        hot = text.frac(summary.overlaps[0].hot_frac)
        words = (
            f"assignments of a window that the hot {hot} of experts serve if chosen in the last window, by a moving "
            "average, in the first half of the recording, in the window itself, and at random; Jaccard: how far the "
            "hot set is that of the window before (1: the same)"
        )
        found = _fitting(rows, header, width, ("windows", "average", "Jaccard"))
        lines.append(f"{wrapped(words, width, '', '  ')}\n{found}")
    elif summary.recording.is_ordered and len(summary.recording.loads) > 1:
        lines.append(wrapped("too few steps to say whether the hot set moves", width))
    if summary.experts is not None:
        lines.append(wrapped(_in_time(summary.experts), width))
    return "\n\n".join(lines)


def _in_time(experts: ExpertsInTime) -> str:
    n_temporal = experts.is_temporal.sum(axis=1)
    cutoffs = experts.cutoffs
    least, most = 100 * cutoffs.consistent_least_frac, 100 * cutoffs.temporal_most_frac
    words = (
        f"consistent experts (used in {least:.3g} % of steps or more): "
        f"{experts.is_consistent.sum(axis=1).mean():.1f} of a layer; temporal (in {most:.3g} % or fewer, then with "
        f"{cutoffs.temporal_least_weight:g} uniform shares or more): {n_temporal.mean():.1f}"
    )
    if n_temporal.any():
        words += f", with {np.nanmean(experts.temporal_weight):.1f} uniform shares when used"
    if experts.joined_steps > 1:
        words += f"; {experts.joined_steps} steps taken together, as single ones have too few tokens"
    sizes = sorted(len(group) for layer in experts.groups for group in layer)
    if sizes:
        pair = experts.pairs[0]
        size = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
        words += (
            f". Hot together: {text.counted(len(sizes), 'group')} over all layers of {size} experts (mean correlation "
            f"{np.nanmean(experts.group_correlation):.2f}), most of all {pair.experts[0]} and {pair.experts[1]} of "
            f"layer {pair.layer} ({pair.correlation:.2f})"
        )
    return words


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
