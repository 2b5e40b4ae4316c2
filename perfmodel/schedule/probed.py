"""The machine of an expert-parallel capture as its probes saw it while all ranks worked: rates, links, shared cores."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from perfmodel.ep_capture import EpCapture
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.physics import Array
from perfmodel.text import NS_PER_S

# Assumed: how long Linux lets a process compute before another has its turn (2.8 ms by default, rounded).
SLICE_NS = 3e6


def profile_of(capture: EpCapture) -> HardwareProfile:
    """What a rank can do that has its cores, and its links, as the capture's probes measured it while all ranks worked;
    raises InputError where a probe that a layer needs is missing."""
    settings, manifest = capture.manifest.settings, capture.manifest
    date = manifest.created[:10] or None
    n_ranks = f"{settings.n_ranks} ranks at the same time"

    def measured(value: float, how: str) -> Quantity:
        return Quantity(value, "measured", how, date)

    found = {
        f"{capture.dtype}_gemm_flops_per_s": measured(*_fastest(capture, "gemm")),
        "memory_stream_bytes_per_s": measured(*_fastest(capture, "stream")),
    }
    if settings.n_ranks > 1:
        alpha_ns, bytes_per_s = link_of(capture)
        how = f"all-to-all of {settings.n_ranks} ranks, robust line through sizes"
        found["peer_link_alpha_ns"] = measured(alpha_ns, how)
        found["peer_link_all_to_all_bytes_per_s"] = measured(bytes_per_s, how)
    if settings.device == "cpu" and settings.threads is not None:
        found["n_cores_count"] = measured(float(settings.threads), "threads of a rank")
    device = "gpu" if settings.device == "cuda" else "cpu"
    title = str(manifest.machine.get("gpu_name" if device == "gpu" else "cpu_model", capture.name))
    return HardwareProfile(capture.name, f"{title}, one of {n_ranks}", device, found)


@dataclass(frozen=True)
class Crowd:
    """Ranks on the same cores of a CPU, which hold `at_once` of them, fewer than there are."""

    ranks: tuple[int, ...]
    at_once: float

    @property
    def per_core(self) -> float:
        """How many ranks there are for what one of them uses."""
        return len(self.ranks) / self.at_once


def crowds(capture: EpCapture) -> tuple[Crowd, ...]:
    """Which ranks share cores: those bound to the same processors, all of them where they are not bound; none where
    every rank has its own, or nobody says."""
    from scipy.sparse.csgraph import connected_components

    settings, n_cores = capture.manifest.settings, capture.manifest.machine.get("n_cores")
    if settings.device != "cpu" or not isinstance(n_cores, int) or n_cores < 1 or settings.threads is None:
        return ()
    cpus = capture.manifest.cpus_of_ranks
    if not cpus or not all(cpus):
        cpus = [list(range(n_cores))] * settings.n_ranks
    shared = [[bool(set(a) & set(b)) for b in cpus] for a in cpus]
    _, group_of = connected_components(np.array(shared))
    groups = [tuple(np.flatnonzero(group_of == group).tolist()) for group in np.unique(group_of)]
    found = [Crowd(ranks, len({cpu for rank in ranks for cpu in cpus[rank]}) / settings.threads) for ranks in groups]
    return tuple(one for one in found if one.per_core > 1)


def link_of(capture: EpCapture) -> tuple[float, float]:
    """Latency, ns, and bytes per s of a rank's link: a line through the times of all-to-alls over what a rank sends to
    others. Residuals are relative, so that small messages say what the latency is, and large ones of them count less.
    """
    from scipy.optimize import least_squares

    probes = _together(capture, "all_to_all")
    n_others = capture.n_ranks - 1
    sizes = np.array([_number(json.loads(params), "bytes") for params in probes["params"]]) * n_others
    times = probes["value"].to_numpy()
    if len(np.unique(sizes)) < 2:
        raise InputError(f"capture {capture.name!r}: probe all_to_all was taken at one size, expected several")
    first = np.log([times.min(), (times / np.maximum(sizes, 1.0))[sizes == sizes.max()].min()])

    def residual(log_line: Array) -> Array:
        alpha, beta = np.exp(log_line)
        return np.asarray(np.log(alpha + beta * sizes) - np.log(times))

    alpha_ns, ns_per_byte = np.exp(least_squares(residual, first, loss="soft_l1", f_scale=0.1).x)
    return float(alpha_ns), float(NS_PER_S / ns_per_byte)


def _fastest(capture: EpCapture, probe: str) -> tuple[float, str]:
    """The rate of a rank that has its cores, at the parameters of a probe where it is highest (medians over ranks), and
    how it was measured.

    Where ranks take turns on cores, a call that ends within a time slice saw its core, and one that would take longer
    than a slice of its own its share of it. Calls between the two say nothing, unless there are no others.
    """
    crowd = max((one.per_core for one in crowds(capture)), default=1.0)
    known: list[tuple[bool, float, str]] = []
    rates = _together(capture, probe).group_by("params", maintain_order=True).agg(pl.col("value").median())
    for words, rate in rates.iter_rows():
        params = json.loads(words)
        amount = _number(params, "n_bytes") or 2 * math.prod(_number(params, name) for name in ("k", "n", "rows"))
        call_ns = amount / rate * NS_PER_S
        share = crowd if call_ns > crowd * SLICE_NS else 1.0
        told = ", ".join(f"{key} {value}" for key, value in params.items()) or "no parameters"
        how = f"probe {probe} ({told}), all {capture.n_ranks} ranks at once, median of ranks"
        how += f", x {share:g} for the cores they share" if share > 1 else ""
        known.append((share > 1 or call_ns <= SLICE_NS, rate * share, how))
    _, best, how = max(known)
    return best, how


def _number(params: Mapping[str, object], name: str) -> float:
    """A number among the parameters of a probe, 0 where there is none."""
    value = params.get(name)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0


def _together(capture: EpCapture, probe: str) -> pl.DataFrame:
    """The measurements of a probe that all ranks took together; raises InputError where there are none."""
    alone = pl.col("params").str.json_path_match("$.alone") == "true"
    found = capture.probes.filter(pl.col("probe") == probe, ~alone.fill_null(value=False))
    if found.is_empty():
        known = ", ".join(capture.probes["probe"].unique(maintain_order=True)) or "none"
        raise InputError(f"capture {capture.name!r} has no probe {probe!r} of all ranks together; it has {known}")
    return found
