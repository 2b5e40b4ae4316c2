"""Commands that carry a fitted model to another machine: which points to measure there, and what they change."""

from pathlib import Path
from typing import Annotated

import typer

from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Json, app, note, print_json, print_words, whole
from perfmodel.errors import InputError
from perfmodel.report.adapting import calibration_page, design_page

Model = Annotated[str, typer.Argument(help="A model written by `perfmodel fit`, or the name of a shipped one.")]


@app.command()
def calibrate(
    model: Model,
    captures: Annotated[
        list[str], typer.Argument(help="Capture folders of the new machine, or a moe_perf table, with a few points.")
    ],
    out: Annotated[str, typer.Option(help="Where to write the calibrated model, as JSON.")],
    kernel: Annotated[str | None, typer.Option(help="Of a table, the kernel whose name contains this.")] = None,
    hardware_name: Annotated[
        str | None,
        typer.Option("--hardware", help="The machine of a table: profile name or .toml file; `perfmodel list`."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Carry a fitted model to a new machine, driver or kernel version by a few measured points."""
    from perfmodel import adapt, latency, sources

    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"cannot write {out!r}: its folder does not exist")
    fitted = latency.load_model(model)
    machine = machine_of(hardware_name) if hardware_name else None
    source = sources.only_source(sources.read_sources(captures, kernel, machine, note, must_agree=True))
    found = adapt.calibrate(fitted, source.observations, source.profile, source.kernel)
    found.evidence_ = source.evidence | found.evidence_
    latency.save_model(found, out)
    if as_json:
        print_json({"kernel": found.kernel, "hardware": found.profile.name, **found.evidence_["calibrated"]})
    else:
        print_words(calibration_page(found))
    note(f"wrote {out}")


@app.command()
def design(
    model: Model,
    points: Annotated[str, typer.Option(help="How many points to measure.")] = "10",
    hardware_name: Annotated[
        str | None,
        typer.Option("--hardware", help="The new machine: profile name, .toml file or capture folder."),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="What you will ask about: catalogue name or config.json; may be repeated.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Write a plan for `perfmodel collect sweep --points FILE`.")] = None,
    as_json: Json = False,
) -> None:
    """Which few points to measure on a new machine so that a fitted model learns the most from them."""
    from perfmodel import design as designing
    from perfmodel import latency

    fitted = latency.load_model(model)
    profile = machine_of(hardware_name) if hardware_name else fitted.profile
    chosen = designing.design(fitted, whole(points, "--points"), profile=profile, shapes=shape or ())
    if out:
        designing.write_plan(chosen, out)
    if as_json:
        print_json({"kernel": fitted.kernel, "hardware": profile.name, "points": chosen.to_dicts()})
    else:
        print_words(design_page(chosen, fitted, profile.name))
    if out:
        note(f"wrote {out}")
