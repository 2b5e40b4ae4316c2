from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.attribution import attributed, by_operator
from perfmodel.launch import joined_work, launch_metrics
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.traces_made import events, golden_rows, kernel, launch


def op(start_ns: int, dur_ns: int, name: str = "op", **more: object) -> dict:
    return {"kind": "op", "name": name, "start_ns": start_ns, "dur_ns": dur_ns, **more}


# linear holds addmm; a launch before, in and after addmm, one of a copy, one outside, an orphan and a graph of two.
BY_HAND = events(
    op(0, 100, "linear"),
    op(10, 50, "addmm"),
    launch(5, link=1),
    launch(20, link=2),
    launch(70, link=3),
    launch(30, link=4, name="cudaMemcpyAsync"),
    launch(120, link=5),
    op(200, 50, "replay"),
    launch(210, link=6, name="cudaGraphLaunch"),
    kernel(300, 1, link=1),
    kernel(310, 2, link=2),
    kernel(320, 4, link=3),
    {"kind": "copy", "start_ns": 330, "dur_ns": 8, "link": 4},
    kernel(340, 16, link=5),
    kernel(350, 32, link=6),
    kernel(400, 64, link=6),
    kernel(1, 128, link=99),
)


def test_the_innermost_operator_around_the_launch() -> None:
    found = attributed(BY_HAND)
    assert found["operator"].to_list() == ["linear", "addmm", "linear", "addmm", None, "replay", "replay", None]
    assert found["operator_row"].to_list() == [0, 1, 0, 1, None, 7, 7, None]
    assert found["outermost_operator"].to_list() == ["linear"] * 4 + [None, "replay", "replay", None]
    assert found["found_by"].to_list() == ["nesting"] * 4 + [None, "nesting", "nesting", None]


def test_every_kernel_has_its_row_in_the_table_of_operators() -> None:
    columns = ["name", "part", "n_calls", "self_ns", "n_kernels", "kernel_time_ns", "tklqt_ns", "n_copies"]
    assert by_operator(BY_HAND).select(*columns, "copy_time_ns").rows() == [
        ("(orphans)", "orphan", None, None, 1, 128, None, 0, 0),
        ("(graph kernels)", "graph", None, None, 2, 96, 330, 0, 0),
        ("(no operator)", "no operator", None, None, 1, 16, 220, 0, 0),
        ("linear", "operator", 1, 50, 2, 5, 545, 0, 0),
        ("addmm", "operator", 1, 50, 1, 2, 290, 1, 8),
        ("replay", "operator", 1, 50, 0, 0, None, 0, 0),
    ]


def test_threads_processes_and_ranks_keep_their_operators() -> None:
    places = [{"rank": r, "process": p, "thread": t} for r in (0, 1) for p in (1, 2) for t in (1, 2)]
    rows = [op(0, 10, str(i), **place) for i, place in enumerate(places)]
    rows += [launch(5, link=i, **place) for i, place in enumerate(places)]
    rows += [kernel(20, link=i, rank=place["rank"]) for i, place in enumerate(places)]
    assert attributed(events(*rows))["operator"].to_list() == [str(i) for i in range(8)]


def test_an_id_tells_the_operator_where_nesting_does_not() -> None:
    """By id: 70 is one operator, 71 two, 72 one that began after the kernel; rank 1 has a 70 of its own."""
    trace = events(
        op(0, 5, "launches elsewhere", external=70, thread=2),
        op(0, 5, "twin", external=71, thread=2),
        op(6, 5, "twin", external=71, thread=2),
        op(900, 5, "later", external=72, thread=2),
        op(0, 5, "of rank 1", external=70, rank=1),
        launch(50, link=1),
        kernel(60, link=1, external=70),
        kernel(61, link=98, external=70),
        kernel(62, link=2, external=71),
        kernel(63, link=3, external=72),
        kernel(64, link=4, external=73),
    )
    found = attributed(trace)
    assert found["operator"].to_list() == ["launches elsewhere"] * 2 + [None] * 3
    assert found["found_by"].to_list() == ["external id"] * 2 + [None] * 3
    assert found["outermost_operator"].to_list() == [None] * 5
    parts = by_operator(trace).filter(pl.col("n_kernels") > 0)
    assert dict(parts.select("part", "n_kernels").iter_rows()) == {"operator": 2, "orphan": 3}


def test_operators_inside_that_overlap_leave_no_negative_time() -> None:
    trace = events(op(0, 10, "outer"), op(1, 6, "inner"), op(3, 6, "inner"))
    assert dict(by_operator(trace).select("name", "self_ns").iter_rows()) == {"inner": 12, "outer": 0}


def test_a_single_id_may_lie_anywhere_but_on_its_link() -> None:
    def owner(link: int) -> list[str | None]:
        return attributed(events(op(0, 5, external=70), kernel(60, link=link, external=70)))["operator"].to_list()

    assert (owner(71), owner(70)) == (["op"], [None])


@pytest.mark.parametrize("offset", [0, 7 * 2**32])
def test_an_id_that_repeats_the_link_is_no_operator(offset: int) -> None:
    """Old profilers wrote the correlation id twice; links of a later rank are moved by a constant."""
    work = [kernel(60 + i, link=i + offset, external=i, rank=3) for i in (70, 71)]
    trace = events(op(0, 5, external=70, rank=3), op(0, 5, external=71, rank=3), *work)
    assert attributed(trace)["operator"].to_list() == [None, None]
    honest = trace.with_columns(external=pl.col("external").replace({71: 75}))
    assert attributed(honest)["operator"].to_list() == ["op", "op"]


CALL = st.tuples(st.integers(0, 40), st.integers(0, 3), st.booleans())
OPS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15), st.sampled_from("abc")), max_size=8)
WORK = st.lists(
    st.tuples(st.sampled_from(["kernel", "copy"]), st.integers(0, 60), st.integers(0, 9), st.integers(0, 4)),
    min_size=1,
    max_size=12,
)


@given(OPS, st.lists(CALL, max_size=6), WORK)
def test_nothing_is_lost_or_counted_twice(ops: list, calls: list, work: list) -> None:
    rows = [op(s, d, name) for s, d, name in ops]
    rows += [launch(s, link=i, name="cudaGraphLaunch" if graph else "cudaLaunchKernel") for s, i, graph in calls]
    rows += [{"kind": k, "start_ns": s, "dur_ns": d, "link": i} for k, s, d, i in work]
    total, table = launch_metrics(Trace(events(*rows), "kineto", len(rows))), by_operator(events(*rows))
    assert table["n_kernels"].sum() == total.n_kernels
    assert table["kernel_time_ns"].sum() == total.kernel_time_ns
    assert table["tklqt_ns"].sum() == total.tklqt_ns
    assert table["copy_time_ns"].sum() == sum(d for k, _, d, _ in work if k == "copy")
    assert table["n_calls"].sum() == len(ops)
    assert table["name"].n_unique() == table.height
    by_part = dict(table.group_by("part").agg(pl.sum("n_kernels")).iter_rows())
    assert by_part.get("graph", 0) == total.n_kernels_graph
    assert by_part.get("orphan", 0) == total.n_kernels_orphan


# Traces whose profiler left an operator's id with device work.
WITH_IDS = ("nccl_parser", "ns_resolution", "amd_trace", "tracelens__")


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_nesting_agrees_with_the_profilers_own_ids(shared: Path, row: dict[str, str]) -> None:
    trace = read_trace(shared / "traces" / row["file"]).events
    found = attributed(trace)
    total = launch_metrics(Trace(trace, "kineto", trace.height))
    table = by_operator(trace, found)
    assert (table["n_kernels"].sum(), table["kernel_time_ns"].sum()) == (total.n_kernels, total.kernel_time_ns)
    assert table["tklqt_ns"].sum() == total.tklqt_ns
    owners = trace.filter(pl.col("kind") == "op").select("rank", "external", owner="name").drop_nulls("external")
    both = found.drop_nulls("operator").join(owners, on=["rank", "external"], nulls_equal=True)
    if any(word in row["file"] for word in WITH_IDS):
        assert both.filter(pl.col("owner") != pl.col("operator")).is_empty()
        assert both.height == found["external"].is_not_null().sum()
    else:
        assert found.filter(pl.col("found_by") == "external id").is_empty()


def test_a_part_of_the_joined_work_may_be_given() -> None:
    kernels = joined_work(BY_HAND, ("kernel",))
    assert attributed(BY_HAND, kernels)["operator"].to_list() == [
        "linear", "addmm", "linear", None, "replay", "replay", None,
    ]  # fmt: skip
