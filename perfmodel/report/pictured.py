"""Which schedule is fastest and why, and how that changes with batch and skew, in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfmodel import text
from perfmodel.report.schedule import LIKE_FRAC
from perfmodel.report.words import WIDTH, ratio, table, wrapped

if TYPE_CHECKING:  # these bring scipy, which reading a trace does not need
    from perfmodel.schedule.curves import Curve
    from perfmodel.schedule.pictured import Picture

LEAST_FRAC = 0.05  # of a layer; what would save less is not worth a word
CHANGES = {
    "skew": "even routing (move or copy popular experts: perfmodel balance)",
    "launches": "launches that more work hides (larger batches, CUDA graphs)",
    "communication": "hidden communication (a faster link, more overlap, fewer rows over it)",
    "offload": "all experts in device memory (more GPUs)",
    "padding": "no padding to capacity",
}


def fastest_words(found: "Picture") -> str:
    """Which schedule is fastest, and by how much, in one sentence."""
    first, *others = found.ranked
    said = f"{first.schedule} is fastest: {text.ns(first.latency_ns)}"
    gains = [(one.latency_ns / first.latency_ns, one.schedule) for one in others]
    ratios = [
        f"{ratio(gain)} as fast as {name}" if gain > 1 + LIKE_FRAC else f"no faster than {name}" for gain, name in gains
    ]
    return f"{said}, {' and '.join(ratios)}." if ratios else f"{first.schedule} takes {text.ns(first.latency_ns)}."


def why_words(found: "Picture") -> str:
    """What binds the fastest schedule, and what would shorten it, each by itself; one sentence each."""
    first = found.ranked[0]
    levers = [
        f"{CHANGES[name]} {text.frac(share)}"
        for name, share in found.levers(first.schedule).items()
        if share >= LEAST_FRAC
    ]
    would = (
        f"Each by itself would save: {'; '.join(levers)}."
        if levers
        else "Nothing beside faster computing would save much."
    )
    return f"Shortening {first.bottleneck} would shorten it most. {would}"


def schedule_facts(found: "Picture") -> list[list[str]]:
    """What sets the schedules of a layer apart: rows of a name and a word for each schedule."""
    rows, waits = found.timelines, found.breakdowns
    saved = [found.skew_frac[one.schedule] for one in rows]
    return [
        ["communication hidden", *(text.frac(one.hidden_frac) for one in waits)],
        ["O_e = T(2) / T(N)", *(_two(found.overlap_efficiency[one.schedule]) for one in rows)],
        ["even routing saves", *(text.frac(max(frac, 0.0)) for frac in saved)],
        ["longest computing GPU", *(str(one.gpu) for one in waits)],
        ["launches on each GPU", *(text.count(one.n_launches) for one in rows)],
        ["sent by all GPUs", *(text.n_bytes(one.sent_bytes) for one in rows)],
        ["- of it padding", *(text.frac(one.padding_frac) for one in rows)],
        ["rows dropped", *(text.frac(one.dropped_frac) for one in rows)],
        ["bottleneck", *(one.bottleneck for one in rows)],
        ["over its bound", *(ratio(one.latency_ns / one.bound_ns) for one in rows)],
    ]


def stretch_words(found: "Curve") -> str:
    """Which schedule is the fastest where along a curve, in one sentence."""
    from perfmodel.schedule.curves import TOKENS

    is_batch = found.along == TOKENS
    stretches = found.stretches
    where = "tokens on each GPU" if is_batch else "the exponent of the power law"
    span = [text.count(x) if is_batch else f"{x:g}" for x in (found.at[0], found.at[-1])]
    if len(stretches) == 1:
        return f"{stretches[0].schedule} is fastest from {span[0]} to {span[1]} ({where})."

    def value(x: float) -> str:
        return text.count(float(f"{x:.2g}")) if is_batch else f"{x:.2f}"

    said = [f"{stretches[0].schedule} is fastest up to about {value(stretches[0].high or 0.0)}"]
    said += [
        f"{one.schedule} from there to about {value(one.high)}" if one.high is not None else f"{one.schedule} beyond"
        for one in stretches[1:]
    ]
    return f"{', '.join(said)} ({where})."


def pictured_page(found: "Picture", curves: "Sequence[Curve]", width: int = WIDTH) -> str:
    """Where the slowest GPU's time goes under each schedule, and how many times as fast as bulk along both curves."""
    from perfmodel.schedule.curves import TOKENS
    from perfmodel.schedule.pictured import PARTS

    rows = found.breakdowns
    names = [name for name in PARTS if any(name in one.parts for one in rows)]
    moved = ("dispatch", "combine")
    body = [
        [
            f"{name} (not hidden)" if name in moved else name,
            *(text.ns(one.parts[name]) if name in one.parts else "" for one in rows),
        ]
        for name in names
    ]
    body += schedule_facts(found)
    blocks = [
        wrapped(f"{fastest_words(found)} {why_words(found)}", width),
        "time of the GPU that computes longest; it sums to the latency\n"
        + table(body, ["", *(one.schedule for one in rows)]),
    ]
    for curve in curves:
        speedups, is_batch = curve.speedups, curve.along == TOKENS
        lines = [
            [text.count(x) if is_batch else f"{x:g}", text.ns(curve.latency_ns[curve.base][i])]
            + [ratio(own[i]) for name, own in speedups.items() if name != curve.base]
            for i, x in enumerate(curve.at)
        ]
        head = ["tokens on each GPU" if is_batch else "exponent of power law", curve.base]
        blocks.append(table(lines, [*head, *(name for name in speedups if name != curve.base)]))
        blocks.append(wrapped(stretch_words(curve), width))
    return "\n\n".join(blocks)


def _two(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"
