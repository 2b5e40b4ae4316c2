"""Small placements solved to the end: a mixed-integer program under tangents, which grow until it says the truth."""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from perfmodel.errors import InputError

from .costs import Costs, one_hot
from .memory import Memory
from .problem import Tiers

MAX_TANGENTS, TIGHT = 200, 1e-9


def exactly(costs: Costs, memory: Memory) -> tuple[Tiers, float]:
    """The placement of least mean time within the budgets and a bound on all, ns: the same but for rounding.

    Each round solves the program and adds the tangent at its solution (outer approximation, Duran and Grossmann,
    Mathematical Programming 1986). For some hundred choices; takes as long as it takes for more. Raises InputError
    where no placement keeps the budgets.
    """
    shape = (costs.n_layers, costs.n_experts, costs.n_tiers)
    n, n_layers, n_rows = int(np.prod(shape)), costs.n_layers, len(costs.fixed_ns)
    has_charges = bool(costs.charge_ns.any())
    size = n + n_layers + (n_rows if has_charges else 0)  # choices, time of each layer, charge of each row
    fixed = float(costs.by_layer(costs.fixed_ns).sum())
    goal = np.zeros(size)
    goal[n : n + n_layers] = 1.0
    constraints = [_each_in_one_tier(shape, size), *_budgets(memory, shape, size)]
    if has_charges:
        goal[n + n_layers :] = np.repeat(costs.weights, n_layers)
        constraints.append(_charges(costs, shape, size))
    integrality = np.zeros(size)
    integrality[:n] = 1
    bounds = Bounds(np.zeros(size), np.concatenate([np.ones(n), np.full(size - n, np.inf)]))
    parts = np.full(shape, 1 / costs.n_tiers)
    best: Tiers | None = None
    best_ns, bound = np.inf, -np.inf
    for _ in range(MAX_TANGENTS):
        slopes, beside = costs.slopes(parts)
        rows = np.zeros((n_layers, size))
        rows[:, :n] = (slopes[:, None] * np.eye(n_layers)[:, :, None, None]).reshape(n_layers, n)
        rows[:, n : n + n_layers] = -np.eye(n_layers)
        constraints.append(LinearConstraint(csr_matrix(rows), -np.inf, -beside))
        done = milp(goal, integrality=integrality, bounds=bounds, constraints=constraints, options={"mip_rel_gap": 0})
        if done.x is None:
            raise InputError(f"no placement of the experts keeps all {len(memory.budgets)} budgets: {done.message}")
        tier = done.x[:n].reshape(shape).argmax(axis=2).astype(np.int8)
        time_ns = float(costs.layers_ns(tier).sum())
        if time_ns < best_ns:
            best, best_ns = tier, time_ns
        bound = max(bound, fixed + float(done.mip_dual_bound))
        parts = one_hot(tier, costs.n_tiers)
        if best_ns - bound <= TIGHT * best_ns:
            break
    assert best is not None
    return best, bound


def _each_in_one_tier(shape: tuple[int, int, int], size: int) -> LinearConstraint:
    n_experts = shape[0] * shape[1]
    n = n_experts * shape[2]
    rows = csr_matrix((np.ones(n), (np.repeat(np.arange(n_experts), shape[2]), np.arange(n))), (n_experts, size))
    return LinearConstraint(rows, 1, 1)


def _budgets(memory: Memory, shape: tuple[int, int, int], size: int) -> list[LinearConstraint]:
    found = []
    n = int(np.prod(shape))
    for budget in memory.budgets:
        held = (memory.size_bytes[:, :, None] * memory.holds(budget)).reshape(shape[0], -1)
        scale = max(budget.capacity_bytes, 1.0)
        rows = np.zeros((shape[0], size))
        for layer in range(shape[0]):
            rows[layer, layer * held.shape[1] : (layer + 1) * held.shape[1]] = held[layer] / scale
        rows = rows if budget.of_each_layer else rows.sum(axis=0, keepdims=True)
        rows[:, n:] = 0.0
        found.append(LinearConstraint(csr_matrix(rows), -np.inf, budget.capacity_bytes / scale))
    return found


def _charges(costs: Costs, shape: tuple[int, int, int], size: int) -> LinearConstraint:
    """The charge of a row is at least what each of its experts asks for."""
    n_layers, n_experts, n_tiers = shape
    n_rows, n = len(costs.fixed_ns), int(np.prod(shape))
    row, expert = (x.ravel() for x in np.meshgrid(np.arange(n_rows), np.arange(n_experts), indexing="ij"))
    at = np.arange(len(row))
    choice = ((row % n_layers) * n_experts + expert)[:, None] * n_tiers + np.arange(n_tiers)
    asked = costs.charge_ns[row, expert]
    values = np.concatenate([asked.ravel(), -np.ones(len(row))])
    rows = np.concatenate([np.repeat(at, n_tiers), at])
    where = np.concatenate([choice.ravel(), n + n_layers + row])
    return LinearConstraint(csr_matrix((values, (rows, where)), (len(row), size)), -np.inf, 0.0)
