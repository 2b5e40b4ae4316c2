"""Captures of expert-parallel layers: what is read, refused and added up, on captures made up by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import ep_steps
from perfmodel.ep_capture import EP_MANIFEST, EpCapture, is_ep_capture, load_ep_capture, shipped_ep_captures
from perfmodel.errors import InputError
from tests.ep_captures_made import write_by_hand_made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> EpCapture:
    return load_ep_capture(write_by_hand_made(tmp_path_factory.mktemp("ep") / "made-up"))


def only(table: pl.DataFrame, **where: Any) -> dict[str, Any]:
    return table.row(by_predicate=pl.all_horizontal([pl.col(k) == v for k, v in where.items()]), named=True)


def test_a_capture_is_read_as_tables_with_all_ranks_and_phases(made: EpCapture) -> None:
    assert made.n_ranks == 2 and made.dtype == "fp32" and made.clock_error_ns == 30
    assert [one.way for one in made.measured] == ["bulk", "chunked x 2"]
    assert made.ends.height == 2 * 3 * 2 and made.steps.height == 3 * (18 + 14)
    assert is_ep_capture(made.path) and not is_ep_capture(made.path.parent)
    assert made.choose("2") is made.choose("c") is made.by_id["c2"]


def test_a_step_lasts_from_the_first_start_to_the_last_end(made: EpCapture) -> None:
    assert ep_steps.step_latencies(made)["latency_ns"].to_list() == [3700, 3700, 3800, 2100, 2100, 2200]
    bulk = only(ep_steps.latencies(made), workload="b1")
    assert bulk["latency_ns"] == 3700 and bulk["p10_ns"] == 3700 and bulk["p90_ns"] == pytest.approx(3780)
    assert ep_steps.against_bulk(made) == {"c2": pytest.approx(3700 / 2100)}


def test_phases_of_a_rank_count_chunks_together_and_overlaps_once(made: EpCapture) -> None:
    times = ep_steps.phase_times(made)
    assert only(times, workload="b1", phase="gemm1", rank=1)["time_ns"] == 1500
    assert only(times, workload="c2", phase="gemm1", rank=1)["time_ns"] == 500 + 700
    assert only(times, workload="c2", phase="dispatch", rank=0)["time_ns"] == 600  # 100 to 300 and 110 to 700


def test_communication_is_hidden_or_exposed_and_a_step_has_nothing_else(made: EpCapture) -> None:
    table = ep_steps.overlaps(made)
    assert (table["hidden_ns"] + table["exposed_ns"] == table["communication_ns"]).all()
    assert (table["compute_ns"] + table["exposed_ns"] + table["idle_ns"] == table["span_ns"]).all()
    bulk = only(table, workload="b1", step=0, rank=0)
    assert (bulk["compute_ns"], bulk["hidden_ns"], bulk["exposed_ns"], bulk["idle_ns"]) == (1850, 0, 1740, 60)
    # Rank 0 communicates from 100 to 700, 600 to 1200 and 1100 to 2000 (1900), of which it computes 300 to 600 and 800
    # to 1100 meanwhile.
    chunked = only(table, workload="c2", step=0, rank=0)
    assert (chunked["communication_ns"], chunked["hidden_ns"], chunked["exposed_ns"]) == (1900, 600, 1300)


def test_ranks_compute_at_once_or_one_after_another(made: EpCapture) -> None:
    found = dict(ep_steps.ranks_computing(made).iter_rows())
    # Bulk: one of both computes from 0 to 200, 900 to 3300 and 3500 to 3600, rank 0 for 1850 of it and rank 1 for 2680.
    assert found["b1"] == pytest.approx((1850 + 2680) / 2700)
    # Chunked: 0 to 100, 300 to 1500 (rank 1 goes on from 800 with its second chunk); 700 and 1300 of it.
    assert found["c2"] == pytest.approx((700 + 1300) / 1300)


def test_a_collective_begins_when_the_last_rank_is_there(made: EpCapture) -> None:
    found = ep_steps.collectives(made)
    combine = only(found, workload="b1", step=0, phase="combine")
    assert (combine["last_rank"], combine["skew_ns"], combine["transfer_ns"]) == (1, 800, 200)
    # The second dispatch is called at 110, while the first is under way until 300; it is done at 700.
    assert only(found, workload="c2", step=1, phase="dispatch", chunk=1)["transfer_ns"] == 400
    # Rank 0 is there at 1100, rank 1 at 1500; the first combine was done long before; 2000 is the end.
    assert only(found, workload="c2", step=0, phase="combine", chunk=1)["transfer_ns"] == 500


def test_who_is_last_lets_the_others_wait(made: EpCapture) -> None:
    waits = ep_steps.waits(made)
    assert only(waits, workload="b1", phase="combine", rank=1)["last_frac"] == 1
    assert only(waits, workload="b1", phase="combine", rank=0)["wait_ns"] == 800
    assert only(waits, workload="b1", phase="dispatch", rank=0)["wait_ns"] == 90
    assert only(waits, workload="c2", phase="combine", rank=0)["wait_ns"] == 200 + 400
    sums = waits.group_by("workload", "phase").agg(pl.col("last_frac").sum()).sort("workload", "phase")
    # To the dispatches of the chunked step both come at the same time, as far as clocks tell.
    assert sums["last_frac"].to_list() == pytest.approx([1, 1, 1, 0, 1])


def test_stragglers_are_the_slowest_over_the_fastest(made: EpCapture) -> None:
    found = ep_steps.stragglers(made)
    assert only(found, workload="b1", phase="combine")["median_ratio"] == 1000 / 200
    assert only(found, workload="b1", phase="compute")["median_ratio"] == pytest.approx(2680 / 1850)
    slowest, fastest = np.array([2.0, 8.0, 3.0, 5.0]), np.array([1.0, 2.0, 1.0, 0.0])
    assert ep_steps.straggler_ratios(slowest, fastest) == (3.0, pytest.approx(3.9))  # of 2, 4 and 3
    assert ep_steps.straggler_ratios(slowest[3:], fastest[3:]) is None
    assert ep_steps.straggler_ratios(slowest[:0], fastest[:0]) is None


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("workloads.jsonl", lambda one: one["rows"][1].__setitem__(0, 7), "rank 1 has 21 rows"),
    ("workloads.jsonl", lambda one: one["gpu_of"].__setitem__(0, 2), "no rank from 0 to 1"),
    ("workloads.jsonl", lambda one: one["rows"].pop(), "not those of 2 ranks"),
    ("workloads.jsonl", lambda one: one.update(schedule="fused"), "known: bulk, chunked"),
    ("workloads.jsonl", lambda one: one.update(n_chunks=2), "is bulk in 2 chunks"),
    ("workloads.jsonl", lambda one: one.update(dtype="fp7"), "dtype 'fp7' is unknown"),
    ("workloads.jsonl", lambda one: one.update(workload="c2"), "stands there twice"),
    ("workloads.jsonl", lambda one: one.pop("rows"), "line 1: Object missing required field `rows`"),
    ("steps.jsonl", lambda one: one.update(workload="d3"), "no such workload"),
    ("steps.jsonl", lambda one: one.update(rank=1), "recorded by ranks 1, 1; expected each of 0 to 1 once"),
    ("steps.jsonl", lambda one: one.update(end_ns=1), "ends before it begins"),
    ("steps.jsonl", lambda one: one["phases"][0].__setitem__(0, "sort"), "a phase 'sort'; known: gate, permute"),
    ("steps.jsonl", lambda one: one["phases"][0].__setitem__(1, 1), "gate of chunk 1, expected 0 to 0"),
    ("steps.jsonl", lambda one: one["phases"][0].__setitem__(3, 10**6), "is not inside its step"),
    ("probes.jsonl", lambda one: one.update(value=0), "not positive"),
    (EP_MANIFEST, lambda one: one.update(kind="sweep"), "kind 'sweep', expected 1 and 'expert-parallel'"),
    (EP_MANIFEST, lambda one: one.pop("schema"), "no JSON object with a schema and a kind"),
    (EP_MANIFEST, lambda one: one["settings"].update(n_ranks=0), "0 ranks"),
    (EP_MANIFEST, lambda one: one.pop("machine"), "missing required field `machine`"),
    (EP_MANIFEST, lambda one: one.update(cpus_of_ranks=[[0]]), "the processors of 1 ranks, expected 2"),
]


@pytest.mark.parametrize(("file", "change", "words"), CHANGES, ids=[words for *_, words in CHANGES])
def test_what_contradicts_itself_is_refused_in_one_sentence(
    file: str, change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path
) -> None:
    path = write_by_hand_made(tmp_path / "made-up") / file
    first, *rest = path.read_text().splitlines()
    line = json.loads(first)
    change(line)
    path.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    with pytest.raises(InputError) as refused:
        load_ep_capture(path.parent)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_the_manifest_is_no_capture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"found a folder without {EP_MANIFEST}"):
        load_ep_capture(tmp_path)
    with pytest.raises(InputError, match="found nothing"):
        load_ep_capture(tmp_path / "nowhere")


def test_an_unknown_workload_is_refused_with_those_that_are_there(made: EpCapture) -> None:
    for word in ("3", "0", "x", ""):
        with pytest.raises(InputError, match="expected a number from 1 to 2 or an id such as b1, c2"):
            made.choose(word)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode), st.sampled_from(range(4)))
def test_damaged_files_are_refused_and_never_break(content: bytes, which: int) -> None:
    import tempfile

    name = ("workloads.jsonl", "steps.jsonl", "probes.jsonl", EP_MANIFEST)[which]
    with tempfile.TemporaryDirectory() as folder:
        path = write_by_hand_made(Path(folder) / "made-up")
        (path / name).write_bytes(content + b"\n")
        if name == "probes.jsonl" and not content.strip():
            assert load_ep_capture(path).probes.is_empty()
            return
        with pytest.raises(InputError):
            load_ep_capture(path)


def test_captures_of_two_and_four_ranks_come_with_the_project() -> None:
    captures = [load_ep_capture(path) for path in shipped_ep_captures()]
    assert [(one.n_ranks, one.manifest.cpus_of_ranks) for one in captures] == [
        (2, [[0], [1]]),
        (4, [[0], [1], [0], [1]]),
    ]
    assert [len(one.traces) for one in captures] == [3, 3]


@pytest.mark.parametrize("path", shipped_ep_captures(), ids=lambda path: path.name)
def test_figures_of_shipped_captures_keep_their_sums(path: Path) -> None:
    capture = load_ep_capture(path)
    table = ep_steps.overlaps(capture)
    assert (table["hidden_ns"] + table["exposed_ns"] == table["communication_ns"]).all()
    assert (table["compute_ns"] + table["exposed_ns"] + table["idle_ns"] == table["span_ns"]).all()
    assert (table["idle_ns"] >= 0).all() and (ep_steps.waits(capture)["wait_ns"] >= 0).all()
    assert len(capture.measured) == len(capture.workloads)
    latency = ep_steps.step_latencies(capture).join(table, on=["workload", "step"])
    assert (latency["span_ns"] <= latency["latency_ns"]).all()
