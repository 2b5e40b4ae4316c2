"""docs/expert-parallel.md as text: what captures of expert-parallel layers hold, and what shipped ones say."""

from pathlib import Path

from perfmodel import text
from perfmodel.ep_capture import EpCapture, load_ep_capture, shipped_ep_captures
from perfmodel.latency import load_model, shipped_models
from perfmodel.markdown import table, wrapped
from perfmodel.report.phases import efficiency_page, phases_page

from .captured import LATENCY, errors_of, set_beside, with_factors

HEAD = """# Expert-parallel layers, measured

Made by `python docs/regenerate.py`; do not edit. A capture of an expert-parallel layer holds what every rank did in
every step, phase by phase, on one clock. `perfmodel phases` reads it and sets what the model says of each phase beside
it. What is predicted is a schedule of [schedule.md](schedule.md); the [guide](guide.md#several-gpus) says when to take
which command, and [captures.md](captures.md) is about captures of one process.

    perfmodel collect expert-parallel --out my-ranks
    perfmodel phases my-ranks
    perfmodel phases my-ranks --workload 3 --model epyc-zen5-2c-fp32
    perfmodel phases my-ranks --workload 3 --html step.html
    perfmodel phases two-ranks four-ranks --json

"""

FILES = {
    "expert_parallel.json": "settings (`n_ranks`, `backend`, `device`, `dtype`, `threads` of each rank), machine, "
    "software, kernel; `clock`: by how much a rank's clock is behind rank 0's, and the error, half of the best "
    "round trip; `cpus_of_ranks`: the processors that each rank is bound to",
    "workloads.jsonl": "a layer: its shape, tokens of each rank, routing, `schedule` (bulk, chunked), `n_chunks`, "
    "`gpu_of` (the rank of each expert), `rows` (rows that the tokens of each rank have for each expert; they sum to "
    "tokens x top-k)",
    "steps.jsonl": "a rank in a step of a workload: its start and end, and `phases` as name, chunk, start, duration; "
    "ns on rank 0's clock",
    "probes.jsonl": "a rate or time of a rank while all ranks do the same: `gemm`, `stream`, `all_to_all` by bytes per "
    "pair",
    "one_process.json": "optional: a latency model that was fitted on one process with as many threads as a rank "
    "(`perfmodel fit`), to be named with `--model`",
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
- **picture** (`--html`): the step whose latency is closest to the median, and below it on the same time axis the
predicted schedule. Counts, regrouping and shared cores have no place in that schedule; its title says what they add.
- **O_e**: T(2) / T(N), the latency of the same tokens per rank on two ranks over that on N (same paper, Fig 11); from
captures of two and of more ranks.
- **half of steps**: the error of each workload's even steps, their median, as a prediction of the median of its odd
ones. A model that is as good as that cannot be told to be better.

"""

PREDICTED = """## What is predicted, and from what

What a rank can do is what the probes saw **while all ranks worked**: the fastest dense GEMM and stream (medians over
ranks), and for the link the line latency + bytes / rate through the all-to-alls, fitted robustly on relative errors.
Constants of the latency model are the defaults, or those of a shipped model of the same kind of device, fitted on one
process. **Nothing is fitted on steps.** Rows and places of experts are the recorded ones. The schedule is the model's
own bulk or chunked one, without launches, padding or processors held by communication. Three things that engines do,
and ranks on one machine, are no part of that schedule and are added:

- `counts`: one all-to-all of nothing, and 8 small operators and one for each rank around it.
- `regroup`: 4 passes over the hidden values of received rows (two gathers, each read and write) and 10 small operators
in each chunk. Operators and passes were counted in the layer's code, and a small operator is an even share of the fixed
time of a layer in the latency model.
- `sharing`: what ranks wait for each other's cores where they use more than there are. Ranks that are bound to the same
processors share these and no others; ranks that are not bound share all. Between two collectives all are done when all
their work is: ranks that are left share their cores evenly, and none uses more than its own. Collectives on such a
machine are copies by the same cores, so that they take as long as all their bytes, not as the busiest rank's. A probe's
call that ends within a time slice (3 ms, assumed: Linux gives about so much) saw a whole core, and one that is longer
than its turn its share; rates are brought to those of a rank that has its core.

No phase is measured to be `sharing`. A rank that has no core waits in whatever phase it is in: within a long grouped
GEMM, or in a `dispatch` that is over as soon as somebody lets it run. So of such a machine believe the latency, and of
phases those that are shorter than a time slice.

"with a factor" says how much of an error is the same everywhere: each phase is multiplied by one factor, the median of
measured over predicted **on all other shapes**, and judged on the shape left out. `sharing` is among what the factor of
the latency holds.

## How far to believe the errors

- **No number is fitted on steps, but choices were made after looking at them.** How ranks share cores is one of five
ways that were compared on steps. That a layer's fixed time and passes are divided among phases, and small operators
counted, was decided when measured phases had shown where the prediction was short. So errors on shipped captures are of
captures that were seen. Those under "A capture that nobody had seen" are not, and are larger.
- **Errors cancel.** Default constants stand for one process of two threads, and predict GEMMs of few rows on one thread
up to three times too long; collectives are predicted too short, for the reason below. In whole steps one makes up for
the other. With constants of one process of **one** thread (`one_process.json`: 68 points of four shapes, one of them
also in these captures, taken while other work ran) GEMMs of two ranks come out, and whole steps are too short by what
collectives wait: tables below. On another machine do not expect the errors of whole steps with default constants to
hold.
- **Latencies of few tokens are noise to a good part**: compare with "half of steps". Six steps are few.

## What the model leaves out

- **Waking up.** A collective of gloo goes through three threads of a rank: the one that calls, one that works, one that
serves sockets. On a rank's one core the next of them is woken and may wait until another has used its time slice.
Transfers have two humps, one of some 0.1 to 0.5 ms where bytes are few, the other a slice of 2 to 6 ms later, with
ranks that come within 10 us of each other: it is not waiting for a late rank. Probes call the same collective in a loop
and hold medians, which see the first hump alone. The page counts how many end late; no number predicts which. (That
these threads wait to run was seen in a trial, with other work on the machine; as the cause in these captures it is
likely, not proven.)
- **Fresh memory.** Probes reuse their buffers. In a step those of 2,048 tokens are new to the process and faulted in
page by page (in part: the allocator keeps some) while they are written first: by `dispatch`, `regroup`, `activation`.
The model knows that of tensors of 32 MiB and more.
- **The gate.** Softmax and top-k are one time for a token and an expert, which a fit on whole layers hardly tells from
what else grows with tokens. `gate` takes about twice as long as predicted.
- **Where the system lets ranks run.** Two ranks on one core run short phases one after another rather than in turns.
Both are done at the same time, but fewer compute "at once" than the model has.
- **Other work on the machine.** Probes and steps are minutes apart. Spreads of latencies say how quiet it was.

"""


# Written down, not computed here: the captures do not come with the project.
UNSEEN = """## A capture that nobody had seen

Two captures were taken on the machine of the shipped ones before the prediction was last changed, put aside, and
compared with it once, when it was done; nothing of it was changed for what was found. Shapes `deepseek-v2-lite/8` and
`e32-k2-h768-i512`, 64, 256 and 1,024 tokens, uniform and power-law:1.2, in bulk and in 2 and 4 pieces: 36 workloads of
6 steps on 2 ranks and as many on 4 (26 November 2026; load average 0.4 before the first and 0.9 before the second, and
whether others worked on the machine meanwhile is not known; these captures do not come with the project, and the
figures are of that day). Median error of |predicted / measured - 1|, of latencies also the 90th percentile;
`one_process` as in the tables above.

"""
UNSEEN_ERRORS = """
| ranks, constants | gate | permute | gemm1 | activation | gemm2 | reduce | regroup | counts | dispatch | combine | latency | latency, p90 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| 2, defaults | 52 % | 25 % | 47 % | 36 % | 52 % | 23 % | 40 % | 66 % | 79 % | 63 % | 13.4 % | 45.6 % |
| 2, one_process | 54 % | 22 % | 6 % | 33 % | 4 % | 29 % | 45 % | 69 % | 79 % | 63 % | 22.2 % | 61.7 % |
| 2, half of steps | 3 % | 4 % | 2 % | 4 % | 1 % | 5 % | 8 % | 40 % | 27 % | 31 % | 5.9 % | 20.0 % |
| 4, defaults | 52 % | 25 % | 46 % | 21 % | 46 % | 59 % | 35 % | 39 % | 50 % | 45 % | 20.7 % | 41.4 % |
| 4, one_process | 54 % | 30 % | 44 % | 22 % | 48 % | 70 % | 39 % | 39 % | 50 % | 45 % | 29.4 % | 47.0 % |
| 4, half of steps | 3 % | 6 % | 6 % | 8 % | 11 % | 7 % | 8 % | 48 % | 23 % | 19 % | 6.3 % | 20.4 % |
"""  # noqa: E501
UNSEEN_MEANING = """So whole steps come out worse on layers that nobody looked at (13 % and 21 %) than on the shipped
captures (9 % and 8 %), and two to three times worse than half of the steps says. Latencies of four ranks are
predicted too short, 0.84 of what they are (median). What holds on two ranks is the GEMMs with constants of as many
threads as a rank has, 6 % and 4 %. What was mended last (`permute`, `reduce`, `regroup`, `activation`: 49, 91, 75 and
51 % before on two ranks, 120, 85, 68 and 35 % on four) is better on these captures too, and latencies are not: 12.2 %
and 20.4 % before."""

EFFICIENCY = """O_e by tokens of each rank and schedule: median over shapes and routings, in brackets least, most and
how many. The four ranks have twice the work of the two on the same two cores, so that 0.5 is no loss at all, and more
is what waiting leaves free."""


def page() -> str:
    """The page."""
    files = table(["file", "a line, or key"], [[f"`{name}`", words] for name, words in FILES.items()])
    parts = [*_paragraphs(HEAD), "## What a folder holds", files, *_paragraphs(REFUSED + FIGURES + PREDICTED)]
    captures = [load_ep_capture(path) for path in shipped_ep_captures()]
    parts += [part for one in captures for part in _section(one)]
    parts += [*_paragraphs(UNSEEN), UNSEEN_ERRORS, wrapped(UNSEEN_MEANING)]
    efficiency = efficiency_page(captures)
    if efficiency is not None:
        parts += ["## From two ranks to more", wrapped(EFFICIENCY), f"```text\n{efficiency}\n```"]
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
            "The same with the constants of models that were fitted on one process of such a machine (`one_process`: "
            "of as many threads as a rank), and with a factor for each phase from all other shapes. Errors are "
            "|predicted / measured - 1|, medians; of the latency also the 90th percentile."
        ),
        _by_constants(capture),
    ]


def _by_constants(capture: EpCapture) -> str:
    """Errors by constants: the defaults, and those of each shipped model of the same device and dtype."""
    device = "gpu" if capture.manifest.settings.device == "cuda" else "cpu"
    models = {name: load_model(name) for name in shipped_models()}
    fitted_beside = [file for path in shipped_ep_captures() for file in path.glob("one_process.json")]
    models |= {file.stem: load_model(file) for file in fitted_beside}
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
