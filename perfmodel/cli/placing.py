"""The command about placements: it loads, asks, prints, and writes what engines read."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfmodel import report, text
from perfmodel.cli import recordings
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Json, app, note, number, print_json, print_words, progress, whole, width
from perfmodel.errors import InputError
from perfmodel.routing import Recording

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which other commands do not need
    from perfmodel.model_memory import ModelMemory
    from perfmodel.placing.answers import Answer

AUTO = "auto"


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
    policy: Annotated[str, typer.Option(help="One policy, or all; docs/placement.md.")] = "all",
    tokens: Annotated[
        str | None, typer.Option(help="Tokens of a pass, each answered by itself: 64,4096; 64 unless given.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option(help="Passes of several sizes placed for together, such as 200x64,1x4096.")
    ] = None,
    requests: Annotated[
        str | None,
        typer.Option(help="Instead of --mix: tokens of prompt and output, such as 512+128, of --sequences at a time."),
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
    context: Annotated[
        str | None, typer.Option(help="Tokens of each sequence in the KV cache; those of --requests unless given.")
    ] = None,
    sequences: Annotated[str, typer.Option(help="Sequences at a time, all in the KV cache.")] = "1",
    other_weights: Annotated[
        str | None, typer.Option(help="Weights besides experts, such as 6GB, where the shape's config does not say.")
    ] = None,
    workspace: Annotated[str | None, typer.Option(help="Activations, graphs, CUDA context, such as 2GiB.")] = None,
    host_budget: Annotated[str | None, typer.Option(help="Host memory for experts; that of the profile.")] = None,
    host_holds_all: Annotated[
        bool, typer.Option("--host-holds-all", help="The engine keeps all experts in host memory too (ktransformers).")
    ] = False,
    replicas: Annotated[str, typer.Option(help="Replicas of the model on other devices of the same host.")] = "1",
    copies: Annotated[
        str | None, typer.Option(help="Further copies of hot experts that the engine keeps in device memory.")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="As many resident experts in each layer (--kt-num-gpu-experts).")
    ] = False,
    limit: Annotated[
        str | None, typer.Option(help="A slowdown such as 1.2x: how many experts may leave, and at which batches.")
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Add slowdown by device memory.")] = False,
    out: Annotated[str | None, typer.Option(help="Write the best placement to this .json file.")] = None,
    export: Annotated[
        str | None,
        typer.Option(help="Write it for an engine: sglang, ktransformers, llama.cpp, vllm ...; docs/export.md."),
    ] = None,
    to: Annotated[str, typer.Option(help="Folder for --export.")] = ".",
    steps: recordings.Steps = "16",
    step_tokens: recordings.StepTokens = "512",
    kind: recordings.Kind = None,
    phase: recordings.Phase = None,
    seed: Annotated[str, typer.Option(help="Of what is drawn: windows, the random policy, the search.")] = "1",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Where each expert should live, what that costs, and how far from the best it can be."""
    from perfmodel import hf_config, latency
    from perfmodel.model_memory import model_memory
    from perfmodel.placing.ask import ask, sizes_of, with_device_memory
    from perfmodel.placing.room import Engine

    check_html(html)
    n_sequences = whole(sequences, "--sequences")
    questions, n_context = sizes_of(tokens, mix, requests, n_sequences)
    if out or export:
        _check_writing(out, export, to, len(questions))
    bound = _bound(limit)
    profile, moe_shape = machine_of(hardware_name), hf_config.resolve(shape)
    memory = model_memory(shape)
    if other_weights is not None:
        memory = replace(memory, non_expert_bytes=float(text.parse_bytes(other_weights)))
    steps_of = whole(steps, "--steps"), whole(step_tokens, "--step-tokens")
    hints = recordings.Hints(moe_shape, None, *steps_of, kind, phase, memory.n_model_layers)
    recording = recordings.recording_of(routing, hints)
    later = None if held_out is None else recordings.recording_of(held_out, hints)
    engine = Engine(
        n_context_tokens=n_context if context is None else whole(context, "--context"),
        n_sequences=n_sequences,
        n_copies=0 if copies is None else whole(copies, "--copies"),
        host_bytes=None if host_budget is None else float(text.parse_bytes(host_budget)),
        host_holds_all=host_holds_all,
        n_replicas=whole(replicas, "--replicas"),
        is_per_layer=per_layer,
    )
    engine = with_device_memory(engine, hbm_budget)
    if workspace is not None:
        engine = replace(engine, workspace_bytes=float(text.parse_bytes(workspace)))
    case = ask(
        profile,
        moe_shape,
        memory,
        recording,
        engine,
        access=access,
        op=op,
        model=latency.load_model(model) if model else None,
        later=later,
        residency=residency,
        seed=whole(seed, "--seed"),
    )
    try:
        found = [case.answer(each, policy, limit=bound, is_pareto=pareto, progress=progress) for each in questions]
    finally:
        progress("")
    _write(found[0], recording, memory, out, export, to)
    words = "\n\n".join(report.placing_page(one, width()) for one in found)

    def draw() -> "list[tuple[Any, str]]":
        from perfmodel import figures

        return [drawn for one in found for drawn in figures.placing_figures(one)]

    write_html(html, f"Where the experts of {moe_shape.name} should live", words, draw)
    if as_json:
        pages = [report.placing_json(one) for one in found]
        print_json(pages[0] if len(pages) == 1 else pages)
    else:
        print_words(words)


def _bound(limit: str | None) -> float | None:
    """The slowdown that --limit says."""
    bound = None if limit is None else number(limit.removesuffix("x"), "--limit")
    if bound is not None and bound < 1:
        raise InputError(f"--limit is {limit}, expected a slowdown of at least 1")
    return bound


def _check_writing(out: str | None, export: str | None, to: str, n_placements: int) -> None:
    """Refuse what cannot be written before anything is placed."""
    from perfmodel.placement.export import FORMATS

    if n_placements > 1:
        raise InputError("--out and --export write one placement: give one size of --tokens, or --mix")
    if out is not None and not Path(out).parent.is_dir():
        raise InputError(f"{Path(out).name} cannot be written: {str(Path(out).parent)!r} is no folder")
    if out is not None and Path(out).is_dir():
        raise InputError(f"--out is {out!r}, which is a folder; expected a file")
    if export is not None and export not in FORMATS:
        raise InputError(f"unknown export format {export!r}; known: {', '.join(FORMATS)}")
    if export is not None and not Path(to).is_dir():
        raise InputError(f"--to is {to!r}, which is no folder")


def _write(
    placed: "Answer", recording: Recording, memory: "ModelMemory", out: str | None, export: str | None, to: str
) -> None:
    """Write the placement that was taken, as our own file and for an engine."""
    if out is None and export is None:
        return
    from perfmodel.placement.export import export as exported
    from perfmodel.placement.export import write
    from perfmodel.placement.files import write_placement
    from perfmodel.placing.ask import handed_over

    best = placed.best
    model = handed_over(
        placed.question,
        recording,
        memory,
        best.tier,
        best.policy,
        outcome=best,
        windows=placed.windows,
        is_whole=export is not None,
    )
    made = None
    if export is not None:
        made = exported(export, model, placed.question.popularity, Path(out).stem if out else "placement")
    if out is not None:
        write_placement(out, model)
        note(f"wrote {out}")
    if made is not None:
        for path in write(to, made):
            note(f"wrote {path}")
        kept = "" if made.rounding is None else made.rounding.words()
        for line in (*made.flags, *made.warnings):
            note(line)
        if kept and not any(kept in line for line in made.warnings):
            note(kept)
