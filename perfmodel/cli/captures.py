"""Commands about capture folders: what one holds, whether it can be believed, which come with the project."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from perfmodel import report
from perfmodel.cli.shell import Json, group, note, print_json, print_words, width
from perfmodel.errors import InputError

captures = group(
    "captures",
    "What a capture folder holds (show), whether it can be believed (check), which come with the project (list).",
)

PROBLEMS, NO_CAPTURE = 1, 2


@captures.command(name="check")
def check_captures(
    folders: Annotated[list[str], typer.Argument(help="Capture folders.")],
    as_json: Json = False,
) -> None:
    """Can these captures be believed and handed on: exit 0 sound, 1 problems, 2 not a capture."""
    from perfmodel import plausible

    code = 0
    records: list[dict[str, Any]] = []
    pages = []
    for folder in folders:
        name = Path(folder).resolve().name
        try:
            found = plausible.check_capture(folder)
        except InputError as error:
            code = NO_CAPTURE
            note(f"perfmodel: {' '.join(str(error).splitlines())}")
            records.append({"capture": name, "sound": False, "verdict": str(error), "findings": []})
            continue
        is_sound, words = plausible.is_sound(found), plausible.verdict(name, found)
        code = code or (0 if is_sound else PROBLEMS)
        records.append(
            {"capture": name, "sound": is_sound, "verdict": words, "findings": [asdict(finding) for finding in found]}
        )
        pages.append(report.findings_page(words, found, width()))
    if as_json:
        print_json(records)
    elif pages:
        print_words("\n\n".join(pages))
    raise typer.Exit(code)


@captures.command(name="show")
def show_capture(
    folder: Annotated[str, typer.Argument(help="A capture folder.")],
    as_json: Json = False,
) -> None:
    """What a capture holds: machine, calibrated numbers, points by study and access, what was left out, profiles."""
    from perfmodel.capture import load_capture, shipped_captures
    from perfmodel.latency import load_model, shipped_models
    from perfmodel.plausible import summary

    capture = load_capture(folder)
    found = summary.summary(capture)
    is_shipped = capture.path.resolve() in [path.resolve() for path in shipped_captures()]
    if is_shipped and capture.name in shipped_models():
        found["headlines"] = report.capture_headlines(capture, load_model(capture.name))
    if as_json:
        print_json(found)
    else:
        print_words(report.capture_page(found, summary.machine_words(capture), width()))


@captures.command(name="list")
def list_captures(as_json: Json = False) -> None:
    """The captures that come with the project."""
    from perfmodel.capture import load_capture, shipped_captures

    rows = []
    for path in shipped_captures():
        capture = load_capture(path)
        machine = capture.manifest["machine"]
        rows.append(
            {
                "path": os.path.relpath(path),
                "machine": machine.get("gpu_name") or machine.get("cpu_model"),
                "dtype": capture.dtype,
                "n_workloads": capture.observations["workload"].n_unique(),
                "n_runs": capture.observations["run"].n_unique(),
                "created": capture.manifest.get("created"),
            }
        )
    if as_json:
        print_json(rows)
    else:
        print_words(report.captures_page(rows))
