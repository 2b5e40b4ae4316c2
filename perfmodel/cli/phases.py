"""The command about captures of expert-parallel layers: it loads, makes one call, prints."""

from typing import Annotated, Any

import typer

from perfmodel import report
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.shell import Json, app, print_json, print_words
from perfmodel.errors import InputError


@app.command()
def phases(
    folders: Annotated[list[str], typer.Argument(help="Folders of captures, of several numbers of ranks for O_e.")],
    model: Annotated[str | None, typer.Option(help="A fitted latency model, or the name of a shipped one.")] = None,
    workload: Annotated[
        str | None,
        typer.Option(help="One workload in detail, by its number in the first folder or the beginning of its id."),
    ] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """What ranks of an expert-parallel layer did, phase by phase, beside what the model says of it."""
    from perfmodel.ep_capture import load_ep_capture, same_work
    from perfmodel.latency import load_model
    from perfmodel.schedule.captured import set_beside

    check_html(html)
    if html is not None and workload is None:
        raise InputError("the picture of a report shows one workload: give --workload with --html")
    captures = [load_ep_capture(folder) for folder in folders]
    fitted = load_model(model) if model else None
    found = [set_beside(one, fitted) for one in captures]
    chosen = same_work(captures, workload) if workload else None
    if chosen:
        pages = [report.workload_page(beside, one) for beside, one in zip(found, chosen, strict=True)]
    else:
        pages = [report.phases_page(beside, model) for beside in found]
    efficiency = report.efficiency_page(captures, chosen)
    words = "\n\n".join([*pages, *([efficiency] if efficiency else [])])

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.phase_figures(list(zip(found, chosen or (), strict=True)))

    write_html(html, "Expert-parallel layers, measured and predicted", words, draw)
    if as_json:
        print_json(report.phases_json(found, chosen))
    else:
        print_words(words)
