"""Commands about saved baselines: saving a capture as one, what a store holds, taking a change over."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from perfmodel import report, text
from perfmodel.cli.shell import Json, group, note, print_json, print_words
from perfmodel.report.baselines import DEFAULT_STORE

baseline = group(
    "baseline",
    "Baselines as text files for git: save a capture as one, list and show them, update one with a reason.",
)

DAMAGED = 2
Store = Annotated[str, typer.Option("--store", help="The folder that holds the baselines.")]
Side = Annotated[str, typer.Argument(help="What was measured: a capture, a trace or a folder of traces.")]


@baseline.command()
def save(
    capture: Side,
    store: Store = DEFAULT_STORE,
    add: Annotated[
        bool,
        typer.Option("--add", help="This is another occasion of the same state; three show the drift between them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Save what was measured as a baseline: exit 0 saved, 2 there is one already, 3 nothing of this kind to add to."""
    from perfmodel.regression import evidence, saved

    found = saved.save(evidence(capture), store, add=add)
    if as_json:
        print_json(found.to_json())
    else:
        print_words(report.saving_page(found.to_json(), store))
    _tell(found.notes)


@baseline.command(name="list")
def list_baselines(store: Store = DEFAULT_STORE, as_json: Json = False) -> None:
    """The baselines of a store: of what, how much of it, why they last changed. Exit 2 where one is damaged."""
    from perfmodel.regression import saved

    found = saved.listed(store)
    rows = [
        {"path": os.path.relpath(Path(store) / name), **saved.row_of(name, head)}
        for name, head in found.baselines.items()
    ]
    if as_json:
        print_json({"store": store, "baselines": rows, "damaged": found.damaged, "foreign": list(found.foreign)})
    elif rows:
        print_words(report.baselines_page(rows))
    for reason in found.damaged.values():
        note(f"perfmodel: {reason}")
    _tell(f"none of a baseline's files, left alone: {name}" for name in found.foreign)
    if not rows and not found.damaged and not as_json:
        note(f"store {store!r} holds no baseline")
    raise typer.Exit(DAMAGED if found.damaged else 0)


@baseline.command()
def show(
    name: Annotated[str, typer.Argument(help="A baseline of the store, or a part of its name.")],
    workload: Annotated[str | None, typer.Option(help="Show the run medians of this workload, by its id.")] = None,
    store: Store = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """What a baseline holds: occasions, history, workloads; or one workload with its run medians."""
    from perfmodel.regression import saved

    found = saved.read(saved.named(store, name))
    shown = saved.shown(found) if workload is None else saved.shown_workload(found, workload)
    if as_json:
        print_json(shown)
    else:
        print_words(report.baseline_page(shown) if workload is None else report.baseline_workload_page(shown))


@baseline.command()
def update(
    capture: Side,
    reason: Annotated[str, typer.Option(help="Why the baseline changes; stands in its history.")],
    store: Store = DEFAULT_STORE,
    axis: Annotated[
        list[str] | None,
        typer.Option(help="What differs and may, as for `perfmodel check`: torch, driver, software.torch ..."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would change, and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Take over what was measured: its workloads replace those of the baseline that fits. Exit 3 where none does."""
    from perfmodel.regression import evidence, saved

    side = evidence(capture)
    found = saved.update(side, store, reason, text.names(axis), dry_run=True)
    if not as_json:  # told before anything is written
        print_words(report.saving_page(found.to_json(), store))
    if not dry_run:
        found = saved.update(side, store, reason, text.names(axis))
        note(f"wrote {os.path.relpath(Path(store) / found.baseline)}")
    else:
        note("nothing was written, for this is a dry run")
    if as_json:
        print_json(found.to_json())
    _tell(found.notes)


def _tell(notes: Iterable[str]) -> None:
    for words in notes:
        note(f"note: {words}")
