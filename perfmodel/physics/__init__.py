"""The physical latency model: what a grouped GEMM and a MoE layer cost under named constants. Pure numpy.

`work` says what is computed and on what, `tiled` is the form of kernels on GPUs, `blas` that of CPUs, `forms` chooses.
Every formula has its number in docs/model.md. Times are ns, rates per second.
"""

from .blas import BlasConstants
from .forms import PYTORCH_KERNEL, Form, form_for, form_of
from .priors import Prior
from .tiled import Kernel, TiledConstants
from .work import (
    COMPUTES_IN,
    PARTS,
    PEAK_GEMM_FRAC,
    PEAK_STREAM_FRAC,
    TILE_FIELDS,
    TILE_ROWS,
    Array,
    Ceilings,
    Counts,
    Parts,
    Work,
    attainable_flops_per_s,
    ceilings,
    element_bytes,
    ideal_work,
    nearest_tile,
    smooth_max,
    smooth_value,
    sum_parts,
    total,
    transferred_ceilings,
)

__all__ = [
    "COMPUTES_IN",
    "PARTS",
    "PEAK_GEMM_FRAC",
    "PEAK_STREAM_FRAC",
    "PYTORCH_KERNEL",
    "TILE_FIELDS",
    "TILE_ROWS",
    "Array",
    "BlasConstants",
    "Ceilings",
    "Counts",
    "Form",
    "Kernel",
    "Parts",
    "Prior",
    "TiledConstants",
    "Work",
    "attainable_flops_per_s",
    "ceilings",
    "element_bytes",
    "form_for",
    "form_of",
    "ideal_work",
    "nearest_tile",
    "smooth_max",
    "smooth_value",
    "sum_parts",
    "total",
    "transferred_ceilings",
]
