"""Shapes, bytes and FLOPs of experts, against numbers worked out by hand."""

import pytest

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape

FIELDS = {"name": "test", "n_experts": 8, "top_k": 2, "hidden": 16, "inter": 32}


@pytest.mark.parametrize(
    ("name", "expert_bytes"),
    [
        ("mixtral-8x7b", 352_321_536),  # 3 x 4096 x 14336 x 2 B
        ("deepseek-v3", 44_050_944),  # 3 x 7168 x 2048 x 1 B, and 2688 blocks of 128 x 128 with 4 B each
        ("gpt-oss-120b", 13_219_200),  # 3 x 2880 x 2880 / 2 B, and 777,600 groups of 32 with 1 B each
        ("olmoe", 12_582_912),  # 3 x 2048 x 1024 x 2 B
    ],
)
def test_bytes_of_one_expert(name: str, expert_bytes: int) -> None:
    assert moe.shape(name).expert_bytes == expert_bytes


@pytest.mark.parametrize(
    ("dtype", "bits_per_weight"),
    [
        ("fp32", 32),
        ("bf16", 16),
        ("fp16", 16),
        ("int8", 8),
        ("fp8", 8 + 32 / 128**2),
        ("mxfp8", 8 + 8 / 32),
        ("int4", 4 + 16 / 32),
        ("int4-g64", 4 + (16 + 4) / 64),
        ("int4-g128", 4 + (16 + 4) / 128),
        ("mxfp4", 4 + 8 / 32),
        ("nvfp4", 4 + 8 / 16),
    ],
)
def test_bits_of_one_weight_with_its_scales(dtype: str, bits_per_weight: float) -> None:
    assert 8 * moe.WEIGHT_BYTES[dtype] == bits_per_weight


def test_every_dtype_is_covered_above() -> None:
    assert len(moe.WEIGHT_BYTES) == 11
    assert set(moe.ACTIVATION_BYTES) < set(moe.WEIGHT_BYTES)


def test_layer_of_mixtral() -> None:
    shape = moe.shape("mixtral-8x7b")
    assert shape.layer_bytes == 8 * 352_321_536
    assert shape.gemms == ((4096, 2 * 14336), (14336, 4096))
    assert moe.layer_flops(shape, 10) == 7_046_430_720  # 2 x 10 tokens x 2 experts x 3 x 4096 x 14336


@pytest.mark.parametrize("n_gemms", [2, 3])
def test_grouped_gemms_add_up_to_the_layer(n_gemms: int) -> None:
    shape = MoEShape(**FIELDS, n_gemms=n_gemms)
    rows = 5 * shape.top_k
    assert sum(moe.gemm_flops(rows, k, n) for k, n in shape.gemms) == moe.layer_flops(shape, 5)
    assert sum(k * n for k, n in shape.gemms) * 2 == shape.expert_bytes


@pytest.mark.parametrize("name", moe.names())
def test_every_catalogue_entry_loads_and_names_its_source(name: str) -> None:
    shape = moe.shape(name)
    assert shape.name == name
    assert len(shape.source) > 10


# Weights of all routed experts, in billions, where the published size leaves little room for error.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v2", 222.7),  # of 236 B
        ("deepseek-v2-lite", 14.4),  # of 15.7 B
        ("glm-4.5-air", 99.7),  # of 106 B
        ("gpt-oss-20b", 19.1),  # of 20.9 B
        ("llama-4-scout", 96.6),  # of 109 B
        ("mixtral-8x22b", 135.3),  # of 141 B
        ("olmoe", 6.4),  # of 6.9 B
        ("qwen3-235b-a22b", 227.1),  # of 235 B
    ],
)
def test_catalogue_adds_up_to_the_published_size(name: str, billions: float) -> None:
    shape = moe.shape(name)
    weights = shape.n_layers * shape.n_experts * shape.n_gemms * shape.hidden * shape.inter
    assert weights / 1e9 == pytest.approx(billions, abs=0.05)


def test_unknown_name_lists_the_catalogue() -> None:
    with pytest.raises(InputError, match=r"unknown shape 'gpt-5'; known: deepseek-v2, .*qwen3-30b-a3b"):
        moe.shape("gpt-5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_experts": 0}, "n_experts is 0, expected a whole number of at least 1"),
        ({"top_k": True}, "top_k is True"),
        ({"hidden": 4096.0}, r"hidden is 4096\.0"),
        ({"inter": -1}, "inter is -1"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"top_k": 9}, "top-k 9 exceeds its 8 experts"),
        ({"n_gemms": 4}, r"n_gemms is 4, expected 3 \(gated\) or 2"),
        ({"dtype": "bfloat16"}, "dtype 'bfloat16' is unknown; known: fp32, bf16"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1, expected a whole number of at least 0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=f"shape 'test': .*{words}"):
        MoEShape(**{**FIELDS, **change})
