"""SGLang's dumps of forward passes, `per_pass` and `per_token`: one dump for each rank. numpy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .engines import Map, engine_draft, logical_loads, map_of
from .recording import Draft, Hints, loads_of
from .selections import draft_of_ids, ids_of

RECORDED_TOP_K = 8  # slots that the recorder has for each token
FORWARD_MODES = {"prefill": 1, "decode": 2}  # of SGLang's ForwardMode; others mix both, verify drafts or are idle
COUNTS, IDS = "global_physical_count", "topk_ids_of_layer"
MAP = "last_physical_to_logical_map"


@dataclass(frozen=True)
class Pass:
    """One forward pass as one rank saw it: logical counts `[layer, expert]` or ids `[token, layer, slot]`."""

    place: tuple[int, str]  # number of the pass, and which part of it where it was split
    rank: int
    values: NDArray[Any]


def is_dump(value: object) -> bool:
    """Whether an object is a dump of forward passes."""
    return isinstance(value, dict) and isinstance(value.get("records"), list) and MAP in value


def draft_of_dumps(name: str, dumps: Sequence[Mapping[str, Any]], hints: Hints) -> Draft:
    """The recording in the dumps of one or several ranks; a step is a forward pass.

    Ranks that recorded the same are counted once, ranks that did not are added. Raises InputError for damaged dumps,
    dumps without counts, and a pass that a rank recorded twice.
    """
    records = [record for dump in dumps for record in dump["records"]]
    if not records or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{name} has no records of forward passes")
    field = IDS if all(IDS in record for record in records) else COUNTS
    if hints.phase is not None and field == COUNTS:
        raise InputError(f"{name}: its passes do not say whether they are {hints.phase}; only per_token dumps do")
    passes: list[Pass] = []
    notes: tuple[str, ...] = ()
    maps = [map_of(name, dump[MAP]) for dump in dumps]
    n_experts = max(int(slots.max()) + 1 for slots in maps)
    if hints.n_experts is not None:
        n_experts = min(n_experts, hints.n_experts) if field == IDS else n_experts
    if any((slots != np.arange(slots.shape[1])).any() for slots in maps):
        notes = ("the map of experts is that of the end: passes before a rebalancing may count for other experts",)
    for number, (dump, slots) in enumerate(zip(dumps, maps, strict=True)):
        kept = [
            r for r in dump["records"] if hints.phase is None or r.get("forward_mode") == FORWARD_MODES[hints.phase]
        ]
        passes += [_pass(name, number, record, field, slots, n_experts) for record in kept]
    if not passes:
        raise InputError(f"{name} has no {hints.phase} pass among its {len(records)}")
    if len(passes) < len(records):
        notes += (f"{len(passes)} of {len(records)} passes are {hints.phase}; the others are left out",)
    passes, more = _once(name, passes)
    build = _of_tokens if field == IDS else _of_counts
    return build(name, passes, hints, notes + more, n_experts)


def _pass(name: str, number: int, record: Mapping[str, Any], field: str, slots: Map, n_experts: int) -> Pass:
    place, rank = record.get("forward_pass_id"), record.get("rank", number)
    values = record.get(field)
    if type(place) is not int or type(rank) is not int or not isinstance(values, np.ndarray):
        raise InputError(
            f"{name}: a record has no forward_pass_id or {field}; its keys are {', '.join(map(str, record))}"
        )
    where = f"{name}: pass {place}"
    if field == COUNTS:
        values = logical_loads(where, loads_of(where, values), slots, n_experts)[0]
    elif values.size:
        values = _logical_ids(where, ids_of(where, values).transpose(1, 0, 2), slots, n_experts)
    return Pass((place, str(record.get("gatherer_key", ""))), rank, values)


def _logical_ids(name: str, ids: NDArray[np.signedinteger], slots: Map, n_experts: int) -> NDArray[np.signedinteger]:
    """Ids of logical experts of `ids[token, layer, slot]`; what is in no slot gets an id that is too large."""
    n_layers, n_slots = slots.shape
    if ids.shape[1] != n_layers:
        raise InputError(f"{name} has {ids.shape[1]} layers, the map of experts has {n_layers}")
    known = np.full((n_layers, n_slots + 2), n_experts, dtype=np.int32)  # what is beyond the slots comes after them
    known[:, :n_slots][slots >= 0] = slots[slots >= 0]
    known[:, -1] = -1  # which id -1 finds, no selection
    return np.asarray(known[np.arange(n_layers)[:, None], np.minimum(ids, n_slots)])


def _once(name: str, passes: list[Pass]) -> tuple[list[Pass], tuple[str, ...]]:
    """The passes in order of time, and notes: one of the ranks that agree in all passes which they share.

    Tensor-parallel ranks see the same tokens; data-parallel ranks see others, expert-parallel ones only their experts.
    """
    of_rank: dict[int, dict[tuple[int, str], Pass]] = {}
    for one in sorted(passes, key=lambda one: one.rank):
        if of_rank.setdefault(one.rank, {}).setdefault(one.place, one) is not one:
            raise InputError(f"{name}: rank {one.rank} recorded pass {one.place[0]} twice")
    groups: list[dict[tuple[int, str], Pass]] = []
    for own in of_rank.values():
        like = next((group for group in groups if _agree(group, own)), None)
        if like is None:
            groups.append(own)
        else:
            like.update({place: one for place, one in own.items() if place not in like})
    kept = sorted((one for group in groups for one in group.values()), key=lambda one: one.place)
    if len(of_rank) == 1:
        return kept, (f"this is what rank {passes[0].rank} recorded; other ranks may have seen other tokens",)
    if len(groups) < len(of_rank):
        return kept, (f"{len(of_rank)} ranks recorded the tokens of {len(groups)}, which are counted once",)
    return kept, (f"what {len(of_rank)} ranks recorded is added up",)


def _agree(some: Mapping[tuple[int, str], Pass], others: Mapping[tuple[int, str], Pass]) -> bool:
    shared = some.keys() & others.keys()
    return bool(shared) and all(np.array_equal(some[place].values, others[place].values) for place in shared)


def _of_counts(name: str, passes: list[Pass], hints: Hints, notes: tuple[str, ...], n_experts: int) -> Draft:
    steps = {place: step for step, place in enumerate(dict.fromkeys(one.place for one in passes))}
    n_layers = len(passes[0].values)
    loads = np.zeros((len(steps), n_layers, n_experts))
    for one in passes:
        if len(one.values) != n_layers:
            raise InputError(f"{name}: its passes have {len(one.values)} and {n_layers} layers")
        loads[steps[one.place]] += one.values
    loads = loads[loads.any(axis=(1, 2))]
    if not loads.size:
        raise InputError(f"{name} recorded nothing: all its counts are zero")
    return engine_draft(loads, hints, True, notes)


def _of_tokens(name: str, passes: list[Pass], hints: Hints, notes: tuple[str, ...], n_experts: int) -> Draft:
    passes = [one for one in passes if one.values.size]
    if len({one.values.shape[1:] for one in passes}) != 1:
        raise InputError(f"{name}: its passes have no tokens, or different numbers of layers")
    steps = {place: step for step, place in enumerate(dict.fromkeys(one.place for one in passes))}
    ids = np.concatenate([one.values for one in passes])
    step_of = np.repeat([steps[one.place] for one in passes], [len(one.values) for one in passes])
    draft = draft_of_ids(name, ids, hints, notes, step_of, n_experts)
    more = (f"the recorder keeps {RECORDED_TOP_K} experts of a token, so a larger top-k would look like this",)
    notes = draft.notes + more * (draft.top_k == RECORDED_TOP_K)
    return replace(draft, notes=notes, phase=hints.phase)
