"""Expert-parallel collections on real processes: what the layer computes, what is recorded, what survives a kill."""

import gzip
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectors import cli, ep_capture, ep_layer, ep_measure, ep_plan, ep_probes, expert_parallel, machine, store
from collectors.ep_ranks import Ranks, clocks, correction_ns, joined, offset_of, own_processors
from collectors.layer import Layer, moe_layer, slow_moe_layer
from perfmodel.errors import InputError
from tests import pretend_cuda
from tests.conftest import ROOT
from tests.gloo_ranks import on_ranks, run_as_ranks

SHAPE = "e8-k2-h32-i16"
BATCH = ("--shapes", SHAPE, "--chunks", "2", "--steps", "2", "--minutes", "0.4", "--threads", "1")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
COMPUTING = ("gate", "permute", "gemm1", "activation", "gemm2", "reduce")


def lines_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- the layer, on real ranks ---


def whole_layer(name: str, n_tokens: int, n_ranks: int) -> tuple[Layer, list[torch.Tensor], list[torch.Tensor]]:
    """All weights of a layer, and the tokens and choices of each rank, the same wherever they are made."""
    shape = ep_plan.scaled_shape(name, "fp32")
    (k1, n1), (k2, n2) = shape.gemms
    made = torch.Generator().manual_seed(1)
    router, up, down, *x = (
        torch.randn(*size, generator=made)
        for size in [
            (shape.n_experts, k1),
            (shape.n_experts, n1, k1),
            (shape.n_experts, n2, k2),
            *[(n_tokens, k1)] * n_ranks,
        ]
    )
    batch = ep_plan.Batch(shape, n_tokens, "power-law:1.5", 1)
    chosen = [torch.from_numpy(ep_plan.chosen_experts(batch, rank, n_ranks, 3, {})) for rank in range(n_ranks)]
    return Layer(router, up / k1**0.5, down / k2**0.5, shape.top_k, is_gated=True), x, chosen


def outputs(ranks, cases):
    """What each case gives on this rank, and how many rows went where, by the exchanges themselves."""
    found = []
    for name, n_tokens, n_chunks in cases:
        layer, x, chosen = whole_layer(name, n_tokens, ranks.size)
        firsts = ep_plan.firsts(layer.router.shape[0], ranks.size)
        own = slice(firsts[ranks.rank], firsts[ranks.rank + 1])
        part = Layer(layer.router, layer.gate_up[own].clone(), layer.down[own].clone(), layer.top_k, layer.is_gated)
        sizes = []

        def exchange(there, rows, received, sent, sizes=sizes):
            sizes.append((len(there), received, len(rows), sent))
            return ranks.exchange(there, rows, received, sent)

        watch = ep_layer.HostWatch()
        with watch.step():
            out = ep_layer.expert_parallel_layer(
                part, x[ranks.rank], chosen[ranks.rank], firsts, ranks.rank, n_chunks, exchange, watch
            )
        slow = ep_layer.slow_part(part, torch.cat(x), torch.cat(chosen), own.start)
        found.append((out.numpy(), slow.numpy(), sizes, Counter(phase.name for phase in watch.found)))
    return found


CASES = [(SHAPE, 5, 1), (SHAPE, 5, 3), ("e6-k3-h16-i32", 7, 1), ("e6-k3-h16-i32", 7, 7), ("e8-k1-h16-i16", 1, 1)]


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_together_compute_what_one_process_computes(n_ranks: int) -> None:
    by_rank = on_ranks(n_ranks, outputs, CASES)
    for number, (name, n_tokens, n_chunks) in enumerate(CASES):
        layer, x, chosen = whole_layer(name, n_tokens, n_ranks)
        of_case = [found[number] for found in by_rank]
        for rank, (out, *_) in enumerate(of_case):
            alone = moe_layer(layer, x[rank], chosen[rank]).numpy()
            np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-5)
        slow = slow_moe_layer(layer, torch.cat(x), torch.cat(chosen)).numpy()
        np.testing.assert_allclose(sum(found[1] for found in of_case), slow, rtol=1e-4, atol=1e-5)
        # Three kinds of exchanges: counts once, then rows there and back; what one sends the other receives.
        n_rows = n_tokens * layer.top_k
        for place in range(1 + 2 * n_chunks):
            exchanged = [found[2][place] for found in of_case]
            for rank, (n_there, received, n_sent, sent) in enumerate(exchanged):
                assert n_there == sum(received) and n_sent == sum(sent)
                assert received == [other[3][rank] for other in exchanged]
        for _, _, sizes, phases in of_case:
            to_experts = [sent for there, _, n, sent in sizes[1:]]
            assert sum(map(sum, to_experts)) >= n_rows and len(to_experts) == 2 * n_chunks
            assert phases["gate"] == phases["counts"] == phases["reduce"] == 1
            assert phases["dispatch"] == phases["combine"] == n_chunks and phases["permute"] == 1 + 2 * n_chunks


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4))
def test_received_rows_are_sorted_by_expert_and_keep_their_order_within_one(received: list[list[int]]) -> None:
    rows = [
        (expert, rank, n) for rank, counts in enumerate(received) for expert in range(3) for n in range(counts[expert])
    ]
    order, ends = ep_layer.by_expert(torch.tensor(received), len(rows))
    assert [rows[i] for i in order] == sorted(rows)
    assert ends.tolist() == [sum(row[0] <= expert for row in rows) for expert in range(3)]


def test_ranks_that_cannot_meet_say_so(monkeypatch, tmp_path: Path) -> None:
    numbers = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "nowhere"}
    for name, word in {**numbers, ep_capture.MEETING: str(tmp_path / "meeting")}.items():
        monkeypatch.setenv(name, word)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    with pytest.raises(InputError, match=r"rank 0 cannot meet the others: .*nowhere"), joined("cpu"):
        pytest.fail("met")
    for name in (ep_capture.MEETING, "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"rank 0 cannot meet the others: .*MASTER_ADDR"), joined("cpu"):
        pytest.fail("met")


def wrong_layer(ranks, wrong_rank):
    """The check of a layer of which one rank gives what it should not."""
    right = ep_measure.expert_parallel_layer
    if ranks.rank == wrong_rank:
        ep_measure.expert_parallel_layer = lambda *words: right(*words).add_(0.1)
    batch = ep_plan.Batch(ep_plan.scaled_shape(SHAPE, "fp32"), 4, "uniform", 2)
    pool = ep_measure.weights_pool(ranks, [batch], ep_measure.Room(1e8, 1e6, 4096))
    inputs = ep_measure.inputs_of(ranks, pool, batch, 1, 0, {})
    ep_measure.check(ranks, inputs, ep_layer.HostWatch())
    return "passed"


def test_a_layer_that_computes_something_else_on_one_rank_is_refused_by_all_in_one_sentence() -> None:
    assert on_ranks(2, wrong_layer, None) == ["passed", "passed"]
    first, second = on_ranks(2, wrong_layer, 1)
    assert first[0] == "InputError" and "differs from the slow reference by" in first[1]
    assert second[:2] == ("SystemExit", "2")


def skewed_clock(ranks, ahead_ns):
    """Clocks when that of rank 1 is wrong."""
    right = time.perf_counter_ns
    if ranks.rank == 1:
        time.perf_counter_ns = lambda: right() + ahead_ns
    return clocks(ranks, 50)


def test_clocks_are_set_by_that_of_rank_0_to_within_the_error_they_state() -> None:
    found, elsewhere = on_ranks(2, skewed_clock, 7_000_000_000)
    assert elsewhere is None and found[0] == {"rank": 0, "offset_ns": 0, "error_ns": 0}
    assert abs(found[1]["offset_ns"] + 7_000_000_000) <= found[1]["error_ns"] < 50_000_000


def test_ranks_share_processors_evenly_and_have_cores_of_their_own_where_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("collectors.machine.CPU_DIR", tmp_path / "tells nothing")
    monkeypatch.setattr("collectors.machine.cpu_list", lambda: [3, 5])
    assert [own_processors(rank, 1) for rank in range(4)] == [[3], [5], [3], [5]]
    monkeypatch.setattr("collectors.machine.cpu_list", lambda: list(range(8)))
    assert [own_processors(rank, 2) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    for cpu in range(8):  # hardware threads of one core are neighbours
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n")
    monkeypatch.setattr("collectors.machine.CPU_DIR", tmp_path)
    assert [own_processors(rank, 2) for rank in range(4)] == [[0, 2], [4, 6], [1, 3], [5, 7]]


def test_the_quickest_round_trip_sets_a_clock() -> None:
    assert offset_of([(0, 1000, 900), (1000, 1160, 1100), (2000, 2300, 3000)]) == {"offset_ns": 110, "error_ns": 50}


def test_a_clock_is_not_moved_by_less_than_its_error() -> None:
    assert correction_ns({"offset_ns": -40, "error_ns": 50}) == 0
    assert correction_ns({"offset_ns": -60, "error_ns": 50}) == -60


class Landed:
    """A collective of one rank with itself, which is over when it has begun."""

    def __init__(self, there: torch.Tensor, rows: torch.Tensor) -> None:
        there.copy_(rows)
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)


@pytest.mark.parametrize("n_chunks", [1, 3])
def test_on_a_made_up_gpu_the_layer_stays_on_the_device_and_events_give_its_phases(n_chunks, monkeypatch) -> None:
    whole, (x,), (chosen,) = whole_layer(SHAPE, 6, 1)
    weights = (weights.bfloat16() for weights in (whole.router, whole.gate_up, whole.down))
    layer, x = Layer(*weights, whole.top_k, whole.is_gated), x.bfloat16()
    alone = moe_layer(layer, x, chosen)
    with pretend_cuda.installed(monkeypatch) as device:
        there = Layer(layer.router.cuda(), layer.gate_up.cuda(), layer.down.cuda(), layer.top_k, layer.is_gated)
        watch = ep_layer.CudaWatch()
        with watch.step():
            out = ep_layer.expert_parallel_layer(
                there, x.cuda(), chosen.cuda(), [0, 8], 0, n_chunks, lambda to, rows, *_: Landed(to, rows), watch
            )
        assert out.is_cuda and device.n_mixed == 0 and device.n_products > 0
        np.testing.assert_allclose(out.cpu().float(), alone.float(), rtol=2e-2, atol=2e-2)
        phases = Counter(phase.name for phase in watch.found)
        assert phases["dispatch"] == phases["combine"] == phases["gemm1"] == n_chunks
        assert phases["permute"] == 1 + 2 * n_chunks and phases["reduce"] == 1
        assert all(watch.start_ns <= phase.start_ns for phase in watch.found)
        assert all(phase.start_ns + phase.dur_ns <= watch.end_ns for phase in watch.found)


class Alone(Ranks):
    """The only rank there is, which exchanges rows with itself."""

    def exchange(self, there: torch.Tensor, rows: torch.Tensor, *_: object) -> Landed:
        return Landed(there, rows)

    def meet(self) -> None:
        torch.cuda.synchronize()

    def largest(self, value: float) -> float:
        return value


def test_on_a_made_up_gpu_weights_probes_and_steps_are_made_there(monkeypatch) -> None:
    batch = ep_plan.Batch(ep_plan.scaled_shape(SHAPE, "bf16"), 6, "power-law:1.2", 2)
    monkeypatch.setattr(ep_probes, "PAIR_BYTES", (1024,))
    with pretend_cuda.installed(monkeypatch):
        ranks = Alone(0, 1, torch.device("cuda"), None)
        pool = ep_measure.weights_pool(ranks, [batch], ep_measure.Room(1e7, 1e6, 4096))
        inputs = ep_measure.inputs_of(ranks, pool, batch, 2, 0, {})
        assert pool.is_cuda and inputs.x.is_cuda and inputs.chosen.is_cuda and inputs.copies[1].down.is_cuda
        before_ns, ahead_ns = time.perf_counter_ns(), 10**15
        steps = ep_measure.steps_of(ranks, inputs, 3, ahead_ns, ep_layer.CudaWatch())
        assert before_ns + ahead_ns < steps[0]["start_ns"] < steps[0]["phases"][0][2] < steps[-1]["end_ns"]
        assert [step["step"] for step in steps] == [0, 1, 2]
        assert all(len(step["phases"]) == 4 + 7 * 2 for step in steps)
        found = list(ep_probes.probe_rows(ranks, [batch.shape], "bf16", 4096, 0.01))
    assert {row["probe"] for row in found} == {"gemm", "stream", "grouped_call", "launch", "all_to_all", "barrier"}
    assert all(row["value"] > 0 for row in found)


def test_caches_of_all_processors_count_and_not_those_a_rank_is_bound_to(monkeypatch) -> None:
    """Each of 4 processors has 1 MB of its own cache; a rank that is bound to one still needs copies for all."""
    monkeypatch.setattr(machine, "cpu_list", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(machine, "cache_bytes", lambda _: 1_000_000 * len(machine.cpu_list()))
    ranks = Ranks(0, 4, torch.device("cpu"), None)
    ample = ep_measure.room(ranks)
    assert ample.cache_bytes == 4_000_000
    batch = ep_plan.Batch(ep_plan.scaled_shape("e8-k2-h256-i256", "fp32"), 16, "uniform", 1)
    bytes_all = 8 * 3 * 256 * 256 * 4
    assert ep_measure._n_copies(batch, 4, ample) == 1 + math.ceil(4 * 4_000_000 / bytes_all)
    assert ep_measure._n_copies(batch, 4, ample._replace(limit_bytes=2.5 * bytes_all)) == 2
    assert ep_measure._n_copies(batch, 4, ample._replace(limit_bytes=1.0)) == 1


# --- the plan ---


def request(**more) -> ep_plan.Request:
    return ep_plan.Request(**{"n_ranks": 4, "dtype": "fp32", "shapes": (SHAPE, "e6-k2-h16-i16"), **more})


def test_schedules_of_a_batch_follow_each_other_and_pieces_are_no_more_than_tokens() -> None:
    batches, skipped = ep_plan.plan(request(tokens=(2, 8), chunks=(2, 4)), None)
    assert not skipped and len({tuple(b.key_values().values()) for b in batches}) == len(batches) == 2 * 2 * (2 + 3)
    for before, after in pairwise(batches):
        assert after.n_chunks == 1 or (before.shape, before.n_tokens, before.routing) == (
            after.shape,
            after.n_tokens,
            after.routing,
        )
    assert [b.n_chunks for b in batches if b.n_tokens == 2] == [1, 2] * 4
    assert all(b in batches for b in ep_plan.profiled(batches)) and len(ep_plan.profiled(batches)) == 3


def test_what_does_not_fit_is_left_out_with_a_sentence() -> None:
    some, skipped = ep_plan.plan(request(tokens=(1, 4096)), 4e6)
    assert {b.n_tokens for b in some} == {1} and "4096 tokens a rank does not fit in memory" in skipped[0]
    with pytest.raises(InputError, match="nothing to measure"):
        ep_plan.plan(request(), 1.0)


def test_a_routing_file_joins_the_shapes_of_its_size_and_is_drawn_from(tmp_path: Path) -> None:
    np.savez(tmp_path / "seen.npz", layer=[[0, 0, 5, 0, 0, 3, 0, 0]])
    source = f"{tmp_path / 'seen.npz'}#layer"
    batches, _ = ep_plan.plan(request(routing_files=(source,), routings=("uniform",)), None)
    measured = [batch for batch in batches if batch.routing == "file:seen.npz#layer"]
    assert {batch.shape.name for batch in measured} == {SHAPE}
    files = ep_plan.file_shares([source])
    assert {*ep_plan.chosen_experts(measured[0], 1, 4, 0, files).ravel()} == {2, 5}
    with pytest.raises(InputError, match="is for 8 experts, and no shape here has that many"):
        ep_plan.plan(request(routing_files=(source,), shapes=("e6-k2-h16-i16",)), None)


@pytest.mark.parametrize(("n_experts", "n_ranks"), [(8, 4), (6, 4), (7, 3), (5, 5), (64, 1)])
def test_every_expert_lies_on_one_rank_and_ranks_have_almost_as_many(n_experts: int, n_ranks: int) -> None:
    gpu_of, firsts = ep_plan.gpu_of(n_experts, n_ranks), ep_plan.firsts(n_experts, n_ranks)
    for rank in range(n_ranks):
        assert [e for e in range(n_experts) if gpu_of[e] == rank] == list(range(firsts[rank], firsts[rank + 1]))
    assert max(np.diff(firsts)) - min(np.diff(firsts)) <= 1 and min(np.diff(firsts)) >= 1


@pytest.mark.parametrize("routing", ["uniform", "power-law:1.2"])
def test_tokens_choose_different_experts_and_ranks_choose_for_themselves(routing: str) -> None:
    batch = ep_plan.Batch(ep_plan.scaled_shape("e16-k4-h16-i16", "fp32"), 12, routing, 1)
    chosen = [ep_plan.chosen_experts(batch, rank, 4, 0, {}) for rank in range(4)]
    assert all(len(set(row)) == 4 for of_rank in chosen for row in of_rank.tolist())
    rows = np.bincount(np.concatenate(chosen).ravel(), minlength=16)
    assert (rows.max() - rows.min() <= 1) == (routing == "uniform")
    again = ep_plan.chosen_experts(batch, 1, 4, 0, {})
    assert np.array_equal(chosen[1], again) and (routing == "uniform" or not np.array_equal(chosen[0], chosen[1]))


# --- a whole collection ---


def command(folder: Path, *more: str) -> list[str]:
    return ["-m", "collectors", "expert-parallel", "--out", str(folder), *BATCH, *more]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection that torchrun has started."""
    folder = tmp_path_factory.mktemp("ranks") / "capture"
    done = subprocess.run(
        [*TORCHRUN, *command(folder, "--tokens", "2,16", "--routings", "power-law:1.2")],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 batches are measured in" in done.stderr
    return folder


def test_every_step_of_every_rank_is_recorded_with_its_phases(capture: Path) -> None:
    workloads = {line["workload"]: line for line in lines_of(capture, store.WORKLOADS)}
    steps = lines_of(capture, ep_capture.STEPS)
    assert Counter((s["workload"], s["step"], s["rank"]) for s in steps) == Counter(
        (w, step, rank) for w in workloads for step in range(2) for rank in range(2)
    )
    for step in steps:
        line = workloads[step["workload"]]
        names = Counter(name for name, *_ in step["phases"])
        assert names["dispatch"] == names["combine"] == line["n_chunks"]
        assert names["gate"] == names["counts"] == names["reduce"] == 1
        for _, chunk, start_ns, dur_ns in step["phases"]:
            assert 0 <= chunk < line["n_chunks"] and dur_ns >= 0
            assert step["start_ns"] <= start_ns and start_ns + dur_ns <= step["end_ns"]
        computing = [(start, start + dur) for name, _, start, dur in step["phases"] if name in COMPUTING]
        assert all(end <= start for (_, end), (start, _) in pairwise(computing))
    for line in workloads.values():
        for number in range(2):  # steps begin together: none has ended before the other begins
            together = [s for s in steps if (s["workload"], s["step"]) == (line["workload"], number)]
            assert max(s["start_ns"] for s in together) < min(s["end_ns"] for s in together)
            counts = [(start, start + dur) for s in together for name, _, start, dur in s["phases"] if name == "counts"]
            assert max(began for began, _ in counts) <= min(ended for _, ended in counts)  # each needs all the others


def test_what_arrives_is_computed_afterwards_and_goes_home_when_it_is(capture: Path) -> None:
    for step in lines_of(capture, ep_capture.STEPS):
        began = {(name, chunk): start for name, chunk, start, _ in step["phases"]}
        ended = {(name, chunk): start + dur for name, chunk, start, dur in step["phases"]}
        for _, chunk in filter(lambda key: key[0] == "gemm1", began):
            assert (
                ended["dispatch", chunk] <= began["gemm1", chunk] and ended["gemm2", chunk] <= began["combine", chunk]
            )
            assert ended["combine", chunk] <= began["reduce", 0]


def test_counts_are_those_of_the_chosen_experts_and_sum_to_tokens_times_top_k(capture: Path) -> None:
    for line in lines_of(capture, store.WORKLOADS):
        assert line["gpu_of"] == [0, 0, 0, 0, 1, 1, 1, 1] and (line["schedule"] == "bulk") == (line["n_chunks"] == 1)
        batch = ep_plan.Batch(ep_plan.scaled_shape(SHAPE, "fp32"), line["tokens_per_gpu"], line["routing"], 1)
        for rank, row in enumerate(line["rows"]):
            assert sum(row) == line["tokens_per_gpu"] * line["top_k"]
            assert row == np.bincount(ep_plan.chosen_experts(batch, rank, 2, 0, {}).ravel(), minlength=8).tolist()


def test_the_manifest_says_what_was_measured_where_and_not_whose_it_is(capture: Path) -> None:
    manifest = store.read_capture(capture, ep_capture.MANIFEST)
    assert manifest["kind"] == "expert-parallel" and manifest["n_planned"] == 4
    expected = {"n_ranks": 2, "backend": "gloo", "device": "cpu", "dtype": "float32", "n_steps": 2, "n_chunks": [1, 2]}
    assert expected.items() <= manifest["settings"].items()
    assert [c["rank"] for c in manifest["clock"]] == [0, 1]  # of one machine: the same clock, to within the error
    assert all(abs(c["offset_ns"]) <= c["error_ns"] for c in manifest["clock"])
    assert len(manifest["cpus_of_ranks"]) == 2 and all(manifest["cpus_of_ranks"])  # bound, each to as many as threads
    assert manifest["machine"]["n_cores"] == machine.n_physical_cores()  # read before ranks were bound
    probes = lines_of(capture, ep_capture.PROBES)
    assert {p["probe"] for p in probes} == {"gemm", "stream", "grouped_call", "all_to_all", "barrier"}
    assert all(p["value"] > 0 and p["times"] >= 5 for p in probes)
    alone = [p for p in probes if p["params"].pop("alone", False)]
    assert {(p["probe"], p["rank"]) for p in alone} == {("gemm", 0), ("stream", 0)}
    together = [(p["probe"], str(p["params"]), p["rank"]) for p in probes if p not in alone]
    assert Counter(rank for *_, rank in together)[0] == len(together) / 2 == len({*together}) / 2
    assert not list(capture.rglob("*.part"))
    for path in capture.rglob("*.*"):
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        assert str(ROOT) not in text and str(capture.parent) not in text
        assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_profiles_are_folders_of_ranks_with_named_phases(capture: Path) -> None:
    workloads = {line["workload"]: line for line in lines_of(capture, store.WORKLOADS)}
    folders = sorted((capture / store.PROFILES).iterdir())
    assert len(folders) == 3
    for folder in folders:
        for rank in range(2):
            trace = json.loads(gzip.decompress((folder / f"rank-{rank}.trace.json.gz").read_bytes()))
            assert trace["distributedInfo"] == {"backend": "gloo", "rank": rank, "world_size": 2}
            assert workloads[folder.name].items() <= trace["perfmodel"].items()
            names = Counter(e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation")
            outer = next(name for name in names if name.startswith("perfmodel::moe_layer|"))
            assert f"schedule={workloads[folder.name]['schedule']}" in outer and names[outer] == 2
            assert names["perfmodel::dispatch"] == 4 * workloads[folder.name]["n_chunks"]  # called, and waited for


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to find the ranks in")
def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(capture: Path) -> None:
    before = (capture / store.WORKLOADS).read_bytes()
    last_ns = max(step["end_ns"] for step in lines_of(capture, ep_capture.STEPS))
    more = command(capture, "--tokens", "2,16,32,64", "--routings", "power-law:1.2,uniform", "--ranks", "2")
    victims = subprocess.Popen([sys.executable, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 60
    while (capture / store.WORKLOADS).stat().st_size == len(before):
        assert time.monotonic() < give_up and victims.poll() is None, "nothing was measured"
        time.sleep(0.005)
    children = Path(f"/proc/{victims.pid}/task/{victims.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, said = victims.communicate(timeout=60)
    assert victims.returncode == 1 and time.monotonic() - killed < 20
    assert "collectors: rank 1 was ended by signal SIGKILL; the same command continues" in said
    assert "Traceback" not in said
    whole = len(lines_of(capture, store.WORKLOADS))
    assert whole < 16
    assert run_as_ranks(2, more[2:]) == [0, 0]
    assert (capture / store.WORKLOADS).read_bytes().startswith(before)
    workloads = [line["workload"] for line in lines_of(capture, store.WORKLOADS)]
    assert len(workloads) == len(set(workloads)) == 16
    steps = lines_of(capture, ep_capture.STEPS)
    assert Counter(step["workload"] for step in steps) == dict.fromkeys(workloads, 4)
    new = {*workloads} - {json.loads(line)["workload"] for line in before.splitlines()}
    assert all(step["start_ns"] > last_ns for step in steps if step["workload"] in new)


class Ended:
    """A rank that ended with some code, or that is still there."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ((0, 0), 0, ""),
        ((1, 1), 1, "rank 0 ended with exit code 1"),  # both of the same mistake
        ((75, -9), 1, "rank 1 was ended by signal SIGKILL"),
        ((75, 2), 2, ""),  # which has said why
        ((0, 75), 1, "rank 1 lost the others"),
        ((75, None, 75), 1, "rank 1 does not answer"),
    ],
)
def test_one_sentence_says_which_rank_ended_how(codes, code, said, monkeypatch, capsys) -> None:
    monkeypatch.setattr(expert_parallel, "PATIENCE_S", 0.0)
    assert expert_parallel._watch([Ended(of_rank) for of_rank in codes]) == code
    words = capsys.readouterr().err
    assert (words.count("\n"), said in words) == (bool(said), True)


def test_a_collective_that_times_out_is_a_rank_that_is_lost() -> None:
    assert expert_parallel._is_lost(RuntimeError("Wait timeout"))
    assert not expert_parallel._is_lost(RuntimeError("CUDA out of memory"))


def test_ranks_whose_starter_is_gone_begin_no_more_batches() -> None:
    for parent, is_over in ((os.getppid(), False), (os.getpid(), True)):
        one = ep_measure.Collection.__new__(ep_measure.Collection)
        one.order = ep_measure.Order(Path(), request(), {}, 1.0, 0.0, parent)
        one.deadline = time.monotonic() + 60
        assert one.is_over() == one.is_left_alone() == is_over


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc to find the ranks in")
def test_who_is_asked_to_end_ends_the_ranks_first(tmp_path: Path) -> None:
    words = command(tmp_path / "new", "--ranks", "2", "--device", "cpu")
    one = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ranks: list[str] = []
    while len(ranks) < 2:
        assert one.poll() is None
        ranks = Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split()
        time.sleep(0.01)
    one.terminate()
    _, said = one.communicate(timeout=30)
    assert one.returncode == 130 and "interrupted; the same command continues" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


# --- what is refused ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--shapes", "e2-k1-h16-i16"), "has 2 experts, expected one at least for each rank"),
        (("--shapes", "nothing"), "unknown shape 'nothing'"),
        (("--routing-file", "nowhere.npz"), "nowhere.npz"),
        (("--device", "cuda"), "finds no CUDA device here"),
        (("--device", "cpu"), "--out is missing"),
    ],
)
def test_bad_input_is_one_sentence_and_starts_nothing(words, sentence, monkeypatch, capsys) -> None:
    monkeypatch.setattr(expert_parallel, "_start", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["expert-parallel", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("--tokens", "0"), ("--dtype", "float8_e4m3fn"), ("--routings", "some"), ("--minutes", "x")]
)
def test_bad_options_are_one_sentence(words, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["expert-parallel", *words])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_folder_of_something_else_or_of_other_settings_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(expert_parallel, "_start", lambda *_: pytest.fail("ranks were started"))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "notes.txt").write_text("mine")
    assert cli.main(["expert-parallel", "--device", "cpu", "--out", str(tmp_path / "strange")]) == 2
    assert "holds 'notes.txt' and no expert_parallel.json" in capsys.readouterr().err
    words = ["expert-parallel", "--device", "cpu", "--out", str(tmp_path / "new"), "--steps"]
    monkeypatch.setattr(expert_parallel, "_start", lambda *_: 0)
    settings = ep_capture.settings_of(
        n_ranks=4, device="cpu", dtype="float32", threads=1, seed=0, n_warm_up=2, n_steps=8, chunks=(2,),
        routing_files=(),
    )  # fmt: skip
    found = {"machine": cli.machine.machine(1), "software": cli.machine.software()}
    ep_capture.begin(tmp_path / "new", settings, found)
    assert cli.main([*words, "8", "--threads", "1", "--chunks", "2,4"]) == 0  # more pieces may be added
    assert cli.main([*words, "9", "--threads", "1"]) == 2
    assert "n_steps was 8 and is 9" in capsys.readouterr().err


def test_steps_of_a_batch_that_was_cut_off_go_and_counts_that_do_not_sum_are_refused(tmp_path: Path) -> None:
    batch = ep_plan.Batch(ep_plan.scaled_shape(SHAPE, "fp32"), 1, "uniform", 1)
    rows = [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    steps = [[{"step": 0, "rank": rank, "start_ns": 5, "end_ns": 9, "phases": []}] for rank in range(2)]
    line = ep_capture.add(tmp_path, batch, [0] * 4 + [1] * 4, rows, steps)
    store.append(tmp_path, ep_capture.STEPS, {"workload": "cut off", "step": 0, "rank": 0, "end_ns": 20})
    with (tmp_path / store.WORKLOADS).open("a") as file:
        file.write('{"workload":"half')
    assert ep_capture.measured(tmp_path) == [line] and ep_capture.line_of(batch, [line]) == line
    assert [(s["workload"], s["rank"]) for s in lines_of(tmp_path, ep_capture.STEPS)] == [
        (line["workload"], r) for r in (0, 1)
    ]
    assert ep_capture.time_base_ns(tmp_path) == 9 + ep_capture.LEAST_GAP_NS
    (tmp_path / store.PROFILES / line["workload"] / "rank-0.trace.json.gz.part").mkdir(parents=True)
    with pytest.raises(InputError, match="gz cannot be written"):
        ep_capture.add_profile(tmp_path, line, [{}, {}])
    assert not ep_capture.has_profile(tmp_path, line, 2)
    with pytest.raises(InputError, match="expected 2 each"):
        ep_capture.add(tmp_path, batch, [0] * 8, [[1] * 8, rows[1]], steps)
    assert len(lines_of(tmp_path, store.WORKLOADS)) == 1


def test_the_plan_is_printed_without_torch(capsys) -> None:
    script = "import sys; sys.modules['torch'] = None; from collectors.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "expert-parallel", "--plan", "--tokens", "16"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "olmoe/8, 16 tokens a rank, uniform, chunked in 2 pieces" in done.stdout
    assert done.stdout.splitlines()[-1] == "12 batches on 4 ranks, 8 steps each"
