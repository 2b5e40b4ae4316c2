"""The CUDA path of a campaign on a made-up device that computes: nothing crosses devices, nothing is lost or twice.

Times are those of a CPU and mean nothing, so what the check of captures finds in their physics does not count here.
"""

import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from collectors import cli, design, gpu, modes, nsys, points, store, studies
from collectors.alias import check_alias, device_alias
from collectors.calibration import key
from collectors.mapped import tensor_at
from perfmodel.capture import load_capture
from perfmodel.plausible import check_capture
from tests import pretend_campaign, pretend_cuda

OPTIONS = ("--device", "cuda", "--preset", "quick", "--minutes", "8", "--threads", "1")
FEW = ("layer",)  # studies that have every way and both launches in few points


@pytest.fixture
def device(monkeypatch):
    with pretend_cuda.installed(monkeypatch) as made:
        yield made


@pytest.fixture
def processes(monkeypatch, device):
    pretend_campaign.shrink(monkeypatch)
    monkeypatch.setattr(design, "STUDIES", {name: studies.STUDIES[name] for name in FEW})
    return pretend_campaign.Processes(device).install(monkeypatch)


def counted(folder):
    """How often each point and each probe of a run is on disk."""
    seen = Counter((p["workload"], p["run"]) for p in store.points(folder))
    return seen + Counter((key(line), line["run"]) for line in store.calibrations(folder))


def planned(folder):
    return {line["workload"]: line for line in store.read_workloads(folder)}


def reasons(folder, *keys):
    """Reasons of what was left out, of the entries with one of these keys."""
    return [entry["reason"] for entry in store.left_out(folder) if any(k in entry for k in keys)]


def collect(folder, *more):
    cli.STARTED = time.monotonic()  # put back with the processes that are made up
    return cli.main(["campaign", "--out", str(folder), *OPTIONS, *more])


# --- the made-up device itself ---


def test_devices_are_kept_apart(device):
    here, there = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
    assert there.is_cuda and there.device == torch.device("cuda:0") and not here.is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        _ = here + there
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, here])
    assert (there + torch.tensor(1.0)).is_cuda  # a number may come from the host
    assert not (there.cpu() + here).is_cuda and here.to("cuda").is_cuda and here.cuda()[0].is_cuda
    there.copy_(here * 5)
    assert there.sum().item() == 30 and here.sum().item() == 6
    assert here.to(there).is_cuda and there.to(torch.bfloat16).is_cuda


def test_what_is_mapped_or_pinned_is_seen_in_place(device):
    pinned = torch.empty(4, dtype=torch.float32, pin_memory=True).fill_(1)
    assert pinned[1:].is_pinned() and not torch.ones(4).is_pinned()
    alias = device_alias(pinned)
    check_alias(pinned, alias)
    alias.mul_(3)
    assert alias.is_cuda and pinned.tolist() == [3.0] * 4
    plain = torch.ones(4)
    with pytest.raises(ValueError, match="not registered"):
        tensor_at(plain.data_ptr(), 16)


def test_a_capture_refuses_to_wait_and_replays_what_it_held(device):
    x, graph = torch.ones(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        y.add_(1)
    x.fill_(10)
    assert y.tolist() == [3.0] * 4
    graph.replay()
    assert y.tolist() == [21.0] * 4
    with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.copy_(torch.ones(4))
    unforked = torch.cuda.stream(torch.cuda.Stream())
    with pytest.raises(AssertionError, match="not forked"), torch.cuda.graph(torch.cuda.CUDAGraph()), unforked:
        pass


def test_a_lost_device_stays_lost(device):
    x = torch.ones(4, device="cuda")
    device.is_lost = True
    for call in (lambda: x + 1, torch.cuda.synchronize, torch.cuda.empty_cache, x.cpu):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            call()


@pytest.mark.parametrize("way", points.WAYS)
def test_every_way_works_on_the_made_up_device(device, way):
    reason = points.capability("cuda", way)
    assert (reason is None) == (way != "system") and device.driver.leaks() == []
    assert way != "mapped" or device.driver.n_mapped_ever > 2
    assert way != "graph" or device.n_replays


def test_plain_memory_is_read_in_place_on_a_coherent_machine(monkeypatch):
    with pretend_cuda.installed(monkeypatch, is_coherent=True):
        assert points.capability("cuda", "system") is None


# --- a whole campaign ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A capture of the scaled-down plan, with a routing file, and what its processes left behind."""
    folder = tmp_path_factory.mktemp("whole")
    routing = folder / "measured.npz"
    rng = np.random.default_rng(0)
    np.savez(routing, counts=rng.integers(1, 100, size=(1, 8)))
    out = folder / "capture"
    with pytest.MonkeyPatch.context() as monkeypatch, pretend_cuda.installed(monkeypatch) as device:
        pretend_campaign.shrink(monkeypatch)
        processes = pretend_campaign.Processes(device).install(monkeypatch)
        code = collect(out, "--nsys", "--routing-file", str(routing))
    return out, processes, code


def test_every_study_and_way_is_measured(whole):
    folder, processes, code = whole
    assert code == 0 and [c for c in processes.codes if c[1] != 0] == [] and processes.device.n_mixed == 0
    capture, lines, measured = store.read_capture(folder), planned(folder), store.points(folder)
    assert {way: capture["capabilities"][way] for way in ("mapped", "split", "graph", "fp8")} == dict.fromkeys(
        ("mapped", "split", "graph", "fp8")
    )
    assert "plain system memory" in capture["capabilities"]["system"]
    assert {p["workload"] for p in measured} == set(lines) and set(counted(folder).values()) == {1}
    assert {line["study"] for line in lines.values()} == set(studies.STUDIES)
    ways = {(w["access"], w.get("residency"), w["op"], w.get("launch")) for w in lines.values()}
    for access, residency in (("zero-copy", "mapped"), ("zero-copy", "split"), ("copy", None), ("copy-overlap", None),
                              ("cpu", None)):  # fmt: skip
        of_way = [way for way in ways if way[:2] == (access, residency)]
        assert {way[2] for way in of_way} == {"grouped_gemm", "moe_layer"}
        assert access != "zero-copy" or ("graph" in {way[3] for way in of_way})
    assert {w["dtype"] for w in lines.values()} == {"bf16", "fp8"}
    for point in measured:
        line, facts = lines[point["workload"]], point["facts"]
        assert min(point["times_ns"]) > 0 and facts["n_positions"] >= 1
        assert ("calls_per_graph" in facts) == (line.get("launch") == "graph")
        assert ("n_active_offloaded" in facts) == (line["access"] != "resident")
        if line.get("residency") == "mapped":
            assert facts["granule_bytes"] == processes.device.driver.granule_bytes
        if line["access"] != "resident" and line["op"] == "moe_layer" and line.get("residency") != "mapped":
            assert facts["counts"] == "read back in each call"


def test_buffers_were_used_again(whole):
    folder, _, _ = whole
    launches = [p["facts"].get("n_expert_launches", 0) for p in store.points(folder)]
    assert max(launches) > 3  # residents and more chunks than buffers


def test_only_what_cannot_be_is_left_out(whole):
    folder, _, _ = whole
    assert reasons(folder, "workload") == []
    assert reasons(folder, "probe") == ["this GPU does not read plain system memory through the host's page tables"]
    profiles = reasons(folder, "profile")
    assert profiles and all(reason.startswith("the profiler saw no CUDA kernel; ") for reason in profiles)
    assert all("\n" not in reason for reason in reasons(folder, "workload", "probe", "profile", "capability", "nsys"))


def test_every_number_of_the_machine_is_measured(whole):
    folder, _, _ = whole
    found = store.read_capture(folder)["calibration"]
    expected = [
        "bf16_gemm_flops_per_s",
        "fp8_gemm_flops_per_s",
        "memory_stream_bytes_per_s",
        "memory_copy_bytes_per_s",
        "memory_triad_bytes_per_s",
        "link_h2d_copy_bytes_per_s",
        "link_d2h_copy_bytes_per_s",
        "link_h2d_pageable_bytes_per_s",
        "link_d2h_pageable_bytes_per_s",
        "link_both_copy_bytes_per_s",
        "link_kernel_read_bytes_per_s",
        "launch_overhead_ns",
        "null_kernel_ns",
        "graph_launch_ns",
        "graph_kernel_ns",
        "call_overhead_ns",
        "link_h2d_contended_bytes_per_s",
        "host_capacity_bytes",
        "memory_capacity_bytes",
        "l2_capacity_bytes",
        "n_cores_count",
    ]
    assert [name for name in expected if name not in found] == []


def test_the_capture_is_whole_and_says_who_it_is(whole):
    folder, _, _ = whole
    capture = load_capture(folder)
    assert capture is not None
    wrong = [f for f in check_capture(folder) if f.severity == "error" and f.group != "physics"]
    assert wrong == []


def test_nothing_stays_behind(whole):
    _, processes, _ = whole
    assert processes.leaks == [] and processes.device.pinned == {} and processes.device.driver.leaks() == []


# --- what goes wrong ---


def test_a_point_without_memory_is_left_out_and_the_rest_goes_on(processes, device, tmp_path):
    def on_product(name):
        current, folder = processes.now.get("workload"), tmp_path / "c"
        # Not the first of its kind, which is checked.
        if current and not unlucky and planned(folder)[current]["access"] == "copy" and seen - {current}:
            unlucky.append(current)
        if current and planned(folder)[current]["access"] == "copy":
            seen.add(current)
        if current and current in unlucky:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmade up")

    unlucky, seen = [], set()
    device.before = on_product
    assert collect(tmp_path / "c") == 0
    folder = tmp_path / "c"
    assert reasons(folder, "workload") == ["CUDA out of memory. Tried to allocate 20.00 GiB"]
    assert {p["workload"] for p in store.points(folder)} == set(planned(folder)) - set(unlucky)
    assert ("run", 75) not in processes.codes and processes.leaks == []


def test_a_kind_whose_check_had_no_memory_is_not_timed(processes, device, tmp_path):
    def on_product(name):
        current = processes.now.get("workload")
        if current and not failed and planned(tmp_path / "c")[current]["access"] == "copy":
            failed.append(current)
        if current and current in failed:  # also when memory was given back and it is tried again
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    failed = []
    device.before = on_product
    assert collect(tmp_path / "c") == 0
    lines = planned(tmp_path / "c")
    timed = {lines[p["workload"]]["access"] for p in store.points(tmp_path / "c")}
    assert len(failed) == 1 and timed == {"resident", "zero-copy", "copy-overlap", "cpu"}
    assert all("CUDA out of memory" in reason for reason in reasons(tmp_path / "c", "workload"))


def test_what_computes_wrongly_is_not_timed(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(modes, "_copy", lambda pairs: None)
    assert collect(tmp_path / "c") == 0
    lines = planned(tmp_path / "c")
    timed = {lines[p["workload"]]["access"] for p in store.points(tmp_path / "c")}
    assert timed == {"resident", "zero-copy", "cpu"}
    assert all("differs from" in reason for reason in reasons(tmp_path / "c", "workload"))


@pytest.mark.parametrize("dies_of", [None, 6])
def test_a_lost_device_ends_its_process_and_the_next_goes_on(processes, device, tmp_path, dies_of):
    processes.dies_of = dies_of  # SIGABRT: as torch frees what a lost device held
    unlucky = []

    def on_product(name):
        current = processes.now.get("workload")
        if current and len(unlucky) < 2 and planned(tmp_path / "c")[current]["access"] in ("cpu", "zero-copy"):
            unlucky.append(current)
            device.is_lost = True
            raise RuntimeError(pretend_cuda.STICKY)

    device.before = on_product
    assert collect(tmp_path / "c") == 0
    folder = tmp_path / "c"
    assert [code for stage, code in processes.codes if stage == "run"] == (
        [75, 75, 0] if dies_of is None else [-6, -6, 0]
    )
    assert sorted(e["workload"] for e in store.left_out(folder) if "workload" in e) == sorted(unlucky)
    assert {p["workload"] for p in store.points(folder)} == set(planned(folder)) - set(unlucky)
    assert set(counted(folder).values()) == {1}
    assert all("illegal memory access" in reason for reason in reasons(folder, "workload"))


def test_a_driver_that_runs_out_of_granules_costs_those_points_alone(processes, device, tmp_path):
    def on_begin(word):
        device.driver.most_bytes = (1 << 18) if "workload" in word else (1 << 30)  # four granules in each memory

    processes.on_begin = on_begin
    assert collect(tmp_path / "c") == 0
    lines = planned(tmp_path / "c")
    left = {e["workload"]: e["reason"] for e in store.left_out(tmp_path / "c") if "workload" in e}
    assert left and {lines[w].get("residency") for w in left} == {"mapped"}
    assert all("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY (2)" in reason for reason in left.values())
    assert {p["workload"] for p in store.points(tmp_path / "c")} == set(lines) - set(left) and processes.leaks == []


def test_a_sweep_runs_to_its_end(processes, tmp_path):
    command = ("sweep", "--out", str(tmp_path / "c"), "--device", "cuda", "--quick", "--shapes", "e8-k2-h64-i32")
    assert cli.main([*command, "--tokens", "1,16", "--threads", "1"]) == 0
    assert {p["workload"] for p in store.points(tmp_path / "c")} == set(planned(tmp_path / "c"))
    assert reasons(tmp_path / "c", "workload") == []


def test_a_process_that_leaves_at_once_takes_nothing_apart():
    words = "import atexit\nfrom collectors import cli\natexit.register(print, 'taken apart')\nprint('said')\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{words}cli._leave_at_once(SystemExit(75))"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (75, "said\n", "")


def test_a_device_lost_while_ways_are_tried_costs_that_way_alone(processes, device, tmp_path):
    def on_product(name):
        if processes.now.get("capability") == "mapped":
            device.is_lost = True
            raise RuntimeError(pretend_cuda.STICKY)

    device.before = on_product
    assert collect(tmp_path / "c") == 0
    found = store.read_capture(tmp_path / "c")["capabilities"]
    assert "illegal memory access" in found["mapped"] and found["split"] is None and found["graph"] is None
    assert not any(w.get("residency") == "mapped" for w in planned(tmp_path / "c").values())
    assert [code for stage, code in processes.codes if stage == "describe"] == [75, 0]


def test_a_process_that_dies_leaves_its_point_out(processes, tmp_path):
    died = []

    def on_begin(word):
        if ("workload" in word or "probe" in word) and len(died) < 2 and next(iter(word)) not in died:
            died.append(next(iter(word)))
            raise pretend_campaign.Died(11)

    processes.on_begin = on_begin
    assert collect(tmp_path / "c") == 0
    assert reasons(tmp_path / "c", "probe", "workload").count("was ended by signal SIGSEGV") == 2
    assert set(counted(tmp_path / "c").values()) == {1}
    assert len(store.points(tmp_path / "c")) == len(planned(tmp_path / "c")) - 1


def test_a_kill_at_any_moment_loses_and_repeats_nothing(processes, tmp_path):
    """Folders as a kill would have left them, each with half a line behind, are continued."""
    kept = {}

    def on_begin(word):
        name = next(iter(word))
        seen[name] += 1
        if (name, seen[name]) in (("capability", 3), ("probe", 9), ("workload", 8), ("profile", 1)):
            shutil.copytree(tmp_path / "c", tmp_path / f"{name}{seen[name]}")
            kept[f"{name}{seen[name]}"] = seen[name]

    seen = Counter()
    processes.on_begin = on_begin
    assert collect(tmp_path / "c") == 0
    processes.on_begin = lambda word: None
    assert len(kept) == 4
    for name in kept:
        folder = tmp_path / name
        for journal in (store.OBSERVATIONS, store.CALIBRATION, store.LEFT_OUT):
            with (folder / journal).open("a", encoding="utf-8") as file:
                file.write('{"workload":"half a l')
        before = counted(folder)
        assert collect(folder) == 0
        after = counted(folder)
        assert set(after.values()) == {1} and set(before) <= set(after)
        assert {p["workload"] for p in store.points(folder)} == set(planned(folder))
        assert set(after) == set(counted(tmp_path / "c"))
        assert not [f for f in check_capture(folder) if f.severity == "error" and f.group != "physics"]


def test_an_interrupt_is_one_sentence_and_the_same_command_goes_on(processes, tmp_path, capsys):
    begun = []

    def on_begin(word):
        begun.append(word)
        if sum("workload" in w for w in begun) == 5:
            raise pretend_campaign.Interrupted

    processes.on_begin = on_begin
    assert collect(tmp_path / "c") == 130
    assert capsys.readouterr().err.endswith(f"interrupted; the same command continues {tmp_path / 'c'}\n")
    assert len(store.points(tmp_path / "c")) == 4
    processes.on_begin = lambda word: None
    assert collect(tmp_path / "c") == 0
    assert set(counted(tmp_path / "c").values()) == {1}
    assert {p["workload"] for p in store.points(tmp_path / "c")} == set(planned(tmp_path / "c"))


def test_a_cudnn_that_torch_refuses_is_not_told(monkeypatch):
    def version():
        raise RuntimeError("cuDNN version incompatibility: made up")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    assert gpu.cuda_software()["cudnn"] is None


def test_later_runs_repeat_the_points_and_see_the_machine_drift(processes, tmp_path):
    """The standard preset: calibration again after each run, profiles of batch sizes and of replayed graphs."""
    assert collect(tmp_path / "c", "--preset", "standard", "--dtype", "bfloat16", "--runs", "2") == 0
    folder = tmp_path / "c"
    assert {p["run"] for p in store.points(folder)} == {0, 1} and set(counted(folder).values()) == {1}
    assert len(store.points(folder)) == 2 * len(planned(folder))
    runs = Counter(line["run"] for line in store.calibrations(folder))
    assert set(runs) == {0, 1, 2} and runs[1] == runs[2] > 3
    profiled = {e["profile"] for e in store.left_out(folder) if "profile" in e}
    assert any("graph" in name for name in profiled) and any("copy-overlap" in name for name in profiled)


def test_a_coherent_machine_has_one_more_way(monkeypatch, tmp_path):
    with pretend_cuda.installed(monkeypatch, is_coherent=True) as device:
        pretend_campaign.shrink(monkeypatch)
        monkeypatch.setattr(design, "STUDIES", {name: studies.STUDIES[name] for name in FEW})
        processes = pretend_campaign.Processes(device).install(monkeypatch)
        assert collect(tmp_path / "c", "--dtype", "bfloat16") == 0
        assert reasons(tmp_path / "c", "probe", "workload") == [] and processes.leaks == []
        assert "system" in {w.get("residency") for w in planned(tmp_path / "c").values()}
        assert store.read_capture(tmp_path / "c")["calibration"]["link_system_read_bytes_per_s"]["value"] > 0


def test_under_nsys_the_points_run_and_a_missing_report_is_one_sentence(processes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nsys, "find", lambda: tmp_path / "nsys")
    assert collect(tmp_path / "c", "--nsys", "--dtype", "bfloat16") == 0
    assert ("nsys", 0) in processes.codes and reasons(tmp_path / "c", "nsys") == []
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("no Nsight Systems profile: ")]
    assert len(said) == 1 and "wrote no report" in said[0]
