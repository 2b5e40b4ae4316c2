"""What a model takes in memory besides its routed experts: weights, KV cache by the token, state by the sequence.

Matrices are counted from the fields of a Hugging Face config.json (names of transformers 5.24). Norms and biases are
left out (together below 0.1 %), and so are layers for multi-token prediction and encoders of images and sound. Standard
library only, as hf_config.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from perfmodel import hf_config, moe
from perfmodel.errors import InputError
from perfmodel.hf_config import Fields
from perfmodel.moe import WEIGHT_BYTES, MoEShape

STATE_ELEMENT_BYTES = 4  # recurrent states are kept in float32
_PLAIN_BYTES = {"float32": 4.0, "float": 4.0}  # everything else that is not quantised takes two


@dataclass(frozen=True)
class ModelMemory:
    """Bytes besides routed experts, of one whole copy of the model; null where the config does not say.

    `kv_full_bytes_per_token` are those of layers that keep every token of a sequence, `kv_window_bytes_per_token` those
    of layers that keep its last `window_tokens`; `state_bytes` are those of a sequence whatever its length (linear
    attention and Mamba). `n_model_layers` counts all layers, `moe_layers` are the places of those with experts,
    from 0. `notes` say what is null or assumed and why.
    """

    n_non_expert_params: int | None = None
    non_expert_bytes: float | None = None
    kv_full_bytes_per_token: float | None = None
    kv_window_bytes_per_token: float | None = None
    window_tokens: int | None = None
    state_bytes: float | None = None
    n_model_layers: int | None = None
    moe_layers: tuple[int, ...] | None = None
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def kv_bytes_per_token(self) -> float | None:
        """KV-cache bytes of a token in all layers, which it takes as long as it is inside the windows; null unknown."""
        if self.kv_full_bytes_per_token is None or self.kv_window_bytes_per_token is None:
            return None
        return self.kv_full_bytes_per_token + self.kv_window_bytes_per_token

    def kv_bytes(self, n_context_tokens: int, n_sequences: int = 1) -> float | None:
        """KV cache and states of sequences of that many tokens each; null where it is not known.

        An engine that keeps all tokens in window layers as well takes `kv_bytes_per_token` for each instead.
        """
        if self.kv_full_bytes_per_token is None or self.kv_window_bytes_per_token is None or self.state_bytes is None:
            return None
        n_in_window = min(n_context_tokens, self.window_tokens or n_context_tokens)
        windows = self.kv_window_bytes_per_token * n_in_window
        return n_sequences * (self.kv_full_bytes_per_token * n_context_tokens + windows + self.state_bytes)


def model_memory(source: str, kv_element_bytes: float = 2.0) -> ModelMemory:
    """What a catalogue model, or the config.json at a path ending in `.json`, takes besides its routed experts.

    `kv_element_bytes` is 2 for a cache in 16 bits and 1 for fp8. What the config does not say is null, with a note.
    Raises InputError for unknown names and for files that describe no MoE model.
    """
    if source.endswith(".json"):
        return memory_of(hf_config.read_fields(source), hf_config.read_config(source), kv_element_bytes)
    shape, config = moe.shape(source), moe.config_of(source)
    if not config:
        return ModelMemory(notes=(f"shape {source!r} belongs to no published model",))
    return memory_of(Fields(f"{source}.toml", config), shape, kv_element_bytes)


def memory_of(fields: Fields, shape: MoEShape, kv_element_bytes: float = 2.0) -> ModelMemory:
    """What the model of these config fields and this MoE shape takes besides its routed experts; null with a note."""
    model_type = str(fields.get("model_type"))
    rest = _BY_TYPE.get(model_type)
    n_layers = fields.get(_LAYERS)
    family = next(one for one in hf_config.FAMILIES if model_type in one.model_types.split())
    found = ModelMemory(
        n_model_layers=n_layers if isinstance(n_layers, int) else None,
        moe_layers=tuple(family.moe_layers(fields)),
        source=fields.file,
    )
    if rest is None:
        note = f"weights besides experts and the KV cache of model_type {model_type!r} are not read from its config"
        return replace(found, notes=(note,))
    try:
        kinds = _kinds(fields, rest)
        found = replace(found, n_model_layers=len(kinds), **_cache(fields, kinds, kv_element_bytes))
    except InputError as error:
        return replace(found, notes=(f"KV cache and other weights unknown: {error}",))
    try:
        linear, wide = _weights(fields, rest, shape, kinds)
    except InputError as error:
        return replace(found, notes=(f"weights besides experts unknown: {error}",))
    plain_bytes = _PLAIN_BYTES.get(str(fields.get("dtype torch_dtype")).removeprefix("torch."), 2.0)
    method = fields.get("quantization_config.quant_method")
    linear_bytes = WEIGHT_BYTES["fp8"] if method == "fp8" else plain_bytes
    notes = []
    if shape.dtype not in ("bf16", "fp16", "fp32", "fp8") or (shape.dtype == "fp8" and method != "fp8"):
        notes.append(
            f"weights besides the {shape.dtype} experts are taken as {plain_bytes:g} bytes each, an upper bound"
        )
    if fields.get("tie_word_embeddings") is None:
        notes.append("the config does not say whether embeddings are tied; two tables are counted")
    return replace(
        found,
        n_non_expert_params=linear + wide,
        non_expert_bytes=linear * linear_bytes + wide * plain_bytes,
        notes=tuple(notes),
    )


# What each layer has for attention: `window` keeps the last tokens of a sequence, `linear` (gated delta net) and
# `mamba` (Mamba-2) keep a state, `none` is a layer of experts or an MLP alone.
_WORDS = {
    **{"full_attention": "full", "indexed_attention": "full", "attention": "full", "*": "full"},
    **{"sliding_attention": "window", "chunked_attention": "window"},
    **{"linear_attention": "linear", "mamba": "mamba", "M": "mamba"},
    **{"moe": "none", "mlp": "none", "E": "none", "-": "none"},
}
_LAYERS = "num_hidden_layers n_layers num_layers"
_HIDDEN = "hidden_size d_model"
_HEADS = "num_attention_heads n_heads"


def _all_alike(fields: Fields) -> list[str]:
    """One window for every layer where the config sets one, as in Mistral's line; full attention otherwise."""
    window = fields.get("sliding_window") is not None and fields.get("use_sliding_window") is not False
    return ["window" if window else "full"] * fields.whole(_LAYERS)


def _alternating(fields: Fields) -> list[str]:
    """gpt-oss: a window in every other layer, beginning with the first."""
    return [("window", "full")[layer % 2] for layer in range(fields.whole(_LAYERS))]


def _full_interval(fields: Fields) -> list[str]:
    """Qwen3-Next: full attention in every full_attention_interval-th layer, a gated delta net in the others."""
    every = fields.whole("full_attention_interval", default=4) or 1
    return ["linear" if (layer + 1) % every else "full" for layer in range(fields.whole(_LAYERS))]


def _chunked(fields: Fields) -> list[str]:
    """Llama 4: layers with rotary positions attend within chunks, those without (every fourth) to everything."""
    n_layers = fields.whole(_LAYERS)
    if fields.get("attention_chunk_size") is None:
        return ["full"] * n_layers
    every = fields.whole("no_rope_layer_interval", default=4) or 1
    rotary = fields.listed("no_rope_layers") or [(layer + 1) % every for layer in range(n_layers)]
    return ["window" if flag else "full" for flag in rotary]


def _pattern(fields: Fields) -> list[str]:
    """Nemotron-H: a list of words, or letters M (Mamba-2), E (experts), * (attention) and - (MLP)."""
    blocks = fields.get("layers_block_type hybrid_override_pattern")
    if not isinstance(blocks, str | list) or any(block not in _WORDS for block in blocks):
        raise InputError(f"{fields.file}: layers_block_type is {blocks!r}, expected {', '.join(_WORDS)}")
    return [_WORDS[block].replace("linear", "mamba") for block in blocks]  # transformers 5 has one word for both


@dataclass(frozen=True)
class _Rest:
    """Where a family keeps what is no routed expert; alternatives as in `hf_config.Fields`."""

    model_types: str
    kinds: Callable[[Fields], list[str]] = _all_alike  # where the config has no layer_types
    dense: str = "intermediate_size"  # width of the MLP in layers without experts
    shared: str = "moe_intermediate_size"  # width of one shared expert
    gated_query: bool = False  # the query projection makes an output gate too
    expert_biases: bool = False  # which MoEShape leaves out


_FAMILIES = (
    _Rest("mixtral phimoe granitemoe olmoe minimax_m2 dbrx"),
    _Rest("qwen2_moe qwen3_moe qwen3_vl_moe qwen3_vl_moe_text", shared="shared_expert_intermediate_size"),
    _Rest(
        "qwen3_next qwen3_5_moe qwen3_5_moe_text",
        *(_full_interval, "intermediate_size", "shared_expert_intermediate_size"),
        gated_query=True,
    ),
    _Rest(
        "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe glm4v_moe glm4v_moe_text glm4_moe_lite glm_moe_dsa "
        "dots1 ernie4_5_moe"
    ),
    _Rest("hunyuan_v1_moe", shared="moe_intermediate_size intermediate_size"),
    _Rest("gpt_oss", _alternating, expert_biases=True),
    _Rest("llama4 llama4_text", _chunked, "intermediate_size_mlp", "intermediate_size"),
    _Rest("nemotron_h", _pattern, shared="moe_shared_expert_intermediate_size"),
)
_BY_TYPE = {model_type: rest for rest in _FAMILIES for model_type in rest.model_types.split()}


def _kinds(fields: Fields, rest: _Rest) -> list[str]:
    listed = fields.per_layer("layer_types") if fields.get("layer_types") is not None else None
    if listed is None:
        return rest.kinds(fields)
    unknown = next((word for word in listed if word not in _WORDS), None)
    if unknown is not None:
        raise InputError(f"{fields.file}: layer_types holds {unknown!r}, expected {', '.join(_WORDS)}")
    return [_WORDS[word] for word in listed]


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the width of a head."""
    n_heads = fields.whole(_HEADS)
    n_kv_heads = fields.whole("num_key_value_heads attn_config.kv_n_heads", default=n_heads)
    return n_heads, n_kv_heads, fields.whole("head_dim", default=fields.whole(_HIDDEN) // max(n_heads, 1))


def _cache(fields: Fields, kinds: list[str], kv_element_bytes: float) -> dict[str, Any]:
    """KV bytes by the token and state by the sequence, for the cache that each kind of layer keeps."""
    n_full, n_window = kinds.count("full"), kinds.count("window")
    layer_bytes = 0.0
    if n_full or n_window:
        if fields.get("kv_lora_rank") is not None:  # MLA: one latent vector and one rotary key for all heads
            layer_bytes = kv_element_bytes * (fields.whole("kv_lora_rank") + fields.whole("qk_rope_head_dim"))
            # The indexer of sparse attention keeps a key of its own in fp8 with one fp32 scale.
            layer_bytes += fields.whole("index_head_dim") + 4 if fields.get("index_head_dim") is not None else 0
        else:
            _, n_kv_heads, width = _heads(fields)
            layer_bytes = kv_element_bytes * 2 * n_kv_heads * width
    state = kinds.count("linear") * _linear_state(fields) if "linear" in kinds else 0
    state += kinds.count("mamba") * _mamba_state(fields) if "mamba" in kinds else 0
    return {
        "kv_full_bytes_per_token": n_full * layer_bytes,
        "kv_window_bytes_per_token": n_window * layer_bytes,
        "window_tokens": fields.whole("sliding_window attention_chunk_size") if n_window else None,
        "state_bytes": STATE_ELEMENT_BYTES * state,
    }


def _weights(fields: Fields, rest: _Rest, shape: MoEShape, kinds: list[str]) -> tuple[int, int]:
    """Parameters that quantisation may shrink (attention, MLP, shared experts), and those it leaves wide."""
    hidden, n_layers = fields.whole(_HIDDEN), len(kinds)
    n_attention = kinds.count("full") + kinds.count("window")
    linear = n_attention * _attention(fields, rest, hidden) if n_attention else 0
    linear += kinds.count("linear") * _linear(fields, hidden) if "linear" in kinds else 0
    linear += kinds.count("mamba") * _mamba(fields, hidden) if "mamba" in kinds else 0
    blocks = fields.get("layers_block_type hybrid_override_pattern") if rest.kinds is _pattern else None
    n_dense = n_layers - shape.n_layers if blocks is None else sum(block in ("-", "mlp") for block in blocks)
    linear += n_dense * shape.n_gemms * hidden * fields.whole(rest.dense) if n_dense else 0
    if shape.n_shared_experts:
        linear += shape.n_layers * shape.n_shared_experts * shape.n_gemms * hidden * fields.whole(rest.shared)
    if shape.hidden != hidden:  # latent experts: down to their width and back
        linear += shape.n_layers * 2 * hidden * shape.hidden
    router = shape.n_layers * hidden * shape.n_experts
    router += shape.n_layers * shape.n_experts * (2 * shape.inter + hidden) if rest.expert_biases else 0
    n_tables = 1 if fields.get("tie_word_embeddings") is True else 2
    return linear, router + n_tables * fields.whole("vocab_size") * hidden


def _attention(fields: Fields, rest: _Rest, hidden: int) -> int:
    if fields.get("kv_lora_rank") is None:
        n_heads, n_kv_heads, width = _heads(fields)
        return hidden * width * (n_heads * (3 if rest.gated_query else 2) + 2 * n_kv_heads)
    n_heads, latent, rope = fields.whole(_HEADS), fields.whole("kv_lora_rank"), fields.whole("qk_rope_head_dim")
    nope, value = fields.whole("qk_nope_head_dim"), fields.whole("v_head_dim")
    query_latent = fields.whole("q_lora_rank", default=0)
    query = n_heads * (nope + rope)
    total = query_latent * (hidden + query) if query_latent else hidden * query
    total += hidden * (latent + rope) + latent * n_heads * (nope + value) + n_heads * value * hidden
    if fields.get("index_head_dim") is not None:  # the indexer of sparse attention: queries, one key, weights of heads
        n_index, width = fields.whole("index_n_heads"), fields.whole("index_head_dim")
        total += query_latent * n_index * width + hidden * (width + n_index)
    return total


def _linear_sizes(fields: Fields) -> tuple[int, int, int]:
    """A gated delta net: value heads, width of all keys, width of all values."""
    n_values = fields.whole("linear_num_value_heads")
    keys = fields.whole("linear_num_key_heads") * fields.whole("linear_key_head_dim")
    return n_values, keys, n_values * fields.whole("linear_value_head_dim")


def _linear(fields: Fields, hidden: int) -> int:
    n_values, keys, values = _linear_sizes(fields)
    return hidden * (2 * keys + 3 * values + 2 * n_values) + (2 * keys + values) * fields.whole(
        "linear_conv_kernel_dim"
    )


def _linear_state(fields: Fields) -> int:
    _, keys, values = _linear_sizes(fields)
    return values * fields.whole("linear_key_head_dim") + (2 * keys + values) * fields.whole("linear_conv_kernel_dim")


def _mamba_sizes(fields: Fields) -> tuple[int, int, int]:
    """Mamba-2: heads, inner width, width of the convolution."""
    n_heads = fields.whole("mamba_num_heads")
    inner = n_heads * fields.whole("mamba_head_dim")
    return n_heads, inner, inner + 2 * fields.whole("n_groups") * fields.whole("ssm_state_size")


def _mamba(fields: Fields, hidden: int) -> int:
    n_heads, inner, convolved = _mamba_sizes(fields)
    return hidden * (2 * inner + convolved + n_heads) + convolved * fields.whole("conv_kernel")


def _mamba_state(fields: Fields) -> int:
    _, inner, convolved = _mamba_sizes(fields)
    return inner * fields.whole("ssm_state_size") + convolved * fields.whole("conv_kernel")
