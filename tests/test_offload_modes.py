"""Access modes: numbers worked by hand on a made-up machine, parts that sum up, limits, and what must rise or fall."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import physics
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity, hardware
from perfmodel.offload import (
    ACCESS_MODES,
    Device,
    Host,
    OffloadConstants,
    beside_parts,
    link_rate,
    offload_parts,
    usable_modes,
)
from perfmodel.offload.beside import longest_first
from perfmodel.offload.paged import expected_misses
from perfmodel.physics import Ceilings, Counts, TiledConstants, Work, form_of, tiled, total
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, RESIDENT

RATES = {  # round numbers, of no machine: 1 TFLOP/s, 100 GB/s; a link of 10 GB/s there, 5 GB/s back
    "link_h2d_copy_bytes_per_s": 10e9,
    "link_d2h_copy_bytes_per_s": 5e9,
    "host_stream_bytes_per_s": 40e9,
    "host_gemm_flops_per_s": 2e11,
}
MODULES = {"n_ndp_count": 2.0, "ndp_peak_bytes_per_s": 20e9, "ndp_peak_flops_per_s": 1e10}
ROOF = Ceilings(1e12, 1e11, ())
SHARP = TiledConstants(
    tile_overhead_rows=0.0,
    tile_overhead_cols=0.0,
    tile_overhead_terms=0.0,
    smooth_p=200.0,
    call_ns=0.0,
    expert_ns=0.0,
    layer_ns=0.0,
)
NOTHING = OffloadConstants(
    reread_frac=1.0,
    reread_rows=64.0,
    link_overlap_frac=0.0,
    copy_ns=0.0,
    counts_ns=0.0,
    host_expert_ns=0.0,
    merge_ns=0.0,
)
K, N = 1000.0, 512.0
WEIGHTS = K * N * 2  # bytes of an expert: 1.024 MB
COMPUTE = 2 * 256 * K * N / 1e12 * 1e9  # 256 rows of one expert: 262,144 ns
LINK = WEIGHTS / 10e9 * 1e9  # 102,400 ns


def profile(**more: float) -> HardwareProfile:
    values = {**RATES, **more}
    return HardwareProfile(
        "made-up", "made up for a test", "gpu", {k: Quantity(v, "datasheet", "test") for k, v in values.items()}
    )


def device(
    o: OffloadConstants = NOTHING, c: TiledConstants = SHARP, rates: Mapping[str, float] = {}, **more: Any
) -> Device:
    return Device(profile(**rates), ROOF, form_of("gpu", "made up"), c, o, **more)


def work(rows: list[list[float]], layer: float = 0.0, n_tokens: float | None = None) -> Work:
    n = len(rows)
    one = np.ones(n)
    return Work(
        counts=Counts(np.array(rows, dtype=float)),
        routing_of=np.arange(n),
        item_of=np.arange(n),
        k=np.tile([K, N if layer else 0.0], (n, 1)),
        n=np.tile([N, K if layer else 0.0], (n, 1)),
        layer=layer * one,
        router=layer * one,
        eager=0 * one,
        n_tokens=(sum(rows[0]) if n_tokens is None else n_tokens) * one,
        hidden=K * one,
        inter=N * one,
        n_experts=len(rows[0]) * one,
        weight_bytes=2.0,
        activation_bytes=2.0,
    )


TWO = work([[256.0, 256.0]])
FIRST = np.array([[True, False]])


def latency(w: Work, off: np.ndarray, access: str, d: Device) -> float:
    parts, _ = offload_parts(w, off, access, d)
    return float(total(parts)[0])


def resident(w: Work, d: Device) -> float:
    return float(total(d.form.resident_parts(w, d.roof, d.constants))[0])


def test_the_hand_worked_machine_is_bound_by_compute_when_all_is_resident() -> None:
    assert resident(TWO, device()) == pytest.approx(2 * COMPUTE, rel=1e-2)


def test_zero_copy_reads_weights_again_for_each_block_of_rows() -> None:
    # 256 rows in blocks of 64: one read and three again, 409.6 us over the link, longer than the 262 us of computing.
    assert latency(TWO, FIRST, "zero-copy", device()) == pytest.approx(4 * LINK + COMPUTE, rel=1e-2)
    # Pooled, both experts compute 524 us in all while the link needs 410 us.
    pooled = device(replace(NOTHING, link_overlap_frac=1.0))
    assert latency(TWO, FIRST, "zero-copy", pooled) == pytest.approx(2 * COMPUTE, rel=1e-2)
    # Read once, the link hides behind its own expert's computing.
    once = device(replace(NOTHING, reread_frac=0.0))
    assert latency(TWO, FIRST, "zero-copy", once) == pytest.approx(2 * COMPUTE, rel=1e-2)


def test_two_launches_are_the_two_memories_one_after_the_other() -> None:
    split = device(replace(NOTHING, link_overlap_frac=1.0), replace(SHARP, call_ns=7000.0), residency="split")
    # Even pooled, the offloaded launch shares nothing with the resident one; each is a call of its own.
    assert latency(TWO, FIRST, "zero-copy", split) == pytest.approx(4 * LINK + COMPUTE + 2 * 7000, rel=1e-2)


def test_plain_system_memory_is_read_at_its_own_rate() -> None:
    machine = profile(link_kernel_read_bytes_per_s=9e9, link_system_read_bytes_per_s=8e9)
    assert link_rate(machine, "zero-copy") == (9e9, "link_kernel_read_bytes_per_s")
    assert link_rate(machine, "zero-copy", "system") == (8e9, "link_system_read_bytes_per_s")
    assert link_rate(machine, "copy", "system") == (10e9, "link_h2d_copy_bytes_per_s")


def test_a_serial_copy_adds_the_bytes_of_active_offloaded_experts() -> None:
    d = device(replace(NOTHING, copy_ns=500.0))
    both = np.ones((1, 2), dtype=bool)
    assert latency(TWO, both, "copy", d) - resident(TWO, d) == pytest.approx(2 * (LINK + 500))
    idle = work([[256.0, 0.0]])
    assert latency(idle, both, "copy", d) - resident(idle, d) == pytest.approx(LINK + 500)


def test_an_overlapped_copy_shows_what_outlasts_the_other_experts_and_earlier_work() -> None:
    few = work([[16.0, 256.0]])  # the copied expert computes 16.4 us, the other 262 us: the copy hides
    assert latency(few, FIRST, "copy-overlap", device()) == pytest.approx(resident(few, device()))
    small = work([[16.0, 16.0]])  # nothing to hide behind but the other's 16.4 us of computing
    d = device()
    alone = 2 * 16 * K * N / 1e12 * 1e9
    assert latency(small, FIRST, "copy-overlap", d) - resident(small, d) == pytest.approx(LINK - alone, rel=1e-2)
    after = replace(d, previous_ns=50_000.0)
    assert latency(small, FIRST, "copy-overlap", after) - resident(small, d) == pytest.approx(
        LINK - alone - 50_000, rel=1e-2
    )
    none = device(replace(NOTHING, copy_overlap_frac=0.0))
    assert latency(small, FIRST, "copy-overlap", none) == pytest.approx(latency(small, FIRST, "copy", none))


def test_the_host_outlasts_the_device_and_results_are_merged() -> None:
    d = device(replace(NOTHING, merge_ns=3000.0))
    computing = 2 * 256 * K * N / 2e11 * 1e9  # 1.31 ms on the host, longer than reading 1 MB at 40 GB/s
    crossing = 256 * 2 * (K / 5e9 + N / 10e9) * 1e9  # K wide out, N wide back
    assert latency(TWO, FIRST, "cpu", d) == pytest.approx(computing + crossing + 3000)
    parts, binds = offload_parts(TWO, FIRST, "cpu", d)
    assert binds == ["host"]
    assert parts["host"][0] == pytest.approx(computing + crossing + 3000 - COMPUTE, rel=1e-2)
    one_row = work([[1.0, 0.0]])
    reading = WEIGHTS / 40e9 * 1e9
    crossing = 2 * (K / 5e9 + N / 10e9) * 1e9
    assert latency(one_row, FIRST, "cpu", d) == pytest.approx(reading + crossing + 3000)


def test_a_host_hidden_behind_the_device_costs_only_the_merge() -> None:
    d = device(
        replace(NOTHING, merge_ns=3000.0), rates={"host_gemm_flops_per_s": 1e14, "host_stream_bytes_per_s": 1e13}
    )
    few = work([[16.0, 256.0]])
    parts, binds = offload_parts(few, FIRST, "cpu", d)
    assert parts["host"][0] == pytest.approx(3000) and binds == [None]


def test_contended_rates_are_used_where_host_and_link_work_at_once() -> None:
    rates = {"link_h2d_contended_bytes_per_s": 8e9, "host_gemm_contended_flops_per_s": 1e11}
    alone, busy = (device(rates=rates, link_busy=b) for b in (False, True))
    computing = 2 * 256 * K * N / 1e11 * 1e9
    assert latency(TWO, FIRST, "cpu", busy) - latency(TWO, FIRST, "cpu", alone) == pytest.approx(computing / 2)
    # A split layer: expert 0 is copied while the host computes expert 1, so the link is the contended one as well.
    domain = np.array([[COPIED, ON_HOST]])
    small = work([[16.0, 16.0]])
    quick = device(rates={**rates, "host_gemm_contended_flops_per_s": 1e15})
    parts, binds = beside_parts(small, domain, quick)
    own = 2 * 16 * K * N / 1e12 * 1e9
    assert total(parts)[0] == pytest.approx(WEIGHTS / 8e9 * 1e9 + own, rel=1e-2) and binds == ["link"]
    # Reading, at one row: the copies take 8 of the 40 GB/s of the host's memory.
    one = work([[0.0, 1.0]])
    host_only = np.array([[RESIDENT, ON_HOST]])
    difference = total(beside_parts(one, host_only, busy)[0])[0] - total(beside_parts(one, host_only, alone)[0])[0]
    assert difference == pytest.approx(WEIGHTS * (1 / 32e9 - 1 / 40e9) * 1e9)


def test_a_fitted_model_of_the_host_says_what_the_host_does() -> None:
    made_up = physics.Form(
        "made-up",
        None,
        {},
        lambda w: [],
        lambda w: w,
        lambda w, roof, c: {"compute": c * w.n_rows + 10.0 * w.n_experts},
        lambda w, roof, c: [],
    )
    d = device(host=Host(made_up, ROOF, 50_000.0))
    crossing = 256 * 2 * (K / 5e9 + N / 10e9) * 1e9
    assert latency(TWO, FIRST, "cpu", d) == pytest.approx(256 * 50_000 + 10 + crossing)  # one expert in its launch


@pytest.mark.parametrize(
    ("layout", "spread", "units"),
    [("localised", "lpt", 3.0), ("localised", "even", 4.0), ("striped", "lpt", 3.0)],
)
def test_memory_modules_compute_what_they_hold(layout: str, spread: str, units: float) -> None:
    # Times of 3, 1, 1, 1 units: longest first fills two modules with 3 and 3, experts 0 and 2 on one of them make 4.
    w = work([[48.0, 16.0, 16.0, 16.0]])
    unit = 2 * 16 * K * N / 1e10 * 1e9  # 1.64 ms, longer than reading 1 MB at 20 GB/s
    crossing = 96 * 2 * (K / 5e9 + N / 10e9) * 1e9
    d = device(replace(NOTHING, merge_ns=3000.0), rates=MODULES, layout=layout, spread=spread)
    parts, binds = offload_parts(w, np.ones((1, 4), dtype=bool), "near-data", d)
    assert total(parts)[0] == pytest.approx(units * unit + crossing + 3000) and binds == ["near-data"]


def test_memory_modules_are_bound_by_their_own_bandwidth_at_one_row_and_serve_others_first() -> None:
    modules = {**MODULES, "ndp_peak_flops_per_s": 1e11}
    d = device(rates=modules)
    w = work([[1.0, 1.0]])
    crossing = 2 * (K / 5e9 + N / 10e9) * 1e9
    assert latency(w, FIRST, "near-data", d) == pytest.approx(WEIGHTS / 20e9 * 1e9 + crossing)
    # Expert 0 of module 0 is read by the host, over that module's 20 of the 40 GB/s; expert 1 goes to module 1.
    both = np.array([[ON_HOST, NEAR_DATA]])
    parts, binds = beside_parts(w, both, device(rates=modules, spread="even"))
    assert total(parts)[0] == pytest.approx(WEIGHTS / 20e9 * 1e9 + 2 * crossing) and binds == ["near-data"]
    striped = device(rates=modules, layout="striped")
    parts, _ = beside_parts(w, both, striped)
    assert total(parts)[0] == pytest.approx(WEIGHTS / 40e9 * 1e9 + WEIGHTS / 40e9 * 1e9 + 2 * crossing)


def test_longest_first_goes_to_the_least_busy() -> None:
    loads = longest_first(np.array([[5.0, 3.0, 3.0, 2.0, 2.0]]), np.array([[0.0, 4.0]]))
    assert loads.tolist() == [[10.0, 9.0]]  # 5 to the first, 3 to the second, 3 to the first, 2 and 2: 7 + 2, 8 + 2


def test_a_copied_share_beside_nothing_else_is_the_overlapped_copy() -> None:
    small = work([[16.0, 16.0]])
    parts, _ = beside_parts(small, np.array([[COPIED, RESIDENT]]), device())
    assert total(parts)[0] == pytest.approx(latency(small, FIRST, "copy-overlap", device()))


def test_expected_misses_of_a_least_recently_used_cache() -> None:
    # Four equally likely experts, one of which each token selects, one token a step, two slots: the cache always holds
    # half of them, so every second request misses. Che's approximation is exact by symmetry.
    w = work([[1.0, 0.0, 0.0, 0.0]], n_tokens=1)
    shares = np.full((1, 4), 0.25)
    assert expected_misses(w, np.array([2.0]), shares)[0] == pytest.approx(0.5)
    assert expected_misses(w, np.array([4.0]), shares)[0] == 0.0
    # Every step wakes the same three: with three slots none is missing, with two one is, those in slots going first.
    same = work([[5.0, 5.0, 5.0, 0.0]])
    assert expected_misses(same, np.array([3.0]), None)[0] == pytest.approx(0.0, abs=1e-6)
    assert expected_misses(same, np.array([2.0]), None)[0] == pytest.approx(1.0)


def test_expected_misses_agree_with_a_simulated_cache() -> None:
    rng = np.random.default_rng(5)
    shares = np.arange(1, 17.0) ** -1.0
    shares /= shares.sum()
    n_slots, n_tokens, held, misses, expected = 6, 2, [], [], []
    for step in range(3000):
        awake = list(dict.fromkeys(rng.choice(16, n_tokens, p=shares)))
        rows = np.bincount(awake, minlength=16).astype(float)
        if step > 200:
            misses.append(sum(e not in held for e in awake))
            one = work([rows.tolist()], n_tokens=n_tokens)
            one = replace(one, counts=Counts(rows[None] * n_tokens / rows.sum()))
            expected.append(expected_misses(one, np.array([float(n_slots)]), shares[None])[0])
        held = [e for e in held if e not in awake] + awake
        held = held[-n_slots:]
    assert np.mean(expected) == pytest.approx(np.mean(misses), rel=0.08)


def test_a_paged_memory_fetches_misses_and_runs_in_waves() -> None:
    w = work([[16.0, 16.0, 16.0, 16.0]])
    d = device(replace(NOTHING, copy_ns=500.0), replace(SHARP, call_ns=7000.0), n_slots=2)
    assert latency(w, np.zeros((1, 4), dtype=bool), "paged", d) - resident(w, d) == pytest.approx(
        2 * (LINK + 500) + 7000, rel=1e-4
    )  # four awake in two slots: two are missing and two waves need a second launch
    asked = replace(d, n_slots=None)  # as many slots as experts are not offloaded
    assert latency(w, np.array([[True, True, False, False]]), "paged", asked) == pytest.approx(
        latency(w, np.zeros((1, 4), dtype=bool), "paged", d)
    )
    one = latency(w, np.array([[False, True, True, True]]), "paged", asked)
    assert latency(w, np.ones((1, 4), dtype=bool), "paged", asked) == pytest.approx(one)  # one is always there
    with pytest.raises(InputError, match="0 slots for experts"):
        offload_parts(w, np.ones((1, 4), dtype=bool), "paged", replace(d, n_slots=0))


ALL = device(rates=MODULES, c=TiledConstants(), o=OffloadConstants())


@pytest.mark.parametrize("access", ACCESS_MODES)
@given(
    rows=st.lists(st.integers(0, 3000), min_size=4, max_size=8).filter(any),
    layer=st.sampled_from([0.0, 1.0]),
    data=st.data(),
)
def test_parts_sum_up_and_nothing_offloaded_is_resident(access: str, rows: list[int], layer: float, data: Any) -> None:
    w = work([[float(r) for r in rows]] * 2, layer=layer)
    off = np.array([data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))])
    off[:, 0] = False  # a paged memory has a slot at least
    parts, binds = offload_parts(w, np.concatenate([off, np.zeros_like(off)]), access, ALL)
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in parts.values()) and set(parts) <= set(physics.PARTS)
    assert len(binds) == 2 and set(binds) <= {None, *parts}
    assert total(parts)[1] == pytest.approx(resident(w, ALL), rel=1e-9)  # the row of which nothing is offloaded
    none = offload_parts(w, np.zeros_like(w.rows, dtype=bool), access, ALL)[0]
    assert total(none)[0] == resident(w, ALL)


@given(
    rows=st.lists(st.integers(0, 3000), min_size=2, max_size=8).filter(any),
    frac=st.floats(0, 1),
    more=st.floats(0, 1),
    overlap=st.floats(0, 0.9),
)
def test_zero_copy_rises_with_rereads_and_falls_with_row_blocks_and_overlap(
    rows: list[int], frac: float, more: float, overlap: float
) -> None:
    w = work([[float(r) for r in rows]])
    off = np.arange(len(rows))[None] % 2 == 0
    o = OffloadConstants(reread_frac=frac, reread_rows=128.0, link_overlap_frac=overlap)

    def at(**changed: float) -> float:
        return latency(w, off, "zero-copy", replace(ALL, offload=replace(o, **changed)))

    slack = 1 + 1e-9
    assert at() <= at(reread_frac=frac + more) * slack
    assert at(reread_rows=256.0) <= at() * slack
    assert at(link_overlap_frac=overlap + 0.1) <= at() * slack


@given(
    rows=st.lists(st.integers(0, 3000), min_size=2, max_size=8).filter(any),
    previous=st.floats(0, 1e6),
)
def test_hiding_a_copy_never_costs(rows: list[int], previous: float) -> None:
    w = work([[float(r) for r in rows]])
    off = np.arange(len(rows))[None] % 2 == 0
    serial = latency(w, off, "copy", ALL)
    overlapped = latency(w, off, "copy-overlap", ALL)
    assert overlapped <= serial * (1 + 1e-9)
    assert latency(w, off, "copy-overlap", replace(ALL, previous_ns=previous)) <= overlapped * (1 + 1e-9)
    assert overlapped >= resident(w, ALL) * (1 - 1e-9)


@given(rows=st.lists(st.integers(1, 3000), min_size=3, max_size=8), n=st.integers(1, 6))
def test_more_slots_never_cost(rows: list[int], n: int) -> None:
    w = work([[float(r) for r in rows]], n_tokens=max(rows))
    shares = np.array(rows, dtype=float)[None] / sum(rows)
    none = np.zeros_like(shares, dtype=bool)
    fewer, more = (latency(w, none, "paged", replace(ALL, n_slots=k, shares=shares)) for k in (n, n + 1))
    assert more <= fewer * (1 + 1e-9)


def test_what_is_infinitely_fast_costs_nothing() -> None:
    free = replace(
        NOTHING, link_overlap_frac=1.0, link_eff=1e12, copy_eff=1e12, host_eff_compute=1e12, host_eff_memory=1e12
    )
    rates = {"link_h2d_copy_bytes_per_s": 1e21, "link_d2h_copy_bytes_per_s": 1e21}
    d = device(free, rates=rates)
    w = work([[256.0, 16.0, 16.0, 0.0]])
    off = np.array([[False, True, True, True]])
    assert latency(w, off, "zero-copy", d) <= resident(w, d) * (1 + 1e-9)  # reads of device memory are saved
    assert latency(w, off, "copy", d) == pytest.approx(resident(w, d))
    assert latency(w, off, "paged", d) == pytest.approx(resident(w, d))
    assert latency(w, off, "cpu", d) == pytest.approx(resident(work([[256.0, 0.0, 0.0, 0.0]]), d))


def test_a_layer_pays_once_for_telling_the_host_its_counts() -> None:
    o = replace(NOTHING, counts_ns=9000.0)
    w = work([[256.0, 256.0]], layer=1.0)
    d = device(o)
    assert latency(w, FIRST, "copy", d) - latency(w, FIRST, "copy", device()) == pytest.approx(9000)
    assert latency(w, FIRST, "zero-copy", d) == latency(w, FIRST, "zero-copy", device())  # one launch asks nobody
    assert latency(TWO, FIRST, "copy", d) == latency(TWO, FIRST, "copy", device())  # a bare GEMM was given its counts


def test_the_host_can_launch_while_a_copy_runs() -> None:
    eager = replace(TWO, eager=np.ones(1))
    d = device(c=replace(SHARP, host_call_ns=1e9))
    assert latency(eager, FIRST, "copy", d) == pytest.approx(1e9)


@pytest.mark.parametrize("access", ACCESS_MODES)
@pytest.mark.parametrize("name", ["xeon-spr", "epyc-zen4-2c-fp32"])
def test_a_machine_without_a_gpu_says_that_nothing_can_be_offloaded(access: str, name: str) -> None:
    d = replace(device(), profile=hardware(name))
    with pytest.raises(InputError, match=f"{name}' has no link to a second memory tier, so nothing can be offloaded"):
        offload_parts(TWO, FIRST, access, d)
    assert latency(TWO, np.zeros((1, 2), dtype=bool), access, d) == resident(TWO, d)
    linked = HardwareProfile("cpu-with-link", "made up", "cpu", profile().quantities)
    with pytest.raises(InputError, match="nothing can be offloaded"):
        offload_parts(TWO, FIRST, access, replace(device(), profile=linked))


def test_machines_are_told_what_they_lack() -> None:
    with pytest.raises(InputError, match=r"no memory modules that compute \(it lacks n_ndp_count"):
        offload_parts(TWO, FIRST, "near-data", device())
    for words, changed, access in [
        ("unknown access mode 'teleport'; known: zero-copy", {}, "teleport"),
        ("unknown residency 'both'; known: mapped", {"residency": "both"}, "zero-copy"),
        ("unknown layout 'piled'; known: localised, striped", {"layout": "piled"}, "near-data"),
        ("unknown spread 'random'; known: lpt, even", {"spread": "random"}, "near-data"),
    ]:
        with pytest.raises(InputError, match=words):
            offload_parts(TWO, FIRST, access, device(rates=MODULES, **changed))


def test_machines_tell_which_modes_they_have_numbers_for() -> None:
    assert usable_modes(hardware("trimoe")) == ACCESS_MODES
    assert usable_modes(hardware("gh200")) == tuple(mode for mode in ACCESS_MODES if mode != "near-data")
    assert usable_modes(hardware("xeon-spr")) == ()
    with pytest.raises(InputError, match=r"gh200' has no memory modules that compute .* machines that can: trimoe"):
        offload_parts(TWO, FIRST, "near-data", replace(device(), profile=hardware("gh200")))


def test_the_tile_follows_the_rows_of_each_launch() -> None:
    # PyTorch's rule takes large tiles above 128 rows per expert of a launch: 300 rows on one of two experts are 150 on
    # average and get large ones, in a launch of their own too; 16 rows on the other get small ones only when split.
    form = form_of("gpu", physics.PYTORCH_KERNEL)
    assert form.kernel is not None
    d = Device(profile(), ROOF, form, SHARP, NOTHING, residency="split")
    w = work([[300.0, 16.0]])
    off = np.array([[False, True]])
    parts, _ = offload_parts(w, off, "zero-copy", d)
    whole = tiled.gemm_roofs(tiled.prepare(w, form.kernel), ROOF, SHARP)[0][0][0]
    assert whole == pytest.approx(2 * (3 + 1) * 128 * K * N / 1e12 * 1e9)
    assert total(parts)[0] == pytest.approx(2 * 3 * 128 * K * N / 1e12 * 1e9 + LINK, rel=1e-2)


def test_the_form_of_cpus_serves_as_the_host() -> None:
    # 16 rows of one expert at 200 GFLOP/s and 30 GB/s: the host's own form knows its overheads, which rates do not.
    cpu = form_of("cpu", physics.PYTORCH_KERNEL, "bf16", 2)
    d = device(host=Host(cpu, Ceilings(2e11, 3e10, ()), cpu.defaults))
    few = work([[16.0, 16.0]])
    reading = WEIGHTS / (3e10 * cpu.defaults.eff_memory) * 1e9
    crossing = 16 * 2 * (K / 5e9 + N / 10e9) * 1e9
    one = cpu.defaults.call_ns + cpu.defaults.expert_ns + cpu.defaults.active_ns
    assert reading + crossing + one < latency(few, FIRST, "cpu", d) < 4 * (reading + crossing + one)
