"""The text page of a roofline: ceilings, ridge points, and what stands below and costs most."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.report.words import N_TOP, WIDTH, table, wrapped

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which reading a trace does not need
    from perfmodel.roofline import Roofline

MOST_WORDS = 22  # characters of a name
NO_DATASHEET = "no datasheet peaks are known of this machine: ceilings are what it reached"
COSTLIEST_HEADER = ["lost", "share of time", "of roof", "bound", "operation", "shape", "tokens", "routing"]
COSTLIEST_HEADER += ["rows/expert", "mostly"]


def roofline_page(found: "Roofline", n_top: int = N_TOP) -> str:
    """Ceilings with what they rest on, both sorts side by side, and the points that lose most time below their roof."""
    n_columns = 4 if found.nominal is None else len(CEILINGS_HEADER)
    ceilings = table([row[:n_columns] for row in ceiling_rows(found)], CEILINGS_HEADER[:n_columns])
    blocks = [f"{found.title}, {found.dtype}", ceilings]
    if found.nominal is None:
        blocks.append(NO_DATASHEET)
    blocks.append(wrapped(lost_words(found), WIDTH))
    rows = costliest_rows(found, n_top)
    if rows:
        used = [i for i in range(len(COSTLIEST_HEADER)) if any(row[i] for row in rows)]
        blocks.append(table([[row[i] for i in used] for row in rows], [COSTLIEST_HEADER[i] for i in used]))
    return "\n\n".join(blocks)


CEILINGS_HEADER = ["ceiling", "reached", "rests on", "ridge point", "nominal", "according to", "its ridge point"]


def ceiling_rows(found: "Roofline") -> list[list[str]]:
    """The compute rate and every tier, as reached and nominal: rows of CEILINGS_HEADER."""
    reached, nominal = found.reached, found.nominal
    rows = [[f"{found.dtype} compute", text.flops_per_s(reached.flops_per_s), reached.kind, ""]]
    rows[0] += [text.flops_per_s(nominal.flops_per_s), nominal.kind, ""] if nominal else ["n/a", "", ""]
    others = {tier.name: tier for tier in nominal.tiers} if nominal else {}
    for tier in reached.tiers:
        cells = [tier.name]
        for one in (tier, others.get(tier.name)):
            known = one and [
                text.bytes_per_s(one.bytes_per_s),
                one.kind,
                f"{text.figure('flops_per_byte', one.ridge_flops_per_byte)} FLOP/B",
            ]
            cells += known or ["n/a", "", ""]
        rows.append(cells)
    return rows


def lost_words(found: "Roofline") -> str:
    """In a sentence or two: how much of the time lies above what the roof allows, and what took it."""
    from perfmodel.roofline import LOST_TO, lost_frac, lost_to

    lost = lost_frac(found.points)
    n_left_out = f"; {text.count(found.n_left_out)} have no roof here" if found.n_left_out else ""
    if lost is None:
        return f"no point was measured{n_left_out}"
    words = [
        f"{text.counted(found.points.height, 'point')}{n_left_out}: {text.frac(lost)} of their time is above what "
    ]
    words.append("the roof allows.")
    causes = sorted(lost_to(found.points).items(), key=lambda one: -one[1])
    shares = [f"{text.frac(share)} {LOST_TO[cause]}" for cause, share in causes if share >= 0.005]
    if shares:
        words.append(f" By the model that goes to: {'; '.join(shares)}.")
    return "".join(words)


def costliest_rows(found: "Roofline", n_top: int = N_TOP) -> list[list[str]]:
    """The points that lose most time below their roof: rows of COSTLIEST_HEADER."""
    from perfmodel.roofline import LOST_TO, costliest

    return [
        [
            text.ns(row["lost_ns"]),
            text.frac(row["time_frac"]),
            text.frac(row["roof_frac"]),
            row["bound"] if row["bound"] == "compute" else row["tier"],
            text.shortened(row["op"], MOST_WORDS),
            text.shortened(row["shape"], MOST_WORDS),
            "" if row["n_tokens"] is None else text.count(row["n_tokens"]),
            text.shortened(row["routing"] or "", MOST_WORDS),
            "" if row["rows_per_active_expert"] is None else f"{row['rows_per_active_expert']:,.1f}",
            "" if row["why"] is None else LOST_TO[row["why"]].partition(" (")[0],
        ]
        for row in costliest(found.points).head(n_top).iter_rows(named=True)
    ]


def roofline_json(found: "Roofline", n_top: int | None = None) -> dict[str, Any]:
    """What `perfmodel roofline --json` prints: both sorts of ceilings, the share of time lost and what took it, and the
    points (POINTS), most lost time first, cut after `n_top`."""
    from perfmodel.roofline import lost_frac, lost_to

    ranked = found.points.sort("lost_ns", descending=True, nulls_last=True, maintain_order=True)
    return {
        "title": found.title,
        "dtype": found.dtype,
        "reached": asdict(found.reached),
        "nominal": None if found.nominal is None else asdict(found.nominal),
        "lost_frac": lost_frac(found.points),
        "lost_to_frac": lost_to(found.points),
        "n_left_out": found.n_left_out,
        "points": (ranked if n_top is None else ranked.head(n_top)).to_dicts(),
    }
