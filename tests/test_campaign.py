"""A campaign from outside: its time budget, what a kill leaves, and what the same command does afterwards."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from collectors import campaign, cli, store
from collectors.calibration import key
from collectors.campaign import Collection, Order, _reopen, settings_of, spent_s
from collectors.timing import QUICK
from collectors.workers import StageError
from perfmodel.errors import InputError
from tests.killed import killed_while_measuring

REPO = Path(__file__).parent.parent
TINY = ("--preset", "quick", "--minutes", "0.8", "--dtype", "float32", "--device", "cpu", "--threads", "1")


def settings(minutes: float | None = 4.0, runs: int = 3, **more: object) -> store.Json:
    made = settings_of(
        "campaign", device="cpu", dtypes=("float32",), threads=1, runs=runs, seed=0, preset="quick", minutes=minutes,
        limits=QUICK, routing_files=(),
    )  # fmt: skip
    return {**made, "nsys": False, **more}


# --- the budget, on made-up processes ---


class FakeProcesses:
    """Stands for the measuring processes: writes made-up lines and moves a false clock as real ones would."""

    def __init__(self, monkeypatch, per_point_s: float = 1.0):
        self.now, self.per_point_s, self.stages = 0.0, per_point_s, []
        monkeypatch.setattr(campaign, "run_stage", self.run)
        monkeypatch.setattr(campaign.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(campaign.time, "time", lambda: 1000.0 + self.now)
        monkeypatch.setattr(campaign, "points_of", lambda folder: [])

    def run(self, stage, on_word):
        words = list(stage.arguments)
        limit = stage.seconds
        self.stages.append((" ".join(words[:2]) if words[0] == "run" else words[0], limit))
        self.now += 2.0
        if words[0] == "describe":
            more = {"kernel": "made up", "capabilities": {}, "stated": {}}
            on_word({"end": {"machine": {}, "software": {}, **more}})
        elif words[0] == "run":
            self.measure(stage, on_word, int(words[1]), limit)

    def measure(self, stage, on_word, run, limit):
        planned = [line["workload"] for line in store.read_workloads(stage.folder)]
        first = {p["workload"] for p in store.points(stage.folder) if p["run"] == 0}
        done = {p["workload"] for p in store.points(stage.folder) if p["run"] == run}
        wanted = [w for w in planned if (run == 0 or w in first) and w not in done]
        until = self.now + (limit or 1e9) - 2.0
        n_todo = 0
        for workload in wanted:
            if self.now + self.per_point_s > until:
                n_todo += 1
                continue
            point = {"workload": workload, "run": run, "times_ns": [5, 5, 6], "took_s": self.per_point_s}
            store.append(stage.folder, store.OBSERVATIONS, {**point, "started": int(1000 + self.now)})
            self.now += self.per_point_s
            on_word({"point": workload})
        on_word({"end": {"run": run, "n_todo": n_todo, "n_left_out": 0}})


def collected(folder: Path, order: Order) -> Collection:
    made = Collection(folder, order, None)
    made.run()
    return made


def begun(folder: Path, **more) -> Order:
    folder.mkdir(exist_ok=True)
    order = Order(settings(**more), QUICK)
    campaign.begin(folder, order.settings)
    return order


def test_a_campaign_keeps_to_its_minutes_and_every_run_repeats_the_same_points(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    order = begun(tmp_path, minutes=2.0)
    collected(tmp_path, order)
    assert fake.now <= 120 and spent_s(tmp_path) == pytest.approx(fake.now, abs=0.2)
    assert [name for name, _ in fake.stages] == ["describe", "calibrate", "run 0", "run 1", "run 2"]
    points = store.points(tmp_path)
    per_run = {run: {p["workload"] for p in points if p["run"] == run} for run in range(3)}
    assert per_run[0] and per_run[1] <= per_run[0] and per_run[2] <= per_run[0]
    assert len(per_run[1]) >= 0.9 * len(per_run[0]) and len(per_run[2]) >= 0.9 * len(per_run[0])
    assert {line["workload"] for line in store.read_workloads(tmp_path)} == per_run[0]
    found = store.read_capture(tmp_path)
    assert found["n_workloads"] == len(per_run[0])
    assert all(run["n_todo"] == found["n_planned"] - len(per_run[0]) for run in found["runs"][:1])
    store.unpack_plan(tmp_path)
    planned = [line["workload"] for line in store.read_workloads(tmp_path)]
    assert per_run[0] == set(planned[: len(per_run[0])])  # the most telling ones


def test_time_that_quick_later_runs_leave_buys_further_points(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)

    def slow_at_first(stage, on_word):
        fake.per_point_s = 2.0 if stage.arguments[:2] == ["run", "0"] else 0.5
        fake.run(stage, on_word)

    order = begun(tmp_path, minutes=4.0)
    monkeypatch.setattr(campaign, "run_stage", slow_at_first)
    collected(tmp_path, order)
    assert [name for name, _ in fake.stages].count("run 0") > 1 and fake.now <= 240
    points = store.points(tmp_path)
    per_run = {run: {p["workload"] for p in points if p["run"] == run} for run in range(3)}
    assert len(points) == len({(p["workload"], p["run"]) for p in points})
    assert per_run[1] == per_run[0] == per_run[2]
    assert [record["run"] for record in store.read_capture(tmp_path)["runs"]] == [0, 1, 2]


def test_a_plan_is_packed_and_comes_back_whole(tmp_path):
    begun(tmp_path)
    lines = [{"workload": name, "op": "made up"} for name in "abcd"]
    store.write_workloads(tmp_path, lines)
    point = {"workload": "c", "run": 0, "times_ns": [1]}
    store.append(tmp_path, store.OBSERVATIONS, point)
    store.append(tmp_path, store.LEFT_OUT, {"workload": "a", "run": 0, "reason": "made up"})
    store.pack_plan(tmp_path)
    assert store.read_workloads(tmp_path) == [lines[0], lines[2]]
    assert {key: store.read_capture(tmp_path)[key] for key in ("n_workloads", "n_planned")} == {
        "n_workloads": 2, "n_planned": 4,
    }  # fmt: skip
    packed = (tmp_path / store.PLAN).read_bytes()
    store.unpack_plan(tmp_path)
    assert store.read_workloads(tmp_path) == lines and store.read_capture(tmp_path)["n_workloads"] == 4
    store.pack_plan(tmp_path)
    assert (tmp_path / store.PLAN).read_bytes() == packed
    for name in "bd":
        store.append(tmp_path, store.OBSERVATIONS, {**point, "workload": name})
    store.unpack_plan(tmp_path)
    store.pack_plan(tmp_path)  # all was tried: the plan stays as it is
    assert store.read_workloads(tmp_path) == lines
    (tmp_path / store.PLAN).write_bytes(packed[:20])
    with pytest.raises(InputError, match=r"plan\.jsonl\.gz cannot be read"):
        store.unpack_plan(tmp_path)


def test_time_that_was_spent_before_a_kill_counts(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    order = begun(tmp_path, minutes=2.0)

    def killed(stage, on_word):
        fake.run(stage, on_word)
        if stage.arguments[0] == "run":
            raise KeyboardInterrupt

    monkeypatch.setattr(campaign, "run_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path, order)
    spent = spent_s(tmp_path)
    assert spent == pytest.approx(fake.now, abs=0.2)
    monkeypatch.setattr(campaign, "run_stage", fake.run)
    again = Collection(tmp_path, order, None)
    assert again.left_s == pytest.approx(120 - spent, abs=0.2)
    before = fake.now
    again.run()
    assert fake.now - before <= 120 - spent and "calibrate" not in [name for name, _ in fake.stages[3:]]


def test_a_kill_9_leaves_the_journal_to_tell_what_was_spent(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    begun(tmp_path)
    since = store.read_capture(tmp_path)["spent_until"]
    line = {"workload": "a", "run": 0, "times_ns": [1], "took_s": 7.5}
    store.append(tmp_path, store.OBSERVATIONS, {**line, "started": since + 3})
    store.append(tmp_path, store.OBSERVATIONS, {**line, "run": 1, "started": since - 30})  # counted by its stage
    assert fake.now == 0 and spent_s(tmp_path) == 7.5


def test_a_finished_campaign_does_nothing_and_more_minutes_go_on(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    order = begun(tmp_path, minutes=2.0)
    collected(tmp_path, order)
    n_stages, n_points = len(fake.stages), len(store.points(tmp_path))
    _reopen(tmp_path, order.settings)
    collected(tmp_path, order)
    assert len(fake.stages) == n_stages and len(store.points(tmp_path)) == n_points
    more = Order(settings(minutes=4.0), QUICK)
    campaign.refuse_other(tmp_path, more.settings)
    _reopen(tmp_path, more.settings)
    collected(tmp_path, more)
    points = store.points(tmp_path)
    assert len(points) > n_points and fake.now <= 240
    assert len({(p["workload"], p["run"]) for p in points}) == len(points)
    assert len(store.read_capture(tmp_path)["runs"]) == 3


def test_a_plan_that_is_done_early_ends_early(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch, per_point_s=0.01)
    order = begun(tmp_path, minutes=60.0)
    collected(tmp_path, order)
    n_planned = store.read_capture(tmp_path)["n_workloads"]
    assert len(store.points(tmp_path)) == 3 * n_planned and fake.now < 60


def test_the_summary_says_points_runs_and_error(tmp_path, monkeypatch, capsys):
    FakeProcesses(monkeypatch, per_point_s=0.01)
    order = begun(tmp_path, minutes=60.0)
    collected(tmp_path, order)
    said = capsys.readouterr().err
    n = store.read_capture(tmp_path)["n_workloads"]
    assert f"{3 * n} points of {n} workloads in 3 runs, 0 calibration measurements" in said
    # times 5, 5, 6: mean deviation 1/3, sigma 1.2533/3, median's error 1.2533 x that / sqrt(3), over 5
    assert "relative error of a point: median 6.0%" in said


def test_nsys_that_is_missing_costs_one_sentence(tmp_path, monkeypatch, capsys):
    FakeProcesses(monkeypatch, per_point_s=0.01)
    order = begun(tmp_path, minutes=60.0, nsys=True)

    def missing(folder, stage):
        raise InputError("nsys is not on the PATH")

    monkeypatch.setattr(campaign.nsys, "collect", missing)
    collected(tmp_path, order)
    assert capsys.readouterr().err.count("no Nsight Systems profile: nsys is not on the PATH") == 1
    assert len(store.points(tmp_path)) == 3 * store.read_capture(tmp_path)["n_workloads"]


def test_a_campaign_without_a_point_is_an_error(tmp_path, monkeypatch):
    FakeProcesses(monkeypatch, per_point_s=1e6)
    order = begun(tmp_path, minutes=2.0)
    with pytest.raises(StageError, match="no point was measured"):
        collected(tmp_path, order)


def test_other_options_are_refused_and_a_failed_stage_is_an_error(tmp_path, monkeypatch):
    order = begun(tmp_path)
    with pytest.raises(InputError, match="holds another plan \\(seed was 0 and is 5\\)"):
        campaign.refuse_other(tmp_path, {**order.settings, "seed": 5})
    campaign.refuse_other(tmp_path, {**order.settings, "minutes": 1.0, "runs": 9, "nsys": True})

    def fails(stage, on_word):
        raise StageError(9)

    monkeypatch.setattr(campaign, "run_stage", fails)
    with pytest.raises(StageError):
        collected(tmp_path, order)


def test_calibration_goes_on_where_time_had_cut_it(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    order = begun(tmp_path, minutes=4.0)
    line = {"probe": "made up", "params": {}, "run": 0, "value": 1.0, "quantity": None, "took_s": 30.0, "started": 0}
    store.append(tmp_path, store.CALIBRATION, line)  # measured before a kill
    collected(tmp_path, order)
    assert dict(fake.stages)["calibrate"] == pytest.approx(0.3 * 240 - 30)
    more = Order(settings(minutes=8.0), QUICK)
    _reopen(tmp_path, more.settings)
    fake.stages.clear()
    collected(tmp_path, more)
    assert dict(fake.stages)["calibrate"] == pytest.approx(0.3 * 480 - 30)


@pytest.mark.parametrize("lost", ["calibrate", "profile"])
def test_a_campaign_outlives_what_others_do_not_need(tmp_path, monkeypatch, capsys, lost):
    fake = FakeProcesses(monkeypatch)
    order = begun(tmp_path, minutes=2.0)

    def fails(stage, on_word):
        if stage.arguments[0] == lost:
            raise StageError(1, "a measuring process was ended by signal SIGSEGV")
        fake.run(stage, on_word)

    monkeypatch.setattr(campaign, "run_stage", fails)
    monkeypatch.setattr(campaign, "profiles_missing", lambda folder: ["made up"])
    collected(tmp_path, order)
    assert {p["run"] for p in store.points(tmp_path)} == {0, 1, 2}
    assert "ended early: a measuring process was ended by signal SIGSEGV" in capsys.readouterr().err


def test_profiles_between_runs_leave_time_for_the_repeats(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    monkeypatch.setattr(campaign, "profiles_missing", lambda folder: ["made up"])
    collected(tmp_path, begun(tmp_path, minutes=8.0))
    names = [name for name, _ in fake.stages]
    assert names == ["describe", "calibrate", "run 0", "profile", "run 1", "run 2", "profile"]
    assert fake.stages[3][1] == pytest.approx(0.15 * 480)


def test_a_capture_that_another_command_began_meanwhile_is_kept(tmp_path, monkeypatch):
    def lock(folder, wait_s):
        campaign.begin(folder, settings(seed=5))

    monkeypatch.setattr(store, "lock", lock)
    with pytest.raises(InputError, match="seed was 5 and is 0"):
        campaign.collect(tmp_path / "new", Order(settings(), QUICK))
    assert store.read_capture(tmp_path / "new")["settings"]["seed"] == 5


def test_loading_counts_as_spent(tmp_path, monkeypatch):
    fake = FakeProcesses(monkeypatch)
    order = begun(tmp_path, minutes=2.0)
    fake.now = 100.0
    assert Collection(tmp_path, dataclasses.replace(order, started=85.0), None).left_s == pytest.approx(105.0)


# --- for real ---


@pytest.fixture(scope="module")
def capture(tmp_path_factory) -> Path:
    """A quick campaign of this machine, killed with SIGKILL while it measures and continued by the same command."""
    pytest.importorskip("torch", reason="torch is not installed")
    folder = tmp_path_factory.mktemp("campaign") / "here"
    command, at_kill = killed_while_measuring(folder, ["campaign", *TINY], n_points=4)
    calibrated = (folder / store.CALIBRATION).read_bytes()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / store.OBSERVATIONS).read_bytes().startswith(at_kill)  # nothing measured was lost
    assert (folder / store.CALIBRATION).read_bytes() == calibrated  # nor measured again
    assert "relative error of a point" in done.stderr and "Traceback" not in done.stderr
    return folder


def test_a_killed_campaign_continues_and_measures_nothing_twice(capture):
    planned = [line["workload"] for line in store.read_workloads(capture)]
    seen = Counter((p["workload"], p["run"]) for p in store.points(capture))
    assert set(seen.values()) == {1} and {w for w, _ in seen} <= set(planned)
    left_out = {entry.get("workload") for entry in store.left_out(capture)}
    if store.read_capture(capture)["runs"][0]["n_todo"] == 0:
        assert {w for w, _ in seen} | left_out >= set(planned)
    calibrated = Counter((key(line), line["run"]) for line in store.calibrations(capture))
    assert calibrated and set(calibrated.values()) == {1}


def test_a_campaign_says_what_it_found_and_spent(capture):
    found = store.read_capture(capture)
    assert found["settings"]["kind"] == "campaign" and found["kernel"] and found["capabilities"] is not None
    assert {"fp32_gemm_flops_per_s", "memory_stream_bytes_per_s", "call_overhead_ns"} <= set(found["calibration"])
    assert 0 < found["spent_s"] < 1.5 * 60 * found["settings"]["minutes"]
    studies = {line["study"] for line in store.read_workloads(capture)}
    assert {"tokens", "rows", "one-expert", "layer"} <= studies
    assert any((capture / store.PROFILES).glob("*.trace.json.gz"))
    for point in store.points(capture):
        assert point["took_s"] >= 0 and len(point["times_ns"]) >= 5 and min(point["times_ns"]) > 0


def test_the_plan_is_printed_without_torch_and_without_a_folder(tmp_path):
    script = """
import sys
sys.modules["torch"] = None
from collectors import cli
import importlib.util
importlib.util.find_spec = lambda name, real=importlib.util.find_spec: None if name == "torch" else real(name)
assert cli.main(["campaign", "--plan", "--device", "cuda"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "workloads are planned" in done.stdout and "zero-copy (mapped)" in done.stdout


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def is_available():
        warnings.warn("the driver is too old\nmade up", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(cli, "DEVICE_FILES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cli._device("auto", False) == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(InputError, match=r"cannot use the GPU of this machine \(the driver is too old\); --device cpu"):
        cli._device("auto", False)
    assert cli._device("auto", True) == cli._device("cpu", False) == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli._device("auto", False) == "cpu"


def test_a_plan_that_nobody_reads_to_its_end_is_no_traceback():
    command = [sys.executable, "-m", "collectors", "campaign", "--plan", "--device", "cpu", "--preset", "quick"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, cwd=REPO, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("campaign",), "--out is missing"),
        (("campaign", "--out", "x", "--minutes", "0"), "--minutes is '0', expected 0.2 to"),
        (("campaign", "--out", "x", "--minutes", "nan"), "--minutes is 'nan', expected 0.2 to"),
        (("campaign", "--out", "x", "--preset", "huge"), "invalid choice: 'huge'"),
        (("campaign", "--out", "x", "--dtype", "float64"), "unknown dtype 'float64'"),
        (("campaign", "--plan", "--routing-file", "/none.npy"), "no routing file"),
        (("campaign", "--plan", "--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, sentence, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err
    assert code == 2
    assert sentence in said and said.count("\n") == 1 and "Traceback" not in said


def test_interrupt_says_how_to_continue(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    folder = tmp_path / "x"
    command = [sys.executable, "-m", "collectors", "campaign", "--out", str(folder), *TINY]
    running = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
    give_up = time.monotonic() + 30
    while not (folder / store.CAPTURE).exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(running.pid, signal.SIGINT)  # what a terminal does
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command continues" in said and "Traceback" not in said
