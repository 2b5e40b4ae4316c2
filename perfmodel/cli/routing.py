"""The command about routing: how a recording spreads tokens over experts, and whether there is a hot set."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from perfmodel import hf_config, report
from perfmodel import routing as routings
from perfmodel.cli.shell import Json, app, fraction, print_json, print_words, whole, width
from perfmodel.errors import InputError
from perfmodel.routing import Recording, files


@app.command()
def routing(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Counts as FILE[#KEY], or a pattern such as power-law:1 or temporal:4 with --shape."
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
        str | None, typer.Option(help="Of a pattern: catalogue name or config.json that says layers, experts, top-k.")
    ] = None,
    steps: Annotated[str, typer.Option(help="Of a pattern: steps to draw.")] = "16",
    step_tokens: Annotated[str, typer.Option(help="Of a pattern: tokens of each step.")] = "512",
    top: Annotated[str | None, typer.Option(help="Rows of the table of layers; 20 unless given.")] = None,
    as_json: Json = False,
) -> None:
    """How routing spreads over experts, layers and time: is there a hot set, and what does placing by it save."""

    def recording_of(name: str) -> Recording:
        if _is_pattern(name):
            found = _drawn(name, shape, whole(steps, "--steps"), whole(step_tokens, "--step-tokens"))
        else:
            found = _read(name)
            file, _, _ = files.split_source(name)
            found = replace(found, name=f"{Path(file).name}{name[len(file) :]}")  # which of several keys it is
        if top_k is not None:
            found = _with_top_k(found, whole(top_k, "--top-k"))
        return found if layers is None else routings.selected(found, _numbers(layers, "--layers", least=0))

    summary = routings.summarise(
        recording_of(source),
        _numbers(tokens, "--tokens"),
        fraction(resident, "--resident"),
        [whole(each, "--window") for each in window or ()] or routings.WINDOWS,
        [recording_of(other) for other in against or ()],
        fraction(hot, "--hot"),
    )
    if as_json:
        print_json(summary.to_json())
    else:
        n_rows = report.MOST_LAYERS if top is None else whole(top, "--top")
        print_words(report.routing_page(summary, width(), n_rows))


def _is_pattern(source: str) -> bool:
    is_named = routings.is_pattern(source) or source.partition(":")[0] in routings.FAMILIES
    return is_named and not Path(source).is_file()


def _drawn(name: str, shape: str | None, n_steps: int, n_tokens: int) -> Recording:
    """A recording drawn from a pattern or family for the sizes of a shape."""
    if shape is None:
        raise InputError(f"routing {name!r} is a pattern: give --shape for its layers, experts and top-k")
    sizes = hf_config.resolve(shape)
    shares = routings.synthetic_steps(name, n_steps, sizes.n_layers, sizes.n_experts, seed=0)
    counts = routings.synthetic_counts(shares, n_tokens, sizes.top_k, seed=0)
    return Recording(
        f"{name} ({sizes.name})",
        counts.astype(np.float64),
        np.arange(sizes.n_layers),
        sizes.top_k,
        np.full(n_steps, n_tokens),
        notes=("drawn from a pattern, not recorded",),
    )


def _read(source: str) -> Recording:
    """The recording in a file of counts `[experts]`, `[layers, experts]` or `[steps, layers, experts]`."""
    routings.read_shares(source)  # refuses what is no routing file, in words
    file, key, layer = files.split_source(source)
    arrays = files._read_arrays(Path(file))
    chosen = np.asarray(files._choose(Path(file), arrays, key), dtype=np.float64)
    loads = chosen if chosen.ndim == 3 else np.atleast_2d(chosen)[None]
    beside = arrays if "counts" in arrays and key in ("", "counts") else {}
    found = Recording(
        Path(file).name,
        loads,
        np.asarray(beside.get("layers", np.arange(loads.shape[1])), dtype=np.int64),
        int(beside["top_k"]) if "top_k" in beside else None,
        np.asarray(beside["n_tokens"], dtype=np.int64) if "n_tokens" in beside else None,
    )
    return found if layer is None else routings.selected(found, [int(found.layers[layer])])


def _with_top_k(recording: Recording, top_k: int) -> Recording:
    """The recording with the top-k that a person gave; raises InputError where the file says another."""
    if recording.top_k not in (None, top_k):
        raise InputError(f"--top-k is {top_k}, but {recording.name} says {recording.top_k}")
    return replace(recording, top_k=top_k)


def _numbers(words: str, option: str, least: int = 1) -> list[int]:
    """Whole numbers separated by commas; raises InputError on others."""
    return [0 if least == 0 and word.strip() == "0" else whole(word.strip(), option) for word in words.split(",")]
