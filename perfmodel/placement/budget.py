"""How many experts fit: what is left of device memory for them, and what the host must hold."""

from dataclasses import dataclass

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.model_memory import ModelMemory
from perfmodel.moe import MoEShape

# CUDA context, activations of a prefill chunk and fragmentation: assumed, of the order that engines report. It grows
# with the chunk and the number of CUDA graphs, so an engine's own figure is better.
WORKSPACE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class DeviceBudget:
    """What one device holds, in bytes; its capacity less everything else is `expert_bytes`, the room for experts.

    `n_experts` whole experts fit over all layers, `n_experts_per_layer` in each layer when all have the same number, as
    `--kt-num-gpu-experts` does; both are at most what the model has. `taken` says what takes how much, `notes` are
    remarks in sentences.
    """

    capacity_bytes: float
    non_expert_bytes: float
    kv_bytes: float
    workspace_bytes: float
    staging_bytes: float
    copies_bytes: float
    n_experts: int
    n_experts_per_layer: int
    taken: str
    notes: tuple[str, ...] = ()

    @property
    def expert_bytes(self) -> float:
        """Bytes left for resident experts, each once."""
        others = self.non_expert_bytes, self.kv_bytes, self.workspace_bytes, self.staging_bytes, self.copies_bytes
        return self.capacity_bytes - sum(others)


def expert_budget(
    capacity_bytes: float,
    shape: MoEShape,
    memory: ModelMemory,
    *,
    n_context_tokens: int = 0,
    n_sequences: int = 1,
    workspace_bytes: float = WORKSPACE_BYTES,
    n_staging_experts: int = 0,
    n_copies: int = 0,
) -> DeviceBudget:
    """How many bytes and experts of a model fit into a device beside the rest of the model and its KV cache.

    `capacity_bytes` is what the engine may use of the device; `n_sequences` of `n_context_tokens` tokens each are in
    the cache. `n_staging_experts` are slots for experts that are copied to the device before it computes them (two, to
    copy one while another is computed); `n_copies` are further copies of hot experts. Raises InputError where the rest
    of the model is not known, a number is negative, or no room is left for a single expert: what takes how much.
    """
    numbers = (capacity_bytes, n_context_tokens, n_sequences, workspace_bytes, n_staging_experts, n_copies)
    if min(numbers) < 0:
        raise InputError("capacity, tokens, sequences, workspace, staging slots and copies must not be negative")
    kv_bytes = memory.kv_bytes(n_context_tokens, n_sequences) if n_context_tokens else 0.0
    if memory.non_expert_bytes is None or kv_bytes is None:
        unknown = "weights besides experts" if memory.non_expert_bytes is None else "the KV cache"
        raise InputError(f"{shape.name}: the bytes of {unknown} are not known ({'; '.join(memory.notes)}); state them")
    one_bytes, n_all = shape.expert_bytes, shape.n_layers * shape.n_experts
    cached = f"{text.counted(n_sequences, 'sequence')} of {text.counted(n_context_tokens, 'token')}"
    slots, copies = f"{n_staging_experts} staging slots", f"{n_copies} further copies"
    names = ("weights besides experts", f"KV cache of {cached}", "workspace", slots, copies)
    others = (memory.non_expert_bytes, kv_bytes, workspace_bytes, n_staging_experts * one_bytes, n_copies * one_bytes)
    taken = ", ".join(f"{name} {text.n_bytes(size)}" for name, size in zip(names, others, strict=True) if size)
    n_experts = min(n_all, int((capacity_bytes - sum(others)) // one_bytes))
    if n_experts < 1:
        raise InputError(
            f"{shape.name}: {text.n_bytes(capacity_bytes)} of device memory leave no room for an expert of "
            f"{text.n_bytes(one_bytes)}: {taken}"
        )
    return DeviceBudget(capacity_bytes, *others, n_experts, n_experts // shape.n_layers, taken, memory.notes)


@dataclass(frozen=True)
class HostNeed:
    """What the host holds for a placement, in bytes; `capacity_bytes` is null where it was not given."""

    needed_bytes: float
    capacity_bytes: float | None
    notes: tuple[str, ...]


def host_need(
    shape: MoEShape,
    n_resident: int,
    capacity_bytes: float | None = None,
    *,
    host_holds_all: bool = False,
    is_pinned: bool = True,
    n_replicas: int = 1,
) -> HostNeed:
    """How much host memory the experts take that are not resident, `n_resident` of all layers being on each device.

    `host_holds_all`: the engine keeps every expert in host memory whether or not it is resident too, as ktransformers
    does (#2084, #2023: host memory does not fall when experts go to the GPU). `n_replicas` copies of the model on other
    devices of the host each hold their own. Raises InputError where the host has less, naming what takes how
    much, and for numbers out of range.
    """
    n_all = shape.n_layers * shape.n_experts
    if not 0 <= n_resident <= n_all or n_replicas < 1:
        raise InputError(
            f"{n_resident} resident experts in {n_replicas} replicas, expected 0 to {n_all}, and 1 or more"
        )
    n_held = n_all if host_holds_all else n_all - n_resident
    needed_bytes = n_replicas * n_held * shape.expert_bytes
    if capacity_bytes is not None and needed_bytes > capacity_bytes:
        replicas = f" for each of {n_replicas} replicas" if n_replicas > 1 else ""
        raise InputError(
            f"{shape.name}: host memory of {text.n_bytes(capacity_bytes)} cannot hold {text.n_bytes(needed_bytes)}: "
            f"{text.counted(n_held, 'expert')} of {text.n_bytes(shape.expert_bytes)}{replicas}"
        )
    notes = []
    if host_holds_all and n_resident:
        notes.append(f"the engine keeps the {text.counted(n_resident, 'resident expert')} in host memory as well")
    if is_pinned and n_held:
        notes.append(
            f"{text.n_bytes(needed_bytes)} of it are pinned: they cannot be swapped out, and `ulimit -l` or a "
            "container may forbid locking so much"
        )
    return HostNeed(needed_bytes, capacity_bytes, tuple(notes))
