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
    from perfmodel.latency import load_model
    from perfmodel.roofline import dtype_of, roofline

    check_html(html)
    n_top = whole(top, "--top") if top else None
    profile = machine_of(source)
    observations = products = None
    if trace is not None:
        products = _products(trace, cache)
        found_dtype = dtype or dtype_of(products)
        products = _only(_only(products, "op", op), "shape", shape) if op or shape else products
    elif source not in hardware.names() and Path(source).is_dir():
        observations, found_dtype = _observations(source, dtype)
        observations = _only(_only(observations, "op", op), "shape", shape)
    else:
        found_dtype = dtype or "bf16"
    if model is not None and observations is None:
        raise InputError("--model says why workloads of a capture stand below the roof: give a capture folder")
    fitted = load_model(model) if model else None
    found = roofline(profile, found_dtype, observations=observations, products=products, model=fitted)
    words = report.roofline_page(found, n_top or report.N_TOP)

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.roofline_figures(found, shape)

    write_html(html, f"Roofline of {source}", words, draw)
    if as_json:
        print_json(report.roofline_json(found, n_top))
    else:
        print_words(words)


def _products(trace: str, cache: str | None) -> "pl.DataFrame":
    from perfmodel.analysis import analyse

    return analyse(read(trace, cache)).products


def _observations(folder: str, dtype: str | None) -> tuple["pl.DataFrame", str]:
    """The workloads of a capture in a dtype, its own unless said; offloaded ones and both ways to launch among them."""
    from perfmodel.capture import load_capture, per_workload

    capture = load_capture(folder)
    every, wanted = per_workload(capture.observations), dtype or capture.dtype
    return _only(every, "dtype", wanted), wanted


def _only(table: "pl.DataFrame", column: str, wanted: str | None) -> "pl.DataFrame":
    """The rows with that word in a column; raises InputError naming the words there are where none has it."""
    if wanted is None:
        return table
    words = table[column].cast(str)
    if wanted not in words:
        raise InputError(f"nothing was measured of {column} {wanted!r}; there are {', '.join(words.unique().sort())}")
    return table.filter(words == wanted)
