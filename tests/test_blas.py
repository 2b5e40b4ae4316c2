"""The form of the physical model for CPUs against numbers worked by hand, its conservation law, and its limits."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.capture import fitted_rows, load_capture, per_workload, profile_of, shipped_captures
from perfmodel.latency.constants import fit_constants
from perfmodel.latency.work import work_of
from perfmodel.physics import Ceilings, Counts, Work, blas, ceilings, form_of, smooth_max, total
from perfmodel.physics.blas import BlasConstants

ROOF = Ceilings(1e12, 1e11, ())  # 1 TFLOP/s and 100 GB/s: 1000 FLOP and 100 bytes per ns
BARE = BlasConstants(
    eff_compute=1.0,
    eff_memory=1.0,
    pack_passes=0.0,
    call_rows=0.0,
    column_terms=0.0,
    vector_column_terms=0.0,
    active_ns=0.0,
    expert_ns=0.0,
    call_ns=0.0,
    page_ns=0.0,
    layer_ns=0.0,
    score_ns=0.0,
    row_passes=0.0,
)
GEMM_ONLY = replace(BARE, call_rows=27.0, column_terms=60.0, vector_column_terms=190.0, pack_passes=0.7)
BF16, FP32 = 2.0, 4.0


def made_up_work(
    rows: list[list[float]], k: float = 1024, n: float = 512, n_bytes: float = FP32, layer: bool = False
) -> Work:
    """One batch row for each list of rows by expert; bare: one GEMM of k x n, layer: k to 2 n and n to k, top-1."""
    n_batch = len(rows)
    ones = np.ones(n_batch)
    counts = Counts(np.array(rows, dtype=float))
    index = np.arange(n_batch, dtype=np.int64)
    return Work(
        counts=counts,
        routing_of=index,
        item_of=index,
        k=np.column_stack([k * ones, n * ones * layer]),
        n=np.column_stack([(2 if layer else 1) * n * ones, k * ones * layer]),
        layer=ones * layer,
        router=ones * layer,
        eager=0 * ones,
        n_tokens=counts.n_rows,
        hidden=k * ones,
        inter=n * ones,
        n_experts=float(len(rows[0])) * ones,
        weight_bytes=n_bytes,
        activation_bytes=n_bytes,
    )


def latency(work: Work, c: BlasConstants, n_threads: int = 1) -> np.ndarray:
    return total(blas.resident_parts(blas.prepare(work, n_threads), ROOF, c))


def test_compute_and_memory_of_a_call_are_what_its_rows_and_weights_need() -> None:
    c = replace(BARE, eff_compute=0.5, eff_memory=0.25, call_rows=20.0, column_terms=76.0, pack_passes=0.5)
    (roofs, _) = blas.expert_roofs(made_up_work([[30.0, 0.0, 1.0]]), ROOF, c)
    # 2 (30 + 20) rows (1024 + 76) terms 512 columns at 500 FLOP per ns; one row is a product with a vector.
    assert roofs.compute[0].tolist() == pytest.approx([2 * 50 * 1100 * 512 / 500, 0, 2 * 1100 * 512 / 500])
    # 1.5 passes over (1024 + 76) x 512 weights of 4 bytes at 25 bytes per ns; one pass over 1024 x 512 for one row.
    assert roofs.weights[0].tolist() == pytest.approx([1.5 * 1100 * 512 * 4 / 25, 0, 1024 * 512 * 4 / 25])
    assert roofs.activations[0].tolist() == pytest.approx([30 * 1536 * 4 / 100, 0, 1536 * 4 / 100])


def test_a_single_row_is_a_product_with_a_vector_in_fp32_only() -> None:
    for n_bytes, rows, terms in ((FP32, 1, 1024 + 190), (BF16, 1 + 27, 1024 + 60)):
        (roofs, _) = blas.expert_roofs(made_up_work([[1.0]], n_bytes=n_bytes), ROOF, GEMM_ONLY)
        assert roofs.compute[0, 0] == pytest.approx(2 * rows * (1024 + 60) * 512 / 1000)
        assert roofs.weights[0, 0] == pytest.approx(terms * 512 * n_bytes / 100)


def test_only_an_sgemm_packs_its_weights() -> None:
    packs = replace(BARE, pack_passes=1.0)
    for n_bytes, passes in ((FP32, 2), (BF16, 1)):
        (roofs, _) = blas.expert_roofs(made_up_work([[8.0]], n_bytes=n_bytes), ROOF, packs)
        assert roofs.weights[0, 0] == pytest.approx(passes * 1024 * 512 * n_bytes / 100)


def test_blocks_of_columns_are_dealt_to_threads() -> None:
    def dealt(rows: float, n: float, n_threads: int) -> float:
        return float(blas.dealt_cols(np.array(rows), np.array(n), n_threads))

    assert dealt(8, 512, 1) == 512
    assert dealt(8, 500, 1) == 512  # the last block is padded
    assert dealt(8, 288, 2) == 384  # five blocks for two threads: one has three
    assert dealt(65, 288, 2) == 320  # two blocks of rows make ten of them: five each
    assert dealt(8, 96, 4) == 128  # two blocks of 64 for four threads: six of 16 instead, so one has two
    assert dealt(8, 16, 64) == 64 * 16  # one block of 16, and 63 threads wait


def test_an_sgemm_knows_no_blocks() -> None:
    one, many = (blas.expert_roofs(made_up_work([[8.0]], n=288), ROOF, BARE, t)[0] for t in (1, 16))
    assert one.compute[0, 0] == many.compute[0, 0] == pytest.approx(2 * 8 * 1024 * 288 / 1000)


def test_overheads_count_calls_all_experts_and_active_experts() -> None:
    c = replace(BARE, call_ns=1000.0, expert_ns=10.0, active_ns=100.0, layer_ns=5000.0)
    bare = blas.other_parts(blas.prepare(made_up_work([[3.0, 0.0, 0.0, 1.0]])), ROOF, c)
    layer = blas.other_parts(blas.prepare(made_up_work([[3.0, 0.0, 0.0, 1.0]], layer=True)), ROOF, c)
    assert bare["overhead"][0] == pytest.approx(1000 + 4 * 10 + 2 * 100)
    assert layer["overhead"][0] == pytest.approx(2 * (1000 + 4 * 10 + 2 * 100) + 5000)


def test_a_layer_moves_rows_and_tokens_and_scores_experts() -> None:
    c = replace(BARE, row_passes=3.0, score_ns=2.0)
    parts = blas.other_parts(blas.prepare(made_up_work([[6.0, 2.0]], layer=True)), ROOF, c)
    assert parts["permute"][0] == pytest.approx(3 * 8 * (1024 + 512) * 4 / 100)
    assert parts["combine"][0] == pytest.approx(2 * 8 * 1024 * 4 / 100)
    assert parts["router"][0] == pytest.approx(2 * 8 * 1024 * 2 / 1000 + 2 * 8 * 2)


def test_an_output_too_large_for_the_heap_is_faulted_in_page_by_page() -> None:
    faults = replace(BARE, page_ns=1000.0)
    rows = blas.FRESH_BYTES / (512 * FP32)  # as many as make an output of 32 MiB
    just, less = made_up_work([[rows]]), made_up_work([[rows - 1]])
    assert latency(just, faults)[0] - latency(just, BARE)[0] == pytest.approx(8192 * 1000)
    assert latency(less, faults)[0] == latency(less, BARE)[0]


def test_large_tensors_of_a_layer_are_faulted_in_too() -> None:
    faults = replace(BARE, page_ns=1000.0)
    # 16384 rows: gate and up 64 MiB, down 64 MiB; gathered rows 64 MiB, activations 32 MiB, sum over experts 64 MiB.
    work = made_up_work([[16384.0]], layer=True)
    with_faults, without = (blas.resident_parts(blas.prepare(work), ROOF, c) for c in (faults, BARE))
    assert with_faults["memory"][0] - without["memory"][0] == pytest.approx(2 * 16384 * 1000)
    assert with_faults["permute"][0] - without["permute"][0] == pytest.approx((16384 + 8192 + 16384) * 1000)


rows_by_expert = st.lists(st.integers(0, 3000), min_size=1, max_size=12).filter(any)


@given(rows_by_expert, st.sampled_from([FP32, BF16]), st.booleans(), st.integers(1, 9))
def test_parts_sum_to_what_experts_take_and_the_rest(
    rows: list[int], n_bytes: float, layer: bool, n_threads: int
) -> None:
    work = made_up_work([[float(r) for r in rows]], n_bytes=n_bytes, layer=layer)
    c = replace(BlasConstants(), page_ns=0.0)
    prepared = blas.prepare(work, n_threads)
    parts = blas.resident_parts(prepared, ROOF, c)
    assert all((value >= 0).all() for value in parts.values())
    by_expert = 0.0  # calls run one after another: a fixed cost each, and the larger of the roofs
    for g, roofs in enumerate(blas.expert_roofs(work, ROOF, c, n_threads)):
        lasts, _ = smooth_max([roofs.compute, roofs.weights + roofs.activations], blas.SMOOTH_P)
        is_call = (work.rows > 0) & (work.k[:, g, None] > 0)
        by_expert += float(np.where(is_call, lasts + c.active_ns, 0.0).sum())
    rest = total(blas.other_parts(prepared, ROOF, replace(c, active_ns=0.0)))[0]
    assert total(parts)[0] == pytest.approx(by_expert + rest)


@given(rows_by_expert, rows_by_expert, st.sampled_from([FP32, BF16]))
def test_workloads_of_a_batch_do_not_touch_each_other(one: list[int], other: list[int], n_bytes: float) -> None:
    width = max(len(one), len(other))
    padded = [[float(r) for r in rows] + [0.0] * (width - len(rows)) for rows in (one, other)]
    together = latency(made_up_work(padded, n_bytes=n_bytes, layer=True), BlasConstants(), 2)
    alone = [latency(made_up_work([rows], n_bytes=n_bytes, layer=True), BlasConstants(), 2)[0] for rows in padded]
    assert together.tolist() == pytest.approx(alone)


@given(st.integers(1, 5000), st.integers(1, 500), st.sampled_from([FP32, BF16]))
def test_more_rows_never_cost_less_on_one_thread(rows: int, more: int, n_bytes: float) -> None:
    few, many = latency(made_up_work([[float(rows)], [float(rows + more)]], n_bytes=n_bytes), BlasConstants())
    assert few < many


@given(st.integers(1, 4000), st.integers(16, 4000), st.integers(1, 128))
def test_no_way_of_dealing_beats_an_even_one(rows: int, n: int, n_threads: int) -> None:
    dealt = blas.dealt_cols(np.array(float(rows)), np.array(float(n)), n_threads)
    assert n <= dealt <= n_threads * (n + blas.BLOCK_COLS)


@pytest.mark.parametrize("n_bytes", [FP32, BF16])
def test_many_rows_come_near_the_dense_rate_and_few_near_the_streaming_rate(n_bytes: float) -> None:
    for rows, bound in ((100_000.0, 2 * 1e5 * 1024 * 512 / 1000), (1.0, 1024 * 512 * n_bytes / 100)):
        assert latency(made_up_work([[rows]], n_bytes=n_bytes), BARE)[0] == pytest.approx(bound, rel=0.02)


def test_twice_the_experts_take_twice_the_time() -> None:
    c = replace(BlasConstants(), call_ns=0.0)
    one, two = (latency(made_up_work([[7.0] * n]), c)[0] for n in (4, 8))
    assert two == pytest.approx(2 * one)


def test_constants_are_fitted_where_the_work_says_something_of_them() -> None:
    bare, layer = (blas.identified(made_up_work([[4.0]], layer=is_layer)) for is_layer in (False, True))
    assert set(layer) - set(bare) == {"layer_ns", "score_ns", "row_passes"}
    assert {"pack_passes", "vector_column_terms"} <= set(bare)
    narrow = blas.identified(made_up_work([[4.0]], n_bytes=BF16))
    assert set(bare) - set(narrow) == {"pack_passes", "vector_column_terms"}
    assert "page_ns" not in bare and "page_ns" in blas.identified(made_up_work([[20_000.0]]))


def test_every_constant_has_a_prior_around_its_default() -> None:
    assert set(blas.PRIORS) == {field.name for field in fields(BlasConstants)}
    for name, prior in blas.PRIORS.items():
        assert prior.low < getattr(BlasConstants(), name) < prior.high
        assert prior.low > 0 or prior.unit is not None  # a logarithm needs a positive constant


def test_a_fit_finds_the_constants_that_made_up_times_follow() -> None:
    n_rows = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
    shapes = ((256, 1024), (1024, 512), (2048, 2048))
    work = made_up_work([[float(r)] * 4 for _ in shapes for r in n_rows])
    k, n = (np.repeat([shape[i] for shape in shapes], len(n_rows)).astype(float) for i in range(2))
    work = replace(work, k=k[:, None], n=n[:, None])
    truth = replace(BlasConstants(), eff_memory=0.6, pack_passes=1.1, call_rows=20.0, active_ns=2000.0, page_ns=1500.0)
    form = form_of("cpu", "made up", "fp32")
    found = fit_constants(form, work, np.log(latency(work, truth)), ROOF, BlasConstants())
    for name in ("eff_memory", "pack_passes", "call_rows", "page_ns"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.1), name


@pytest.mark.parametrize("path", shipped_captures(), ids=lambda path: path.name)
def test_the_form_describes_the_shipped_captures_of_cpus(path) -> None:  # type: ignore[no-untyped-def]
    capture = load_capture(path)
    if capture.manifest["settings"]["device"] != "cpu":
        pytest.skip("not of a CPU")
    observations, _ = fitted_rows(per_workload(capture.observations), capture.dtype)
    work, roof = work_of(observations), ceilings(profile_of(capture), capture.dtype)
    n_threads = int(capture.manifest["settings"]["threads"])
    form = form_of("cpu", "measured", "fp32", n_threads)
    measured = observations["time_ns"].to_numpy()
    fitted = fit_constants(form, work, np.log(measured), roof, BlasConstants())
    predicted = work.mean(total(form.resident_parts(work, roof, fitted)))
    error = np.abs(predicted / measured - 1)
    assert np.median(error) < 0.08 and np.quantile(error, 0.9) < 0.18
