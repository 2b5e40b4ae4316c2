"""The command about MoE layer passes: of a trace, of the ranks of a run, of runs on more and more GPUs."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer

from perfmodel import report
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.shell import (
    Cache,
    Json,
    Top,
    app,
    hint_at_cache,
    print_json,
    print_words,
    progress,
    read,
    whole,
    width,
)
from perfmodel.errors import InputError, about
from perfmodel.passes import moe_passes
from perfmodel.passes.ranks import LayerRanks, compare_devices, summarise_layers
from perfmodel.readers import is_folder_of_ranks
from perfmodel.workers import PROCESSES

_RUN = re.compile(r"(\d+)=(.+)", re.S)


@app.command()
def layers(
    traces: Annotated[
        list[str], typer.Argument(help="A trace, a folder with one for each rank, or N=TRACE for runs on N GPUs.")
    ],
    step: Annotated[str | None, typer.Option(help="Only this step: its passes, and who waits for whom in it.")] = None,
    range_pattern: Annotated[
        str | None, typer.Option("--range", help="Regular expression: ranges or operators that are MoE layer passes.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens of each GPU in a pass, for throughput.")] = None,
    top: Top = None,
    cache: Cache = None,
    backend: Annotated[str, typer.Option(help="What reads a folder of ranks: a joblib backend (loky, dask ...).")] = (
        PROCESSES
    ),
    workers: Annotated[str | None, typer.Option(help="Workers that read a folder of ranks.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of the Dask scheduler, with --backend dask.")] = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """What does a pass of a MoE layer cost: launches, gaps, hidden communication; over ranks, who waits for whom."""
    check_html(html)
    n_top = whole(top, "--top") if top else None
    n_tokens = whole(tokens, "--tokens") if tokens else None
    wanted = _step(step) if step is not None else None
    n_workers = whole(workers, "--workers") if workers else None

    def ranks_of(path: str) -> LayerRanks:
        began_ns = time.monotonic_ns()
        found = summarise_layers(path, range_pattern, cache, backend, n_workers, scheduler, progress)
        progress("")
        hint_at_cache(time.monotonic_ns() - began_ns, cache)
        return found

    runs = [_RUN.fullmatch(word) for word in traces]
    if all(runs):
        if wanted is not None:
            raise InputError("--step shows one step of one run; expected a trace or a folder without N=")
        pairs = sorted((whole(run[1], "the number of GPUs"), run[2]) for run in runs if run)
        rows = _scaling([(n_gpus, path, ranks_of(path)) for n_gpus, path in pairs], n_tokens)
        words = report.scaling_page(rows, width())
        _draw(html, words, "scaling_figures", rows)
        if as_json:
            print_json({"runs": rows})
        else:
            print_words(words)
        return
    if len(traces) > 1:
        raise InputError(f"found {len(traces)} traces, expected one, or N=TRACE for each number of GPUs: 2=a 8=b")
    path = traces[0]
    if is_folder_of_ranks(Path(path)):
        _show_ranks(ranks_of(path), wanted, n_tokens, n_top, html, as_json)
        return
    loaded = read(path, cache)
    with about(path):
        if loaded.of_kind("kernel").select("rank", "device").n_unique() > 1:
            _show_ranks(compare_devices(loaded, path, range_pattern), wanted, n_tokens, n_top, html, as_json)
            return
        found = moe_passes(loaded, range_pattern)
        found = found if wanted is None else found.of_step(wanted)
    latency_ns = found.medians()["dur_ns"]
    tokens_per_s = _tokens_per_s(n_tokens, 1, latency_ns)
    words = report.passes_page(found, Path(path).name, tokens_per_s, n_top or report.N_TOP, width())
    _draw(html, words, "pass_figures", found)
    if as_json:
        print_json({**found.to_json(n_top), "tokens_per_s": tokens_per_s})
    else:
        print_words(words)


def _draw(html: str | None, words: str, name: str, *found: Any) -> None:
    """Write a report with what a function of `perfmodel.figures` draws."""

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        drawn: list[tuple[Any, str]] = getattr(figures, name)(*found)
        return drawn

    write_html(html, "MoE layer passes", words, draw)


def _show_ranks(
    found: LayerRanks, step: int | None, n_tokens: int | None, n_top: int | None, html: str | None, as_json: bool
) -> None:
    known = found.waits["step"].unique().sort()
    if step is not None and step not in known:
        shown = ", ".join(map(str, known.drop_nulls().head(8))) or "none"
        raise InputError(f"{found.source}: no step {step} in which collectives were matched; there are {shown}")
    tokens_per_s = _tokens_per_s(n_tokens, found.members.height, found.latency_ns)
    words = report.layer_ranks_page(found, step, tokens_per_s, n_top or report.N_TOP, width())
    _draw(html, words, "rank_figures", found, step)
    if as_json:
        print_json({**found.to_json(step), "tokens_per_s": tokens_per_s})
    else:
        print_words(words)


def _scaling(runs: list[tuple[int, str, LayerRanks]], n_tokens: int | None) -> list[dict[str, Any]]:
    """A row for each run; raises InputError where a run has no pass or more members than GPUs, or two have as many."""
    from perfmodel.schedule.measures import overlap_efficiency  # which loads SciPy

    if len({n_gpus for n_gpus, *_ in runs}) < len(runs):
        raise InputError("two runs on the same number of GPUs; expected one for each")
    rows: list[dict[str, Any]] = []
    for n_gpus, path, found in runs:
        if found.latency_ns is None:
            raise InputError(f"{path}: no MoE layer pass whose time could be compared; {' '.join(found.notes)}")
        n_members = found.members.filter(pl.col("n_passes") > 0).height
        if n_members > n_gpus:  # fewer may have been traced
            raise InputError(f"{path}: MoE layer passes on {n_members} ranks or devices, expected {n_gpus} at most")
        base_ns = rows[0]["latency_ns"] if rows else found.latency_ns
        rows.append(
            {
                "n_gpus": n_gpus,
                "source": path,
                "n_members": n_members,
                "latency_ns": found.latency_ns,
                "overlap_efficiency_frac": overlap_efficiency(base_ns, found.latency_ns),
                "tokens_per_s": _tokens_per_s(n_tokens, n_gpus, found.latency_ns),
                "notes": list(found.notes),
            }
        )
    return rows


def _tokens_per_s(n_tokens: int | None, n_gpus: int, latency_ns: float | None) -> float | None:
    from perfmodel.schedule.measures import throughput_tokens_per_s

    return throughput_tokens_per_s(n_tokens, n_gpus, latency_ns) if n_tokens and latency_ns else None


def _step(word: str) -> int:
    if not word.isdecimal():
        raise InputError(f"--step is {word!r}, expected a whole number")
    return int(word)
