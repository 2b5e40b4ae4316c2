"""What a model takes besides its experts: published sizes, parameters of transformers, caches by hand, budgets."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfmodel import hf_config, moe
from perfmodel.errors import InputError
from perfmodel.model_memory import ModelMemory, model_memory
from perfmodel.moe import MoEShape
from perfmodel.placement.budget import WORKSPACE_BYTES, expert_budget, host_need

CONFIGS = Path(__file__).parent / "data" / "configs"

# Billions of parameters by the model cards, without layers for multi-token prediction. Scout's 109 count its image
# encoder: 34 layers of width 1408 and MLP width 5632 have 34 x (4 x 1408^2 + 2 x 1408 x 5632) = 0.8 billion weights.
PUBLISHED = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "olmoe": 6.92,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": 236,
    "deepseek-v3": 671,
    "gpt-oss-120b": 116.8,
    "gpt-oss-20b": 20.9,
    "glm-4.5-air": 106,
    "llama-4-scout": 109 - 0.8,
    "hunyuan-a13b": 80.4,
}


def n_routed_params(shape: MoEShape) -> int:
    return shape.n_layers * shape.n_experts * shape.n_gemms * shape.hidden * shape.inter


def test_every_catalogue_model_has_the_published_number_of_parameters() -> None:
    assert {*PUBLISHED, "poster"} == set(moe.names())
    for name, billions in PUBLISHED.items():
        shape, memory = moe.shape(name), model_memory(name)
        assert memory.n_non_expert_params is not None
        total = n_routed_params(shape) + memory.n_non_expert_params
        assert total / 1e9 == pytest.approx(billions, rel=0.01), name


def test_the_catalogue_and_its_config_fields_speak_of_one_model() -> None:
    for name in PUBLISHED:
        shape, config = moe.shape(name), moe.config_of(name)
        assert config["hidden_size"] == shape.hidden
        memory = model_memory(name)
        assert memory.n_model_layers == config["num_hidden_layers"]
        first = config.get("first_k_dense_replace", 0)  # in all of these models the layers without experts come first
        assert memory.moe_layers == tuple(range(first, first + shape.n_layers))


def test_a_shape_of_no_model_has_nulls_and_says_so() -> None:
    memory = model_memory("poster")
    assert memory.non_expert_bytes is None and memory.kv_bytes_per_token is None and memory.kv_bytes(10) is None
    assert "no published model" in memory.notes[0]


@pytest.mark.parametrize(
    ("name", "by_token"),
    [
        ("mixtral-8x7b", 2 * 8 * 128 * 2 * 32),  # keys and values of 8 heads of 128, bf16, 32 layers: 131,072
        ("deepseek-v2-lite", (512 + 64) * 2 * 27),  # a latent vector and a rotary key
        ("deepseek-v3", (512 + 64) * 2 * 61),  # 70,272
        ("qwen3-235b-a22b", 2 * 4 * 128 * 2 * 94),
    ],
)
def test_kv_bytes_of_a_token_by_hand(name: str, by_token: int) -> None:
    memory = model_memory(name)
    assert memory.kv_bytes_per_token == memory.kv_full_bytes_per_token == by_token
    assert memory.kv_bytes(1000, 3) == 3000 * by_token
    assert model_memory(name, kv_element_bytes=1).kv_bytes_per_token == by_token / 2


def test_windows_bound_the_cache_of_their_layers() -> None:
    memory = model_memory(
        "gpt-oss-120b"
    )  # 18 layers with a window of 128 tokens, 18 with all: 2 x 8 x 64 x 2 bytes each
    assert (memory.kv_full_bytes_per_token, memory.kv_window_bytes_per_token) == (18 * 2048, 18 * 2048)
    assert memory.kv_bytes(100) == 36 * 2048 * 100
    assert memory.kv_bytes(10_000, 2) == 2 * 18 * 2048 * (10_000 + 128)
    scout = model_memory("llama-4-scout")  # every fourth layer attends to everything, the others within 8,192 tokens
    assert scout.kv_full_bytes_per_token == 12 * 4096 and scout.window_tokens == 8192
    assert scout.kv_bytes(8192) == 48 * 4096 * 8192


def test_fp8_shrinks_attention_and_leaves_tables_and_routers_wide() -> None:
    memory = model_memory("deepseek-v3")
    assert memory.non_expert_bytes is not None and memory.n_non_expert_params is not None
    wide = 58 * 7168 * 256 + 2 * 129280 * 7168  # routers, embeddings and head
    assert memory.non_expert_bytes == pytest.approx((memory.n_non_expert_params - wide) * (1 + 4 / 16384) + 2 * wide)


# Small models of each way of attending that is read; transformers builds them without memory and counts.
SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "phimoe": {},
    "granitemoe": {},
    "olmoe": {},
    "minimax_m2": {},
    "qwen2_moe": {"mlp_only_layers": [1, 3]},
    "qwen3_moe": {"decoder_sparse_step": 2, "tie_word_embeddings": True},
    "qwen3_next": {},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 32, "first_k_dense_replace": 1, "q_lora_rank": None},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "deepseek_v32": {},
    "glm4_moe": {},
    "glm_moe_dsa": {},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 4},
    "gpt_oss": {},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"]},
}


@pytest.mark.parametrize("model_type", SMALL)
def test_parameters_are_those_that_transformers_makes(model_type: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    own_depth = "layers_block_type" in SMALL[model_type]
    depth = {} if own_depth else {"num_hidden_layers": 8}
    config = transformers.CONFIG_MAPPING[model_type](**depth, **SMALL[model_type])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config.to_dict(), "dtype": "bfloat16"}, default=str))
    memory, shape = model_memory(str(path)), hf_config.read_config(path)
    assert memory.n_non_expert_params is not None, memory.notes
    assert memory.n_model_layers == (6 if own_depth else 8)
    n_all = sum(parameter.numel() for parameter in model.parameters())
    routed = [p for name, p in model.named_parameters() if re.search(r"(?<!shared_)experts\..*(proj|weight)$", name)]
    assert sum(p.numel() for p in routed) == n_routed_params(shape)
    assert memory.n_non_expert_params == pytest.approx(n_all - n_routed_params(shape), rel=1e-3)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("llama-4-maverick", tuple(range(1, 48, 2))),
        ("nemotron-3-nano", tuple(range(1, 46, 2))),
        ("jamba-v0.1", tuple(range(1, 32, 2))),
        ("deepseek-v3", tuple(range(3, 61))),
        ("minimax-m3", tuple(range(3, 60))),
        ("longcat-flash", tuple(range(28))),
    ],
)
def test_the_places_of_layers_with_experts(model: str, layers: tuple[int, ...]) -> None:
    assert model_memory(str(CONFIGS / f"{model}.json")).moe_layers == layers


def test_every_config_places_as_many_layers_as_its_shape_counts() -> None:
    for path in CONFIGS.glob("*.json"):
        places = model_memory(str(path)).moe_layers
        assert places is not None and len(set(places)) == hf_config.read_config(path).n_layers


def config_file(tmp_path: Path, **fields: object) -> str:
    plain = {
        **{"model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"vocab_size": 1000, "tie_word_embeddings": False},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in {**plain, **fields}.items() if value != "absent"}))
    return str(path)


def test_a_small_model_by_hand(tmp_path: Path) -> None:
    memory = model_memory(config_file(tmp_path))
    attention = 4 * 64 * 16 * (2 * 4 + 2 * 2)
    assert memory.n_non_expert_params == attention + 4 * 64 * 8 + 2 * 1000 * 64
    assert memory.non_expert_bytes == 2 * memory.n_non_expert_params and memory.notes == ()
    assert model_memory(config_file(tmp_path, head_dim=32)).n_non_expert_params == 2 * attention + 4 * 64 * 8 + 128_000
    tied = model_memory(config_file(tmp_path, tie_word_embeddings=True)).n_non_expert_params
    assert tied == memory.n_non_expert_params - 64_000
    wide = model_memory(config_file(tmp_path, dtype="float32"))
    assert wide.non_expert_bytes == 4 * memory.n_non_expert_params


def test_recurrent_layers_keep_a_state_by_the_sequence(tmp_path: Path) -> None:
    """Four heads of 8 x 8 and a convolution of (2 x 2 x 8 + 4 x 8) x 4 in each of three linear layers, in float32."""
    linear = {
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4},
    }
    memory = model_memory(config_file(tmp_path, model_type="qwen3_next", **linear))
    assert memory.state_bytes == 3 * 4 * (4 * 8 * 8 + 64 * 4)
    assert memory.kv_bytes_per_token == 2 * 2 * 16 * 2  # one layer in four attends
    assert memory.kv_bytes(100, 2) == 2 * (100 * 128 + memory.state_bytes)


@pytest.mark.parametrize(
    ("changes", "words", "knows_cache"),
    [
        ({"vocab_size": "absent"}, "tried vocab_size", True),
        ({"num_attention_heads": "absent"}, "tried num_attention_heads", False),
        ({"layer_types": ["full_attention"] * 3 + ["new_attention"]}, "'new_attention'", False),
        ({"layer_types": ["full_attention"] * 3}, "3 entries, expected 4", False),
        ({"model_type": "kimi_linear", "first_k_dense_replace": 1}, "'kimi_linear' are not read", False),
    ],
)
def test_what_the_config_does_not_say_is_null_with_the_reason(
    tmp_path: Path, changes: dict[str, object], words: str, knows_cache: bool
) -> None:
    memory = model_memory(config_file(tmp_path, **changes))
    assert memory.non_expert_bytes is None and memory.n_model_layers == 4
    assert (memory.kv_bytes_per_token is not None) == knows_cache
    assert len(memory.notes) == 1 and words in memory.notes[0]


def test_weights_beside_int4_experts_are_an_upper_bound_and_say_so(tmp_path: Path) -> None:
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    memory = model_memory(config_file(tmp_path, quantization_config=quantised, tie_word_embeddings="absent"))
    assert memory.non_expert_bytes == 2 * (memory.n_non_expert_params or 0)
    assert "upper bound" in memory.notes[0] and "two tables" in memory.notes[1]


EXPERT = 3 * 4096 * 14336 * 2  # bytes of one of Mixtral's 256 experts
MIXTRAL = moe.shape("mixtral-8x7b")


def test_the_budget_is_capacity_less_everything_else() -> None:
    memory = model_memory("mixtral-8x7b")
    found = expert_budget(48e9, MIXTRAL, memory, n_context_tokens=4096, n_sequences=8, n_staging_experts=2, n_copies=3)
    kv_bytes = 8 * 4096 * 131_072
    assert found.kv_bytes == kv_bytes
    assert found.expert_bytes == 48e9 - 3_210_739_712 - kv_bytes - WORKSPACE_BYTES - 5 * EXPERT
    assert found.n_experts == found.expert_bytes // EXPERT and found.n_experts_per_layer == found.n_experts // 32
    one_more = expert_budget(48e9 + EXPERT, MIXTRAL, memory, n_context_tokens=4096, n_sequences=8, n_staging_experts=5)
    assert one_more.n_experts == found.n_experts + 1


def test_a_device_larger_than_the_model_holds_all_its_experts() -> None:
    found = expert_budget(200e9, MIXTRAL, model_memory("mixtral-8x7b"))
    assert (found.n_experts, found.n_experts_per_layer) == (256, 8) and found.kv_bytes == 0


def test_a_device_that_is_too_small_is_refused_with_what_takes_how_much() -> None:
    with pytest.raises(InputError) as caught:
        expert_budget(8e9, MIXTRAL, model_memory("mixtral-8x7b"), n_context_tokens=32_768, n_staging_experts=2)
    assert str(caught.value) == (
        "mixtral-8x7b: 8.00 GB of device memory leave no room for an expert of 352 MB: "
        "weights besides experts 3.21 GB, "
        "KV cache of 1 sequence of 32,768 tokens 4.29 GB, workspace 2.15 GB, 2 staging slots 705 MB"
    )


def test_unknown_memory_and_negative_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"poster: the bytes of weights besides experts are not known .*; state them"):
        expert_budget(80e9, moe.shape("poster"), model_memory("poster"))
    stated = replace(ModelMemory(), non_expert_bytes=1e9)
    assert expert_budget(80e9, moe.shape("poster"), stated).n_experts == 64  # a cache of no tokens needs no figure
    with pytest.raises(InputError, match="the KV cache are not known"):
        expert_budget(80e9, moe.shape("poster"), stated, n_context_tokens=1)
    with pytest.raises(InputError, match="must not be negative"):
        expert_budget(80e9, MIXTRAL, model_memory("mixtral-8x7b"), n_copies=-1)


def test_the_host_holds_what_is_not_resident_or_everything() -> None:
    assert host_need(MIXTRAL, 56).needed_bytes == 200 * EXPERT
    everything = host_need(MIXTRAL, 56, host_holds_all=True, n_replicas=2)
    assert everything.needed_bytes == 2 * 256 * EXPERT
    assert "56 resident experts in host memory as well" in everything.notes[0] and "pinned" in everything.notes[1]
    assert host_need(MIXTRAL, 256, is_pinned=False).notes == () and host_need(MIXTRAL, 256).needed_bytes == 0


def test_a_host_that_is_too_small_is_refused_with_what_takes_how_much() -> None:
    with pytest.raises(InputError) as caught:
        host_need(MIXTRAL, 0, 64e9)
    assert str(caught.value) == ("mixtral-8x7b: host memory of 64.0 GB cannot hold 90.2 GB: 256 experts of 352 MB")
    with pytest.raises(InputError, match="257 resident experts"):
        host_need(MIXTRAL, 257)
