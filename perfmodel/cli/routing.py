"""The command about routing: how a recording spreads tokens over experts, and whether there is a hot set."""

from typing import Annotated, Any

import typer

from perfmodel import hf_config, report
from perfmodel import routing as routings
from perfmodel.cli import recordings
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.shell import Json, app, fraction, number, print_json, print_words, whole, width
from perfmodel.model_memory import model_memory
from perfmodel.routing import Recording


@app.command()
def routing(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A recording as FILE[#KEY][@LAYER], a folder of SGLang's files of all ranks, or a pattern such as "
            "power-law:1 or temporal:4 with --shape.",
        ),
    ],
    tokens: Annotated[str, typer.Option(help="Batches whose active experts are told, separated by commas.")] = ",".join(
        str(n) for n in routings.DECODE_TOKENS
    ),
    top_k: Annotated[str | None, typer.Option(help="Experts each token selects, where the file does not say.")] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers of the model, such as 0,7,15.")] = None,
    window: Annotated[
        list[str] | None, typer.Option(help="Steps whose hot set is kept for the next ones; may be repeated.")
    ] = None,
    resident: Annotated[
        str, typer.Option(help="Fraction of each layer's experts in device memory that the verdict is for.")
    ] = f"{routings.RESIDENT_FRAC:.0%}",
    hot: Annotated[
        str, typer.Option(help="Fraction of each layer's experts that is called hot where windows are compared.")
    ] = f"{routings.HOT_FRAC:.0%}",
    against: Annotated[
        list[str] | None,
        typer.Option(help="Another recording of the model, to try the hot set on; may be repeated."),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Catalogue name or config.json that says experts and top-k, and layers of a pattern."),
    ] = None,
    steps: recordings.Steps = "16",
    step_tokens: recordings.StepTokens = "512",
    kind: recordings.Kind = None,
    phase: recordings.Phase = None,
    consistent: Annotated[
        str, typer.Option(help="Experts used in at least this part of steps are called consistent.")
    ] = f"{routings.CUTOFFS.consistent_least_frac:.0%}",
    temporal: Annotated[
        str, typer.Option(help="Experts used in at most this part of steps are called temporal ...")
    ] = f"{routings.CUTOFFS.temporal_most_frac:.0%}",
    temporal_weight: Annotated[
        str, typer.Option(help="... if they receive at least so many uniform shares when they are used.")
    ] = f"{routings.CUTOFFS.temporal_least_weight:g}",
    used: Annotated[
        str, typer.Option(help="Part of a uniform share from which on an expert counts as used in a step.")
    ] = f"{routings.CUTOFFS.used_share:.0%}",
    top: Annotated[str | None, typer.Option(help="Rows of the table of layers; 20 unless given.")] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """How routing spreads over experts, layers and time: is there a hot set, and what does placing by it save."""
    check_html(html)
    hints = recordings.Hints(
        shape=None if shape is None else hf_config.resolve(shape),
        n_model_layers=None if shape is None else model_memory(shape).n_model_layers,
        top_k=None if top_k is None else whole(top_k, "--top-k"),
        n_steps=whole(steps, "--steps"),
        step_tokens=whole(step_tokens, "--step-tokens"),
        kind=kind,
        phase=phase,
    )

    def recording_of(name: str) -> Recording:
        found = recordings.recording_of(name, hints)
        return found if layers is None else routings.selected(found, _numbers(layers, "--layers", least=0))

    summary = routings.summarise(
        recording_of(source),
        _numbers(tokens, "--tokens"),
        fraction(resident, "--resident"),
        [whole(each, "--window") for each in window or ()] or routings.WINDOWS,
        [recording_of(other) for other in against or ()],
        fraction(hot, "--hot"),
        routings.Cutoffs(
            fraction(used, "--used"),
            fraction(consistent, "--consistent"),
            fraction(temporal, "--temporal"),
            number(temporal_weight, "--temporal-weight"),
        ),
    )
    n_rows = report.MOST_LAYERS if top is None else whole(top, "--top")
    words = report.routing_page(summary, width(), n_rows)

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.routing_figures(summary)

    write_html(html, f"Routing of {summary.recording.name}", words, draw)
    if as_json:
        print_json(summary.to_json())
    else:
        print_words(words)


def _numbers(words: str, option: str, least: int = 1) -> list[int]:
    """Whole numbers separated by commas; raises InputError on others."""
    return [0 if least == 0 and word.strip() == "0" else whole(word.strip(), option) for word in words.split(",")]
