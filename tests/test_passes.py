"""MoE layer passes of a trace: which they are, what each did, against numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.passes import Passes, bare_name, moe_passes
from perfmodel.passes.found import find_passes
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from tests.conftest import ROOT
from tests.traces_made import events, kernel, launch

Json = dict[str, Any]
ATTENTION, DISPATCH, GEMM, COMBINE = "flash_fwd", "deep_ep::internode::dispatch", "grouped_gemm", "deep_ep::combine"


def trace(*rows: Json, **meta: Any) -> Trace:
    return Trace(events(*rows), "made", len(rows), meta=meta)


def named(kind: str, name: str, start_ns: int, dur_ns: int, **more: Any) -> Json:
    return {"kind": kind, "name": name, "start_ns": start_ns, "dur_ns": dur_ns, **more}


def launched(link: int, at_ns: int, start_ns: int, dur_ns: int, name: str, **more: Any) -> list[Json]:
    """A kernel and its launch call."""
    return [launch(at_ns, link), kernel(start_ns, dur_ns, link=link, name=name, **more)]


def two_layers(name: str = "moe_layer") -> list[Json]:
    """Two named layers of 4 kernels: dispatch 100..200, GEMMs 150..250 on another stream and 260..300, combine
    320..330; the second the same 1000 later."""
    rows = []
    for i, at in enumerate((0, 1000)):
        rows += [named("range", f"{name}", at, 90), named("op", "aten::mm", at + 95, 4)]
        rows += launched(10 * i + 1, at + 1, at + 100, 100, DISPATCH, stream=9, blocks=4)
        rows += launched(10 * i + 2, at + 2, at + 150, 100, GEMM, blocks=50)
        rows += launched(10 * i + 3, at + 3, at + 260, 40, GEMM, blocks=400)
        rows += launched(10 * i + 4, at + 4, at + 320, 10, COMBINE, stream=9, blocks=4)
        rows += launched(10 * i + 5, at + 96, at + 400, 20, ATTENTION, blocks=4)  # outside of the range
    return rows


def test_a_named_pass_has_the_figures_worked_out_by_hand() -> None:
    """Span 100..330: busy 150 + 40 + 10, communication 100 + 10 of which 50 beside a GEMM, gaps of 10 and 20."""
    found = moe_passes(trace(*two_layers(), deviceProperties=[{"id": 0, "numSms": 100}]))
    assert found.how == "ranges"
    assert found.passes["pass"].to_list() == [0, 1]
    row = found.passes.row(0, named=True)
    assert row == row | {
        "name": "moe_layer", "start_ns": 100, "dur_ns": 230, "n_kernels": 4, "n_graph_kernels": 0, "n_copies": 0,
        "n_replays": 0, "n_launches": 4, "busy_ns": 200, "idle_ns": 30, "n_gaps": 2, "longest_gap_ns": 20,
        "compute_busy_ns": 140, "communication_busy_ns": 110, "communication_hidden_ns": 50,
        "communication_exposed_ns": 60, "all_to_all_busy_ns": 110, "all_to_all_exposed_ns": 60, "occupancy_frac": None,
    }  # fmt: skip
    # SMs: 50 ns of 4 %, 50 of 54 %, 50 of 50 %, 40 of all, 10 of 4 %.
    assert row["sm_active_frac"] == pytest.approx((50 * 0.04 + 50 * 0.54 + 50 * 0.5 + 40 + 10 * 0.04) / 230)
    assert found.passes["start_ns"].to_list() == [100, 1100]
    classes = found.classes.filter(pl.col("pass") == 0).select("class", "n_kernels", "time_ns").rows()
    assert classes == [("grouped_gemm", 2, 140), ("moe_all_to_all", 2, 110)]
    assert found.medians()["communication_hidden_frac"] == pytest.approx(50 / 110)
    assert found.medians()["idle_frac"] == pytest.approx(30 / 230)


def test_the_same_passes_are_told_from_kernels_alone() -> None:
    rows = [row for row in two_layers() if row["kind"] in ("kernel", "launch")]
    found = moe_passes(trace(*rows))
    by_name = moe_passes(trace(*two_layers()))
    assert found.how == "kernels"
    same = ["start_ns", "dur_ns", "n_kernels", "busy_ns", "communication_exposed_ns", "n_launches"]
    assert found.passes.select(same).equals(by_name.passes.select(same))
    assert "2 of them with the same MoE kernels" in found.notes[0]


def test_work_of_another_micro_batch_hides_communication_but_is_not_counted_as_the_passs() -> None:
    other = launched(99, 500, 100, 60, "gemm of another batch")
    found = moe_passes(trace(*two_layers(), *other))
    row = found.passes.row(0, named=True)
    assert (row["n_kernels"], row["communication_hidden_ns"], row["communication_exposed_ns"]) == (4, 100, 10)


@pytest.mark.parametrize(
    "name",
    [
        "moe_layer", "MoE", "perfmodel::moe_layer|shape=olmoe|tokens=4", "nn.Module: Qwen3MoeSparseMoeBlock_0",
        "FusedMoE", "vllm::moe_forward", "vllm::moe_forward, op_id = 314", "model.layers.7.moe", "moe layer 12",
        "DeepseekV2MoE_3", "moe_layer_12_forward",
    ],
)  # fmt: skip
def test_names_of_moe_layers_are_known(name: str) -> None:
    assert moe_passes(trace(*two_layers(name))).how == "ranges"


@pytest.mark.parametrize("name", ["model.layers.3.mlp.experts", "vllm::fused_experts", "nn.Module: Qwen3MoeExperts_0"])
def test_names_of_experts_count_where_no_layer_is_named(name: str) -> None:
    assert moe_passes(trace(*two_layers(name))).how == "ranges"
    inner = [named("range", name, 1, 50), named("range", name, 1001, 50)]
    assert moe_passes(trace(*two_layers(), *inner)).passes["name"].unique().to_list() == ["moe_layer"]


@pytest.mark.parametrize(
    "name",
    ["Qwen3MoeForCausalLM_0", "Qwen3MoeAttention_1", "moe_align_block_size", "expert_bias", "remove", "MoeRouter"],
)
def test_other_names_with_moe_in_them_are_no_passes(name: str) -> None:
    assert moe_passes(trace(*two_layers(name))).how == "kernels"


def test_a_range_around_several_passes_is_none_itself() -> None:
    found = moe_passes(trace(*two_layers(), named("range", "run_moe", -5, 2000)))
    assert found.passes["name"].to_list() == ["moe_layer"] * 2
    nested = [named("op", "vllm::moe_forward", 1, 80), named("op", "vllm::moe_forward", 1001, 80)]
    found = moe_passes(trace(*two_layers(), *nested))
    assert found.passes["name"].to_list() == ["moe_layer"] * 2


def test_a_pattern_names_the_passes() -> None:
    rows = two_layers("block 7")
    assert moe_passes(trace(*rows), r"block \d").how == "ranges"
    with pytest.raises(InputError, match="no range or operator has a name in which 'blok' is found"):
        moe_passes(trace(*rows), "blok")
    with pytest.raises(InputError, match=r"'\(' is no regular expression"):
        moe_passes(trace(*rows), "(")
    idle = trace(named("range", "idle", 5000, 10), *rows)
    with pytest.raises(InputError, match="1 range in whose name 'idle' is found launched no device work"):
        moe_passes(idle, "idle")


def test_a_trace_without_moe_is_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match=r"found no MoE layer pass: .* name the ranges with --range"):
        moe_passes(trace(kernel(0, name="ampere_sgemm"), kernel(9, name=ATTENTION)))


def chain(*names: str, start_ns: int = 0, gap_ns: int = 1) -> list[Json]:
    return [kernel(start_ns + i * (10 + gap_ns), 10, name=name) for i, name in enumerate(names)]


LAYER = ("moe_align_block_size", GEMM, "silu_and_mul", GEMM, "moe_sum")


def spans_of(*rows: Json) -> list[tuple[int, int]]:
    return moe_passes(trace(*rows)).passes.select("start_ns", "n_kernels").rows()


def test_attention_bounds_passes_and_what_lies_outside_the_moe_kernels_is_left_out() -> None:
    once = ("qkv_gemm", ATTENTION, ATTENTION, "gate_gemm", *LAYER, "ncclDevKernel_AllReduce")
    assert spans_of(*chain(*once, *once)) == [(44, 5), (154, 5)]


def test_layers_without_attention_are_cut_at_repetition_and_at_long_gaps() -> None:
    assert spans_of(*chain(*LAYER, *LAYER, *LAYER)) == [(0, 5), (55, 5), (110, 5)]
    apart = [*chain(*LAYER), *chain(*LAYER, start_ns=2_000_000)]
    assert spans_of(*apart) == [(0, 5), (2_000_000, 5)]
    assert spans_of(*chain(*LAYER, *LAYER, *LAYER[:2])) == [(0, 5), (55, 5), (110, 2)]  # the trace ends in a layer
    assert spans_of(*chain(GEMM, GEMM, GEMM, GEMM)) == [(0, 4)]  # how many a layer has, nothing tells


def test_a_kernel_that_is_a_whole_layer_is_a_pass() -> None:
    fused = "void flashmoe::moe::forward<flashmoe::moe::MoEConfig<cutlass::half_t>>()"
    assert spans_of(*chain(fused, fused, fused)) == [(0, 1), (11, 1), (22, 1)]
    assert spans_of(*chain("flashmoe::gate::forward", fused, "flashmoe::gate::forward", fused)) == [(0, 2), (22, 2)]


def test_an_all_to_all_of_nccl_belongs_to_the_pass_beside_it_only() -> None:
    exchange = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    found = moe_passes(trace(*chain(ATTENTION, exchange, GEMM, exchange, ATTENTION, exchange, "mlp_gemm", ATTENTION)))
    row = found.passes.row(0, named=True)
    assert found.passes.height == 1
    assert (row["start_ns"], row["n_kernels"], row["all_to_all_exposed_ns"]) == (11, 3, 20)


@pytest.mark.parametrize(
    ("kernel_name", "said", "n_kernels"),
    [
        ("ncclDevKernel_Generic_4(ncclDevKernelArgsStorage<4096ul>)", '["all_to_allv","0","[0, 1]"]', 3),  # RCCL
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", '["send","1","[0, 8]"]', 1),  # a pipeline's
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", '[null,"0","[0, 1]"]', 3),
    ],
)
def test_the_collective_that_is_recorded_tells_an_all_to_all(kernel_name: str, said: str, n_kernels: int) -> None:
    rows = chain(ATTENTION, kernel_name, GEMM, kernel_name, ATTENTION)
    rows = [row | {"collective": said} if row["name"] == kernel_name else row for row in rows]
    found = moe_passes(trace(*rows)).passes.row(0, named=True)
    assert (found["n_kernels"], found["all_to_all_busy_ns"]) == (n_kernels, 20 if n_kernels == 3 else 0)


def test_an_exchange_beside_attention_is_said_to_mix_micro_batches() -> None:
    exchange = kernel(22, 30, name="ncclDevKernel_SendRecv(...)", stream=9)
    found = moe_passes(trace(*chain(ATTENTION, GEMM, ATTENTION, GEMM, ATTENTION), exchange))
    assert any("micro-batches overlap" in note for note in found.notes)


def test_other_mixers_than_attention_bound_passes_too() -> None:
    once = ("chunk_gated_delta_rule_fwd", *LAYER)
    assert len(spans_of(*chain(ATTENTION, *LAYER, *once, *once))) == 3


def test_unlike_groups_are_said_to_be_unsure() -> None:
    rows = chain(ATTENTION, GEMM, ATTENTION, "moe_sum", GEMM, ATTENTION, GEMM, GEMM, ATTENTION, "moe_sum", ATTENTION)
    assert any("unsure" in note for note in moe_passes(trace(*rows)).notes)


def test_overlapping_micro_batches_are_said_to_mix_passes() -> None:
    beside = kernel(60, 20, name=ATTENTION, stream=9)
    found = moe_passes(trace(*chain(ATTENTION, *LAYER, ATTENTION, *LAYER), beside))
    assert any("micro-batches overlap" in note for note in found.notes)
    assert not any("micro-batches" in n for n in moe_passes(trace(*chain(ATTENTION, *LAYER, ATTENTION, *LAYER))).notes)


def test_kernels_of_a_replayed_graph_are_counted_as_such() -> None:
    replay = launch(0, 5, name="cudaGraphLaunch")
    rows = [row | {"link": 5} for row in chain(ATTENTION, *LAYER, ATTENTION, *LAYER, start_ns=50)]
    found = moe_passes(trace(replay, *rows)).passes
    assert found.select("n_kernels", "n_graph_kernels", "n_launches").rows() == [(5, 5, 1), (5, 5, 1)]


def test_launches_are_null_where_none_is_known() -> None:
    assert moe_passes(trace(*chain(*LAYER))).passes["n_launches"].to_list() == [None]


def test_active_sms_are_null_where_a_grid_or_the_number_of_sms_is_not_known() -> None:
    rows = two_layers()
    assert moe_passes(trace(*rows)).passes["sm_active_frac"].to_list() == [None, None]
    rows[2 + 1] = rows[2 + 1] | {"blocks": None}
    half = moe_passes(trace(*rows, deviceProperties=[{"id": 0, "numSms": 100}])).passes["sm_active_frac"]
    assert half[0] is None and half[1] is not None
    nsys = moe_passes(trace(*two_layers(), sm_counts={"0": 100})).passes["sm_active_frac"]
    assert nsys[0] == half[1]


def host_layer(at: int, mm_ns: int = 50) -> list[Json]:
    """A pass on a host: an exchange of 100 beside which 40 of compute run, then a GEMM."""
    return [
        named("range", "ProfilerStep#7", at - 5, 400),
        named("range", "perfmodel::moe_layer|tokens=4", at, 300),
        named("range", "perfmodel::dispatch", at + 10, 120),
        named("op", "c10d::alltoall_base_", at + 15, 5),
        named("range", "gloo:all_to_all", at + 20, 100, thread=2),
        named("op", "aten::gather", at + 30, 40),
        named("range", "perfmodel::gemm1", at + 140, 100),
        named("op", "aten::mm", at + 150, mm_ns),
    ]


def test_passes_on_a_host_have_parts_and_no_launches() -> None:
    found = moe_passes(trace(*host_layer(1000), *host_layer(2000)))
    row = found.passes.row(1, named=True)
    assert found.how == "host"
    assert row == row | {
        "start_ns": 2000, "dur_ns": 300, "device": None, "n_kernels": None, "n_launches": None, "n_gaps": None,
        "compute_busy_ns": 90, "communication_busy_ns": 105, "communication_hidden_ns": 40,
        "communication_exposed_ns": 65, "busy_ns": 155, "idle_ns": 145, "sm_active_frac": None,
    }  # fmt: skip
    parts = found.phases.filter(pl.col("pass") == 1).drop("pass").rows()
    assert parts == [("perfmodel::dispatch", 1, 120), ("perfmodel::gemm1", 1, 100)]


def test_passes_know_their_step() -> None:
    steps = [named("range", f"ProfilerStep#{4 + i}", 1000 * i, 500) for i in range(2)]
    found = moe_passes(trace(*two_layers(), *steps))
    assert found.passes["step"].to_list() == [4, 5]
    assert found.of_step(5).passes["pass"].to_list() == [1]
    with pytest.raises(InputError, match="no MoE layer pass in step 9; there are passes in 4, 5"):
        found.of_step(9)
    kernels = moe_passes(trace(*(r for r in two_layers() if r["kind"] != "range"), *steps))
    assert kernels.passes["step"].to_list() == [4, 5]


times = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 60), st.sampled_from((GEMM, DISPATCH, "copy"))), max_size=12
)


@given(times)
def test_shares_of_a_pass_add_up_and_equal_a_count_of_moments(made: list[tuple[int, int, str]]) -> None:
    rows: list[Json] = [named("range", "moe_layer", 0, 1000)]
    for i, (start, dur, name) in enumerate([(0, 10, GEMM), *made]):
        rows += [launch(1 + i, i), {"kind": "copy" if name == "copy" else "kernel", "name": name, "link": i}]
        rows[-1] |= {"start_ns": 2000 + start, "dur_ns": dur, "stream": i, "blocks": 1 + i}
    row = moe_passes(trace(*rows, sm_counts={"0": 10})).passes.row(0, named=True)
    at: dict[str, set[int]] = {GEMM: set(range(10)), DISPATCH: set(), "copy": set()}
    active = [0.0] * 400
    for i, (start, dur, name) in enumerate([(0, 10, GEMM), *made]):
        at[name] |= set(range(start, start + dur))
        for moment in range(start, start + dur):
            active[moment] += min(1, (1 + i) / 10) if name != "copy" else 0
    end = 1 + max(set.union(*at.values()))
    assert row["dur_ns"] == end and row["busy_ns"] == len(set.union(*at.values()))
    assert row["busy_ns"] + row["idle_ns"] == row["dur_ns"]
    assert row["communication_busy_ns"] == len(at[DISPATCH])
    assert row["communication_hidden_ns"] == len(at[DISPATCH] & at[GEMM])
    assert row["communication_hidden_ns"] + row["communication_exposed_ns"] == row["communication_busy_ns"]
    assert row["compute_busy_ns"] == len(at[GEMM])
    assert row["sm_active_frac"] == pytest.approx(sum(min(1, x) for x in active) / end)


def test_bare_names_have_no_numbers_and_no_circumstances() -> None:
    assert bare_name("perfmodel::moe_layer|tokens=4") == "perfmodel::moe_layer"
    assert bare_name("model.layers.3.mlp.experts") == "model.layers.mlp.experts"


def test_a_real_serving_trace_has_one_pass_a_layer_however_it_is_told(shared: Path) -> None:
    eager = read_trace(shared / "traces" / "tracelens__b200__eager_trace.json.gz")
    module = moe_passes(eager)
    assert (module.how, module.passes.height) == ("ranges", 36)
    assert module.passes["n_kernels"].unique().to_list() == [10]
    assert (module.passes["communication_exposed_ns"] > 0).all()  # the all-reduce of the experts' results
    by_name = moe_passes(eager, "vllm::moe_forward")
    assert (by_name.how, by_name.passes.height) == ("ranges", 36)
    assert by_name.passes["n_kernels"].unique().to_list() == [7]
    bare = eager.events.filter(~pl.col("kind").is_in(["op", "range"]))
    by_kernel = find_passes(bare)
    assert by_kernel.how == "kernels" and by_kernel.spans.height == 36
    moe = by_name.classes.filter(pl.col("class").is_in(["grouped_gemm", "moe_dispatch"]))
    assert moe.group_by("pass").agg(pl.sum("n_kernels"))["n_kernels"].unique().to_list() == [6]
    assert by_name.passes["sm_active_frac"].is_between(0.1, 1).all()


def test_a_real_replayed_decode_step_has_one_pass_a_layer(shared: Path) -> None:
    found = moe_passes(read_trace(shared / "traces" / "tracelens__vllm_decode_full__graph_execution.json.gz"))
    assert (found.how, found.passes.height) == ("kernels", 24)
    assert found.passes.select("n_kernels", "n_graph_kernels", "n_launches").unique().rows() == [(6, 6, 1)]


def shipped(name: str) -> Passes:
    return moe_passes(read_trace(next((ROOT / "traces").glob(f"*/profiles/{name}"))))


def test_shipped_captures_of_hosts_have_the_parts_of_a_layer() -> None:
    found = shipped("moe_layer-olmoe-4-1024-*")
    assert (found.how, found.passes.height) == ("host", 2)
    assert found.passes["n_launches"].to_list() == [None, None]
    assert {"perfmodel::gate_up", "perfmodel::down"} <= set(found.phases["name"])
    inside = found.phases.group_by("pass").agg(pl.sum("time_ns")).sort("pass")["time_ns"]
    assert (inside <= found.passes["dur_ns"]).all() and (inside > found.passes["dur_ns"] * 0.9).all()
    assert json.loads(json.dumps(found.to_json(1)))["n_passes"] == 2
