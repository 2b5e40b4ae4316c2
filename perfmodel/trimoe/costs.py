"""What an expert costs on the GPU, on the host's CPU, and inside the memory module that holds it (TriMoE's cost model).

arXiv 2603.01058, in the words of docs/trimoe.md. Times are ns; arrays are `[batch, expert]`, a batch row being one
layer of one step.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.moe import MoEShape, gemm_flops
from perfmodel.offload import Device, Mask, OffloadConstants, link_rate
from perfmodel.offload.constants import ASSUMED
from perfmodel.offload.device import host_bytes_per_s, host_gemm, require_near_data
from perfmodel.physics import Array, Counts, smooth_value, tiled
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, RESIDENT
from perfmodel.predict import basis_of, work_of
from perfmodel.routing import Routing
from perfmodel.text import NS_PER_S

Index = NDArray[np.int64]
TABLES = ("gpu", "cpu", "ndp")  # who computes, as tables of times are named
N_DOMAINS = 1 + max(RESIDENT, COPIED, ON_HOST, NEAR_DATA)

# ktransformers takes its AMX kernels above this many tokens per expert, AVX-512 below; AMX multiplies 8 times as fast
# as AVX-512 (its notes on AMX), which is all that is known of the slower kernels here.
AVX512_TOKENS, AMX_OVER_AVX512 = 4, 8.0
MAX_DENSE = 4096  # tokens up to which computed tables have each number of tokens
# 16 modules on 8 channels (arXiv 2603.01058, set-up): one module alone can use all of its channel, so it serves a read
# at twice its part of the bandwidth of host memory.
DIMMS_PER_CHANNEL = 2


@dataclass(frozen=True, eq=False)
class Table:
    """How long an expert computes by its tokens (TriMoE's f_calc): `ns[point]` at `tokens[point]`, ascending.

    Straight lines join the points; fewer tokens than the first take as long as the first, none take no time. Raises
    InputError for points that are not ascending from at least one token, or times that are not positive.
    """

    tokens: Array
    ns: Array

    def __post_init__(self) -> None:
        ok = self.tokens.ndim == 1 and self.tokens.shape == self.ns.shape and len(self.tokens) > 0
        if not ok or not (np.diff(self.tokens, prepend=0.5) > 0).all() or not (self.ns > 0).all():
            raise InputError("a table of times needs tokens ascending from at least 1, each with a time above 0 ns")
        if not (np.isfinite(self.tokens).all() and np.isfinite(self.ns).all()):
            raise InputError("a table of times holds a number that is not finite")

    def at(self, tokens: Array) -> Array:
        """The times of experts with so many tokens; raises InputError beyond the last point."""
        most = float(tokens.max(initial=0.0))
        if most > self.tokens[-1]:
            raise InputError(f"a table of times ends at {self.tokens[-1]:g} tokens, an expert has {most:g}")
        return np.where(tokens > 0, np.interp(tokens, self.tokens, self.ns), 0.0)


def read_table(path: str | Path) -> Table:
    """The table in a .csv with the columns `tokens` and `ns`; raises InputError for another file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no table of times {str(path)!r}; expected a .csv with the columns tokens and ns")
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        points = np.array([[float(row["tokens"]), float(row["ns"])] for row in rows])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path.name} is no table of times; expected numbers in columns tokens and ns") from None
    if not len(points):
        raise InputError(f"{path.name} holds no times; expected numbers in columns tokens and ns")
    return Table(points[:, 0], points[:, 1])


@dataclass(frozen=True)
class Options:
    """What the machine's profile does not say, with what is assumed of it.

    `has_amx` is whether the CPU may use its matrix unit, `has_cpu` and `has_ndp` whether experts may be computed
    there. The scales multiply the profile's near-data rates, which are assumed.
    """

    has_cpu: bool = True
    has_amx: bool = True
    has_ndp: bool = True
    ndp_reading_scale: float = 1.0
    ndp_computing_scale: float = 1.0
    n_dimms_per_channel: int = DIMMS_PER_CHANNEL
    offload: OffloadConstants = ASSUMED


OPTIONS = Options()


@dataclass(frozen=True, eq=False)
class Costs:
    """What each choice for each expert adds to whom, ns `[batch, expert, domain]`, domains as in `placement.TIERS`.

    `cost_ns` is the time of who computes, infinite where that is impossible; `every_dimm_ns` what all memory modules
    are busy with it, `home_dimm_ns` what the module `home[batch, expert]` is busy beyond that. All are 0 for an expert
    without tokens.
    """

    cost_ns: Array
    every_dimm_ns: Array
    home_dimm_ns: Array
    home: Index
    n_dimms: int

    def rows(self, keep: Mask | Index) -> "Costs":
        """The same for some batch rows."""
        return replace(
            self,
            cost_ns=self.cost_ns[keep],
            every_dimm_ns=self.every_dimm_ns[keep],
            home_dimm_ns=self.home_dimm_ns[keep],
            home=self.home[keep],
        )

    def only(self, *domains: int) -> "Costs":
        """The same where experts may be computed in these domains alone, and in device memory."""
        closed = [d for d in range(N_DOMAINS) if d not in (RESIDENT, COPIED, *domains)]
        cost = self.cost_ns.copy()
        cost[..., closed] = np.inf
        return replace(self, cost_ns=cost)


def costs_of(cost_ns: Array, home: Index | None = None, n_dimms: int = 1) -> Costs:
    """Costs of times of your own, `cost_ns[batch, expert, domain]` (infinite where impossible): near-data times are
    spent in module `home[batch, expert]` (null: the first), and modules serve no reads."""
    at_home = np.zeros_like(cost_ns)
    at_home[..., NEAR_DATA] = np.where(np.isfinite(cost_ns[..., NEAR_DATA]), cost_ns[..., NEAR_DATA], 0.0)
    where = np.zeros(cost_ns.shape[:2], dtype=np.int64) if home is None else home
    return Costs(cost_ns, np.zeros_like(cost_ns), at_home, where, n_dimms)


@dataclass(frozen=True, eq=False)
class Machine:
    """The three places where an expert of one shape is computed, and how long its weights take to each of them.

    `striped_ns` and `localised_ns` are T_DRAM: its weights out of all modules at once, or out of one; `serving_ns` is
    what each module is busy with its part of a striped read. `gather_ns` is what collecting a striped expert in one
    module takes over the link between modules. A table is null, and times infinite, for what the machine lacks.
    """

    gpu: Table
    cpu: Table | None
    ndp: Table | None
    expert_bytes: float
    pcie_ns: float
    striped_ns: float
    localised_ns: float
    internal_ns: float
    gather_ns: float
    serving_ns: float
    n_dimms: int

    def costs(self, tokens: Array, resident: Mask, striped: Mask, home: Index) -> Costs:
        """The costs of experts with `tokens[batch, expert]`, some `resident` in device memory, their weights in host
        memory `striped` over all modules or else in module `home`."""
        awake = tokens > 0
        dram = np.where(striped, self.striped_ns, self.localised_ns)
        shape = (*tokens.shape, N_DOMAINS)
        cost, every, at_home = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
        gpu = self.gpu.at(tokens)
        cost[..., RESIDENT] = np.where(resident, gpu, np.inf)
        cost[..., COPIED] = np.where(resident, np.inf, np.maximum(np.maximum(gpu, self.pcie_ns), dram))
        if self.cpu is not None:
            cost[..., ON_HOST] = np.maximum(self.cpu.at(tokens), dram)
        if self.ndp is not None:
            reading = np.where(striped, max(self.gather_ns, self.internal_ns), self.internal_ns)
            cost[..., NEAR_DATA] = np.maximum(self.ndp.at(tokens), reading)
            every[..., NEAR_DATA] = np.where(striped, self.serving_ns, 0.0)
            at_home[..., NEAR_DATA] = cost[..., NEAR_DATA]
        read = np.where(striped, self.serving_ns, 0.0)[..., None]
        every[..., [COPIED, ON_HOST]] = read
        at_home[..., [COPIED, ON_HOST]] = np.where(striped, 0.0, self.localised_ns)[..., None]
        for part in (every, at_home):
            part[~awake] = 0.0
        # An expert without tokens costs nothing wherever it could be computed.
        cost[~awake] = np.where(np.isfinite(cost[~awake]), 0.0, np.inf)
        return Costs(cost, every, np.where(np.isfinite(at_home), at_home, 0.0), home, self.n_dimms)


def machine_of(
    profile: HardwareProfile,
    shape: MoEShape,
    max_tokens: int,
    *,
    options: Options = OPTIONS,
    model: LatencyModel | None = None,
    tables: Mapping[str, Table] | None = None,
) -> Machine:
    """The machine of a profile for experts of a shape with at most `max_tokens` each.

    A table of times by tokens (`tables`, by a name of TABLES) stands before what is computed: on the GPU the tiled form
    with default constants or those of a fitted model, elsewhere the longer of FLOPs and weights at the profile's
    rates. Raises InputError for a machine that lacks a near-data unit, and for another name of a table.
    """
    given = dict(tables or {})
    if unknown := set(given) - set(TABLES):
        raise InputError(f"unknown table {sorted(unknown)[0]!r}; known: {', '.join(TABLES)}")
    o, n_bytes = options.offload, shape.expert_bytes
    tokens = _grid(max_tokens)
    flops = tokens * sum(gemm_flops(1, k, n) for k, n in shape.gemms)
    device = basis_of(profile, shape, model).device
    n_dimms, ndp, internal, gather = 1, None, np.inf, np.inf
    if options.has_ndp:
        require_near_data(profile)
        n_dimms = int(profile["n_ndp_count"])
        rate = profile["ndp_peak_flops_per_s"] * options.ndp_computing_scale * o.ndp_eff
        ndp = given.get("ndp") or Table(tokens, flops / rate * NS_PER_S)
        internal = n_bytes / (profile["ndp_peak_bytes_per_s"] * options.ndp_reading_scale * o.ndp_eff) * NS_PER_S
        between = profile.first("ndp_link_peak_bytes_per_s")
        gather = np.inf if between is None else n_bytes / between[1].value * NS_PER_S
    cpu = (given.get("cpu") or _cpu_table(profile, tokens, flops, options)) if options.has_cpu else None
    host = host_bytes_per_s(profile) * o.host_eff_memory
    one_dimm = host if n_dimms == 1 else host / n_dimms * options.n_dimms_per_channel
    return Machine(
        gpu=given.get("gpu") or _gpu_table(device, shape, tokens),
        cpu=cpu,
        ndp=ndp,
        expert_bytes=n_bytes,
        pcie_ns=n_bytes / (link_rate(profile, "copy")[0] * o.copy_eff) * NS_PER_S + o.copy_ns,
        striped_ns=n_bytes / host * NS_PER_S,
        localised_ns=n_bytes / one_dimm * NS_PER_S,
        internal_ns=internal,
        gather_ns=gather,
        serving_ns=n_bytes / n_dimms / one_dimm * NS_PER_S,
        n_dimms=n_dimms,
    )


def _grid(max_tokens: int) -> Array:
    """Numbers of tokens that a table is computed at: all of them up to MAX_DENSE, from there on ever fewer."""
    dense = np.arange(1, min(max_tokens, MAX_DENSE) + 1, dtype=np.float64)
    if max_tokens <= MAX_DENSE:
        return dense
    return np.unique(np.concatenate([dense, np.geomspace(MAX_DENSE, max_tokens, MAX_DENSE).round()]))


def _gpu_table(device: Device, shape: MoEShape, tokens: Array) -> Table:
    """One expert in device memory, for each number of tokens, as the physical model has it."""
    most = int(tokens[-1])
    alone = Routing("one expert", np.full((len(tokens), 1), most, dtype=np.int64), most, 1)
    work = replace(work_of(shape, alone, "grouped-gemm"), counts=Counts(tokens[:, None]))
    times = np.full(len(tokens), float(device.constants.expert_ns))
    for roofs in tiled.expert_roofs(work, device.kernel, device.roof, device.constants):
        moved = roofs.weights + roofs.activations
        times += smooth_value([roofs.compute, moved], device.constants.smooth_p)[:, 0]
    return Table(tokens, times)


def _cpu_table(profile: HardwareProfile, tokens: Array, flops: Array, options: Options) -> Table:
    """One expert on the host: with AMX above AVX512_TOKENS tokens, with AVX-512 else or where AMX is left out."""
    o = options.offload
    amx = host_gemm(profile)[1].value * o.host_eff_compute
    uses_amx = options.has_amx & (tokens > AVX512_TOKENS)
    return Table(tokens, flops / np.where(uses_amx, amx, amx / AMX_OVER_AVX512) * NS_PER_S + o.host_expert_ns)
