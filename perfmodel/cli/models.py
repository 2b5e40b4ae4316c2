"""Commands about models, machines and captures: each loads, makes one call, prints."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from perfmodel import hardware, report, text
from perfmodel.cli.shell import Json, app, fraction, note, print_json, print_words, whole
from perfmodel.errors import InputError, MissingExtraError


@app.command()
def fit(
    captures: Annotated[list[str], typer.Argument(help="Capture folders of one machine, kernel and dtype.")],
    out: Annotated[str, typer.Option(help="Where to write the model, as JSON.")],
) -> None:
    """Fit the physical latency model to measurements and say how well it predicts shapes it has not seen."""
    from perfmodel import fitting

    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"cannot write {out!r}: its folder does not exist")
    model, errors = fitting.fit_captures(captures, progress=note)
    model.save(out)
    print_words(report.fit_page(model, errors))
    note(f"wrote {out}")


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
    access: Annotated[str, typer.Option(help="zero-copy, copy, copy-overlap or cpu.")] = "zero-copy",
    op: Annotated[
        str, typer.Option(help="grouped-gemm (the experts alone) or moe-layer (router to combine).")
    ] = "grouped-gemm",
    model: Annotated[
        str | None, typer.Option(help="A model written by `perfmodel fit`, or the name of a shipped one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Store the weights in this dtype instead of the shape's.")] = None,
    as_json: Json = False,
) -> None:
    """What a MoE layer costs when a fraction of its experts leaves device memory, and why."""
    from perfmodel import hf_config, latency
    from perfmodel import predict as predicting
    from perfmodel.routing import routing as routing_of

    offload_frac = fraction(offload, "--offload")
    profile = _machine(hardware_name)
    moe_shape = hf_config.resolve(shape)
    moe_shape = replace(moe_shape, dtype=dtype) if dtype else moe_shape
    batch = routing_of(routing, moe_shape.n_experts, moe_shape.top_k, whole(tokens, "--tokens"))
    fitted = latency.load_model(model) if model else None
    result = predicting.predict(profile, moe_shape, batch, offload_frac, access, op=op, model=fitted)
    if as_json:
        print_json(result.to_json())
    else:
        print_words(
            f"{moe_shape.name} on {profile.title}, {text.count(batch.n_tokens)} tokens, {batch.name}, {access}\n"
            f"{result}"
        )


def _machine(name: str) -> hardware.HardwareProfile:
    """The machine of that name, TOML file, or capture folder."""
    if name not in hardware.names() and Path(name).is_dir():
        from perfmodel.capture import load_capture, profile_of

        return profile_of(load_capture(name))
    return hardware.hardware(name)


@app.command()
def check(
    baseline: Annotated[str, typer.Argument(help="Capture folder of the machine, driver or build as it was.")],
    candidate: Annotated[str, typer.Argument(help="Capture folder of what is to be judged.")],
    margin: Annotated[str, typer.Option(help="Slowdown that does not matter.")] = "3%",
    axis: Annotated[
        list[str] | None,
        typer.Option(help="What may differ: machine, software, kernel, settings, or with a key (software.torch)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Is the candidate slower than the baseline: exit 0 no, 1 slower, 2 bad usage, 3 not comparable."""
    from perfmodel import regression
    from perfmodel.capture import load_capture

    sides = load_capture(baseline), load_capture(candidate)
    verdicts = regression.check(*sides, fraction(margin, "--margin"), axis or ())
    missing = {"baseline": regression.n_missing(*sides[::-1]), "candidate": regression.n_missing(*sides)}
    if as_json:
        rows = [asdict(v) for v in verdicts]
        print_json({"slower": regression.is_slower(verdicts), "n_missing_workloads": missing, "verdicts": rows})
    else:
        print_words(report.check_page(verdicts))
    for side, n_missing in missing.items():
        if n_missing:
            note(f"{n_missing} workloads of the other capture are missing in the {side} and were not compared")
    raise typer.Exit(1 if regression.is_slower(verdicts) else 0)


@app.command()
def schedule(
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json.")],
    hardware_name: Annotated[str, typer.Option("--hardware", help="Profile with a peer link, such as h100-sxm.")],
    gpus: Annotated[str, typer.Option(help="GPUs that share the experts.")],
    tokens: Annotated[str, typer.Option(help="Tokens per GPU.")],
    as_json: Json = False,
) -> None:
    """What an expert-parallel layer costs under bulk, chunked and fused schedules (closed forms)."""
    from perfmodel import hf_config
    from perfmodel import schedule as schedules

    profile, moe_shape = hardware.hardware(hardware_name), hf_config.resolve(shape)
    rows = [
        schedules.layer_schedule(moe_shape, profile, whole(gpus, "--gpus"), whole(tokens, "--tokens"), name)
        for name in schedules.SCHEDULES
    ]
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        print_words(report.schedule_page(rows))


@app.command(name="list")
def list_names() -> None:
    """The names that other commands accept: hardware, shapes, routings, access modes, fitted models, captures."""
    from perfmodel import capture, latency, moe, offload, routing

    rows = {
        "hardware": hardware.names(),
        "shapes": moe.names(),
        "routings": routing.pattern_usages(),
        "access": list(offload.ACCESS_MODES),
        "models": list(latency.shipped_models()),
        "captures": [os.path.relpath(path) for path in capture.shipped_captures()],
    }
    for title, names in rows.items():
        print_words(f"{title:10}" + f"\n{'':10}".join(names))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def collect(context: typer.Context) -> None:
    """Measure this machine: `perfmodel collect sweep --out DIR` is `python -m collectors sweep --out DIR`."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError('collecting needs torch, which is not installed: pip install "perfmodel[collect]"')
    raise typer.Exit(subprocess.call([sys.executable, "-m", _sibling("collectors"), *context.args]))


@app.command(name="app")
def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Do not open a browser window.")] = False,
) -> None:
    """Open the dashboard in the browser, with the shipped captures loaded; it listens on loopback only."""
    if importlib.util.find_spec("streamlit") is None:
        raise MissingExtraError('the dashboard needs streamlit, which is not installed: pip install "perfmodel[app]"')
    spec = importlib.util.find_spec(_sibling("app"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the dashboard's files are missing from this installation")
    main_script = Path(next(iter(spec.submodule_search_locations))) / "main.py"
    # Everything else is in app/.streamlit/config.toml, which Streamlit reads beside the script; what guards privacy is
    # said here again, because environment variables outrank that file.
    options = [f"--server.port={port}", f"--server.headless={str(headless).lower()}"]
    options += ["--server.address=127.0.0.1", "--browser.gatherUsageStats=false"]
    raise typer.Exit(subprocess.call([sys.executable, "-m", "streamlit", "run", str(main_script), *options]))


def _sibling(name: str) -> str:
    """`app` or `collectors`: inside this package when installed from a wheel, beside it in a checkout."""
    inside = f"perfmodel.{name}"
    return inside if importlib.util.find_spec(inside) is not None else name
