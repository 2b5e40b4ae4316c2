"""Commands about traces: each reads, makes one call, prints."""

from pathlib import Path
from typing import Annotated

import typer

from perfmodel import fusion, hardware, report, text
from perfmodel.cli.shell import Json, Top, TracePath, app, note, print_json, print_words, read, whole, width
from perfmodel.errors import InputError


@app.command()
def analyze(
    trace: TracePath,
    hardware_name: Annotated[
        str | None, typer.Option("--hardware", help="Profile of the machine that ran it: what its link could do.")
    ] = None,
    top: Top = None,
    as_json: Json = False,
) -> None:
    """Where does the time of a trace go: coverage, launch metrics (TKLQT and friends), busy and idle time."""
    from perfmodel.analysis import analyse

    profile = hardware.hardware(hardware_name) if hardware_name else None
    n_top = whole(top, "--top") if top else None
    found = analyse(read(trace), profile)
    if as_json:
        print_json(found.to_json(n_top))
    else:
        print_words(report.trace_page(found, Path(trace).name, n_top or report.N_TOP, width()))


@app.command(name="diff")
def diff_command(
    a: TracePath,
    b: Annotated[str, typer.Argument(help="The trace to compare with it.")],
    top: Top = None,
    as_json: Json = False,
) -> None:
    """What differs between two traces: launch metrics, kernel classes and operators, not kernel names."""
    from perfmodel.diff import diff

    found = diff(read(a), read(b))
    n_top = whole(top, "--top") if top else report.N_TOP
    if as_json:
        print_json(found.to_json())
    else:
        print_words(report.diff_page(found, (Path(a).name, Path(b).name), n_top, width()))


@app.command(name="fusion")
def fusion_command(
    trace: TracePath,
    lengths: Annotated[str, typer.Option(help="Chain lengths, separated by commas.")] = "2,4,8,16,32,64",
    threshold: Annotated[float, typer.Option(help="Lowest proximity score to list, 0 to 1.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Which chains of kernels always follow one another, and what fusing them would save at best."""
    wanted = [whole(word, "--lengths") for word in lengths.split(",")]
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold is {threshold:g}, expected 0 to 1")
    loaded = read(trace)
    by_length = fusion.fusion_table(loaded.events, wanted)
    chains = fusion.chains(loaded.events, min(wanted), threshold)
    if as_json:
        print_json({"lengths": by_length.to_dicts(), "chains": chains.to_dicts()})
    else:
        print_words(report.fusion_page(by_length, chains, Path(trace).name, width()))


@app.command()
def export(
    trace: TracePath,
    perfetto: Annotated[str, typer.Option(help="File to write for ui.perfetto.dev: .json, or .json.gz to pack it.")],
) -> None:
    """Write the trace for a viewer, with lines added that say what waited: launch delay, queueing, idle, classes."""
    from perfmodel.perfetto import export_perfetto

    n_slices = export_perfetto(read(trace), perfetto)
    note(f"wrote {text.count(n_slices)} slices to {perfetto}; open it at https://ui.perfetto.dev")
