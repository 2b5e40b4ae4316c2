"""The Schedules view: its numbers are the library's and the command's, its links open what they were copied from."""

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("streamlit", reason="streamlit is not installed")

from perfmodel import text
from perfmodel.cli.main import app
from perfmodel.ep_capture import load_ep_capture, shipped_ep_captures
from perfmodel.schedule.captured import set_beside
from tests.app_pages import figure, numbers, opened, ran, shown, titles
from tests.served import until

SMALL = {"gpus": "4", "tokens": "64", "chunks": "2", "power-law-exponent": "0.3"}


def said(words: str) -> dict:
    """What the command that a view shows says as JSON."""
    done = CliRunner().invoke(app, [*words.split()[1:], "--json"], catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return json.loads(done.stdout)


def test_bars_and_curves_are_what_the_shown_command_says() -> None:
    test = opened("schedules", **SMALL, capacity="1.25", offload="25", access="copy")
    command = test.code[0].value
    for option in (
        "--gpus 4",
        "--tokens 64",
        "--routing power-law:0.3",
        "--offload 0.25",
        "--access copy",
        "--chunks 2",
    ):
        assert option in command
    found = said(command)
    latency_ns = {one["schedule"]: one["latency_ns"] for one in found["schedules"]}
    bars, batch, skew, _ = (figure(test, i) for i in range(4))
    fastest_last = sorted(latency_ns, key=lambda name: -latency_ns[name])
    assert bars["data"][0]["y"] == fastest_last
    sums = [sum(bar["x"][i] for bar in bars["data"]) for i in range(3)]
    assert sums == pytest.approx([latency_ns[name] for name in fastest_last])
    for drawn, along in ((batch, "tokens_per_gpu"), (skew, "exponent")):
        points = found["curves"][along]["points"]
        chunked = next(line for line in drawn["data"] if line["name"] == "chunked")
        assert chunked["x"] == [row[along] for row in points]
        assert chunked["y"] == pytest.approx([row["bulk_ns"] / row["chunked_ns"] for row in points])
    best = fastest_last[-1]
    assert numbers(test)["Fastest"] == f"{best}, {text.ns(latency_ns[best])}"
    assert f"{best} is fastest: " in shown(test) and "offload" in shown(test)


def test_a_changed_control_changes_the_picture() -> None:
    test = opened("schedules", **SMALL)
    before = numbers(test)["Fastest"]
    test.select_slider(key="tokens").set_value(2048)
    assert numbers(ran(test))["Fastest"] != before
    test.selectbox(key="model").select("mixtral-8x7b")
    assert "--shape mixtral-8x7b" in ran(test).code[0].value


def test_of_eight_gpus_four_are_drawn_until_all_are_asked_for() -> None:
    test = opened("schedules", gpus="8", tokens="64")

    def drawn() -> set[str]:
        bars = figure(test, titles(test).index(next(t for t in titles(test) if t.startswith("Who does"))))["data"]
        return {label.split()[1] for bar in bars for label in bar["y"]}

    assert len(drawn()) == 4
    test.toggle(key="all").set_value(True)
    ran(test)
    assert len(drawn()) == 8


def test_what_cannot_be_is_said_and_what_does_not_fit_is_called_so() -> None:
    test = opened("schedules", gpus="8", node="8", tokens="64", access="near-data", offload="50")
    assert test.error and "ndp" in shown(test) and not titles(test)
    large = opened("schedules", model="deepseek-v3", hardware="gh200", gpus="4", tokens="16")
    assert numbers(large)["Memory"] == "does not fit" and "hypothetical: " in shown(large)
    assert numbers(opened("schedules", **SMALL))["Memory"] == "fits"


def test_curves_of_many_gpus_are_simulated_when_asked_for() -> None:
    test = opened("schedules", gpus="32", tokens="16")
    assert len(titles(test)) == 2 and not test.toggle(key="curves").value


def test_a_measured_workload_is_shown_beside_its_prediction() -> None:
    name = "epyc-zen5-4p-expert-parallel"
    capture = load_ep_capture(next(path for path in shipped_ep_captures() if path.name == name))
    one = next(w for w in capture.measured if w.way == "chunked x 4" and w.tokens_per_gpu == 512)
    link = {"capture": name, "shape": one.shape, "rank-tokens": "512", "rank-routing": one.routing, "way": one.way}
    test = opened("schedules", tab="Measured", **link)
    found = set_beside(capture)
    assert numbers(test)["Predicted"] == text.ns(found.predicted[one.workload].latency_ns)
    assert f"--workload {capture.measured.index(one) + 1}" in test.code[0].value
    assert f"id {one.workload}" in shown(test)
    measured, predicted = figure(test, 1)["data"]
    assert dict(zip(predicted["x"], predicted["y"], strict=True))["latency"] == pytest.approx(
        found.predicted[one.workload].latency_ns
    )
    assert len(measured["y"]) == len(predicted["y"])


def test_maps_of_experts_are_what_the_shown_command_says() -> None:
    link = {"map-model": "mixtral-8x7b", "map-gpus": "4", "map-routing": "temporal", "map-tokens": "256"}
    test = opened("schedules", tab="Expert maps", **link, **{"map-spread": "10"})
    found = said(test.code[0].value)
    bars, loads = figure(test, 0)["data"][0], figure(test, 1)["data"]
    assert bars["x"] == pytest.approx([one["layer_by_rows_ns"] for one in found["policies"]])
    assert loads[-1]["y"] == pytest.approx([1 - frac for frac in found["policies"][-1]["idle_frac"]])
    assert f"{found['best']} is best" in shown(test)


def test_gpus_of_other_speeds_get_maps_from_the_same_drawn_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from perfmodel import balance

    drawn, steps_of = [], balance.steps_of
    monkeypatch.setattr(balance, "steps_of", lambda *asked: (drawn.append(asked), steps_of(*asked))[1])
    query = {"map-model": "mixtral-8x7b", "map-tokens": "256", "map-routing": "layered"}
    for spread in ("5", "10"):
        opened("schedules", tab="Expert maps", **query, **{"map-spread": spread})
    assert len(drawn) == 1


@pytest.mark.browser
def test_a_copied_link_opens_the_tab_and_a_control_writes_itself_into_it(page, server) -> None:
    page.goto(f"{server}/schedules?tab=Measured")
    page.wait_for_selector("text=Measured step", timeout=60_000)
    page.get_by_role("tab", name="Predicted").click()
    page.wait_for_selector("text=Slowest GPU", timeout=60_000)
    page.get_by_text("Draw all GPUs").click()
    until(page, "location.search.includes('all=true')")
    page.wait_for_selector("text=How this was computed", timeout=60_000)
    assert page.get_by_test_id("stException").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
