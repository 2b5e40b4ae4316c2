"""Decode steps of a model whose experts are spread over GPU, CPU and memory modules, under a system's rules.

A system is who decides, and what moves. TriMoE's and those it is compared with, as we reconstruct them, are in
`systems`. Times are ns of the routed experts of MoE layers; attention and everything else is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.placement import COPIED, NEAR_DATA, Tiers
from perfmodel.routing import Loads, Recording

from .costs import OPTIONS, Costs, Machine, Options, Table, machine_of
from .prediction import BOUNDS, COLD, NEW_FRAC, Bounds, classify, ema
from .relayout import MOVES, Layout, Window, dealt, relayout
from .scheduler import UNITS, Busy, busy

MAX_ROWS = 2048  # layers of steps that are scheduled at once
HBM_FRAC = 0.5  # of device memory for routed experts; assumed, for no source says how many experts TriMoE keeps there

Decide = Callable[[Costs, Array], Tiers]  # from costs and tokens [batch, expert]


@dataclass(frozen=True)
class System:
    """Who computes what: `decide(costs, tokens)` gives domains `[batch, expert]`. `has_cpu`, `has_amx`,
    `has_ndp` are what it uses of the machine, `has_relayout` whether it moves weights between steps."""

    name: str
    words: str
    decide: Decide
    has_cpu: bool = True
    has_amx: bool = True
    has_ndp: bool = True
    has_relayout: bool = False


@dataclass(frozen=True, eq=False)
class Workload:
    """What is simulated: a model's experts on a machine, `before[step, layer, expert]` to know popularity from, and
    `steps[step, layer, expert]` to be timed; `n_slots` experts of each layer have room in device memory.

    `attention_ns` is the time per layer beside its experts, under which weights may move too (0: attention is not
    modelled, and hides nothing). `has_seen_moves` is whether a move may make a layer end later by less than its
    benefit, or else is made only where it is hidden. `tables` are times by tokens that stand before the computed ones,
    `model` a fitted model of the GPU's kernel (null: default constants).
    """

    profile: HardwareProfile
    shape: MoEShape
    before: Loads
    steps: Loads
    n_slots: int
    options: Options = OPTIONS
    bounds: Bounds = BOUNDS
    new_frac: float = NEW_FRAC
    attention_ns: float = 0.0
    has_seen_moves: bool = True
    tables: dict[str, Table] = field(default_factory=dict)
    model: LatencyModel | None = None

    def machine(self, system: System) -> Machine:
        """The machine as far as a system uses it."""
        o = self.options
        options = replace(
            o,
            has_cpu=o.has_cpu and system.has_cpu,
            has_amx=o.has_amx and system.has_amx,
            has_ndp=o.has_ndp and system.has_ndp,
        )
        most = int(np.ceil(max(self.before.max(), self.steps.max())))
        return machine_of(self.profile, self.shape, most, options=options, model=self.model, tables=self.tables)


def workload(
    profile: HardwareProfile,
    shape: MoEShape,
    recording: Recording,
    n_before: int,
    *,
    n_slots: int | None = None,
    budget_bytes: float | None = None,
    options: Options = OPTIONS,
) -> Workload:
    """The workload of a recording whose first `n_before` steps only say how popular experts are.

    Room in device memory is `n_slots` per layer, or what a budget for the routed experts of all layers of the model
    gives, null for HBM_FRAC of device memory. Raises InputError for too few steps, steps without order, a recording of
    another shape, and more than device memory holds.
    """
    n_steps, _, n_experts = recording.loads.shape
    if n_experts != shape.n_experts:
        raise InputError(f"{recording.name}: {n_experts} experts, {shape.name} has {shape.n_experts}")
    if not recording.is_ordered:
        raise InputError(
            f"{recording.name}: its steps are in no order of time, and each is predicted from those before"
        )
    if not 1 <= n_before < n_steps:
        raise InputError(
            f"{recording.name}: {n_steps} steps of which {n_before} come before, expected one or more of each"
        )
    if n_slots is None:
        budget = HBM_FRAC * profile["memory_capacity_bytes"] if budget_bytes is None else budget_bytes
        n_slots = int(budget // (shape.expert_bytes * shape.n_layers))
    if n_slots < 0:
        raise InputError(f"{n_slots} experts of a layer in device memory, expected at least 0")
    n_slots = min(n_slots, n_experts)
    taken, room = n_slots * shape.n_layers * shape.expert_bytes, profile.first("memory_capacity_bytes")
    if room is not None and taken > room[1].value:
        raise InputError(
            f"{n_slots} experts of each of {shape.n_layers} layers take {text.n_bytes(taken)}, the device memory of "
            f"{profile.name!r} is {text.n_bytes(room[1].value)}"
        )
    loads = recording.loads
    return Workload(profile, shape, loads[:n_before], loads[n_before:], n_slots, options)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a system made of a workload, ns `[step, layer]`: the makespan of each layer's experts, and what moving
    weights adds to it.

    `working_ns[step, layer, unit]` is how long each of UNITS computes, `units` those it has, `dimm_ns[step, layer]` how
    long modules are busy in the mean, `bottleneck[step, layer]` numbers in UNITS. `n_moves` is how many experts were
    moved by kind, `n_right` how many of these then had the class that they were moved for; `n_layers` are those of the
    model.
    """

    system: System
    makespan_ns: Array
    exposed_ns: Array
    working_ns: Array
    dimm_ns: Array
    bottleneck: NDArray[np.int64]
    units: tuple[str, ...]
    n_layers: int
    n_moves: dict[str, int] = field(default_factory=dict)
    n_right: int = 0

    @property
    def step_ns(self) -> float:
        """The time of all MoE layers of the model in one step, mean over steps."""
        return float((self.makespan_ns + self.exposed_ns).mean()) * self.n_layers

    @property
    def overhead_frac(self) -> float:
        """The part of the time that moving weights adds."""
        return float(self.exposed_ns.sum() / (self.makespan_ns + self.exposed_ns).sum())

    @property
    def utilisation(self) -> dict[str, float]:
        """The part of the time that each unit computes; of memory modules the mean over them."""
        total = (self.makespan_ns + self.exposed_ns).sum()
        shares = self.working_ns.sum(axis=(0, 1)) / total
        return {unit: float(shares[i]) for i, unit in enumerate(UNITS) if unit in self.units}

    @property
    def dimm_busy_frac(self) -> float:
        """The part of the time that memory modules work or serve reads of the others; the mean over them."""
        return float(self.dimm_ns.sum() / (self.makespan_ns + self.exposed_ns).sum())

    @property
    def bottleneck_frac(self) -> dict[str, float]:
        """How often each unit is the slowest, over layers and steps."""
        return {unit: float((self.bottleneck == i).mean()) for i, unit in enumerate(UNITS) if unit in self.units}

    @property
    def migration_frac(self) -> float | None:
        """How many of the moved experts then had the class that they were moved for; null where none moved."""
        n_moved = sum(self.n_moves.values())
        return self.n_right / n_moved if n_moved else None


def first_layout(machine: Machine, loads: Array, n_slots: int, bounds: Bounds) -> Layout:
    """Where weights are at first, by loads `[layer, expert]`: the busiest in device memory, cold ones in one module.

    The others are striped, all of them on a machine without near-data units, and none where there is no CPU to read
    them.
    """
    order = np.argsort(-loads, axis=1, kind="stable")
    resident = np.zeros(loads.shape, dtype=bool)
    np.put_along_axis(resident, order[:, :n_slots], True, axis=1)
    striped = classify(loads, bounds) != COLD
    striped = striped & (machine.cpu is not None) if machine.ndp is not None else np.ones_like(resident)
    return Layout(resident, striped, dealt(loads, resident, machine.n_dimms))


def simulate(work: Workload, system: System) -> Outcome:
    """The steps of a workload under a system, which begins with the layout that the loads before suggest."""
    machine = work.machine(system)
    average = work.before.mean(axis=0)
    layout = first_layout(machine, average, work.n_slots, work.bounds)
    found = _moving(work, system, machine, layout) if system.has_relayout else _static(work, system, machine, layout)
    now, exposed, n_moves, n_right = found
    shape = work.steps.shape[:2]
    there = {"gpu": True, "cpu": machine.cpu is not None, "ndp": machine.ndp is not None}
    return Outcome(
        system,
        np.concatenate([one.makespan_ns for one in now]).reshape(shape),
        np.concatenate(exposed).reshape(shape) if exposed else np.zeros(shape),
        np.concatenate([one.working_ns for one in now]).reshape(*shape, len(UNITS)),
        np.concatenate([one.dimm_ns.mean(axis=1) for one in now]).reshape(shape),
        np.concatenate([one.bottleneck for one in now]).reshape(shape),
        tuple(unit for unit in UNITS if there[unit]),
        work.shape.n_layers,
        n_moves,
        n_right,
    )


_Found = tuple[list[Busy], list[Array], dict[str, int], int]


def _static(work: Workload, system: System, machine: Machine, layout: Layout) -> _Found:
    """All steps with the layout they begin with, many at a time."""
    n_layers, n_experts = layout.resident.shape
    at_once = max(MAX_ROWS // n_layers, 1)
    found = []
    for start in range(0, len(work.steps), at_once):
        tokens = work.steps[start : start + at_once]
        n = len(tokens)
        resident, striped = np.tile(layout.resident, (n, 1)), np.tile(layout.striped, (n, 1))
        rows = tokens.reshape(-1, n_experts)
        costs = machine.costs(rows, resident, striped, np.tile(layout.home, (n, 1)))
        found.append(busy(costs, system.decide(costs, rows)))
    return found, [], {}, 0


def _moving(work: Workload, system: System, machine: Machine, layout: Layout) -> _Found:
    """Step after step; after each layer weights move for its next step, by a moving average of loads."""
    known = np.concatenate([work.before[1:], work.steps])
    after = ema(known, work.before[0], work.new_frac)[len(work.before) :]  # what is predicted after each step
    found, exposed = [], []
    n_moves, n_right = dict.fromkeys(MOVES, 0), 0
    for step, tokens in enumerate(work.steps):
        costs = machine.costs(tokens, layout.resident, layout.striped, layout.home)
        domain = system.decide(costs, tokens)
        now = busy(costs, domain)
        found.append(now)
        classes = classify(after[step], work.bounds)
        window = _window(work, machine, layout, tokens, domain, now)
        done = relayout(machine, layout, after[step], classes, window, has_seen_moves=work.has_seen_moves)
        exposed.append(done.exposed_ns)
        if step + 1 < len(work.steps):
            n_right += _n_right(done.moved, classes, classify(work.steps[step + 1], work.bounds))
            for kind in MOVES:
                n_moves[kind] += int(done.moved[kind].sum())
        layout = done.layout
    return found, exposed, n_moves, n_right


def _window(work: Workload, machine: Machine, layout: Layout, tokens: Array, domain: Tiers, now: Busy) -> Window:
    """What a layer leaves free: its links but for its own copies and for striped experts gathered in one module."""
    end = now.makespan_ns + work.attention_ns
    n_copied = ((domain == COPIED) & (tokens > 0)).sum(axis=1)
    n_gathered = ((domain == NEAR_DATA) & layout.striped & (tokens > 0)).sum(axis=1)
    gather_ns = machine.gather_ns if np.isfinite(machine.gather_ns) else 0.0  # then nothing is gathered
    return Window(end - n_copied * machine.pcie_ns, end - n_gathered * gather_ns, now.dimm_ns, end)


def _n_right(moved: dict[str, NDArray[np.bool_]], predicted: Tiers, actual: Tiers) -> int:
    """How many moved experts have the class that they were moved for; one copied for being warm may become hot."""
    copied = moved["prefetch"] & (actual >= predicted)
    others = [moved[kind] & (actual == predicted if kind == "stripe" else actual == COLD) for kind in MOVES[1:]]
    return int(copied.sum() + sum(one.sum() for one in others))
