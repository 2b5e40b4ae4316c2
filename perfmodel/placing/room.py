"""What memory there is for the experts that are placed: on the device beside everything else, and on the host."""

from dataclasses import dataclass, replace

from perfmodel import text
from perfmodel.hardware import HardwareProfile
from perfmodel.model_memory import ModelMemory
from perfmodel.moe import MoEShape
from perfmodel.placement.budget import WORKSPACE_BYTES, DeviceBudget, HostNeed, expert_budget, host_need

N_STAGING = 2  # slots for experts that are copied in: one arrives while the other is computed


@dataclass(frozen=True)
class Engine:
    """What is said of an engine's memory, bytes: what it may use of the device (null: all of it), or instead which
    fraction of the experts may be resident; sequences in the KV cache of so many tokens each (0: no cache is counted);
    activations, graphs and context; slots for copies and further copies of hot experts; host memory (null: the
    machine's), whether it holds all experts whether resident or not, and replicas of the model that share it.
    `is_per_layer`: every layer has the same number of resident experts."""

    device_bytes: float | None = None
    expert_frac: float | None = None
    n_context_tokens: int = 0
    n_sequences: int = 1
    workspace_bytes: float = WORKSPACE_BYTES
    n_staging: int = N_STAGING
    n_copies: int = 0
    host_bytes: float | None = None
    host_holds_all: bool = False
    n_replicas: int = 1
    is_per_layer: bool = False


@dataclass(frozen=True)
class Room:
    """Bytes for the experts of the layers that are placed: on the device, and on the host for those that leave (null:
    nothing limits them). `notes` say in words how they came about."""

    capacity_bytes: float
    host_bytes: float | None
    notes: tuple[str, ...]


def room_for(
    profile: HardwareProfile, shape: MoEShape, memory: ModelMemory, engine: Engine, n_layers: int | None = None
) -> Room:
    """The memory for the experts of `n_layers` of the shape's layers (null: all), which get their part of it.

    Raises InputError where no expert fits beside the rest of the model, where the host cannot hold what does not fit,
    and where the KV cache is asked for and not known.
    """
    n_layers = shape.n_layers if n_layers is None else n_layers
    all_bytes, part = shape.n_layers * shape.layer_bytes, n_layers / shape.n_layers
    experts = f"{n_layers} layers of {shape.n_experts} experts of {text.n_bytes(shape.expert_bytes)}"
    notes: list[str] = []
    if engine.expert_frac is not None:
        capacity = engine.expert_frac * all_bytes
    else:
        budget, notes = _budget(profile, shape, memory, engine)
        capacity = min(budget.expert_bytes, all_bytes)
    if engine.is_per_layer:
        n_each = int(capacity / shape.n_layers / shape.expert_bytes + 1e-9)
        capacity = n_each * shape.n_layers * shape.expert_bytes
        notes.append(f"{text.counted(n_each, 'expert')} of each layer may be resident")
    notes.insert(0, f"{experts}, {text.n_bytes(part * all_bytes)}; {text.n_bytes(part * capacity)} may be resident")
    if n_layers != shape.n_layers:
        notes.append(f"{n_layers} of {shape.n_layers} layers were recorded: they get their part of all memory")
    need = needed(profile, shape, engine, int(capacity / shape.expert_bytes + 1e-9))
    free = None if need.capacity_bytes is None or engine.host_holds_all else need.capacity_bytes / engine.n_replicas
    return Room(part * capacity, None if free is None else part * free, tuple(notes))


def needed(
    profile: HardwareProfile, shape: MoEShape, engine: Engine, n_resident: int, is_pinned: bool = True
) -> HostNeed:
    """What the host must hold when `n_resident` experts of all layers are on the device; raises InputError where it
    has less."""
    known = profile.first("host_capacity_bytes")
    capacity = engine.host_bytes if engine.host_bytes is not None else known[1].value if known is not None else None
    return host_need(
        shape,
        n_resident,
        capacity,
        host_holds_all=engine.host_holds_all,
        is_pinned=is_pinned,
        n_replicas=engine.n_replicas,
    )


def _budget(
    profile: HardwareProfile, shape: MoEShape, memory: ModelMemory, engine: Engine
) -> tuple[DeviceBudget, list[str]]:
    """What one device holds, and that in words."""
    total = profile["memory_capacity_bytes"] if engine.device_bytes is None else engine.device_bytes
    notes = [f"not counted: {note}" if memory.non_expert_bytes is None else note for note in memory.notes]
    if memory.non_expert_bytes is None:
        notes.append("weights besides experts are not known and count as none; --other-weights states them")
        memory = replace(memory, non_expert_bytes=0.0)
    found = expert_budget(
        total,
        shape,
        memory,
        n_context_tokens=engine.n_context_tokens,
        n_sequences=engine.n_sequences,
        workspace_bytes=engine.workspace_bytes,
        n_staging_experts=engine.n_staging,
        n_copies=engine.n_copies,
    )
    words = (
        f"of {text.n_bytes(total)} of device memory, {found.taken} leave {text.n_bytes(found.expert_bytes)} for experts"
    )
    if not engine.n_context_tokens:
        notes.append("no KV cache is counted; --context and --sequences state it")
    return found, [words, *notes]
