"""TriMoE with and without its parts, and the systems it is compared with: all but TriMoE's own rules reconstructed.

The baselines of arXiv 2603.01058 are other people's systems; these are ours, made of what each is said to do, on the
same cost model, with as many experts in device memory, chosen by the same loads.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from perfmodel.physics import Array
from perfmodel.placement import COPIED, NEAR_DATA, ON_HOST, RESIDENT, Tiers

from .costs import Costs
from .prediction import Bounds
from .scheduler import busy, schedule
from .simulate import System, Workload, simulate

COLD_FRACS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the load from which experts are hot: below it they are cold


def _scheduled(costs: Costs, tokens: Array, *, is_refined: bool = True) -> Tiers:
    return schedule(costs, is_refined=is_refined, is_guarded=False)


def _residents_or(costs: Costs, tokens: Array, *, domain: int) -> Tiers:
    """Residents on the GPU, all others in one domain."""
    return np.where(np.isfinite(costs.cost_ns[..., RESIDENT]), RESIDENT, domain)


def _hottest_copied(costs: Costs, tokens: Array, *, domain: int) -> Tiers:
    """Residents on the GPU; of the others as many of the hottest are copied to it as make the layer shortest, the rest
    is computed in one domain."""
    tried = _residents_or(costs, tokens, domain=domain)
    best, shortest = tried, busy(costs, tried).makespan_ns
    order = np.argsort(np.where(tried == domain, -tokens, np.inf), axis=1, kind="stable")
    for expert in order.T:
        tried = tried.copy()
        was = np.take_along_axis(tried, expert[:, None], axis=1)
        np.put_along_axis(tried, expert[:, None], np.where(was == domain, COPIED, was), axis=1)
        now = busy(costs, tried)
        best = np.where((now.makespan_ns < shortest)[:, None], tried, best)
        shortest = np.minimum(now.makespan_ns, shortest)
        if (now.gpu_ns >= shortest).all():
            break  # with more copies the GPU alone takes as long
    return best


TRIMOE = System("TriMoE", "all three, refined, with relayout", _scheduled, has_relayout=True)
_on_cpu = partial(_residents_or, domain=ON_HOST)
_on_gpu = partial(_residents_or, domain=COPIED)
_rest_near_data = partial(_hottest_copied, domain=NEAR_DATA)
_rest_on_cpu = partial(_hottest_copied, domain=ON_HOST)
BASELINES = (
    System("GPU-CPU", "residents on the GPU, all others on the CPU, as KTransformers", _on_cpu, has_ndp=False),
    System(
        "GPU-NDP",
        "residents and some copies on the GPU, all others near data, as MoNDE",
        _rest_near_data,
        has_cpu=False,
    ),
    System("GPU-only", "all on the GPU, copied where not resident, as Klotski", _on_gpu, has_cpu=False, has_ndp=False),
    System("CPU-cold", "residents and some copies on the GPU, the cold rest on the CPU", _rest_on_cpu, has_ndp=False),
)
# From GPU and NDP alone to all of TriMoE, one part more at a time, in the order of the published factors.
_greedy = partial(_scheduled, is_refined=False)
LADDER = (
    System("no CPU", "GPU and NDP, cheapest for each expert", _greedy, has_cpu=False),
    System("+ AMX CPU", "the CPU too", _greedy),
    System("+ refinement", "moves off the bottleneck", _scheduled),
    TRIMOE,
)
NO_AMX = System("TriMoE, AVX-512", "the CPU without its matrix unit", _scheduled, has_amx=False, has_relayout=True)


def variant(
    *, has_cpu: bool = True, has_amx: bool = True, is_refined: bool = True, has_relayout: bool = True
) -> System:
    """TriMoE, or the same with some of its parts left out."""
    parts = {"CPU": has_cpu, "AMX": has_amx or not has_cpu, "refinement": is_refined, "relayout": has_relayout}
    missing = [name for name, is_there in parts.items() if not is_there]
    if not missing:
        return TRIMOE
    words = f"without {', '.join(missing)}"
    decide = _scheduled if is_refined else _greedy
    return System(f"TriMoE {words}", words, decide, has_cpu=has_cpu, has_amx=has_amx, has_relayout=has_relayout)


def fitted_bounds(work: Workload) -> Bounds:
    """The bound between cold and warm under which the steps before the timed ones are shortest, of COLD_FRACS.

    TriMoE's bounds are not published; a system that knows its machine would choose them so. Everything else is as in
    the workload.
    """

    def span_ns(bounds: Bounds) -> float:
        return simulate(replace(work, steps=work.before, bounds=bounds), LADDER[-2]).step_ns

    hot = work.bounds.hot_from
    return min((Bounds(frac * hot, hot) for frac in COLD_FRACS), key=span_ns)
