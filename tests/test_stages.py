"""Measuring processes seen from outside: what they say, how they die, and what goes on after."""

import json
import sys
from pathlib import Path

import pytest

from collectors import store, workers
from collectors.workers import Stage, StageError, run_stage

HEAD = """
import json, os, sys, time, signal
def say(**word): print(json.dumps(word), flush=True)
seen = os.path.join({folder!r}, "seen")
def first():
    known = os.path.exists(seen)
    open(seen, "a").close()
    return not known
"""


def stage_of(folder: Path, script: str) -> Stage:
    """A stage whose process runs a script in place of the collectors."""
    code = HEAD.format(folder=str(folder)) + script
    return Stage(folder, ["run", "0"], 1, wrap=lambda command: [sys.executable, "-c", code])


def run(folder: Path, script: str) -> list[dict]:
    said: list[dict] = []
    run_stage(stage_of(folder, script), said.append)
    return said


def test_words_arrive_in_order_and_chatter_is_passed_over(tmp_path):
    said = run(tmp_path, "say(begin={'workload': 'a'}); print('hello'); print('[1]'); say(point='a'); say(end=[1])")
    assert said == [{"begin": {"workload": "a"}}, {"point": "a"}, {"end": [1]}]
    assert store.left_out(tmp_path) == []


def test_a_point_that_kills_its_process_is_left_out_and_the_rest_goes_on(tmp_path, capsys):
    script = """
if first():
    say(begin={"workload": "bad", "run": 0}, seconds=1)
    os.kill(os.getpid(), signal.SIGSEGV)
say(begin={"workload": "good", "run": 0}); say(point="good")
"""
    assert {"point": "good"} in run(tmp_path, script)
    (entry,) = store.left_out(tmp_path)
    assert (entry["workload"], entry["run"], entry["reason"]) == ("bad", 0, "was ended by signal SIGSEGV")
    assert "left out: workload bad run 0" in capsys.readouterr().err


def test_a_process_may_ask_for_a_successor(tmp_path):
    assert run(tmp_path, f"if first(): sys.exit({workers.RESTART})\nsay(point='after')") == [{"point": "after"}]
    assert store.left_out(tmp_path) == []


def test_a_silent_process_is_ended_and_its_point_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LEAST_PATIENCE_S", 0.5)
    script = """
if first():
    say(begin={"workload": "slow", "run": 1}, seconds=0.001)
    time.sleep(600)
say(point="after")
"""
    assert {"point": "after"} in run(tmp_path, script)
    assert [entry["reason"] for entry in store.left_out(tmp_path)] == ["no answer in 0 s"]


def test_a_process_that_dies_outside_of_any_point_is_an_error(tmp_path):
    with pytest.raises(StageError, match="ended with exit code 7"):
        run(tmp_path, "say(begin={'workload': 'a'}); say(point='a'); sys.exit(7)")


@pytest.mark.parametrize("code", workers.SAID_WHY)
def test_a_process_that_has_said_why_is_believed(tmp_path, code):
    with pytest.raises(StageError) as raised:
        run(tmp_path, f"say(begin={{'workload': 'a'}}); sys.exit({code})")
    assert raised.value.exit_code == code and store.left_out(tmp_path) == []


def test_a_machine_on_which_everything_dies_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "N_RESTARTS", 3)
    with pytest.raises(StageError, match="3 measuring processes of one stage died"):
        run(tmp_path, "say(begin={'workload': 'a'}); sys.exit(1)")
    assert len(store.left_out(tmp_path)) == 3


def test_the_command_is_that_of_this_package(tmp_path):
    seen: list[list[str]] = []

    def wrap(command):
        seen.append(command)
        return [sys.executable, "-c", "import collectors, json; print(json.dumps({'found': collectors.__file__}))"]

    said: list[dict] = []
    run_stage(Stage(tmp_path, ["run", "0", "--seconds", "3"], 1, wrap=wrap), said.append)
    assert seen[0][1:] == ["-m", "collectors", "stage", "run", "0", "--seconds", "3", "--out", str(tmp_path)]
    assert Path(said[0]["found"]).parent == Path(workers.__file__).parent


def test_journals_are_mended_and_refuse_what_is_no_record(tmp_path):
    store.append(tmp_path, store.LEFT_OUT, {"workload": "a", "reason": "b"})
    with (tmp_path / store.LEFT_OUT).open("a") as file:
        file.write('{"workload"')
    assert json.dumps(store.left_out(tmp_path)) == '[{"workload": "a", "reason": "b"}]'
    assert (tmp_path / store.LEFT_OUT).read_bytes().endswith(b"\n")
