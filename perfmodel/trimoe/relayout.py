"""Where weights are moved before the next step, as far as the current layer hides it (TriMoE's relayout, rebalancing).

Predicted hot experts go to device memory, warm ones are striped over all memory modules, cold ones put on one. Neither
the window nor the benefit of a move is published: both are ours, as said here. Times are ns, `[batch]` is a layer.
"""

from dataclasses import dataclass

import numpy as np

from perfmodel.offload import Mask
from perfmodel.physics import Array
from perfmodel.placement import NEAR_DATA

from .costs import Index, Machine
from .prediction import COLD, Classes
from .scheduler import by_dimm

MOVES = ("prefetch", "stripe", "localise", "rebalance")
PREFETCH, STRIPE, LOCALISE, REBALANCE = range(len(MOVES))
MAX_TRIED = 32  # moves of a layer that are thought of in one step; a window has room for fewer


@dataclass(frozen=True, eq=False)
class Layout:
    """Where weights are, `[batch, expert]`: whether a copy is in device memory, and in host memory whether they are
    striped over all modules or else in which one."""

    resident: Mask
    striped: Mask
    home: Index


@dataclass(frozen=True, eq=False)
class Window:
    """What is free while a layer runs, `[batch]`: the link to the device, the link between modules; how busy modules
    are, `dimm_ns[batch, dimm]`, and when the layer ends."""

    pcie_ns: Array
    link_ns: Array
    dimm_ns: Array
    end_ns: Array


@dataclass(frozen=True, eq=False)
class Relayout:
    """What was moved: the layout after it, masks `moved[kind of MOVES][batch, expert]`, and by how much the layer ends
    later, `exposed_ns[batch]`."""

    layout: Layout
    moved: dict[str, Mask]
    exposed_ns: Array


def dealt(loads: Array, resident: Mask, n_dimms: int) -> Index:
    """A home for each expert, `[batch, expert]`: dealt out to modules there and back, the busiest first; those resident
    in device memory, which seldom need one, last."""
    order = np.argsort(np.where(resident, loads.max() + 1.0 - loads, -loads), axis=1, kind="stable")
    turn = np.arange(loads.shape[1]) % (2 * n_dimms)
    home = np.empty_like(order)
    np.put_along_axis(home, order, np.broadcast_to(np.minimum(turn, 2 * n_dimms - 1 - turn), order.shape), axis=1)
    return home


def relayout(
    machine: Machine,
    layout: Layout,
    predicted: Array,
    classes: Classes,
    window: Window,
    *,
    has_seen_moves: bool = True,
) -> Relayout:
    """The moves for loads `predicted[batch, expert]`, tried in the order of their benefit.

    A move is made where the link it takes is free for long enough in the window, and where it makes the layer end later
    (its modules being busy) by less than its benefit, or without `has_seen_moves` not at all; what is not made waits
    for another step. The link between modules makes one move after another. Copies to device memory replace the
    residents that gain least by being there.
    """
    n_layers, n_experts = predicted.shape
    coming, leaving = _swaps(machine, layout, predicted, classes)
    near, loads, partner, benefits = _between_modules(machine, layout, predicted, classes)
    benefit = np.concatenate([coming.benefit, *benefits], axis=1)
    order = np.argsort(-benefit, axis=1, kind="stable")[:, :MAX_TRIED]
    row, dimms = np.arange(n_layers), np.arange(machine.n_dimms)
    resident, striped, home = layout.resident.copy(), layout.striped.copy(), layout.home.copy()
    moved = {kind: np.zeros_like(resident) for kind in MOVES}
    touched = np.zeros_like(resident)
    pcie, link, dimm, end = (part.copy() for part in (window.pcie_ns, window.link_ns, window.dimm_ns, window.end_ns))
    for choice in order.T:
        if not (benefit[row, choice] > 0).any():
            break  # the rest gains nothing either
        kind, place = np.divmod(choice, n_experts)
        copies = kind == PREFETCH
        expert = np.where(copies, coming.expert[row, place], place)
        target = np.where(kind == LOCALISE, loads.argmin(axis=1), partner[row, expert])
        every, at_old, at_new = _occupied(machine, kind, striped[row, expert])
        busy = dimm + every[:, None] + np.where(dimms == home[row, expert][:, None], at_old[:, None], 0.0)
        busy += np.where(dimms == target[:, None], at_new[:, None], 0.0)
        later = np.maximum(busy.max(axis=1) - end, 0.0)
        has_room = np.where(copies, pcie >= machine.pcie_ns, link >= machine.gather_ns)
        made = (benefit[row, choice] > later) & has_room & ~touched[row, expert]
        made &= has_seen_moves | (later == 0)
        if not made.any():
            continue
        at, who = row[made], expert[made]
        pcie[made & copies] -= machine.pcie_ns
        link[made & ~copies] -= machine.gather_ns
        dimm[made], end = busy[made], end + np.where(made, later, 0.0)
        touched[at, who] = True
        for number, name in enumerate(MOVES):
            moved[name][row[made & (kind == number)], expert[made & (kind == number)]] = True
        swap = made & copies
        resident[row[swap], expert[swap]] = True
        resident[row[swap], leaving[row, place][swap]] = False
        striped[at, who] = np.where(kind == STRIPE, True, np.where(kind == LOCALISE, False, striped[row, expert]))[made]
        rehomed = made & np.isin(kind, (LOCALISE, REBALANCE))
        loads[row[rehomed], target[rehomed]] += near[row, expert][rehomed]
        home[row[rehomed], expert[rehomed]] = target[rehomed]
    return Relayout(Layout(resident, striped, home), moved, end - window.end_ns)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Experts in the order of what they gain by being in device memory, `[batch, rank]`, and the benefit of letting the
    one of each rank in for the resident of that rank that gains least; not positive where there is nothing to gain."""

    expert: Index
    benefit: Array


def _swaps(machine: Machine, layout: Layout, predicted: Array, classes: Classes) -> tuple[_Ranked, Index]:
    """Who may come into device memory, and who leaves it for each. An expert gains there what its cheapest other place
    costs beyond the GPU, and only one of a lower class leaves for it, or chance would swap equals for ever."""
    nobody = np.zeros_like(layout.resident)
    away = machine.costs(predicted, nobody, layout.striped, layout.home).cost_ns.min(axis=2)
    gain = away - machine.gpu.at(predicted)
    coming = np.where(~layout.resident, gain, -np.inf)
    leaving = np.where(layout.resident, gain, np.inf)
    first, last = np.argsort(-coming, axis=1, kind="stable"), np.argsort(leaving, axis=1, kind="stable")
    gains, losses = np.take_along_axis(coming, first, axis=1), np.take_along_axis(leaving, last, axis=1)
    rises = np.take_along_axis(classes, first, axis=1) > np.take_along_axis(classes, last, axis=1)
    possible = np.isfinite(gains) & np.isfinite(losses) & rises
    benefit = np.where(possible, np.where(possible, gains, 0.0) - np.where(possible, losses, 0.0), 0.0)
    return _Ranked(first, benefit), last


def _between_modules(
    machine: Machine, layout: Layout, predicted: Array, classes: Classes
) -> tuple[Array, Array, Index, list[Array]]:
    """Near-data times `[batch, expert]`, the cold ones of each module `[batch, dimm]`, for each expert the module to
    rebalance to, and the benefits of striping, localising and rebalancing it.

    A warm expert gains by striping what its cheapest domain is cheaper then; a cold one by being put on one module the
    time of its cheapest domain before, less its part of the modules' time, for they work side by side.
    """
    nobody = np.zeros_like(layout.resident)
    if machine.ndp is None or not np.isfinite(machine.gather_ns):
        none = np.zeros(nobody.shape)
        return none, np.zeros((len(nobody), machine.n_dimms)), layout.home, [none] * 3
    in_one = machine.costs(predicted, nobody, nobody, layout.home).cost_ns
    in_all = machine.costs(predicted, nobody, ~nobody, layout.home).cost_ns.min(axis=2)
    free, is_cold = ~layout.resident & (predicted > 0), classes == COLD
    near = in_one[..., NEAR_DATA]
    striping = np.where(free & ~layout.striped & ~is_cold, in_one.min(axis=2) - in_all, 0.0)
    localising = np.where(free & layout.striped & is_cold, in_all - near / machine.n_dimms, 0.0)
    settled = np.where(free & ~layout.striped & is_cold, near, 0.0)
    loads = by_dimm(settled, layout.home, machine.n_dimms)
    rebalancing, partner = _rebalancing(settled, layout.home, loads)
    return near, loads, partner, [striping, localising, rebalancing]


def _rebalancing(near: Array, home: Index, loads: Array) -> tuple[Array, Index]:
    """The benefit of moving each expert to the module across, `[batch, expert]`, and that module: the busiest module's
    is the least busy one, the second busiest's the second least busy one, and so on. One expert of a module moves."""
    order = np.argsort(-loads, axis=1, kind="stable")
    across = np.empty_like(order)
    np.put_along_axis(across, order, order[:, ::-1], axis=1)
    gap = loads - np.take_along_axis(loads, across, axis=1)
    gain = np.where(near > 0, np.minimum(near, np.take_along_axis(gap, home, axis=1) - near), 0.0)
    best, row = np.zeros_like(gain), np.arange(len(gain))
    for dimm in range(loads.shape[1]):
        here = np.where(home == dimm, gain, 0.0)
        expert = here.argmax(axis=1)
        best[row, expert] = np.maximum(best[row, expert], here[row, expert])
    return best, np.take_along_axis(across, home, axis=1)


def _occupied(machine: Machine, kind: Index, is_striped: Mask) -> tuple[Array, Array, Array]:
    """How long a move occupies all modules, and the old and the new home beyond that, `[batch]` ns: reads for the
    device go over the channels, what modules pass to each other is read and written at their own bandwidth."""
    one = machine.internal_ns if np.isfinite(machine.internal_ns) else 0.0
    part = one / machine.n_dimms
    copies = kind == PREFETCH
    relaid = np.isin(kind, (STRIPE, LOCALISE))
    every = np.where(copies & is_striped, machine.serving_ns, np.where(relaid, part, 0.0))
    at_old = np.where(
        copies & ~is_striped, machine.localised_ns, np.where(np.isin(kind, (STRIPE, REBALANCE)), one, 0.0)
    )
    return every, at_old, np.where(np.isin(kind, (LOCALISE, REBALANCE)), one, 0.0)
