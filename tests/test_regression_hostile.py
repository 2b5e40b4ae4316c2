"""Regression checks of strangers' captures and baselines: their names, what they leave out, what they claim."""

import gzip
import json
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import Result
from typer.testing import CliRunner

from perfmodel import regression, report, text
from perfmodel.capture import load_capture
from perfmodel.cli.main import app
from perfmodel.ep_capture import shipped_ep_captures
from perfmodel.errors import InputError, NotComparableError
from perfmodel.readers.limits import Limits
from perfmodel.regression import Comparison, Evidence, against, of_capture, saved
from perfmodel.regression.changes import profiled
from perfmodel.regression.changes.alone import what_they_share
from perfmodel.regression.saved.lookup import name_of
from perfmodel.regression.spread import alternate
from tests.captures_made import SHAPES, write_synthetic_capture
from tests.test_regression_traces import made_up_trace

NAME = "\n::error::x\r\u2028##[error]y ##vso[task.setvariable]z ##teamcity[a]\x1b[31m\u202e</summary>|`<img src=x>"


def edited(folder: Path, file: str, edit: Callable[[Any], Any]) -> Path:
    """A capture with one of its files changed, line by line where it has lines."""
    lines = (folder / file).read_text().splitlines() if file.endswith("l") else [(folder / file).read_text()]
    (folder / file).write_text("".join(json.dumps(edit(json.loads(line))) + "\n" for line in lines))
    return folder


def capture(path: Path, factor: float = 1.0) -> Path:
    """A made-up capture of one shape, `factor` times as slow as others."""
    return write_synthetic_capture(path, 3, lambda: factor, shapes=SHAPES[:1])


def side(path: Path) -> Evidence:
    return of_capture(load_capture(path))


def run(*words: object) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


# Names


@pytest.fixture
def renamed(tmp_path: Path) -> Comparison:
    """A comparison in which all that can be called something has a hostile name."""
    found = regression.compare(side(capture(tmp_path / "a")), side(capture(tmp_path / "b", 1.5)), with_model=False)
    cases = tuple(replace(case, verdict=replace(case.verdict, label=NAME)) for case in found.cases)
    return replace(
        found, baseline=NAME, candidate=NAME, cases=cases, model=NAME, no_model=NAME, notes=(NAME,), findings=(NAME,),
        lost=(replace(side(tmp_path / "a").workloads[cases[1].verdict.workload], label=NAME),),
        changes=(regression.Change(NAME, NAME, {NAME: NAME}, is_declared=True),),
        details=(
            regression.Detail("metric", "step_ns", 1e6, 2e6, 2.0, 1.0),
            regression.Detail("operator", NAME, 1e6, 2e6, 2.0, 1.0),
        ),
    )  # fmt: skip


def commands_in(log: str) -> list[str]:
    """What build servers would take for commands to them, as they look for them."""
    lines = [line.strip() for line in re.split(r"[\n\r\x0b\x0c\x85\u2028\u2029]", log)]
    return [line for line in lines if line.startswith("::") or "##[" in line or re.search(r"##\w+\[", line)]


def test_no_name_is_a_command_to_a_build_server_or_a_terminal(renamed: Comparison) -> None:
    page = text.for_logs(report.check_page(renamed))
    assert "error" in page and not commands_in(page)
    assert page.replace("\n", "").isprintable()
    assert not commands_in(text.for_logs(f"  ::error::\n\t::x\n{NAME}"))
    assert text.for_logs("a::b\tµ ## head\n1.00x") == "a::b\tµ ## head\n1.00x"


def test_json_in_a_log_is_no_command_either_and_says_the_same(tmp_path: Path) -> None:
    folder = edited(capture(tmp_path / "a"), "workloads.jsonl", lambda line: line | {"routing": NAME})
    done = run("check", folder, folder, "--model", "none", "--json")
    assert done.exit_code == 0 and not commands_in(done.stdout)
    assert json.loads(done.stdout)["verdicts"][1]["label"].endswith(NAME)


def test_no_name_breaks_markdown_or_junit(renamed: Comparison) -> None:
    page = report.check_markdown(renamed, [])
    outside = re.sub(r"`[^`\n]*`", "", page)
    assert "<img" not in outside and not any(line.strip().startswith("::") for line in outside.splitlines())
    assert outside.count("<details>") == outside.count("</details>") == outside.count("</summary>") == 2
    names = [case.attrib["name"] for case in ET.fromstring(report.check_junit(renamed, [])).iter("testcase")]
    assert len(names) == len(renamed.cases) + 1


# What is left out or claimed


def test_captures_that_tell_nothing_of_machine_or_software_are_not_comparable(tmp_path: Path) -> None:
    a, b = capture(tmp_path / "a"), capture(tmp_path / "b", 1.5)
    for group in ("machine", "software"):
        silent = edited(capture(tmp_path / group, 1.5), "capture.json", lambda one, key=group: one | {key: {}})
        for pair in ((a, silent), (silent, b)):
            with pytest.raises(NotComparableError, match=rf"{group}\.\*: '\d facts?' against '\d facts?'"):
                regression.check(*map(side, pair))
        assert regression.check(side(a), side(silent), axes=[group])[0].verdict == "regressed"


def test_facts_that_one_side_alone_tells_are_named(tmp_path: Path) -> None:
    told = edited(
        capture(tmp_path / "a"), "capture.json", lambda one: one | {"machine": {**one["machine"], "hypervisor": True}}
    )
    found = regression.compare(side(told), side(capture(tmp_path / "b")), with_model=False)
    assert "1 fact of the baseline alone, which could not be compared: machine.hypervisor" in found.notes
    declared = regression.compare(side(told), side(tmp_path / "b"), axes=["machine"], with_model=False)
    assert not any("could not be compared" in note for note in declared.notes)


def test_other_work_under_the_same_id_is_not_comparable(tmp_path: Path) -> None:
    """A candidate that computes less under the ids of the baseline would be an improvement."""
    a = capture(tmp_path / "a")
    b = edited(capture(tmp_path / "b", 0.5), "workloads.jsonl", lambda line: line | {"hidden": 256})
    with pytest.raises(NotComparableError, match="not the same work on both sides: hidden is 512 in the baseline, 256"):
        regression.check(side(a), side(b))
    study = edited(capture(tmp_path / "c"), "workloads.jsonl", lambda line: line | {"study": "other"})
    assert regression.check(side(a), side(study))[0].verdict == "ok"


def test_a_workload_that_is_planned_twice_differently_is_refused(tmp_path: Path) -> None:
    folder = capture(tmp_path / "a")
    first, *_ = lines = (folder / "workloads.jsonl").read_text().splitlines()
    (folder / "workloads.jsonl").write_text("\n".join([*lines, first]) + "\n")
    load_capture(folder)  # the same twice says the same
    (folder / "workloads.jsonl").write_text("\n".join([*lines, json.dumps(json.loads(first) | {"inter": 1})]) + "\n")
    with pytest.raises(InputError, match=rf"plans workload {json.loads(first)['workload']} twice, differently"):
        load_capture(folder)


def test_names_of_any_length_give_a_short_sentence(tmp_path: Path) -> None:
    long = edited(
        capture(tmp_path / "a"),
        "capture.json",
        lambda one: one | {"machine": {"cpu_model": "x" * 100_000}, "kernel": "y" * 100_000},
    )
    done = run("check", long, capture(tmp_path / "b"))
    assert isinstance(done.exception, NotComparableError) and len(str(done.exception)) < 1000


@pytest.mark.parametrize("axis", ["", ".", "machine.", "*", "Machine", "machine\n", "software."])
def test_an_axis_that_names_nothing_is_refused(axis: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown axis"):
        regression.check(side(capture(tmp_path / "a")), side(capture(tmp_path / "b")), axes=[axis])


@pytest.mark.parametrize("margin", ["0%", "0", "-3%", "nan", "inf", "1e9%", "", "%", "3%%", "1e400"])
def test_a_margin_that_forgives_everything_or_nothing_is_refused(margin: str, tmp_path: Path) -> None:
    a = capture(tmp_path / "a")
    done = run("check", a, a, "--margin", margin, "--model", "none")
    assert isinstance(done.exception, InputError), done.output


def calibrated(folder: Path, **values: object) -> Path:
    """A capture that claims other rates."""
    claimed = {key: {"value": value} for key, value in values.items()}
    return edited(folder, "capture.json", lambda one: one | {"calibration": one["calibration"] | claimed})


def test_rates_that_no_sweep_could_have_run_at_explain_no_slowdown(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    slow = write_synthetic_capture(tmp_path / "slow", noise=lambda: 1.4)
    claim = calibrated(slow, memory_stream_bytes_per_s=3e6, fp32_gemm_flops_per_s=2e7)
    found = regression.compare(side(a), side(claim), axes=["machine"])
    assert found.overall.expected_ratio is not None and found.overall.expected_ratio > 100
    assert found.cells()["explained"] == 0 and found.exit_code() == 1


@pytest.mark.parametrize("value", [0, 1e29])
def test_any_claimed_rate_is_judged(value: float, tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a", n_runs=2)
    keys = ("memory_stream_bytes_per_s", "call_overhead_ns")
    claim = calibrated(write_synthetic_capture(tmp_path / "b", 2, lambda: 1.4), **dict.fromkeys(keys, value))
    done = run("check", a, claim, "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["verdicts"][0]["verdict"] == "regressed"
    assert run("check", "--new-machine", claim, "--json").exit_code == 1


@pytest.mark.parametrize("value", [1e-300, -1.0])
def test_rates_that_no_machine_has_are_refused(value: float, tmp_path: Path) -> None:
    claim = calibrated(capture(tmp_path / "a"), memory_stream_bytes_per_s=value)
    for words in (("check", claim, claim), ("check", "--new-machine", claim), ("baseline", "save", claim)):
        done = run(*words)
        assert isinstance(done.exception, InputError) and "capture.json is damaged" in str(done.exception)


@pytest.mark.parametrize(
    "fact", ["NaN", "1e999", r'"\ud800"', "[" * 40 + "]" * 40, "[" * 900 + "]" * 900, '{"a":' * 99_999], ids=range(6)
)
def test_facts_that_no_report_could_hold_are_refused(fact: str, tmp_path: Path) -> None:
    a, b = capture(tmp_path / "a"), capture(tmp_path / "b")
    words = (b / "capture.json").read_text()
    (b / "capture.json").write_text(words.replace('"synthetic CPU"', fact))
    for arguments in (("check", a, b, "--axis", "machine", "--json"), ("baseline", "save", b, "--store", tmp_path)):
        done = run(*arguments)
        assert isinstance(done.exception, InputError) and "capture.json" in str(done.exception)


def test_an_expert_that_is_not_there_cannot_be_offloaded(tmp_path: Path) -> None:
    away = {"access": "copy", "offload_frac": 0.5, "offloaded": [7, 8]}
    folder = edited(capture(tmp_path / "a"), "workloads.jsonl", lambda line: line | away)
    with pytest.raises(InputError, match="offloads an expert that it does not have"):
        load_capture(folder)


@pytest.mark.parametrize("size", ["n_tokens", "top_k", "hidden", "inter", "n_gemms"])
def test_a_workload_without_work_is_refused(size: str, tmp_path: Path) -> None:
    def emptied(line: dict[str, Any]) -> dict[str, Any]:
        none = {"tokens_per_expert": [0] * line["n_experts"]} if size in ("n_tokens", "top_k") else {}
        return line | none | {size: 0}

    folder = edited(capture(tmp_path / "a"), "workloads.jsonl", emptied)
    with pytest.raises(InputError, match=rf"has no {size}, and so no work"):
        load_capture(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("dtype", "float99"), ("hidden", 2**61), ("launch", "x"), ("access", "cpu")]
)
def test_what_a_model_cannot_know_leaves_its_question_open(key: str, value: object, tmp_path: Path) -> None:
    a, b = (
        edited(
            write_synthetic_capture(tmp_path / name, noise=lambda f=factor: f),
            "workloads.jsonl",
            lambda line: line | {key: value},
        )
        for name, factor in (("a", 1.0), ("b", 1.4))
    )
    done = run("check", a, b, "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["verdicts"][0]["verdict"] == "regressed"
    assert run("check", "--new-machine", b, "--json").exit_code in (0, 1)


def test_runs_are_numbered_so_that_many_occasions_fit_one_behind_the_other(tmp_path: Path) -> None:
    folder = edited(capture(tmp_path / "a"), "observations.jsonl", lambda line: line | {"run": line["run"] + 2**62 - 9})
    with pytest.raises(InputError, match=r"observations\.jsonl is damaged: line 1: .*run"):
        load_capture(folder)


@pytest.mark.parametrize(("started", "finished"), [([0, 20, 40], [-1, 19, 39]), ([-9, -9, -9], [-9, -9, -9])])
def test_runs_that_end_before_they_begin_took_no_turns(started: list[int], finished: list[int]) -> None:
    def side(shift: int) -> Evidence:
        spans = zip(started, finished, strict=True)
        runs = tuple(regression.Run(i, 0, begin + shift, end + shift) for i, (begin, end) in enumerate(spans))
        return Evidence("made up", "capture", {}, {}, runs)

    assert not alternate(side(0), side(10))


def test_reports_spare_what_is_compared(tmp_path: Path) -> None:
    a, b = capture(tmp_path / "a"), capture(tmp_path / "b")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link").symlink_to(a)
    before = (a / "capture.json").read_bytes()
    for option, path in (
        ("--json-file", a / "capture.json"),
        ("--json-file", tmp_path / "link" / "capture.json"),
        ("--json-file", tmp_path / "folder.json"),
        ("--junit", tmp_path / "nowhere" / "x.xml"),
        ("--markdown", ""),
    ):
        done = run("check", a, b, "--model", "none", option, path)
        assert isinstance(done.exception, InputError) and option in str(done.exception)
    assert (a / "capture.json").read_bytes() == before and not list(tmp_path.rglob("*.part"))
    (tmp_path / "loop.xml").symlink_to("loop.xml")
    assert run("check", a, b, "--model", "none", "--junit", tmp_path / "loop.xml").exit_code == 0


def test_a_capture_of_many_ranks_is_named_for_what_it_is(tmp_path: Path) -> None:
    a = capture(tmp_path / "a")
    for pair in ((shipped_ep_captures()[0], a), (a, shipped_ep_captures()[0])):
        done = run("check", *pair)
        assert isinstance(done.exception, InputError) and "capture of expert parallelism" in str(done.exception)


# How much there may be


def test_what_workloads_share_is_found_among_any_number_of_names() -> None:
    n = 4_000
    facts = pl.DataFrame(
        {
            "shape": ["common"] * 100 + [f"shape {i // 2}" for i in range(n - 100)],
            "routing": [f"routing {i // 3}" for i in range(n)],
            "n_tokens": [i % 7 for i in range(n)],
            **{key: [word] * n for key, word in (("op", "moe_layer"), ("dtype", "fp32"), ("access", "resident"))},
        }
    ).with_columns(launch=pl.lit(None, pl.String), residency=pl.lit(None, pl.String))
    is_alone = np.arange(n) < 100
    is_alone[100::40] = True
    began = time.monotonic()
    found = what_they_share(facts, is_alone)
    assert found[0].startswith("All 100 workloads of shape common are slower")
    assert time.monotonic() - began < 5


def test_no_model_is_fitted_to_more_workloads_than_somebody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = load_capture(write_synthetic_capture(tmp_path / "a"))
    monkeypatch.setattr(against, "MOST_FITTED", 31)
    found = regression.compare(of_capture(a), of_capture(a))
    assert found.no_model is not None and "measured 32 workloads" in found.no_model
    assert found.overall.verdict.verdict == "ok"


# Saved baselines


def test_what_a_killed_save_had_begun_to_write_stands_in_nobodys_way(tmp_path: Path) -> None:
    """SIGKILL runs no clean-up: the file that was being written stays."""
    one, other, store = side(capture(tmp_path / "a")), side(capture(tmp_path / "b", 1.2)), tmp_path / "store"
    folder = store / name_of(one)
    folder.mkdir(parents=True)
    (folder / "pending.json.77.part").write_text('{"schema_version": 1, "fi')
    assert saved.save(one, store).baseline == folder.name
    (folder / "baseline.json.78.part").write_text("{")
    saved.update(other, store, "slower")
    assert regression.check(saved.load(folder), other)[0].verdict == "ok"
    assert run("baseline", "list", "--store", store).exit_code == 0
    (store / "strange").mkdir()
    again = tmp_path / "again" / folder.name
    again.mkdir(parents=True)
    (again / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not the baseline that was to be saved there"):
        saved.save(one, again.parent)


@pytest.mark.parametrize(
    ("words", "other", "said"),
    [
        ('"occasions": [', '"occasions": [], "x": [', "unknown field"),
        ('"run": 0', '"run": 99999999999999999999', "baseline.json is damaged"),
        ('"value": 30000000000', '"value": 1e-300', "which no machine has"),
        ('"torch": "0"', '"torch": ' + "[" * 99 + "]" * 99, "more than 32 deep"),
        ('"torch": "0"', '"torch": ' + "[" * 9_999 + "]" * 9_999, "baseline.json is damaged"),
    ],
)
def test_a_head_that_nobody_saved_is_refused(words: str, other: str, said: str, tmp_path: Path) -> None:
    a = capture(tmp_path / "a")
    head = tmp_path / "store" / saved.save(side(a), tmp_path / "store").baseline / "baseline.json"
    content = head.read_text().replace('"software.torch"', '"torch"')
    assert words in content
    head.write_text(content.replace(words, other))
    for arguments in (
        ("check", tmp_path / "store", a),
        ("baseline", "show", "", "--store", tmp_path / "store"),
        ("baseline", "update", a, "--store", tmp_path / "store", "--reason", "r"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, InputError) and said in str(done.exception)
    assert run("baseline", "list", "--store", tmp_path / "store").exit_code == 2


@pytest.mark.parametrize("value", [1e-300, 1e19])
def test_times_that_no_clock_tells_are_no_medians(value: float, tmp_path: Path) -> None:
    a = capture(tmp_path / "a")
    folder = tmp_path / saved.save(side(a), tmp_path).baseline
    for file in folder.glob("*.json"):
        words = json.loads(file.read_text())
        if "medians_ns" in words:
            (runs,) = words["medians_ns"].values()
            file.write_text(json.dumps(words | {"medians_ns": {key: {"0": value} for key in words["medians_ns"]}}))
            assert len(runs) == 3
    with pytest.raises(InputError, match="is damaged: Expected `float`"):
        saved.load(folder)


def test_a_baseline_without_occasions_is_told_as_damaged(tmp_path: Path) -> None:
    folder = tmp_path / saved.save(side(capture(tmp_path / "a")), tmp_path).baseline
    edited(folder, "baseline.json", lambda head: head | {"occasions": []})
    assert "lists no occasion" in run("baseline", "list", "--store", tmp_path).stderr


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"kind": "x"},
        {"kind": "operator"},
        {"kind": "class"},
        {"kind": "operator", "name": 5},
        {"kind": "metric", "n_flops": 1},
        {"kind": "operator", "name": "a", "part": "operator", "n_calls": -1},
    ],
)
def test_details_that_nobody_saved_are_refused(facts: dict[str, Any]) -> None:
    def traces(facts: dict[str, Any]) -> Evidence:
        details = {"x": regression.Measured("x", "x", {0: 1.0}, None, facts)}
        step = regression.Measured("step", "step", {0: 1e6})
        return Evidence("made up", "traces", {}, {"step": step}, (regression.Run(0),), details=details)

    sound = traces({"kind": "metric"})
    assert regression.compare(sound, sound).overall.verdict.verdict == "inconclusive"
    with pytest.raises(InputError, match="the facts of detail 'x'"):
        regression.compare(sound, traces(facts))


@pytest.mark.parametrize(("old", "new"), [(5e-324, 1e15), (1e15, 5e-324), (0.0, 0.0), (1e30, 1e-10)])
def test_details_of_any_size_have_ratios_that_json_can_hold(old: float, new: float) -> None:
    def traces(value: float) -> Evidence:
        facts = {"kind": "metric"}
        details = {
            key: regression.Measured(key, key.split(maxsplit=1)[1], {0: value, 1: value}, None, facts)
            for key in ("metric step_ns", "metric n_kernels", "part memory")
        }
        step = regression.Measured("step", "step", {0: 1e6, 1: 1e6})
        return Evidence("made up", "traces", {}, {"step": step}, tuple(map(regression.Run, (0, 1))), details=details)

    found = regression.compare(traces(old), traces(new))
    json.loads(report.check_json(found, []))
    assert report.check_page(found) and report.check_markdown(found, []) and report.check_junit(found, [])


# Traces


@pytest.mark.parametrize(
    "args",
    [
        {"Input Dims": 5},
        {"Input Dims": {"a": 1}},
        {"Input Dims": [[1e300, 1], [1, 1]]},
        {"Input Dims": [[-5, 512], [512, 1024]]},
        {"Input type": 7},
        {"Input type": [["x"], {}]},
    ],
)
def test_operands_that_are_none_leave_a_trace_comparable(args: dict[str, object], tmp_path: Path) -> None:
    def odd(trace: dict[str, Any]) -> dict[str, Any]:
        for event in trace["traceEvents"]:
            if "Input Dims" in event.get("args", {}):
                event["args"] |= args
        return trace

    a = made_up_trace(tmp_path / "a.json")
    made_up_trace(tmp_path / "b.json")
    b = edited(tmp_path, "b.json", odd) / "b.json"
    assert run("check", a, b).exit_code == run("check", b, b).exit_code == 0


def test_names_of_kernels_are_no_commands(tmp_path: Path) -> None:
    def renamed(trace: dict[str, Any]) -> dict[str, Any]:
        for event in trace["traceEvents"]:
            event["name"] += NAME * ("relu" in event["name"] or "elementwise" in event["name"])
        return trace

    made_up_trace(tmp_path / "a.json")
    made_up_trace(tmp_path / "b.json", relu_us=400)
    a, b = (edited(tmp_path, name, renamed) / name for name in ("a.json", "b.json"))
    for more in ([], ["--json"]):
        done = run("check", a, b, "--junit", tmp_path / "x.xml", "--markdown", tmp_path / "x.md", *more)
        assert done.exit_code == 1 and not commands_in(done.stdout) and not commands_in(done.stderr)
    assert ET.parse(tmp_path / "x.xml").getroot().attrib["failures"] == "2"
    assert "<img" not in re.sub(r"`[^`\n]*`", "", (tmp_path / "x.md").read_text())


def test_a_profile_that_unpacks_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = capture(tmp_path / "a"), capture(tmp_path / "b")
    for one in (a, b):
        (one / "profiles").mkdir()
        with gzip.open(one / "profiles" / "p.json.gz", "wt") as file:
            file.write('{"traceEvents": [' + " " * 10**6)
        os.mkfifo(one / "profiles" / "q.json.gz")  # nobody writes into it
    monkeypatch.setattr(profiled, "LIMITS", Limits(unpacked_bytes=10**5))
    assert profiled.profile_details(load_capture(a), load_capture(b)) == ()


def test_a_report_on_a_new_machine_that_cannot_be_written_takes_nothing_along(tmp_path: Path) -> None:
    a, junit, page = capture(tmp_path / "a"), tmp_path / ("x" * 250 + ".xml"), tmp_path / "x.md"
    done = run("check", "--new-machine", a, "--junit", junit, "--markdown", page)
    assert done.exit_code in (1, 2) and "cannot be written" in done.stderr and page.read_text()
    assert done.exit_code == (run("check", "--new-machine", a).exit_code or 2)
