"""The command that judges a machine, driver or build: against a baseline and against a model."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from perfmodel import hardware, report, text
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.new_machines import NewMachine, check_new_machine
from perfmodel.cli.shell import (
    Json,
    app,
    expect_file,
    fraction,
    note,
    print_json_words,
    print_words,
    width,
    write_and_exit,
    write_report,
)
from perfmodel.errors import InputError

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
    margin: Annotated[str, typer.Option(help="Slowdown that does not matter, as 3% or 0.03.")] = "3%",
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="What may differ, with commas or given again: torch (with its libraries and kernel), driver (of the "
            "GPU), os (its kernel and platform), threads, hardware or machine (all of the machine, driver included), "
            "software (all versions), kernel (the grouped GEMM that ran), settings (device, dtype, threads), or a "
            "single fact, as software.torch."
        ),
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
        typer.Option(
            help="What ends with 1, with commas: regressed, explained, slower-than-model, improved, missing; or none."
        ),
    ] = "regressed,slower-than-model",
    inconclusive: Annotated[str, typer.Option(help="Whether an open answer is `ok`, or to `fail` with 4.")] = "ok",
    as_json: Json = False,
    json_file: Annotated[str | None, typer.Option(help="Write the same JSON to this .json file.")] = None,
    junit: Annotated[str | None, typer.Option(help="Write a JUnit report to this .xml file.")] = None,
    markdown: Annotated[str | None, typer.Option(help="Write a summary in Markdown to this .md file.")] = None,
    summary: Annotated[
        bool,
        typer.Option(
            "--summary/--no-summary", help=f"Append that summary to the file that ${SUMMARY} names, where it is set."
        ),
    ] = True,
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
    conditions = [] if fail_on.strip() == "none" else [word.strip() for word in fail_on.split(",")]
    unknown = [word for word in conditions if word not in regression.FAILURES]
    if unknown:
        known = ", ".join(regression.FAILURES)
        raise InputError(f"--fail-on names {unknown[0]!r}; known: {known}, or none")
    check_html(html)
    for option, path, suffix in (
        ("--json-file", json_file, ".json"),
        ("--junit", junit, ".xml"),
        ("--markdown", markdown, ".md"),
    ):
        expect_file(option, path, suffix)
    _spare_inputs(json_file, (baseline, candidate))
    must_conclude = inconclusive == "fail"
    margin_frac, axes = fraction(margin, "--margin"), text.names(axis)
    if margin_frac >= 1 and not margin.endswith("%"):  # nothing would ever be slower
        raise InputError(
            f"--margin {margin} would be {100 * margin_frac:g} %; write {margin}% or {margin_frac / 100:g}"
        )
    found = regression.compare(
        *regression.sides(baseline, candidate, axes),
        margin_frac,
        axes,
        load_model(model) if model not in (None, "none") else None,
        hardware.hardware(hardware_name) if hardware_name else None,
        with_model=model != "none",
    )
    store = regression.store_of(baseline)
    if store is not None:
        found = replace(found, update_command=report.update_command(found, str(store), candidate))
    words = report.check_page(found)

    def as_data() -> str:
        return report.check_json(found, conditions, must_conclude=must_conclude)

    if as_json:
        print_json_words(as_data().rstrip())
        for remark in report.remarks(found):
            note(f"note: {remark}")
    else:
        print_words(report.check_page(found, width()) if sys.stdout.isatty() else words)

    def figures() -> Sequence[tuple[Any, str]]:
        from perfmodel.figures import check_figures

        return check_figures(found)

    wanted: list[Callable[[], None]] = [
        lambda: write_report(json_file, as_data),
        lambda: write_report(junit, lambda: report.check_junit(found, conditions, must_conclude=must_conclude)),
        lambda: write_report(markdown, lambda: report.check_markdown(found, conditions)),
        lambda: _append_summary(summary, lambda: report.check_markdown(found, conditions)),
        lambda: write_html(html, f"{found.candidate} against {found.baseline}", words, figures),
    ]
    write_and_exit(found.exit_code(conditions, must_conclude=must_conclude), wanted)


def _spare_inputs(json_file: str | None, sides: tuple[str, str]) -> None:
    """Refuse to write JSON over what is compared, or among it, where it would be read the next time."""
    if json_file is None:
        return
    file = Path(os.path.realpath(json_file))
    for side in map(os.path.realpath, sides):
        if file == Path(side) or Path(side) in file.parents:
            raise InputError(f"--json-file is {json_file!r}, which lies in what is compared; name a file elsewhere")


def _append_summary(is_wanted: bool, words: Callable[[], str]) -> None:
    """Add to the summary of a job's step, where this runs as one; other steps may have written there before."""
    path = os.environ.get(SUMMARY)
    if not path or not is_wanted:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(words())
    except OSError as error:
        raise InputError(f"the file that ${SUMMARY} names cannot be written: {error.strerror or error}") from None
