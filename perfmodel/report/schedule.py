"""Expert-parallel layers and what if, as a page and as plain values."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.report.words import WIDTH, ratio, table, wrapped

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.schedule.alternatives import Alternative, Verdict
    from perfmodel.schedule.pictured import Picture
    from perfmodel.schedule.what_if import Answer

LIKE_FRAC = 0.005  # so close to each other two latencies are alike
PADDED_FRAC = 0.5  # of the rows that the fused kernel computes, above which padding is most of its work
RESTS = (
    "Not measured: links by rate and latency, experts by the latency model, launches by number. docs/schedule.md has "
    "the formulas and what they leave out."
)


def schedule_json(found: "Answer") -> dict[str, Any]:
    """The answers as plain values."""
    question = found.question
    return {
        "shape": question.shape.name,
        "hardware": question.profile.name,
        "routing": found.routing,
        "n_gpus": question.n_gpus,
        "n_gpus_per_node": question.n_per_node,
        "n_gpus_per_host": question.n_per_host,
        "tokens_per_gpu": question.tokens_per_gpu,
        "offload_frac": question.offload_frac,
        "access": question.access if question.offload_frac else None,
        "max_over_mean": found.max_over_mean,
        "schedules": [
            {
                **one.to_json(),
                "bound_ns": one.bound_ns,
                "launch_batch": found.launch_batch[one.schedule],
                "skew_frac": found.skew_frac[one.schedule],
                "dominating_skew": asdict(skew) if (skew := found.dominating_skew[one.schedule]) else None,
            }
            for one in found.timelines
        ],
        "speedup_over": found.speedup_over,
        "unpadded_bulk_ns": found.unpadded_bulk_ns,
        "buffer_bytes": found.buffer_bytes,
        "alternatives": [one.to_json() for one in found.alternatives],
        "best": _best(found),
        "reasons": list(found.reasons),
        "notes": list(found.notes),
    }


def _best(found: "Answer") -> dict[str, Any] | None:
    from perfmodel.schedule.alternatives import verdict

    chosen = verdict(found.alternatives)
    if chosen is None:
        return None
    return {
        "n_gpus": chosen.best.n_gpus,
        "other_n_gpus": chosen.other.n_gpus if chosen.other else None,
        "gain": chosen.gain,
        "even_host_price": chosen.even_host_price,
    }


def schedule_head(found: "Answer | Picture") -> str:
    """What was asked, in one sentence."""
    question = found.question
    offloaded = f", {text.frac(question.offload_frac)} offloaded ({question.access})" if question.offload_frac else ""
    where = "" if question.n_gpus == 1 else f", {question.n_per_node} in a node"
    return (
        f"{question.shape.name} on {question.profile.title}: {text.counted(question.n_gpus, 'GPU')}{where}, "
        f"{text.counted(question.tokens_per_gpu, 'token')} on each, {found.routing}, busiest GPU "
        f"{found.max_over_mean:.2f}x the mean{offloaded}"
    )


def schedule_page(found: "Answer", width: int = WIDTH) -> str:
    """Each schedule by phase, its bound and bottleneck; what fusing, larger batches, less skew and other numbers of
    GPUs would change; what it rests on."""
    rows = found.timelines
    phases = list(dict.fromkeys(name for one in rows for name in one.phases))
    body = [
        ["latency", *(text.ns(one.latency_ns) for one in rows)],
        *(
            ["- " + name, *(text.ns(one.phases[name]) if one.phases.get(name) else "" for one in rows)]
            for name in phases
        ),
        ["bottleneck", *(one.bottleneck for one in rows)],
        ["over its bound", *(ratio(one.latency_ns / one.bound_ns) for one in rows)],
        ["- which is", *(max(one.bounds, key=lambda name: one.bounds[name]) for one in rows)],
        ["GPUs compute", *(text.frac(one.compute_busy_frac) for one in rows)],
        ["padding computed", *(text.frac(one.computed_padding_frac) for one in rows)],
    ]
    bounds = {name: sorted(one.bounds[name] for one in rows) for name in rows[0].bounds if name != "host"}
    said = ", ".join(
        f"{name} " + " to ".join(dict.fromkeys(map(text.ns, (ns[0], ns[-1])))) for name, ns in bounds.items() if ns[-1]
    )
    lines = [
        *_entry("phases", _overlap(found), width),
        *_entry("bound", f"the busiest GPU's work at full rate: {said}; and the host's time for all launches", width),
        *_entry("fusing", _fusing(found), width),
        *_entry("launches", _launches(found), width),
        *_entry("stragglers", _stragglers(found), width),
        *_entry("payload", _payload(found), width),
        *(wrapped(note, width, "note        ", " " * 12) for note in found.notes),
    ]
    parts = [
        wrapped(schedule_head(found), width),
        table(body, ["", *(one.schedule for one in rows)]),
        "\n".join(lines),
    ]
    if found.alternatives:
        parts.append(_alternatives(found, width))
    parts.append("\n".join([wrapped(RESTS, width), *(wrapped(one, width, "- ", "  ") for one in found.reasons)]))
    return "\n\n".join(parts)


def _entry(name: str, words: str, width: int) -> list[str]:
    return [wrapped(words, width, f"{name:12}", " " * 12)] if words else []


def _fusing(found: "Answer") -> str:
    """How one kernel compares with each other schedule, and what of it costs most where it loses."""
    from perfmodel.schedule.measures import TILE_ROWS
    from perfmodel.schedule.tiles import TILE_COLS

    gains, unpadded_ns = found.speedup_over, found.unpadded_bulk_ns
    if not gains:
        return ""
    rows = {one.schedule: one for one in found.timelines}
    words = [
        f"{_gain(gain)} {name}" + (f", which drops {text.frac(dropped)} of rows" if dropped else "")
        for name, gain in gains.items()
        for dropped in [rows[name].dropped_frac]
    ]
    if "bulk" in gains and unpadded_ns is not None:
        gain = gains["bulk"] * unpadded_ns / rows["bulk"].latency_ns
        words.append(f"{_gain(gain)} bulk without capacity and its padding")
    padded, why = rows["fused"].computed_padding_frac, ""
    if padded > PADDED_FRAC:
        why = f"; {text.frac(padded)} of the rows that it computes are padding of its blocks of {TILE_ROWS}"
    elif min(gains.values()) < 1:
        why = f"; it computes in tiles of {TILE_ROWS} x {TILE_COLS}, the others in whatever tiles suit"
    return f"one kernel {', '.join(words)}{why}"


def _gain(gain: float) -> str:
    if abs(gain - 1) < LIKE_FRAC:
        return "is as fast as"
    return f"is {ratio(gain)} as fast as" if gain > 1 else f"takes {ratio(1 / gain)} as long as"


def _overlap(found: "Answer") -> str:
    # Of bulk, which never overlaps, the longest of different GPUs may sum to more than the latency.
    rows = [one for one in found.timelines if one.schedule != "bulk"]
    names = [one.schedule for one in rows if sum(one.phases.values()) > one.latency_ns * (1 + 1e-6)]
    return f"of the GPU that takes longest for each; in {' and '.join(names)} they overlap" if names else ""


def _launches(found: "Answer") -> str:
    said = ", ".join(
        f"{'never' if batch is None else text.count(batch)} ({name})" for name, batch in found.launch_batch.items()
    )
    return f"tokens on each GPU from which launching adds less than 10 % of the layer: {said}"


def _stragglers(found: "Answer") -> str:
    if found.question.n_gpus == 1:
        return ""
    now = ", ".join(f"{text.frac(max(frac, 0.0))} ({name})" for name, frac in found.skew_frac.items())
    then = ", ".join(
        f"never ({name})" if skew is None else f"{skew.max_over_mean:.2f}x ({name}, power-law:{skew.exponent:.2f})"
        for name, skew in found.dominating_skew.items()
    )
    return (
        f"even routing would save {now}; rows of the busiest GPU over the mean at which it would save more than half: "
        f"{then}"
    )


def _payload(found: "Answer") -> str:
    if found.question.n_gpus == 1:
        return ""
    said = [
        f"{one.schedule} {text.n_bytes(one.sent_bytes)}"
        + (f" ({text.frac(one.padding_frac)} padding)" if one.padding_frac > 5e-4 else "")
        + (f" ({text.frac(one.dropped_frac)} of rows dropped)" if one.dropped_frac else "")
        for one in found.timelines
    ]
    return (
        f"all GPUs together send {', '.join(said)}; the fused kernel's symmetric buffer takes "
        f"{text.n_bytes(found.buffer_bytes)} on each GPU"
    )


def _alternatives(found: "Answer", width: int) -> str:
    from perfmodel.schedule.alternatives import verdict

    has_price = any(one.price is not None for one in found.alternatives)
    rows = []
    for one in found.alternatives:
        rate = one.tokens_per_s
        best = f"{text.ns(one.latency_ns[one.fastest])} ({one.fastest})" if one.latency_ns and one.fastest else "n/a"
        row = [str(one.n_gpus), str(one.n_hosts), text.count(one.tokens_per_gpu), text.frac(one.offload_frac), best]
        row += [text.count(rate), text.count(None if rate is None else rate / one.n_gpus)]
        if has_price:
            per_price = None if rate is None or not one.price else rate / one.price
            row += [text.count(one.price), "n/a" if per_price is None else f"{per_price:,.3g}"]
        rows.append(row)
    header = ["GPUs", "hosts", "tokens on each", "offloaded", "fastest", "tokens/s", "per GPU"]
    total = found.question.n_gpus * found.question.tokens_per_gpu
    words = [f"{text.counted(total, 'token')} through this layer on other numbers of GPUs:"]
    words.append(table(rows, [*header, *(["price", "tokens/s per price"] if has_price else [])]))
    words += [
        wrapped(f"{text.counted(one.n_gpus, 'GPU')}: {one.reason}", width, "- ", "  ")
        for one in found.alternatives
        if one.reason
    ]
    shared = max(-(-one.n_gpus // one.n_hosts) for one in found.alternatives)
    if any(one.offload_frac for one in found.alternatives):
        host = "each GPU has a host of its own" if shared == 1 else f"up to {shared} GPUs share a host evenly"
        words.append(wrapped(f"Offloaded experts are used by {found.question.access}; {host}.", width))
    words += [wrapped(_verdict(chosen), width)] if (chosen := verdict(found.alternatives)) else []
    return "\n".join(words)


def _verdict(found: "Verdict") -> str:
    """Which number of GPUs gives most for what it costs, and whether that turns on prices."""
    best, other = found.best, found.other
    per = "for each GPU" if best.price is None else "for their price"
    said = f"{_named(best)} give most tokens/s {per}"
    if other is None or found.gain is None:
        return f"{said}."
    said += f": {found.gain:.2f}x as many as {_named(other)}"
    if found.even_host_price is None:
        return f"{said}, whatever hosts cost."
    return f"{said}; as many where a host costs {found.even_host_price:.3g} times what a GPU costs."


def _named(one: "Alternative") -> str:
    gone = f"{text.frac(one.offload_frac)} of experts in host memory" if one.offload_frac else "all experts resident"
    return f"{text.counted(one.n_gpus, 'GPU')} ({gone})"
