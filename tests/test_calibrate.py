"""Calibration: the arithmetic of lines and summaries by hand, probes on false clocks, host probes for real."""

import itertools
import json
import os
import statistics

import pytest

from collectors import calibration, timing
from collectors.calibration import key, pooled, probe_key, summary, value_of
from collectors.timing import Limits
from perfmodel.errors import InputError
from perfmodel.hardware import OF_OTHERS, QUANTITIES

ONCE = Limits(min_repeat_ns=1, point_ns=10**9)
SHORT = Limits(min_repeat_ns=200_000, point_ns=5_000_000)
CONTRACT = {"probe", "params", "run", "quantity", "value", "unit", "times_ns", "spread_frac", "n", "how", "took_s"}


def made(quantity, value, params=None, run=0, spread=0.01, probe="made_up"):
    """A calibration line made up for tests."""
    return {
        "probe": probe, "params": params or {}, "run": run, "quantity": quantity, "value": value, "unit": "ns",
        "times_ns": [1.0], "spread_frac": spread, "n": 5, "how": "so", "took_s": 0.1,
    }  # fmt: skip


# --- lines ---


def test_a_rate_is_work_over_the_median_time_and_a_time_is_shared_by_what_it_holds():
    assert value_of([4.0, 2.0, 100.0], 8.0, "bytes_per_s") == 2e9  # 8 bytes in 4 ns
    assert value_of([4.0, 2.0, 100.0], 8.0, "flops_per_s") == 2e9
    assert value_of([1000.0, 3000.0], 4, "ns") == 500.0


@pytest.mark.parametrize("times", [[], [1.0, 0.0], [-3.0], [float("nan")], [float("inf")]])
def test_no_time_is_not_a_measurement(times):
    with pytest.raises(InputError, match="which is no time"):
        value_of(times, 1.0, "ns")


def test_an_unknown_unit_is_refused():
    with pytest.raises(InputError, match="'GB/s', expected one of bytes_per_s, flops_per_s, ns"):
        value_of([1.0], 1.0, "GB/s")


def test_a_line_is_what_the_contract_says():
    line = calibration.line("copy", {"n_bytes": 8}, 2, None, "bytes_per_s", [1.0, 3.0, 2.0], 8, "so", 0.12345)
    assert set(line) == CONTRACT
    assert line["value"] == 4e9 and line["n"] == 3 and line["took_s"] == 0.123
    assert line["spread_frac"] == pytest.approx(1.4826 * 1 / 2, abs=1e-4)
    assert json.loads(json.dumps(line)) == line


def test_keys_are_content_in_any_order_and_golden():
    assert probe_key("copy", {"a": 1, "b": None}) == probe_key("copy", {"b": None, "a": 1})
    assert len({probe_key("copy", {"a": 1}), probe_key("copy", {"a": 2}), probe_key("read", {"a": 1})}) == 3
    # Golden: a key that changes makes a resumed campaign measure everything again.
    assert probe_key("link_copy", {"n_bytes": 65536}) == key(made(None, 1.0, {"n_bytes": 65536}, probe="link_copy"))
    assert probe_key("link_copy", {"n_bytes": 65536}) == "f0cbc118d23f"


# --- the summary ---


def test_calibrations_of_processes_pool_to_the_middle_one():
    def of(value, spread):
        return {"call_overhead_ns": {"value": value, "spread_frac": spread, "n": 5, "how": "so"}}

    assert pooled([of(1.0, 0.5)]) == of(1.0, 0.5)
    found = pooled([of(4000.0, 0.01), of(8000.0, 0.02), of(4100.0, 0.03)])["call_overhead_ns"]
    assert (found["value"], found["n"], found["how"]) == (4100.0, 3, "so")
    assert found["spread_frac"] == pytest.approx(1.4826 * 100 / 4100, abs=1e-4)


def test_one_line_is_its_own_summary_and_lines_without_a_quantity_are_none():
    found = summary([made("call_overhead_ns", 4.0), made(None, 9.0)])
    assert found == {"call_overhead_ns": {"value": 4.0, "spread_frac": 0.01, "n": 5, "how": "so"}}
    assert summary([]) == {}


def test_runs_of_one_configuration_pool_before_the_best_configuration_is_chosen():
    # By the best of all lines 4 threads would win with one lucky 99; by the middle of runs 2 threads do.
    of_two = [made("memory_stream_bytes_per_s", v, {"threads": 2}, run) for run, v in enumerate((50.0, 60.0, 70.0))]
    of_four = [made("memory_stream_bytes_per_s", v, {"threads": 4}, run) for run, v in enumerate((40.0, 99.0, 41.0))]
    found = summary([*of_four, *of_two])["memory_stream_bytes_per_s"]
    assert (found["value"], found["n"]) == (60.0, 3)
    assert found["how"] == "so; threads 2: the fastest of 2 configurations"
    assert found["spread_frac"] == pytest.approx(1.4826 * 10 / 60, abs=1e-4)


def test_the_largest_size_counts_however_fast_a_cached_one_is():
    name = "link_h2d_copy_bytes_per_s"
    small, large = made(name, 90.0, {"n_bytes": 1 << 20}), made(name, 50.0, {"n_bytes": 1 << 30})
    found = summary([small, large])[name]
    assert found["value"] == 50.0
    assert found["how"] == f"so; n_bytes {1 << 30}: the largest size, then fastest of 2 configurations"


def test_of_times_the_shortest_is_the_fastest():
    lines = [made("launch_overhead_ns", v, {"way": w}) for v, w in ((3.0, "a"), (2.0, "b"))]
    assert summary(lines)["launch_overhead_ns"]["value"] == 2.0


def test_a_triad_and_a_copy_are_streams_too_and_the_words_name_the_probe():
    lines = [
        made("memory_stream_bytes_per_s", 10.0, {"kernel": "read"}),
        made("memory_triad_bytes_per_s", 12.0, {"kernel": "triad"}),
        made("memory_copy_bytes_per_s", 11.0, {"kernel": "copy"}, probe="other"),
    ]
    found = summary(lines)
    assert found["memory_stream_bytes_per_s"]["value"] == 12.0
    assert "made_up with kernel triad: the fastest of 3" in found["memory_stream_bytes_per_s"]["how"]
    assert found["memory_copy_bytes_per_s"]["value"] == 11.0


def test_what_was_seen_under_load_is_the_last_that_was_seen():
    with_facts = [
        made(None, 1.0) | {"facts": {"n_samples": n, "sm_clock_mhz": mhz}} for n, mhz in ((3, 1), (4, 2), (0, 3))
    ]
    assert calibration.seen_under_load(with_facts) == {"n_samples": 4, "sm_clock_mhz": 2}
    assert calibration.seen_under_load([made(None, 1.0), made(None, 1.0) | {"facts": None}]) is None


# --- the list of probes ---

torch = pytest.importorskip("torch", reason="torch is not installed")

from collectors import alias, probes, probes_cuda, probes_host, probes_link  # noqa: E402
from tests import fake_cuda  # noqa: E402

LISTS = [(device, preset) for device in ("cpu", "cuda") for preset in probes.PRESETS]


@pytest.mark.parametrize(("device", "preset"), LISTS)
def test_every_list_has_its_own_keys_known_quantities_and_plain_params(device, preset):
    found = probes.probes(device, ["bf16", "fp32"], 8, preset)
    assert len({probe.key for probe in found}) == len(found)
    for probe in found:
        assert probe.quantity is None or probe.quantity in QUANTITIES
        assert probe.unit in calibration.UNITS
        assert probe.quantity is None or probe.quantity.endswith("_" + probe.unit)
        assert all(isinstance(value, str | int | float | bool | None) for value in probe.params.values())
    core = [probe for probe in found if probe.core]
    assert 0 < len(core) <= 7 and found[0].core
    assert all(probe.quantity is not None for probe in core)


def test_presets_grow_and_share_their_core():
    for device in ("cpu", "cuda"):
        quick, standard, full = (probes.probes(device, ["bf16"], 8, preset) for preset in probes.PRESETS)
        assert len(quick) < len(standard) < len(full)
        assert {p.quantity for p in quick} <= {p.quantity for p in standard} <= {p.quantity for p in full}
    assert "link_h2d_contended_bytes_per_s" in {p.quantity for p in quick}


def test_a_gpu_machine_gets_every_number_of_links_launches_and_host():
    found = {probe.quantity for probe in probes.probes("cuda", ["bf16"], 8, "standard")}
    not_measured = {name for name in QUANTITIES if "_peak_" in name or name.endswith(("_capacity_bytes", "_count"))}
    not_measured |= {name for name in QUANTITIES if name.startswith(OF_OTHERS)}  # one process has one GPU
    assert set(QUANTITIES) - not_measured <= found


def test_numbers_of_the_link_are_of_one_size_and_repeated_at_the_end_of_runs():
    found = [p for p in probes.probes("cuda", ["bf16"], 8, "full") if p.name in ("link_copy", "read_in_place")]
    assert {p.params["n_bytes"] for p in found if p.quantity} == {probes_link.CORE_BYTES}
    assert len({p.params["n_bytes"] for p in found}) == 15
    repeated = {p.quantity for p in found if p.core}
    assert repeated == {"link_h2d_copy_bytes_per_s", "link_kernel_read_bytes_per_s"}
    assert all(p.core for p in found if p.quantity in repeated)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tpu", ["bf16"], 1, "quick"), "the device is 'tpu', expected cpu or cuda"),
        (("cpu", ["int4"], 1, "quick"), "dtypes are int4, expected some of"),
        (("cpu", [], 1, "quick"), "dtypes are none"),
        (("cpu", ["fp32"], 1, "fast"), "the preset is 'fast', expected one of quick, standard, full"),
    ],
)
def test_what_cannot_be_probed_is_said(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        probes.probes(*arguments)


def test_streams_are_larger_than_caches_and_smaller_than_memory(monkeypatch):
    machine = probes_host.machine
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 40)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 100 << 20)
    assert probes_host.stream_bytes() == 800 << 20
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 768 << 20)
    assert probes_host.stream_bytes() == 2 << 30
    monkeypatch.setattr(machine, "memory_bytes", lambda: 4 << 30)
    assert probes_host.stream_bytes() == 512 << 20


# --- the engine ---


def test_a_probe_becomes_its_line_and_its_facts_ride_along():
    seen = probes.Measured([10.0, 20.0, 30.0], 40.0, "counted so", {"sm_clock_mhz": 1980})
    probe = probes.Probe("made_up", {"n": 1}, "memory_copy_bytes_per_s", "bytes_per_s", True, lambda limits: seen)
    line = probes.run_probe(probe, ONCE, run=3)
    assert set(line) == CONTRACT | {"facts"}
    assert (line["value"], line["run"], line["how"]) == (2e9, 3, "counted so")
    assert key(line) == probe.key


def test_what_a_probe_raises_comes_through_and_leaves_no_mode_behind():
    def fail(_):
        assert torch.is_inference_mode_enabled()
        raise InputError("no such memory")

    with pytest.raises(InputError, match="no such memory"):
        probes.run_probe(probes.Probe("x", {}, None, "ns", False, fail), ONCE, 0)
    assert not torch.is_inference_mode_enabled()


def test_an_error_nobody_foresaw_is_a_reason_and_not_the_end():
    def fail(_):
        raise AttributeError("module 'torch' has no attribute 'made_up'")

    with pytest.raises(InputError, match="AttributeError: module 'torch' has no attribute"):
        probes.run_probe(probes.Probe("x", {}, None, "ns", False, fail), ONCE, 0)


def test_a_cuda_clock_tells_the_time_between_its_events(monkeypatch):
    clock = fake_cuda.install(monkeypatch)
    assert timing.clock_of("cuda")(lambda: clock.spend(7_000.0)) == pytest.approx(7_000.0 + fake_cuda.EVENT_NS)
    assert timing.clock_of("cpu") is timing.host_clock


def test_buffers_are_random_finite_and_refused_when_memory_is_short(monkeypatch):
    found = probes.random_bytes(3 * probes.BLOCK_BYTES // 2)
    numbers = found.view(torch.float32)
    assert torch.isfinite(numbers).all() and numbers.std() > 0.5
    assert len(found.unique()) > 200
    monkeypatch.setattr(probes, "free_host_bytes", lambda: 1000)
    probes.need_free(500, "cpu")
    with pytest.raises(InputError, match="501 bytes of host memory are needed, more than half of the 1000"):
        probes.random_bytes(501)


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), probes.cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


# --- host probes, for real ---


@pytest.mark.parametrize("kernel", probes_host.STREAMS)
def test_a_stream_counts_each_of_its_arrays(kernel):
    n_bytes, n_arrays = 1 << 20, {"read": 1, "copy": 2, "triad": 3}[kernel]
    probe = probes_host.host_stream(kernel, 1, 1, n_bytes, "memory_stream_bytes_per_s", False)
    line = probes.run_probe(probe, SHORT, 0)
    assert line["value"] == pytest.approx(n_arrays * n_bytes * 1e9 / statistics.median(line["times_ns"]), rel=1e-4)
    assert f"{n_bytes} bytes an array, 1 threads" in line["how"]


def test_stream_kernels_do_what_they_count():
    call = probes_host.stream_kernel("triad", 4096, "cpu")
    a, b, out = call.__closure__[0].cell_contents
    call(0)
    assert torch.allclose(out, a + 3 * b, atol=1e-5)
    copy = probes_host.stream_kernel("copy", 4096, "cpu")
    copy(0)
    source, target = copy.__closure__[0].cell_contents
    assert torch.equal(source.view(torch.uint8), target.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gemm_of_an_expert_takes_other_weights_each_call(dtype, monkeypatch):
    monkeypatch.setattr(probes_host.machine, "last_level_cache_bytes", lambda: 64 * 64 * 4)
    weights = probes_host.expert_weights(64, 32, dtype)
    size = 64 * 32 * probes.TORCH_DTYPES[dtype].itemsize
    assert sum(w.numel() * w.element_size() for w in weights) >= 4 * 64 * 64 * 4
    assert len({w.data_ptr() for w in weights}) == len(weights) == 4 * 64 * 64 * 4 // size + 1
    call = probes_host.expert_call(weights, 3)
    first, again = call(0).clone(), call(len(weights)).clone()
    assert first.shape == (3, 32) and torch.equal(first, again)
    assert not torch.equal(first, call(1))


def test_rows_that_would_take_too_long_are_refused_by_fewer_rows(monkeypatch):
    asked = []

    def call_for(rows):
        asked.append(rows)
        return lambda _number: None

    # On a false clock a row costs 1 us: 4096 rows, 7 calls are 28.7 ms.
    monkeypatch.setattr(probes_host, "host_clock", lambda work: 1e3 * asked[-1])
    probes_host.refuse_slow(call_for, 4096, ONCE, 30_000_000)
    assert asked == [1, 16, 256, 4096]
    asked.clear()
    with pytest.raises(InputError, match="4096 rows would take about"):
        probes_host.refuse_slow(call_for, 4096, ONCE, 20_000_000)
    assert asked == [1, 16]
    asked.clear()
    probes_host.refuse_slow(call_for, 20, ONCE, 10**9)
    assert asked == [1, 16]


def test_the_host_probes_of_a_quick_look_run(monkeypatch):
    monkeypatch.setattr(probes_host, "LEAST_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(probes_host, "MOST_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(probes_host, "GEMM_SIDES", (512,))
    monkeypatch.setattr(probes_host, "EXPERTS", ((64, 32), (128, 32)))
    monkeypatch.setattr(probes_host.machine, "last_level_cache_bytes", lambda: 1 << 16)
    lines = [probes.run_probe(p, SHORT, 0) for p in probes.probes("cpu", ["fp32"], 1, "standard")]
    found = {**summary(lines), **probes.stated_numbers("cpu")}
    wanted = ("fp32_gemm_flops_per_s", "bf16_gemm_flops_per_s", "memory_stream_bytes_per_s", "call_overhead_ns")
    for name in (*wanted, "n_cores_count", "memory_capacity_bytes"):
        assert found[name]["value"] > 0 and found[name]["how"]
    assert set(found) <= set(QUANTITIES)
    rows = [line["params"]["n_rows"] for line in lines if line["probe"] == "host_expert_gemm"]
    assert set(rows) == set(probes_host.ROWS["standard"])


# --- data moving beside CPU work, on a false clock ---


def test_pieces_at_the_edge_of_an_interval_count_in_part():
    spans = [(0.0, 10.0), (10.0, 20.0), (20.0, 40.0), (50.0, 50.0)]
    assert probes_link.work_within(spans, 5.0, 25.0) == pytest.approx(0.5 + 1 + 0.25)
    assert probes_link.work_within(spans, 0.0, 40.0) == 3
    assert probes_link.work_within(spans, 41.0, 49.0) == 0


def test_both_rates_are_of_the_same_intervals(monkeypatch):
    """Moves of 5 ms; the CPU's calls take 10 ms alone, 20 ms beside them. The worker is made up, without threads."""
    now = [0.0]

    class Steady:
        def __init__(self, work, threads, clock):
            self.spans = []

        def __enter__(self):
            self.began = now[0]
            return self

        def __exit__(self, *_):
            n = int((now[0] - self.began) // 20e6) + 1
            self.spans += [(self.began + i * 20e6, self.began + (i + 1) * 20e6) for i in range(n)]

    def move(n):
        now[0] += 5e6 * n

    def compute(_number):
        now[0] += 10e6

    monkeypatch.setattr(probes_link, "Worker", Steady)
    limits = Limits(min_repeat_ns=1, point_ns=1)
    moves, calls, move_ns, call_ns = probes_link.together(move, compute, 1, limits, lambda: now[0])
    assert moves == [pytest.approx(5e6)] * limits.max_repeats
    assert calls == [pytest.approx(20e6)] * limits.max_repeats
    assert (move_ns, call_ns) == (5e6, 10e6)


def test_the_worker_works_beside_and_its_error_is_ours():
    with probes_link.Worker(lambda n: None, 1, iter(range(10**9)).__next__) as worker:
        pass
    assert len(worker.spans) > 2 and all(b > a for a, b in worker.spans)

    def fail(_):
        raise InputError("no such kernel")

    with pytest.raises(InputError, match="no such kernel"), probes_link.Worker(fail, 1, lambda: 0.0):
        pass


def test_a_copy_and_experts_really_run_beside_each_other(monkeypatch):
    """Host memory plays the device; the mode without gradients must hold in the worker, whose GEMM writes in place."""
    monkeypatch.setattr(probes_host.machine, "last_level_cache_bytes", lambda: 1 << 14)
    monkeypatch.setattr(probes_link, "LEAST_WINDOW_NS", 1_000_000)
    monkeypatch.setattr(probes_link, "pair", lambda *_a, **_k: ([torch.ones(1 << 16)], [torch.ones(1 << 16)]))
    monkeypatch.setattr(probes_link, "BESIDE_EXPERT", (64, 32))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    before = torch.get_num_threads()
    of_link, of_host = probes_link.beside("h2d copy", "bf16", 16, 2)
    for probe in (of_link, of_host):
        line = probes.run_probe(probe, ONCE, 0)
        assert line["value"] > 0 and line["n"] == ONCE.max_repeats
        assert min(line["facts"].values()) > 0
    assert torch.get_num_threads() == before


def test_the_second_of_a_pair_takes_what_the_first_saw(monkeypatch):
    monkeypatch.setattr(probes_host, "FALLBACK_CACHE_BYTES", 1 << 12)
    seen = []

    def together(*_):
        seen.append(1)
        return [2.0], [4.0], 1.0, 2.0

    monkeypatch.setattr(probes_link, "together", together)
    monkeypatch.setattr(probes_link, "pair", lambda *_a, **_k: ([torch.ones(1)], [torch.ones(1)]))
    monkeypatch.setattr(probes_link, "BESIDE_EXPERT", (64, 32))
    of_link, of_host = probes_link.beside("h2d copy", "fp32", 16, 2)
    first, second = probes.run_probe(of_link, ONCE, 0), probes.run_probe(of_host, ONCE, 0)
    assert len(seen) == 1
    assert first["value"] == pytest.approx(probes_link.CORE_BYTES / 2 * 1e9, rel=1e-5)
    assert second["value"] == pytest.approx(2 * 16 * 64 * 32 / 4 * 1e9)
    assert second["facts"]["alone_flops_per_s"] == pytest.approx(2 * 16 * 64 * 32 / 2 * 1e9)
    probes.run_probe(of_host, ONCE, 0)  # alone, as after a resumption
    assert len(seen) == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not bind threads")
def test_memory_of_a_node_is_taken_there_by_one_thread_that_comes_back(monkeypatch):
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    monkeypatch.setattr(probes_link.machine, "cpus_of_node", lambda node: [min(before)])
    with pytest.raises(ZeroDivisionError), probes_link.on_node(1):
        assert os.sched_getaffinity(0) == {min(before)} and torch.get_num_threads() == 1
        _ = 1 / 0
    assert os.sched_getaffinity(0) == before and torch.get_num_threads() == threads
    with probes_link.on_node(None):
        assert os.sched_getaffinity(0) == before


def test_copies_by_node_need_two_nodes_of_ours(monkeypatch):
    def nodes(*n_usable):
        found = [{"node": i, "n_usable_cpus": n} for i, n in enumerate(n_usable)]
        monkeypatch.setattr(probes_link.machine, "numa_nodes", lambda: found)
        return [(p.params["host_node"], p.params["direction"]) for p in probes_link.by_node("standard")]

    assert nodes(8) == nodes(8, 0) == []  # the second could be the memory of a GPU, without processors
    assert nodes(8, 0, 8) == [(0, "h2d"), (0, "d2h"), (2, "h2d"), (2, "d2h")]


# --- CUDA probes without CUDA ---


@pytest.fixture
def device(monkeypatch):
    clock = fake_cuda.install(monkeypatch)
    monkeypatch.setattr(probes_cuda.smi, "ask", lambda _arguments: None)
    monkeypatch.setattr(probes_cuda, "SAMPLE_S", 0.0)
    # Memory that device and host share cannot be made up; its reader can.
    monkeypatch.setattr(
        probes_link,
        "shared_memory",
        lambda n_bytes, memory: (None, torch.empty(n_bytes, dtype=torch.uint8, device="cuda")),
    )
    monkeypatch.setattr(probes_host, "host_clock", lambda work: (work(), 1e3)[1])
    return clock


CUDA_PROBES = {
    probe.key: probe
    for preset in ("quick", "standard")
    for probe in probes.probes("cuda", ["bf16"], 2, preset)
    if not (probe.name.startswith("host_") or probe.name.endswith("_beside_host_gemm"))
}


@pytest.mark.parametrize("probe", CUDA_PROBES.values(), ids=lambda p: f"{p.name}{list(p.params.values())}")
def test_every_cuda_probe_runs_on_a_made_up_device(probe, device):
    with fake_cuda.no_data():
        line = probes.run_probe(probe, ONCE, 0)
    assert line["value"] > 0 and line["quantity"] == probe.quantity and key(line) == probe.key
    assert line["how"] and "{" not in line["how"]


@pytest.mark.parametrize("memory", ["pinned", "pageable"])
@pytest.mark.parametrize(("direction", "ends"), [("h2d", ("cpu", "cuda")), ("d2h", ("cuda", "cpu"))])
def test_copies_go_the_way_and_the_size_they_say(direction, ends, memory, device):
    probe = probes_link.link_copy(direction, memory, 1 << 20, None, False)
    with fake_cuda.no_data() as copies:
        probes.run_probe(probe, ONCE, 0)
    across = [copy for copy in copies if copy[0] != copy[1]]
    assert set(across) == {(*ends, 1 << 20, memory == "pinned")}
    assert len(across) >= 1 + ONCE.min_repeats


def test_null_kernels_and_graphs_are_what_the_false_clock_says(device):
    def value(probe):
        return probes.run_probe(probe, ONCE, 0)["value"]

    assert value(probes_cuda.graph_kernel()) == fake_cuda.NULL_NS
    in_stream = value(probes_cuda.null_kernel_duration())
    assert in_stream == pytest.approx(fake_cuda.NULL_NS + fake_cuda.EVENT_NS / probes_cuda.BURST, rel=1e-5)
    assert probes_cuda.null_graph(7).n_kernels == 7


def test_a_device_that_runs_ahead_of_the_host_is_held_longer_and_then_refused(device, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "_sleep", asked.append)
    monkeypatch.setattr(torch.cuda.Event, "query", lambda self: len(asked) < 3)
    assert probes_cuda.queued_ns(lambda: None) == fake_cuda.EVENT_NS
    assert asked == [1 << 25, 1 << 27, 1 << 29]
    monkeypatch.setattr(torch.cuda.Event, "query", lambda self: True)
    with pytest.raises(InputError, match="the device began before the host had queued"):
        probes_cuda.queued_ns(lambda: None)


def test_bursts_count_launches_and_not_the_waits_between(device, monkeypatch):
    launched, waits = [], device.done
    monkeypatch.setattr(probes_cuda, "host_clock", lambda work: (work(), 2_000.0)[1])
    times = probes_cuda.burst_times(lambda: launched.append(1), 100, Limits(min_repeat_ns=6_000, point_ns=1))
    assert times == [20.0] * 7  # 2 us over 100 launches
    assert len(launched) == 100 * (2 + 7 * 3) and waits.count("wait") == 2 + 7 * 3


def test_both_directions_start_together_and_the_end_waits_for_both(device):
    with fake_cuda.no_data():
        line = probes.run_probe(probes_link.both_ways(1 << 24), ONCE, 0)
    assert device.done.count("fork") == device.done.count("join") == 2 * (1 + line["n"])  # a warm-up and repeats
    assert line["value"] == pytest.approx(2 * (1 << 24) / fake_cuda.EVENT_NS * 1e9, rel=1e-5)


def test_copies_take_the_buffers_in_turn():
    host, there = [torch.full((4,), float(i)) for i in range(3)], [torch.zeros(4) for _ in range(3)]
    copy = probes_link.copy_call(host, there, in_background=False)
    for n in range(5):
        copy(n)
    assert [int(t[0]) for t in there] == [0, 1, 2]


def test_system_memory_and_fp8_are_refused_where_there_is_none(monkeypatch):
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(probes_link.gpu, "driver_library", lambda: None)
    with pytest.raises(InputError, match="does not read plain system memory"):
        probes_link.shared_memory(64, "system")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(InputError, match=r"no fp8 matrix units: they come with capability 8\.9"):
        probes.run_probe(probes_cuda.device_gemm("fp8", 64, None, False), ONCE, 0)


def test_clocks_are_sampled_until_there_are_enough(device, monkeypatch):
    answers = {"clocks.sm": "1755", "power.draw": "690.5", "clocks_event_reasons.active": "0x0000000000000004"}

    def ask(arguments):
        names = arguments[1].removeprefix("--query-gpu=").split(",")
        return ", ".join(answers.get(name, "[N/A]") for name in names) + "\n"

    monkeypatch.setattr(probes_cuda.smi, "ask", ask)
    monkeypatch.setattr(probes_cuda.smi.Sampler.__init__, "__defaults__", (ask,))
    monkeypatch.setattr(probes_cuda.smi, "SAMPLE_EVERY_S", 0.0)
    monkeypatch.setattr(probes_cuda, "SAMPLE_S", 60.0)
    with fake_cuda.no_data():
        facts = probes.run_probe(probes_cuda.device_gemm("bf16", 64, None, False), ONCE, 0)["facts"]
    assert facts["n_samples"] >= probes_cuda.LEAST_SAMPLES
    assert (facts["sm_clock_mhz"], facts["power_watts"], facts["clock_reasons"]) == (1755, 690.5, ["power cap"])
    assert facts["memory_clock_mhz"] is None


def test_precision_comes_back():
    before = torch.backends.cuda.matmul.fp32_precision
    with probes_cuda.fp32_precision("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before


# --- the alias ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_an_alias_names_the_bytes_of_the_host_tensor(dtype):
    host = torch.randn(3, 16).to(dtype)
    described = alias._Bytes(host).__cuda_array_interface__
    assert described["shape"] == (host.numel() * dtype.itemsize,) and described["typestr"] == "|u1"
    assert described["data"] == (host.data_ptr(), False)


def test_only_whole_pinned_memory_can_be_shared(monkeypatch):
    with pytest.raises(InputError, match="not pinned"):
        alias.device_alias(torch.ones(4))
    with pytest.raises(InputError, match="contiguous"):
        alias.device_alias(torch.ones(4, 4).t(), pageable=True)
    with pytest.raises(InputError, match="not empty"):
        alias.device_alias(torch.ones(0), pageable=True)
    # A torch that copies instead of sharing is found out.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "as_tensor", lambda obj, device: obj.host.view(torch.uint8).flatten().clone())
    with pytest.raises(InputError, match="copied the host memory"):
        alias.device_alias(torch.ones(4, 4), pageable=True)
    monkeypatch.setattr(torch, "as_tensor", lambda obj, device: obj.host.view(torch.uint8).flatten())
    host = torch.randn(4, 4).bfloat16()
    shared = alias.device_alias(host, pageable=True)
    assert shared.shape == host.shape and shared.dtype == host.dtype and torch.equal(shared, host)


def test_memory_that_is_not_shared_is_found_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    host = torch.randn(8)
    before = host.clone()
    alias.check_alias(host, host.view(8))
    assert torch.equal(host, before)
    with pytest.raises(InputError, match="do not see each other's writes"):
        alias.check_alias(host, host.clone())


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_probes_of_a_gpu_machine_run(tmp_path):
    lines, left_out = [], {}
    for probe in probes.probes("cuda", ["bf16"], max(1, (os.cpu_count() or 2) // 2), "quick"):
        try:
            lines.append(probes.run_probe(probe, Limits(2_000_000, 100_000_000), 0))
        except (RuntimeError, InputError) as error:
            left_out[probe.name, str(dict(probe.params))] = str(error)
    assert all("system memory" in reason or "rows would take" in reason for reason in left_out.values()), left_out
    found = summary(lines)
    assert found["link_kernel_read_bytes_per_s"]["value"] < 0.5 * found["memory_stream_bytes_per_s"]["value"]
    assert found["null_kernel_ns"]["value"] < 20_000 and found["graph_kernel_ns"]["value"] < 20_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_pinned_memory_is_shared_with_the_device(dtype):
    host = torch.randn(64, 64).to(dtype).pin_memory()
    shared = alias.device_alias(host)
    alias.check_alias(host, shared)
    assert shared.is_cuda and shared.shape == host.shape and shared.dtype == dtype
    assert torch.equal(shared.float().cpu(), host.float())


def test_probes_by_turns_leave_something_of_each_wherever_they_are_cut():
    made = [[f"{name}{at}" for at in range(n)] for name, n in (("a", 12), ("b", 4), ("c", 2))]
    mixed = probes_cuda.by_turns(*made)
    assert sorted(mixed) == sorted(itertools.chain(*made))
    for n_first in range(len(mixed) + 1):
        for one in made:
            found = [word for word in mixed[:n_first] if word in one]
            assert found == one[: len(found)] and abs(len(found) / len(one) - n_first / len(mixed)) <= 0.5


def test_sizes_of_copies_are_spread_over_the_range_from_the_first():
    sizes = probes_link._spread(probes_link.SIZES["standard"])
    assert sorted(sizes) == sorted(probes_link.SIZES["standard"])
    assert sizes[:3] == [probes_link.CORE_BYTES, 1 << 16, 1 << 30]
    assert probes_link._spread(probes_link.SIZES["quick"]) == [probes_link.CORE_BYTES, 1 << 20]
