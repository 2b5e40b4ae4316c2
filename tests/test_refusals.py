"""What a run refuses to time: the reasons, and that one refusal says enough."""

import dataclasses
import itertools

import pytest

from collectors import store
from perfmodel.errors import InputError

torch = pytest.importorskip("torch", reason="torch is not installed")

from collectors import refusals, stages  # noqa: E402
from collectors.facts import assumed_facts  # noqa: E402
from collectors.plan import Request, plan  # noqa: E402
from collectors.points import make_pool  # noqa: E402
from collectors.refusals import Checked, refuse_large, refuse_slow, tired_ways, way_of  # noqa: E402
from collectors.timing import QUICK  # noqa: E402

PLANNED = plan(Request("cpu", "float32", ("olmoe/32", "mixtral-8x7b/64"), (1, 8)), None).workloads


def test_a_call_is_slow_when_it_is_slow_twice(monkeypatch):
    made: list[int] = []
    times_ns = iter([5e9, 1e6, 3e9, 4e9, 1e6])

    def clock(work):
        work()
        return next(times_ns)

    monkeypatch.setattr(refusals, "clock_of", lambda device: clock)
    refuse_slow(made.append, "cpu", 2.0)  # the first call loads kernels
    with pytest.raises(InputError, match=r"a call takes 4 s, more than 2:"):
        refuse_slow(made.append, "cpu", 2.0)
    refuse_slow(made.append, "cpu", 2.0)
    assert made == [0, 1, 0, 1, 0]


def test_a_layer_larger_than_the_pool_is_told_so():
    workload = PLANNED[0]
    layer_bytes = int(workload.moe_shape.layer_bytes)
    refuse_large(make_pool(layer_bytes, 0.0, "fp32", "cpu", 0), workload)
    with pytest.raises(InputError, match=f"the layer takes {layer_bytes} bytes, and memory was free for"):
        refuse_large(make_pool(layer_bytes - 4, 0.0, "fp32", "cpu", 0), workload)


def test_a_pool_is_made_smaller_until_there_is_memory_for_it(tmp_path, monkeypatch):
    facts = dataclasses.replace(assumed_facts("cpu", ("float32",)), pool_limit_bytes=1e9)
    stage = stages.Stage(tmp_path, {"device": "cpu", "seed": 0}, facts, QUICK, {}, None, 0.0)
    sizes: list[int] = []
    free_bytes = 10_000_000

    def make(n_bytes, *_):
        sizes.append(n_bytes)
        if n_bytes > free_bytes:
            raise RuntimeError("can't allocate memory\nmade up")
        return n_bytes

    monkeypatch.setattr(stages, "make_pool", make)
    monkeypatch.setattr(stages, "free_host_bytes", lambda: 10**12)
    least = min(w.moe_shape.layer_bytes for w in PLANNED)
    assert least <= stages.the_pool(stage, PLANNED, "fp32") <= free_bytes < sizes[0]
    assert all(later <= before / 2 for before, later in itertools.pairwise(sizes))
    free_bytes = 0
    with pytest.raises(InputError, match=r"^can't allocate memory$"):
        stages.the_pool(stage, PLANNED, "fp32")
    monkeypatch.setattr(stages, "free_host_bytes", lambda: 1000)
    with pytest.raises(InputError, match="no layer fits in the 1000 bytes of memory that are free"):
        stages.the_pool(stage, PLANNED, "fp32")


def test_a_way_is_given_up_when_it_has_ended_several_processes(tmp_path):
    away = [dataclasses.replace(w, access="zero-copy", residency="mapped") for w in PLANNED]
    store.append(tmp_path, store.LEFT_OUT, {"workload": away[0].id, "reason": "made up", "is_fatal": True})
    store.append(tmp_path, store.LEFT_OUT, {"workload": away[1].id, "reason": "made up"})
    assert tired_ways(tmp_path, away) == set()
    like_first = next(w for w in away[1:] if way_of(w) == way_of(away[0]))
    store.append(tmp_path, store.LEFT_OUT, {"workload": like_first.id, "reason": "made up", "is_fatal": True})
    assert tired_ways(tmp_path, away) == {way_of(away[0])}
    assert tired_ways(tmp_path, PLANNED) == set()


def test_what_could_not_be_checked_is_not_timed(tmp_path, monkeypatch):
    n_checks = 0

    def check(*_):
        nonlocal n_checks
        n_checks += 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nmade up")

    monkeypatch.setattr(refusals, "check", check)
    checked = Checked(tmp_path, PLANNED, {})
    for _ in range(2):
        with pytest.raises(InputError, match=r"^was not compared with its slow twin: CUDA out of memory. made up$"):
            checked.refuse_wrong(None, PLANNED[0])
    assert n_checks == 1


def test_activations_that_overflow_32_bits_are_one_way_however_they_are_run():
    w = dataclasses.replace(PLANNED[0], op="grouped_gemm", gemm_k=4096, gemm_n=1024, n_tokens=2**18, top_k=2)
    assert way_of(w) == ("far", "cpu")  # 2^18 x 2 x 4096 = 2^31
    assert way_of(dataclasses.replace(w, access="copy", shape="other")) == way_of(w)
    assert way_of(dataclasses.replace(w, n_tokens=2**18 - 1)) != way_of(w)
    layer = dataclasses.replace(w, op="moe_layer", gemm_k=None, gemm_n=None, hidden=1024, inter=2048, n_gemms=3)
    assert way_of(layer) == ("far", "cpu")  # gate and up together are 4,096 wide
