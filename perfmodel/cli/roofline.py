"""The command about rooflines: it loads, makes one call, prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfmodel import hardware, report
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Cache, Json, Top, app, print_json, print_words, read, whole
from perfmodel.errors import InputError

if TYPE_CHECKING:
    import polars as pl


@app.command(name="roofline")
def roofline_command(
    source: Annotated[
        str,
        typer.Argument(metavar="CAPTURE-or-HARDWARE", help="Capture folder, profile name, or .toml file of a machine."),
    ],
    trace: Annotated[
        str | None, typer.Option(help="A trace whose matrix products are shown instead of what a capture measured.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Ceilings and points of this dtype; that of the capture or trace, else bf16.")
    ] = None,
    op: Annotated[str | None, typer.Option(help="Only points of this operation, such as grouped_gemm.")] = None,
    shape: Annotated[str | None, typer.Option(help="Only points of this shape.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A fitted model, or the name of a shipped one, that says what is lost to what.")
    ] = None,
    top: Top = None,
    cache: Cache = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Which ceilings a machine has, how near to them measurements came, and which lost most time below."""
    from perfmodel.analysis import analyse
    from perfmodel.latency import load_model
    from perfmodel.roofline import dtypes_by_time, only, roofline

    check_html(html)
    n_top = whole(top, "--top") if top else None
    profile = machine_of(source)
    observations = products = None
    if trace is not None:
        products = analyse(read(trace, cache)).products
        found_dtype = dtype or dtypes_by_time(products)[0]
    elif source not in hardware.names() and Path(source).is_dir():
        observations, found_dtype = _observations(source, dtype)
    else:
        found_dtype = dtype or "bf16"
    if model is not None and observations is None:
        raise InputError("--model says why workloads of a capture stand below the roof: give a capture folder")
    fitted = load_model(model) if model else None
    found = roofline(profile, found_dtype, observations=observations, products=products, model=fitted)
    found = only(found, op, shape)
    words = report.roofline_page(found, n_top or report.N_TOP)

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.roofline_figures(found, shape)

    write_html(html, f"Roofline of {Path(source).name}", words, draw)
    if as_json:
        print_json(report.roofline_json(found, n_top))
    else:
        print_words(words)


def _observations(folder: str, dtype: str | None) -> tuple["pl.DataFrame", str]:
    """The workloads of a capture in a dtype, its own unless said; offloaded ones and both ways to launch among them."""
    from perfmodel.capture import load_capture, per_workload

    capture = load_capture(folder)
    every, wanted = per_workload(capture.observations), dtype or capture.dtype
    mine = every.filter(every["dtype"] == wanted)
    if mine.is_empty():
        dtypes = ", ".join(every["dtype"].unique().sort())
        raise InputError(f"nothing was measured of dtype {wanted!r}; there are {dtypes}")
    return mine, wanted
