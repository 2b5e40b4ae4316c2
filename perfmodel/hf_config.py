"""Which MoE layer does a Hugging Face config.json describe: one record per model family, loud about everything else.

Standard library only, so that a collector on a bare machine can read a config.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.files import read_json
from perfmodel.moe import WEIGHT_BYTES, MoEShape

# Multimodal configs hold the language model under one of these keys, possibly nested (thinker_config.text_config).
_NESTED = ("thinker_config", "text_config", "language_config", "llm_config")


@dataclass(frozen=True)
class Fields:
    """The fields of one config; `keys` are alternative names in one text, such as `"num_experts num_local_experts"`.

    The first that is present counts, null counts as absent, a dotted name is nested. `file` is for messages.
    """

    file: str
    values: Mapping[str, Any]

    def get(self, keys: str) -> Any:
        """The value of the first alternative that is present, or None."""
        for key in keys.split():
            value: Any = self.values
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return None

    def whole(self, keys: str, default: int | None = None) -> int:
        """A whole number, or a list that repeats one; raises InputError when absent without a default."""
        value = self.get(keys)
        if value is None:
            if default is not None:
                return default
            raise InputError(f"{self.file}: missing field, tried {', '.join(keys.split())}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 24:
            raise InputError(f"{self.file}: {keys} is {value!r}, expected one whole number for all layers")
        return value

    def listed(self, key: str) -> list[Any]:
        """A list, empty when absent; raises InputError when the field holds anything else."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise InputError(f"{self.file}: {key} is {value!r}, expected a list")
        return value or []

    def table(self, key: str) -> dict[str, Any]:
        """A nested object, empty when absent; raises InputError when the field holds anything else."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise InputError(f"{self.file}: {key} is {value!r}, expected an object")
        return value or {}

    def per_layer(self, key: str) -> list[Any] | None:
        """A list with one entry per layer, or None when the field is absent or no list; raises on any other length."""
        value, n_layers = self.get(key), self.whole("num_hidden_layers")
        if isinstance(value, list) and len(value) != n_layers:
            raise InputError(f"{self.file}: {key} has {len(value)} entries, expected {n_layers}, one per layer")
        return value if isinstance(value, list) else None


# Which layers hold experts, counted from 0: one rule per habit of naming them.


def _every_layer(keys: str) -> Callable[[Fields], list[int]]:
    return lambda fields: list(range(fields.whole(keys)))


def _after_dense(keys: str) -> Callable[[Fields], list[int]]:
    """The rule of the DeepSeek line: the first layers are dense, then every moe_layer_freq-th holds experts.

    `mlp_layer_types` and a list of `moe_layer_freq` name each layer and win over the count of dense ones in `keys`.
    """

    def rule(fields: Fields) -> list[int]:
        if (types := fields.per_layer("mlp_layer_types")) is not None:
            return [layer for layer, kind in enumerate(types) if kind != "dense"]
        if (flags := fields.per_layer("moe_layer_freq")) is not None:
            return [layer for layer, flag in enumerate(flags) if flag]
        every = fields.whole("moe_layer_freq", default=1) or 1
        return [i for i in range(fields.whole(keys), fields.whole("num_hidden_layers")) if i % every == 0]

    return rule


def _sparse_step(fields: Fields) -> list[int]:
    """Qwen: layers whose number from 1 is a multiple of decoder_sparse_step, less those in mlp_only_layers."""
    step, dense = fields.whole("decoder_sparse_step", default=1) or 1, fields.listed("mlp_only_layers")
    return [i for i in range(fields.whole("num_hidden_layers")) if (i + 1) % step == 0 and i not in dense]


def _interleaved(fields: Fields) -> list[int]:
    """Llama 4: the layers listed in moe_layers, otherwise every interleave_moe_layer_step-th."""
    n_layers, listed = fields.whole("num_hidden_layers"), fields.listed("moe_layers")
    if not all(layer in range(n_layers) for layer in listed):
        raise InputError(f"{fields.file}: moe_layers is {listed!r:.60}, expected layers from 0 to {n_layers - 1}")
    step = fields.whole("interleave_moe_layer_step", default=1) or 1
    return listed or list(range(step - 1, n_layers, step))


def _block_pattern(fields: Fields) -> list[int]:
    """Nemotron-H: `moe` entries of layers_block_type, or letters E of hybrid_override_pattern."""
    blocks = fields.get("layers_block_type hybrid_override_pattern")
    if not isinstance(blocks, str | list):
        raise InputError(f"{fields.file}: missing field, tried layers_block_type, hybrid_override_pattern")
    return [layer for layer, block in enumerate(blocks) if block in ("E", "moe")]


def _index_range(fields: Fields) -> list[int]:
    """ERNIE 4.5: every moe_layer_interval-th layer from moe_layer_start_index to moe_layer_end_index (-1: the last)."""
    n_layers, every = fields.whole("num_hidden_layers"), fields.whole("moe_layer_interval", default=1) or 1
    end = n_layers - 1 if fields.get("moe_layer_end_index") == -1 else fields.whole("moe_layer_end_index", n_layers - 1)
    layers = range(fields.whole("moe_layer_start_index"), min(end + 1, n_layers))
    return [layer for layer in layers if (layer + 1) % every == 0]


def _period(fields: Fields) -> list[int]:
    """Jamba: layers at expert_layer_offset within each expert_layer_period."""
    period, offset = fields.whole("expert_layer_period") or 1, fields.whole("expert_layer_offset")
    return [layer for layer in range(fields.whole("num_hidden_layers")) if layer % period == offset]


def _after_skipped(fields: Fields) -> list[int]:
    """Hunyuan: all layers after moe_layer_num_skipped dense ones."""
    return list(range(fields.whole("moe_layer_num_skipped", default=0), fields.whole("num_hidden_layers")))


_ALL = _every_layer("num_hidden_layers")
_DEEPSEEK = _after_dense("first_k_dense_replace")
_ROUTED_KEYS = "n_routed_experts num_local_experts num_experts"
_QWEN_KEYS = "num_experts num_local_experts"  # transformers 5 may write either
_MOE_WIDTH = "moe_intermediate_size"


@dataclass(frozen=True)
class Family:
    """Where the configs of one model family keep what MoEShape needs; alternatives as in Fields."""

    model_types: str
    experts: str
    inter: str
    moe_layers: Callable[[Fields], list[int]]
    top_k: str = "num_experts_per_tok"
    hidden: str = "hidden_size"  # a latent width comes first: it is what the experts see
    shared: str = ""  # number of shared experts
    shared_width: str = ""  # a width above 0 means one shared expert
    implicit_shared: int = 0  # shared experts that no field mentions
    n_gemms: int = 3
    switch: str = ""  # must be true, otherwise the model is dense


FAMILIES: tuple[Family, ...] = (
    Family("mixtral minimax phimoe granitemoe", "num_local_experts", "intermediate_size", _ALL),
    Family(
        "minimax_m2 granitemoeshared granitemoehybrid",
        *("num_local_experts", "intermediate_size", _ALL),
        shared_width="shared_intermediate_size",
    ),
    Family(
        "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text qwen3_vl_moe qwen3_vl_moe_text "
        "qwen3_omni_moe_text",
        *(_QWEN_KEYS, _MOE_WIDTH, _sparse_step),
        shared_width="shared_expert_intermediate_size",
    ),
    Family(
        "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe glm4v_moe glm4v_moe_text glm4_moe_lite glm_moe_dsa "
        "dots1 mimo_v2_flash",
        *(_ROUTED_KEYS, _MOE_WIDTH, _DEEPSEEK),
        shared="n_shared_experts",
    ),
    # All layers hold experts; `deepseek_ref` is how an fp8 conversion of V4 names itself.
    Family("deepseek_v4 deepseek_ref", _ROUTED_KEYS, _MOE_WIDTH, _ALL, shared="n_shared_experts"),
    Family(
        "kimi_linear",
        *(_QWEN_KEYS, _MOE_WIDTH, _DEEPSEEK),
        top_k="num_experts_per_token num_experts_per_tok",
        hidden="routed_expert_hidden_size hidden_size",
        shared="num_shared_experts n_shared_experts",
    ),
    Family("olmoe flex_olmo", "num_experts", "intermediate_size", _ALL),
    Family(*("gpt_oss", "num_local_experts", "intermediate_size", _ALL), top_k="num_experts_per_tok experts_per_token"),
    Family("llama4 llama4_text", "num_local_experts", "intermediate_size", _interleaved, implicit_shared=1),
    Family(
        "minimax_m3 minimax_m3_vl minimax_m3_vl_text",
        *("num_local_experts", "moe_intermediate_size intermediate_size", _DEEPSEEK),
        shared="n_shared_experts",
        shared_width="shared_intermediate_size",
    ),
    Family(
        *("nemotron_h", _ROUTED_KEYS, _MOE_WIDTH, _block_pattern),
        hidden="moe_latent_size hidden_size",
        shared="n_shared_experts",
        n_gemms=2,
    ),
    # The dense MLP that runs beside the experts of every layer is what the model card calls the shared expert.
    Family(
        *("gemma4 gemma4_text", "num_experts", _MOE_WIDTH, _ALL),
        top_k="top_k_experts",
        implicit_shared=1,
        switch="enable_moe_block",
    ),
    Family(
        *("ernie4_5_moe", "moe_num_experts num_experts", _MOE_WIDTH, _index_range),
        top_k="moe_k num_experts_per_tok",
        shared="moe_num_shared_experts",
    ),
    Family(
        *("hunyuan_v1_moe", _QWEN_KEYS, "moe_intermediate_size intermediate_size", _after_skipped),
        top_k="moe_topk num_experts_per_tok",
        shared="num_shared_expert",
        implicit_shared=1,
    ),
    # top-k counts choices of the identity experts too (zero_expert_num), which hold no weights: an upper bound of work.
    Family(
        *("longcat_flash", _ROUTED_KEYS, "expert_ffn_hidden_size moe_intermediate_size", _every_layer("num_layers")),
        top_k="moe_topk num_experts_per_tok",
    ),
    Family(
        *("dbrx", "ffn_config.moe_num_experts", "ffn_config.ffn_hidden_size", _every_layer("n_layers")),
        top_k="ffn_config.moe_top_k",
        hidden="d_model",
    ),
    Family("jamba", _QWEN_KEYS, "intermediate_size", _period),
    Family("lfm2_moe", _QWEN_KEYS, _MOE_WIDTH, _after_dense("num_dense_layers")),
    Family("step3p7", f"{_ROUTED_KEYS} moe_num_experts", _MOE_WIDTH, _DEEPSEEK, shared_width="share_expert_dim"),
)
_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types.split()}


def resolve(source: str) -> MoEShape:
    """The shape of a catalogue name, or of the config.json at a path ending in `.json`; raises InputError."""
    return read_config(source) if source.endswith(".json") else moe.shape(source)


def read_config(path: str | Path) -> MoEShape:
    """What MoE layer a Hugging Face config.json describes; field names per family are those of transformers 5.23.

    `n_layers` counts the layers that hold experts, without those for multi-token prediction; `dtype` is that of the
    routed experts, looked up in a hf_quant_config.json beside the file when the config names no quantisation. The name
    is that of `_name_or_path`, else of the folder, else the model_type. Raises InputError for a file that cannot be
    read, an unknown family, a dense model, a missing field and experts that are not all stored alike.
    """
    path = Path(path)
    config = _load(path)
    fields, family = _language_model(path.name, config)
    experts = fields.get(family.experts)
    dense = experts in (0, 1) or (experts is None and fields.get(family.top_k) is None)
    if dense or (family.switch and fields.get(family.switch) is not True):
        raise InputError(f"{path.name} describes a dense model: no experts in {', '.join(family.experts.split())}")
    n_layers = len(family.moe_layers(fields))
    if n_layers < 1:
        raise InputError(f"{path.name} describes a dense model: none of its layers holds experts")
    quantisation = fields.table("quantization_config") or _companion(path)
    return MoEShape(
        name=_name(path, config, fields),
        n_experts=fields.whole(family.experts),
        top_k=fields.whole(family.top_k),
        hidden=fields.whole(family.hidden),
        inter=fields.whole(family.inter),
        n_gemms=family.n_gemms,
        n_layers=n_layers,
        n_shared_experts=_n_shared(fields, family),
        dtype=_expert_dtype(fields, Fields(path.name, quantisation)),
        source=f"{path.name} of model_type {fields.get('model_type')}",
    )


def read_fields(path: str | Path) -> Fields:
    """The fields of the language model in a config.json, `model_type` that of a known family; raises as read_config."""
    return _language_model(Path(path).name, _load(Path(path)))[0]


def _load(path: Path) -> dict[str, Any]:
    config = read_json(path, "config")
    if not isinstance(config, dict):
        raise InputError(f"{path.name} holds a JSON {type(config).__name__}, expected an object with a model_type")
    return config


def _language_model(file: str, config: dict[str, Any]) -> tuple[Fields, Family]:
    """The fields of the innermost text model with its family; a wrapper lends it model_type, dtype and quantisation."""
    levels = [config]
    while nested := next((levels[-1][key] for key in _NESTED if isinstance(levels[-1].get(key), dict)), None):
        levels.append(nested)
    model_types = [level["model_type"] for level in reversed(levels) if isinstance(level.get("model_type"), str)]
    if not model_types:
        raise InputError(f"{file} has no model_type; is it the config.json of a Hugging Face model?")
    known = next((model_type for model_type in model_types if model_type in _BY_TYPE), None)
    if known is None and not any("expert" in key for level in levels for key in level):
        raise InputError(f"{file} describes a dense model: {model_types[0]!r} with no field about experts")
    if known is None:
        raise InputError(f"{file}: unknown model_type {model_types[0]!r}; known: {', '.join(sorted(_BY_TYPE))}")
    inherited = ("dtype", "torch_dtype", "quantization_config", "expert_dtype")
    lent = {key: level[key] for level in levels for key in inherited if level.get(key) is not None}
    return Fields(file, {**levels[-1], **lent, "model_type": known}), _BY_TYPE[known]


def _n_shared(fields: Fields, family: Family) -> int:
    if family.shared and fields.get(family.shared) is not None:
        return fields.whole(family.shared)
    if family.shared_width and fields.get(family.shared_width) is not None:
        return int(fields.whole(family.shared_width) > 0)
    return family.implicit_shared


def _name(path: Path, config: dict[str, Any], fields: Fields) -> str:
    """The name the config carries, else the model's name in a Hugging Face cache, else the folder, else the family."""
    given = config.get("_name_or_path")
    if isinstance(given, str) and given.strip("/. "):
        return given.rstrip("/").rpartition("/")[2]
    folder = path.parent.resolve()  # of the file itself the cache keeps a link
    if folder.parent.name == "snapshots":  # models--ORGANISATION--NAME/snapshots/COMMIT/config.json
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name or str(fields.get("model_type"))


def _companion(path: Path) -> dict[str, Any]:
    """The `quantization` table of a hf_quant_config.json beside the config, which NVIDIA's checkpoints carry."""
    beside = path.with_name("hf_quant_config.json")
    return Fields(beside.name, _load(beside)).table("quantization") if beside.is_file() else {}


_PLAIN = {
    **{"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"},
    **{"float8_e4m3fn": "fp8", "float8_e5m2": "fp8"},
}
# `fp4` is DeepSeek V4's expert_dtype: blocks of 32 with one-byte scales. Modelopt's names carry their group size.
_NAMED = {
    **{"fp4": "mxfp4", "mxfp4": "mxfp4", "w4a8_mxfp4_fp8": "mxfp4", "mxfp8": "mxfp8"},
    **{"nvfp4": "nvfp4", "nvfp4_awq": "nvfp4", "w4a16_nvfp4": "nvfp4", "w4a8_nvfp4_fp8": "nvfp4"},
    **{"fp8": "fp8", "fp8_pb_wo": "fp8", "fp8_pb_real": "fp8", "fp8_per_channel_per_token": "fp8"},
    **{"fbgemm_fp8": "fp8", "w8a16": "int8", "w8a8_sq_per_channel": "int8"},
}
_INT4_GROUPS = {32: "int4", 64: "int4-g64", 128: "int4-g128"}
_INT4_NAMES = ("gptq", "awq", "auto-round", "w4a16", "w4a16_awq", "w4a8_awq")
_EXCLUDED = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
_ROUTED = re.compile(r"(?<!shared_)experts")


def _expert_dtype(fields: Fields, quant: Fields) -> str:
    """The key of WEIGHT_BYTES for routed experts: their own quantisation, else the model's, else the model's dtype."""
    name = quant.get("moe_quant_algo") or _layerwise(quant)
    if name is None and not _experts_excluded(fields, quant):
        algorithm = str(quant.get("quant_algo") or "")
        mixed = algorithm.lower() == "mixed_precision"
        own = fields.get("expert_dtype") or quant.get("expert_dtype")
        name = own or (None if mixed else algorithm or _group_format(quant) or quant.get("quant_method"))
    if name is not None:
        return _quantised(str(name).lower(), quant)
    plain = str(fields.get("dtype torch_dtype")).removeprefix("torch.")
    if plain not in _PLAIN:
        raise InputError(f"{fields.file}: dtype / torch_dtype is {plain!r}, expected one of {', '.join(_PLAIN)}")
    return _PLAIN[plain]


def _quantised(name: str, quant: Fields) -> str:
    if name in WEIGHT_BYTES or name in _NAMED:
        return _NAMED.get(name, name)
    bits = quant.get("bits w_bit num_bits")
    if name in _INT4_NAMES and bits in (4, 8, None):
        return "int8" if bits == 8 else _int4(quant)
    raise InputError(f"{quant.file}: unknown quantisation {name!r}; known: {', '.join([*_NAMED, *_INT4_NAMES])}")


def _int4(weights: Fields) -> str:
    group = weights.get("group_size q_group_size config_groups.group_0.weights.group_size")
    if not isinstance(group, int) or group not in _INT4_GROUPS:
        raise InputError(f"{weights.file}: int4 weights in groups of {group!r}, expected 32, 64 or 128")
    return _INT4_GROUPS[group]


def _layerwise(quant: Fields) -> str | None:
    """What a list of modules with their algorithms (modelopt's mixed precision) says of the routed experts."""
    layers = quant.table("quantized_layers")
    entries = [Fields(quant.file, entry) for module, entry in layers.items() if _ROUTED.search(module)]
    algorithms = sorted({str(entry.get("quant_algo")) for entry in entries})
    if len(algorithms) > 1:
        raise InputError(f"{quant.file}: routed experts are quantised in several ways: {', '.join(algorithms)}")
    return algorithms[0] if algorithms else None


def _group_format(quant: Fields) -> str | None:
    """The weight format of compressed-tensors: of the group that targets experts, else of the one for all Linear."""
    groups = [Fields(quant.file, group) for group in quant.table("config_groups").values()]
    chosen = [group for group in groups if any(_ROUTED.search(str(target)) for target in group.listed("targets"))]
    chosen = chosen or [group for group in groups if "Linear" in (group.listed("targets") or ["Linear"])]
    if not chosen:
        return None
    weights = Fields(quant.file, chosen[0].table("weights"))
    form = f"{weights.get('type')}{weights.get('num_bits')}"
    if form == "int4":
        return _int4(weights)
    return {"float4": "nvfp4" if weights.get("group_size") == 16 else "mxfp4", "float8": "fp8"}.get(form, form)


def _experts_excluded(fields: Fields, quant: Fields) -> bool:
    """Does the list of unquantised modules name the routed experts; raises InputError when it names some layers only.

    Layers past the last one are those for multi-token prediction and do not count.
    """
    named = [str(entry) for key in _EXCLUDED for entry in quant.listed(key) if _ROUTED.search(str(entry))]
    named = [entry for entry in named if "mtp" not in entry]
    layers = [re.search(r"layers[.\\]+(\d+)", entry) for entry in named]
    n_layers = fields.get("num_hidden_layers num_layers n_layers")
    beyond = n_layers if isinstance(n_layers, int) else float("inf")
    inside = [int(layer[1]) for layer in layers if layer and int(layer[1]) < beyond]
    if inside:
        raise InputError(
            f"{quant.file}: the experts of layer {inside[0]} are excluded from quantisation, others are not"
        )
    return None in layers
