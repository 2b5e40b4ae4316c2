"""The same tokens on other numbers of GPUs, with what does not fit in host memory, by what that costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.model_memory import ModelMemory
from perfmodel.placement.budget import expert_budget
from perfmodel.placing.room import N_STAGING
from perfmodel.text import NS_PER_S

from .question import Question


@dataclass(frozen=True)
class Prices:
    """What one GPU and one host with its memory cost, in any one currency, bought or by the hour."""

    per_gpu: float
    per_host: float = 0.0


@dataclass(frozen=True)
class Alternative:
    """The same tokens on another number of GPUs: what is offloaded, latency by schedule (null: it cannot run, and
    `reason` says why), and its price (null: no prices are known)."""

    n_gpus: int
    n_hosts: int
    tokens_per_gpu: int
    offload_frac: float | None
    latency_ns: Mapping[str, float] | None
    price: float | None
    reason: str = ""

    @property
    def fastest(self) -> str | None:
        """The schedule with the least latency; null where none can run."""
        return min(self.latency_ns, key=lambda name: (self.latency_ns or {})[name]) if self.latency_ns else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all GPUs through this layer in a second, by the fastest schedule; null where none can run."""
        if self.latency_ns is None:
            return None
        return self.n_gpus * self.tokens_per_gpu / min(self.latency_ns.values()) * NS_PER_S

    def to_json(self) -> dict[str, Any]:
        """The alternative as plain values."""
        rate = self.tokens_per_s
        return {
            "n_gpus": self.n_gpus,
            "n_hosts": self.n_hosts,
            "tokens_per_gpu": self.tokens_per_gpu,
            "offload_frac": self.offload_frac,
            "latency_ns": dict(self.latency_ns) if self.latency_ns else None,
            "fastest": self.fastest,
            "tokens_per_s": rate,
            "tokens_per_s_per_gpu": rate / self.n_gpus if rate is not None else None,
            "price": self.price,
            "tokens_per_s_per_price": rate / self.price if rate is not None and self.price is not None else None,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Verdict:
    """Which alternative gives most tokens for what it costs, `gain` times as many as `other` (null: there is no other):
    the best that offloads where `best` does not and the reverse, else the second best.

    `even_host_price` is what a host costs, in prices of a GPU, where both give the same; null where `best` is better
    at any prices.
    """

    best: Alternative
    other: Alternative | None = None
    gain: float | None = None
    even_host_price: float | None = None


def verdict(alternatives: Sequence[Alternative]) -> Verdict | None:
    """The best of several alternatives by tokens per price, or per GPU where no prices are known; null where none can
    run."""
    rate = {one.n_gpus: one.tokens_per_s for one in alternatives}
    worth = {n: found / (one.price or n) for one in alternatives if (found := rate[n := one.n_gpus]) is not None}
    able = sorted((one for one in alternatives if one.n_gpus in worth), key=lambda one: -worth[one.n_gpus])
    if not able:
        return None
    best = able[0]
    rest = [one for one in able[1:] if one.n_gpus != best.n_gpus]
    if not rest:
        return Verdict(best)
    other = next((one for one in rest if bool(one.offload_frac) != bool(best.offload_frac)), rest[0])
    high, low = rate[best.n_gpus] or 0.0, rate[other.n_gpus] or 0.0
    # high / (n + h x) = low / (n' + h' x), for hosts of x GPUs' price
    slope = high * other.n_hosts - low * best.n_hosts
    even = (low * best.n_gpus - high * other.n_gpus) / slope if slope else 0.0
    return Verdict(best, other, worth[best.n_gpus] / worth[other.n_gpus], even if even > 0 else None)


def fitting_frac(question: Question, memory: ModelMemory) -> float:
    """The part of each GPU's experts that must leave device memory, every layer alike: whole copies of all other
    weights, workspace and staging slots come first. Raises InputError where no expert fits, or the host has no room for
    what leaves; weights that are not known count as none."""
    one = question.shape
    known = memory if memory.non_expert_bytes is not None else replace(memory, non_expert_bytes=0.0)
    budget = expert_budget(question.profile["memory_capacity_bytes"], one, known, n_staging_experts=N_STAGING)
    n_held = -(-one.n_experts // question.n_gpus)
    if question.expert_map is not None:
        gpu_of = question.expert_map.gpu_of[question.map_layer]
        n_held = int(np.bincount(gpu_of, minlength=question.n_gpus).max())
    n_gone = max(n_held - int(budget.expert_bytes // (one.n_layers * one.expert_bytes)), 0)
    host = question.profile.first("host_capacity_bytes")
    need_bytes = n_gone * one.n_layers * one.expert_bytes * question.n_per_host
    if n_gone and (host is None or host[1].value < need_bytes):
        has = "host memory is not known" if host is None else f"the host has {text.n_bytes(host[1].value)}"
        raise InputError(
            f"{n_gone} of {n_held} experts of a layer must leave each GPU, {text.n_bytes(need_bytes)} for all layers "
            f"and {text.counted(question.n_per_host, 'GPU')} of a host, and {has}"
        )
    return n_gone / n_held


def compare(
    question: Question,
    numbers: Sequence[int],
    schedules: Sequence[str],
    memory: ModelMemory | None,
    prices: Prices | None = None,
) -> list[Alternative]:
    """The tokens of all GPUs together on other numbers of GPUs: `memory` says what fits on each, and the rest of the
    experts is offloaded (null: `offload_frac` of the question everywhere).

    Where a number of GPUs cannot hold the model the alternative says why. Raises InputError for a number that does not
    divide tokens or experts, and with a map, which is made for one number of GPUs.
    """
    if question.expert_map is not None:
        raise InputError("a map of experts is for one number of GPUs: compare numbers of GPUs without it")
    n_all = question.n_gpus * question.tokens_per_gpu
    found = []
    for n_gpus in numbers:
        if n_all % n_gpus:
            raise InputError(f"{n_all} tokens of all GPUs do not divide over {n_gpus} GPUs")
        one = replace(question, n_gpus=n_gpus, tokens_per_gpu=n_all // n_gpus)
        price = None if prices is None else n_gpus * prices.per_gpu + one.n_hosts * prices.per_host
        try:
            frac = question.offload_frac if memory is None else fitting_frac(one, memory)
        except InputError as error:
            found.append(Alternative(n_gpus, one.n_hosts, one.tokens_per_gpu, None, None, price, str(error)))
            continue
        one = replace(one, offload_frac=frac)
        latency_ns = {name: one.latency_ns(name) for name in schedules}
        found.append(Alternative(n_gpus, one.n_hosts, one.tokens_per_gpu, frac, latency_ns, price))
    return found
