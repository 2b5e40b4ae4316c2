"""Config files of every family, against shapes read off the model cards by hand."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import hf_config, moe
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape

CONFIGS = Path(__file__).parent / "data" / "configs"

# file: (H, I, MoE layers, experts, top-k, shared experts, GEMMs, dtype)
CARDS = {
    "mixtral-8x7b": (4096, 14336, 32, 8, 2, 0, 3, "bf16"),
    "qwen1.5-moe-a2.7b": (2048, 1408, 24, 60, 4, 1, 3, "bf16"),
    "qwen3-30b-a3b": (2048, 768, 48, 128, 8, 0, 3, "bf16"),
    "qwen3-next-80b-a3b": (2048, 512, 48, 512, 10, 1, 3, "bf16"),
    "qwen3.5-397b-a17b": (4096, 1024, 60, 512, 10, 1, 3, "bf16"),
    "qwen3-vl-30b-a3b": (2048, 768, 48, 128, 8, 0, 3, "bf16"),
    "deepseek-v2-lite": (2048, 1408, 26, 64, 6, 2, 3, "bf16"),
    "deepseek-v3": (7168, 2048, 58, 256, 8, 1, 3, "fp8"),
    "deepseek-v3.2": (7168, 2048, 58, 256, 8, 1, 3, "fp8"),
    "deepseek-v4-flash": (4096, 2048, 43, 256, 6, 1, 3, "mxfp4"),
    "kimi-k2": (7168, 2048, 60, 384, 8, 1, 3, "fp8"),
    "kimi-k2.5": (7168, 2048, 60, 384, 8, 1, 3, "int4"),
    "kimi-k3": (3584, 3072, 92, 896, 16, 2, 3, "mxfp4"),
    "glm-4.5-air": (4096, 1408, 45, 128, 8, 1, 3, "bf16"),
    "glm-5.2": (6144, 2048, 75, 256, 8, 1, 3, "bf16"),
    "mimo-v2-flash": (4096, 2048, 47, 256, 8, 0, 3, "fp8"),
    "olmoe-1b-7b": (2048, 1024, 16, 64, 8, 0, 3, "bf16"),
    "gpt-oss-120b": (2880, 2880, 36, 128, 4, 0, 3, "mxfp4"),
    "llama-4-maverick": (5120, 8192, 24, 128, 1, 1, 3, "bf16"),
    "minimax-m2.5": (3072, 1536, 62, 256, 8, 0, 3, "fp8"),
    "minimax-m3": (6144, 3072, 57, 128, 4, 1, 3, "bf16"),
    "nemotron-3-super": (1024, 2688, 40, 512, 22, 1, 2, "bf16"),
    "nemotron-3-nano": (2688, 1856, 23, 128, 6, 1, 2, "bf16"),
    "gemma-4-26b-a4b": (2816, 704, 30, 128, 8, 1, 3, "bf16"),
    "ernie-4.5-21b-a3b": (2560, 1536, 27, 64, 6, 2, 3, "bf16"),
    "hunyuan-a13b": (4096, 3072, 32, 64, 8, 1, 3, "bf16"),
    "longcat-flash": (6144, 2048, 28, 512, 12, 0, 3, "bf16"),
    "dbrx": (6144, 10752, 40, 16, 4, 0, 3, "bf16"),
    "jamba-v0.1": (4096, 14336, 16, 16, 2, 0, 3, "bf16"),
    "lfm2-8b-a1b": (2048, 1792, 22, 32, 4, 0, 3, "bf16"),
    "phi-3.5-moe": (4096, 6400, 32, 16, 2, 0, 3, "bf16"),
    "granite-3.0-3b-a800m": (1536, 512, 32, 40, 8, 0, 3, "bf16"),
    "step-3.7-flash": (4096, 1280, 42, 288, 8, 1, 3, "bf16"),
}
# Weights of all routed experts, in billions: the published size less attention, embeddings and shared parts.
TOTALS = {"mixtral-8x7b": 45.1, "deepseek-v3": 653.9, "kimi-k2": 1014.7, "gpt-oss-120b": 114.7, "qwen3-30b-a3b": 29.0}


def read(tmp_path: Path, config: object, name: str = "config.json") -> MoEShape:
    path = tmp_path / name
    path.write_text(json.dumps(config), encoding="utf-8")
    return hf_config.read_config(path)


def config_of(model: str, **changes: object) -> dict[str, object]:
    config: dict[str, object] = json.loads((CONFIGS / f"{model}.json").read_text(encoding="utf-8"))
    return {**config, **changes}


def refusal(tmp_path: Path, config: object) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", CARDS)
def test_every_family_parses_to_its_model_card(model: str) -> None:
    shape = hf_config.resolve(str(CONFIGS / f"{model}.json"))
    found = (shape.hidden, shape.inter, shape.n_layers, shape.n_experts, shape.top_k, shape.n_shared_experts)
    assert (*found, shape.n_gemms, shape.dtype) == CARDS[model]
    assert shape.source.startswith(f"{model}.json of model_type ")


def test_every_config_has_a_card_and_every_family_a_config() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == sorted(CARDS)
    used = {hf_config.read_config(path).source.rpartition(" ")[2] for path in CONFIGS.glob("*.json")}
    for family in hf_config.FAMILIES:
        assert used & set(family.model_types.split()), family.model_types


def test_no_model_type_belongs_to_two_families() -> None:
    types = [name for family in hf_config.FAMILIES for name in family.model_types.split()]
    assert len(types) == len(set(types))


@pytest.mark.parametrize(("model", "billions"), TOTALS.items())
def test_total_expert_weights(model: str, billions: float) -> None:
    shape = hf_config.read_config(CONFIGS / f"{model}.json")
    weights = shape.n_layers * shape.n_experts * shape.n_gemms * shape.hidden * shape.inter
    assert weights / 1e9 == pytest.approx(billions, abs=0.05)


CATALOGUE = {
    "mixtral-8x7b": "mixtral-8x7b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "deepseek-v2-lite": "deepseek-v2-lite",
    "deepseek-v3": "deepseek-v3",
    "glm-4.5-air": "glm-4.5-air",
    "gpt-oss-120b": "gpt-oss-120b",
    "olmoe": "olmoe-1b-7b",
}


@pytest.mark.parametrize(("name", "model"), CATALOGUE.items())
def test_catalogue_agrees_with_the_config(name: str, model: str) -> None:
    ours, theirs = hf_config.resolve(name), hf_config.read_config(CONFIGS / f"{model}.json")
    for field in ("n_experts", "top_k", "hidden", "inter", "n_gemms", "n_layers", "n_shared_experts", "dtype"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize(
    ("model", "changes", "n_layers"),
    [
        # layers 1, 3, 5 of 0..5 are sparse, 3 is dense by list
        ("qwen3-30b-a3b", {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [0, 3]}, 2),
        # from layer 1 on, the even ones of 0..6
        ("deepseek-v2-lite", {"num_hidden_layers": 7, "moe_layer_freq": 2}, 3),
        ("deepseek-v2-lite", {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "dense", "sparse"]}, 1),
        # odd layers from 2 to 6: 3 and 5
        (
            "ernie-4.5-21b-a3b",
            {
                "num_hidden_layers": 9,
                "moe_layer_interval": 2,
                "moe_layer_start_index": 2,
                "moe_layer_end_index": 6,
            },
            2,
        ),
        ("jamba-v0.1", {"num_hidden_layers": 8, "expert_layer_period": 3, "expert_layer_offset": 2}, 2),
        ("hunyuan-a13b", {"moe_layer_num_skipped": 2}, 30),
        ("minimax-m3", {"moe_layer_freq": None}, 57),
    ],
)
def test_layer_rules(tmp_path: Path, model: str, changes: dict[str, object], n_layers: int) -> None:
    assert read(tmp_path, config_of(model, **changes)).n_layers == n_layers


def test_llama4_lists_its_moe_layers(tmp_path: Path) -> None:
    config = config_of("llama-4-maverick")
    text = config["text_config"]
    assert isinstance(text, dict)
    text["moe_layers"] = [1, 5, 9]
    assert read(tmp_path, config).n_layers == 3
    for wrong in ([1, 48], [1, "x"], [[]]):
        text["moe_layers"] = wrong
        assert "expected layers from 0 to 47" in refusal(tmp_path, config)


def test_aliases_of_the_native_classes(tmp_path: Path) -> None:
    config = config_of("qwen3-30b-a3b", num_local_experts=128)
    del config["num_experts"]
    assert read(tmp_path, config).n_experts == 128
    config = config_of("gpt-oss-120b")
    del config["num_experts_per_tok"]
    assert read(tmp_path, config).top_k == 4


def ct_weights(bits: int, kind: str, group: int | None, targets: str = "Linear") -> dict[str, object]:
    group_0 = {"targets": [targets], "weights": {"num_bits": bits, "type": kind, "group_size": group}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group_0}}


@pytest.mark.parametrize(
    ("quantisation", "dtype"),
    [
        ({}, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4-g128"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "int8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": None}, "int4-g64"),
        (ct_weights(4, "int", 32), "int4"),
        (ct_weights(8, "int", None), "int8"),
        (ct_weights(8, "float", None), "fp8"),
        (ct_weights(4, "float", 16), "nvfp4"),
        (ct_weights(4, "float", 32), "mxfp4"),
        (ct_weights(4, "int", 128, r"re:.*mlp\.experts.*"), "int4-g128"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "fp8", "moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION"}, "nvfp4"),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
                    "model.layers.0.mlp.shared_experts.up_proj": {"quant_algo": "FP8"},
                    "model.layers.0.mlp.experts.0.up_proj": {"quant_algo": "MXFP8"},
                },
            },
            "mxfp8",
        ),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"lm_head": {"quant_algo": "FP8"}}}, "bf16"),
        ({"quant_method": "fp8", "ignore": ["lm_head", r"re:.*mlp\.experts.*"]}, "bf16"),
        ({"quant_method": "fp8", "ignore": ["model.layers.3.mlp.shared_experts", "mtp.layers.0.mlp.experts"]}, "fp8"),
        ({"quant_method": "fp8", "exclude_modules": ["model.layers.48.mlp.experts.0.up_proj"]}, "fp8"),
    ],
)
def test_quantisation_of_the_experts(tmp_path: Path, quantisation: dict[str, object], dtype: str) -> None:
    assert read(tmp_path, config_of("qwen3-30b-a3b", quantization_config=quantisation)).dtype == dtype


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "unknown quantisation 'bitsandbytes'; known: "),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "unknown quantisation 'gptq'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "groups of -1, expected 32, 64 or 128"),
        ({"quant_method": "fp8", "ignore": ["model.layers.3.mlp.experts.0"]}, "experts of layer 3 are excluded"),
        ("fp8", "quantization_config is 'fp8', expected an object"),
        (
            {
                "quantized_layers": {
                    "model.layers.0.mlp.experts": {"quant_algo": "FP8"},
                    "model.layers.1.mlp.experts": {"quant_algo": "NVFP4"},
                }
            },
            "several ways: FP8, NVFP4",
        ),
    ],
)
def test_quantisation_that_cannot_be_stated_is_refused(tmp_path: Path, quantisation: object, words: str) -> None:
    assert words in refusal(tmp_path, config_of("qwen3-30b-a3b", quantization_config=quantisation))


def test_hf_quant_config_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    assert read(tmp_path, config_of("qwen3-30b-a3b")).dtype == "nvfp4"
    assert read(tmp_path, config_of("deepseek-v3")).dtype == "fp8"  # the config's own statement wins


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"torch_dtype": "float16"}, "fp16"),
        ({"torch_dtype": "torch.float32"}, "fp32"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bf16"),
    ],
)
def test_plain_dtype(tmp_path: Path, changes: dict[str, object], dtype: str) -> None:
    assert read(tmp_path, config_of("olmoe-1b-7b", **changes)).dtype == dtype


def test_name(tmp_path: Path) -> None:
    config = config_of("olmoe-1b-7b")
    (tmp_path / "my-olmoe").mkdir()
    assert read(tmp_path / "my-olmoe", config).name == "my-olmoe"
    assert read(tmp_path / "my-olmoe", {**config, "_name_or_path": "allenai/OLMoE-1B-7B-0924/"}).name == (
        "OLMoE-1B-7B-0924"
    )
    assert read(tmp_path / "my-olmoe", {**config, "_name_or_path": ""}).name == "my-olmoe"
    cached = tmp_path / "models--allenai--OLMoE-1B-7B-0924" / "snapshots" / "6d84c48"
    cached.mkdir(parents=True)
    blob = tmp_path / "models--allenai--OLMoE-1B-7B-0924" / "blobs" / "5f3c"
    blob.parent.mkdir()
    blob.write_text(json.dumps(config), encoding="utf-8")
    (cached / "config.json").symlink_to(blob)
    assert hf_config.read_config(cached / "config.json").name == "OLMoE-1B-7B-0924"


def test_resolve_takes_names_and_files(tmp_path: Path) -> None:
    assert hf_config.resolve("olmoe") == moe.shape("olmoe")
    path = shutil.copy(CONFIGS / "dbrx.json", tmp_path / "config.json")
    assert hf_config.resolve(str(path)).n_experts == 16
    with pytest.raises(InputError, match=r"unknown shape 'nope'; known: deepseek-v2, .*path of a config\.json"):
        hf_config.resolve("nope")


def test_a_shape_is_made_from_a_config_or_says_why_not(tmp_path: Path) -> None:
    path = shutil.copy(CONFIGS / "dbrx.json", tmp_path / "config.json")
    assert MoEShape.from_config(path) == hf_config.read_config(path)
    with pytest.raises(InputError, match=r"no config file .*absent\.json"):
        MoEShape.from_config(tmp_path / "absent.json")


def test_unreadable_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config file .*absent\.json"):
        hf_config.read_config(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("model_type: mixtral")
    with pytest.raises(InputError, match=r"text\.json is not a JSON file: Expecting value"):
        hf_config.read_config(tmp_path / "text.json")
    (tmp_path / "binary.json").write_bytes(b"\x80\x81")
    with pytest.raises(InputError, match=r"binary\.json is not a JSON file"):
        hf_config.read_config(tmp_path / "binary.json")
    with pytest.raises(InputError, match="is not a JSON file"):
        hf_config.read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([1, 2], "holds a JSON list, expected an object"),
        ({"hidden_size": 8}, "has no model_type"),
        ({"model_type": 3}, "has no model_type"),
        ({"model_type": "llama", "hidden_size": 8}, "describes a dense model: 'llama'"),
        ({"model_type": "newmoe", "num_experts": 8}, "unknown model_type 'newmoe'; known: dbrx, deepseek_ref"),
        (config_of("qwen3-30b-a3b", num_experts=0), "dense model: no experts in num_experts, num_local_experts"),
        ({"model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M-M*"}, "a dense model"),
        (config_of("nemotron-3-super", hybrid_override_pattern="M-M*"), "none of its layers holds experts"),
        (config_of("deepseek-v3", num_hidden_layers=3), "none of its layers holds experts"),
        (config_of("deepseek-v3", n_routed_experts=None), "missing field, tried n_routed_experts, num_local_experts"),
        (config_of("deepseek-v3", first_k_dense_replace=None), "missing field, tried first_k_dense_replace"),
        (config_of("kimi-k2", moe_intermediate_size=None), "missing field, tried moe_intermediate_size"),
        (config_of("nemotron-3-super", hybrid_override_pattern=None), "tried layers_block_type, hybrid_override_"),
        (config_of("mixtral-8x7b", hidden_size="4096"), "hidden_size is '4096', expected one whole number"),
        (config_of("olmoe-1b-7b", num_hidden_layers=10**12), "num_hidden_layers is 1000000000000, expected one whole"),
        (config_of("hunyuan-a13b", moe_topk=[8] * 31 + [4]), "expected one whole number for all layers"),
        (config_of("glm-5.2", num_hidden_layers=79), "mlp_layer_types has 78 entries, expected 79, one per layer"),
        (config_of("olmoe-1b-7b", torch_dtype=None), "dtype / torch_dtype is 'None', expected one of bfloat16"),
        (config_of("olmoe-1b-7b", num_experts_per_tok=65), "top-k 65 exceeds its 64 experts"),
    ],
)
def test_refusals_say_what_was_found_and_expected(tmp_path: Path, config: object, words: str) -> None:
    assert words in refusal(tmp_path, config)


def test_gemma_without_its_moe_block_is_dense(tmp_path: Path) -> None:
    config = config_of("gemma-4-26b-a4b")
    text = config["text_config"]
    assert isinstance(text, dict)
    assert "dense model" in refusal(tmp_path, {**config, "text_config": {**text, "enable_moe_block": False}})


JUNK = st.sampled_from([None, "", "x", [], {}, [1, 2], {"a": 1}, -1, 0, 1, True, 1.5, {"weights": 3}, [{}]])


@given(st.sampled_from(sorted(CARDS)), st.data())
def test_a_broken_field_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, model: str, data: st.DataObject
) -> None:
    config = config_of(model)
    table = config.get("text_config", config)
    assert isinstance(table, dict)
    table[data.draw(st.sampled_from([*sorted(table), "quantization_config", "mlp_only_layers"]))] = data.draw(JUNK)
    try:
        shape = read(tmp_path_factory.getbasetemp(), config)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert shape.n_experts >= shape.top_k >= 1


def test_collectors_can_import_it_with_nothing_but_numpy() -> None:
    for module in ("hf_config", "moe"):
        tree = ast.parse((Path(moe.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        heavy = {"polars", "scipy", "sklearn", "torch", "msgspec", "typer"}
        assert not heavy & {name.partition(".")[0] for name in names}
