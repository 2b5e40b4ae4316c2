"""The timed layer: fp8 by hand, parts of a layer against the whole, and what the CUDA kernels ask of shapes."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from collectors import layer  # noqa: E402
from collectors.layer import Layer, Scaled  # noqa: E402


def test_rows_are_quantised_to_the_largest_number_of_e4m3():
    rows = torch.tensor([[0.0, 1.0, -2.0, 0.5], [0.0, 0.0, 0.0, 0.0], [896.0, 448.0, 7.0, -896.0]])
    found = layer.quantise(rows)
    assert found.values.dtype == torch.float8_e4m3fn and found.scale.dtype == torch.float32
    assert found.scale.tolist() == pytest.approx([2 / 448, 1e-12, 2.0])
    assert found.values.float().tolist() == [[0, 224, -448, 112], [0, 0, 0, 0], [448, 224, 3.5, -448]]
    back = layer.plain(found, torch.device("cpu"))
    assert torch.allclose(back, rows)


def test_a_scaled_matrix_is_cut_like_a_tensor():
    matrix = Scaled(torch.arange(6.0).view(2, 3).to(torch.float8_e4m3fn), torch.tensor([1.0, 10.0]))
    assert len(matrix) == 2 and tuple(matrix.shape) == (2, 3)
    assert layer.plain(matrix[1], torch.device("cpu")).tolist() == [30, 40, 50]
    assert layer.plain(matrix[1:], torch.device("cpu")).tolist() == [[30, 40, 50]]


def test_quantising_costs_little_accuracy():
    torch.manual_seed(0)
    rows = torch.randn(5, 256)
    error = (layer.plain(layer.quantise(rows), rows.device) - rows).abs().max(dim=1).values
    assert (error <= rows.abs().max(dim=1).values / 28 + 1e-6).all()  # half a step of three bits below the largest


def test_slow_twins_take_experts_one_by_one():
    torch.manual_seed(0)
    weights, rows = torch.randn(3, 16, 8), torch.randn(5, 8)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    assert torch.equal(layer.slow_grouped_mm(rows, list(weights), offs), layer.slow_grouped_mm(rows, weights, offs))
    by_hand = torch.cat([rows[:2] @ weights[0].T, rows[2:] @ weights[2].T])
    assert torch.allclose(layer.slow_grouped_mm(rows, weights, offs), by_hand)


def fake_layer(dtype, device="cuda", padding=0, n_experts=8):
    """A layer of tensors without memory: hidden 64, inter 32, strides of experts padded."""

    def matrix(n, k):
        flat = torch.empty(n_experts * (n * k + padding), dtype=dtype, device=device)
        found = flat.as_strided((n_experts, n, k), (n * k + padding, k, 1))
        if dtype == torch.float8_e4m3fn:
            return Scaled(found, torch.empty(n_experts, n, device=device))
        return found

    router = torch.empty(n_experts, 64, dtype=torch.bfloat16, device=device)
    return Layer(router, matrix(64, 64), matrix(64, 32), 2, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("padding", [0, 512])
def test_cuda_kernels_accept_shapes_and_strides(dtype, padding):
    """By the shape checks of the CUDA operators, which torch runs without a device on tensors without memory."""
    with FakeTensorMode():
        x = torch.empty(5, 64, dtype=torch.bfloat16, device="cuda")
        chosen = torch.empty(5, 2, dtype=torch.int64, device="cuda")
        whole = fake_layer(dtype, padding=padding)
        assert tuple(layer.route(whole.router, x, 2).shape) == (5, 2)
        rows, offs, _, _ = layer.dispatch(x, chosen, 8)
        out = layer.apply_experts(rows, (whole.gate_up, whole.down), offs, True)
        assert (out.device.type, out.dtype, tuple(out.shape)) == ("cuda", torch.bfloat16, (10, 64))
        few = fake_layer(dtype, padding=padding, n_experts=3)
        offs = torch.empty(3, dtype=torch.int32, device="cuda")
        part = layer.apply_experts(x, (few.gate_up, few.down), offs, True)
        assert tuple(part.shape) == (5, 64)
        rows = layer.quantise(x) if dtype == torch.float8_e4m3fn else x
        one = layer.grouped_mm(rows, few.gate_up, offs)
        assert (one.dtype, tuple(one.shape)) == (torch.bfloat16, (5, 64))


def test_widths_that_cuda_kernels_refuse_are_refused_without_a_device():
    with FakeTensorMode():
        weights = torch.empty(2, 12, 12, dtype=torch.bfloat16, device="cuda")
        offs = torch.empty(2, dtype=torch.int32, device="cuda")
        with pytest.raises(RuntimeError, match="16 bytes"):
            layer.grouped_mm(torch.empty(4, 12, dtype=torch.bfloat16, device="cuda"), weights, offs)


def test_the_public_scaled_kernel_serves_where_the_private_one_is_gone(monkeypatch):
    seen = {}

    def public(mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, **more):
        seen.update(more, recipes=(scale_recipe_a, scale_recipe_b), shapes=(mat_a.shape, mat_b.shape))
        return mat_a.new_empty(4, 32, dtype=torch.bfloat16)

    if not hasattr(torch.nn.functional, "scaled_grouped_mm"):
        pytest.skip("this torch has only the private kernel")
    monkeypatch.delattr(torch, "_scaled_grouped_mm")
    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", public)
    rows = layer.quantise(torch.randn(4, 16))
    weights = Scaled(torch.zeros(2, 32, 16).to(torch.float8_e4m3fn), torch.ones(2, 32))
    offs = torch.tensor([1, 4], dtype=torch.int32)
    assert layer.grouped_mm(rows, weights, offs).shape == (4, 32)
    by_row = torch.nn.functional.ScalingType.RowWise
    assert seen["recipes"] == (by_row, by_row) and seen["shapes"] == ((4, 16), (2, 16, 32))
    assert seen["offs"] is offs and seen["output_dtype"] == torch.bfloat16
