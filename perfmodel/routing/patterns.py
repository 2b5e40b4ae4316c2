"""Routing patterns with stated definitions: how popular each expert of one layer is, hottest first (docs/routing.md).

A name is `PATTERN` or `PATTERN:ARGUMENT/ARGUMENT`; arguments left out take their defaults. numpy only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

Shares = NDArray[np.float64]

MMLU_TOKEN_FRAC, MMLU_EXPERT_FRAC = 0.90, 0.65  # "about 90 % of tokens go to 65 % of experts" (ISC 2026 poster)
DEFAULT_EXPONENT = 1.0
# Published MoE measurements draw weights of density x^-1.2 from 1 to 0.8 x tokens (data/README.md has the source);
# the pattern takes a batch of 4,096 tokens where no ratio is given.
PARETO_EXPONENT, PARETO_RATIO = 1.2, 0.8 * 4096
PARETO_SMALL = 2.0 / 0.01  # the same for batches with no more assignments than experts: weights from 0.01 to 2
LINK_RATIO = 4000 / 450  # GH200: HBM3 at 4.0 TB/s over NVLink-C2C at 450 GB/s a direction
LINK_COLD_FRAC = 0.3125  # the smaller offloaded fraction for which the ISC 2026 poster states a slowdown


@dataclass(frozen=True)
class Argument:
    """A number after the colon of a name: what it is called, what it is when left out, and its range, ends included."""

    name: str
    default: float
    least: float
    most: float


@dataclass(frozen=True)
class Pattern:
    """A family of shares: a function of the number of experts and the arguments, in the order of the name."""

    shares: Callable[..., Shares]
    arguments: tuple[Argument, ...] = ()

    def usage(self, name: str) -> str:
        """How its names are written, such as `coverage[:TOKENS/EXPERTS]`."""
        words = "/".join(argument.name.upper() for argument in self.arguments)
        return f"{name}[:{words}]" if words else name


def uniform_shares(n_experts: int) -> Shares:
    """Every expert receives the same share of assignments."""
    return np.full((1, n_experts), 1.0 / n_experts)


def power_law_shares(n_experts: int, exponent: float = DEFAULT_EXPONENT) -> Shares:
    """The expert of popularity rank r receives a share proportional to r^-exponent (Zipf's law is another name)."""
    weights = np.arange(1, n_experts + 1, dtype=np.float64) ** -exponent
    shares: Shares = weights / weights.sum()
    return shares[None, :]


def pareto_shares(n_experts: int, exponent: float = PARETO_EXPONENT, ratio: float = PARETO_RATIO) -> Shares:
    """Expert weights are spread with density x^-exponent from 1 to ratio: the quantiles at (i + 1/2) / n_experts.

    Unlike in a power law of ranks, how steep it is depends on the number of experts. Nothing is drawn at random.
    """
    rank = (n_experts - np.arange(n_experts) - 0.5) / n_experts  # the quantile's fraction, hottest first
    power = 1.0 - exponent
    # The inverse of the distribution function (x^power - 1) / (ratio^power - 1), and its limit at exponent 1.
    weights = ratio**rank if abs(power) < 1e-9 else (1.0 + rank * (ratio**power - 1.0)) ** (1.0 / power)
    shares: Shares = weights / weights.sum()
    return shares[None, :]


def coverage_shares(
    n_experts: int, token_frac: float = MMLU_TOKEN_FRAC, expert_frac: float = MMLU_EXPERT_FRAC
) -> Shares:
    """The hottest expert_frac of experts evenly receive token_frac of assignments, the others the rest, evenly.

    The boundary falls inside an expert when expert_frac x n_experts is no integer: that expert takes a proportional
    mixture. Raises InputError when the hot experts would be the colder ones.
    """
    if token_frac < expert_frac - 1e-12:
        raise InputError(
            f"the hottest {expert_frac:g} of experts cannot receive only {token_frac:g} of assignments, "
            f"expected at least {expert_frac:g}"
        )
    hot, cold = token_frac / expert_frac, (1 - token_frac) / (1 - expert_frac)
    hot_part = np.clip(expert_frac * n_experts - np.arange(n_experts), 0.0, 1.0)
    shares: Shares = (hot * hot_part + cold * (1.0 - hot_part)) / n_experts
    return shares[None, :]


def mmlu_like_shares(n_experts: int) -> Shares:
    """90 % of assignments go evenly to the hottest 65 % of experts, 10 % evenly to the rest (ISC 2026 poster)."""
    return coverage_shares(n_experts)


def link_skew_shares(n_experts: int, ratio: float = LINK_RATIO, cold_frac: float = LINK_COLD_FRAC) -> Shares:
    """The coldest cold_frac of experts together receive 1 / (1 + ratio) of assignments; evenly inside both groups.

    With ratio = bandwidth of device memory over that of the link, and the cold group offloaded, both memories deliver
    in proportion to their bandwidth: our reading of the ISC 2026 poster's skew "reflecting bandwidth differences".
    """
    return coverage_shares(n_experts, ratio / (1.0 + ratio), 1.0 - cold_frac)


def one_hot_shares(n_experts: int, n_hot: float = 1.0) -> Shares:
    """The first n_hot experts share all assignments evenly; the others get only what top-k leaves over, evenly.

    With top-k above n_hot every token selects the hot experts and draws the remaining selections from the others.
    """
    if n_hot != int(n_hot):
        raise InputError(f"{n_hot:g} hot experts, expected a whole number")
    n_first = min(int(n_hot), n_experts)  # a name may be checked before the number of experts is known
    shares = np.zeros((1, n_experts))
    shares[0, :n_first] = 1.0 / n_first
    return shares


_EXPONENT = Argument("exponent", DEFAULT_EXPONENT, 0, 10)
PATTERNS: dict[str, Pattern] = {
    "uniform": Pattern(uniform_shares),
    "power-law": Pattern(power_law_shares, (_EXPONENT,)),
    "mmlu-like": Pattern(mmlu_like_shares),
    "zipf": Pattern(power_law_shares, (_EXPONENT,)),
    "pareto": Pattern(
        pareto_shares, (Argument("exponent", PARETO_EXPONENT, 0, 10), Argument("ratio", PARETO_RATIO, 1, 1e9))
    ),
    "coverage": Pattern(
        coverage_shares,
        (
            Argument("tokens", MMLU_TOKEN_FRAC, 0.001, 1),
            Argument("experts", MMLU_EXPERT_FRAC, 0.001, 0.999),
        ),
    ),
    "link-skew": Pattern(
        link_skew_shares,
        (Argument("ratio", LINK_RATIO, 0.001, 1e6), Argument("cold_frac", LINK_COLD_FRAC, 0.001, 0.999)),
    ),
    "one-hot": Pattern(one_hot_shares, (Argument("n", 1, 1, 1e6),)),
}


def pattern_usages() -> list[str]:
    """How the names of each pattern are written, in the order of PATTERNS: `uniform`, `power-law[:EXPONENT]`, ..."""
    return [pattern.usage(name) for name, pattern in PATTERNS.items()]


def is_pattern(source: str) -> bool:
    """Whether a routing names a pattern (with arguments or without) and not a file."""
    return source.partition(":")[0] in PATTERNS


def numbers_after(name: str, arguments: tuple[Argument, ...], kind: str = "routing") -> list[float]:
    """The numbers after the colon of a name such as `coverage:0.9/0.65`, defaults filled in.

    Raises InputError on too many, on what is no number, and outside an argument's range.
    """
    text = name.partition(":")[2]
    words = text.split("/") if text else []
    if len(words) > len(arguments):
        expected = "/".join(argument.name.upper() for argument in arguments) or "nothing"
        raise InputError(f"{kind} {name!r}: found {text!r} after the colon, expected {expected}")
    numbers = [argument.default for argument in arguments]
    for i, (word, argument) in enumerate(zip(words, arguments, strict=False)):
        try:
            numbers[i] = float(word)
        except ValueError:
            example = name.partition(":")[0] + ":" + "/".join(f"{a.default:g}" for a in arguments)
            raise InputError(f"{kind} {name!r}: {word!r} is no {argument.name}; write for example {example}") from None
        if not argument.least <= numbers[i] <= argument.most:
            raise InputError(
                f"{kind} {name!r}: {argument.name} {numbers[i]:g} is outside {argument.least:g} to {argument.most:g}"
            )
    return numbers


def pattern_shares(name: str, n_experts: int) -> Shares:
    """Shares `[1, expert]`, hottest first, of a pattern such as `uniform`, `power-law:1.2` or `coverage:0.9/0.65`.

    Raises InputError for an unknown pattern and for arguments that are no numbers or outside their range.
    """
    pattern = PATTERNS.get(name.partition(":")[0])
    if pattern is None:
        raise InputError(f"unknown routing {name!r}; known: {', '.join(pattern_usages())}, or a file")
    numbers = numbers_after(name, pattern.arguments)
    try:
        return pattern.shares(n_experts, *numbers)
    except InputError as error:
        raise InputError(f"routing {name!r}: {error}") from None


def pareto_name(n_experts: int, top_k: int, n_tokens: int, exponent: float = PARETO_EXPONENT) -> str:
    """The `pareto` pattern over the range that the published measurements used for a batch of n_tokens tokens.

    That is 1 to 0.8 x n_tokens, or 0.01 to 2 where a batch has no more assignments than the layer has experts.
    """
    ratio = 0.8 * n_tokens if n_tokens * top_k > n_experts else PARETO_SMALL
    return f"pareto:{exponent:g}/{max(ratio, 1.0):.10g}"
