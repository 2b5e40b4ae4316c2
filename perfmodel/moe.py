"""What a MoE layer is: its shape, the bytes of an expert, and FLOPs and bytes of grouped GEMMs. Needs numpy only."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from perfmodel.errors import InputError

MODEL_DIR = Path(__file__).parent / "data" / "models"

# Bytes a stored weight takes, scales included: fp8 in 128x128 blocks with fp32 scales, mxfp4 one byte per 32,
# nvfp4 one per 16, mxfp8 one per 32, int4 groups of 32 with a bf16 scale, longer ones with a 4-bit zero point as well.
WEIGHT_BYTES: dict[str, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0 + 4 / (128 * 128),
    "int8": 1.0,
    "int4": 0.5 + 2 / 32,
    "int4-g64": 0.5 + 2.5 / 64,
    "int4-g128": 0.5 + 2.5 / 128,
    "mxfp4": 0.5 + 1 / 32,
    "mxfp8": 1.0 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
ACTIVATION_BYTES: dict[str, float] = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}  # all others compute on bf16 activations


@dataclass(frozen=True)
class MoEShape:
    """The routed experts of one MoE layer: `hidden` and `inter` are the widths an expert sees; `n_gemms` is 3 for gated
    experts (gate, up, down) and 2 for plain ones; `n_layers` counts the MoE layers of the model."""

    name: str
    n_experts: int
    top_k: int
    hidden: int
    inter: int
    n_gemms: int = 3
    n_layers: int = 1
    n_shared_experts: int = 0
    dtype: str = "bf16"
    source: str = ""

    def __post_init__(self) -> None:
        for field in ("n_experts", "top_k", "hidden", "inter", "n_layers"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"shape {self.name!r}: {field} is {value!r}, expected a whole number of at least 1")
        if self.n_shared_experts < 0:
            raise InputError(
                f"shape {self.name!r}: n_shared_experts is {self.n_shared_experts}, "
                "expected a whole number of at least 0"
            )
        if self.top_k > self.n_experts:
            raise InputError(f"shape {self.name!r}: top-k {self.top_k} exceeds its {self.n_experts} experts")
        if self.n_gemms not in (2, 3):
            raise InputError(f"shape {self.name!r}: n_gemms is {self.n_gemms}, expected 3 (gated) or 2")
        if self.dtype not in WEIGHT_BYTES:
            raise InputError(f"shape {self.name!r}: dtype {self.dtype!r} is unknown; known: {', '.join(WEIGHT_BYTES)}")

    @classmethod
    def from_config(cls, path: str | Path) -> "MoEShape":
        """The shape that a Hugging Face config.json describes; what is read and what raises says `read_config`."""
        from perfmodel.hf_config import read_config  # which is made of what stands here

        return read_config(path)

    @property
    def expert_bytes(self) -> float:
        """Weight bytes of one routed expert, quantisation scales included."""
        return self.n_gemms * self.hidden * self.inter * WEIGHT_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> float:
        """Weight bytes of all routed experts of one layer."""
        return self.n_experts * self.expert_bytes

    @property
    def gemms(self) -> tuple[tuple[int, int], ...]:
        """The grouped GEMMs of the layer as (K, N): gate and up fused in one, then down."""
        return ((self.hidden, (self.n_gemms - 1) * self.inter), (self.inter, self.hidden))


def gemm_flops(n_rows: float, k: int, n: int) -> float:
    """FLOPs of a GEMM of n_rows x k by k x n: one multiply and one add per term."""
    return 2.0 * n_rows * k * n


def layer_flops(shape: MoEShape, n_tokens: int) -> float:
    """FLOPs of the routed experts of one layer for a batch: 2 x tokens x top-k x weights of an expert."""
    return 2.0 * n_tokens * shape.top_k * shape.n_gemms * shape.hidden * shape.inter


def names() -> list[str]:
    """The names of the catalogue."""
    return sorted(path.stem for path in MODEL_DIR.glob("*.toml"))


def shape(source: str) -> MoEShape:
    """The shape of a catalogue name; raises InputError listing the valid names. `hf_config.resolve` takes files too."""
    table = _entry(source)
    table.pop("config", None)
    return MoEShape(name=source, **table)


def config_of(source: str) -> dict[str, Any]:
    """The fields of the published config.json that a catalogue entry keeps, by their names there; empty without one.

    Raises InputError listing the valid names.
    """
    return dict(_entry(source).get("config", {}))


def _entry(source: str) -> dict[str, Any]:
    if source not in names():
        raise InputError(f"unknown shape {source!r}; known: {', '.join(names())}, or the path of a config.json")
    return dict(_table(MODEL_DIR / f"{source}.toml"))


@cache
def _table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
