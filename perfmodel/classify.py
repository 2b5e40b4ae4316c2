"""What is a kernel, by its name: GEMM, attention, MoE all-to-all, collective ... from rules that are data.

The rules are `data/kernel_classes.toml`; a name is looked at once, however many kernels bear it.
"""

import re
import tomllib
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files

import polars as pl

from perfmodel.errors import InputError

CLASSES = (
    "grouped_gemm",
    "gemm",
    "attention",
    "moe_dispatch",
    "moe_all_to_all",
    "collective",
    "copy",
    "elementwise",
    "reduction",
    "other",
)
KERNEL_CLASS = pl.Enum(CLASSES)
GEMMS = ("gemm", "grouped_gemm")  # the classes whose work is to multiply matrices
COMMUNICATION = ("moe_all_to_all", "collective")  # the classes whose work is to move data between devices

Rules = Sequence[tuple[str, re.Pattern[str]]]

MAX_LETTERS = 2**13  # of a name that rules look at, its beginning; the longest of templates have some thousands


def read_rules(text: str) -> Rules:
    """The rules of a TOML text, in order: `[[rule]]` with `class` and `pattern`, a regular expression, case ignored.

    Raises InputError on text that is not TOML, no rule, an unknown class, a missing key or a broken pattern.
    """
    try:
        entries = tomllib.loads(text).get("rule", [])
        rules = [(str(entry["class"]), re.compile(entry["pattern"], re.IGNORECASE)) for entry in entries]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, re.error) as error:
        raise InputError(f"kernel rules cannot be read ({error}); expected [[rule]] with class and pattern") from None
    if not rules:
        raise InputError("found no kernel rule; expected [[rule]] with class and pattern")
    unknown = {name for name, _ in rules} - set(CLASSES)
    if unknown:
        raise InputError(f"kernel rules name the class {', '.join(sorted(unknown))}; known are {', '.join(CLASSES)}")
    return rules


@cache
def shipped_rules() -> Rules:
    """The rules that come with the package."""
    return read_rules(files("perfmodel").joinpath("data", "kernel_classes.toml").read_text(encoding="utf-8"))


def rules_before_shipped(text: str) -> Rules:
    """The rules of a TOML text, then those that come with the package; raises what `read_rules` raises."""
    return [*read_rules(text), *shipped_rules()]


def kernel_class(name: str, rules: Rules | None = None) -> str:
    """Which class has a kernel of this name: that of the first rule whose pattern is found in it, else `other`."""
    return _shipped_class(name) if rules is None else _first_match(name, rules)


@lru_cache(maxsize=2**16)
def _shipped_class(name: str) -> str:
    return _first_match(name, shipped_rules())


def _first_match(name: str, rules: Rules) -> str:
    return next((found for found, pattern in rules if pattern.search(name, 0, MAX_LETTERS)), "other")


def classify(names: pl.Series, rules: Rules | None = None) -> pl.Series:
    """Which class has each kernel of a column of names; null where the name is."""
    coded = names.cast(pl.Categorical)
    distinct = coded.drop_nulls().unique()
    found = [kernel_class(name, rules) for name in distinct.cast(pl.String)]
    codes = coded.to_physical()
    n_codes = 1 + max(distinct.to_physical(), default=0)
    by_code = pl.repeat(None, n_codes, dtype=KERNEL_CLASS, eager=True)
    by_code = by_code.scatter(distinct.to_physical(), pl.Series(found, dtype=KERNEL_CLASS))
    return by_code.gather(codes).alias("class")


def class_shares(events: pl.DataFrame, rules: Rules | None = None) -> pl.DataFrame:
    """Which part of the kernel time has each class: columns `class`, `n_kernels`, `time_ns`, `time_frac`.

    Largest first. Fractions are of the summed kernel time, so they add to 1; null where all kernels took no time.
    """
    kernels = events.select("kind", "name", "dur_ns").filter(pl.col("kind") == "kernel")
    total = pl.col("time_ns").sum()
    return (
        kernels.select(classify(kernels["name"], rules), "dur_ns")
        .group_by("class")
        .agg(n_kernels=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
        .with_columns(time_frac=pl.when(total > 0).then(pl.col("time_ns") / total))
        .sort("time_ns", "class", descending=[True, False])
    )
