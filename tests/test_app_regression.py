"""The Regression view: verdicts of shipped and uploaded captures, without a browser and in one."""

import io
import json
import re
import shlex
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from perfmodel import regression, report
from perfmodel.analysis import analyse
from perfmodel.capture import load_capture
from perfmodel.cli.main import app
from perfmodel.plausible.summary import machine_words
from perfmodel.readers import read_trace
from perfmodel.regression import packed
from perfmodel.regression.saved.saving import save
from tests.app_pages import figure, numbers, opened, ran, shown, titles
from tests.captures_made import write_synthetic_capture
from tests.conftest import ROOT
from tests.test_regression_traces import made_up_trace


def zipped(folder: Path) -> tuple[str, bytes, str]:
    """A capture folder as somebody hands it over."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in folder.iterdir():
            packed.write(file, f"{folder.name}/{file.name}")
    return f"{folder.name}.zip", content.getvalue(), "application/zip"


def said(boxes: Any) -> list[str]:
    """The verdicts in boxes of one kind, without the escapes that keep Markdown out of them."""
    return [box.value.replace("\\", "") for box in boxes]


def test_it_opens_with_a_slower_machine_that_the_model_mostly_explains() -> None:
    view = opened("regression")
    assert numbers(view) == {
        "Check": "fails",
        "Time against the baseline": "1.33x",
        "Model expects": "1.41x",
        "Time against the model": "0.95x",
        "Most of it in": "memory",
        "Workloads compared": "120",
    }
    assert said(view.error) == [
        "**Slower than the baseline**. The calibrated rates of the machine account for it over all, not for each "
        "workload: some are regressions to chase. The candidate did not measure 208 workloads of the baseline."
    ]
    assert titles(view)[1] == "Both questions crossed"
    assert re.fullmatch(r"\d+ undecided besides", figure(view, 1)["layout"]["xaxis"]["title"]["text"])
    assert "perfmodel check traces/epyc-zen5-2c-fp32 traces/epyc-zen4-2c-fp32 --margin 3%" in shown(view)


def test_a_pair_that_differs_is_explained_and_declared_with_one_click() -> None:
    view = opened("regression")
    view.selectbox(key="baseline").set_value("epyc-zen4-2c-fp32")
    view.selectbox(key="candidate").set_value("epyc-zen5-2c-fp32")
    assert ran(view).multiselect(key="axes").value == []
    assert "not comparable: the captures differ in machine.cpu_family" in shown(view)
    assert "They differ in os and machine." in shown(view)
    view.button[0].click()
    assert numbers(ran(view))["Time against the baseline"] == "0.75x"
    assert said(view.warning) == [
        "**Faster than the baseline**. The candidate did not measure 222 workloads of the baseline."
    ]


def test_captures_without_a_common_workload_offer_nothing_to_declare() -> None:
    for axes in ("settings", "machine"):
        view = opened("regression", baseline="epyc-zen5-2c-bf16", candidate="epyc-zen5-2c-fp32", axes=axes)
        assert "No workload was measured in both" in shown(view)
        assert not view.button


def test_a_link_holds_the_controls() -> None:
    view = opened("regression", baseline="epyc-zen4-2c-fp32", candidate="epyc-zen4-2c-fp32", margin="20", model="none")
    assert view.number_input(key="margin").value == 20
    assert "margin 20 %" in titles(view)[0] and len(titles(view)) == 1
    assert "no model was asked for" in shown(view)


def test_uploaded_captures_are_compared_in_their_session(tmp_path: Path) -> None:
    """A capture 1.4 times slower than another, with the same calibrated rates; its workloads have room for their names
    once three shapes are left."""
    a = write_synthetic_capture(tmp_path / "before")
    slow = write_synthetic_capture(tmp_path / "after<b>", noise=lambda: 1.4)
    view = opened("regression")
    view.file_uploader(key="capture-zip").set_value([zipped(a), zipped(slow)])
    ran(view)
    assert {"before", "after<b>"} <= {one.value for one in view.text}
    names = view.selectbox(key="baseline").options
    assert names[-2:] == ["uploaded: before", "uploaded: after<b>"]
    view.selectbox(key="baseline").set_value(names[-2])
    view.selectbox(key="candidate").set_value(names[-1])
    ran(view)
    assert said(view.error) == [
        "**Slower than the baseline**, and no calibrated rate accounts for it: a regression to chase."
    ]
    marks = [trace for trace in figure(view, 0)["data"] if trace["name"].startswith("regressed")]
    assert marks[0]["name"] == "regressed (32)"
    assert "perfmodel check before 'after<b>' --margin 3%" in shown(view)
    again = opened("regression")
    assert "uploaded: before" not in again.selectbox(key="baseline").options


def test_an_uploaded_capture_is_removed_and_may_come_again(tmp_path: Path) -> None:
    """Its box is empty after it was read, so that nothing brings it back unasked; what was chosen falls back."""
    slow = write_synthetic_capture(tmp_path / "after", noise=lambda: 1.4)
    view = opened("regression", model="none")
    for _ in range(2):
        next(box for box in view.file_uploader if box.key.startswith("capture-zip")).set_value([zipped(slow)])
        ran(view).selectbox(key="candidate").set_value("uploaded: after")
        view.selectbox(key="baseline").set_value("uploaded: after")
        assert numbers(ran(view))["Workloads compared"] == "32"
        assert "both sides hold the same measurements: nothing was compared" in shown(view)
        next(button for button in view.button if button.label == "Remove").click()
        ran(view)
        assert "uploaded: after" not in view.selectbox(key="candidate").options
        assert view.selectbox(key="candidate").value == "epyc-zen4-2c-fp32"
        assert not [button for button in view.button if button.label == "Remove"]


def test_open_traces_are_sides_too(tmp_path: Path) -> None:
    """Two made-up traces, one with a GEMM that takes 300 us longer; a trace and a capture are no pair."""
    view = opened("regression", model="none")
    view.session_state["uploaded"] = [
        SimpleNamespace(
            name=name, digest=name, analysis=analyse(read_trace(made_up_trace(tmp_path / name, gemm_us=us)))
        )
        for name, us in (("before.json", 400), ("after.json", 700))
    ]
    names = ran(view).selectbox(key="baseline").options
    assert names[-2:] == ["trace: before.json", "trace: after.json"]
    view.selectbox(key="baseline").set_value(names[-2])
    assert "Captures are compared with captures" in shown(ran(view))
    view.selectbox(key="candidate").set_value(names[-1])
    assert numbers(ran(view)) == {
        "Check": "fails",
        "Time against the baseline": "1.50x",
        "Most of it in": "compute",
        "Workloads compared": "1",
    }
    assert "a side has a single run, so that the spread between runs is assumed" in shown(view)
    assert "perfmodel check before.json after.json" in view.code[0].value
    view.session_state["uploaded"].append(SimpleNamespace(**vars(view.session_state["uploaded"][0]) | {"digest": "x"}))
    assert ran(view).selectbox(key="baseline").options[-1] == "trace: before.json (x)"


def test_a_datasheet_is_asked_too_and_stands_in_the_command(tmp_path: Path) -> None:
    view = opened("regression", baseline="epyc-zen4-2c-fp32", candidate="epyc-zen4-2c-fp32", datasheet="h100-sxm")
    assert "This cannot be judged:" in [box.value.replace("\\", "") for box in view.error]
    assert "cpu" in shown(view)  # a GPU's ceilings for what ran on a CPU
    on_cpu = next(name for name in view.selectbox(key="datasheet").options if "epyc" in name or "xeon" in name)
    view.selectbox(key="datasheet").set_value(on_cpu)
    assert f"Time against {on_cpu}" in numbers(ran(view))
    assert f"--hardware {on_cpu}" in view.code[0].value


def test_two_uploads_of_one_name_stay_two(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "one" / "capture")
    b = write_synthetic_capture(tmp_path / "two" / "capture", noise=lambda: 1.4)
    view = opened("regression")
    view.file_uploader(key="capture-zip").set_value([zipped(a), zipped(b)])
    first, second = ran(view).selectbox(key="baseline").options[-2:]
    assert first == "uploaded: capture" and second.startswith("uploaded: capture (")
    view.selectbox(key="baseline").set_value(second)
    view.selectbox(key="candidate").set_value(first)
    assert numbers(ran(view))["Time against the baseline"] == "0.71x"
    assert ran(view).selectbox(key="baseline").options[-2:] == [first, second]


def test_the_command_below_gives_the_same_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    view = opened("regression", margin="10", axes="machine.cpu_family", model="epyc-zen4-2c-fp32")
    view.multiselect(key="axes").set_value(["machine", "software"])
    command, page = (block.value for block in ran(view).code)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 1 and page in done.stdout
    assert "--margin 10% --axis machine --axis software --model epyc-zen4-2c-fp32" in command


def test_what_is_no_capture_is_refused_in_words(tmp_path: Path) -> None:
    view = opened("regression")
    broken = write_synthetic_capture(tmp_path / "broken")
    (broken / "observations.jsonl").write_text("{}\n")
    view.file_uploader(key="capture-zip").set_value(
        [("notes.zip", b"PK no zip", "application/zip"), zipped(broken), ("notes.txt", b"text", "text/plain")]
    )
    said = shown(ran(view))
    assert "notes.zip is no zip archive that can be read" in said and "found no capture.json" in said
    assert "observations.jsonl" in said and "/tmp" not in said
    assert numbers(view)["Workloads compared"] == "120"


def hostile(folder: Path, **facts: object) -> Path:
    """A capture whose manifest says something else."""
    manifest = json.loads((folder / "capture.json").read_text())
    for key, value in facts.items():
        manifest[key] = value(manifest[key])
    (folder / "capture.json").write_text(json.dumps(manifest))
    return folder


def brought(view: Any, folder: Path, **chosen: str) -> Any:
    """The view after a capture was uploaded and chosen as the candidate."""
    view.file_uploader[1].upload(*zipped(folder))
    ran(view)
    view.selectbox(key="candidate").select(f"uploaded: {folder.name}")
    return ran(view)


def test_calibrations_no_machine_can_have_are_refused(tmp_path: Path) -> None:
    for i, value in enumerate((-1.0, 1e308, float("inf"))):
        folder = hostile(
            write_synthetic_capture(tmp_path / f"made_{i}"),
            calibration=lambda entries, value=value: {k: e | {"value": value} for k, e in entries.items()},
        )
        view = opened("regression")
        view.file_uploader[1].upload(*zipped(folder))
        assert "capture.json is damaged" in shown(ran(view))


def test_a_capture_nested_without_end_or_with_numbers_without_end_is_refused(tmp_path: Path) -> None:
    folder = write_synthetic_capture(tmp_path / "made")
    (folder / "capture.json").write_text('{"schema":1,"a":' * 100_000)
    view = opened("regression")
    view.file_uploader[1].upload(*zipped(folder))
    assert "not a capture manifest" in shown(ran(view))
    folder = write_synthetic_capture(tmp_path / "large")
    first, _, rest = (folder / "workloads.jsonl").read_text().partition("\n")
    line = json.dumps(json.loads(first) | {"hidden": 2**63})
    (folder / "workloads.jsonl").write_text(f"{line}\n{rest}")
    view.file_uploader[1].upload(*zipped(folder))
    assert "workloads.jsonl is damaged: line 1" in shown(ran(view))


def test_a_capture_without_end_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MAX_LINES", 100)
    folder = write_synthetic_capture(tmp_path / "made")
    n_lines = len((folder / "observations.jsonl").read_text().splitlines())
    view = opened("regression")
    view.file_uploader[1].upload(*zipped(folder))
    assert n_lines > 100
    assert "made/observations.jsonl has more than 100 lines" in shown(ran(view))
    monkeypatch.setattr(packed, "MAX_CAPTURES", 0)
    view.file_uploader[1].upload(*zipped(write_synthetic_capture(tmp_path / "other")))
    assert "holds 1 captures, expected at most 0" in shown(ran(view))


def test_what_a_comparison_breaks_on_is_said_and_tells_nothing_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("/srv/secret")

    monkeypatch.setattr("perfmodel.regression.compare", broken)
    view = brought(opened("regression", model="none"), write_synthetic_capture(tmp_path / "made"))
    assert "ZeroDivisionError" in shown(view)
    assert "secret" not in shown(view)


def test_one_machine_alone_is_judged_without_a_baseline(tmp_path: Path) -> None:
    """The candidate that was chosen is the machine, what the other way asks stays, and the command says the same."""
    view = opened("regression", baseline="epyc-zen5-2c-bf16", candidate="epyc-zen5-2c-fp32", margin="7")
    view.button_group(key="way").set_value("One machine alone")
    assert ran(view).selectbox(key="capture").value == "epyc-zen5-2c-fp32"
    command, page = (block.value for block in view.code)
    assert command == "perfmodel check --new-machine traces/epyc-zen5-2c-fp32"
    verdict, n_wrong = page.splitlines()[0], page.count("LOOK AT ")
    assert [one.replace("*", "") for one in said(view.warning)] == [verdict]
    assert numbers(view)["Deserve a look"] == f"{n_wrong}" != "0"
    steps = [line.strip().replace("-> ", "\u2192 ") for line in page.splitlines() if "-> " in line]
    assert len(steps) >= n_wrong and all(any(step in one.value for one in view.text) for step in steps)
    assert titles(view)[0] == "Shares of what the machine is held against"
    view.button_group(key="way").set_value("Against a baseline")
    assert ran(view).selectbox(key="baseline").value == "epyc-zen5-2c-bf16"
    assert view.number_input(key="margin").value == 7


def test_an_uploaded_machine_is_judged_when_its_files_are_gone(tmp_path: Path) -> None:
    """What is wrong with the folder is found when it is read; models and datasheets that do not fit are refused."""
    made = write_synthetic_capture(tmp_path / "made", machine={"cpu_model": "b"})
    lines = (made / "observations.jsonl").read_text().splitlines()
    (made / "observations.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    view = opened("regression", way="One machine alone", judge="none")
    view.file_uploader[1].upload(*zipped(made))
    ran(view).selectbox(key="capture").set_value("uploaded: made")
    assert "--new-machine made --model none" in ran(view).code[0].value
    found = regression.new_machine(load_capture(made), with_model=False)
    assert view.code[1].value == report.new_machine_page(found, machine_words(load_capture(made)))
    view.selectbox(key="nominal").set_value("h100-sxm")
    assert "This cannot be judged:" in said(ran(view).error)


def test_saved_baselines_are_sides_as_folders_and_packed(tmp_path: Path) -> None:
    """Times are those of the capture that was saved; no machine is judged by one alone; a damaged one is refused."""
    one, slow = (
        load_capture(write_synthetic_capture(tmp_path / name, noise=lambda f=f: f))
        for name, f in (("a", 1.0), ("b", 1.4))
    )
    save(regression.of_capture(one), tmp_path / "store")
    (kept,) = (tmp_path / "store").iterdir()
    view = opened("regression", model="none")
    files = [(f"{kept.name}/{file.name}", file.read_bytes(), "application/json") for file in kept.iterdir()]
    view.file_uploader[0].set_value(files)
    ran(view).file_uploader[1].set_value([zipped(slow.path)])
    view.selectbox(key="baseline").set_value(f"uploaded: {kept.name}")
    ran(view).selectbox(key="candidate").set_value("uploaded: b")
    assert numbers(ran(view))["Time against the baseline"] == "1.40x"
    assert f"perfmodel check {kept.name} b" in view.code[0].value
    view.button_group(key="way").set_value("One machine alone")
    assert f"uploaded: {kept.name}" not in ran(view).selectbox(key="capture").options
    (kept / "baseline.json").write_text("{}")
    again = opened("regression", model="none")
    again.file_uploader[1].set_value([zipped(kept)])
    assert "baseline.json" in shown(ran(again)) and "/tmp" not in shown(again)
    assert len(again.selectbox(key="baseline").options) == len(opened("regression").selectbox(key="baseline").options)


def test_one_thread_less_is_declared_as_threads_not_as_another_machine(tmp_path: Path) -> None:
    """Both facts of threads lie on one axis; as another machine they would excuse what the lost thread costs."""
    a = write_synthetic_capture(tmp_path / "two", machine={"n_threads": 2})
    b = hostile(
        write_synthetic_capture(tmp_path / "one", machine={"n_threads": 1}),
        settings=lambda facts: facts | {"threads": 1},
    )
    view = opened("regression", model="none")
    view.file_uploader[1].set_value([zipped(a), zipped(b)])
    ran(view).selectbox(key="baseline").set_value("uploaded: two")
    view.selectbox(key="candidate").set_value("uploaded: one")
    assert "They differ in threads." in shown(ran(view))
    view.button[-1].click()
    assert ran(view).multiselect(key="axes").value == ["threads"]
    assert numbers(view)["Check"] == "passes"


def choose(page, label: str, wanted: str) -> None:
    """Choose an option."""
    page.get_by_role("combobox", name=label).click()
    page.get_by_role("option", name=wanted).click()


@pytest.mark.browser
def test_a_new_machine_is_checked_and_its_report_taken_along(page, server, tmp_path: Path) -> None:
    """The journey: upload two captures, one as a folder, choose them, read the verdict, download the JUnit report."""
    a = write_synthetic_capture(tmp_path / "before")
    slow = write_synthetic_capture(tmp_path / "after", noise=lambda: 1.4)
    name, content, mime = zipped(slow)
    page.goto(f"{server}/regression?model=none")
    page.get_by_text("Both questions crossed").or_(page.get_by_text("stays open")).first.wait_for(timeout=60_000)
    page.get_by_role("button", name="Upload").first.click()
    box = page.get_by_test_id("stPopoverBody")
    inputs = page.get_by_test_id("stFileUploader").locator("input[type=file]")
    inputs.nth(0).set_input_files(a)
    box.get_by_text("before", exact=True).wait_for()
    inputs.nth(1).set_input_files({"name": name, "mimeType": mime, "buffer": content})
    box.get_by_text("after", exact=True).wait_for()  # a box that closes while a file is sent loses it
    page.keyboard.press("Escape")
    choose(page, "Baseline", "uploaded: before")
    page.get_by_text("These two are not compared").wait_for()
    choose(page, "Candidate", "uploaded: after")
    page.get_by_test_id("stAlertContentError").get_by_text("Slower than the baseline").wait_for(timeout=30_000)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JUNIT.XML").click()
    report = ET.parse(download.value.path()).getroot()
    assert download.value.suggested_filename == "check.junit.xml"
    assert (report.attrib["tests"], report.attrib["failures"]) == ("33", "33")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
