"""The Trace view: every part shows the numbers of the library, of the example, of GPU traces and of hostile ones."""

import gzip
import importlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perfmodel.analysis import analyse
from perfmodel.cli.main import app
from perfmodel.readers import read_trace
from tests.app_pages import figure, numbers, on_path, opened, ran, shown, titles
from tests.conftest import ROOT
from tests.traces_made import complete

PARTS = (
    *("Summary", "Timeline", "Launches", "Kernels", "Fusion", "Copies", "Ranks and layers", "Compare"),
    "Batch sizes",
)
HOSTILE = "![x](http://attacker.invalid/x.png) <b>gemm<bf16></b>"


def gpu_trace(folder: Path, name: str, scale: int = 1) -> Path:
    """A made-up trace of two steps with ten launches each, queued behind kernels that last `scale` times as long."""
    rows = []
    for step in range(2):
        rows.append(complete("user_annotation", f"ProfilerStep#{step}", 1000 * step, 900))
        for i in range(10):
            link, at = 100 * step + i, 1000 * step + 20 * i
            rows.append(complete("cpu_op", "aten::mm", at, 15))
            rows.append(complete("cuda_runtime", "cudaLaunchKernel", at + 5, 8, correlation=link))
            where = {"device": 0, "stream": 7, "correlation": link}
            start = 1000 * step + 20 + 20 * scale * i
            rows.append(complete("kernel", HOSTILE if i % 2 else "softmax_fwd", start, 18 * scale, 0, 7, **where))
    path = folder / name
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": rows}).encode()))
    return path


@pytest.fixture
def load(monkeypatch):
    """Put traces in the place of those that a session has open."""

    def loaded(*paths: Path) -> list:
        with on_path():
            uploads = importlib.import_module("uploads")
        found = [uploads.Loaded(path.name, f"digest {path}", analyse(read_trace(path))) for path in paths]
        monkeypatch.setattr(uploads, "choose", lambda key: found)
        return found

    return loaded


@pytest.mark.parametrize("part", PARTS)
def test_every_part_opens_with_the_example_from_its_link(part: str) -> None:
    test = opened("trace", part=part)
    assert titles(test) or test.info  # a CPU has no launches, which is said
    assert "perfmodel " in shown(test) or test.info


def test_the_example_shows_who_waits_and_what_a_pass_costs() -> None:
    test = opened("trace")
    assert numbers(test)["Ranks"] == "2"
    assert numbers(test)["Median MoE layer pass"].endswith(" ms")
    assert "The others wait for rank" in shown(test)
    assert any("example" in caption.value for caption in test.caption)


def test_without_a_trace_the_view_says_how_to_open_one(load) -> None:
    load()
    test = opened("trace")
    assert "Upload one" in test.info[0].value and not test.metric


def test_a_trace_of_a_gpu_shows_coverage_findings_and_the_numbers_of_the_library(load, tmp_path: Path) -> None:
    one = load(gpu_trace(tmp_path, "one.json.gz"))[0]
    test = opened("trace")
    assert "20 kernels, 20 joined to their launch (100.0 %), 0 orphans, 0 graph" in shown(test)
    assert one.analysis.findings[0].words[1:40] in shown(test).replace("\n   ", " ")
    assert numbers(test)["TKLQT"] == "300 µs"  # each kernel begins 15 us after its call
    assert numbers(test)["Average kernel"] == "18.0 µs"
    assert titles(test) == ["Where device time goes", "Kernel time by class"]


def test_the_timeline_shows_the_step_and_the_part_of_it_that_a_link_names(load, tmp_path: Path) -> None:
    load(gpu_trace(tmp_path, "one.json.gz"))
    whole = opened("trace", part="Timeline", step="0")
    assert titles(whole) == ["ProfilerStep#0 (900 µs)"]
    kernels = [bar for bar in figure(whole, 0)["data"] if bar["name"] == "gemm"]
    assert len(kernels[0]["hovertext"]) == 5
    assert all("&lt;b&gt;gemm&lt;bf16&gt;" in words for words in kernels[0]["hovertext"])
    test = opened("trace", part="Timeline", whole="true")
    assert titles(test) == ["The whole trace"]
    assert sum(len(bar["hovertext"]) for bar in figure(test, 0)["data"] if bar["name"] == "gemm") == 10


def test_choosing_a_grouping_computes_it_anew(load, tmp_path: Path) -> None:
    load(gpu_trace(tmp_path, "one.json.gz"))
    test = opened("trace", part="Launches")
    assert titles(test)[0] == "TKLQT by stream"
    test.selectbox(key="by").set_value("step")
    ran(test)
    assert titles(test)[0] == "TKLQT by step"
    assert [row.count("ProfilerStep#") for row in figure(test, 0)["data"][0]["hovertext"]] == [1, 1]


def test_two_traces_are_compared_and_make_a_sweep_once_their_batch_sizes_are_known(load, tmp_path: Path) -> None:
    load(gpu_trace(tmp_path, "bert-b1.json.gz"), gpu_trace(tmp_path, "bert-b8.json.gz", scale=3))
    test = opened("trace", part="Compare")
    assert titles(test) == ["Kernel classes: b minus a, per step", "Operators, kernel time: b minus a, per step"]
    test = opened("trace", part="Batch sizes")
    assert titles(test) == ["TKLQT against batch size: device-bound from batch 8 on"]
    assert "perfmodel sweep 1=bert-b1.json.gz 8=bert-b8.json.gz" in shown(test)


def test_a_trace_without_events_says_so(load, tmp_path: Path) -> None:
    one = load(gpu_trace(tmp_path, "one.json.gz"))
    trace = one[0].analysis.trace
    one[0] = replace(one[0], analysis=analyse(replace(trace, events=trace.events.clear())), digest="empty")
    for part in PARTS:
        opened("trace", part=part)
    assert opened("trace", part="Timeline").info[0].value == "This trace has no events, so there is nothing to draw."


@pytest.mark.parametrize(
    "name",
    [
        "tracelens__vllm_decode_full__graph_execution.json.gz",
        "hta__amd_trace__mi250_minitoy_train_ROCm6_2_kineto.json.gz",
    ],
)
def test_every_part_opens_with_real_traces(load, shared, name: str) -> None:
    one = load(shared / "traces" / name)[0]
    for part in PARTS:
        test = opened("trace", part=part)
        assert titles(test) or test.info or "found no MoE layer pass" in shown(test)
    assert one.analysis.metrics.n_kernels


@pytest.mark.browser
def test_parts_change_in_the_browser_without_sideways_scrolling_and_their_link_opens_them_again(page, server) -> None:
    page.goto(f"{server}/trace")
    page.get_by_text("Host time by operator, without what it calls").first.wait_for(timeout=60_000)
    page.get_by_role("radio", name="Timeline").or_(page.get_by_role("button", name="Timeline")).first.click()
    page.get_by_text("time since the window began").wait_for(timeout=30_000)
    assert "part=Timeline" in page.url
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.goto(page.url)
    page.get_by_text("time since the window began").wait_for(timeout=60_000)
    assert page.get_by_test_id("stException").count() == 0


@pytest.mark.parametrize("part", ["Summary", "Batch sizes"])
def test_the_command_shown_of_a_folder_of_ranks_and_of_a_published_sweep_says_the_same(monkeypatch, part: str) -> None:
    monkeypatch.chdir(ROOT)
    command, page = (code.value for code in opened("trace", part=part).code[:2])
    done = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert done.exit_code == 0
    lines = [" ".join(line.split()) for line in page.splitlines()[1:]]  # the first may be broken
    assert set(lines) <= {" ".join(line.split()) for line in done.stdout.splitlines()}
