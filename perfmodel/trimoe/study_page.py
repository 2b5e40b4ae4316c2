"""docs/trimoe.md as text: every figure on it is computed here by `study`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from perfmodel import markdown, moe, text
from perfmodel.hardware import hardware
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST
from perfmodel.text import NS_PER_US

from .costs import AMX_OVER_AVX512, AVX512_TOKENS, DIMMS_PER_CHANNEL, OPTIONS, Options
from .prediction import COLD_BELOW, HOT_FROM
from .simulate import HBM_FRAC, Workload
from .steps import COLD_EXPERT_FRAC, COLD_TOKEN_FRAC, WARM_EXPERT_FRAC, WARM_TOKEN_FRAC
from .study import (
    BATCHES,
    FACTORS,
    MIGRATIONS,
    MODELS,
    N_BEFORE,
    NEAR_FRAC,
    OVERHEAD,
    SPEEDUP,
    UTILISATION,
    Comparison,
    alone_ns,
    class_statistics,
    compare,
    gpu_utilisation_frac,
    made_workload,
)
from .systems import BASELINES

MACHINE, BATCH = "trimoe", 512
N_STEPS, N_LAYERS, FEW_STEPS = 32, 4, 8
BANDWIDTHS, FLOPS = (0.25, 1.0, 4.0), (0.25, 0.5, 1.0, 4.0)
SLOW_FLOPS = 0.25  # of the near-data FLOP/s: the page's second setting
BESIDE_NS = (100e3, 300e3)  # of attention and the rest of a layer, made up: no source says them
ROUTINGS = ("three-class", "three-class:0", "three-class:0.2", "temporal", "power-law", "uniform")
WARM_TOKENS = 45  # the mean of a warm expert where 30 % of DeepSeek-V2's experts share 70 % of 512 tokens


@cache
def _work(
    model: str,
    n_tokens: int = BATCH,
    source: str = ROUTINGS[0],
    budget_bytes: float | None = None,
    n_steps: int = N_STEPS,
    seed: int = 0,
) -> Workload:
    return made_workload(
        hardware(MACHINE),
        moe.shape(model),
        n_tokens,
        source=source,
        n_steps=n_steps,
        n_layers=N_LAYERS,
        budget_bytes=budget_bytes,
        seed=seed,
    )


@cache
def compared(
    model: str,
    n_tokens: int = BATCH,
    source: str = ROUTINGS[0],
    reading: float = 1.0,
    computing: float = 1.0,
    *,
    budget_bytes: float | None = None,
    n_steps: int = N_STEPS,
    seed: int = 0,
    options: Options = OPTIONS,
    attention_ns: float = 0.0,
    has_seen_moves: bool = True,
    has_ladder: bool = False,
    has_fitted_bounds: bool = True,
) -> Comparison:
    """TriMoE beside its baselines in one setting of the page, near-data rates multiplied by two factors."""
    work = replace(
        _work(model, n_tokens, source, budget_bytes, n_steps, seed),
        options=replace(options, ndp_reading_scale=reading, ndp_computing_scale=computing),
        attention_ns=attention_ns,
        has_seen_moves=has_seen_moves,
    )
    return compare(work, has_ladder=has_ladder, has_fitted_bounds=has_fitted_bounds)


def page() -> str:
    """The page."""
    sections = (_head(), _ours(), _verdict(), _speedups(), _parts(), _rates(), _others(), _statements())
    return "\n".join(sections).rstrip("\n") + "\n"


def write(docs: Path) -> None:
    """Write trimoe.md into a folder."""
    (docs / "trimoe.md").write_text(page(), encoding="utf-8")


def _head() -> str:
    return """# TriMoE: what comes out of its published figures

Made by `python docs/regenerate.py`; do not edit. TriMoE (arXiv 2603.01058) computes the experts of a decode step in
three places at once: hot ones on the GPU, warm ones on a CPU with AMX, cold ones inside the memory modules (DIMMs) that
hold them. Its modules were simulated. This page says what this toolkit computes of it, and which of the published
figures come out. Nothing here was measured, and nothing was tuned to a published figure.

`perfmodel trimoe --shape deepseek-v2 --batch 512` prints one setting; `perfmodel.trimoe` has the functions.

## What is computed

For an expert with L tokens and weights of W bytes, which lie striped over all modules or in one:

```text
T_GPU = f_gpu(L) where its weights are in device memory, else max(f_gpu(L), T_PCIe(W), T_DRAM(W))
T_CPU = max(f_cpu(L), T_DRAM(W))
T_NDP = max(f_ndp(L), T_internal(W))
makespan = max(sum of T_GPU, sum of T_CPU, max over modules d of (sum of T_NDP on d + T_cont of d))
```

T_DRAM is the time of all modules together for a striped expert, of one for a localised one; T_cont is what a module is
busy with reads for GPU and CPU. f are tables of time by tokens (`--table`), or what this toolkit's physics says: on the
GPU its tiled grouped GEMM, on CPU and modules their FLOP/s.

- **Schedule.** Each expert takes its cheapest place. Then the move of one expert that lowers the makespan most is made,
  until none lowers it: never a longer layer.
- **Prediction.** 0.3 of the newest load and 0.7 of the average before. By this an expert is hot, warm or cold.
- **Relayout.** Predicted hot ones are copied to device memory (for a resident of a lower class), warm ones striped,
  cold ones put on one module; cold ones also move from busy modules to less busy ones. All by benefit, while the layer
  runs; what does not fit waits.
"""


def _ours() -> str:
    rows = [
        ["bandwidth and FLOP/s inside a module", "the profile's, `assumed`: the table that has them was not readable"],
        ["a striped expert near data", "is gathered in its home module first, over the link between modules"],
        [
            "one module's bandwidth to the outside",
            f"{DIMMS_PER_CHANNEL} modules share a channel (16 on 8), and one alone has all of it",
        ],
        [
            "CPU",
            f"AMX above {AVX512_TOKENS} tokens of an expert as in ktransformers, else AVX-512 at 1/{AMX_OVER_AVX512:g}",
        ],
        ["device memory for experts", f"{HBM_FRAC:g} of it; `--hbm-slots`, `--hbm-budget`"],
        [
            "bounds of classes",
            f"hot from {HOT_FROM:g} mean loads; cold below the share of it under which earlier steps are shortest "
            f"(fixed: {COLD_BELOW:g})",
        ],
        [
            "window of a move",
            "what the layer leaves of the link it takes; a busier module makes the layer end later, which must be less "
            "than the benefit, and is the overhead. The paper's moves are to fit in a window that holds attention too "
            "(`--hidden-moves`, `--attention`)",
        ],
        ["benefit of a move", "what the expert's cheapest place is cheaper after it"],
        [
            "routing",
            f"`three-class`: {text.frac(COLD_EXPERT_FRAC)} of experts share {text.frac(COLD_TOKEN_FRAC)} of "
            f"assignments, {text.frac(WARM_EXPERT_FRAC)} share {text.frac(WARM_TOKEN_FRAC)}, the rest the rest; in "
            "each step 5 % of experts exchange places",
        ],
        [
            "attention",
            "left out: of 2.78x end to end beside 2.83x for experts, about 1 % of the baseline's time follows",
        ],
    ]
    names = [[f"**{one.name}**", one.words] for one in BASELINES]
    return f"""## What is ours

The paper leaves these open, as far as we could read it:

{markdown.table(["what", "taken here"], rows)}
The baselines are other people's systems, rebuilt here on the same costs, with the same room in device memory, filled
by the loads of {N_BEFORE} earlier steps and then left so:

{markdown.table(["baseline", "rule"], names)}
GPU-NDP deals experts out to modules by those loads. It and CPU-cold copy in each layer as many of the hottest as make
that layer shortest, so no bound of classes is theirs; that may be more than the paper's baselines do.
"""


def _setting(flops: float) -> str:
    return "as in the profile" if flops == 1 else f"FLOP/s x {flops:g}"


def _verdict() -> str:
    rows = []
    settings = [{model: compared(model, computing=f, has_ladder=True) for model in MODELS} for f in (1.0, SLOW_FLOPS)]

    def add(words: str, published: str, values: Sequence[tuple[str, str]]) -> None:
        rows.append([words, published, *(f"{value}, {verdict}" for value, verdict in values)])

    for model in MODELS:
        ones = [found[model] for found in settings]
        add(
            f"{model}: over the best baseline",
            SPEEDUP.words,
            [(f"{one.speedup:.2f}x", SPEEDUP.judged(one.speedup)) for one in ones],
        )
    mains = [found[MODELS[0]] for found in settings]
    for name, published in FACTORS.items():
        add(
            f"factor of {name.removeprefix('+ ')}",
            published.words,
            [(f"{m.factors[name]:.2f}x", published.judged(m.factors[name])) for m in mains],
        )
    for words, values in (
        ("mean utilisation", [m.utilisation_frac for m in mains]),
        ("the same with the reads that modules serve", [m.utilisation_with_reads_frac for m in mains]),
    ):
        add(words, UTILISATION.words, [(text.frac(value), UTILISATION.judged(value)) for value in values])
    moved = [(text.frac(m.system.overhead_frac), OVERHEAD.judged(m.system.overhead_frac)) for m in mains]
    add("overhead of moves", OVERHEAD.words, moved)
    right = [m.accuracy.migration_frac if m.accuracy else None for m in mains]
    add("migration decisions right", MIGRATIONS.words, [(text.frac(r), MIGRATIONS.judged(r)) for r in right])
    every = [compared(model, n, has_ladder=n == BATCH).speedups for model in MODELS for n in BATCHES]
    over_cpu, over_ndp = (
        f"{min(values):.2f}x to {max(values):.2f}x"
        for values in (
            [one[name] for one in every for name in ("GPU-CPU", "CPU-cold")],
            [one["GPU-NDP"] for one in every],
        )
    )
    return f"""## Which figures come out

{BATCH} tokens, {N_STEPS} steps of {N_LAYERS} layers that stand for all, rows without a model {MODELS[0]}.
"Inside": in the published range, or within {text.frac(NEAR_FRAC)} of a published number. Published figures are of
settings that we know only in part.

{markdown.table(["figure", "published", *(f"near-data {_setting(f)}" for f in (1.0, SLOW_FLOPS))], rows)}
The rates of the profile do not give the published speed-ups: at {BATCHES[0]} to {BATCHES[-1]} tokens TriMoE is
{over_cpu} as fast as the baselines with a CPU, but only {over_ndp} as fast as GPU-NDP, the best of all.
A quarter of the FLOP/s gives the size and the order of the published ones, which is no evidence that this is what was
simulated. Moves are seen for longer here than published, because a move occupies modules, and these are the bottleneck;
how long depends on the time of attention, under which they hide, and on whether any may be seen
([below](#other-assumptions)). What refinement brings depends most on the choice it starts from.
"""


def _speedups() -> str:
    rows = []
    for flops in (1.0, SLOW_FLOPS):
        for model in MODELS:
            for n in BATCHES:
                one = compared(model, n, computing=flops, has_ladder=n == BATCH)
                over = [f"{speedup:.2f}x" for speedup in one.speedups.values()]
                rows.append(
                    [_setting(flops), model, str(_work(model).n_slots), str(n), text.ns(one.system.step_ns), *over]
                )
    head = ["near-data", "model", "resident of a layer", "tokens", "TriMoE", *(f"over {one.name}" for one in BASELINES)]
    return f"""## Time of the experts of a step, and speed-up over each baseline

{markdown.table(head, rows)}"""


def _parts() -> str:
    rows = []
    for flops in (1.0, SLOW_FLOPS):
        for model in MODELS:
            one = compared(model, computing=flops, has_ladder=True)
            cells = [f"{factor:.2f}x" for factor in one.factors.values()]
            amx = one.no_amx.step_ns / one.system.step_ns if one.no_amx else 1.0
            used = " / ".join(text.frac(value) for value in one.system.utilisation.values())
            moved = text.frac(one.system.overhead_frac)
            rows.append(
                [_setting(flops), model, *cells, f"{amx:.2f}x", used, text.frac(one.system.dimm_busy_frac), moved]
            )
    head = [
        "near-data",
        "model",
        "CPU",
        "refinement",
        "relayout",
        "AMX alone",
        "GPU / CPU / NDP",
        "modules busy",
        "moves",
    ]
    published = " / ".join(one.words for one in FACTORS.values())
    return f"""## What each part of TriMoE brings

From GPU and near-data units with each expert in its cheapest place, one part more at a time (published
{published}); "AMX alone" is TriMoE against itself with AVX-512. Then how much of the time each unit
computes, how much modules are busy with the reads of the others too, and what moves add.

{markdown.table(head, rows)}
The first two factors depend on what is done without a part. The greedy choice without the CPU sends every expert of
many tokens over PCIe, with it to the CPU; a better rule there makes a factor smaller and leaves what all three give.
"""


def _rates() -> str:
    rows = []
    for model in MODELS:
        for flops in FLOPS:
            ones = [compared(model, reading=b, computing=flops) for b in BANDWIDTHS]
            cells = [f"{o.speedup:.2f}x{'' if SPEEDUP.judged(o.speedup) != 'inside' else ' (inside)'}" for o in ones]
            rows.append([model, f"x {flops:g}", *cells])
    costs = alone_ns(_work(MODELS[0]), WARM_TOKENS)
    machine = _work(MODELS[0]).machine(compared(MODELS[0]).system.system)
    alone_us, serving_us = costs[NEAR_DATA] / NS_PER_US, machine.serving_ns / NS_PER_US
    each_us = alone_us / machine.n_dimms
    bandwidth, rate = (hardware(MACHINE)[f"ndp_peak_{kind}_per_s"] for kind in ("bytes", "flops"))
    return f"""## Which near-data rates would give the published speed-up

Over the best baseline at {BATCH} tokens, the two assumed rates scaled. The profile has {text.bytes_per_s(bandwidth)}
and {text.flops_per_s(rate)} in each of {machine.n_dimms} modules.

{markdown.table(["model", "FLOP/s", *(f"bandwidth x {b:g}" for b in BANDWIDTHS)], rows)}
Why the profile's own rates do not: a warm expert of {WARM_TOKENS} tokens takes {alone_us:,.0f} µs in its module, which
is {each_us:,.0f} µs of each where {machine.n_dimms} work side by side. Read by the CPU it occupies each of them for
{serving_us:,.0f} µs. So modules had better compute it, the CPU only relieves the busiest, and a good GPU-NDP system has
little to lose. With FLOP/s x {SLOW_FLOPS:g} it takes {each_us / SLOW_FLOPS:,.0f} µs of each, and the CPU pays. With a
quarter of the bandwidth cold experts are better on the CPU too, at the pace of its channels.
"""


def _others() -> str:
    model = MODELS[0]
    rows = []

    def add(words: str, **changes: object) -> None:
        ones = [compared(model, computing=f, **changes) for f in (1.0, SLOW_FLOPS)]
        slots = str(ones[0].work.n_slots)
        cells = [f"{o.speedup:.2f}x over {o.best.system.name}, moves {text.frac(o.system.overhead_frac)}" for o in ones]
        rows.append([words, slots, *cells])

    for source in ROUTINGS:
        add(f"routing `{source}`", source=source)
    for size in (20e9, 60e9):
        add(f"{text.n_bytes(size)} of device memory for experts", budget_bytes=size)
    for seed in (1, 2):
        add(f"another draw of the routing (seed {seed})", seed=seed)
    add(f"{FEW_STEPS} steps", n_steps=FEW_STEPS)
    add("moves only where all of them is hidden", has_seen_moves=False)
    for beside_ns in BESIDE_NS:
        add(f"{text.ns(beside_ns)} a layer beside its experts, under which moves hide too", attention_ns=beside_ns)
    add("one module on each channel", options=Options(n_dimms_per_channel=1))
    add("fixed bounds of classes", has_fitted_bounds=False)
    add("fixed bounds, `uniform`", has_fitted_bounds=False, source="uniform")
    main = compared(model).work
    by_bounds = [
        ", ".join(f"{name} {text.frac(e)} with {text.frac(t)}" for name, (e, t) in class_statistics(one).items())
        for one in (_work(model), main)
    ]
    head = ["setting", "resident of a layer", *(f"near-data {_setting(f)}" for f in (1.0, SLOW_FLOPS))]
    return f"""## Other assumptions

{model} at {BATCH} tokens; `three-class:CHURN` has the part of experts that exchange places in a step.

{markdown.table(head, rows)}
Experts with their assignments in the first row, by fixed bounds: {by_bounds[0]}.
By those that suit the profile's machine: {by_bounds[1]}.

With few steps the baselines' choice of residents, and of modules, is still fresh; the more experts have changed places
since, the more a system that moves them gains. Without skew there is nothing to gain.
"""


def _statements() -> str:
    work = _work(MODELS[0])
    costs = alone_ns(work, WARM_TOKENS)
    busy = alone_ns(work, WARM_TOKENS, is_resident=True)[0] / costs[COPIED]
    state = work.shape.n_layers * work.shape.n_experts * 4
    ratio = costs[NEAR_DATA] / alone_ns(work, WARM_TOKENS, is_striped=True)[ON_HOST]
    rows = [
        [
            "an expert needs 256 tokens for 30 % of an H100",
            f"{text.frac(gpu_utilisation_frac(work, 256))} at 256, {text.frac(gpu_utilisation_frac(work, 128))} at 128",
        ],
        ["a warm expert copied to the GPU uses under 8.6 % of it", f"{text.frac(busy)} of the copy's time"],
        ["a warm expert takes about 7 times as long near data", f"{ratio:.1f} times as long as on the CPU"],
        ["the predictor's state is 38 KB", f"{state / 1000:.1f} kB: one fp32 number for each expert"],
    ]
    return f"""## Single statements

{MODELS[0]}, an expert of {WARM_TOKENS} tokens where one is warm. The third row is no check: the profile's FLOP/s were
assumed from such a statement.

{markdown.table(["stated", "here"], rows)}"""
