import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.classify import GEMMS, classify
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.matmuls import alike, launch_points, matmuls, points_on_roof, product_of
from perfmodel.readers import read_trace
from perfmodel.readers.ncu import LAUNCHES
from perfmodel.trace import Trace
from tests.conftest import ROOT
from tests.traces_made import events, kernel, launch

BF16, FP8 = "c10::BFloat16", "c10::Float8_e4m3fn"


def inputs(*dims: Any, dtype: str = BF16) -> str:
    return json.dumps([dims, [dtype] * len(dims)])


def op(name: str, start_ns: int, dur_ns: int, operands: str | None, **more: Any) -> dict[str, Any]:
    return {"kind": "op", "name": name, "start_ns": start_ns, "dur_ns": dur_ns, "inputs": operands, **more}


def trace(*rows: dict[str, Any], meta: dict[str, Any] | None = None) -> Trace:
    return Trace(events(*rows), "kineto", len(rows), meta=meta or {})


def only(table: pl.DataFrame) -> dict[str, Any]:
    assert table.height == 1
    return table.row(0, named=True)


# --- what a product is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [[10**18, 8], [2**30] * 20, [-4, 8], [2**30, 8, 2**30, 8]])
def test_dims_beyond_any_tensor_are_no_product(dims: list[int]) -> None:
    assert product_of("aten::matmul", inputs(dims, [8, 2**30])) is None


DENSE = [
    ("aten::mm", inputs([4, 8], [8, 2]), (4, 2, 8, 1), 2 * (32 + 16 + 8)),
    ("aten::mm", inputs([4, 8], [8, 2], [4, 2]), (4, 2, 8, 1), 2 * (32 + 16 + 8)),
    ("aten::mm", inputs([0, 8], [8, 2]), (0, 2, 8, 1), 2 * 16),
    ("aten::mm", inputs([4, 8], [8, 2], dtype="float"), (4, 2, 8, 1), 4 * (32 + 16 + 8)),
    ("aten::mm", inputs([4, 8], [8, 2], dtype="double"), (4, 2, 8, 1), 8 * (32 + 16 + 8)),
    ("aten::_int_mm", inputs([4, 8], [8, 2], dtype="signed char"), (4, 2, 8, 1), 32 + 16 + 4 * 8),
    ("aten::addmm", inputs([2], [4, 8], [8, 2], [], []), (4, 2, 8, 1), 2 * (2 + 32 + 16 + 8)),
    ("aten::addmm_", inputs([4, 2], [4, 8], [8, 2], [], []), (4, 2, 8, 1), 2 * (8 + 32 + 16 + 8)),
    ("aten::bmm", inputs([3, 4, 8], [3, 8, 2]), (4, 2, 8, 3), 2 * 3 * (32 + 16 + 8)),
    ("aten::baddbmm", inputs([3, 4, 2], [3, 4, 8], [3, 8, 2]), (4, 2, 8, 3), 2 * 3 * (8 + 32 + 16 + 8)),
    ("aten::linear", inputs([5, 4, 8], [2, 8], [2]), (20, 2, 8, 1), 2 * (160 + 16 + 40 + 2)),
    ("aten::linear", inputs([4, 8], [2, 8], []), (4, 2, 8, 1), 2 * (32 + 16 + 8)),
    ("aten::matmul", inputs([6, 3, 4, 8], [6, 3, 8, 2]), (4, 2, 8, 18), 2 * 18 * (32 + 16 + 8)),
    ("aten::matmul", inputs([3, 4, 8], [8, 2]), (12, 2, 8, 1), 2 * (96 + 16 + 24)),
    ("aten::_scaled_mm", inputs([4, 8], [8, 2], [], [], dtype=FP8), (4, 2, 8, 1), 32 + 16 + 2 * 8),
    ("aten::_scaled_mm", inputs([4, 8], [8, 2], dtype="c10::Float4_e2m1fn_x2"), (4, 2, 16, 1), 32 + 16 + 2 * 8),
]


@pytest.mark.parametrize(("name", "operands", "sizes", "n_bytes"), DENSE)
def test_dense_products(name: str, operands: str, sizes: tuple[int, ...], n_bytes: int) -> None:
    found = product_of(name, operands)
    assert found is not None
    m, n, k, batch = sizes
    assert (found.m, found.n, found.k, found.batch, found.n_experts) == (*sizes, None)
    assert (found.n_flops, found.fixed_bytes, found.expert_bytes) == (2 * m * n * k * batch, n_bytes, 0)


# 6 rows over 3 experts, or whatever is split: name of the form -> operands, FLOPs, bytes without and of an expert.
GROUPED = {
    "rows": (inputs([6, 8], [3, 8, 2], [3]), 2 * 6 * 8 * 2, 2 * (48 + 12), 2 * 16),
    "columns": (inputs([3, 4, 8], [8, 6], [3]), 2 * 4 * 8 * 6, 2 * (48 + 24), 2 * 32),
    "terms": (inputs([4, 9], [9, 2], [3]), 2 * 4 * 9 * 2, 2 * (36 + 18 + 3 * 8), 0),
    "nothing": (inputs([3, 4, 8], [3, 8, 2], []), 3 * 2 * 4 * 8 * 2, 2 * 3 * (32 + 16 + 8), 0),
}


@pytest.mark.parametrize("form", GROUPED)
def test_grouped_products(form: str) -> None:
    operands, n_flops, fixed, weights = GROUPED[form]
    found = product_of("aten::_grouped_mm", operands)
    assert found is not None
    assert (found.n_experts, found.n_flops, found.fixed_bytes, found.expert_bytes) == (3, n_flops, fixed, weights)


def test_scaled_grouped_products_write_wider_than_they_read() -> None:
    operands = inputs([6, 8], [3, 8, 2], [6], [3, 2], [3], dtype=FP8)
    found = product_of("aten::_scaled_grouped_mm", operands)
    assert found is not None
    assert (found.n_experts, found.dtype, found.fixed_bytes, found.expert_bytes) == (3, "fp8", 48 + 2 * 12, 16)


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        ("aten::einsum", inputs([4, 8], [8, 2])),
        ("aten::mm", inputs([4, 8])),
        ("aten::mm", inputs([4, 8], [7, 2])),
        ("aten::mm", inputs([4, 8], [])),
        ("aten::mm", inputs([[4, 8], [8, 2]], [8, 2])),
        ("aten::matmul", inputs([8], [8, 2])),
        ("aten::matmul", inputs([5, 4, 8], [1, 8, 2])),
        ("aten::_grouped_mm", inputs([4, 9], [9, 2], [])),
        ("aten::_grouped_mm", inputs([2, 4, 8], [3, 8, 2], [])),
        ("aten::mm", "[[[4, 8]"),
    ],
)
def test_what_is_no_product_we_know(name: str, operands: str) -> None:
    assert product_of(name, operands) is None


def test_a_type_we_do_not_know_has_flops_and_no_bytes() -> None:
    for operands in (inputs([4, 8], [8, 2], dtype="c10::complex<float>"), "[[[4, 8], [8, 2]], []]"):
        found = product_of("aten::mm", operands)
        assert found is not None
        assert (found.n_flops, found.dtype, found.fixed_bytes) == (128, None, None)


# --- which of them count, and how long they took ---------------------------------------------------------------------


def test_a_product_is_timed_by_its_kernels_of_a_gemm_class() -> None:
    found = only(
        matmuls(
            trace(
                op("aten::linear", 0, 100, inputs([4, 8], [2, 8], [2])),
                op("aten::addmm", 5, 90, inputs([2], [4, 8], [8, 2], [], [])),
                op("aten::copy_", 10, 20, None),
                launch(15, 1),
                launch(40, 2),
                launch(60, 3),
                launch(98, 4),
                kernel(200, 7, link=1, name="elementwise_kernel"),
                kernel(300, 9, link=2, name="nvjet_tst_64x8"),
                kernel(400, 3, link=3, name="cublasLt::splitKreduce_kernel"),
                kernel(500, 50, link=4, name="sm90_gemm"),
            )
        )
    )
    assert (found["row"], found["op"]) == (1, "aten::addmm")
    assert (found["n_kernels"], found["time_ns"], found["timed_by"]) == (2, 12, "kernels")
    assert found["flops_per_s"] == pytest.approx(128 / 12e-9)
    assert found["flops_per_byte"] == pytest.approx(128 / (2 * (2 + 32 + 16 + 8)))
    assert (found["dtype"], found["is_upper_bound"]) == ("bf16", False)


def test_products_without_a_known_kernel_have_no_time() -> None:
    operands = inputs([4, 8], [8, 2])
    found = matmuls(
        trace(
            op("aten::mm", 0, 10, operands),
            op("aten::mm", 20, 10, operands),
            launch(5, 1, name="cudaGraphLaunch"),
            kernel(50, 4, link=1, name="gemm"),
            kernel(60, 4, link=77, name="gemm"),
        )
    )
    assert found.select("n_kernels", "time_ns", "timed_by", "flops_per_s").rows() == [(0, None, None, None)] * 2


def test_without_a_device_the_operator_is_the_time() -> None:
    found = only(matmuls(trace(op("aten::mm", 3, 64, inputs([4, 8], [8, 2], dtype="float")))))
    assert (found["time_ns"], found["timed_by"], found["n_kernels"]) == (64, "operator", 0)
    assert found["flops_per_s"] == pytest.approx(128 / 64e-9)


def test_ranks_and_threads_with_the_same_numbers_are_apart() -> None:
    operands = inputs([4, 8], [8, 2])
    rows = [
        row | {"rank": rank}
        for rank in (0, 1)
        for row in (
            op("aten::mm", 0, 100 + rank, operands),
            launch(50, rank),
            kernel(60, 5 + rank, link=rank, name="gemm"),
        )
    ]
    found = matmuls(trace(*rows, op("aten::mm", 10, 20, operands, rank=0, thread=2)))
    assert found.select("rank", "time_ns").rows() == [(0, 5), (1, 6), (0, None)]


def test_a_kernel_known_by_the_id_of_its_operator() -> None:
    found = only(
        matmuls(
            trace(
                op("aten::mm", 0, 10, inputs([4, 8], [8, 2]), external=5),
                launch(20, 1, thread=9),
                kernel(30, 6, link=1, external=5, name="gemm"),
            )
        )
    )
    assert found["time_ns"] == 6


GROUPED_OP = op("aten::_grouped_mm", 0, 100, inputs([6, 8], [3, 8, 2], [3]))


def test_bytes_of_all_experts_are_an_upper_bound() -> None:
    found = only(matmuls(trace(GROUPED_OP)))
    assert (found["m"], found["n_experts"], found["n_active"], found["counts_from"]) == (6, 3, None, None)
    assert (found["bytes"], found["is_upper_bound"]) == (2 * (48 + 12) + 3 * 32, True)


@pytest.mark.parametrize(("counts", "fits"), [([4, 0, 2], True), ([4, 1, 2], False), ([6, 0], False), (None, False)])
def test_counts_of_the_capture_are_taken_where_they_fit(counts: list[int] | None, fits: bool) -> None:
    found = only(matmuls(trace(GROUPED_OP, meta={"perfmodel": {"tokens_per_expert": counts}})))
    assert (found["n_active"], found["counts_from"]) == ((2, "capture") if fits else (None, None))
    assert found["bytes"] == 2 * (48 + 12) + (2 if fits else 3) * 32
    assert found["is_upper_bound"] is not fits


def test_products_inside_a_grouped_one_tell_its_active_experts() -> None:
    inner = [op("aten::mm", 10 * i, 5, inputs([rows, 8], [8, 2])) for i, rows in enumerate((6, 0, 0), 1)]
    outer = op("aten::matmul", 9, 8, inputs([6, 8], [8, 2]))
    found = only(matmuls(trace(GROUPED_OP, outer, *inner, meta={"perfmodel": {"tokens_per_expert": [4, 0, 2]}})))
    assert (found["op"], found["n_active"], found["counts_from"]) == ("aten::_grouped_mm", 1, "products inside")
    assert (found["bytes"], found["flops"], found["time_ns"]) == (2 * (48 + 12) + 32, 192, 100)


def test_more_products_inside_than_experts_tell_nothing() -> None:
    inner = [op("aten::mm", 10 * i, 5, inputs([2, 8], [8, 2])) for i in range(1, 5)]
    found = only(matmuls(trace(GROUPED_OP, *inner)))
    assert (found["n_active"], found["counts_from"], found["is_upper_bound"]) == (None, None, True)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12), st.booleans()), max_size=9))
def test_the_innermost_product_counts_as_a_slow_search_finds(rows: list[tuple[int, int, bool]]) -> None:
    """Intervals that cross are cut to nest, as calls of one thread do."""
    nested: list[tuple[int, int, bool]] = []
    for start, length, is_grouped in sorted(rows, key=lambda row: (row[0], -row[1])):
        end = min([start + length] + [e for s, e, _ in nested if s <= start < e])
        if (start, end) not in [(s, e) for s, e, _ in nested] and start < end:
            nested.append((start, end, is_grouped))
    grouped, plain = inputs([6, 8], [3, 8, 2], [3]), inputs([4, 8], [8, 2])
    found = matmuls(
        trace(
            op("aten::mm", 1000, 1, plain),
            *(op("aten::_grouped_mm" if g else "aten::mm", s, e - s, grouped if g else plain) for s, e, g in nested),
        )
    )

    def is_inside(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
        return one != other and other[0] <= one[0] and one[1] <= other[1]

    wanted = [
        start
        for row in nested
        for start, _, is_grouped in [row]
        if not any(is_inside(row, other) and other[2] for other in nested)
        and (is_grouped or not any(is_inside(other, row) for other in nested))
    ]
    assert found["start_ns"].to_list() == [1000, *wanted]


# --- the roof --------------------------------------------------------------------------------------------------------


def machine(**values: float) -> HardwareProfile:
    return HardwareProfile("made", "made", "gpu", {k: Quantity(v, "measured", "made up") for k, v in values.items()})


def test_points_on_the_roof() -> None:
    profile = machine(bf16_gemm_flops_per_s=1e12, fp32_gemm_flops_per_s=1e11, memory_stream_bytes_per_s=1e10)
    points = pl.DataFrame(
        {
            "dtype": ["bf16", "bf16", "fp32", "fp8", "fp64", None, "bf16"],
            "flops_per_byte": [50.0, 400.0, 400.0, 400.0, 400.0, 400.0, None],
            "flops_per_s": [1e11, 5e11, 5e10, 5e11, 5e11, 5e11, None],
        }
    )
    found = points_on_roof(points, profile)
    assert found["attainable_flops_per_s"].to_list() == [5e11, 1e12, 1e11, 1e12, None, None, None]
    assert found["roof_frac"].to_list() == [pytest.approx(0.2), 0.5, 0.5, 0.5, None, None, None]
    assert found["bound"].to_list() == ["memory", "compute", "compute", "compute", None, None, None]
    without = points_on_roof(points, machine(bf16_gemm_flops_per_s=1e12, memory_stream_bytes_per_s=1e10))
    assert without["bound"].to_list()[:3] == ["memory", "compute", None]
    assert points_on_roof(matmuls(trace(kernel(1))), profile).is_empty()


def test_kernels_that_nsight_compute_counted_are_points_too() -> None:
    blank = dict.fromkeys(LAUNCHES)
    counted = {"name": "gemm", "dtype": "bf16", "flops": 4e6, "dram_bytes": 1e5, "duration_ns": 2e3}
    rows = [blank | counted, blank | {**counted, "flops": 0.0}, blank | {**counted, "dram_bytes": None}]
    points = launch_points(pl.DataFrame(rows, LAUNCHES))
    assert points.rows() == [("gemm", "bf16", 4e6, 1e5, 2e3, pytest.approx(2e12), pytest.approx(40))]
    roof = points_on_roof(points, machine(bf16_gemm_flops_per_s=4e12, memory_stream_bytes_per_s=1e12))
    assert roof.select("roof_frac", "bound").rows() == [(pytest.approx(0.5), "compute")]
    with pytest.raises(InputError, match=r"has all of flops, dram_bytes; collect with `ncu --set roofline --metrics"):
        launch_points(pl.DataFrame([blank | {"duration_ns": 1.0}], LAUNCHES))


def test_alike_points_are_summed_and_their_rates_are_those_of_the_sums() -> None:
    points = pl.DataFrame(
        {
            "op": ["mm", "mm", "bmm"],
            "flops": [100, 300, 50],
            "bytes": [10, 30, None],
            "time_ns": [1, 3, 9],
        }
    )
    assert alike(points, ["op"]).rows() == [
        ("bmm", 50, None, 9, 1, pytest.approx(50 / 9e-9), None),
        ("mm", 400, 40, 4, 2, pytest.approx(400 / 4e-9), 10),
    ]


# --- real traces -----------------------------------------------------------------------------------------------------

SHARED = ROOT.parent / "shared" / "traces"
PEAKS = {"h100": 989.4e12, "mi300": 1307.4e12, "b200": 2250e12}  # dense bf16, data sheets
REAL = [(path, peak) for card, peak in PEAKS.items() for path in sorted(SHARED.glob(f"tracelens__{card}__*"))]


@pytest.mark.parametrize(("path", "peak"), REAL, ids=lambda value: getattr(value, "name", None))
def test_no_product_of_a_real_trace_beats_its_card(path: Path, peak: float) -> None:
    recorded = read_trace(path)
    found = matmuls(recorded)
    assert found["time_ns"].count() >= 26
    rates = found["flops_per_s"].drop_nulls().to_numpy()
    assert np.all(rates < peak)
    assert rates.max() > 0.1 * peak
    kernels = recorded.of_kind("kernel")
    gemms = kernels.filter(classify(kernels["name"]).cast(pl.String).is_in(GEMMS))
    assert found["n_kernels"].sum() <= gemms.height
    assert found["time_ns"].sum() <= gemms["dur_ns"].sum()


def test_the_shipped_captures_tell_their_active_experts() -> None:
    path = next((ROOT / "traces").rglob("moe_layer-olmoe-4-4-*.trace.json.gz"))
    recorded = read_trace(path)
    counts = recorded.meta["perfmodel"]["tokens_per_expert"]
    grouped = matmuls(recorded).filter(op="aten::_grouped_mm")
    assert grouped["n_active"].to_list() == [sum(count > 0 for count in counts)] * 4
    assert grouped["flops"].to_list() == [2 * 32 * 512 * 512, 2 * 32 * 512 * 256] * 2
    assert set(grouped["counts_from"]) == {"products inside"}
