"""Commands about traces: each reads, makes one call, prints."""

import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from perfmodel import bound, fusion, hardware, report, text
from perfmodel.analysis import analyse
from perfmodel.classify import rules_before_shipped
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.shell import (
    Cache,
    Json,
    Top,
    TracePath,
    app,
    hint_at_cache,
    note,
    number,
    print_json,
    print_words,
    progress,
    read,
    whole,
    width,
)
from perfmodel.diff import diff
from perfmodel.errors import InputError, about
from perfmodel.groups import GROUPINGS
from perfmodel.launch import launch_metrics
from perfmodel.perfetto import export_perfetto
from perfmodel.ranks import summarise_ranks
from perfmodel.readers import is_folder_of_ranks
from perfmodel.readers.ncu import read_ncu
from perfmodel.readers.sweeps import read_sweeps
from perfmodel.workers import PROCESSES


@app.command()
def analyze(
    trace: TracePath,
    by: Annotated[
        str | None, typer.Option(help="Launch metrics of each rank, device, stream, process, thread, range or step.")
    ] = None,
    top: Top = None,
    hardware_name: Annotated[
        str | None,
        typer.Option("--hardware", help="Profile of the machine that ran it: roofline, and what its link does."),
    ] = None,
    ncu: Annotated[str | None, typer.Option(help="Counters of Nsight Compute, from `ncu --csv --page raw`.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Rules for kernel names (.toml), tried before those of the package (kernel_classes.toml)."),
    ] = None,
    cache: Cache = None,
    backend: Annotated[
        str, typer.Option(help="What reads a folder of ranks: a joblib backend (loky, dask ...).")
    ] = PROCESSES,
    workers: Annotated[str | None, typer.Option(help="Workers that read a folder of ranks.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of the Dask scheduler, with --backend dask.")] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Where does the time of a trace go: coverage, findings in words, launch metrics, classes, kernels, operators."""
    check_html(html)
    n_top = whole(top, "--top") if top else None
    if by is not None and by not in GROUPINGS:
        raise InputError(f"--by is {by!r}, expected one of {', '.join(GROUPINGS)}")
    n_workers = whole(workers, "--workers") if workers else None
    is_ranks = is_folder_of_ranks(Path(trace))
    if not is_ranks and (backend != PROCESSES or n_workers or scheduler):
        raise InputError(f"--backend, --workers and --scheduler read a folder of ranks; {trace} is none")
    rules_text = _rules_text(classes) if classes else None
    if is_ranks and not (by or hardware_name or ncu):
        began_ns = time.monotonic_ns()
        summary = summarise_ranks(trace, cache, backend, n_workers, scheduler, progress, rules_text)
        progress("")
        hint_at_cache(time.monotonic_ns() - began_ns, cache)
        page = report.ranks_page(summary, n_top or report.N_TOP)
        write_html(html, f"Ranks: {Path(trace).name}", page, lambda: _figures().ranks_figures(summary))
        if as_json:
            print_json(summary.to_json())
        else:
            print_words(report.ranks_page(summary, n_top or report.N_TOP, width()))
        return
    profile = hardware.hardware(hardware_name) if hardware_name else None
    counted = read_ncu(ncu) if ncu else None
    rules = rules_before_shipped(rules_text) if rules_text else None
    loaded = read(trace, cache, backend, n_workers, scheduler)
    found = analyse(loaded, hardware=profile, by=by, counted=counted, rules=rules)
    page = report.trace_page(found, Path(trace).name, n_top or report.N_TOP)
    write_html(html, f"Trace: {Path(trace).name}", page, lambda: _figures().trace_figures(found))
    if as_json:
        print_json(found.to_json(n_top))
    else:
        print_words(report.trace_page(found, Path(trace).name, n_top or report.N_TOP, width()))


def _rules_text(path: str) -> str:
    """The text of a file of rules, which were found to be sound."""
    with about(path):
        try:
            rules_text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"cannot be read: {error}") from None
        rules_before_shipped(rules_text)
        return rules_text


@app.command(name="diff")
def diff_command(
    a: TracePath,
    b: Annotated[str, typer.Argument(help="The trace to compare with it.")],
    top: Top = None,
    cache: Cache = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """What differs between two traces: launch metrics, kernel classes and operators, not kernel names."""
    check_html(html)
    n_top = whole(top, "--top") if top else None
    found = diff(read(a, cache), read(b, cache))
    names = Path(a).name, Path(b).name
    page = report.diff_page(found, names, n_top or report.N_TOP)
    write_html(html, f"From {names[0]} to {names[1]}", page, lambda: _figures().diff_figures(found))
    if as_json:
        print_json(found.to_json(n_top))
    else:
        print_words(report.diff_page(found, names, n_top or report.N_TOP, width()))


@app.command(name="fusion")
def fusion_command(
    trace: TracePath,
    lengths: Annotated[str, typer.Option(help="Chain lengths, separated by commas.")] = ",".join(
        map(str, fusion.SHORT_LENGTHS)
    ),
    threshold: Annotated[float, typer.Option(help="Lowest proximity score to list, 0 to 1.")] = 1.0,
    cache: Cache = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Which chains of kernels always follow one another, and what fusing them would save at best."""
    check_html(html)
    wanted = [whole(word, "--lengths") for word in lengths.split(",")]
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold is {threshold:g}, expected 0 to 1")
    loaded = read(trace, cache)
    by_length = fusion.fusion_table(loaded.events, wanted)
    chains = fusion.chains(loaded.events, min(wanted), threshold)
    page = report.fusion_page(by_length, chains, Path(trace).name)
    write_html(html, f"Chains of kernels: {Path(trace).name}", page, lambda: _figures().fusion_figures(by_length))
    if as_json:
        print_json({"lengths": by_length.to_dicts(), "chains": chains.to_dicts()})
    else:
        print_words(report.fusion_page(by_length, chains, Path(trace).name, width()))


@app.command()
def sweep(
    traces: Annotated[
        list[str],
        typer.Argument(help="BATCH=TRACE for each batch size, or one .csv with columns batch and tklqt_ns (or _us)."),
    ],
    factor: Annotated[
        str, typer.Option(help="Device-bound is a TKLQT above so many times that of the smallest batch.")
    ] = f"{bound.RULE_FACTOR:g}",
    cache: Cache = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """From which batch size on is the device the bound, and no longer the host: TKLQT over a sweep of batch sizes."""
    check_html(html)
    rule_factor = number(factor, "--factor")
    if len(traces) == 1 and traces[0].endswith(".csv"):
        given = read_sweeps(traces[0])
        found = {name: bound.sweep(*batches_and_tklqt, rule_factor) for name, batches_and_tklqt in given.items()}
    else:
        pairs = [_batch_and_trace(word) for word in traces]
        metrics = [launch_metrics(read(path, cache)) for _, path in pairs]
        found = {"": bound.sweep([batch for batch, _ in pairs], metrics, rule_factor)}
    pages = [(f"{name}\n\n" if name else "") + report.sweep_page(one) for name, one in found.items()]
    write_html(html, "TKLQT against batch size", "\n\n".join(pages), lambda: _figures().sweep_figures(found))
    if as_json:
        rows = [{"name": name, **asdict(one), "table": one.table.to_dicts()} for name, one in found.items()]
        print_json(rows[0] if len(rows) == 1 else {"sweeps": rows})
    else:
        print_words("\n\n".join(pages))


def _figures() -> ModuleType:
    """The package of figures, which is loaded only where one is drawn: it needs Plotly."""
    from perfmodel import figures

    return figures


def _batch_and_trace(word: str) -> tuple[int, str]:
    """The batch size and the trace of an argument such as `8=trace.json.gz`."""
    batch, equals, path = word.partition("=")
    if not equals:
        raise InputError(f"found {word!r}, expected BATCH=TRACE such as 8=trace.json.gz, or one .csv file")
    return whole(batch, "the batch size"), path


@app.command()
def export(
    trace: TracePath,
    perfetto: Annotated[str, typer.Option(help="File to write for ui.perfetto.dev: .json, or .json.gz to pack it.")],
    cache: Cache = None,
) -> None:
    """Write the trace for a viewer, with lines added that say what waited: launch delay, queueing, idle, classes."""
    _refuse_source(trace, perfetto)
    n_slices = export_perfetto(read(trace, cache), perfetto)
    note(f"wrote {text.count(n_slices)} slices to {perfetto}; open it at https://ui.perfetto.dev")


def _refuse_source(trace: str, target: str) -> None:
    """Raise InputError where writing would replace what is read, or add a file to a folder of ranks."""
    if not target:
        raise InputError("--perfetto is '', expected the name of a file")
    source, written = Path(trace).resolve(), Path(target).resolve()
    if source.is_file() and written.exists() and source.samefile(written):
        raise InputError(f"{target} is the trace itself, which would be lost; give another name")
    if source.is_dir() and written.is_relative_to(source) and not written.is_dir():
        raise InputError(
            f"{target} lies in the folder of the trace, where it would count as a rank; give another place"
        )
