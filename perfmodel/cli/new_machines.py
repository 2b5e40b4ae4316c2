"""`perfmodel check --new-machine`: a machine judged by one capture, without a baseline."""

from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from perfmodel import hardware, report
from perfmodel.cli.drawing import check_html, write_html
from perfmodel.cli.shell import expect_file, print_json, print_words, write_and_exit, write_report
from perfmodel.errors import InputError

NewMachine = Annotated[
    str | None,
    typer.Option(
        "--new-machine", help="Judge the machine of this capture alone: exit 0 healthy, 1 something to look at."
    ),
]
# What `check` takes beside --new-machine, as its parameters are called.
TAKES = ("new_machine", "hardware_name", "model", "as_json", "html", "markdown", "junit")


def refuse_others(context: typer.Context) -> None:
    """Refuse the arguments and options of a comparison beside --new-machine."""
    given = [
        param.opts[0] if param.opts[0].startswith("-") else str(param.name).upper()
        for param in context.command.params
        if param.name not in TAKES and _is_given(context, str(param.name))
    ]
    if given:
        raise InputError(
            f"--new-machine judges one capture without a baseline: leave out {', '.join(given)}; it takes --hardware, "
            "--model, --json, --html, --markdown and --junit"
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_new_machine(
    context: typer.Context,
    path: str,
    model: str | None,
    hardware_name: str | None,
    junit: str | None,
    markdown: str | None,
    html: str | None,
    *,
    as_json: bool,
) -> NoReturn:
    """Judge, print, write, and leave with 0 for a healthy machine and 1 where something deserves a look."""
    from perfmodel.capture import load_capture
    from perfmodel.ep_capture import is_ep_capture
    from perfmodel.latency import load_model
    from perfmodel.plausible.summary import machine_words
    from perfmodel.regression import new_machine

    refuse_others(context)
    check_html(html)
    for option, file, suffix in (("--junit", junit, ".xml"), ("--markdown", markdown, ".md")):
        expect_file(option, file, suffix)
    if is_ep_capture(path):
        raise InputError(
            f"{path!r} is a capture of expert parallelism, which `perfmodel phases` reads; --new-machine judges a "
            "capture of one device, made with `perfmodel collect`"
        )
    capture = load_capture(path)
    given = hardware.hardware(hardware_name) if hardware_name else None
    named = load_model(model) if model not in (None, "none") else None
    found = new_machine(capture, given, named, with_model=model != "none")
    words = report.new_machine_page(found, machine_words(capture))
    if as_json:
        print_json(found.to_json())
    else:
        print_words(words)

    def figures() -> Sequence[tuple[Any, str]]:
        from perfmodel.figures import new_machine_figures

        return new_machine_figures(found)

    wanted = (
        lambda: write_report(junit, lambda: report.new_machine_junit(found)),
        lambda: write_report(markdown, lambda: report.new_machine_markdown(found)),
        lambda: write_html(html, f"New machine: {capture.name}", words, figures),
    )
    write_and_exit(found.exit_code, wanted)
