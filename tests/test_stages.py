"""Measuring processes seen from outside: what they say, how they die, and what goes on after."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from collectors import store, workers
from collectors.workers import Stage, StageError, run_stage
from perfmodel.errors import InputError

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
    assert entry["is_fatal"]
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


def test_a_process_that_waits_for_quiet_does_not_count_as_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "LEAST_PATIENCE_S", 0.0)
    script = "say(begin={'workload': 'a', 'run': 0}, seconds=0, waits_s=30); time.sleep(0.3); say(point='a')"
    assert run(tmp_path, script)[-1] == {"point": "a"} and store.left_out(tmp_path) == []


def test_a_process_that_somebody_stops_leaves_nothing_out(tmp_path):
    with pytest.raises(StageError, match="was ended by signal SIGTERM"):
        run(tmp_path, "say(begin={'workload': 'a'}); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    assert store.left_out(tmp_path) == []


def test_a_process_that_dies_outside_of_any_point_is_an_error(tmp_path):
    with pytest.raises(StageError, match="ended with exit code 7"):
        run(tmp_path, "say(begin={'workload': 'a'}); say(point='a'); sys.exit(7)")


def test_a_process_that_a_signal_ends_outside_of_any_point_is_tried_once_more(tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    assert run(tmp_path, f"if first(): {kill}\nsay(point='after')") == [{"point": "after"}]
    with pytest.raises(StageError, match="was ended by signal SIGKILL"):
        run(tmp_path, f"open(seen, 'a').write('x'); {kill}")
    assert (tmp_path / "seen").read_text() == "xx"


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


def test_a_process_whose_time_is_up_is_ended_and_nothing_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "GRACE_S", 0.2)
    script = "say(begin={'workload': 'endless', 'run': 0}, seconds=1); time.sleep(600)"
    run_stage(dataclasses.replace(stage_of(tmp_path, script), seconds=0.1), lambda word: None)
    assert store.left_out(tmp_path) == []
    assert capsys.readouterr().err == "a measuring process was ended at workload endless run 0: its time was up\n"


def test_a_successor_has_only_the_time_that_is_left(tmp_path):
    given: list[float] = []

    def wrap(command):
        given.append(float(command[command.index("--seconds") + 1]))
        return [sys.executable, "-c", code]

    code = HEAD.format(folder=str(tmp_path)) + f"if first(): time.sleep(0.3); sys.exit({workers.RESTART})"
    run_stage(Stage(tmp_path, ["run", "0"], 1, wrap=wrap, seconds=30.0), lambda word: None)
    assert given[0] == 30.0 and given[1] <= 29.8


@pytest.mark.parametrize("how", ["sys.exit(7)", "os.kill(os.getpid(), signal.SIGSEGV)"])
def test_what_goes_wrong_after_the_last_word_harms_nothing(tmp_path, how):
    assert run(tmp_path, f"say(end={{'run': 0}}); {how}") == [{"end": {"run": 0}}]
    assert store.left_out(tmp_path) == []


def test_a_process_that_closes_its_output_and_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "END_PATIENCE_S", 0.2)
    with pytest.raises(StageError, match="closed its output and went on"):
        run(tmp_path, "os.close(1); time.sleep(600)")


def test_bytes_that_are_no_text_are_passed_over(tmp_path):
    script = "sys.stdout.buffer.write(bytes([255, 10])); sys.stdout.flush(); say(point='a')"
    assert run(tmp_path, script) == [{"point": "a"}]


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path):
    resource = pytest.importorskip("resource", reason="no limit on file sizes here")
    record = {"workload": "a" * 80, "reason": "b"}
    store.append(tmp_path, store.LEFT_OUT, record)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        with pytest.raises(InputError, match=r"left_out.jsonl cannot be written"):
            store.append(tmp_path, store.LEFT_OUT, record)
        with pytest.raises(InputError, match=r"capture.json cannot be written"):
            store.write_capture(tmp_path, {"schema": store.SCHEMA, "long": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    store.append(tmp_path, store.LEFT_OUT, record)
    assert (tmp_path / store.LEFT_OUT).read_text() == 2 * store.to_line(record)
    assert not (tmp_path / store.CAPTURE).exists()


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
