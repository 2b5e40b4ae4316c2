"""The command about experts over several GPUs: it loads, makes one call, prints."""

from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from perfmodel import hf_config, report
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Json, app, fraction, note, number, print_json, print_words, whole
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.placement.staircase import Staircase, spread_speeds


@app.command()
def balance(
    routing: Annotated[
        str,
        typer.Option(
            help="A file of counts, with steps or without, a pattern, `layered`, `temporal`, `skewed-temporal`."
        ),
    ],
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json; `perfmodel list`.")],
    gpus: Annotated[str, typer.Option(help="GPUs that share the experts of each layer.")],
    policy: Annotated[
        str, typer.Option(help="linear, round-robin, lpt, lpt-free, lpt-speed, eplb, gem, or all.")
    ] = "all",
    tokens: Annotated[str, typer.Option(help="Tokens of a step, over all GPUs.")] = "4096",
    steps: Annotated[str | None, typer.Option(help="Steps to draw, or to take of a file.")] = None,
    window: Annotated[str, typer.Option(help="First steps, which make the maps; the others judge them.")] = "16",
    spread: Annotated[
        str | None, typer.Option(help="How much faster the first GPU is than the last, the others evenly between.")
    ] = None,
    speeds: Annotated[str | None, typer.Option(help="The speed of each GPU, such as 1,0.95,1,1.")] = None,
    nodes: Annotated[str, typer.Option(help="Nodes that the GPUs are in (EPLB).")] = "1",
    groups: Annotated[str, typer.Option(help="Groups of experts to keep in one node each (EPLB).")] = "1",
    replicas: Annotated[
        str | None, typer.Option(help="Slots for experts and copies of them over all GPUs (EPLB); one per expert.")
    ] = None,
    hardware_name: Annotated[
        str, typer.Option("--hardware", help="Profile of the GPUs; `perfmodel list`.")
    ] = "h100-sxm",
    model: Annotated[str | None, typer.Option(help="A fitted latency model, or the name of a shipped one.")] = None,
    capture: Annotated[
        list[str] | None,
        typer.Option(help="Measured instead of predicted: one capture folder for all GPUs, or one for each, in order."),
    ] = None,
    tile_rows: Annotated[str | None, typer.Option(help="Rows of a tile, where they are known better.")] = None,
    out: Annotated[str | None, typer.Option(help="Write the map with the least latency here, as JSON.")] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Which GPU should hold which expert: policies by the time of the GPU that all others wait for."""
    from perfmodel.balance import POLICIES, Slots, compare, predicted_times, steps_of, write_map
    from perfmodel.latency import load_model
    from perfmodel.predict import basis_of

    check_html(html)
    n_gpus = whole(gpus, "--gpus")
    moe_shape = hf_config.resolve(shape)
    recording = steps_of(routing, moe_shape, whole(tokens, "--tokens"), whole(steps, "--steps") if steps else None)
    own_speeds = _speeds(n_gpus, spread, speeds)
    rows = whole(tile_rows, "--tile-rows") if tile_rows else None
    by_rows = None
    if capture:
        if model or tile_rows:
            raise InputError("a capture was measured: leave out --model and --tile-rows")
        staircase = _measured(capture, moe_shape, own_speeds if spread or speeds or len(capture) == 1 else None, n_gpus)
    else:
        basis = basis_of(machine_of(hardware_name), moe_shape, load_model(model) if model else None)
        staircase, by_rows = predicted_times(basis, moe_shape, own_speeds, recording, rows)
    slots = Slots(
        whole(replicas, "--replicas") if replicas else None, whole(groups, "--groups"), whole(nodes, "--nodes")
    )
    found = compare(
        recording.loads,
        staircase,
        POLICIES if policy == "all" else (policy,),
        slots,
        n_model_layers=moe_shape.n_layers,
        n_window=whole(window, "--window"),
        by_rows=by_rows,
    )
    times = ", ".join(capture) if capture else f"{model or 'no fitted model'} on {hardware_name}"
    words = report.balance_page(found, staircase, recording, moe_shape.name, times)

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.balance_figures(found)

    write_html(html, f"Experts of {moe_shape.name} over {n_gpus} GPUs", words, draw)
    if as_json:
        print_json(report.balance_json(found, staircase, recording, moe_shape.name, times))
    else:
        print_words(words)
    if out:
        write_map(out, found.maps[found.best], recording.layers)
        note(f"wrote {out}: {found.outcomes[found.best].policy}")


def _speeds(n_gpus: int, spread: str | None, speeds: str | None) -> NDArray[np.float64]:
    if spread and speeds:
        raise InputError("give --spread or --speeds, not both")
    if not speeds:
        return spread_speeds(n_gpus, fraction(spread, "--spread") if spread else 0.0)
    found = np.array([number(word, "--speeds") for word in speeds.split(",")])
    if len(found) != n_gpus:
        raise InputError(f"--speeds names {len(found)} GPUs, --gpus {n_gpus}")
    return found


def _measured(folders: list[str], shape: MoEShape, speeds: NDArray[np.float64] | None, n_gpus: int) -> Staircase:
    from perfmodel.balance import observed_staircase
    from perfmodel.capture import load_capture

    return observed_staircase([load_capture(folder).observations for folder in folders], shape, n_gpus, speeds)
