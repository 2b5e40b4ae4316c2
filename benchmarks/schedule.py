"""How long does simulating one layer of an expert-parallel group take?

    python benchmarks/schedule.py [--repeats 3] [--tokens 16384] [--gpus 8]

One core: threads of numerical libraries are set to one. Times are medians over the repeats, of the fused schedule with
its traffic and costs, beside a floor taken in the same run: one `heapreplace` for each task, what giving tasks to
processors one after another takes at least. Target: 8 GPUs, 128 experts, top-8, 16,384 tokens on each GPU in 2 s.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from heapq import heapreplace
from statistics import median

from threadpoolctl import threadpool_limits

from perfmodel import moe
from perfmodel.hardware import hardware
from perfmodel.predict import basis_of
from perfmodel.schedule import Layer, fabric_of, layer_timeline, traffic_of
from perfmodel.schedule.tiles import plan_of

SHAPES = ("qwen3-30b-a3b", "deepseek-v3", "olmoe")  # 128 experts and top-8: the first
ROUTINGS = ("uniform", "zipf:1.0")


def main() -> None:
    """Time each shape under each routing and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384, help="on each GPU")
    parser.add_argument("--gpus", type=int, default=8)
    asked = parser.parse_args()
    print(f"{'shape and routing':32}{'blocks':>9}{'tasks':>12}{'time s':>9}{'floors':>9}{'tasks/s':>14}")
    with threadpool_limits(1):
        for shape in SHAPES:
            for routing in ROUTINGS:
                one(shape, routing, asked)


def one(name: str, routing: str, asked: argparse.Namespace) -> None:
    """One line: blocks, tasks, the time from a routing to a timeline, and how many times the floor it is."""
    plan = plan_of(layer_of(name, routing, asked), 1.0)
    n_blocks = len(plan.blocks.rows)
    n_tasks = n_blocks * sum(plan.n_tiles)
    took = seconds(lambda: layer_timeline(layer_of(name, routing, asked), "fused"), asked.repeats)
    floor = seconds(partial(one_by_one, n_tasks, plan.n_processors), asked.repeats)
    print(f"{name + ', ' + routing:32}{n_blocks:9,}{n_tasks:12,}{took:9.3f}{took / floor:9.2f}{n_tasks / took:14,.0f}")


def layer_of(name: str, routing: str, asked: argparse.Namespace) -> Layer:
    """A layer on H100s of one node."""
    shape, profile = moe.shape(name), hardware("h100-sxm")
    traffic = traffic_of(routing, shape, asked.gpus, asked.tokens)
    return Layer(basis_of(profile, shape, None), shape, traffic, fabric_of(profile, asked.gpus))


def one_by_one(n_tasks: int, n_processors: int) -> None:
    """Give so many tasks to the first free processor, one after another."""
    free = [0.0] * n_processors
    for _ in range(n_tasks):
        heapreplace(free, free[0] + 1.0)


def seconds(job: Callable[[], object], repeats: int) -> float:
    """How long a job takes, the median of the repeats after one that is not counted."""
    job()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        job()
        found.append(time.perf_counter() - began)
    return median(found)


if __name__ == "__main__":
    main()
