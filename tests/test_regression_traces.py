"""Regression checks over traces: steps, parts of their time, the gate of the work, and verdicts, on made-up and real
traces."""

import gzip
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from perfmodel.cli.main import app
from perfmodel.errors import InputError, NotComparableError
from perfmodel.hardware import hardware
from perfmodel.readers import read_trace
from perfmodel.regression import PARTS, Evidence, compare, evidence
from perfmodel.regression.traces.parts import details_of, wall_parts
from perfmodel.regression.traces.sides import log_se_of_median
from perfmodel.regression.traces.steps import PASS, STEP, WINDOW, judged_steps
from perfmodel.trace import Trace
from tests.conftest import ROOT
from tests.traces_made import complete, events, kernel, launch, pid, write_json, write_nsys

QWEN = "tracelens__h100__Qwen_Qwen1.5-0.5B-Chat__1016005.json.gz"
V100 = "hta__ns_resolution_trace__rank-0.Apr_03_18_51_38.1102.pt.trace.json.gz"


def step(start_ns: int, dur_ns: int, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"kind": "range", "name": f"ProfilerStep#{number}", "start_ns": start_ns, "dur_ns": dur_ns, **more}


def made_up_trace(
    path: Path,
    *,
    n_steps: int = 4,
    rows: int = 16,
    gemm_us: float = 400.0,
    relu_us: float = 100.0,
    extra_us: float = 0.0,
    gemm: str = "ampere_sgemm_128x64",
    gpu: str = "NVIDIA H100 80GB HBM3",
    noise: float = 0.0,
    start_us: float = 1000.0,
    seed: int = 0,
    **meta: Any,
) -> Path:
    """Steps of a product, a relu, an all-reduce that hides half of itself, and a copy; the host waits at the end."""
    rng, process = np.random.default_rng(seed), 100 + seed
    found, link, at = [], 0, start_us
    for number in range(n_steps):
        begin, device_free = at, at + 30
        jobs = [
            ("aten::mm", gemm, gemm_us, "kernel", [[rows, 512], [512, 1024]]),
            ("aten::relu", "vectorized_elementwise_kernel", relu_us, "kernel", None),
            ("aten::copy_", "Memcpy DtoH (Device -> Pinned)", 50.0, "gpu_memcpy", None),
        ]
        jobs += [("aten::contiguous", "direct_copy_kernel_cuda", extra_us, "kernel", None)] if extra_us else []
        for i, (op, name, mean_us, category, dims) in enumerate(jobs):
            link += 1
            us = mean_us * float(np.exp(rng.normal(0, noise)))
            called = begin + 10 + 20 * i
            args = {"Input Dims": dims, "Input type": ["float", "float"]} if dims else {}
            found.append(complete("cpu_op", op, called, 15, process, 1, **args))
            found.append(complete("cuda_runtime", "cudaLaunchKernel", called + 2, 10, process, 1, correlation=link))
            found.append(complete(category, name, device_free, us, 0, 7, correlation=link, device=0, stream=7))
            device_free += us
        found.append(
            complete("cuda_runtime", "cudaDeviceSynchronize", begin + 100, device_free - begin - 100, process, 1)
        )
        at = device_free + 20
        found.append(complete("user_annotation", f"ProfilerStep#{number}", begin, at - begin, process, 1))
    device = {"id": 0, "name": gpu, "totalGlobalMem": 85_000_000_000}
    document = {"schemaVersion": 1, "deviceProperties": [device], "record_shapes": 1, **meta, "traceEvents": found}
    return write_json(path, document)


def stretched(source: Path, path: Path, word: str, factor: float) -> Path:
    """A made-up trace: a real one in which time runs slower by a factor while kernels with a word in their name run."""
    opened = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    document = json.loads(opened)
    timed = [e for e in document["traceEvents"] if e.get("ph") == "X" and "dur" in e]
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in timed
                   if e.get("cat") in ("kernel", "cpu_op") and word in e["name"])  # fmt: skip
    assert spans, f"no event named {word}"
    starts, ends = [], []
    for start, end in spans:
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    edges = np.array([t for pair in zip(starts, ends, strict=True) for t in pair])
    more = (factor - 1) * np.cumsum(np.diff(edges, prepend=edges[0]) * (np.arange(len(edges)) % 2))

    def warped(t: float) -> float:
        return t + float(np.interp(t, edges, more))

    for e in timed:
        begin, end = warped(float(e["ts"])), warped(float(e["ts"]) + float(e["dur"]))
        e["ts"], e["dur"] = round(begin, 3), round(end - begin, 3)
    return write_json(path, document)


def check(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, words)])


def refused(*words: str | Path) -> str:
    """Why two sides are not comparable."""
    found = check(*words).exception
    assert isinstance(found, NotComparableError), found
    return str(found)


def checked(*words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(check(*words, "--json").stdout)
    return found


# Steps


def test_a_host_that_runs_ahead_is_judged_by_its_device() -> None:
    table = events(
        *(step(10 * i, 10, i) for i in range(3)),
        *(launch(10 * i + 1, link=i) for i in range(3)),
        *(kernel(5 + 100 * i, 100, link=i) for i in range(3)),
    )
    found = judged_steps(table)
    assert found.how == STEP
    assert found.windows.rows() == [(0, 105), (105, 100), (205, 100)]  # which sum to the wall time from 0 to 305


def test_what_was_launched_before_the_recording_is_of_the_step_before() -> None:
    """The device works off kernels 1 and 2 until 70; kernel 5 lost its call and is of the step."""
    earlier = (kernel(-10, 60, link=1), kernel(50, 20, link=2))
    table = events(step(0, 30), *earlier, launch(1, link=4), kernel(70, 40, link=4), kernel(90, 5, link=5))
    found = judged_steps(table)
    assert found.windows.rows() == [(70, 40)]
    assert found.of(found.middle)["link"].to_list() == [None, 4, 4, 5]
    assert sum(wall_parts(found).values()) == 40
    without = judged_steps(events(step(0, 30), *earlier, launch(1, link=4)))
    assert without.how == WINDOW  # nothing of the step lies after it


def test_the_first_step_of_a_real_trace_takes_as_long_as_those_after_it(shared: Path) -> None:
    """155 ms of it are work of the step before, with which the range of the first step and its work take 372."""
    trace = read_trace(shared / "traces" / "hta__negative_queue_length_values_check__rank0.json.gz")
    assert judged_steps(trace.events).dur_ns / 1e6 == pytest.approx([215] * 5, rel=0.02)


def test_a_host_that_waits_is_judged_by_its_ranges_and_time_between_ranges_is_in_none() -> None:
    first = (step(0, 50, 0), launch(1, link=0), kernel(5, 20, link=0))
    table = events(*first, step(80, 50, 1), launch(81, link=1), kernel(90, 9, link=1))
    assert judged_steps(table).windows.rows() == [(0, 50), (80, 50)]


def test_the_slowest_thread_with_steps_is_judged() -> None:
    table = events(*(step(i * 10, 10, i) for i in range(3)), *(step(i * 30, 30, i, process=2) for i in range(3)))
    found = judged_steps(table)
    assert found.n_threads == 2
    assert found.windows["dur_ns"].to_list() == [30, 30, 30]
    assert found.events["process"].unique().to_list() == [2]


def test_without_steps_the_span_of_the_device_is_one_window() -> None:
    table = events(launch(0, link=1), kernel(100, 30, link=1), kernel(150, 10))
    found = judged_steps(table)
    assert found.how == WINDOW
    assert found.windows.rows() == [(100, 60)]


def test_passes_are_judged_where_they_take_most_of_the_time() -> None:
    def layers(n: int) -> pl.DataFrame:
        ranges = [{"kind": "range", "name": "moe_layer", "start_ns": 100 * i, "dur_ns": 80} for i in range(n)]
        return events({"kind": "range", "name": "all", "start_ns": 0, "dur_ns": 100 * n}, *ranges)

    assert judged_steps(layers(4)).how == PASS
    assert judged_steps(layers(4)).windows.height == 4
    rare = pl.concat([layers(4), events({"kind": "op", "name": "aten::add", "start_ns": 2000, "dur_ns": 10})])
    assert judged_steps(rare).how == WINDOW


def test_a_trace_that_took_no_time_is_refused() -> None:
    with pytest.raises(InputError, match="took no time"):
        judged_steps(events(kernel(5, 0)))


# Parts


def test_parts_of_a_step_worked_out_by_hand() -> None:
    table = events(
        step(0, 100),
        launch(5, link=1, dur_ns=10),
        kernel(10, 20, link=1, name="ampere_sgemm"),  # compute from 10 to 30
        kernel(25, 15, name="vectorized_elementwise_kernel", stream=8),  # memory from 30 to 40
        kernel(35, 15, name="ncclDevKernel_AllReduce", stream=9),  # communication from 40 to 50
        {"kind": "copy", "start_ns": 45, "dur_ns": 15},  # exposed from 50 to 60
        {"kind": "set", "start_ns": 60, "dur_ns": 2},  # memory from 60 to 62
        launch(70, link=2, dur_ns=5),  # launch from 5 to 10 and from 70 to 75
    )
    assert wall_parts(judged_steps(table)) == {
        "compute": 20, "memory": 12, "communication": 10, "copy exposure": 10, "launch": 10, "host": 38
    }  # fmt: skip


def test_parts_of_a_step_without_a_device() -> None:
    table = events(
        step(0, 100),
        {"kind": "op", "name": "aten::linear", "start_ns": 0, "dur_ns": 30},
        {"kind": "op", "name": "aten::relu", "start_ns": 30, "dur_ns": 20},
        {"kind": "range", "name": "gloo:all_to_all", "start_ns": 45, "dur_ns": 25, "thread": 2},
    )
    assert wall_parts(judged_steps(table)) == {"compute": 30, "communication": 25, "memory": 15, "host": 30}


NAMES = ("ampere_sgemm", "vectorized_elementwise_kernel", "ncclDevKernel_AllReduce", "whatever", "flash_fwd")
WORK = st.tuples(st.sampled_from(("kernel", "copy", "set", "launch")), st.sampled_from(NAMES), st.integers(0, 60),
                 st.integers(1, 15), st.integers(0, 1))  # fmt: skip


def slow_parts(rows: list[dict[str, Any]], windows: list[tuple[int, int]]) -> dict[str, float]:
    """Every nanosecond of the only, or the middle, step looked at by itself."""
    length = {w: w[1] for w in windows}
    ordered = sorted(windows, key=lambda w: length[w])
    middle = ordered[len(ordered) // 3 : len(ordered) - len(ordered) // 3]
    found: dict[str, float] = {}
    for start, dur in middle:
        for t in range(start, start + dur):
            now = [r for r in rows if r["start_ns"] <= t < r["start_ns"] + r["dur_ns"]]
            kernels = [r["name"] for r in now if r["kind"] == "kernel"]
            computes = [n for n in kernels if "sgemm" in n or n in ("whatever", "flash_fwd")]
            part = (
                "compute" if computes
                else "memory" if "vectorized_elementwise_kernel" in kernels
                else "communication" if kernels
                else "copy exposure" if any(r["kind"] == "copy" for r in now)
                else "memory" if any(r["kind"] == "set" for r in now)
                else "launch" if any(r["kind"] == "launch" for r in now)
                else "host"
            )  # fmt: skip
            found[part] = found.get(part, 0) + 1
    total, median = sum(length[w] for w in middle), float(np.median([w[1] for w in windows]))
    return {part: n / total * median for part, n in found.items()}


@settings(max_examples=50)
@given(st.lists(WORK, min_size=1, max_size=12), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_parts_sum_to_the_median_step_and_agree_with_a_look_at_every_nanosecond(work: list, ranges: list) -> None:
    rows, at = [], 0
    for number, dur in enumerate(ranges):
        rows.append(step(at, dur, number))
        at += dur
    for kind, name, start, dur, device in work:
        place = {"device": device, "stream": 7} if kind != "launch" else {}
        rows.append(
            {"kind": kind, "name": name if kind == "kernel" else kind, "start_ns": start, "dur_ns": dur, **place}
        )
    rows.append(kernel(0, 1, name="whatever"))
    steps = judged_steps(events(*rows))
    found = wall_parts(steps)
    assert set(found) <= set(PARTS)
    assert sum(found.values()) == pytest.approx(np.median(steps.dur_ns))
    slow = slow_parts(rows, steps.windows.rows())
    expected = {part: slow.get(part, 0.0) for part in found}
    assert found == pytest.approx(expected)


KINDS = st.sampled_from(("op", "range", "launch", "sync", "kernel", "kernel", "copy", "set", "replay"))
NAMED = st.sampled_from(("aten::mm", "ProfilerStep#1", "ProfilerStep#2", "train", "moe_layer", "ncclDevKernel", "x|y"))
INPUTS = st.sampled_from((None, "garbage", "[[],[]]", '[[[16,512],[512,8]],["float","float"]]'))
ANY_EVENT = st.tuples(
    KINDS, NAMED, st.integers(0, 200), st.integers(0, 90), st.integers(0, 3), st.integers(1, 2), INPUTS
)


@settings(max_examples=60)
@given(st.lists(ANY_EVENT, min_size=1, max_size=25))
def test_whatever_a_trace_holds_its_parts_sum_and_its_steps_do_not_overlap(found: list) -> None:
    rows = []
    for kind, name, start, dur, link, place, inputs in found:
        on_device = kind in ("kernel", "copy", "set", "replay")
        where = {"device": place, "process": None} if on_device else {"process": place, "thread": 1}
        of_op = {"inputs": inputs} if kind == "op" else {}
        rows.append({"kind": kind, "name": name, "start_ns": start, "dur_ns": dur, "link": link, **where, **of_op})
    trace = Trace(events(*rows), "kineto", len(rows))
    try:
        steps = judged_steps(trace.events)
    except InputError as error:
        assert "took no time" in str(error)
        return
    details = details_of(trace, steps)
    parts = [one.run_ns[0] for one in details.values() if one.facts["kind"] == "part"]
    assert sum(parts) == pytest.approx(np.median(steps.dur_ns))
    assert min(parts) >= 0
    ends = steps.windows.select(pl.col("start_ns") + pl.col("dur_ns")).to_series()
    assert (steps.windows["start_ns"][1:] >= ends[:-1]).all()


# A single trace a side


def test_a_trace_beside_itself_is_no_regression_and_nothing_changed(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    found = check(a, a, "--json")
    assert found.exit_code == 0
    page = json.loads(found.stdout)
    assert page["verdicts"][0]["ratio"] == 1
    assert {part["change_frac"] for part in page["parts"]} == {0}
    assert sum(part["share_frac"] for part in page["parts"]) == pytest.approx(1)
    assert any("nothing slower is firmer than suspect" in note for note in page["notes"])


def test_one_slower_operator_is_suspect_and_named_with_its_part(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    b = made_up_trace(tmp_path / "b.json", gemm_us=700)
    assert check(a, b).exit_code == 1
    page = checked(a, b)
    overall = page["verdicts"][0]
    assert (overall["verdict"], overall["part"]) == ("suspect", "compute")
    # A step is 30 us until the first kernel, 400 + 100 + 50 of device work, and 20 until the next.
    assert overall["ratio"] == pytest.approx(900 / 600)
    first = page["details"][0]
    assert (first["kind"], first["name"]) == ("operator", "aten::mm 16x512x1024")
    assert (first["baseline"], first["candidate"], first["change_frac"]) == (400_000, 700_000, pytest.approx(0.5))
    assert sum(part["change_frac"] for part in page["parts"]) == pytest.approx(0.5)
    parts = {part["part"]: part for part in page["parts"]}
    assert parts["compute"]["factor"] == pytest.approx(700 / 400)
    assert parts["compute"]["factor_low"] is None
    words = check(a, b).stdout
    assert "step: 600 µs to 900 µs (+300 µs)" in words
    assert "compute +300 µs (gemm 400 µs to 700 µs)" in words


def test_without_a_device_parts_rest_on_the_operators_that_moved_most(tmp_path: Path) -> None:
    def recorded(name: str, mul_us: float) -> Path:
        found, at = [], 0.0
        for number in range(4):
            begin = at
            for op, us in (("aten::mm", 400.0), ("aten::mul", mul_us), ("aten::add", 50.0)):
                found.append(complete("cpu_op", op, at, us, 9, 1))
                at += us
            found.append(complete("user_annotation", f"ProfilerStep#{number}", begin, at - begin, 9, 1))
        return write_json(tmp_path / name, {"traceEvents": found})

    page = checked(recorded("a.json", 100), recorded("b.json", 400))
    parts = {one["part"]: one for one in page["parts"]}
    assert parts["memory"]["evidence"] == "aten::mul 100 µs to 400 µs"
    assert parts["compute"]["change_frac"] == 0
    assert page["verdicts"][0]["part"] == "memory"


def test_what_moved_stands_in_markdown_and_junit(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    b = made_up_trace(tmp_path / "b.json", gemm_us=700)
    check(a, b, "--junit", tmp_path / "c.xml", "--markdown", tmp_path / "c.md", "--html", tmp_path / "c.html")
    assert "aten::mm 16x512x1024" in (tmp_path / "c.html").read_text()
    page = (tmp_path / "c.md").read_text()
    assert "`aten::mm 16x512x1024` | 400 µs | 700 µs | +300 µs" in page
    failure = ET.parse(tmp_path / "c.xml").getroot().find(".//failure")
    assert failure is not None
    assert "compute +300 µs" in str(failure.text)


def test_an_added_operator_is_a_change_and_no_other_work(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    b = made_up_trace(tmp_path / "b.json", extra_us=200)
    page = checked(a, b)
    assert page["verdicts"][0]["verdict"] == "suspect"
    assert page["verdicts"][0]["part"] == "memory"
    assert page["details"][0]["name"] == "aten::contiguous"
    assert page["details"][0]["baseline"] is None


def test_versions_that_a_program_noted_at_any_depth_are_facts(tmp_path: Path) -> None:
    def noted(torch: str, name: str, **more: Any) -> Path:
        env = {"torch_version": torch, "nvidia_driver_version": "575.51.03", "cuda_module_loading": "N/A"}
        return made_up_trace(tmp_path / name, metadata={"system": {"torch_env_info": env}}, **more)

    a = noted("2.6.0+cu124", "a.json")
    facts = evidence(a).fingerprint
    assert (facts["software.torch"], facts["machine.driver"]) == ("2.6.0+cu124", "575.51.03")
    assert "software.torch: '2.6.0+cu124' against '2.7.0'" in refused(a, noted("2.7.0", "b.json"))
    assert "software.torch" not in evidence(noted("N/A", "none.json")).fingerprint
    assert "software.torch" not in evidence(noted("2.6.0", "two.json", torch_version="2.7.0")).fingerprint


def test_models_and_ceilings_are_refused_for_traces(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    with pytest.raises(InputError, match="leave out --model and --hardware"):
        compare(evidence(a), evidence(a), datasheet=hardware("h100-sxm"))


# The gate


def test_another_batch_or_model_is_not_comparable_and_what_differs_is_named(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    found = refused(a, made_up_trace(tmp_path / "b.json", rows=32))
    assert "aten::mm 16x512x1024: 16,777,216 FLOP on the baseline and 33,554,432 FLOP on the candidate" in found
    assert "50.0 %" in found


def test_a_longer_recording_of_the_same_work_is_no_slower_one(tmp_path: Path) -> None:
    """Of traces without steps and shapes; a kernel more of one kind is a change, a quarter more of all is not."""
    kinds = {"attention": ("flash_fwd", 60), "gemm": ("sm90_gemm", 30), "copy": ("direct_copy_kernel", 20)}

    def recorded(n: int, name: str, n_more: int = 0) -> Path:
        each = [kinds[kind] for kind in kinds for _ in range(n)] + [kinds["copy"]] * n_more
        ends = np.cumsum([us for _, us in each])
        found = [complete("kernel", kernel_name, float(end - us), us, 0, 7, device=0, stream=7)
                 for (kernel_name, us), end in zip(each, ends, strict=True)]  # fmt: skip
        return write_json(tmp_path / name, {"traceEvents": found})

    a = recorded(40, "a.json")
    assert "1.25 times as many" in refused(a, recorded(50, "longer.json"))
    assert "0.80 times as many" in refused(tmp_path / "longer.json", a)
    assert check(a, recorded(40, "more.json", n_more=10)).exit_code == 0


def test_gradients_of_experts_weights_are_the_same_work_however_tokens_are_routed(tmp_path: Path) -> None:
    """Of the gradient of an expert's weights the rows are the inner size: 64 x rows by rows x 32."""

    def trained(name: str, *rows: int, width: int = 64) -> Path:
        found, at = [], 0.0
        for number in range(3):
            begin = at
            for n in rows:
                for dims in ([[n, width], [width, 32]], [[width, n], [n, 32]]):
                    args = {"Input Dims": dims, "Input type": ["float", "float"]}
                    found.append(complete("cpu_op", "aten::mm", at, 100, 9, 1, **args))
                    at += 100
            found.append(complete("user_annotation", f"ProfilerStep#{number}", begin, at - begin, 9, 1))
        return write_json(tmp_path / name, {"traceEvents": found})

    a = trained("a.json", 10, 22)
    assert not any("FLOPs" in note for note in checked(a, trained("b.json", 16, 16))["notes"])
    assert "only 50.0 % of the FLOPs" in refused(a, trained("twice.json", 20, 44))
    assert "only 49" in refused(a, trained("wide.json", 10, 22, width=65))


def test_other_kernels_for_the_same_operators_are_comparable(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    b = made_up_trace(tmp_path / "b.json", gemm="nvjet_whatever_tst")
    assert check(a, b).exit_code == 0


def test_other_operators_for_the_same_products_are_comparable(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    document = json.loads(a.read_text())
    for event in document["traceEvents"]:
        if event["name"] == "aten::mm":  # fp8 with scales, say
            event |= {"name": "aten::_scaled_mm", "args": {**event["args"], "Input type": ["c10::Float8_e4m3fn"] * 2}}
    b = write_json(tmp_path / "b.json", document)
    assert "settings.dtype: 'fp32' against 'fp8'" in refused(a, b)
    assert check(a, b, "--axis", "settings.dtype").exit_code == 0


def test_another_gpu_must_be_declared(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    b = made_up_trace(tmp_path / "b.json", gpu="NVIDIA B200")
    found = refused(a, b)
    assert "machine.gpu_name: 'NVIDIA H100 80GB HBM3' against 'NVIDIA B200'" in found
    assert check(a, b, "--axis", "hardware").exit_code == 0


def test_a_profiler_that_keeps_stacks_is_another_setting(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    b = made_up_trace(tmp_path / "b.json", with_stack=1)
    found = refused(a, b)
    assert "settings.with_stack: False against True" in found


def test_traces_with_steps_and_without_are_not_comparable(tmp_path: Path) -> None:
    a = made_up_trace(tmp_path / "a.json")
    document = json.loads(a.read_text())
    document["traceEvents"] = [e for e in document["traceEvents"] if e["cat"] != "user_annotation"]
    found = refused(a, write_json(tmp_path / "b.json", document))
    assert "'a.json' by its step and 'b.json' by its whole trace" in found


def test_without_shapes_a_trace_says_what_it_cannot_tell(tmp_path: Path) -> None:
    document = json.loads(made_up_trace(tmp_path / "a.json").read_text())
    for event in document["traceEvents"]:
        event["args"].pop("Input Dims", None)
    side = evidence(write_json(tmp_path / "b.json", document))
    assert any("record_shapes" in note for note in compare(side, side).notes)


def test_graphs_hide_operators_so_that_classes_of_kernels_are_compared(tmp_path: Path) -> None:
    def replayed(name: str, n_kernels: int, kernel_name: str = "ampere_sgemm") -> Evidence:
        step_ = complete("user_annotation", "ProfilerStep#1", 0, 1000, 1, 1)
        call = complete("cuda_runtime", "cudaGraphLaunch", 10, 5, 1, 1, correlation=1)
        work = [
            complete("kernel", kernel_name, 20 + 10 * i, 9, 0, 7, correlation=1, device=0, stream=7)
            for i in range(n_kernels)
        ]
        return evidence(write_json(tmp_path / name, {"traceEvents": [step_, call, *work]}))

    few, other, many = replayed("few.json", 10), replayed("other.json", 10, "nvjet_tst"), replayed("many.json", 20)
    assert any("kernels of each class alone" in note for note in compare(few, other).notes)
    with pytest.raises(NotComparableError, match="gemm: 10 in a step of the baseline, 20 of the candidate"):
        compare(few, many)


def test_two_kinds_of_profilers_differ_in_a_setting(tmp_path: Path) -> None:
    kineto = made_up_trace(tmp_path / "a.json")
    rows = [(i * 1000, i * 1000 + 900, 0, 7, i, pid(1), 1, 1) for i in range(9)]
    nsys = write_nsys(tmp_path / "b.sqlite", {"KERNEL": rows, "StringIds": [(1, "ampere_sgemm")]})
    side = evidence(nsys)
    assert side.fingerprint["settings.profiler"] == "nsys"
    assert compare(side, side).details
    assert "whole trace" in refused(kineto, nsys)


# Folders


def folder_of(path: Path, n_runs: int = 5, seed: int = 0, **options: Any) -> Path:
    path.mkdir()
    for run in range(n_runs):
        made_up_trace(path / f"run-{run}.json", seed=seed + run, noise=0.01, start_us=1000 + 37 * run, **options)
    return path


def test_several_traces_a_side_can_tell_a_regression_and_pass_what_is_as_fast(tmp_path: Path) -> None:
    a, same = folder_of(tmp_path / "a"), folder_of(tmp_path / "same", seed=100)
    slow = folder_of(tmp_path / "slow", seed=200, gemm_us=500)
    assert checked(a, same)["verdicts"][0]["verdict"] == "ok"
    page = checked(a, slow)
    assert page["verdicts"][0]["verdict"] == "regressed"
    assert page["verdicts"][0]["part"] == "compute"
    compute = next(part for part in page["parts"] if part["part"] == "compute")
    assert compute["factor_low"] < 500 / 400 < compute["factor_high"]
    assert sum(part["change_frac"] for part in page["parts"]) == pytest.approx(
        next(one["change_frac"] for one in page["details"] if one["name"] == "step_ns")
    )
    assert page["notes"] == []


def test_single_traces_saved_on_three_occasions_are_three_runs_and_no_single_one(tmp_path: Path) -> None:
    def save(seed: int, *words: str) -> None:
        trace = made_up_trace(tmp_path / f"{seed}.json", seed=seed, noise=0.01, start_us=1000 + 37 * seed)
        found = CliRunner().invoke(app, ["baseline", "save", str(trace), *words])
        assert found.exit_code == 0, found.exception

    words, candidate = ["--store", str(tmp_path / "store")], folder_of(tmp_path / "new", seed=100)
    save(0, *words)
    assert any("a side has a single run" in note for note in checked(tmp_path / "store", candidate)["notes"])
    save(1, "--add", *words)
    save(2, "--add", *words)
    page = checked(tmp_path / "store", candidate)
    assert page["verdicts"][0]["n_runs_baseline"] == 3
    assert not any("single" in note for note in page["notes"])


def test_a_copy_of_a_trace_is_no_second_run(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        made_up_trace(tmp_path / name)
    with pytest.raises(InputError, match=r"a\.json and b\.json hold the same recording"):
        evidence(tmp_path)


def test_cycles_of_one_process_are_told_to_be_no_fresh_runs(tmp_path: Path) -> None:
    for cycle in range(3):
        made_up_trace(tmp_path / f"{cycle}.json", start_us=1000 * cycle)
    assert any("3 traces are of processes with one number (100)" in note for note in evidence(tmp_path).notes)


def test_ranks_of_one_job_are_one_run_judged_by_the_slowest(tmp_path: Path) -> None:
    for rank in range(3):
        job = {"rank": rank, "world_size": 3}
        made_up_trace(tmp_path / f"rank-{rank}.json", distributedInfo=job, relu_us=100 + 50 * (rank == 1))
    side = evidence(tmp_path)
    assert len(side.runs) == 1
    assert side.workloads["step"].run_ns == {0: 650_000}
    assert side.fingerprint["settings.world_size"] == 3
    assert any("rank 1 (rank-1.json)" in note for note in side.notes)


def test_names_say_ranks_where_files_do_not_and_missing_ranks_are_told(tmp_path: Path) -> None:
    for rank in range(2):
        made_up_trace(tmp_path / f"rank{rank}.json", relu_us=100 + rank)
    assert len(evidence(tmp_path).runs) == 1
    for rank in range(2):
        made_up_trace(
            tmp_path / f"rank{rank}.json", distributedInfo={"rank": rank, "world_size": 8}, relu_us=100 + rank
        )
    assert any("only 2 of 8 ranks" in note for note in evidence(tmp_path).notes)


def test_subfolders_with_all_ranks_are_runs(tmp_path: Path) -> None:
    for run in range(2):
        (tmp_path / f"run-{run}").mkdir()
        for rank in range(2):
            made_up_trace(
                tmp_path / f"run-{run}" / f"rank-{rank}.json",
                distributedInfo={"rank": rank, "world_size": 2},
                relu_us=100 + 50 * rank + run,
                start_us=1000 + run,
            )
    assert evidence(tmp_path).workloads["step"].run_ns == {0: 650_000, 1: 651_000}
    made_up_trace(tmp_path / "run-1" / "more.json", distributedInfo={"rank": 1, "world_size": 2}, relu_us=1)
    with pytest.raises(InputError, match="no whole runs"):
        evidence(tmp_path)


def test_a_folder_of_different_work_is_no_side(tmp_path: Path) -> None:
    made_up_trace(tmp_path / "a.json")
    made_up_trace(tmp_path / "b.json", rows=32, start_us=2000)
    with pytest.raises(NotComparableError, match="no repeats of each other"):
        evidence(tmp_path)


def test_a_file_that_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", n_runs=2)
    (folder / "broken.json").write_text("[")
    side = evidence(folder)
    assert len(side.runs) == 2
    assert any("broken.json is left out" in note for note in side.notes)


# The spread of steps


def test_the_error_of_a_median_is_null_for_few_steps_repeatable_and_larger_where_steps_drift() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.02, 200)
    steps = np.exp(noise) * 1e6
    assert log_se_of_median(steps[:2]) is None
    assert log_se_of_median(steps) == log_se_of_median(steps)
    alone = stats.bootstrap((noise,), np.median, n_resamples=2000, method="percentile", rng=rng).standard_error
    assert log_se_of_median(steps) == pytest.approx(alone, rel=0.3)
    drifting = np.exp(np.convolve(rng.normal(0, 0.02, 209), np.ones(10) / np.sqrt(10), "valid")) * 1e6
    assert log_se_of_median(drifting) > 1.3 * log_se_of_median(np.random.default_rng(2).permutation(drifting))


def test_steps_that_scatter_widen_the_answer_of_single_traces(tmp_path: Path) -> None:
    calm, noisy = (made_up_trace(tmp_path / f"{noise}.json", n_steps=9, noise=noise) for noise in (0.0, 0.5))
    widths = [
        verdict["ratio_high"] / verdict["ratio_low"]
        for verdict in (checked(one, one)["verdicts"][1] for one in (calm, noisy))
    ]
    assert widths[0] == pytest.approx(np.exp(2 * 1.6449 * 0.05 * np.sqrt(2)), rel=1e-3)  # as assumed
    assert widths[1] > 1.1 * widths[0]


# Real traces


@pytest.mark.parametrize(
    "name",
    [
        QWEN,
        V100,
        "hta__cpu_only__rank-34.Jul_15_10_52_41.1074.pt.trace.json.gz",
        "nsysai__mfu_2gpu_before.sqlite",
        "nsysai__healthy_1pct.sqlite",
        "tracelens__sglang_decode__sglang_Qwen3-8B_decode.json.gz",
        "tracelens__vllm_decode_full__graph_execution.json.gz",
        "tracelens__gpu_only_trace__gpu_only_trace.json.gz",
    ],
)
def test_a_real_trace_beside_itself_is_no_regression(shared: Path, name: str) -> None:
    side = evidence(shared / "traces" / name)
    found = compare(side, side)
    assert found.overall.verdict.ratio == 1
    assert found.exit_code() == 0
    assert sum(part.share_frac for part in found.parts) == pytest.approx(1)
    assert name.startswith("nsysai__healthy") or found.details


def test_a_real_trace_with_one_class_of_kernels_slowed_down(shared: Path, tmp_path: Path) -> None:
    real = shared / "traces" / QWEN
    slow = stretched(real, tmp_path / "made_up_slow.json", "flash_fwd", 10.0)
    found = compare(evidence(real), evidence(slow))
    assert found.overall.verdict.verdict == "suspect"
    assert found.overall.part == "compute"
    assert "flash_attention" in found.details[0].name


def test_another_model_on_the_same_gpu_is_not_comparable(shared: Path) -> None:
    traces = shared / "traces"
    found = refused(traces / QWEN, traces / "tracelens__h100__gaunernst_bert-small-uncased__1016001.json.gz")
    assert "aten::" in found


def test_the_same_model_on_another_gpu_is_comparable_where_that_is_declared(shared: Path) -> None:
    traces = shared / "traces"
    words = (traces / QWEN, traces / QWEN.replace("h100", "mi300"))
    assert "machine.driver_api" in refused(*words)
    assert check(*words, "--axis", "hardware", "--axis", "software", "--fail-on", "none").exit_code == 0


def test_profiles_of_shipped_captures_can_be_compared() -> None:
    profiles = ROOT / "traces" / "epyc-zen5-2c-fp32" / "profiles"
    a = profiles / "moe_layer-olmoe-4-16-power-law-1.2.trace.json.gz"
    side = evidence(a)
    assert side.workloads.keys() == {STEP}
    assert compare(side, side).exit_code() == 0
    assert "FLOPs" in refused(a, profiles / "moe_layer-olmoe-4-64-power-law-1.2.trace.json.gz")
    with pytest.raises(NotComparableError, match="no repeats"):
        evidence(profiles)  # each is of another workload
