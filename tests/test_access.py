"""Experts in two memories: every way to reach them gives the numbers of resident experts, in any order that is allowed.

All shapes, placements and routings here are made up for the tests.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectors.workloads import Workload
from perfmodel.errors import InputError
from tests.lanes_made import MadeCuda, pickers, run_adversarially

torch = pytest.importorskip("torch", reason="torch is not installed")

from collectors import access, checks, graphs, lanes, layer, mapped, memory, modes, plan, points, rehearse, workloads  # noqa: E402
from collectors.lanes import COMPUTE, COPY_IN, COPY_OUT, HOST, Step  # noqa: E402

WAYS = (
    ("zero-copy", "mapped"),
    ("zero-copy", "split"),
    ("copy", None),
    ("copy-overlap", None),
    ("cpu", None),
)
STEPPED = WAYS[1:]
OPS = ("grouped_gemm", "moe_layer")


@pytest.fixture(autouse=True)
def _quiet_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def made(
    op="grouped_gemm", n_experts=8, top_k=2, n_tokens=12, way=("copy", None), offloaded=(1, 4, 5), n_gemms=3,
    dtype="fp32", device="cpu", shares=None, seed=3, hidden=64, inter=32,
) -> tuple[Workload, np.ndarray]:  # fmt: skip
    """A workload of made-up shape, its tokens drawn from shares `[1, expert]`."""
    shares = np.full((1, n_experts), 1 / n_experts) if shares is None else np.asarray(shares, dtype=float)[None, :]
    empty = Workload(
        op, "made", n_experts, top_k, hidden, inter, n_gemms, None, None, dtype, device, n_tokens, "file:made", seed,
        (), way[0], len(offloaded) / n_experts, tuple(offloaded), "random", way[1],
    )  # fmt: skip
    if op == "grouped_gemm":
        empty = replace(empty, gemm_k=empty.moe_shape.gemms[0][0], gemm_n=empty.moe_shape.gemms[0][1])
    counts = np.bincount(workloads.choices(empty, shares).ravel(), minlength=n_experts)
    return replace(empty, tokens_per_expert=tuple(counts.tolist())), shares


def pool_for(workload, n_layers=3, cold_bytes=1e9):
    n_bytes = int(n_layers * workload.moe_shape.layer_bytes)
    return points.make_pool(n_bytes, cold_bytes, workload.dtype, workload.device, 0)


def small_chunks(monkeypatch, workload):
    """Chunks of one expert, so that the two buffers are used in turn many times."""
    monkeypatch.setattr(modes, "CHUNK_BYTES", 1)
    assert modes.chunk_experts(workload, 4) == 1


# --- steps and executors ---


def test_steps_that_wait_for_nothing_known_are_refused():
    run = lambda: None  # noqa: E731
    assert len(lanes.checked([Step("a", COMPUTE, (), run), Step("b", HOST, ("a",), run)])) == 2
    with pytest.raises(ValueError, match="waits for"):
        lanes.checked([Step("b", HOST, ("a",), run), Step("a", COMPUTE, (), run)])
    with pytest.raises(ValueError, match="a name twice"):
        lanes.checked([Step("a", COMPUTE, (), run), Step("a", HOST, (), run)])
    with pytest.raises(ValueError, match="no such lane"):
        lanes.checked([Step("a", "disk", (), run)])


def test_the_executor_without_cuda_runs_in_order():
    seen = []
    call = lanes.in_order([Step(str(i), COMPUTE, (), lambda i=i: seen.append(i)) for i in range(4)])
    call()
    call()
    assert seen == [0, 1, 2, 3] * 2


def on_made_cuda(monkeypatch, seed):
    cuda = MadeCuda(seed)
    monkeypatch.setattr(torch.cuda, "Event", cuda.event_type)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: cuda.streams[cuda.current])
    monkeypatch.setattr(torch.cuda, "stream", cuda.stream)
    side = {lane: cuda.new_stream(lane) for lane in (COPY_IN, COPY_OUT)}

    def bind(steps):
        later = [
            s if s.lane == HOST else replace(s, run=lambda run=s.run: cuda.enqueue(run)) for s in lanes.checked(steps)
        ]
        return lanes.on_cuda(later, side)

    return cuda, bind


@pytest.mark.parametrize("seed", range(5))
def test_cuda_executor_keeps_lanes_waits_and_calls_apart(monkeypatch, seed):
    cuda, bind = on_made_cuda(monkeypatch, seed)
    seen = []

    def step(name, lane, *after):
        return Step(name, lane, after, lambda: seen.append(name))

    call = bind([
        step("send", COPY_OUT), step("copy 0", COPY_IN), step("near", COMPUTE), step("host", HOST, "send"),
        step("chunk 0", COMPUTE, "copy 0"), step("copy 1", COPY_IN, "chunk 0"), step("receive", COPY_IN, "host"),
        step("combine", COMPUTE, "receive"),
    ])  # fmt: skip
    for n in range(1, 4):
        call()
        cuda.enqueue(lambda: seen.append("end"))  # whatever comes next on the compute stream
        if n == 2:
            continue  # two calls in flight
        cuda.drain()
    per_call = np.split(np.array(seen), np.flatnonzero(np.array(seen) == "end") + 1)[:-1]
    assert len(per_call) == 3
    for names in map(list, per_call):
        place = {name: i for i, name in enumerate(names)}
        assert len(place) == len(names) == 9  # no call reaches into another
        for earlier, later in (
            ("send", "host"), ("host", "receive"), ("copy 0", "chunk 0"), ("chunk 0", "copy 1"), ("near", "chunk 0"),
            ("copy 1", "receive"), ("receive", "combine"), ("copy 0", "copy 1"),
        ):  # fmt: skip
            assert place[earlier] < place[later], names


# --- the ways ---

ONE_HOT = [0, 0, 0, 0, 1, 0, 0, 0]
CASES = {
    "some experts, some tokens": {},
    "no active expert is offloaded": {"shares": ONE_HOT, "top_k": 1, "offloaded": (0, 7)},
    "all experts are offloaded": {"offloaded": tuple(range(8))},
    "all tokens on one offloaded expert": {"shares": ONE_HOT, "top_k": 1, "offloaded": (4, 5)},
    "one token": {"n_tokens": 1, "offloaded": (0, 1, 2, 3, 4)},
    "every expert serves every token": {"top_k": 8, "offloaded": (7, 0)},
    "odd widths": {"hidden": 48, "inter": 80, "offloaded": (2, 3)},
    "plain experts": {"n_gemms": 2, "offloaded": (0, 3, 6)},
    "many tokens, many chunks": {"n_tokens": 100, "offloaded": (0, 2, 3, 4, 6, 7)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(filter(None, way)))
def test_every_way_gives_the_numbers_of_the_slow_twin(monkeypatch, case, op, way):
    workload, shares = made(op=op, way=way, **CASES[case])
    monkeypatch.setattr(modes, "CHUNK_BYTES", 1)
    points.check(pool_for(workload), workload, shares)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", [w for w in WAYS if w[0] != "cpu"], ids=lambda way: "-".join(filter(None, way)))
def test_every_way_carries_scales_of_fp8(monkeypatch, op, way):
    """With a made-up fp8 kernel, since a CPU has none: its numbers are those of the slow twin of the same parts."""

    def kernel(rows, weights, offs):
        return layer.slow_grouped_mm(rows, weights, offs).to(torch.bfloat16)

    monkeypatch.setattr(layer, "scaled_grouped_mm", kernel)
    monkeypatch.setattr(modes, "CHUNK_BYTES", 1)
    workload, shares = made(op=op, way=way, dtype="fp8", n_tokens=60, hidden=256, inter=128)
    points.check(pool_for(workload), workload, shares)
    resident = replace(workload, access="resident", offloaded=None, order=None, residency=None, offload_frac=0.0)
    points.check(pool_for(resident), resident, shares)


@settings(max_examples=40)
@given(data=st.data())
def test_any_placement_of_any_routing_is_computed_right(data):
    n_experts = data.draw(st.integers(1, 9))
    offloaded = data.draw(st.lists(st.integers(0, n_experts - 1), min_size=1, unique=True))
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, 5.0]), min_size=n_experts, max_size=n_experts))
    top_k = data.draw(st.integers(1, max(1, sum(w > 0 for w in weights))))
    if not any(weights):
        weights[0] = 1.0
    workload, shares = made(
        op=data.draw(st.sampled_from(OPS)), n_experts=n_experts, top_k=top_k, n_tokens=data.draw(st.integers(1, 17)),
        way=data.draw(st.sampled_from(WAYS)), offloaded=offloaded, shares=np.array(weights) / sum(weights),
        dtype=data.draw(st.sampled_from(["fp32", "bf16"])), n_gemms=data.draw(st.sampled_from([2, 3])),
        seed=data.draw(st.integers(0, 99)), hidden=32, inter=16,
    )  # fmt: skip
    with torch.inference_mode():
        points.check(pool_for(workload), workload, shares)


def expected_of(arranged, position):
    return checks.expected_of(arranged, arranged.experts(position))[0]


def snapshots(arranged, n_calls):
    """Steps of some calls in a row with one more at the end of each that keeps its result."""
    kept = []
    calls = []
    for n in range(n_calls):
        steps = arranged.steps[n % len(arranged.steps)]
        keep = Step("keep", COMPUTE, tuple(s.name for s in steps), lambda: kept.append(arranged.result().clone()))
        calls.append((*steps, keep))
    return calls, kept


def are_right(arranged, kept):
    n = len(arranged.steps)
    return all(checks.difference(found, expected_of(arranged, call % n)) < 1e-4 for call, found in enumerate(kept))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", STEPPED, ids=lambda way: "-".join(filter(None, way)))
def test_any_allowed_order_of_steps_gives_the_same_numbers(monkeypatch, op, way):
    workload, shares = made(op=op, way=way, n_tokens=40, offloaded=(0, 2, 3, 4, 6, 7))
    small_chunks(monkeypatch, workload)
    pool = pool_for(workload)
    arranged = access.arrange(pool, workload, shares, 0)
    assert len(arranged.steps) > 1
    for pick in pickers():
        calls, kept = snapshots(arranged, 3)
        run_adversarially(calls, pick)
        assert len(kept) == 3 and are_right(arranged, kept)


def test_the_adversary_finds_a_buffer_that_is_overwritten_too_early(monkeypatch):
    workload, shares = made(way=("copy-overlap", None), n_tokens=40, offloaded=(0, 2, 3, 4, 6, 7))
    small_chunks(monkeypatch, workload)
    arranged = access.arrange(pool_for(workload), workload, shares, 0)
    waiting = [s for s in arranged.steps[0] if s.name.startswith("copy") and s.after]
    assert [s.after for s in waiting] == [(f"chunk {i}",) for i in range(4)]
    careless = [tuple(replace(s, after=()) if s in waiting else s for s in steps) for steps in arranged.steps]
    arranged = replace(arranged, steps=tuple(careless))
    calls, kept = snapshots(arranged, 1)
    run_adversarially(calls, pickers()[0])  # copies first
    assert not are_right(arranged, kept)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", STEPPED, ids=lambda way: "-".join(filter(None, way)))
def test_the_cuda_executor_gives_the_same_numbers(monkeypatch, op, way):
    workload, shares = made(op=op, way=way, n_tokens=40, offloaded=(0, 2, 3, 4, 6, 7))
    small_chunks(monkeypatch, workload)
    arranged = access.arrange(pool_for(workload), workload, shares, 0)
    for seed in range(3):
        cuda, bind = on_made_cuda(monkeypatch, seed)
        kept = []
        for n in range(3):
            bind(arranged.steps[n % len(arranged.steps)])()
            cuda.enqueue(lambda kept=kept: kept.append(arranged.result().clone()))
        cuda.drain()
        assert len(kept) == 3 and are_right(arranged, kept)


def test_steps_of_each_way():
    names = {}
    for way in STEPPED:
        for op in OPS:
            workload, shares = made(op=op, way=way)
            arranged = access.arrange(pool_for(workload), workload, shares, 0)
            names[way[1] or way[0], op] = [(s.name, s.lane) for s in arranged.steps[0]]
    front = [("router", COMPUTE), ("dispatch", COMPUTE), ("counts", HOST)]
    end = [("combine", COMPUTE)]
    split = [("resident", COMPUTE), ("offloaded", COMPUTE)]
    copy = [("copy", COPY_IN), ("experts", COMPUTE)]
    cpu = [("send", COPY_OUT), ("resident", COMPUTE), ("host", HOST), ("receive", COPY_IN)]
    for way, steps in (("split", split), ("copy", copy), ("cpu", cpu)):
        assert names[way, "grouped_gemm"] == steps
        assert names[way, "moe_layer"] == [*front, *steps, *end]


def test_chunks_bring_the_active_offloaded_experts_once_and_in_order(monkeypatch):
    shares = np.array([4, 1, 0, 3, 2, 0, 5, 1]) / 16  # experts 2 and 5 are idle
    workload, shares = made(way=("copy-overlap", None), shares=shares, n_tokens=64, offloaded=(1, 2, 3, 5, 6))
    assert memory.active_offloaded(workload) == (1, 3, 6)
    monkeypatch.setattr(modes, "CHUNK_BYTES", 10**9)
    assert modes.chunk_experts(workload, 4) == 2  # two chunks at least
    arranged = access.arrange(pool_for(workload), workload, shares, 0)
    assert [s.name for s in arranged.steps[0]] == ["copy 0", "copy 1", "resident", "chunk 0", "chunk 1"]
    assert arranged.problem.slots == (0, 4, 7, 1, 2, 3, 5, 6)
    assert arranged.facts["n_active_offloaded"] == 3 and arranged.facts["chunk_experts"] == 2
    per_expert = workload.gemm_k * workload.gemm_n * 4
    assert arranged.facts["offloaded_active_bytes"] == 3 * per_expert
    assert arranged.facts["resident_active_bytes"] == 3 * per_expert
    assert arranged.facts["n_expert_launches"] == 3
    assert arranged.facts["offloaded_rows"] == sum(workload.tokens_per_expert[e] for e in (1, 3, 6))


def test_only_experts_with_tokens_take_host_memory_unless_one_launch_looks_at_all():
    shares = np.array([4, 1, 0, 3, 2, 0, 5, 1]) / 16
    away = {"shares": shares, "n_tokens": 64, "offloaded": (6, 1, 2, 3, 5)}
    for way, experts in ((("copy", None), (1, 3, 6)), (("cpu", None), (1, 3, 6)), (WAYS[1], (1, 2, 3, 5, 6))):
        workload, _ = made(way=way, **away)
        assert memory.hosted(workload) == experts
        staged = memory.staging_elements(workload) * 4
        assert memory.host_bytes(workload, 3) == 3 * len(experts) * 64 * 64 * 4 + staged


def test_a_layer_says_when_counts_read_back_are_not_those_of_the_plan():
    workload, shares = made(op="moe_layer", way=("copy", None))
    arranged = access.arrange(pool_for(workload), workload, shares, 0)
    arranged.problem.chosen.copy_((arranged.problem.chosen + 1) % 8)
    with pytest.raises(RuntimeError, match="counts read back"):
        arranged.calls[0]()


def test_a_way_that_computes_wrongly_is_named_and_not_timed(monkeypatch):
    workload, shares = made(way=("cpu", None))
    right = modes.host_experts

    def wrong(rows, weights, ends, out, is_gated):
        right(rows, weights, ends, out, is_gated)
        out[0] += 1

    monkeypatch.setattr(modes, "host_experts", wrong)
    with pytest.raises(InputError, match="grouped_gemm with cpu of made differs from the slow reference"):
        points.check(pool_for(workload), workload, shares)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("way", "part"), [("copy", "_copy"), ("copy-overlap", "_copy"), ("cpu", "_send"), ("cpu", "_receive")]
)
def test_a_copy_that_never_happens_is_seen_even_where_the_right_numbers_already_lie(monkeypatch, op, way, part):
    workload, shares = made(op=op, way=(way, None), n_tokens=40)
    monkeypatch.setattr(access.torch, "empty", kept_memory(torch.empty))
    pool = pool_for(workload)
    for call in access.arrange(pool, workload, shares, 0).calls:
        call()  # after this all weights and results lie where copies would put them
    points.check(pool, workload, shares)

    def skipped(slate, *_):
        if part == "_receive":
            slate.outs["host"] = _[0]

    monkeypatch.setattr(modes, part, skipped)
    with pytest.raises(InputError, match="differs from the slow reference by nan"):
        points.check(pool, workload, shares)


def kept_memory(empty):
    """torch.empty that gives the same memory again for the same size, as an allocator may."""
    held = {}

    def again(*size, **more):
        return held.setdefault((size, str(more)), empty(*size, **more))

    return again


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", STEPPED, ids=lambda way: "-".join(filter(None, way)))
def test_a_check_leaves_no_mark_in_weights(op, way):
    workload, shares = made(op=op, way=way, n_tokens=40)
    pool = pool_for(workload)
    points.prepare(pool, workload, shares, 0).close()
    before = pool.host.flat.clone()
    points.check(pool, workload, shares)
    points.prepare(pool, workload, shares, 0).call(0)
    assert bool(torch.isfinite(pool.flat).all())
    if way[0] != "cpu":
        assert torch.equal(pool.host.flat, before)
    else:  # activations were staged there, and weights are there again
        assert float(pool.host.flat[: before.numel() // 2].abs().max()) < 0.2


def test_host_weights_and_experts_differ_wherever_one_could_stand_for_another():
    workload, shares = made()
    pool = pool_for(workload)
    points.prepare(pool, workload, shares, 0)
    n = min(pool.flat.numel(), pool.host.flat.numel())
    assert float((pool.flat[:n] == pool.host.flat[:n]).float().mean()) < 0.01
    # Experts so many elements apart hold the same block from another place of it on.
    strides = [2**i * odd for i in range(12, 29) for odd in (1, 3, 7, 45)]
    for block in (points.FILL_ELEMENTS, memory.FILL_ELEMENTS):
        assert all(stride * between % block for stride in strides for between in range(1, 512))
    assert points.FILL_ELEMENTS % 1024 == 0


@pytest.mark.parametrize("way", STEPPED[1:], ids=lambda way: way[0])
def test_a_call_with_one_lane_held_up_gives_the_same_numbers(monkeypatch, way):
    workload, shares = made(op="moe_layer", way=way, n_tokens=40, offloaded=(0, 2, 3, 4, 6, 7))
    small_chunks(monkeypatch, workload)
    arranged = access.arrange(pool_for(workload), workload, shares, 0)
    for lane in {step.lane for step in arranged.steps[0]} - {HOST}:
        cuda, _ = on_made_cuda(monkeypatch, 1)
        side = {name: cuda.streams[name] for name in (COPY_IN, COPY_OUT)}
        held_up = []
        monkeypatch.setattr(access, "streams", lambda side=side: side)
        monkeypatch.setattr(torch.cuda, "_sleep", held_up.append)
        steps = [
            tuple(
                s if s.lane == HOST else replace(s, run=lambda cuda=cuda, run=s.run: cuda.enqueue(run))
                for s in position
            )
            for position in arranged.steps
        ]
        access.late(replace(arranged, steps=tuple(steps)), 0, lane)()
        cuda.drain()
        assert checks.difference(arranged.result(), expected_of(arranged, 0)) < 1e-4
        assert held_up == [access.HOLD_UP_CYCLES] * sum(step.lane == lane for step in arranged.steps[0])


def test_inputs_are_quantised_alike_piece_by_piece(monkeypatch):
    rows = torch.randn(37, 64, dtype=torch.bfloat16)
    whole = layer.quantise(rows)
    monkeypatch.setattr(layer, "ROWS_AT_ONCE", 10)
    pieces = layer.quantised(rows)
    assert torch.equal(pieces.values.view(torch.uint8), whole.values.view(torch.uint8))
    assert torch.equal(pieces.scale, whole.scale)


def test_what_cannot_be_is_said():
    workload, shares = made(way=("cpu", None), dtype="fp8")
    with pytest.raises(InputError, match="not in fp8"):
        access.arrange(pool_for(workload), workload, shares, 0)
    resident = replace(workload, access="resident", offloaded=None, order=None, offload_frac=0.0)
    with pytest.raises(InputError, match="does not run"):  # no fp8 grouped GEMM on a CPU
        points.check(pool_for(resident), resident, shares)
    workload, shares = made(way=("copy", None))
    with pytest.raises(InputError, match="only a CUDA device replays"):
        points.prepare(pool_for(workload), replace(workload, launch="graph"), shares, 0)
    workload, shares = made(way=("zero-copy", "system"))
    with pytest.raises(InputError, match="needs a CUDA device"):
        points.prepare(pool_for(workload), workload, shares, 0)
    assert "only CUDA" in mapped.support("cpu")
    assert set(points.WAYS) == {"mapped", "split", "system", "graph", "fp8"}
    assert all(points.capability("cpu", way) for way in points.WAYS)
    with pytest.raises(InputError, match="more weights than the pool holds"):
        points.prepare(points.make_pool(64, 0.0, "fp32", "cpu", 0), made()[0], shares, 0)


def test_prepared_calls_go_around_the_positions_and_say_facts():
    workload, shares = made(way=("zero-copy", "mapped"))
    prepared = points.prepare(pool_for(workload), workload, shares, 0)
    assert prepared.n_inner == 1 and "emulated" in prepared.facts
    n = prepared.facts["n_positions"]
    assert n == prepared.facts["n_device_copies"] == 4  # three layers hold four copies of gate and up, 2/3 of a layer
    outs = [prepared.call(i).clone() for i in range(n + 1)]
    assert torch.equal(outs[0], outs[n]) and not torch.equal(outs[0], outs[1])
    prepared.close()


# --- memory ---


def test_how_many_copies_keep_caches_cold():
    workload, _ = made(n_experts=4, top_k=4, n_tokens=2, offloaded=(3,))  # every expert is active
    per_expert = 64 * 64 * 4
    assert memory.expert_elements(workload) == 64 * 64
    assert memory.n_positions(workload, 0) == 1
    assert memory.n_positions(workload, 3 * per_expert) == 2  # three residents a position
    assert memory.n_positions(workload, 3 * per_expert + 1) == 3
    assert memory.n_positions(workload, 1e18) == memory.MAX_POSITIONS
    everything, _ = made(n_experts=4, top_k=4, n_tokens=2, offloaded=(0, 1, 2, 3))
    assert memory.n_positions(everything, 4 * per_expert) == 2


def test_the_pinned_buffer_is_a_power_of_two_that_serves_all():
    copy, _ = made(n_experts=4, top_k=4, n_tokens=2, offloaded=(0, 3))
    one = 2 * 64 * 64 * 4
    assert memory.host_bytes(copy) == one == 32768
    assert memory.n_host_copies(copy, 1e12) == memory.MAX_HOST_COPIES
    assert memory.n_host_copies(copy, 3 * one + 5) == 3
    assert memory.n_host_copies(copy, one - 1) == 0
    assert memory.host_pool_bytes([copy], 1e12) == 64 * one
    split, _ = made(n_experts=4, top_k=4, n_tokens=2, offloaded=(0, 3), way=("zero-copy", "split"))
    assert memory.host_pool_bytes([split], 1e12) == 64 * one
    # Of one active expert of 2 MiB each copy holds 31 idle ones too: 64 MiB, of which 2 GiB hold 32 copies.
    idle, _ = made(
        n_experts=32, top_k=1, n_tokens=2, offloaded=tuple(range(32)), way=("zero-copy", "split"), dtype="bf16",
        hidden=1024, inter=512, shares=[1.0] + [0.0] * 31,
    )  # fmt: skip
    assert memory.n_host_copies(idle, 1e12) == 32
    assert memory.n_host_copies(replace(idle, hidden=8192, gemm_k=8192, gemm_n=8192), 1e12) == 4  # 4 GiB each
    large, _ = made(n_experts=4, top_k=4, n_tokens=2, offloaded=(0, 3), hidden=4096, inter=4096)
    assert memory.n_host_copies(large, 1e12) == 2  # 268 MB each, and 537 MB are to be read
    assert memory.host_pool_bytes([copy, large], 1e12) == 2**29
    assert memory.host_pool_bytes([copy], 3 * one) == 2 * one
    assert memory.host_pool_bytes([copy], one - 1) == 0
    cpu, _ = made(n_experts=4, top_k=4, n_tokens=2, offloaded=(0, 3), way=("cpu", None))
    rows = 2 * 2  # two tokens on two experts, to the host and back
    assert memory.staging_elements(cpu) == rows * (64 + 64)
    assert memory.host_bytes(cpu) == one + rows * 128 * 4
    assert memory.host_pool_bytes([cpu], 1e12) == 128 * one  # 64 copies and a little
    mapped, _ = made(way=("zero-copy", "mapped"))
    assert memory.host_pool_bytes([mapped], 1e12) == 0
    assert [memory.largest_buffer_bytes(n) for n in (0, 1, 2, 3, 4, 1023, 1024.5)] == [0, 1, 2, 2, 4, 512, 1024]


def test_host_memory_has_a_limit_and_grows_within_it():
    workload, shares = made(offloaded=(0, 3))
    one = memory.host_bytes(workload)
    pool = points.make_pool(int(workload.moe_shape.layer_bytes), 0.0, "fp32", "cpu", 0, memory.HostSide(one - 1))
    with pytest.raises(InputError, match="more host memory than may be taken"):
        points.prepare(pool, workload, shares, 0)
    pool = points.make_pool(int(workload.moe_shape.layer_bytes), 0.0, "fp32", "cpu", 0, memory.HostSide(4 * one))
    points.prepare(pool, workload, shares, 0)
    assert pool.host.flat.numel() * 4 == 4 * one
    more, shares = made(way=("zero-copy", "split"), offloaded=tuple(range(8)), hidden=128)
    with pytest.raises(InputError, match="more host memory than may be taken"):
        points.prepare(pool, more, shares, 0)
    pool = points.make_pool(
        int(workload.moe_shape.layer_bytes), 0.0, "fp32", "cpu", 0, memory.HostSide(wanted_bytes=1 << 23)
    )
    assert pool.host.flat is None  # made when it is needed
    points.prepare(pool, workload, shares, 0)
    assert pool.host.flat.numel() * 4 == 1 << 23


def test_positions_lie_apart_in_both_memories():
    workload, _ = made(offloaded=(0, 3), n_experts=4, top_k=4)
    pool = pool_for(workload, n_layers=3)
    placed, rest, copies = memory.place(pool, workload, 2)
    # Three layers of four experts with three matrices hold two experts with two of them nine times.
    assert copies == (9, memory.MAX_HOST_COPIES)
    assert len(placed) == max(9, memory.MAX_HOST_COPIES)
    starts = {p.device[0].data_ptr() for p in placed}
    assert len(starts) == 9
    assert min(abs(a - b) for a in starts for b in starts if a != b) == placed[0].device[0].numel() * 4
    hosts = {p.host[0].data_ptr() for p in placed}
    assert len(hosts) == memory.MAX_HOST_COPIES
    assert max(hosts) - min(hosts) == 63 * placed[0].host[0].numel() * 4
    assert rest.numel() == 0  # 64 copies are a power of two
    assert float(pool.host.flat.std()) == pytest.approx(0.02, rel=0.1)  # random weights, not zeros


def test_free_memory_minds_the_control_group(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": ["MemTotal: 4096 kB", "MemAvailable:    2048 kB"],
        "/sys/fs/cgroup/memory.max": ["1000000"],
        "/sys/fs/cgroup/memory.current": ["900000"],
        "/sys/fs/cgroup/memory.stat": ["anon 5", "inactive_file 40000"],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(str(path), []))
    assert memory.free_host_bytes() == 140000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert memory.free_host_bytes() == 2048 * 1024


def test_pages_come_from_the_node_asked_for():
    """On any Linux machine node 0 is there; what a GPU reads of it is another matter."""
    import ctypes
    import mmap

    from collectors import system_memory

    with mmap.mmap(-1, 1 << 21) as area:
        view = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(view)
        del view
        try:
            system_memory.bind(address, 1 << 21, 0)
            area[:] = b"x" * (1 << 21)
            found = system_memory.nodes_of([address, address + 4096])
        except InputError as error:  # a container may forbid it
            pytest.skip(str(error))
        assert found == [0, 0]
        with pytest.raises(InputError, match="does not place memory"):
            system_memory.bind(address, 1 << 21, 900)
    with pytest.raises(InputError, match="node 5000"):
        system_memory.bind(0, 1 << 21, 5000)


# --- graphs, rehearsal ---


def test_graphs_hold_equally_many_calls():
    assert [graphs.per_graph(n) for n in (1, 2, 16, 17, 32, 33, 64)] == [1, 2, 16, 8, 16, 11, 16]


def test_a_plan_is_rehearsed_with_tiny_widths():
    request = plan.Request("cuda", "bfloat16", ("olmoe", "mixtral-8x7b"), (1, 4096), ("power-law:1.2",))
    found = []
    for w in plan.plan(request, None).workloads:
        away = tuple(range(0, w.n_experts, 3))
        placed = replace(w, offloaded=away, offload_frac=len(away) / w.n_experts, order="random")
        found += [replace(placed, access=way, residency=how) for way, how in WAYS]
    found.append(replace(found[0], dtype="fp8", launch="graph"))
    results = rehearse.rehearse(found)
    assert [w for w, _, _ in results] == found
    assert all(is_ok for _, is_ok, _ in results), [words for _, is_ok, words in results if not is_ok]
    assert {words for w, _, words in results if w.residency == "mapped"} == {"mapped memory was one ordinary tensor"}
    tiny = rehearse.small(found[0])
    assert (tiny.hidden, tiny.n_experts, tiny.device, tiny.offloaded) == (64, 64, "cpu", found[0].offloaded)
    assert sum(tiny.tokens_per_expert) == tiny.n_tokens * tiny.top_k


def test_a_rehearsal_says_what_fails(monkeypatch):
    right = modes.host_experts
    monkeypatch.setattr(modes, "host_experts", lambda *a: (right(*a), a[3].neg_()))
    ok, _ = made()
    bad, _ = made(way=("cpu", None))
    results = rehearse.rehearse([ok, bad])
    assert [is_ok for _, is_ok, _ in results] == [True, False]
    assert "cpu" in results[1][2]


# --- on a CUDA device: `pytest -m gpu tests/test_access.py` ---


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield
    torch.cuda.synchronize()


def on_cuda(way, op="grouped_gemm", dtype="bf16", **more):
    case = {"n_experts": 16, "top_k": 4, "n_tokens": 200, "offloaded": (1, 2, 5, 9, 10, 15)}
    return made(op=op, way=way, dtype=dtype, device="cuda", **{**case, "hidden": 512, "inter": 256, **more})


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(filter(None, way)))
def test_cuda_every_way_gives_the_numbers_of_the_slow_twin(cuda, monkeypatch, case, op, way):
    if way[1] == "mapped" and (reason := mapped.support("cuda")):
        pytest.skip(reason)
    monkeypatch.setattr(modes, "CHUNK_BYTES", 1)
    workload, shares = on_cuda(way, op, **{"n_experts": 8, "top_k": 2, "offloaded": (1, 4, 5), **CASES[case]})
    points.check(pool_for(workload), workload, shares)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("way", [w for w in WAYS if w[0] != "cpu"], ids=lambda way: "-".join(filter(None, way)))
def test_cuda_fp8_every_way(cuda, op, way):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this device has no grouped GEMM in fp8")
    if way[1] == "mapped" and (reason := mapped.support("cuda")):
        pytest.skip(reason)
    workload, shares = on_cuda(way, op, "fp8")
    points.check(pool_for(workload), workload, shares)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [w for w in WAYS if w[0] != "cpu"], ids=lambda way: "-".join(filter(None, way)))
def test_cuda_graphs_replay_the_same_numbers(cuda, way):
    if way[1] == "mapped" and (reason := mapped.support("cuda")):
        pytest.skip(reason)
    workload, shares = on_cuda(way)
    workload = replace(workload, launch="graph")
    pool = pool_for(workload)
    points.check(pool, workload, shares)
    prepared = points.prepare(pool, workload, shares, 0)
    assert prepared.n_inner == prepared.facts["calls_per_graph"] >= 1
    for n in range(3):
        prepared.call(n)
    torch.cuda.synchronize()
    prepared.close()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_cuda_graphs_of_resident_experts(cuda, op):
    workload, shares = on_cuda(("resident", None), op)
    workload = replace(workload, offloaded=None, order=None, offload_frac=0.0, launch="graph")
    points.check(pool_for(workload), workload, shares)


@pytest.mark.gpu
def test_cuda_a_layer_that_reads_counts_back_is_not_recorded(cuda):
    workload, shares = on_cuda(("copy", None), "moe_layer")
    with pytest.raises(InputError, match="host takes part"):
        points.prepare(pool_for(workload), replace(workload, launch="graph"), shares, 0)


@pytest.mark.gpu
def test_cuda_says_what_it_can(cuda):
    found = {way: points.capability("cuda", way) for way in points.WAYS}
    assert set(found) == set(points.WAYS)
    assert found["split"] is None, found  # pinned memory is seen everywhere


@pytest.mark.gpu
def test_cuda_alias_is_the_same_memory(cuda):
    from collectors.alias import device_alias

    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        pinned = torch.zeros(1 << 16, dtype=torch.uint8).pin_memory().view(dtype)
        alias = device_alias(pinned)
        assert alias.is_cuda and alias.dtype == dtype and alias.data_ptr() == pinned.data_ptr()
        alias.fill_(3)
        torch.cuda.synchronize()
        assert bool((pinned == 3).all())
        pinned.fill_(5)
        assert bool((alias == 5).all().item())


@pytest.mark.gpu
def test_cuda_mapped_ranges_come_and_go(cuda):
    if reason := mapped.support("cuda"):
        pytest.skip(reason)
    workload, shares = on_cuda(("zero-copy", "mapped"))
    pool = pool_for(workload)
    for _ in range(3):
        prepared = points.prepare(pool, workload, shares, 0)
        assert bool(torch.isfinite(prepared.call(0)).all().item())
        prepared.close()
    held = pool.host.virtual.made_bytes(True)
    assert held == pool.host.virtual.idle_bytes(True) > 0
    mapped.trim(pool)
    assert pool.host.virtual.made_bytes(True) == pool.host.virtual.made_bytes(False) == 0


@pytest.mark.gpu
def test_cuda_system_memory_where_there_is_such(cuda):
    workload, shares = on_cuda(("zero-copy", "system"))
    try:
        points.check(pool_for(workload), workload, shares)
    except InputError as error:
        pytest.skip(str(error))
