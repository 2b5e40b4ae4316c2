"""What a store of baselines holds, and which of them fits a side of a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perfmodel.errors import InputError, NotComparableError
from perfmodel.regression.evidence import Evidence, differences, require_comparable
from perfmodel.text import short_name, shortened

from .stored import Head, foreign_files, is_baseline, locked, read_head, slug

N_NAMED = 20  # baselines that a sentence names


@dataclass(frozen=True)
class Listed:
    """What a store holds: baselines by folder, what cannot be read of them and why, and what is none of ours."""

    baselines: dict[str, Head]
    damaged: dict[str, str]
    foreign: tuple[str, ...]


def listed(store: str | Path) -> Listed:
    """What is in a store, by name; raises InputError where it is no folder."""
    store = Path(store)
    if not store.is_dir():
        raise InputError(f"no store of baselines {str(store)!r}; make one with `perfmodel baseline save CAPTURE`")
    _refuse_baseline(store)
    heads, damaged, foreign = {}, {}, []
    with locked(store, to_write=False):
        for entry in sorted(store.iterdir()):
            if not is_baseline(entry):
                foreign.append(entry.name)
                continue
            try:
                heads[entry.name] = read_head(entry)
                foreign += [f"{entry.name}/{name}" for name in foreign_files(entry, heads[entry.name])]
            except InputError as error:
                damaged[entry.name] = str(error)
    return Listed(heads, damaged, tuple(foreign))


def named(store: str | Path, name: str) -> Path:
    """The folder of the baseline of a store that has this name, or the only one whose name contains it."""
    found = listed(store)
    names = [*found.baselines, *found.damaged]
    chosen = [one for one in names if one == name] or [one for one in names if name.lower() in one.lower()]
    if len(chosen) != 1:
        there = _some(names) or "none"
        what = "no baseline is" if not chosen else f"{len(chosen)} baselines are"
        raise InputError(f"{what} called {name!r} in store {str(store)!r}; there: {there}")
    return Path(store) / chosen[0]


def choose(store: str | Path, side: Evidence, axes: Sequence[str] = ()) -> Path:
    """The baseline of a store that fits a side: of the same fingerprint, else the only one that differs from it on the
    declared axes alone.

    Raises InputError where the store holds none or a damaged one, NotComparableError where none or several fit.
    """
    with locked(Path(store), to_write=False):
        return Path(store) / fitting(Path(store), heads_of(Path(store)), side, axes)


def fitting(store: Path, heads: Mapping[str, Head], side: Evidence, axes: Sequence[str]) -> str:
    """The name of that baseline among those of a store, for who has read them."""
    if not heads:
        raise InputError(f"store {str(store)!r} holds no baseline; save one with `perfmodel baseline save CAPTURE`")
    found, refusals = same_state(heads, side), []
    if not found:
        for name, head in heads.items():
            try:
                require_comparable(_bare(name, head), side, axes)
                found.append(name)
            except NotComparableError as error:
                refusals.append(error)
    if len(found) == 1:
        return found[0]
    if len(heads) == 1:
        raise refusals[0]
    if found:
        raise NotComparableError(
            f"not comparable: several baselines of store {str(store)!r} fit {side.name!r}: {_some(found)}; give "
            "the folder of one"
        )
    raise NotComparableError(
        f"not comparable: no baseline of store {str(store)!r} fits {side.name!r}; {differences_words(heads, side)}; "
        "declare with --axis what you mean to test"
    )


def _some(names: Sequence[str]) -> str:
    """Names in words, no more than a sentence bears."""
    more = f" and {len(names) - N_NAMED} more" if len(names) > N_NAMED else ""
    return ", ".join(shortened(name, 80) for name in names[:N_NAMED]) + more


def heads_of(store: Path) -> dict[str, Head]:
    """What the baselines of a store are of, by name; raises InputError for a damaged one."""
    _refuse_baseline(store)
    entries = sorted(store.iterdir()) if store.is_dir() else []
    return {entry.name: read_head(entry) for entry in entries if is_baseline(entry)}


def _refuse_baseline(store: Path) -> None:
    if is_baseline(store):
        raise InputError(f"{str(store)!r} is a baseline, expected the store that it lies in")


def _bare(name: str, head: Head) -> Evidence:
    return Evidence(name, head.kind, head.fingerprint, {}, ())


def same_state(heads: Mapping[str, Head], side: Evidence) -> list[str]:
    """The baselines whose fingerprint agrees with a side's; where one is equal to the last fact, that one alone."""
    same = [n for n, head in heads.items() if head.kind == side.kind and not differences(_bare(n, head), side)]
    equal = [name for name in same if heads[name].fingerprint == side.fingerprint]
    return equal if len(equal) == 1 else same


def differences_words(heads: Mapping[str, Head], side: Evidence) -> str:
    """In what the baselines of a store differ from a side, as words."""
    words = []
    for name, head in list(heads.items())[:4]:
        keys = ["kind"] if head.kind != side.kind else list(differences(_bare(name, head), side))
        words.append(f"{name} differs in " + ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" * (len(keys) > 3)))
    return "; ".join(words) + (f"; and {len(heads) - 4} more baselines" if len(heads) > 4 else "")


def name_of(side: Evidence) -> str:
    """The name of a side's baseline: words of its machine and dtype, and 8 digits of its fingerprint."""
    known = side.fingerprint
    machine = next((known[key] for key in ("machine.gpu_name", "machine.cpu_model") if known.get(key)), side.kind)
    words = [str(machine), *([side.capture.dtype] if side.capture is not None else [])]
    digest = short_name({"kind": side.kind, "fingerprint": dict(known)})[:8]
    return "-".join(word for word in (*map(slug, words), digest) if word)
