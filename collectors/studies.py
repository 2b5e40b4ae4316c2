"""The studies of a campaign: each lays out the points that answer one question about a machine. Needs no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from perfmodel.moe import MoEShape
from perfmodel.routing import Shares

from .plan import CPU_SHAPES
from .workloads import Workload, offloaded_experts, scaled_shape, shares_of, workload

PRESETS = ("quick", "standard", "full")


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a machine; rates are for guessing durations and for the bandwidth-ratio skew.

    `pool_limit_bytes` bounds the weights, `memory_limit_bytes` weights and activations together, `host_limit_bytes` the
    pinned host memory. `can` names what was found to work: `mapped`, `split`, `system`, `graph`, `fp8`.
    """

    device: str
    dtypes: tuple[str, ...]
    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float | None
    cache_bytes: float
    pool_limit_bytes: float
    memory_limit_bytes: float
    host_limit_bytes: float
    can: frozenset[str]
    host_flops_per_s: float  # of the CPU beside a GPU
    host_bytes_per_s: float

    @property
    def skew_ratio(self) -> float:
        """Device-memory over link bandwidth, rounded so that equal machines plan equal workloads; 9 without a link."""
        if not self.link_bytes_per_s:
            return 9.0
        return max(1.0, float(f"{self.bytes_per_s / self.link_bytes_per_s:.1g}"))


@dataclass(frozen=True)
class Scale:
    """How wide the studies of a preset are."""

    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    rows: tuple[int, ...]
    n_experts: tuple[int, ...]
    offload_shapes: tuple[str, ...]
    offload_tokens: tuple[int, ...]
    fracs: tuple[float, ...]
    layer_shapes: tuple[str, ...]
    layer_tokens: tuple[int, ...]


def _powers(first: int, last: int, step: int) -> tuple[int, ...]:
    return tuple(first * step**i for i in range(64) if first * step**i <= last)


EDGES = (63, 64, 65, 127, 128, 129, 255, 256, 257)  # rows around the tiles of grouped GEMM kernels
SKEWS = ("power-law:1.2", "mmlu-like", "zipf:0.6", "pareto:1.2")
CUDA_SHAPES = (
    "olmoe", "qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3",
    "qwen3-235b-a22b", "glm-4.5-air", "gpt-oss-120b", "llama-4-scout", "deepseek-v2", "mixtral-8x22b",
)  # fmt: skip
MANY_COUNTS = (8, 16, 32, 48, 64, 96, 128, 192, 256)
FRACS = (1 / 16, 1 / 8, 5 / 16, 1 / 2, 3 / 4, 1.0)

CUDA_SCALES = {
    "quick": Scale(
        CUDA_SHAPES[:3], _powers(1, 65536, 16), SKEWS[:2], (1, 64, 128, 129, 1024), (8, 64, 256),
        CUDA_SHAPES[:1], (16, 1024, 65536), (5 / 16, 1 / 2), CUDA_SHAPES[:1], (1, 16, 256),
    ),
    "standard": Scale(
        CUDA_SHAPES[:8], (*_powers(1, 524288, 4), 524288), SKEWS, (*_powers(1, 4096, 2), *EDGES), _powers(8, 256, 2),
        CUDA_SHAPES[:3], (1, 16, 256, 4096, 65536, 524288), FRACS, CUDA_SHAPES[:2], _powers(1, 4096, 4),
    ),
    "full": Scale(
        CUDA_SHAPES, _powers(1, 524288, 2), SKEWS, (*_powers(1, 16384, 2), *EDGES), MANY_COUNTS,
        CUDA_SHAPES[:5], (*_powers(1, 262144, 4), 524288), (1 / 32, *FRACS, 1 / 4, 5 / 8, 7 / 8), CUDA_SHAPES[:5],
        _powers(1, 16384, 2),
    ),
}  # fmt: skip
REAL_ON_CPU = ("olmoe", "qwen3-30b-a3b", "deepseek-v2-lite")
CPU_SCALES = {
    "quick": Scale(CPU_SHAPES[:4], (1, 16, 256), SKEWS[:1], (1, 16, 128), (8, 64), (), (), (), CPU_SHAPES[:2], (1, 64)),
    "standard": Scale(
        (*CPU_SHAPES, *REAL_ON_CPU), _powers(1, 4096, 4), SKEWS, (*_powers(1, 1024, 2), *EDGES), _powers(8, 256, 2),
        (), (), (), CPU_SHAPES, _powers(1, 1024, 4),
    ),
    "full": Scale(
        (*CPU_SHAPES, *CUDA_SHAPES), _powers(1, 16384, 2), SKEWS, (*_powers(1, 4096, 2), *EDGES),
        MANY_COUNTS, (), (), (), (*CPU_SHAPES, *REAL_ON_CPU), _powers(1, 4096, 2),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Maker:
    """What studies share: machine, scale, seed, and the shares of routing files by name."""

    facts: Facts
    scale: Scale
    seed: int
    files: Mapping[str, Shares]

    @property
    def launch(self) -> str | None:
        """Grouped GEMMs are replayed from a graph where that works: what they cost on the device, host left out."""
        return "graph" if "graph" in self.facts.can else None

    @property
    def accesses(self) -> tuple[tuple[str, str | None], ...]:
        """The ways this machine can use offloaded experts, as (access, residency)."""
        if self.facts.device != "cuda":
            return ()
        ways = [("zero-copy", way) for way in ("mapped", "split", "system") if way in self.facts.can]
        return (*ways, ("copy", None), ("copy-overlap", None), ("cpu", None))

    def gemm(self, shape: MoEShape, n_tokens: int, routing: str, which: int = 0, launch: str | None = "") -> Workload:
        """One resident grouped GEMM: gate and up (0) or down (1)."""
        found = workload(
            shape, "grouped_gemm", shape.gemms[which], n_tokens, routing, self.facts.device, self.seed, self.files
        )
        return replace(found, launch=self.launch if launch == "" else launch)

    def layer(self, shape: MoEShape, n_tokens: int, routing: str, launch: str | None = None) -> Workload:
        """One resident MoE layer."""
        found = workload(shape, "moe_layer", None, n_tokens, routing, self.facts.device, self.seed, self.files)
        return replace(found, launch=launch)

    def offload(
        self, resident: Workload, frac: float, access: str, residency: str | None, order: str = "ascending"
    ) -> Workload:
        """The same point with a fraction of its experts in host memory."""
        shares = shares_of(resident.routing, resident.n_experts, self.files)
        experts = offloaded_experts(shares, frac, order, self.seed)
        # Copies and host work are launched one by one, as a model does that learns its counts from the router.
        graphed = access == "zero-copy" and (resident.op == "grouped_gemm" or residency != "split")
        return replace(
            resident, access=access, residency=residency, order=order, offloaded=experts,
            offload_frac=len(experts) / resident.n_experts, launch=resident.launch if graphed else None,
        )  # fmt: skip

    def shapes(self, names: Iterable[str]) -> Iterator[MoEShape]:
        """Shapes in the main dtype."""
        return (scaled_shape(name, self.facts.dtypes[0]) for name in names)


def _with_skews(routings: Sequence[str], n_tokens: int) -> Sequence[str]:
    return routings if n_tokens > 1 else ()  # one token wakes top-k experts under any routing


def tokens_study(m: Maker) -> Iterator[Workload]:
    """Real shapes over batch sizes, balanced: the roofline from memory-bound to compute-bound."""
    for shape in m.shapes(m.scale.shapes):
        for n_tokens in m.scale.tokens:
            yield m.gemm(shape, n_tokens, "uniform")
            yield m.gemm(shape, n_tokens, "uniform", which=1)


def routing_study(m: Maker) -> Iterator[Workload]:
    """Skewed routings: how many experts wake up and how uneven their rows are."""
    for shape in m.shapes(m.scale.shapes):
        for n_tokens in m.scale.tokens[::2]:
            for routing in _with_skews(m.scale.routings, n_tokens):
                yield m.gemm(shape, n_tokens, routing)


def measured_routing_study(m: Maker) -> Iterator[Workload]:
    """The routings of files, on shapes of as many experts."""
    for routing, shares in m.files.items():
        for shape in m.shapes(m.scale.shapes):
            if shape.n_experts == shares.shape[1]:
                for n_tokens in m.scale.tokens[1::2]:
                    yield m.gemm(shape, n_tokens, routing)
                    yield m.layer(shape, n_tokens, routing)


def rows_study(m: Maker) -> Iterator[Workload]:
    """Every expert with the same number of rows, in powers of two and around tile edges."""
    for shape in m.shapes(("e8-k1-h2048-i1024", "e32-k1-h1024-i512")):
        for n_rows in m.scale.rows:
            yield m.gemm(shape, n_rows * shape.n_experts, "uniform")


def experts_study(m: Maker) -> Iterator[Workload]:
    """How the number of experts counts, awake and idle: the cost of an expert as such."""
    for n_experts in m.scale.n_experts:
        (shape,) = m.shapes((f"e{n_experts}-k1-h1024-i512",))
        for n_rows in (1, 16, 128):
            yield m.gemm(shape, n_rows * n_experts, "uniform")
        for frac in (1 / 4, 1 / 2):
            yield m.gemm(shape, 16 * n_experts, f"coverage:1/{frac:g}")


def widths_study(m: Maker) -> Iterator[Workload]:
    """K against N at equal FLOPs: what a tile costs beside its products."""
    for inter, hidden in ((4096, 256), (2048, 512), (1024, 1024), (512, 2048), (256, 4096), (128, 8192)):
        (shape,) = m.shapes((f"e16-k1-h{hidden}-i{inter}",))
        for n_rows in (4, 64, 256):
            yield m.gemm(shape, n_rows * 16, "uniform")


def one_expert_study(m: Maker) -> Iterator[Workload]:
    """All rows on one expert, the others idle: latency against tokens per expert; offloaded where there is a link."""
    for name in ("e16-k1-h2048-i1024", "e16-k1-h4096-i1408"):
        (shape,) = m.shapes((name,))
        for n_rows in dict.fromkeys((*m.scale.rows, *(t for t in m.scale.tokens if t <= 65536))):
            point = m.gemm(shape, n_rows, f"coverage:1/{1 / 16:g}")
            yield point
            if n_rows & (n_rows - 1) == 0:
                # The busy expert is the most probable one: offload in descending order.
                yield from (m.offload(point, 1 / 16, *way, order="descending") for way in m.accesses)


def offload_study(m: Maker) -> Iterator[Workload]:
    """The least probable experts in host memory, by fraction, batch and access mode."""
    for shape in m.shapes(m.scale.offload_shapes):
        for n_tokens in m.scale.offload_tokens:
            for routing in ("mmlu-like", "uniform") if n_tokens > 1 else ("uniform",):
                point = m.gemm(shape, n_tokens, routing)
                for frac in m.scale.fracs:
                    yield from (m.offload(point, frac, *way) for way in m.accesses)


def link_skew_study(m: Maker) -> Iterator[Workload]:
    """Offloaded experts receive tokens in the ratio of link to device-memory bandwidth: both sides stream as long."""
    for shape in m.shapes(m.scale.offload_shapes):
        for n_tokens in m.scale.offload_tokens:
            for frac in m.scale.fracs[1:4:2]:
                for routing in _with_skews((f"link-skew:{m.facts.skew_ratio:g}/{frac:g}",), n_tokens):
                    yield from (m.offload(m.gemm(shape, n_tokens, routing), frac, *way) for way in m.accesses)


def order_study(m: Maker) -> Iterator[Workload]:
    """Which experts leave first: the least probable, the most probable, or any."""
    for shape in m.shapes(m.scale.offload_shapes):
        for n_tokens in m.scale.offload_tokens[1::2]:
            for routing in _with_skews(("power-law:1.2", "mmlu-like"), n_tokens):
                for order in ("ascending", "descending", "random"):
                    yield from (
                        m.offload(m.gemm(shape, n_tokens, routing), 1 / 2, *way, order=order) for way in m.accesses
                    )


def published_study(m: Maker) -> Iterator[Workload]:
    """The two points of the GH200 study (ISC 2026 poster), under our reading of its shape."""
    if m.scale.fracs:
        (shape,) = m.shapes(("poster",))
        for n_tokens, frac in ((65536, 5 / 16), (524288, 1 / 2)):
            yield from (m.offload(m.gemm(shape, n_tokens, "mmlu-like"), frac, *way) for way in m.accesses)


def layer_study(m: Maker) -> Iterator[Workload]:
    """Whole MoE layers against batch, launched by the host and from a graph, resident and offloaded by half."""
    for shape in m.shapes(m.scale.layer_shapes):
        for n_tokens in m.scale.layer_tokens:
            for routing in ("power-law:1.2", "uniform") if n_tokens > 1 else ("uniform",):
                yield m.layer(shape, n_tokens, routing)
                if m.launch:
                    yield m.layer(shape, n_tokens, routing, m.launch)
            point = m.layer(shape, n_tokens, "power-law:1.2")
            for access, residency in m.accesses:
                yield m.offload(point, 1 / 2, access, residency)
                if m.launch and residency == "mapped":
                    yield m.offload(replace(point, launch=m.launch), 1 / 2, access, residency)


def eager_study(m: Maker) -> Iterator[Workload]:
    """Grouped GEMMs launched one by one by the host: where the host, not the device, is the floor."""
    if m.launch:
        for shape in m.shapes(m.scale.shapes[:3]):
            for n_tokens in m.scale.tokens[:6]:
                yield m.gemm(shape, n_tokens, "uniform", launch=None)


def second_dtypes_study(m: Maker) -> Iterator[Workload]:
    """The other dtypes of the device: balanced batches and one skew."""
    for dtype in m.facts.dtypes[1:]:
        for name in m.scale.shapes[:4]:
            shape = scaled_shape(name, dtype)
            for n_tokens in m.scale.tokens[::2]:
                yield m.gemm(shape, n_tokens, "uniform")
                yield from (m.gemm(shape, n_tokens, skew) for skew in _with_skews(m.scale.routings[:1], n_tokens))
        (shape,) = (scaled_shape("e8-k1-h2048-i1024", dtype),)
        yield from (m.gemm(shape, n_rows * shape.n_experts, "uniform") for n_rows in m.scale.rows)


STUDIES: dict[str, Callable[[Maker], Iterator[Workload]]] = {
    "tokens": tokens_study,
    "offload": offload_study,
    "layer": layer_study,
    "rows": rows_study,
    "routing": routing_study,
    "one-expert": one_expert_study,
    "experts": experts_study,
    "published": published_study,
    "second-dtypes": second_dtypes_study,
    "widths": widths_study,
    "measured-routing": measured_routing_study,
    "link-skew": link_skew_study,
    "orders": order_study,
    "eager": eager_study,
}
