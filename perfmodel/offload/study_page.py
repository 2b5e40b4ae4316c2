"""docs/gh200-study.md as text: every number on it is computed here by `study`, or read from a table that it wrote."""

import csv
from io import StringIO
from pathlib import Path
from statistics import median

from perfmodel import markdown, moe, physics, text
from perfmodel.hardware import hardware
from perfmodel.text import NS_PER_S

from .constants import ASSUMED
from .device import link_rate
from .study import (
    BATCHES,
    COPY,
    MACHINE,
    MECHANISMS,
    ONE_EXPERT_ROWS,
    PATTERN,
    PUBLISHED,
    REREAD,
    REUSE,
    SHAPE,
    WITHIN_FRAC,
    agrees,
    best_rate,
    one_expert,
    predicted,
    settings_that_agree,
    slope_ns_per_row,
    slowdowns,
    slowdowns_by_batch,
)

OTHER_SHAPES = ("olmoe", "deepseek-v2-lite", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b")
REREAD_CONSTANTS = ("reread_frac", "reread_rows", "link_overlap_frac", "link_eff")

HEAD = """# The GH200 study: consistent with two numbers, not validated

Made by `python docs/regenerate.py`; do not edit. The study (ISC 2026 poster) ran PyTorch's grouped GEMM on a GH200 with
some experts in CPU memory, least used first, under routing of MMLU. It publishes two slowdowns, and neither the shape
of its model, nor its dtype, nor how the kernel reached CPU memory, nor an absolute time. Nothing on this page was
measured by us. Two numbers cannot identify the constants of a model; they can rule mechanisms out.
"""
SHOWN_CONSTANTS = (
    "eff_compute",
    "eff_memory",
    "tile_overhead_rows",
    "tile_overhead_cols",
    "tile_overhead_terms",
    "smooth_p",
    "expert_ns",
)


def page(olmoe_csv: str | None = None) -> str:
    """The page; `olmoe_csv` is what `study.to_csv` made of `study.measured_routing`, null leaves that section out."""
    sections = [HEAD, _setting(), _mechanisms(), _not_identified(), _other_shapes()]
    sections += [_measured(olmoe_csv)] if olmoe_csv else []
    blocks = "\n".join([*sections, _trends(), _discriminates()]).split("\n\n")
    return "\n\n".join(map(markdown.wrapped, blocks)).rstrip("\n") + "\n"


def write(docs: Path) -> None:
    """Write gh200-study.md into a folder, with the table of measured routing there (gh200-study-olmoe.csv)."""
    measured = docs / "gh200-study-olmoe.csv"
    found = measured.read_text(encoding="utf-8") if measured.exists() else None
    (docs / "gh200-study.md").write_text(page(found), encoding="utf-8")


def _points() -> list[str]:
    return [f"{100 * p.offload_frac:g} % at {p.n_tokens:,}: {p.slowdown}x" for p in PUBLISHED]


def _setting() -> str:
    made, machine = moe.shape(SHAPE), hardware(MACHINE)
    form = physics.form_of(machine.device, physics.PYTORCH_KERNEL)
    roof = physics.ceilings(machine, made.dtype)
    named = ", ".join(f"`{name}` {getattr(form.defaults, name):g}" for name in SHOWN_CONSTANTS)
    chosen = ", ".join(f"`{name}` {getattr(ASSUMED, name):g}" for name in REREAD_CONSTANTS)
    rate, key = link_rate(machine, "zero-copy")
    counts = " and ".join(f"{round(p.offload_frac * made.n_experts)}" for p in PUBLISHED)
    return f"""## One setting for everything below

Shape `{SHAPE}` (a reading: {made.n_experts} experts of {made.hidden} x {made.inter}, {made.dtype}; "tokens" are the
rows that reach them; offloaded are {counts} of them), routing `{PATTERN}`, machine `{MACHINE}`:
{text.flops_per_s(roof.flops_per_s)} of GEMM, {text.bytes_per_s(roof.bytes_per_s)} of device memory, kernels read CPU
memory at {text.bytes_per_s(rate)} (`{key}`). Bare grouped GEMMs of one layer, replayed from a graph. It is
`perfmodel predict --hardware {MACHINE} --shape {SHAPE} --routing {PATTERN}`.

Constants of the kernel are the defaults of PyTorch's grouped GEMM on SM90: {named}; a call takes what the machine's
null kernel and its launch do. Those of reading in place: {chosen}
([decision 23](decisions/0023-offload-constants.md)).
"""


def _mechanisms() -> str:
    rows = []
    for mechanism in MECHANISMS:
        found = slowdowns(mechanism)
        fitted = best_rate(mechanism)
        freed = (
            "no rate gives the first" if fitted is None else f"{fitted[1]:.2f}x at the second, rates x {fitted[0]:.2f}"
        )
        verdict = "agrees" if agrees(found) else "fails"
        rows.append([mechanism.words, *(f"{s:.2f}x" for s in found), verdict, freed])
    first, second = PUBLISHED
    added = [(p.slowdown - 1) * p.n_tokens for p in PUBLISHED]
    return f"""## Mechanisms

"Agrees": both slowdowns within {100 * WITHIN_FRAC:g} %. The last column sets the mechanism's own rates free, all by one
factor, until the first point is met exactly, and says what then happens at the second, {second.slowdown}x.

{markdown.table(["mechanism", *_points(), "verdict", "with its rates set free"], rows)}
In time that resident tokens would take, the offloaded experts of the second point cost {added[1] / added[0]:.1f} times
those of the first, for {second.offload_frac / first.offload_frac:.1f} times as many experts. A cost paid once per
expert, at whatever rate, cannot do that: the copies and the single read fail with any rate. A copy that overlaps
computing is hidden whole at both points. The CPU's time grows with tokens as the GPU's does, but far too fast. What
grows with tokens on offloaded experts *and* stays small is a read that is repeated for some of the later blocks of
rows, whether one launch sees both memories or two launches see one each.

An efficiency of the link that falls with the number of tiles, or address translation that misses more often, would do
as well: these two points cannot tell them apart. Nor can they tell which shape, routing and meaning of "tokens" were
used.
"""


def _not_identified() -> str:
    found, n = settings_that_agree()
    rows = []
    for name in REREAD_CONSTANTS:
        values = [getattr(one, name) for one in found]
        rows.append([f"`{name}`", f"{min(values):g} to {max(values):g}", f"{getattr(ASSUMED, name):g}"])
    per_block = [one.reread_frac * 256 / one.reread_rows for one in found]
    rows.append(["re-reads per 256 rows", f"{min(per_block):.2f} to {max(per_block):.2f}", f"{ASSUMED.reread_frac:g}"])
    return f"""## Two points do not identify the constants

Of a grid of {n:,} settings {len(found)} agree with both points under this one reading, and they are far apart:

{markdown.table(["constant", "range among those that agree", "default"], rows)}
Only how often a row makes weights be read again, in relation to the ratio of computing to the link, is held with any
firmness, and that only for this shape and routing. The widths of experts cannot be read off these points either: where
offloaded and resident experts are both bound by computing, they cancel in a slowdown.
"""


def _other_shapes() -> str:
    rows = [[f"`{name}`", *(f"{s:.2f}x" for s in slowdowns(REREAD, shape=name))] for name in (SHAPE, *OTHER_SHAPES)]
    return f"""## Other readings of the shape

The same setting, with "tokens" as tokens of catalogue models, each of which selects top-k experts:

{markdown.table(["shape", *_points()], rows)}"""


def _measured(olmoe_csv: str) -> str:
    rows = list(csv.DictReader(StringIO(olmoe_csv)))
    shown = [[r["domain"], r["layer"], *(_with_share(r, number) for number in (1, 2))] for r in rows]
    pairs = [(float(r["slowdown_1"]), float(r["slowdown_2"])) for r in rows]
    middle = [f"{median(pair[i] for pair in pairs):.2f}x" for i in (0, 1)]
    spread = [f"{min(p[i] for p in pairs):.2f}x to {max(p[i] for p in pairs):.2f}x" for i in (0, 1)]
    shown.append(["median of all", "", *middle])
    return f"""## Measured routing instead of a parametric one

Expert counts of OLMoE-1B-7B (allenai/OLMoE, Apache-2.0, `scripts/routing_output`; {len(rows)} pairs of domain and
layer, layers 0, 1 and 2 of the file being layers 0, 7 and 15 of the model), same setting, in gh200-study-olmoe.csv.
Beside each slowdown stands the share of rows that the offloaded experts receive. The points come out at {spread[0]} and
{spread[1]}; {sum(map(agrees, pairs))} of {len(rows)} pairs agree with both. Which layer it is moves the answer as much
as the constants do.

{markdown.table(["domain", "layer of the file", *_points()], shown)}"""


def _with_share(row: dict[str, str], number: int) -> str:
    return f"{float(row[f'slowdown_{number}']):.2f}x, {text.frac(float(row[f'cold_share_{number}']))}"


def _trends() -> str:
    ways = (("re-read", REREAD), ("read once", REUSE), ("copied", COPY))
    batches = [
        [f"{100 * p.offload_frac:g} %, {words}", *(f"{s:.2f}x" for s in slowdowns_by_batch(mechanism, p.offload_frac))]
        for p in PUBLISHED
        for words, mechanism in ways
    ]
    single = [[words, *(text.ns(t) for t in one_expert(mechanism))] for words, mechanism in (("resident", None), *ways)]
    orders = [
        [words, *(f"{predicted(p, policy=policy).slowdown:.2f}x" for p in PUBLISHED)]
        for words, policy in (
            ("least used first", "ascending"),
            ("random", "random"),
            ("most used first", "descending"),
        )
    ]
    return f"""## Trends the study states, without fitting

The larger the batch, the smaller the slowdown at a fixed fraction (rows of the whole layer):

{markdown.table(["offloaded", *(f"{n:,}" for n in BATCHES)], batches)}
Latency is flat in the tokens of an offloaded expert while its weights take longer to load than to use, then about
linear (rows on one expert, offloaded, all others idle; the kernel changes its tile between 4,096 and 16,384 rows):

{markdown.table(["rows", *(f"{n:,}" for n in ONE_EXPERT_ROWS)], single)}
Least used experts first is the cheapest order:

{markdown.table(["order", *_points()], orders)}"""


def _discriminates() -> str:
    ways = (("resident", None), ("re-read", REREAD), ("read once", REUSE), ("copied", COPY))
    slopes = [[words, f"{slope_ns_per_row(mechanism):.1f} ns"] for words, mechanism in ways]
    steps = ", ".join(text.ns(t) for t in one_expert(REREAD, (256, 257, 512, 513)))
    frac, last = PUBLISHED[1].offload_frac, BATCHES[-1]
    large = [f"{slowdowns_by_batch(m, frac)[-1]:.2f}x {w}" for w, m in (("re-read", REREAD), ("read once", REUSE))]
    again_ns = (
        moe.shape(SHAPE).expert_bytes * ASSUMED.reread_frac / link_rate(hardware(MACHINE), "zero-copy")[0] * NS_PER_S
    )
    return f"""## What would tell mechanisms apart

On a CUDA machine a campaign ([captures](captures.md)) measures 1, 2, 4 and 6; 3 and 5 need points of their own.

1. **One offloaded expert, 1 to 65,536 rows** (study `one-expert`): what a further row costs when there are many. Read
once and copied have the slope of resident weights, re-reads a steeper one:

{markdown.table(["mechanism", "per row"], slopes)}
2. **A very large batch** (study `offload`): with {100 * frac:g} % offloaded and {last:,} rows {" and ".join(large)}.

3. **Rows per read**: the same expert at 256 and 257, 512 and 513 rows ({steps} here). While the link binds, a further
block of rows costs {text.ns(again_ns)} at each multiple of `reread_rows` and nowhere else.

4. **The same weights copied first, then multiplied** (`copy` beside `zero-copy`): the link without the kernel's
pattern.

5. **Sectors that the kernel asks of system memory**, by Nsight Compute: bytes over the link by bytes of weights is the
number of reads itself, without a model.

6. **Most used experts first** (study `orders`): more rows on offloaded experts at the same bytes.
"""
