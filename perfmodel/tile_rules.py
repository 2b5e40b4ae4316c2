"""How serving frameworks configure launches of their Triton fused-MoE kernel: tuned tiles where shipped, else defaults.

The configuration is the largest hidden difference between two layers that look alike: default tiles reach a third of
what tuned ones do. Facts of vLLM 0.24.0 and SGLang 0.5.14 (perfmodel/data/README.md says where they were read).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl

from perfmodel.hardware import HardwareProfile, profile_name
from perfmodel.physics import TILE_FIELDS, Array

TABLE = Path(__file__).parent / "data" / "triton_tiles.parquet"
BLOCK = 128  # rows and columns that share a scale in block-quantised fp8
FRAMEWORKS = ("vllm", "sglang")


@dataclass(frozen=True)
class TileRule:
    """The launch configurations of one framework's Triton kernel on the GPU of a hardware profile, `machine`, for
    weights in `dtype`: bf16, fp8 or fp8_block."""

    framework: str
    machine: str
    dtype: str

    def of(self, observations: pl.DataFrame) -> Array:
        """The configuration of each row, `[row, TILE_FIELDS]`, from n_experts, inter (of this GPU) and n_tokens.

        A tuned file lists batch sizes, of which the nearest counts, the smaller of two equally near.
        """
        keys = observations.select("n_experts", "inter", "n_tokens").to_numpy()
        distinct, index = np.unique(keys, axis=0, return_inverse=True)
        return np.array([self._one(*map(int, key)) for key in distinct], dtype=np.float64)[index.ravel()]

    def at(self, n_experts: int, inter: int, n_tokens: int) -> Array:
        """The configuration of one workload, `[1, TILE_FIELDS]`."""
        return np.array([self._one(n_experts, inter, n_tokens)])

    def _one(self, n_experts: int, inter: int, n_tokens: int) -> tuple[float, ...]:
        tuned = _tuned(self.framework, self.machine, self.dtype).get((n_experts, inter))
        if tuned:
            nearest = min(tuned, key=lambda key: (abs(key - n_tokens), key))
            return (*tuned[nearest], 1.0)
        default = _vllm_default if self.framework == "vllm" else _sglang_default
        return (*default(n_tokens, n_experts, self.dtype), 0.0)


@cache
def _tuned(framework: str, machine: str, dtype: str) -> dict[tuple[int, int], dict[int, tuple[float, ...]]]:
    """The tuned files of a framework: (experts, inter) -> batch size -> TILE_FIELDS without the last."""
    table = pl.read_parquet(TABLE).with_columns(pl.col("framework", "device", "dtype").cast(pl.String))
    devices = [name for name in table["device"].unique() if profile_name(name.replace("_", " ")) == machine]
    mine = table.filter(pl.col("framework") == framework, pl.col("device").is_in(devices), pl.col("dtype") == dtype)
    found: dict[tuple[int, int], dict[int, tuple[float, ...]]] = {}
    for n_experts, inter, n_tokens, *tile in mine.select(
        "n_experts", "inter", "n_tokens", *TILE_FIELDS[:-1]
    ).iter_rows():
        found.setdefault((n_experts, inter), {})[n_tokens] = tuple(map(float, tile))
    return found


def _vllm_default(n_tokens: int, n_experts: int, dtype: str) -> tuple[float, ...]:
    if dtype == "fp8_block":
        return (16 if n_tokens <= 64 else 64, BLOCK, BLOCK, 1 if n_tokens <= 16 else 32, 4, 3)
    return (
        16 if n_tokens <= 32 else 32 if n_tokens <= 96 else 64 if n_tokens <= 512 else 128,
        64 if n_tokens <= 64 else 128,
        128 if dtype == "fp8" or n_tokens <= 64 else 64,
        16 if n_tokens // n_experts > 128 else 1,
        4 if n_tokens <= 128 else 8,
        4 if n_tokens <= 32 else 3,
    )


def _sglang_default(n_tokens: int, n_experts: int, dtype: str) -> tuple[float, ...]:
    if dtype == "fp8_block":
        return (64, BLOCK, BLOCK, 32, 4, 3)
    if dtype == "fp8":
        return (64, 128, 128, 1, 4, 4) if n_tokens <= n_experts else (128, 256, 128, 32, 8, 4)
    return (16, 32, 64, 1, 4, 3) if n_tokens <= n_experts else (64, 64, 32, 8, 4, 3)


def candidates(kernel: str, profile: HardwareProfile) -> list[TileRule | None]:
    """The rules that launches of a kernel may follow: for a Triton kernel those of its framework and of the others
    (defaults change from version to version), and null, the cheapest tile; for all others null alone."""
    if "triton" not in kernel.lower():
        return [None]
    dtype = kernel.rpartition("/")[2]
    dtype = dtype if dtype in ("fp8", "fp8_block") else "bf16"
    own = [name for name in FRAMEWORKS if kernel.lower().startswith(name)]
    return [*(TileRule(name, profile.name, dtype) for name in dict.fromkeys([*own, *FRAMEWORKS])), None]
