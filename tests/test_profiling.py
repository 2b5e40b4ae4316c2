"""Profiled points: which are chosen, what their traces must hold, recording under nsys (played by a script), scrubbing.

Traces of CUDA and exports of nsys are made up here unless they come from the reference material beside the project.
"""

import dataclasses
import gzip
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections import Counter
from contextlib import closing, contextmanager
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors import nsys, nsys_export, plan, profile_points, store, workloads
from collectors.profile_checks import refuse_gaps, scrubbed, work_of
from collectors.profile_points import N_STEPS, chosen_points, file_name, profile_bytes, range_name
from perfmodel.errors import InputError
from perfmodel.launch import launch_metrics
from perfmodel.readers import read_trace
from tests.conftest import ROOT
from tests.traces_made import complete, write_json

CPU_PLAN = plan.plan(plan.Request("cpu", "float32", plan.CPU_SHAPES, plan.CPU_TOKENS), None).workloads
CUDA_PLAN = plan.plan(
    plan.Request("cuda", "bfloat16", plan.default_shapes("cuda", False), plan.CUDA_TOKENS), None
).workloads
TINY = plan.plan(plan.Request("cpu", "float32", ("olmoe/32", "mixtral-8x7b/64"), (1, 8)), None).workloads
LAYERS = [w for w in TINY if w.op == "moe_layer"]
SHARED = sorted((ROOT.parent / "shared" / "traces").glob("nsysai__*.sqlite"))


def offloaded(workload, access, frac=0.5, **more):
    n = round(workload.n_experts * frac)
    some = {
        "access": access,
        "offload_frac": n / workload.n_experts,
        "offloaded": tuple(range(n)),
        "order": "ascending",
    }
    return dataclasses.replace(workload, **{**some, **more})


def campaign():
    """A plan with everything in it: CUDA layers, eager and replayed, and each access mode of some of them."""
    layers = [w for w in CUDA_PLAN if w.op == "moe_layer" and w.shape in ("olmoe", "qwen3-30b-a3b")]
    gemms = [w for w in CUDA_PLAN if w.op == "grouped_gemm" and w.shape == "olmoe"]
    graphs = [dataclasses.replace(w, launch="graph") for w in layers if w.n_tokens <= 4096]
    copied = [offloaded(w, a, f) for w in layers for a in ("copy", "copy-overlap", "cpu") for f in (0.25, 0.5)]
    mapped = [offloaded(w, "zero-copy", residency=r) for w in gemms for r in ("split", "mapped")]
    return [*gemms, *layers, *graphs, *copied, *mapped]


# --- which points ---


def test_the_first_two_points_of_older_captures_keep_their_names():
    names = [file_name(w) for w in chosen_points(CPU_PLAN)]
    assert names == [
        "moe_layer-olmoe-4-4-power-law-1.2.trace.json.gz",
        "moe_layer-mixtral-8x7b-8-256-power-law-1.2.trace.json.gz",
    ]
    shipped = ROOT / "traces" / "epyc-zen4-2c-fp32" / "profiles"
    assert {p.name for p in shipped.iterdir()} == set(names)
    assert [file_name(w) for w in chosen_points(CPU_PLAN, "standard")[:2]] == names
    assert range_name(chosen_points(CPU_PLAN)[0]) == (
        "perfmodel::moe_layer|shape=olmoe/4|tokens=4|routing=power-law:1.2"
    )


def test_standard_covers_the_batch_range_graphs_and_each_access_mode():
    points = chosen_points(campaign(), "standard")
    eager = [w for w in points if w.access == "resident" and w.launch is None and w.shape == points[0].shape]
    assert {1, 65536} <= {w.n_tokens for w in eager} and len({w.n_tokens for w in eager}) >= 5
    graphs = [w for w in points if w.launch == "graph"]
    assert graphs and points[-len(graphs) :] == graphs, "graphs come last: the profiler must be awake before a capture"
    assert {w.access for w in points} == set(workloads.ACCESS_MODES)
    modes = {w.access: w for w in points if w.access != "resident"}
    assert modes["zero-copy"].residency == "mapped" and modes["copy"].offload_frac == 0.5
    assert modes["copy"].op == "moe_layer" and modes["zero-copy"].op == "grouped_gemm"  # no such layer is planned
    assert len(points) <= profile_points.MOST["standard"]


@pytest.mark.parametrize("preset", profile_points.MOST)
@pytest.mark.parametrize("planned", [CPU_PLAN, CUDA_PLAN, campaign()], ids=["cpu", "cuda", "campaign"])
def test_points_are_planned_few_small_and_have_names_of_their_own(planned, preset):
    points = chosen_points(planned, preset)
    assert set(points) <= set(planned) and 2 <= len(points) <= profile_points.MOST[preset]
    assert len({file_name(w) for w in points}) == len({range_name(w) for w in points}) == len(points)
    assert sum(map(profile_bytes, points)) <= profile_points.PROFILES_BYTES
    assert all("/" not in file_name(w) and ":" not in file_name(w) for w in points)


@given(st.lists(st.sampled_from(campaign()), max_size=12), st.sampled_from(list(profile_points.MOST)))
def test_any_part_of_a_plan_can_be_chosen_from(planned, preset):
    points = chosen_points(planned, preset)
    assert set(points) <= set(planned) and len(set(points)) == len(points)
    if any(w.op == "moe_layer" and w.access == "resident" and w.launch is None for w in planned):
        assert points


def test_many_experts_on_the_cpu_do_not_fill_the_folder():
    wide = [dataclasses.replace(w, n_experts=1024, tokens_per_expert=(1,) * 1024) for w in CPU_PLAN]
    assert len(chosen_points(wide, "full")) == 2  # 0.85 MB each: the two that are always there


def test_an_unknown_preset_is_refused():
    with pytest.raises(InputError, match="the preset is 'fast', expected one of quick, standard, full"):
        chosen_points(CPU_PLAN, "fast")


def test_injected_profilers_are_named_and_can_be_left_out(monkeypatch):
    environ = {"PATH": "x", "NVTX_INJECTION64_PATH": "libcupti.so", "CUDA_INJECTION64_PATH": ""}
    assert profile_points.in_the_way({"PATH": "x"}) is None
    assert profile_points.in_the_way(environ).startswith("NVTX_INJECTION64_PATH is set: another profiler")
    for name in profile_points.INJECTORS:
        monkeypatch.delenv(name, raising=False)
    assert nsys.uninjected(["a", "b"]) == ["a", "b"]
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "libcupti.so")
    assert nsys.uninjected(["a", "b"]) == ["env", "-u", "NVTX_INJECTION64_PATH", "a", "b"]
    monkeypatch.setenv("CUDA_INJECTION64_PATH", "")
    shown = subprocess.run(nsys.uninjected(["env"]), capture_output=True, text=True, check=True).stdout
    assert "NVTX_INJECTION64_PATH" not in shown


# --- traces of torch's profiler ---


def cuda_trace(batch, kernels_ns, *, launch="cudaLaunchKernel", call_us=5.0, n_steps=N_STEPS):
    """A made-up Kineto trace of CUDA: steps of named ranges whose kernels run one after another as they are launched.

    Every kernel takes `kernels_ns`; with `launch="cudaGraphLaunch"` one call launches all of a step.
    """
    events, link, now_us = [], 0, 1000.0
    n_kernels = 20
    for _ in range(n_steps):
        begin, free = now_us, 0.0
        for i in range(n_kernels):
            if "Graph" not in launch or i == 0:
                link += 1
                launched = now_us
                events.append(complete("cuda_runtime", launch, now_us, call_us, 1, 1, correlation=link))
                now_us += call_us
            start = max(launched + 3.0, free)
            free = start + kernels_ns / 1000
            events.append(
                complete("kernel", "gemm", start, kernels_ns / 1000, 0, 7, device=0, stream=7, correlation=link)
            )
        events.append(complete("user_annotation", f"perfmodel::step|tokens={batch}", begin, now_us - begin))
        now_us = max(now_us, free) + 50.0
    return {"schemaVersion": 1, "host_name": "box", "traceName": "/home/me/t.json", "traceEvents": events}


def test_a_whole_cuda_trace_passes_and_is_counted():
    trace = cuda_trace(8, 1000)
    refuse_gaps(trace, {"perfmodel::step|tokens=8": 2}, on_cuda=True, from_graph=False, hint=None)
    assert work_of(trace) == {"n_kernels": 40, "n_copies": 0, "n_kernels_joined": 40, "n_kernels_graph": 0}
    replayed = cuda_trace(8, 1000, launch="cudaGraphLaunch")
    refuse_gaps(replayed, {"perfmodel::step|tokens=8": 2}, on_cuda=True, from_graph=True, hint=None)
    assert work_of(replayed)["n_kernels_graph"] == 40


def without(trace, **which):
    key, value = next(iter(which.items()))
    return {**trace, "traceEvents": [e for e in trace["traceEvents"] if e[key] != value]}


@pytest.mark.parametrize(
    ("trace", "from_graph", "hint", "words"),
    [
        (without(cuda_trace(8, 1), cat="kernel"), False, None, "saw no CUDA kernel; another profiler"),
        (without(cuda_trace(8, 1), cat="kernel"), False, "X is set: taken", "saw no CUDA kernel; X is set: taken"),
        (without(cuda_trace(8, 1), cat="cuda_runtime"), False, None, "none of 40 kernels .* is joined to the call"),
        (cuda_trace(8, 1), True, None, "none of 40 kernels .* belongs to the replay"),
        (cuda_trace(8, 1, n_steps=1), False, None, "tokens=8 is in the profile 1 times, expected 2"),
        (without(cuda_trace(8, 1), cat="user_annotation"), False, None, "in the profile 0 times, expected 2"),
    ],
)
def test_a_cuda_trace_with_a_gap_is_refused_saying_which(trace, from_graph, hint, words):
    with pytest.raises(InputError, match=words):
        refuse_gaps(trace, {"perfmodel::step|tokens=8": 2}, on_cuda=True, from_graph=from_graph, hint=hint)


@pytest.mark.parametrize("name", ["h100__Falconsai", "vllm_decode_full", "b200__eager"])
def test_device_work_is_counted_as_the_library_counts_it(name):
    found = sorted((ROOT.parent / "shared" / "traces").glob(f"tracelens__{name}*.json.gz"))
    if not found:
        pytest.skip("the reference material beside the project is absent")
    work = work_of(json.loads(gzip.decompress(found[0].read_bytes())))
    metrics = launch_metrics(read_trace(found[0]))
    assert work["n_kernels"] == metrics.n_kernels > 0
    assert work["n_kernels_joined"] == metrics.n_kernels_joined
    assert work["n_kernels_graph"] == metrics.n_kernels_graph


def test_profiles_without_kernels_draw_no_curve(tmp_path):
    from perfmodel.bound import sweep

    trace = without(without(cuda_trace(8, 1), cat="kernel"), cat="cuda_runtime")
    trace["traceEvents"].append(complete("cpu_op", "aten::mm", 1001.0, 5.0))
    metrics = launch_metrics(read_trace(write_json(tmp_path / "cpu.json", trace)))
    with pytest.raises(InputError, match="the trace of batch size 4 holds no kernel whose launch is known"):
        sweep([8, 4], [1000.0, metrics])


def test_scrubbing_keeps_what_is_known_and_nothing_else():
    trace = {
        **cuda_trace(8, 1000),
        "trace_id": "ABCD",
        "PT_PROFILER_JOB_NAME": "secret",
        "deviceProperties": [{"id": 0, "name": "NVIDIA H100", "uuid": "GPU-1"}],
        "perfmodel": {"where": "/scratch/place/file"},
    }
    found = scrubbed(trace, "/scratch/place")
    assert set(found) == {"schemaVersion", "deviceProperties", "perfmodel", "traceEvents"}
    assert found["deviceProperties"] == [{"id": 0, "name": "NVIDIA H100"}]
    assert found["perfmodel"] == {"where": "/file"}
    assert found["traceEvents"] == trace["traceEvents"]


def test_made_up_cuda_profiles_draw_the_curve_of_launch_delays(tmp_path):
    """20 kernels, one launch each 5 us. Of 1 us each, every kernel begins 3 us after its call, whatever the batch.

    Of 105 us each, kernel i begins 3 + 105 i us after the first call, which is 3 + 100 i us after its own: TKLQT of a
    step is 20 x 3 + 100 x 190 us.
    """
    from perfmodel.bound import sweep

    metrics = []
    for batch, kernels_ns in ((1, 1000), (16, 1000), (4096, 105_000)):
        trace = scrubbed(cuda_trace(batch, kernels_ns), "/nowhere")
        metrics.append(launch_metrics(read_trace(write_json(tmp_path / f"{batch}.json.gz", trace, packed=True))))
    assert [m.tklqt_ns for m in metrics] == [2 * 60_000, 2 * 60_000, 2 * (60_000 + 19_000_000)]
    assert [m.n_kernels_joined for m in metrics] == [40, 40, 40]
    found = sweep([1, 16, 4096], metrics)
    assert found.transition_batch == 4096
    assert found.table["label"].to_list() == ["host-bound", "host-bound", "device-bound"]


@pytest.fixture(scope="module")
def tiny_pool():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from collectors.points import make_pool

    torch.set_num_threads(1)
    with torch.inference_mode():
        yield make_pool(workloads.pool_bytes(TINY, 1 << 20, 1 << 28), 1 << 20, "fp32", "cpu", 0)


def test_profiles_on_this_machine_are_read_back_whole(tiny_pool, tmp_path):
    from collectors.points import prepare
    from collectors.profiling import write_profile

    points = chosen_points(TINY, "standard")
    assert {w.n_tokens for w in points} == {1, 8}
    for w in points:
        path = write_profile(tmp_path, partial(prepare, tiny_pool, w, None, 0), w)
        assert path == tmp_path / file_name(w)
        events = read_trace(path).events
        ranges = Counter(events.filter(events["kind"] == "range")["name"].cast(str))
        parts = {f"perfmodel::{p}": 2 for p in ("router", "dispatch", "gate_up", "activation", "down", "combine")}
        assert ranges == {range_name(w): 2, **parts}
        ops = events.filter(events["kind"] == "op")
        outer = events.filter(events["name"].cast(str) == range_name(w))
        inside = [
            any(a <= s and s + d <= a + n for a, n in outer.select("start_ns", "dur_ns").iter_rows())
            for s, d in ops.select("start_ns", "dur_ns").iter_rows()
        ]
        assert len(inside) > 20 and np.mean(inside) == 1.0
        table = json.loads(gzip.decompress(path.read_bytes()))["perfmodel"]
        assert table["workload"] == w.id and table["n_steps"] == 2 and table["n_inner"] == 1
        assert table["tokens_per_expert"] == list(w.tokens_per_expert)
        assert table["ranges"] == {range_name(w): dict.fromkeys(sorted(parts), 1)}
        assert path.stat().st_size < 1.5 * profile_bytes(w)
        assert launch_metrics(read_trace(path)).n_kernels == 0
    assert {p.name for p in tmp_path.iterdir()} == {file_name(w) for w in points}


class Made:
    """A prepared workload that does next to nothing and remembers what was asked of it."""

    n_inner = 3

    def __init__(self, log=None, fails_at=None, mark=None):
        self.facts = {"counts_read_back": True}
        self.log, self.fails_at, self.mark = [] if log is None else log, fails_at, mark

    def call(self, n):
        import torch

        self.log.append(n)
        if self.fails_at is not None and len(self.log) > self.fails_at:
            raise RuntimeError("out of luck\nand more lines")
        torch.ones(4).mul_(2)
        if self.mark is not None:
            with self.mark("part"), self.mark("part"):
                pass

    def close(self):
        self.log.append("closed")


def test_facts_and_inner_calls_go_into_the_side_table_and_a_failed_point_is_closed(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    from collectors.profiling import write_profile

    made = []

    def prepare(mark):
        made.append(Made(mark=mark))
        return made[-1]

    path = write_profile(tmp_path, prepare, LAYERS[0])
    table = json.loads(gzip.decompress(path.read_bytes()))["perfmodel"]
    assert table["facts"] == {"counts_read_back": True} and table["n_inner"] == 3
    assert table["ranges"] == {range_name(LAYERS[0]): {"perfmodel::part": 2}}
    assert made[0].log == [0, 1, 2, "closed"]
    bad = Made(fails_at=1)
    with pytest.raises(RuntimeError, match="out of luck"):
        write_profile(tmp_path, lambda _mark: bad, LAYERS[1])
    assert bad.log == [0, 1, "closed"]
    assert [p.name for p in tmp_path.iterdir()] == [file_name(LAYERS[0])]


def test_a_cuda_profile_without_kernels_is_refused_before_it_is_written(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("plays a machine whose device tracing is taken")
    from collectors import profiling

    monkeypatch.setattr(profiling, "_wait", lambda _workload: None)
    monkeypatch.setenv("CUDA_INJECTION64_PATH", "libother.so")
    workload = dataclasses.replace(LAYERS[0], device="cuda")
    with (
        pytest.warns(UserWarning, match="CUDA is not available"),
        pytest.raises(InputError, match="saw no CUDA kernel; CUDA_INJECTION64_PATH is set"),
    ):
        profiling.write_profile(tmp_path, lambda _mark: Made(), workload)
    assert not list(tmp_path.iterdir())
    assert "note: CUDA_INJECTION64_PATH is set" in capsys.readouterr().err


def test_tracing_stays_loaded_between_sessions_unless_told_otherwise(monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    from collectors import profiling

    monkeypatch.setenv("TEARDOWN_CUPTI", "1")
    profiling._session(is_cuda=True)
    assert os.environ["TEARDOWN_CUPTI"] == "1"
    monkeypatch.delenv("TEARDOWN_CUPTI")
    profiling._session(is_cuda=True)
    assert os.environ.pop("TEARDOWN_CUPTI") == "0"


def test_ranges_reach_nvtx_by_whatever_there_is(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from collectors import profiling

    pushed = []
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pushed.append("pop"))
    for is_cuda, expected in ((True, ["a{b}", "pop"]), (False, [])):
        profiling._nvtx_range.cache_clear()
        pushed.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_cuda=is_cuda: is_cuda)
        with profiling.named_range("a{b}"):
            pass
        assert pushed == expected
    profiling._nvtx_range.cache_clear()


# --- under nsys ---


@pytest.fixture
def played_cuda(monkeypatch):
    """The CUDA calls of the stage played by a log."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from collectors import profiling

    log = []

    @contextmanager
    def named(name):
        log.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    monkeypatch.setattr(profiling, "_wait", lambda _workload: None)
    monkeypatch.setattr(profiling, "named_range", named)
    return log


def test_the_stage_warms_up_before_it_records_and_closes_all(played_cuda):
    from collectors.profiling import nsys_stage

    log, failed = played_cuda, []
    good, late, never = (dataclasses.replace(w, device="cuda") for w in LAYERS[:3])
    made = {good: Made(), late: Made(fails_at=2), never: Made(fails_at=0)}

    def leave_out(workload, error):
        failed.append((workload, str(error).splitlines()[0]))

    n = nsys_stage([good, late, never], lambda w: lambda _mark: made[w], lambda w: log.append(w.id), leave_out)
    step = range_name(good)
    assert log == [
        good.id, late.id, never.id, "start", good.id, step, step, late.id, range_name(late), "stop",
    ]  # fmt: skip
    assert n == 1 and failed == [(never, "out of luck"), (late, "out of luck")]
    assert made[good].log == [0, 1, 1, 2, "closed"] and made[late].log == [0, 1, 1, "closed"]
    assert made[never].log == [0, "closed"]
    with pytest.raises(InputError, match="no point could be prepared"):
        nsys_stage([never], lambda _w: lambda _mark: Made(fails_at=0), lambda _w: None, leave_out)


def test_a_device_that_is_lost_ends_the_stage_with_the_recording(played_cuda):
    from collectors.profiling import nsys_stage

    def leave_out(_workload, _error):
        raise SystemExit(75)

    made = [Made(fails_at=2), Made()]
    points = [dataclasses.replace(w, device="cuda") for w in LAYERS[:2]]
    with pytest.raises(SystemExit):
        nsys_stage(points, lambda w: lambda _mark: made[points.index(w)], lambda _w: None, leave_out)
    assert played_cuda[-1] == "stop" and [m.log[-1] for m in made] == ["closed", "closed"]


def test_the_stage_refuses_torchs_profiler_and_a_machine_without_cuda(played_cuda, monkeypatch):
    import torch

    from collectors.profiling import nsys_stage

    with torch.autograd.profiler.profile(), pytest.raises(InputError, match="torch's profiler is on"):
        nsys_stage([], lambda _w: lambda _mark: Made(), print, print)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds no CUDA device here, so there is nothing to record"):
        nsys_stage([], lambda _w: lambda _mark: Made(), print, print)


POINTS = [dataclasses.replace(LAYERS[0], device="cuda"), dataclasses.replace(LAYERS[1], device="cuda", launch="graph")]
PRIVATE = ("alice-secret", "10.1.2.3", "hunter2", "/home/alice", "GPU-5f0c", "bash_history", "f00d-uuid")
TID = 1 << 56 | 77 << 24 | 5


def made_export(path, *, points=POINTS, kernels=True, ranges=True, n_steps=N_STEPS):
    """An export like those of nsys 2025, made up: two steps of each point, ten kernels each; and whose it was."""
    strings = {
        1: "cudaLaunchKernel_v7000", 2: "cudaGraphLaunch_v10000", 4: "gemm",
        3: "void cutlass::gemm<(int)4, float>(T1) operator/(a)",
        5: "/home/alice/app.py", 6: "PASSWORD=hunter2 HOME=/home/alice", 7: "alice-secret", 8: "poll",
    }  # fmt: skip
    kernel, call, nvtx, osrt, now, link = [], [], [], [], 1000, 0
    for number, point in enumerate(points, start=20):
        strings[number] = range_name(point)
        for _ in range(n_steps):
            begin = now
            for i in range(10):
                if point.launch is None or i == 0:
                    link += 1
                    call.append((now + 10, now + 20, 1, TID, link, 2 if point.launch else 1, 0, 99))
                kernel.append((now + 100, now + 150, 0, 1, 7, link, TID - 5, 3, 4, 3, 8, 1, "GPU-5f0c"))
                now += 200
            nvtx.append((begin, now, 59, None, TID, 1, number, None, '{"user": "alice-secret"}'))
            osrt.append((begin, begin + 5, TID, 8))
            now += 1000
    tables = {
        "StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL)": list(strings.items()),
        "CUPTI_ACTIVITY_KIND_RUNTIME (start INT, end INT, eventClass INT, globalTid INT, correlationId INT, "
        "nameId INT, returnValue INT, callchainId INT)": call,
        "NVTX_EVENTS (start INT, end INT, eventType INT, text TEXT, globalTid INT, domainId INT, textId INT, "
        "jsonTextId INT, jsonText TEXT)": nvtx if ranges else [(0, 9, 59, "other", TID, 1, None, None, None)],
        "OSRT_API (start INT, end INT, globalTid INT, nameId INT)": osrt,
        "TARGET_INFO_GPU (id INT, name TEXT, busLocation TEXT, uuid TEXT, smCount INT)": [
            (0, "NVIDIA H100 80GB HBM3", "0000:01:00.0", "f00d-uuid", 132)
        ],
        "TARGET_INFO_SYSTEM_ENV (globalVid INT, devStateName TEXT, name TEXT, nameEnum INT, value TEXT)": [
            (1, "Local", "Hostname", 619, "alice-secret"), (1, "Local", "DeviceEnvironment", 610, "SSH=10.1.2.3"),
        ],
        "PROCESSES (globalPid INT, pid INT, name TEXT)": [(TID, 77, "bash_history")],
        "ThreadNames (nameId INT, priority INT, globalTid INT)": [(7, 1, TID)],
        "META_DATA_CAPTURE (name TEXT, value TEXT)": [
            ("PROCESS_0:ENVIRONMENT_VARIABLE", "PASSWORD=hunter2"), ("PROCESS_0:WORKING_DIR", "/home/alice"),
            ("CUDA_GRAPH_TRACE_OPTIONS:MODE", "Node"), ("DEVICE_DISPLAY_NAME", "alice-secret"),
        ],
        "META_DATA_EXPORT (name TEXT, value TEXT)": [
            ("EXPORT_USER", "alice-secret"), ("EXPORT_PRODUCT_VERSION", "2025.3.1.90"),
        ],
        "DIAGNOSTIC_EVENT (timestamp INT, text TEXT, globalPid INT)": [
            (1, "see /home/alice/x.log: 3 events lost", TID)
        ],
    }  # fmt: skip
    if kernels:
        tables[
            "CUPTI_ACTIVITY_KIND_KERNEL (start INT, end INT, deviceId INT, contextId INT, streamId INT, "
            "correlationId INT, globalPid INT, demangledName INT, shortName INT, mangledName INT, gridX INT, "
            "graphNodeId INT, blockX INT)"
        ] = kernel
    with closing(sqlite3.connect(path)) as database:
        for table, rows in tables.items():
            database.execute(f"CREATE TABLE {table}")
            if rows:
                marks = ", ".join("?" * len(rows[0]))
                database.executemany(f"INSERT INTO {table.partition(' ')[0]} VALUES ({marks})", rows)
        database.commit()
    return path


PLAYED = """#!{python}
import json, shutil, subprocess, sys
from pathlib import Path
how = {how!r}
if sys.argv[1] == "--version":
    print("NVIDIA Nsight Systems version {version}-123456v0")
    sys.exit(how == "does not run")
if sys.argv[1] == "profile":
    options = [word for word in sys.argv[2:] if word.startswith("--")]
    inner = sys.argv[2 + len(options):]
    Path({log!r}).write_text(json.dumps([options, inner]))
    if how == "fails":
        sys.exit(1)
    code = subprocess.run(inner).returncode
    if how != "no report":
        out = next(o for o in options if o.startswith("--output=")).partition("=")[2]
        Path(out + ".nsys-rep").write_text("report")
    sys.exit(code)
if sys.argv[1] == "export":
    if how == "old":
        print("Error: the report was made by a newer version")
        sys.exit(1)
    if how == "broken export":
        Path({export!r}).write_text("no database at all" * 100)
    shutil.copy({export!r}, sys.argv[sys.argv.index("--output") + 1])
"""


@pytest.fixture
def played_nsys(tmp_path, monkeypatch):
    """Puts a script called nsys on PATH that behaves as said; returns how to make it, with its log beside."""

    def play(how="works", version="2025.3.1.90", **export):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        made_export(tmp_path / "made.sqlite", **export)
        words = {"export": str(tmp_path / "made.sqlite"), "log": str(tmp_path / "log.json"), "python": sys.executable}
        script = folder / "nsys"
        script.write_text(PLAYED.format(how=how, version=version, **words))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(folder))
        return script

    return play


INNER = [sys.executable, "-c", "print('said by the stage')"]


def a_capture(folder, points=POINTS, device="cuda"):
    """A capture folder as far as `collect` looks."""
    folder.mkdir()
    store.write_capture(folder, {"schema": store.SCHEMA, "settings": {"device": device, "preset": "standard"}})
    store.write_workloads(folder, [point.to_line() for point in points])
    return folder


def collect(folder):
    """Collect with a stage that runs its command and passes on nothing."""
    codes = []

    def stage(label, *arguments, wrap):
        assert (label, arguments) == ("recording with nsys", ("nsys",))
        codes.append(subprocess.run(wrap(INNER), check=False).returncode)

    return nsys.collect(folder, stage), codes


def test_a_recording_is_exported_scrubbed_checked_and_read_back(played_nsys, tmp_path):
    played_nsys()
    folder = a_capture(tmp_path / "capture")
    path, codes = collect(folder)
    assert path == folder / store.PROFILES / "nsys.sqlite" and codes == [0]
    assert [p.name for p in path.parent.iterdir()] == ["nsys.sqlite"] and store.left_out(folder) == []
    options, inner = json.loads((tmp_path / "log.json").read_text())
    assert inner == INNER
    assert {
        "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--cuda-graph-trace=node",
        "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0", "--trace=cuda,nvtx,osrt",
    } <= set(options)  # fmt: skip
    raw = path.read_bytes()
    for word in PRIVATE:
        assert word.encode() not in raw, word
    trace = read_trace(path)
    assert trace.meta["gpus"] == ["NVIDIA H100 80GB HBM3"]
    assert trace.meta["capture"] == {"CUDA_GRAPH_TRACE_OPTIONS:MODE": "Node"}
    metrics = launch_metrics(trace)
    assert (metrics.n_kernels, metrics.n_kernels_joined, metrics.n_launches) == (40, 40, 22)
    ranges = trace.events.filter(trace.events["kind"] == "range")["name"].cast(str)
    assert Counter(ranges) == {range_name(w): 2 for w in POINTS}
    with closing(sqlite3.connect(path)) as database:
        lines = dict(database.execute(f"SELECT range, line FROM {nsys_export.POINTS}"))
        said = database.execute("SELECT text FROM DIAGNOSTIC_EVENT").fetchall()
        assert database.execute("SELECT count(*) FROM OSRT_API").fetchone() == (4,)
    assert json.loads(lines[range_name(POINTS[1])])["workload"] == POINTS[1].id
    assert said == [("see (path): 3 events lost",)]
    assert nsys_export.kernels_in_ranges(path) == {range_name(w): (2, 20) for w in POINTS}


def test_an_export_that_is_too_large_loses_the_calls_of_the_operating_system(tmp_path, monkeypatch):
    monkeypatch.setattr(nsys_export, "MOST_BYTES", 1)
    nsys_export.scrub(made_export(tmp_path / "made.sqlite"), tmp_path / "clean.sqlite", {})
    with closing(sqlite3.connect(tmp_path / "clean.sqlite")) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    assert "OSRT_API" not in tables and "CUPTI_ACTIVITY_KIND_KERNEL" in tables


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"how": "fails"}, "nsys ended and wrote no report: cudaProfilerStart never reached it"),
        ({"how": "no report"}, "nsys ended and wrote no report: cudaProfilerStart never reached it"),
        ({"how": "broken export"}, r"the export of nsys cannot be read \(file is not a database\)"),
        (
            {"how": "old"},
            r"nsys 2025.3.1.90 could not export its report \(exit code 1\): Error: the report was made by",
        ),
        ({"how": "does not run"}, "found nsys that does not run, expected Nsight Systems 2022.4 or newer"),
        ({"version": "2021.3.2.4"}, "found nsys 2021.3.2.4, expected Nsight Systems 2022.4 or newer"),
        ({"kernels": False}, "nsys recorded no CUDA kernel: another profiler"),
        ({"ranges": False}, "recorded kernels and none of the named ranges"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_recording_that_fails_says_why_in_a_sentence_and_leaves_nothing(
    played_nsys, tmp_path, monkeypatch, how, words
):
    played_nsys(**how)
    monkeypatch.setattr(nsys, "_candidates", lambda _folders: [tmp_path / "bin" / "nsys"])
    with pytest.raises(InputError, match=words) as caught:
        collect(a_capture(tmp_path / "capture"))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "capture").glob("profiles/*"))


def test_a_point_that_is_not_whole_is_left_out_by_name_and_the_rest_is_kept(played_nsys, tmp_path):
    played_nsys(points=POINTS[:1], n_steps=1)
    folder = a_capture(tmp_path / "capture")
    path, _ = collect(folder)
    assert path.exists()
    assert {entry["nsys"]: entry["reason"] for entry in store.left_out(folder)} == {
        range_name(POINTS[0]): "nsys recorded the range 1 times, expected 2",
        range_name(POINTS[1]): "nsys recorded the range 0 times, expected 2",
    }
    assert nsys.chosen(folder) == []


def test_a_range_without_kernels_is_not_whole(tmp_path):
    export = made_export(tmp_path / "made.sqlite")
    with closing(sqlite3.connect(export)) as database:
        database.execute("DELETE FROM CUPTI_ACTIVITY_KIND_RUNTIME WHERE nameId = 2")
        database.commit()
    missing = nsys_export.gaps(export, {range_name(w): 2 for w in POINTS})
    assert missing == {range_name(POINTS[1]): "nsys recorded the range and no kernel launched in it"}


def test_without_nsys_one_sentence_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no nsys on PATH or in the usual folders, so no Nsight Systems profile"):
        nsys.find(folders=())


def test_a_capture_of_the_cpu_has_nothing_for_nsys(tmp_path):
    with pytest.raises(InputError, match="nsys records what a GPU does, and the device of this capture is 'cpu'"):
        collect(a_capture(tmp_path / "capture", device="cpu"))


def test_the_newest_in_the_usual_folders_is_found_when_path_has_none(played_nsys, monkeypatch, tmp_path):
    for version in ("2023.1.1.1", "2025.3.1.90", "2024.9.9.9"):
        script = played_nsys(version=version)
        folder = tmp_path / version / "bin"
        folder.mkdir(parents=True)
        script.rename(folder / "nsys")
        (tmp_path / "made.sqlite").unlink()
    assert nsys.find(folders=(f"{tmp_path}/*/bin",)) == tmp_path / "2025.3.1.90" / "bin" / "nsys"
    assert nsys.version(tmp_path / "2023.1.1.1" / "bin" / "nsys") == (2023, 1, 1, 1)


@pytest.mark.skipif(not SHARED, reason="the reference material beside the project is absent")
@pytest.mark.parametrize("export", SHARED, ids=lambda p: p.stem)
def test_real_exports_read_the_same_after_scrubbing(export, tmp_path):
    clean = tmp_path / "clean.sqlite"
    nsys_export.scrub(export, clean, {})
    before, after = read_trace(export), read_trace(clean)
    assert after.events.equals(before.events)
    assert after.meta.get("gpus") == before.meta.get("gpus")
    with closing(sqlite3.connect(clean)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        strings = [value for (value,) in database.execute("SELECT value FROM StringIds")]
        paths = [value for value in strings if nsys_export.PATH.search(value)]
    assert not tables & {"PROCESSES", "ThreadNames", "TARGET_INFO_SYSTEM_ENV", "ProcessStreams", "ANALYSIS_FILE"}
    assert not paths
    raw = clean.read_bytes()
    for word in (b"/home/", b"/root", b"HOME=", b"PATH=", b"Hostname", b"EXPORT_USER"):
        assert word not in raw, word


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("see /tmp/nvidia/log.txt now", "see (path) now"),
        ("PATH=/usr/bin:/bin", "PATH=(path):(path)"),
        (r"in C:\Users\me\x", "in (path)"),
        ("~/data/x", "(path)"),
        ("host alice-box and alice-boxes", "host (name) and alice-boxes"),
        ("perfmodel::moe_layer|shape=olmoe/4|tokens=4", "perfmodel::moe_layer|shape=olmoe/4|tokens=4"),
        (
            "void at::native::operator/(float, int) [with T = a/b]",
            "void at::native::operator/(float, int) [with T = a/b]",
        ),
        ("{lambda(at x)#1}::operator()/2", "{lambda(at x)#1}::operator()/2"),
    ],
)
def test_paths_and_names_leave_and_kernels_stay(words, expected):
    assert nsys_export.anonymous(words, ["alice-box"]) == expected


# --- on a GPU ---


@pytest.mark.gpu
def test_points_profiled_on_cuda_hold_joined_kernels(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from collectors.points import make_pool, prepare
    from collectors.profiling import write_profile

    request = plan.Request("cuda", "bfloat16", ("olmoe/4",), (1, 64))
    layers = [w for w in plan.plan(request, None).workloads if w.op == "moe_layer"]
    points = chosen_points([*layers, *(dataclasses.replace(w, launch="graph") for w in layers)], "standard")
    with torch.inference_mode():
        pool = make_pool(workloads.pool_bytes(layers, 1 << 26, 1 << 30), 1 << 26, "bf16", "cuda", 0)
        for w in points:
            write_profile(tmp_path, partial(prepare, pool, w, None, 0), w)
    for w in points:
        metrics = launch_metrics(read_trace(tmp_path / file_name(w)))
        assert metrics.n_kernels_joined == metrics.n_kernels > 0
        assert (metrics.n_kernels_graph > 0) == (w.launch == "graph")


UNDER_NSYS = """
import sys
from functools import partial
from pathlib import Path
import torch
from collectors import nsys, workloads
from collectors.points import make_pool, prepare
from collectors.profiling import nsys_stage
points = nsys.chosen(Path(sys.argv[1]))
def leave_out(workload, error):
    raise error
with torch.inference_mode():
    pool = make_pool(workloads.pool_bytes(points, 1 << 26, 1 << 30), 1 << 26, "bf16", "cuda", 0)
    nsys_stage(points, lambda w: partial(prepare, pool, w, None, 0), print, leave_out)
"""


@pytest.mark.gpu
def test_points_recorded_by_the_real_nsys(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        nsys.find()
    except InputError as error:
        pytest.skip(str(error))
    request = plan.Request("cuda", "bfloat16", ("olmoe/4",), (1, 64))
    layers = [w for w in plan.plan(request, None).workloads if w.op == "moe_layer"]
    folder = a_capture(tmp_path / "capture", [*layers, *(dataclasses.replace(w, launch="graph") for w in layers)])

    def stage(_label, *_arguments, wrap):
        subprocess.run(wrap([sys.executable, "-c", UNDER_NSYS, str(folder)]), cwd=ROOT, check=True)

    path = nsys.collect(folder, stage)
    assert store.left_out(folder) == []
    metrics = launch_metrics(read_trace(path))
    assert metrics.n_kernels_joined == metrics.n_kernels > metrics.n_kernels_graph > 0
    assert path.stat().st_size < 2 * nsys_export.MOST_BYTES
