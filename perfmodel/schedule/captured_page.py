"""docs/expert-parallel.md as text: what captures of expert-parallel layers hold, and what shipped ones say."""

from pathlib import Path

from perfmodel import text
from perfmodel.ep_capture import EpCapture, load_ep_capture, shipped_ep_captures
from perfmodel.latency import load_model, shipped_models
from perfmodel.markdown import table, wrapped
from perfmodel.report.phases import phases_page

from .captured import LATENCY, errors_of, set_beside, with_factors

HEAD = """# Expert-parallel layers, measured

Made by `python docs/regenerate.py`; do not edit. A capture of an expert-parallel layer holds what every rank did in
every step, phase by phase, on one clock. `perfmodel phases` reads it and sets what the model says of each phase beside
it. What is predicted is a schedule of [schedule.md](schedule.md); the [guide](guide.md#several-gpus) says when to take
which command, and [captures.md](captures.md) is about captures of one process.

    perfmodel collect expert-parallel --out my-ranks
    perfmodel phases my-ranks
    perfmodel phases my-ranks --workload 3 --model epyc-zen5-2c-fp32
    perfmodel phases my-ranks --workload 3 --figure step.html
    perfmodel phases two-ranks four-ranks --json

"""

FILES = {
    "expert_parallel.json": "settings (`n_ranks`, `backend`, `device`, `dtype`, `threads` of each rank), machine, "
    "software, kernel; `clock`: what was added to a rank's clock to have rank 0's, and its error, half of the best "
    "round trip",
    "workloads.jsonl": "a layer: its shape, tokens of each rank, routing, `schedule` (bulk, chunked), `n_chunks`, "
    "`gpu_of` (the rank of each expert), `rows` (rows that the tokens of each rank have for each expert; they sum to "
    "tokens x top-k)",
    "steps.jsonl": "a rank in a step of a workload: its start and end, and `phases` as name, chunk, start, duration; "
    "ns on rank 0's clock",
    "probes.jsonl": "a rate or time of a rank while all ranks do the same: `gemm`, `stream`, `all_to_all` by bytes per "
    "pair",
    "profiles/<workload>/": "a folder of ranks for `perfmodel analyze` and `perfmodel layers`, of one workload",
}
REFUSED = """A capture that contradicts itself is refused: rows that do not sum, a rank that is missing in a step, a
phase outside its step or of another name.

"""

FIGURES = """## How figures are defined

- **latency** of a step: from the first rank's start to the last rank's end. Of a workload: the median over steps, and
the distance of the 10th and 90th percentile as a share of it.
- **phase** of a rank: the time it is in it in a step, chunks together, the median over steps. `gate` (the router),
`permute` (the rank's own rows into the order of experts), `counts` (ranks tell each other how many rows to expect),
`dispatch`, `regroup` (received rows, which lie by source rank, into the order of experts and back; recorded as
`permute`, told from it by when it happens), `gemm1`, `activation`, `gemm2`, `combine`, `reduce` (the
weighted sum of a token's rows).
- **collective** (`counts`, `dispatch`, `combine`): begins when the last rank is there and the collective before is
done, and ends when the last rank has all. What ranks are in it before that is waiting, not transfer.
- **hidden**: communication of a rank while it computes. Hidden + exposed = communication; compute + exposed + idle =
the rank's step. Of a rank's communication, waiting for others is part.
- **at once**: how many ranks compute at the same time, on the mean over the time in which any does. An interrupted
phase counts as computing.
- **last rank**: the one that comes to a collective last, and the share of steps in which it does; none where all come
closer together than their clocks can tell. The others wait from their own start to its.
- **t / t_a**: the longest time of a rank over the shortest in the same collective, or in all computing phases together,
median and 95th percentile over steps (FlashMoE, arXiv 2506.04667, Table 2).
- **picture** (`--figure`): the step whose latency is closest to the median, and below it on the same time axis the
predicted schedule. Counts, regrouping and shared cores have no place in that schedule; its title says what they add.
- **O_e**: T(2) / T(N), the latency of the same tokens per rank on two ranks over that on N (same paper, Fig 11); from
captures of two and of more ranks.

"""

PREDICTED = """## What is predicted, and from what

What a rank can do is what the probes saw **while all ranks worked**: the fastest dense GEMM and stream (medians over
ranks), and for the link the line latency + bytes / rate through the all-to-alls, fitted robustly on relative errors.
Constants of the latency model are the defaults, or those of a shipped model of the same kind of device, fitted on one
process. **Nothing is fitted on steps.** Rows and places of experts are the recorded ones. The schedule is the model's
own bulk or chunked one, without launches, padding or processors held by communication. Three things that engines do,
and ranks on one machine, are no part of that schedule and are added:

- `counts`: one all-to-all of nothing.
- `regroup`: 4 passes over the hidden values of received rows (two gathers, each read and write), counted, not fitted.
- `sharing`: what ranks wait for each other's cores where they use more than there are. Between two collectives all are
done when all their work is: ranks that are left share the cores evenly, and none uses more than its own. Collectives
on such a machine are copies by the same cores, so that they take as long as all their bytes, not as the busiest rank's.
A probe's call that ends within a time slice (3 ms, assumed: Linux gives about so much) saw a whole core, and one that
is longer than its turn its share; rates are brought to those of a rank that has its core.

No phase is measured to be `sharing`. A rank that has no core waits in whatever phase it is in: within a long grouped
GEMM, or in a `dispatch` that is over as soon as somebody lets it run. So of such a machine believe the latency, and of
phases those that are shorter than a time slice.

"with a factor" says how much of an error is the same everywhere: each phase is multiplied by one factor, the median of
measured over predicted **on all other shapes**, and judged on the shape left out. `sharing` is among what the factor of
the latency holds.

## What the model leaves out

- **Small operators.** All of a layer that does not grow is one constant, and it is booked under `gate`. Measured
`permute`, `regroup` and `reduce` have a floor each, so that of few tokens they are predicted far too short and `gate`
too long.
- **Collectives after computing.** Probes call the same collective in a loop, where threads are awake and buffers are
there. In a step each comes after something else; `counts` over its prediction says how much that is.
- **Where the system lets ranks run.** A system may keep ranks that wake each other on one core while another is
idle. The model has all cores busy as long as enough ranks have work; where few compute "at once", they did not.
- **Other work on the machine.** Probes and steps are minutes apart. Spreads of latencies say how quiet it was.

"""


def page() -> str:
    """The page."""
    files = table(["file", "a line, or key"], [[f"`{name}`", words] for name, words in FILES.items()])
    parts = [*_paragraphs(HEAD), "## What a folder holds", files, *_paragraphs(REFUSED + FIGURES + PREDICTED)]
    parts += [part for path in shipped_ep_captures() for part in _section(load_ep_capture(path))]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write(docs: Path) -> None:
    """Write expert-parallel.md into a folder."""
    (docs / "expert-parallel.md").write_text(page(), encoding="utf-8")


def _paragraphs(words: str) -> list[str]:
    """Blocks at even width; items of a list stay items, and indented commands stay as they are."""
    found = []
    for block in words.strip("\n").split("\n\n"):
        if block.startswith("- "):
            found.append("\n".join(wrapped(f"- {item}") for item in ("\n" + block).split("\n- ")[1:]))
        else:
            found.append(block if block.startswith("    ") else wrapped(block))
    return found


def _section(capture: EpCapture) -> list[str]:
    """One shipped capture: the page of the command, and the errors of every set of constants."""
    shown = phases_page(set_beside(capture))
    return [
        f"## {capture.name}",
        f"```text\n{shown}\n```",
        wrapped(
            "The same with the constants of models that were fitted on one process of such a machine, and with a "
            "factor for each phase from all other shapes. Errors are |predicted / measured - 1|, medians; of the "
            "latency also the 90th percentile."
        ),
        _by_constants(capture),
    ]


def _by_constants(capture: EpCapture) -> str:
    """Errors by constants: the defaults, and those of each shipped model of the same device and dtype."""
    device = "gpu" if capture.manifest.settings.device == "cuda" else "cpu"
    models = {name: load_model(name) for name in shipped_models()}
    chosen = {n: one for n, one in models.items() if one.profile.device == device and one.dtype == capture.dtype}
    rows: list[list[str]] = []
    phases: tuple[str, ...] = ()
    for name, model in [("defaults", None), *chosen.items()]:
        beside = set_beside(capture, model)
        for way, found in (("", beside.errors), (", with a factor", errors_of(with_factors(beside.table)))):
            seen = {row["phase"]: row for row in found.iter_rows(named=True)}
            phases = phases or tuple(seen)
            cells = [text.frac(seen[phase]["median_error_frac"]) if phase in seen else "n/a" for phase in phases]
            high = text.frac(seen[LATENCY]["p90_error_frac"]) if LATENCY in seen else "n/a"
            rows.append([f"{name}{way}", *cells, high])
    return table(["constants", *phases, "latency, p90"], rows)
