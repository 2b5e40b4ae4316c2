"""The collectors: what is planned, what is stored, what survives a kill, what is measured, and what never leaves."""

import dataclasses
import getpass
import gzip
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from collectors import machine, plan, store, timing, workloads
from collectors.profile_points import chosen_points, file_name
from collectors.progress import Progress
from collectors.timing import Limits, measure
from perfmodel.errors import InputError
from perfmodel.hardware import QUANTITIES
from tests.conftest import ROOT
from tests.killed import killed_while_measuring

REPO = Path(__file__).parent.parent
FULL = plan.Request("cpu", "float32", plan.CPU_SHAPES, plan.CPU_TOKENS)
TINY = ("--shapes", "olmoe/32,mixtral-8x7b/64", "--tokens", "1,8", "--quick", "--threads", "1")


def collect(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "collectors", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done


def points_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / store.OBSERVATIONS).read_text().splitlines()]


# --- the plan (no torch) ---


def test_plan_is_the_same_every_time_and_ids_are_content():
    first, second = plan.plan(FULL, None).workloads, plan.plan(FULL, None).workloads
    assert first == second
    assert len({w.id for w in first}) == len(first)
    assert 300 <= len(first) <= 380
    assert dataclasses.replace(first[0], seed=1).id != first[0].id
    # Golden: an id that changes makes every older capture a stranger.
    line = json.loads(json.dumps(first[0].to_line()))
    assert line["workload"] == "2db876fda2ca"
    assert (line["op"], line["shape"], line["n_tokens"]) == ("grouped_gemm", "mixtral-8x7b/8", 1)


def test_every_workload_routes_tokens_times_top_k():
    for w in plan.plan(FULL, None).workloads:
        assert sum(w.tokens_per_expert) == w.n_tokens * w.top_k
        assert len(w.tokens_per_expert) == w.n_experts
        assert max(w.tokens_per_expert) <= w.n_tokens


def test_operations_of_a_batch_share_their_counts():
    counts = {}
    for w in plan.plan(FULL, None).workloads:
        counts.setdefault((w.shape, w.n_tokens, w.routing), set()).add(w.tokens_per_expert)
    assert all(len(found) == 1 for found in counts.values())


@pytest.mark.parametrize("name", plan.CPU_SHAPES)
def test_scaled_shapes_keep_the_character_of_the_model(name):
    shape, model = workloads.scaled_shape(name, "fp32"), workloads.scaled_shape(name.partition("/")[0], "fp32")
    assert (shape.n_experts, shape.top_k, shape.n_gemms) == (model.n_experts, model.top_k, model.n_gemms)
    assert shape.hidden % 16 == shape.inter % 16 == 0
    assert shape.hidden / shape.inter == pytest.approx(model.hidden / model.inter, rel=0.05)
    assert 15e6 < shape.layer_bytes < 360e6


def test_run_orders_are_permutations_that_differ():
    workloads = plan.plan(FULL, None).workloads
    first, second = plan.run_order(workloads, 0, 0), plan.run_order(workloads, 0, 1)
    assert first != second and first == plan.run_order(workloads, 0, 0)
    assert Counter(first) == Counter(second) == Counter(workloads)


def test_rotation_reads_enough_other_weights_and_never_more_copies_than_there_are():
    cold_bytes = 128 * 2**20
    for w in plan.plan(FULL, None).workloads:
        n_copies, n_shifts = workloads.rotation(w, cold_bytes, max_copies=1000)
        assert (n_copies * n_shifts - 1) * w.touched_bytes >= cold_bytes or w.touched_bytes >= 2 * cold_bytes
        step = w.n_experts // n_shifts
        assert n_shifts == 1 or step >= workloads.span(w.tokens_per_expert)  # shifted experts are fresh ones
        assert workloads.rotation(w, cold_bytes, max_copies=1)[0] == 1


def test_span_goes_around_the_circle():
    assert workloads.span([1, 0, 0, 0, 2]) == 2
    assert workloads.span([0, 1, 0, 1, 0]) == 3
    assert workloads.span([1, 1, 1]) == 3
    assert workloads.span([0, 0]) == 0


def test_what_does_not_fit_is_left_out_with_a_sentence():
    small = plan.plan(FULL, 100e6)
    assert small.workloads and small.skipped
    assert all(w.moe_shape.layer_bytes <= 100e6 for w in small.workloads)
    with pytest.raises(InputError, match="nothing to measure"):
        plan.plan(FULL, 1.0)


def test_routing_file_joins_the_shapes_of_its_size(tmp_path):
    counts = np.arange(1, 65)[None, :]
    np.savez(tmp_path / "seen.npz", layer=counts)
    request = dataclasses.replace(FULL, tokens=(16,), routing_files=(f"{tmp_path / 'seen.npz'}#layer",))
    found = [w for w in plan.plan(request, None).workloads if w.routing.startswith("file:")]
    assert {w.shape for w in found} == {"olmoe/4"}
    assert {w.routing for w in found} == {"file:seen.npz#layer"}
    with pytest.raises(InputError, match="64 experts"):
        plan.plan(dataclasses.replace(request, shapes=("mixtral-8x7b/8",)), None)


def test_cuda_plan_takes_real_shapes_and_needs_no_cuda():
    request = plan.Request("cuda", "bfloat16", plan.default_shapes("cuda", False), plan.default_tokens("cuda", False))
    found = plan.plan(dataclasses.replace(request, tokens=(64,)), 80e9).workloads
    assert {w.device for w in found} == {"cuda"} and {w.dtype for w in found} == {"bf16"}
    assert any(w.hidden == 7168 for w in found) and not any(w.shape == "poster" for w in found)


# --- timing and progress on false clocks ---


class Fake:
    """A clock of which every call of the work takes the next of some times."""

    def __init__(self, *times_ns):
        self.times_ns, self.now, self.calls = list(times_ns), 0.0, []

    def call(self, number):
        self.calls.append(number)
        self.now += self.times_ns[min(len(self.calls), len(self.times_ns)) - 1]

    def clock(self, work):
        before = self.now
        work()
        return self.now - before


def test_steady_work_stops_at_the_least_repeats_and_counts_calls_through():
    fake = Fake(100.0)
    times = measure(fake.call, fake.clock, Limits(min_repeat_ns=1000, point_ns=10**9))
    assert times == [100.0] * 5
    assert fake.calls == list(range(1 + 10 + 5 * 10))  # warm-ups, then five batches of ten; each call rotates on


def test_noisy_work_takes_more_repeats_and_long_work_stops_at_its_cap():
    noisy = [10.0, 20.0] * 50
    assert len(measure((f := Fake(10, *noisy)).call, f.clock, Limits(1, 10**9))) == 7
    assert len(measure((f := Fake(10, *noisy)).call, f.clock, Limits(1, 30))) == 5


def test_the_least_disturbed_attempt_is_kept(monkeypatch):
    def tried(*busy_s, patience_s=100.0):
        """Attempts of one second each; `busy_s` is what the others used before and after each, and in each look."""
        now, busy, attempts = [0.0], iter(busy_s), iter([[1.0], [2.0], [3.0]])
        monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(timing.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

        def attempt():
            now[0] += 1.0
            return next(attempts)

        return timing.measure_undisturbed(attempt, lambda: next(busy), 3, patience_s)

    assert tried(0, 0.1) == ([1.0], False, 0.0)
    assert tried(None, None) == ([1.0], False, 0.0)
    assert tried(0, 0.9, patience_s=0.0) == ([1.0], True, 0.0)
    # Disturbed, then one busy look, then a quiet one, then an attempt in peace.
    assert tried(0, 0.9, 1, 1.5, 1.5, 1.5, 2, 2.1) == ([2.0], False, 1.0)
    assert tried(0, 0.9, 1, 1, 1, 1.5, 2, 2, 2, 2.8) == ([2.0], True, 1.0)


def test_progress_says_done_total_elapsed_and_left():
    progress = Progress(n_total=100, n_before=40, n_done=30, started=time.monotonic() - 60)
    assert progress.line("run 1 of 1") == "run 1 of 1: 70/100 points, 1:00 elapsed, about 1:00 left"


# --- the store ---


def test_half_written_last_line_is_cut_off_and_the_rest_kept(tmp_path):
    point = {"workload": "a" * 12, "run": 0, "times_ns": [1], "started": 2, "order": 0}
    store.append(tmp_path, store.OBSERVATIONS, point)
    with (tmp_path / store.OBSERVATIONS).open("a") as file:
        file.write('{"workload":"bbb')
    assert store.points(tmp_path) == [point]
    store.append(tmp_path, store.OBSERVATIONS, {**point, "order": 1})
    assert [p["order"] for p in points_of(tmp_path)] == [0, 1]


def test_broken_line_in_the_middle_is_refused_by_number(tmp_path):
    (tmp_path / store.OBSERVATIONS).write_text('{"workload":"a","run":0,"times_ns":[1]}\nnonsense\n{}\n')
    with pytest.raises(InputError, match="line 2"):
        store.points(tmp_path)


def test_capture_is_replaced_whole(tmp_path):
    store.write_capture(tmp_path, {"schema": 1, "runs": []})
    assert store.update_capture(tmp_path, runs=[1])["runs"] == [1]
    assert [p.name for p in tmp_path.iterdir()] == [store.CAPTURE]


def test_two_writers_are_kept_apart(tmp_path):
    held = store.lock(tmp_path)
    if held is None:
        pytest.skip("no file locks here")
    with pytest.raises(InputError, match="another sweep"):
        store.lock(tmp_path, wait_s=0.0)
    os.close(held)
    os.close(store.lock(tmp_path, wait_s=0.0))


# --- imports and identity ---


def test_planning_and_storing_load_no_torch_and_nothing_loads_polars():
    code = """
import sys
import collectors.cli, collectors.plan, collectors.store, collectors.machine, collectors.campaign
assert collectors.cli.main(["sweep", "--plan", "--quick"]) == 0
heavy = {"torch", "polars", "sklearn", "scipy", "msgspec", "typer", "plotly", "streamlit"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "68 workloads" in done.stdout


def test_no_collector_names_a_package_it_may_not_need():
    for file in (REPO / "collectors").glob("*.py"):
        for line in file.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in {"polars", "sklearn", "scipy", "msgspec", "typer", "app"}, line


def test_machine_says_what_it_is_and_not_whose():
    found = machine.machine(1)
    assert found["n_cores"] >= 1
    assert not identities() & set(json.dumps(found).split('"'))


def identities() -> set[str]:
    return {socket.gethostname(), getpass.getuser(), str(Path.home()), str(REPO)} - {"", "/"}


# --- the command ---

CLAIMS = [
    (("sweep",), "--out is missing"),
    (("sweep", "--out", "x", "--device", "tpu"), "invalid choice: 'tpu'"),
    (("sweep", "--out", "x", "--dtype", "float8"), "invalid choice: 'float8'"),
    (("expert-parallel", "--plan", "--chunks", "0"), "a number of pieces is '0', expected a whole number from 1"),
    (("sweep", "--out", "x", "--runs", "0"), "--runs is '0', expected a whole number from 1"),
    (("sweep", "--out", "x", "--tokens", "4,zero"), "a number of tokens is 'zero'"),
    (("sweep", "--out", "x", "--routings", "zeta"), "unknown routing 'zeta'"),
    (("sweep", "--out", "x", "--seed", "-1"), "expected a whole number"),
    (("sweep", "--plan", "--shapes", "gpt-9/4"), "unknown shape 'gpt-9'"),
    (("sweep", "--plan", "--shapes", "olmoe/0"), "divisor is '0'"),
    (("sweep", "--plan", "--routing-file", "/none.npy"), "no routing file"),
]


@pytest.mark.parametrize(("arguments", "sentence"), CLAIMS)
def test_bad_input_is_one_sentence_and_code_2(arguments, sentence, capsys):
    from collectors.cli import main

    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr().err
    assert code == 2
    assert sentence in said and said.count("\n") == 1 and "Traceback" not in said


def test_help_is_short_and_quick():
    assert "--routing-file" in collect("sweep", "--help").stdout


def test_missing_torch_names_the_install(monkeypatch, capsys, tmp_path):
    from collectors import cli

    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["sweep", "--out", str(tmp_path / "x")]) == 3
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_out_must_be_a_folder_of_a_capture(tmp_path):
    from collectors.campaign import open_folder

    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        open_folder(tmp_path / "file")
    with pytest.raises(InputError, match="holds 'file' and no capture"):
        open_folder(tmp_path)
    assert open_folder(tmp_path / "new") is False and (tmp_path / "new").is_dir()


def test_cuda_without_a_device_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "finds no CUDA device" in collect("sweep", "--out", str(tmp_path / "x"), "--device", "cuda", expect=2).stderr


# --- the layer ---


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("routing", ["uniform", "power-law:1.2"])
def test_layer_and_grouped_gemm_equal_their_slow_twins(dtype, routing):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from collectors import points

    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    request = plan.Request("cpu", name, ("olmoe/32", "mixtral-8x7b/64"), (9,), (routing,))
    planned = plan.plan(request, None).workloads
    with torch.inference_mode():
        pool = points.make_pool(workloads.pool_bytes(planned, 1e6, 1e9), 1e6, dtype, "cpu", 0)
        for w in planned:
            points.check(pool, w, None)
            call = points.prepare(pool, w, None, run=0).call
            rows = w.n_tokens if w.op == "moe_layer" else w.n_tokens * w.top_k
            for number in range(3):
                out = call(number)
                assert out.shape == (rows, w.gemm_n or w.hidden) and bool(out.isfinite().all())


def test_a_wrong_layer_is_not_timed(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from collectors import points

    w = plan.plan(plan.Request("cpu", "float32", ("olmoe/32",), (4,)), None).workloads[0]
    monkeypatch.setattr(points, "grouped_mm", lambda rows, weights, offs: rows.new_zeros(len(rows), weights.shape[1]))
    pool = points.make_pool(int(w.moe_shape.layer_bytes), 0.0, "fp32", "cpu", 0)
    with torch.inference_mode(), pytest.raises(InputError, match="differs from the slow reference"):
        points.check(pool, w, None)


def test_loop_of_mm_is_the_same_grouped_gemm():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from collectors.layer import loop_mm, slow_grouped_mm

    rows, weights = torch.randn(7, 16), torch.randn(3, 32, 16)
    offs = torch.tensor([3, 3, 7], dtype=torch.int32)
    assert torch.allclose(loop_mm(rows, weights.transpose(1, 2), offs), slow_grouped_mm(rows, weights, offs), atol=1e-5)


# --- a whole sweep ---


@pytest.fixture(scope="module")
def capture(tmp_path_factory) -> Path:
    """A tiny capture of two runs, killed in the middle of its first run and continued."""
    pytest.importorskip("torch", reason="torch is not installed")
    folder = tmp_path_factory.mktemp("captures") / "tiny"
    _, at_kill = killed_while_measuring(folder, ["sweep", *TINY, "--runs", "2"], n_points=3)
    done = collect("sweep", "--out", str(folder), *TINY, "--runs", "2")
    assert (folder / store.OBSERVATIONS).read_bytes().startswith(at_kill)  # nothing measured was lost
    assert "Traceback" not in done.stderr
    return folder


def test_a_killed_sweep_continues_and_measures_nothing_twice(capture):
    planned = [line["workload"] for line in store.read_workloads(capture)]
    seen = Counter((p["workload"], p["run"]) for p in points_of(capture))
    assert seen == Counter((w, run) for w in planned for run in (0, 1))
    for point in points_of(capture):
        assert 5 <= len(point["times_ns"]) <= 7
        assert all(isinstance(t, int) and t > 0 for t in point["times_ns"])
    orders = [[p["workload"] for p in points_of(capture) if p["run"] == run] for run in (0, 1)]
    assert orders[0] != orders[1]


def test_capture_holds_what_the_page_says(capture):
    found = store.read_capture(capture)
    assert found["n_workloads"] == len([line["workload"] for line in store.read_workloads(capture)])
    assert found["kernel"] in {"torch.nn.functional.grouped_mm", "torch._grouped_mm", "loop of mm"}
    assert [run["run"] for run in found["runs"]] == [0, 1]
    for run in found["runs"]:
        assert (run["n_left_out"], run["n_todo"]) == (0, 0)
    assert {line["run"] for line in store.calibrations(capture)} == {0}  # a quick sweep calibrates once
    assert {"fp32_gemm_flops_per_s", "memory_stream_bytes_per_s", "call_overhead_ns"} <= set(found["calibration"])
    for name, number in found["calibration"].items():
        assert name in QUANTITIES
        assert number["value"] > 0 and number["spread_frac"] >= 0 and number["n"] >= 1 and number["how"]


def test_ids_in_the_file_are_hashes_of_their_lines(capture):
    request = plan.Request("cpu", "float32", ("olmoe/32", "mixtral-8x7b/64"), (1, 8))
    again = [json.loads(json.dumps(w.to_line())) for w in plan.plan(request, None).workloads]
    assert [json.loads(line) for line in (capture / store.WORKLOADS).read_text().splitlines()] == again


def test_a_finished_sweep_has_nothing_left_to_do_and_more_runs_can_follow(capture):
    before = (capture / store.OBSERVATIONS).read_bytes()
    collect("sweep", "--out", str(capture), *TINY)  # fewer runs than there are
    assert (capture / store.OBSERVATIONS).read_bytes() == before


def test_another_plan_and_another_machine_are_refused(capture, tmp_path):
    said = collect("sweep", "--out", str(capture), *TINY, "--seed", "1", expect=2).stderr
    assert "holds another plan (seed was 0 and is 1)" in said and said.count("\n") == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in (store.WORKLOADS, store.OBSERVATIONS):
        (elsewhere / file).write_bytes((capture / file).read_bytes())
    found = store.read_capture(capture)
    store.write_capture(elsewhere, {**found, "machine": {**found["machine"], "cpu_model": "another"}})
    assert "two machines" in collect("sweep", "--out", str(elsewhere), *TINY, "--runs", "2", expect=2).stderr


def test_profiles_hold_named_ranges_and_counts(capture):
    request = plan.Request("cpu", "float32", ("olmoe/32", "mixtral-8x7b/64"), (1, 8))
    points = chosen_points(plan.plan(request, None).workloads)
    assert {p.name for p in (capture / store.PROFILES).iterdir()} == {file_name(w) for w in points}
    for w in points:
        trace = json.loads(gzip.decompress((capture / store.PROFILES / file_name(w)).read_bytes()))
        names = Counter(e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation")
        outer = f"perfmodel::moe_layer|shape={w.shape}|tokens={w.n_tokens}|routing={w.routing}"
        assert names[outer] == 2
        for part in ("router", "dispatch", "gate_up", "activation", "down", "combine"):
            assert names[f"perfmodel::{part}"] == 2
        assert trace["perfmodel"]["tokens_per_expert"] == list(w.tokens_per_expert)
        assert "host_name" not in trace and "traceName" not in trace
        assert any("Input Dims" in e.get("args", {}) for e in trace["traceEvents"])


def test_no_identity_in_any_file(capture):
    for file in (p for p in capture.rglob("*") if p.is_file()):
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
        for word in identities() | {str(capture), "/tmp/"}:
            assert f'"{word}"' not in text, (file.name, word)
        for folder in (str(REPO), str(capture), *({str(Path.home())} - {"/"})):
            assert folder not in text, (file.name, folder)
        assert ".part" not in file.name


@pytest.mark.gpu
def test_a_tiny_sweep_on_cuda(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shapes = ("--shapes", "olmoe/4,mixtral-8x7b/8", "--tokens", "1,64", "--quick")
    folder = tmp_path / "x"
    collect("sweep", "--out", str(folder), "--device", "cuda", *shapes)
    found = store.read_capture(folder)
    assert found["machine"]["gpu_name"] and "link_h2d_copy_bytes_per_s" in found["calibration"]
    assert len(points_of(folder)) == found["n_workloads"]
    assert all(statistics.median(p["times_ns"]) > 0 for p in points_of(folder))


def test_a_plan_that_cannot_be_leaves_no_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "collectors", "sweep", "--out", str(tmp_path / "made"), "--shapes", "nosuch"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nosuch" in done.stderr
    assert not (tmp_path / "made").exists()
