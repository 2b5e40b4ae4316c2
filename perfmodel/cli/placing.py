"""The command about placements: it loads, asks, prints, and writes what engines read."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfmodel import report, text
from perfmodel.cli import recordings
from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Json, app, note, number, print_json, print_words, progress, whole
from perfmodel.errors import InputError
from perfmodel.routing import Recording

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which other commands do not need
    from perfmodel.hardware import HardwareProfile
    from perfmodel.model_memory import ModelMemory
    from perfmodel.moe import MoEShape
    from perfmodel.placing.answers import Answer
    from perfmodel.placing.question import Question
    from perfmodel.placing.windows import Batch

ALL, AUTO = "all", "auto"
BATCH_SIZES = tuple(4**i for i in range(9))
EXPERT_FRAC = re.compile(r"\s*([0-9.]+)\s*%\s*")
MIX = re.compile(r"\s*([0-9.]+)\s*x\s*([0-9]+)\s*")


@app.command()
def place(
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json; `perfmodel list`.")],
    routing: Annotated[
        str, typer.Option(help="What the router did: FILE[#KEY][@LAYER], or a pattern such as temporal:4.")
    ],
    hardware_name: Annotated[
        str, typer.Option("--hardware", help="Profile name, .toml file or capture folder; `perfmodel list`.")
    ],
    hbm_budget: Annotated[
        str | None,
        typer.Option(
            help="Device memory the engine may use, such as 40GiB, or a share of the experts, such as 50%; all of it "
            "unless given."
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="One policy, or all; docs/policies.md.")] = ALL,
    tokens: Annotated[str, typer.Option(help="Tokens of a pass, each answered by itself: 64, or 64,4096.")] = "64",
    mix: Annotated[
        str | None, typer.Option(help="Passes of several sizes placed for together, such as 200x64,1x4096.")
    ] = None,
    access: Annotated[
        str, typer.Option(help="How offloaded experts are used, several with a plus; auto tries all the machine can.")
    ] = AUTO,
    held_out: Annotated[
        str | None, typer.Option(help="Another recording to judge by, instead of the later half of --routing.")
    ] = None,
    op: Annotated[str, typer.Option(help="What is timed: moe-layer, fused-moe or grouped-gemm.")] = "moe-layer",
    model: Annotated[str | None, typer.Option(help="A fitted model, as of `predict`.")] = None,
    residency: Annotated[str | None, typer.Option(help="How zero-copy sees two memories, as of `predict`.")] = None,
    context: Annotated[str | None, typer.Option(help="Tokens of each sequence in the KV cache.")] = None,
    sequences: Annotated[str, typer.Option(help="Sequences in the KV cache.")] = "1",
    other_weights: Annotated[
        str | None, typer.Option(help="Weights besides experts, such as 6GB, where the shape's config does not say.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(help="Activations, graphs, CUDA context, such as 2GiB.")] = None,
    host_budget: Annotated[str | None, typer.Option(help="Host memory for experts; that of the profile.")] = None,
    host_holds_all: Annotated[
        bool, typer.Option("--host-holds-all", help="The engine keeps all experts in host memory too (ktransformers).")
    ] = False,
    limit: Annotated[
        str | None, typer.Option(help="A slowdown such as 1.2x: how many experts may leave, and at which batches.")
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Add slowdown by device memory.")] = False,
    out: Annotated[str | None, typer.Option(help="Write the best placement to this .json file.")] = None,
    export: Annotated[
        str | None, typer.Option(help="Write it for an engine: sglang, ktransformers, llama.cpp, vllm, json ...")
    ] = None,
    to: Annotated[str, typer.Option(help="Folder for --export.")] = ".",
    steps: recordings.Steps = "16",
    step_tokens: recordings.StepTokens = "512",
    kind: recordings.Kind = None,
    phase: recordings.Phase = None,
    as_json: Json = False,
) -> None:
    """Where each expert should live, what that costs, and how far from the best it can be."""
    from perfmodel import hf_config, latency
    from perfmodel.placing import windows
    from perfmodel.placing.question import Question
    from perfmodel.predict import Settings, basis_of

    profile, moe_shape = machine_of(hardware_name), hf_config.resolve(shape)
    memory = _memory(shape, other_weights)
    steps_of = whole(steps, "--steps"), whole(step_tokens, "--step-tokens")
    hints = recordings.Hints(moe_shape, None, *steps_of, kind, phase, memory.n_model_layers)
    recording = recordings.recording_of(routing, hints)
    later = None if held_out is None else recordings.recording_of(held_out, hints)
    asked = _Memory(hbm_budget, context, sequences, workspace, host_budget, host_holds_all)
    capacity_bytes, budget = _capacity(asked, profile, moe_shape, memory, recording)
    bound = None if limit is None else number(limit.removesuffix("x"), "--limit")
    basis = basis_of(profile, moe_shape, latency.load_model(model) if model else None)
    found: list[Answer] = []
    for sizes in _sizes(tokens, mix):
        batches, words = windows.batches(recording, sizes, moe_shape.top_k, later=later)
        host_bytes = _host_bytes(asked, profile, moe_shape, recording)
        start = AUTO if access == AUTO else access
        question = Question(
            basis,
            moe_shape,
            "zero-copy" if start == AUTO else start,
            batches,
            capacity_bytes,
            host_bytes,
            op,
            Settings(residency=residency),
        )
        found.append(_answered(question, words, budget, policy, start == AUTO))
        if bound is not None:
            more, _ = windows.batches(recording, dict.fromkeys(BATCH_SIZES, 1.0), moe_shape.top_k, later=later)
            found[-1] = _limited(found[-1], bound, more)
        if pareto:
            found[-1] = _with_trade_off(found[-1])
    progress("")
    _write(found[0], recording, memory, out, export, to)
    if as_json:
        pages = [report.placing_json(one) for one in found]
        print_json(pages[0] if len(pages) == 1 else pages)
    else:
        print_words("\n\n".join(report.placing_page(one) for one in found))


@dataclass(frozen=True)
class _Memory:
    """What was said of memory, in words."""

    hbm_budget: str | None
    context: str | None
    sequences: str
    workspace: str | None
    host_budget: str | None
    host_holds_all: bool


def _memory(shape: str, other_weights: str | None) -> "ModelMemory":
    """What the model takes besides its experts, as its config says, or the person."""
    from perfmodel.model_memory import model_memory

    found = model_memory(shape)
    if other_weights is not None:
        found = replace(found, non_expert_bytes=float(text.parse_bytes(other_weights)))
    return found


def _capacity(
    asked: _Memory, profile: "HardwareProfile", shape: "MoEShape", memory: "ModelMemory", recording: Recording
) -> tuple[float, list[str]]:
    """Device memory for the experts of the recorded layers, and in words how it came about."""
    from perfmodel.placement.budget import WORKSPACE_BYTES, expert_budget

    n_layers = recording.loads.shape[1]
    all_bytes = n_layers * shape.layer_bytes
    experts = f"{n_layers} layers of {shape.n_experts} experts of {text.n_bytes(shape.expert_bytes)}: "
    share = EXPERT_FRAC.fullmatch(asked.hbm_budget or "")
    if share is not None:
        capacity = number(share[1], "--hbm-budget") / 100 * all_bytes
        return capacity, [f"{experts}{text.n_bytes(all_bytes)}, of which {text.n_bytes(capacity)} may be resident"]
    said = asked.hbm_budget
    total = profile["memory_capacity_bytes"] if said is None else float(text.parse_bytes(said))
    notes = []
    if memory.non_expert_bytes is None:
        notes = [f"weights besides experts are not known and count as none: {'; '.join(memory.notes)}"]
        memory = replace(memory, non_expert_bytes=0.0)
    budget = expert_budget(
        total,
        shape,
        memory,
        n_context_tokens=0 if asked.context is None else whole(asked.context, "--context"),
        n_sequences=whole(asked.sequences, "--sequences"),
        workspace_bytes=WORKSPACE_BYTES if asked.workspace is None else float(text.parse_bytes(asked.workspace)),
    )
    taken = f"weights besides experts {text.n_bytes(budget.non_expert_bytes)}, KV cache {text.n_bytes(budget.kv_bytes)}"
    words = (
        f"{experts}{text.n_bytes(all_bytes)}; of {text.n_bytes(total)} of device memory {taken} and workspace "
        f"{text.n_bytes(budget.workspace_bytes)} leave {text.n_bytes(budget.expert_bytes)} for experts of "
        f"{shape.n_layers} layers"
    )
    capacity = budget.expert_bytes
    if n_layers != shape.n_layers:
        capacity *= n_layers / shape.n_layers
        notes.append(f"{recording.name} has {n_layers} of {shape.n_layers} layers: they get their part of it")
    return min(capacity, all_bytes), [words, *notes]


def _host_bytes(asked: _Memory, profile: "HardwareProfile", shape: "MoEShape", recording: Recording) -> float | None:
    """Host memory for the experts of the recorded layers; null where nothing limits it."""
    known = profile.first("host_capacity_bytes")
    if asked.host_budget is not None:
        total = float(text.parse_bytes(asked.host_budget))
    elif known is not None:
        total = known[1].value
    else:
        return None
    part = recording.loads.shape[1] / shape.n_layers
    if asked.host_holds_all and shape.n_layers * shape.layer_bytes > total:
        raise InputError(
            f"host memory of {text.n_bytes(total)} cannot hold all experts, "
            f"{text.n_bytes(shape.n_layers * shape.layer_bytes)}, as --host-holds-all says the engine does"
        )
    return float(total * part)


def _sizes(tokens: str, mix: str | None) -> list[dict[int, float]]:
    """The questions: one for each batch size, or one for a mix of passes."""
    if mix is None:
        return [{whole(word.strip(), "--tokens"): 1.0} for word in tokens.split(",")]
    found: dict[int, float] = {}
    for word in mix.split(","):
        match = MIX.fullmatch(word)
        if match is None:
            raise InputError(f"--mix has {word!r}, expected passes x tokens such as 200x64")
        size = whole(match[2], "--mix")
        found[size] = found.get(size, 0.0) + number(match[1], "--mix")
    return [found]


def _answered(question: "Question", words: str, budget: list[str], policy: str, is_auto: bool) -> "Answer":
    """All policies, or one beside ours, under the access mode that was asked for, or the best one."""
    from perfmodel.placing import answers
    from perfmodel.placing.compare import FORESEEN, OPTIMAL, best_of, compare, domains, policy_names
    from perfmodel.placing.question import prediction

    accesses = answers.by_access(question, progress) if is_auto else {}
    if accesses:
        question = replace(question, access=next(iter(accesses)))
    names = (*policy_names(question), FORESEEN) if policy == ALL else (policy,)
    outcomes = compare(question, names, progress)
    best = next((one for one in outcomes if one.policy == OPTIMAL), None) or best_of(outcomes)
    batch = question.batches[0]
    return answers.Answer(
        question,
        words,
        budget,
        outcomes,
        best,
        prediction(question, batch, domains(question, best, batch), best.tier),
        accesses,
    )


def _limited(placed: "Answer", limit: float, batches: "tuple[Batch, ...]") -> "Answer":
    """The answers about a limit of slowdown."""
    from perfmodel.placing import answers

    sizes = answers.by_batch(placed.question, placed.best, batches)
    return replace(
        placed,
        limit=limit,
        leaving=answers.most_leaving(placed.question, limit, placed.best.policy, progress),
        sizes=sizes,
        within=answers.below(sizes, limit),
    )


def _with_trade_off(placed: "Answer") -> "Answer":
    from perfmodel.placing import answers

    return replace(placed, trade_off=answers.trade_off(placed.question, placed.best.policy, progress))


def _write(
    placed: "Answer", recording: Recording, memory: "ModelMemory", out: str | None, export: str | None, to: str
) -> None:
    """Write the best placement, as our own file and for an engine."""
    if out is None and export is None:
        return
    from perfmodel.placement import Placement
    from perfmodel.placement.export import export as exported
    from perfmodel.placement.export import write
    from perfmodel.placement.files import PlacedModel, write_placement

    question, best = placed.question, placed.best
    layers = tuple(int(layer) for layer in recording.layers)
    if memory.moe_layers is not None and len(layers) == len(memory.moe_layers) and layers[-1] < len(layers):
        layers = memory.moe_layers  # those of a pattern are counted among themselves
    model = PlacedModel(
        Placement(best.policy, best.tier),
        question.shape,
        layers,
        memory.n_model_layers,
        {"hardware": question.basis.device.profile.name, "access": question.access, "windows": placed.windows},
        {"slowdown": best.slowdown, "held_out_ns": best.held_out_ns.tolist(), "dispatch": best.dispatch},
    )
    if out is not None:
        write_placement(out, model)
        note(f"wrote {out}")
    if export is not None:
        if len(layers) != question.shape.n_layers:
            raise InputError(
                f"an engine needs all {question.shape.n_layers} layers, {recording.name} has {len(layers)}; "
                "--out writes those that it has"
            )
        made = exported(export, model, question.popularity, Path(out).stem if out else "placement")
        for path in write(to, made):
            note(f"wrote {path}")
        for line in (*made.flags, *made.warnings, *([made.rounding.words()] if made.rounding else [])):
            note(line)
