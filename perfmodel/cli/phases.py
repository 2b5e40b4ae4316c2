"""The command about captures of expert-parallel layers: it loads, makes one call, prints."""

from typing import Annotated

import typer

from perfmodel import report
from perfmodel.cli.drawing import check_figure, draw
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
    figure: Annotated[
        str | None, typer.Option(help="Draw a step of --workload, measured and predicted, to this .html file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What ranks of an expert-parallel layer did, phase by phase, beside what the model says of it."""
    from perfmodel.ep_capture import load_ep_capture, same_work
    from perfmodel.latency import load_model
    from perfmodel.schedule.captured import set_beside
    from perfmodel.schedule.drawn import measured, predicted

    check_figure(figure)
    if figure is not None and workload is None:
        raise InputError("a picture shows one workload: give --workload with --figure")
    captures = [load_ep_capture(folder) for folder in folders]
    fitted = load_model(model) if model else None
    found = [set_beside(one, fitted) for one in captures]
    chosen = same_work(captures, workload) if workload else None
    if figure is not None and chosen:
        pairs = list(zip(found, chosen, strict=True))
        panels = [panel for beside, one in pairs for panel in (measured(beside.capture, one), predicted(beside, one))]
        draw(figure, panels, "; ".join(report.workload_head(beside.capture, one) for beside, one in pairs), "rank")
    if as_json:
        print_json(report.phases_json(found, chosen))
        return
    if chosen:
        pages = [report.workload_page(beside, one) for beside, one in zip(found, chosen, strict=True)]
    else:
        pages = [report.phases_page(beside, model) for beside in found]
    efficiency = report.efficiency_page(captures, chosen)
    print_words("\n\n".join([*pages, *([efficiency] if efficiency else [])]))
