"""The command about three domains for experts: it loads, makes one call, prints."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfmodel import hardware, report, text
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Json, app, fraction, number, print_json, print_words, whole, width
from perfmodel.errors import InputError

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which other commands do not need
    from perfmodel.trimoe import Table

NDP_HELP = "a factor such as 0.5x of the profile's, or a rate such as"


@app.command()
def trimoe(
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json; `perfmodel list`.")],
    batch: Annotated[str, typer.Option(help="Tokens of a decode step.")] = "512",
    steps: Annotated[str, typer.Option(help="Steps to be timed.")] = "32",
    hardware_name: Annotated[
        str, typer.Option("--hardware", help="Profile name or .toml file of a machine with near-data memory modules.")
    ] = "trimoe",
    routing: Annotated[
        str,
        typer.Option(help="three-class[:CHURN], a pattern, layered, temporal, skewed-temporal, or a file of counts."),
    ] = "three-class",
    layers: Annotated[str, typer.Option(help="Layers that stand for all, where the routing is no file.")] = "8",
    no_cpu: Annotated[bool, typer.Option("--no-cpu", help="TriMoE without the CPU.")] = False,
    no_amx: Annotated[bool, typer.Option("--no-amx", help="TriMoE with a CPU that has AVX-512 alone.")] = False,
    no_refinement: Annotated[bool, typer.Option("--no-refinement", help="Each expert where it is cheapest.")] = False,
    no_relayout: Annotated[bool, typer.Option("--no-relayout", help="Weights stay where they are.")] = False,
    ndp_bandwidth: Annotated[str | None, typer.Option(help=f"Bandwidth inside a module: {NDP_HELP} 40GB/s.")] = None,
    ndp_flops: Annotated[str | None, typer.Option(help=f"FLOP/s of a module: {NDP_HELP} 500GFLOP/s.")] = None,
    hbm_slots: Annotated[str | None, typer.Option(help="Experts of each layer in device memory.")] = None,
    hbm_budget: Annotated[
        str | None, typer.Option(help="Device memory for experts, such as 40GB; half of it unless given.")
    ] = None,
    cold_below: Annotated[
        str | None, typer.Option(help="Mean loads below which experts are cold; what suits earlier steps unless given.")
    ] = None,
    hot_from: Annotated[str | None, typer.Option(help="Mean loads from which experts are hot; 4 unless given.")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Time per layer beside its experts, such as 200us, under which weights may move.")
    ] = None,
    hidden_moves: Annotated[
        bool, typer.Option("--hidden-moves", help="Only weights that move without making a layer longer.")
    ] = False,
    table: Annotated[
        list[str] | None, typer.Option(help="Times by tokens: gpu=FILE.csv, cpu=..., ndp=..., columns tokens and ns.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A fitted model of the GPU's kernel, as of `predict`.")] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Decode with experts on GPU, CPU and near-data memory modules (TriMoE), beside baselines and published figures."""
    from perfmodel import hf_config, latency, trimoe
    from perfmodel.offload.device import require_near_data
    from perfmodel.trimoe.prediction import COLD_BELOW, HOT_FROM
    from perfmodel.trimoe.study import SCALES
    from perfmodel.trimoe.systems import variant

    check_html(html)
    profile, moe_shape = machine_of(hardware_name), hf_config.resolve(shape)
    require_near_data(profile)
    if hbm_slots is not None and hbm_budget is not None:
        raise InputError("give --hbm-slots or --hbm-budget, not both")
    options = trimoe.Options(
        ndp_reading_scale=_scale(ndp_bandwidth, "--ndp-bandwidth", profile, "ndp_peak_bytes_per_s"),
        ndp_computing_scale=_scale(ndp_flops, "--ndp-flops", profile, "ndp_peak_flops_per_s"),
    )
    work = trimoe.made_workload(
        profile,
        moe_shape,
        whole(batch, "--batch"),
        source=routing,
        n_steps=whole(steps, "--steps"),
        n_layers=min(whole(layers, "--layers"), moe_shape.n_layers),
        n_slots=None if hbm_slots is None else _slots(hbm_slots),
        budget_bytes=None if hbm_budget is None else text.parse_bytes(hbm_budget),
    )
    work = replace(
        work,
        options=options,
        attention_ns=0.0 if attention is None else text.parse_ns(attention),
        has_seen_moves=not hidden_moves,
        tables=dict(_table(word) for word in table or ()),
        model=latency.load_model(model) if model else None,
    )
    hot = HOT_FROM if hot_from is None else number(hot_from, "--hot-from")
    cold = min(COLD_BELOW, hot) if cold_below is None else fraction(cold_below, "--cold-below")
    work = replace(work, bounds=trimoe.Bounds(cold, hot))
    system = variant(has_cpu=not no_cpu, has_amx=not no_amx, is_refined=not no_refinement, has_relayout=not no_relayout)
    fitted = cold_below is None
    found = trimoe.compare(work, system, has_fitted_bounds=fitted)
    others = [scale for scale in SCALES if scale != 1]
    pairs = [*((scale, 1.0) for scale in others), *((1.0, scale) for scale in others)]
    names = [*(f"bandwidth x{scale:g}" for scale in others), *(f"FLOP/s x{scale:g}" for scale in others)]
    ranged = list(zip(names, trimoe.sensitivity(work, pairs, system, has_fitted_bounds=fitted), strict=True))
    words = report.trimoe_page(found, ranged, routing, width())

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.trimoe_figures(found)

    write_html(html, f"Experts of {moe_shape.name} on three domains", words, draw)
    if as_json:
        rows = [
            {"ndp_reading_scale": b, "ndp_computing_scale": f, "speedup": one.speedup, "step_ns": one.system.step_ns}
            for (b, f), (_, one) in zip(pairs, ranged, strict=True)
        ]
        print_json({**found.to_json(), "sensitivity": rows})
    else:
        print_words(words)


def _slots(word: str) -> int:
    if not word.isdecimal():
        raise InputError(f"--hbm-slots is {word!r}, expected a whole number, 0 or more")
    return int(word)


def _scale(word: str | None, option: str, profile: hardware.HardwareProfile, key: str) -> float:
    """The factor on the profile's rate that the words of an option mean."""
    if word is None:
        return 1.0
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(x|[A-Za-z]+/s)\s*", word)
    if found is None:
        raise InputError(f"{option} is {word!r}, expected a factor such as 0.5x or a rate such as 40GB/s, 500GFLOP/s")
    value = number(found[1], option)
    if found[2] == "x":
        return value
    rate, unit = text.to_base(value, found[2])
    if not key.endswith(unit):
        raise InputError(f"{option} is {word!r}, which is not a rate of this kind")
    return rate / profile[key]


def _table(word: str) -> "tuple[str, Table]":
    from perfmodel.trimoe import read_table

    name, has_file, path = word.partition("=")
    if not has_file:
        raise InputError(f"--table is {word!r}, expected DOMAIN=FILE.csv such as gpu=times.csv")
    return name, read_table(path)
