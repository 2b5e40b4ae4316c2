"""Commands about the latency model: each loads, makes one call, prints."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfmodel import hardware, report, text
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.shell import Json, app, fraction, note, print_json, print_words, progress, whole
from perfmodel.errors import InputError

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which other commands do not need
    from collections.abc import Sequence

    from perfmodel.evaluation import Evaluation
    from perfmodel.latency import LatencyModel

Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="Capture folders, or aiconfigurator moe_perf.parquet files.")
]
Kernel = Annotated[
    str | None, typer.Option("--kernel", help="Only kernels whose name contains this: framework/version/kernel/dtype.")
]
Machine = Annotated[
    str | None, typer.Option("--hardware", help="Profile of a table's GPU where none is shipped for its name.")
]


@app.command()
def fit(
    sources: Sources,
    out: Annotated[str, typer.Option(help="Where to write the model, as JSON.")],
    kernel: Kernel = None,
    hardware_name: Machine = None,
    html: Html = None,
) -> None:
    """Fit the physical latency model to measurements of one kernel and say how well it predicts unseen shapes."""
    from perfmodel import fitting
    from perfmodel.latency import save_model
    from perfmodel.sources import only_source, read_sources

    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"cannot write {out!r}: its folder does not exist")
    check_html(html)
    machine = machine_of(hardware_name) if hardware_name else None
    source = only_source(read_sources(sources, kernel, machine, note, must_agree=True))
    try:
        model = fitting.fit_source(source, progress=_told)
    finally:
        progress("")
    save_model(model, out)
    words = report.fit_page(model)

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures
        from perfmodel.evaluation import held_out_points

        return figures.accuracy_figures(held_out_points(model, source.observations), model.errors_["model"]["all"])

    write_html(html, f"A latency model of {source.name}", f"{words}\n\n{report.limits_page(model)}", draw)
    print_words(words)
    note(f"wrote {out}")


@app.command()
def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL.json] SOURCE...",
            help="A fitted model (file or shipped name), then what to judge it by; or sources alone.",
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            help="What is held out: shape, routing, tokens, random; or none, to judge MODEL as it is (its default)."
        ),
    ] = None,
    kernel: Kernel = None,
    hardware_name: Machine = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """How well latency is predicted that was not seen: errors beside simple baselines, and coverage of intervals.

    Splits other than none fit models anew to parts of the sources, with the constants of MODEL, where given, as prior.
    """
    from perfmodel import evaluation
    from perfmodel.latency import LatencyModel, load_model, shipped_models
    from perfmodel.offload.fit import judge_offload
    from perfmodel.sources import read_sources
    from perfmodel.transfer import transferred

    check_html(html)
    is_model = sources[0] in shipped_models() or sources[0].endswith(".json")
    if is_model and len(sources) == 1:
        raise InputError("give what to judge the model by: a capture folder or a moe_perf table")
    given = load_model(sources[0]) if is_model else None
    chosen = split or ("none" if given else "shape")
    if chosen not in evaluation.SPLITS:
        raise InputError(f"unknown split {chosen!r}; known: {', '.join(evaluation.SPLITS)}")
    if chosen == "none" and given is None:
        raise InputError("without a split there is nothing to judge but a model: give MODEL.json first")
    machine = machine_of(hardware_name) if hardware_name else None
    wanted = kernel or (None if given is None else given.kernel)
    found, offloaded = [], {}
    read = read_sources(sources[is_model:], wanted, machine, note, any_version=kernel is None)
    for source in read:
        model = given if chosen == "none" and given else LatencyModel(source.profile, source.dtype, source.kernel)
        is_here = given is not None and given.profile.own_quantities == source.profile.own_quantities
        if model is given and not (is_here and given.kernel == source.kernel):
            note(
                f"{source.kernel} on {source.profile.name} is judged by a model of {given.kernel} on "
                f"{given.profile.name}: nothing was fitted to it"
            )
        if chosen != "none" and given is not None and type(given.constants_) is type(model.form.defaults):
            model.prior = given.constants_
        try:
            found.append(
                evaluation.evaluate(
                    model,
                    source.observations,
                    chosen,
                    _told,
                    is_screened=source.is_screened,
                    machine=source.profile,
                    kernel=source.kernel,
                )
            )
            if model is given and source.offloaded.height:
                moved = transferred(model, source.profile)
                moved.offload_ = model.offload_  # shares of the link's and the host's rates, to be judged as they are
                offloaded[len(found) - 1] = judge_offload(moved, source.every)
        except InputError as error:
            if len(read) > 1 and kernel is None:
                note(f"left out {source.kernel}: {error}")
                continue
            raise
        finally:
            progress("")
    if not found:
        raise InputError(f"no kernel of these sources can be judged by the split {chosen!r}")
    result = evaluation.report_of(found)
    for i, ways in offloaded.items():
        result["kernels"][i]["offload"] = ways
    words = report.evaluation_page(result)
    _write_evaluation(html, ", ".join(sources[is_model:]), words, found)
    if as_json:
        print_json(result)
    else:
        print_words(words)


def _write_evaluation(html: str | None, sources: str, words: str, found: "Sequence[Evaluation]") -> None:
    """The report of an evaluation, with the figures of every kernel."""

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import evaluation, figures

        drawn = []
        for one in found:
            errors = evaluation.errors_of(one.table["predicted_ns"].to_numpy(), one.table["measured_ns"].to_numpy())
            kernel = f"{one.kernel}: " if len(found) > 1 else ""
            drawn += [(figure, kernel + alt) for figure, alt in figures.accuracy_figures(one.table, asdict(errors))]
        return drawn

    write_html(html, f"Predictions of what was not seen: {sources}", words, draw)


@app.command()
def predict(
    hardware_name: Annotated[
        str, typer.Option("--hardware", help="Profile name, .toml file or capture folder; `perfmodel list`.")
    ],
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json; `perfmodel list`.")],
    tokens: Annotated[str, typer.Option(help="Tokens in the batch.")],
    routing: Annotated[
        str, typer.Option(help="A pattern (see `perfmodel list`), or a file of counts as FILE[#KEY][@LAYER].")
    ] = "uniform",
    offload: Annotated[
        str, typer.Option(help="Fraction of each layer's experts in host memory, least used first.")
    ] = "0",
    access: Annotated[str, typer.Option(help="How offloaded experts are used; `perfmodel list`.")] = "zero-copy",
    op: Annotated[
        str,
        typer.Option(
            help="grouped-gemm (the experts alone), moe-layer (router to combine), or fused-moe (from logits on)."
        ),
    ] = "grouped-gemm",
    model: Annotated[
        str | None, typer.Option(help="A model written by `perfmodel fit`, or the name of a shipped one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Store the weights in this dtype instead of the shape's.")] = None,
    launch: Annotated[
        str | None,
        typer.Option(help="graph, or eager (never faster than the host launches); as the model was fitted by default."),
    ] = None,
    host_time: Annotated[
        str | None,
        typer.Option(help="What the host needs to launch it call by call, such as 180us, from launch metrics."),
    ] = None,
    residency: Annotated[
        str | None, typer.Option(help="How zero-copy sees two memories: mapped (one launch), split (two), system.")
    ] = None,
    slots: Annotated[str | None, typer.Option(help="Experts of a layer that a paged device memory holds.")] = None,
    host_model: Annotated[
        str | None, typer.Option(help="A fitted model of the host CPU, for experts computed on it.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add what binds, what would change the answer, the nearest measurements.")
    ] = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """What a MoE layer costs when a fraction of its experts leaves device memory, and why."""
    from perfmodel import hf_config, latency
    from perfmodel import predict as predicting
    from perfmodel.routing import routing as routing_of

    check_html(html)
    offload_frac = fraction(offload, "--offload")
    profile = machine_of(hardware_name)
    moe_shape = hf_config.resolve(shape)
    moe_shape = replace(moe_shape, dtype=dtype) if dtype else moe_shape
    batch = routing_of(routing, moe_shape.n_experts, moe_shape.top_k, whole(tokens, "--tokens"))
    fitted = latency.load_model(model) if model else None
    settings = predicting.Settings(
        residency=residency,
        n_slots=None if slots is None else whole(slots, "--slots"),
        host_ns=None if host_time is None else text.parse_ns(host_time),
        host_model=None if host_model is None else _host_model(host_model),
    )
    result = predicting.predict(
        profile,
        moe_shape,
        batch,
        offload_frac,
        access,
        op=op,
        model=fitted,
        launch=launch,
        settings=settings,
        explained=explain or not as_json,
    )
    head = f"{moe_shape.name} on {profile.title}, {text.count(batch.n_tokens)} tokens, {batch.name}, {access}"

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        curve = predicting.slowdown_curve(
            profile, moe_shape, batch, access, op=op, model=fitted, launch=launch, settings=settings
        )
        seen = {}
        if hardware_name not in hardware.names() and Path(hardware_name).is_dir() and op != predicting.OPS[0]:
            from perfmodel.capture import load_capture
            from perfmodel.placing.curves import measured_slowdowns

            seen = measured_slowdowns(load_capture(hardware_name), moe_shape, batch.n_tokens, batch.name, access)
        return figures.prediction_figures({access: curve}, result, seen)

    write_html(html, head, f"{head}\n{result}", draw)
    if as_json:
        print_json(result.to_json())
    else:
        print_words(f"{head}\n{result}")


def _host_model(source: str) -> "LatencyModel":
    from perfmodel.latency import load_model

    model = load_model(source)
    if model.profile.device != "cpu":
        raise InputError(f"--host-model is of a {model.profile.device} ({model.profile.name}), expected one of a cpu")
    return model


def machine_of(name: str) -> hardware.HardwareProfile:
    """The machine of that name, TOML file, or capture folder."""
    if name not in hardware.names() and Path(name).is_dir():
        from perfmodel.capture import load_capture, profile_of

        return profile_of(load_capture(name))
    return hardware.hardware(name)


def _told(words: str) -> None:
    """Progress of long work: one line that changes for a person who watches, nothing in a log."""
    if sys.stderr.isatty():
        progress(words)
