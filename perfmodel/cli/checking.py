"""The command that judges a machine, driver or build: against a baseline and against a model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from perfmodel import hardware, report
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.new_machines import NewMachine, check_new_machine
from perfmodel.cli.shell import Json, app, fraction, note, print_json, print_words
from perfmodel.errors import InputError
from perfmodel.files import write_whole

SUMMARY = "GITHUB_STEP_SUMMARY"


@app.command()
def check(
    context: typer.Context,
    baseline: Annotated[
        str | None,
        typer.Argument(
            help="What was there before: a capture, a trace, a folder of traces, a saved baseline, a store."
        ),
    ] = None,
    candidate: Annotated[
        str | None, typer.Argument(help="The capture, trace or folder of traces to be judged.")
    ] = None,
    margin: Annotated[str, typer.Option(help="Slowdown that does not matter.")] = "3%",
    axis: Annotated[
        list[str] | None,
        typer.Option(help="What may differ: machine, software, kernel, settings, or with a key (software.torch)."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Judge by this model: a file of `perfmodel fit`, a shipped name, or `none`; else the baseline's own."
        ),
    ] = None,
    hardware_name: Annotated[
        str | None,
        typer.Option("--hardware", help="Judge by the nominal ceilings of this profile too; of known GPUs, unasked."),
    ] = None,
    fail_on: Annotated[
        str,
        typer.Option(help="What ends with 1, with commas: regressed, explained, slower-than-model, improved; or none."),
    ] = "regressed,slower-than-model",
    inconclusive: Annotated[str, typer.Option(help="Whether an open answer is `ok`, or to `fail` with 4.")] = "ok",
    as_json: Json = False,
    junit: Annotated[str | None, typer.Option(help="Write a JUnit report to this .xml file.")] = None,
    markdown: Annotated[str | None, typer.Option(help="Write a summary in Markdown to this .md file.")] = None,
    summary: Annotated[
        bool,
        typer.Option("--summary", help=f"Append that summary to the file that ${SUMMARY} names, if any."),
    ] = False,
    html: Html = None,
    new_machine: NewMachine = None,
) -> None:
    """Is the candidate slower than the baseline, and than a model expects: exit 0 no, 1 yes, 2 bad usage, 3 not
    comparable, 4 cannot tell (if asked). With --new-machine: does anything about one machine deserve a look."""
    if new_machine is not None:
        check_new_machine(context, new_machine, model, hardware_name, junit, markdown, html, as_json=as_json)
    if baseline is None or candidate is None:
        raise InputError("check needs a BASELINE and a CANDIDATE, or --new-machine CAPTURE for one machine alone")
    from perfmodel import regression
    from perfmodel.latency import load_model

    if inconclusive not in ("ok", "fail"):
        raise InputError(f"--inconclusive is {inconclusive!r}, expected ok or fail")
    conditions = [] if fail_on == "none" else [word.strip() for word in fail_on.split(",")]
    unknown = [word for word in conditions if word not in regression.FAILURES]
    if unknown:
        known = ", ".join(regression.FAILURES)
        raise InputError(f"--fail-on names {unknown[0]!r}; known: {known}, or none")
    check_html(html)
    for option, path, suffix in (("--junit", junit, ".xml"), ("--markdown", markdown, ".md")):
        if path is not None and not (path.endswith(suffix) and Path(path).resolve().parent.is_dir()):
            raise InputError(f"{option} is {path!r}, expected a {suffix} file in a folder that exists")
    must_conclude = inconclusive == "fail"
    found = regression.compare(
        *regression.sides(baseline, candidate, axis or ()),
        fraction(margin, "--margin"),
        axis or (),
        load_model(model) if model not in (None, "none") else None,
        hardware.hardware(hardware_name) if hardware_name else None,
        with_model=model != "none",
    )
    store = regression.store_of(baseline)
    if store is not None:
        found = replace(found, update_command=report.update_command(found, str(store), candidate))
    words = report.check_page(found)
    if as_json:
        print_json({**found.to_json(), "failures": found.failures(conditions)})
    else:
        print_words(words)
    for side, n_missing in found.n_missing.items():
        if n_missing:
            note(f"{n_missing} workloads of the other capture are missing in the {side} and were not compared")
    if junit is not None:
        _write(junit, report.check_junit(found, conditions, must_conclude=must_conclude))
    page = report.check_markdown(found, conditions) if markdown is not None or summary else ""
    if markdown is not None:
        _write(markdown, page)
    if summary:
        _append_summary(page)
    if html is not None:
        from perfmodel.figures import check_figures

        write_html(html, f"{found.candidate} against {found.baseline}", words, lambda: check_figures(found))
    raise typer.Exit(found.exit_code(conditions, must_conclude=must_conclude))


def _write(path: str, words: str) -> None:
    write_whole(path, words.encode())
    note(f"wrote {path}")


def _append_summary(page: str) -> None:
    """Add to the summary of a job's step, where this runs as one; other steps may have written there before."""
    path = os.environ.get(SUMMARY)
    if not path:
        note(f"{SUMMARY} is not set, so that no summary was written")
        return
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(page)
