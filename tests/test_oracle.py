"""Figures of real traces against those of plain loops (`oracle_made`), all of them and those of every group."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfmodel.analysis import analyse
from perfmodel.classify import kernel_class
from perfmodel.diff import diff
from perfmodel.groups import GROUPINGS, KEYS, STEP_PREFIX, launch_metrics_by, steps
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.conftest import ROOT
from tests.oracle_made import (
    WORK,
    Event,
    device_of,
    exposed,
    figures,
    innermost,
    join,
    kineto_events,
    latency,
    nsys_events,
    process_of,
    split,
    stream_of,
    thread_of,
    with_calls,
)  # fmt: skip

SHARED = ROOT.parent / "shared" / "traces"
FILES = (
    "hta__amd_trace__mi250_minitoy_train_ROCm6_2_kineto.json.gz",
    "hta__simple_add__benchmark_result_493459_1694039959_trace.json.gz",
    "tracelens__b200__eager_trace.json.gz",
    "tracelens__gpu_only_trace__gpu_only_trace.json.gz",
    "tracelens__h100__Falconsai_nsfw_image_detection__1016002.json.gz",
    "tracelens__h100__Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz",
    "tracelens__h100__gaunernst_bert-small-uncased__1016001.json.gz",
    "tracelens__mi300__Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz",
    "tracelens__sglang_decode__sglang_Qwen3-8B_decode.json.gz",
    "tracelens__torch_compile_triton__trace.json.gz",
    "tracelens__vllm_decode_full__graph_execution.json.gz",
    "nsysai__h100_2gpu_1s.sqlite",
    "nsysai__mfu_2gpu_before.sqlite",
    "nsysai__mock.sqlite",
)
RANKS = "hta__trace_filter__sampled_rank-*.json.gz"  # both of them, as a folder


@pytest.fixture(scope="module", params=[*FILES, RANKS])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], Trace]:
    """The events of a real trace as dicts and as a Trace."""
    paths = sorted(SHARED.glob(request.param))
    if not paths:
        pytest.skip("the reference material beside the project is absent")
    if len(paths) == 1:
        events = nsys_events(paths[0]) if paths[0].suffix == ".sqlite" else kineto_events(paths[0])
        join(events)
        return events, read_trace(paths[0])
    folder = tmp_path_factory.mktemp("ranks")
    events = []
    for rank, path in enumerate(paths):
        (folder / path.name).symlink_to(path)
        events += [e | {"rank": rank} for e in kineto_events(path)]
    join(events)
    return events, read_trace(folder)


def same(mine: dict[str, Any], theirs: dict[str, Any], where: Any = None) -> None:
    """Every figure of the loops is that of the package: whole numbers exactly."""
    for name, value in mine.items():
        expected = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
        assert theirs[name] == expected, (where, name)


def test_figures_of_a_trace(both: tuple[list[Event], Trace]) -> None:
    events, trace = both
    latency_ns = latency(events)
    eq5_ns = None if latency_ns is None else latency_ns - sum(e["dur"] for e in events if e["kind"] == "kernel")
    mine = figures(events) | {"inference_latency_ns": latency_ns, "gpu_idle_eq5_ns": eq5_ns}
    same(mine, analyse(trace).to_json())


@pytest.mark.parametrize(
    ("by", "place"),
    [
        ("rank", lambda e: (e["rank"],)),
        ("device", device_of),
        ("stream", stream_of),
        ("process", process_of),
        ("thread", thread_of),
    ],
)
def test_figures_of_each_place(both: tuple[list[Event], Trace], by: str, place: Callable[[Event], Any]) -> None:
    events, trace = both
    keys = KEYS[by]
    theirs = {tuple(row[key] for key in keys): row for row in launch_metrics_by(trace.events, by).to_dicts()}
    work = [e for e in events if e["kind"] in WORK]
    host = [] if "device" in keys else [e for e in events if e["kind"] in ("launch", "op")]
    groups = split([*work, *host], place)
    assert set(theirs) == set(groups)
    for key, group in groups.items():
        mine = figures(with_calls(group) if "device" in keys else group)
        same(mine | {"inference_latency_ns": None if "device" in keys else latency(group)}, theirs[key], key)


def test_figures_of_each_range(both: tuple[list[Event], Trace]) -> None:
    events, trace = both
    groups: dict[Any, list[Event]] = defaultdict(list)
    for e in events:
        if e["kind"] not in WORK and e["kind"] != "launch":
            continue
        outermost: dict[Any, Event] = {}
        for r in (e.get("launch") or {}).get("ranges", []):
            name = r["name"].split("|")[0]
            if name not in outermost or (r["start"], -r["end"]) < (outermost[name]["start"], -outermost[name]["end"]):
                outermost[name] = r
        for name, r in outermost.items():
            groups[e["rank"], name].append(e | {"part": id(r)})
        if not outermost:
            groups[e["rank"], None].append(e | {"part": None})
    for row in launch_metrics_by(trace.events, "range").to_dicts():
        key = row["rank"], row["name"]
        same(figures(groups.pop(key, []), lambda e: e["part"]), row, key)
    assert not groups


def test_figures_of_each_step(both: tuple[list[Event], Trace]) -> None:
    events, trace = both
    names = set(steps(trace.events)["name"])
    assert not any(
        e["kind"] == "range" and e["name"].startswith(STEP_PREFIX) and e["name"] not in names for e in events
    )
    found = [e for e in events if e["kind"] == "range" and e["name"].split("|")[0] in names]
    by_thread, by_process = split(found, thread_of), split(found, process_of)

    def step_of(e: Event) -> Any:
        call = e.get("launch")
        if call is None:
            return e["rank"], None
        step = innermost(by_thread[thread_of(call)], call["start"]) or innermost(
            by_process[process_of(call)], call["start"]
        )
        return e["rank"], step and id(step)

    groups = split([e for e in events if e["kind"] in WORK or e["kind"] == "launch"], step_of)
    sums = sorted(json.dumps(figures(group)) for group in groups.values())
    theirs = [
        {name: row[name] for name in figures([])}
        for row in launch_metrics_by(trace.events, "step").to_dicts()
        if row["n_launches"] or row["gpu_span_ns"] is not None
    ]
    assert len(theirs) == len(sums)
    for mine, row in zip(map(json.loads, sums), sorted(theirs, key=json.dumps), strict=True):
        same(mine, row)


def test_sums_of_groups_are_those_of_the_trace(both: tuple[list[Event], Trace]) -> None:
    events, trace = both
    total = figures(events)
    names = ("n_kernels", "n_kernels_joined", "kernel_time_ns", "tklqt_ns", "tklqt_graph_ns", "queue_ns", "n_queued")
    for by in set(GROUPINGS) - {"range"}:  # nested ranges all count
        table = launch_metrics_by(trace.events, by)
        assert {name: table[name].sum() for name in names} == {name: total[name] for name in names}, by


def test_tables_of_the_page(both: tuple[list[Event], Trace]) -> None:
    events, trace = both
    page = analyse(trace).to_json()
    kernels = [e for e in events if e["kind"] == "kernel"]

    def operator(k: Event) -> str:
        call = k.get("launch")
        if call is None:
            return "(orphans)"
        return "(graph kernels)" if k["graph"] else call["op"]["name"] if call["op"] else "(no operator)"

    tables = {"classes": ("class", lambda k: kernel_class(k["name"]), "time_ns"), "kernels": ("name", None, "time_ns")}
    for table, (key, group, time) in (tables | {"operators": ("name", operator, "kernel_time_ns")}).items():
        groups = split(kernels, group or (lambda k: k["name"]))
        mine = {name: (len(some), sum(k["dur"] for k in some)) for name, some in groups.items()}
        assert {row[key]: (row["n_kernels"], row[time]) for row in page[table] if row["n_kernels"]} == mine
    for row in page["kernels"]:
        delays = [k["delay"] for k in kernels if k["name"] == row["name"] and k.get("launch")]
        assert row["tklqt_ns"] == (sum(delays) if delays else None)
    launches = split([e for e in events if e["kind"] == "launch"], lambda e: e["name"])
    calls = {row["name"]: (row["n_launches"], row["time_ns"]) for row in page["launch_calls"]}
    assert calls == {name: (len(some), sum(e["dur"] for e in some)) for name, some in launches.items()}
    copied = [e for e in events if e["kind"] in ("copy", "set")]
    for column, key in (("time_ns", "dur"), ("bytes", "bytes")):
        assert sum(row[column] or 0 for row in page["copies"]) == sum(int(e[key] or 0) for e in copied)
    assert sum(row["n_copies"] for row in page["copies"]) == len(copied)


def test_exposed_time_and_gaps_of_each_device(both: tuple[list[Event], Trace]) -> None:
    events, trace = both
    page = analyse(trace).to_json()
    mine = exposed(events)
    assert {(row["rank"], row["device"]) for row in page["exposed"]} == set(mine)
    for row in page["exposed"]:
        sums = mine[row["rank"], row["device"]]
        same({name: sums.get(name, 0) for name in row if name.endswith("_ns")}, row)
    idle = split([e for e in events if e["kind"] in WORK], device_of)
    for row in page["gaps"]:
        assert row["gap_ns"] == figures(idle[row["rank"], row["device"]])["gpu_idle_ns"]
        assert row["launch_ns"] is None or row["launch_ns"] + row["sync_ns"] + row["neither_ns"] == row["gap_ns"]


def test_a_trace_does_not_differ_from_itself(both: tuple[list[Event], Trace]) -> None:
    found = diff(both[1], both[1])
    for table in (found.metrics, found.classes, found.operators):
        change = table["change" if "change" in table.columns else "change_ns"]
        assert set(change.drop_nulls()) <= {0.0} and set(table["ratio"].drop_nulls()) <= {1.0}


def test_a_difference_is_the_same_from_both_sides() -> None:
    paths = [SHARED / name for name in (FILES[2], FILES[7])]
    if not all(map(Path.is_file, paths)):
        pytest.skip("the reference material beside the project is absent")
    a, b = map(read_trace, paths)
    there, back = diff(a, b), diff(b, a)
    for name, keys in (("metrics", ["metric"]), ("classes", ["class"]), ("operators", ["name", "part"])):
        change = "change" if name == "metrics" else "change_ns"
        one, other = (getattr(d, name).sort(keys) for d in (there, back))
        assert one.select(keys).equals(other.select(keys))
        assert one[change].to_list() == (-other[change]).to_list()
        for r, s in zip(one["ratio"], other["ratio"], strict=True):
            assert not (r and s) or r * s == pytest.approx(1)
