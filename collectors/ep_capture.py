"""The files of an expert-parallel capture: begun or continued, and grown by one measured batch at a time.

Needs no torch. Only the first rank writes. A batch's steps are written first, its line in workloads.jsonl last: steps
without a line are those of a batch that was cut off, and go when the capture continues.
"""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from perfmodel import __version__
from perfmodel.errors import InputError
from perfmodel.text import short_name

from . import store
from .campaign import open_folder, refuse_other_machine
from .ep_plan import Batch
from .profile_checks import write_packed
from .workloads import file_shares

MANIFEST, STEPS, PROBES = "expert_parallel.json", "steps.jsonl", "probes.jsonl"
KIND = "expert-parallel"
MEETING = "PERFMODEL_RANKS"  # variable with the path of the file where ranks meet that torchrun has not started
LEAST_GAP_NS = 1_000_000_000  # between the last step of one collection and the first of that which continues it


def settings_of(
    *, n_ranks: int, device: str, dtype: str, threads: int, seed: int, n_warm_up: int, n_steps: int,
    chunks: Sequence[int], routing_files: Sequence[str],
) -> store.Json:  # fmt: skip
    """Everything that decides how batches are measured, as it stands in the manifest. No folders."""
    hashes = {name: hashlib.sha256(s.tobytes()).hexdigest() for name, s in file_shares(routing_files).items()}
    return {
        "n_ranks": n_ranks, "backend": "nccl" if device == "cuda" else "gloo", "device": device, "dtype": dtype,
        "threads": threads, "seed": seed, "n_warm_up": n_warm_up, "n_steps": n_steps,
        "n_chunks": sorted({1, *chunks}), "routing_files_sha256": hashes,
    }  # fmt: skip


def begin(folder: Path, settings: store.Json, found: Mapping[str, object]) -> None:
    """Begin a capture or go on with one; `found` is what the ranks know of machine, software, kernel and clocks.

    Batches may be added to a capture, and pieces and routing files. Raises InputError when the folder holds something
    else, or a capture of other settings, another machine or another torch.
    """
    before: store.Json = {}
    if refuse_other(folder, settings):
        before = store.read_capture(folder, MANIFEST)
        n_chunks = sorted({*before["settings"]["n_chunks"], *settings["n_chunks"]})
        hashes = {**before["settings"]["routing_files_sha256"], **settings["routing_files_sha256"]}
        settings = {**settings, "n_chunks": n_chunks, "routing_files_sha256": hashes}
    capture = {
        "schema": store.SCHEMA,
        "kind": KIND,
        "created": before.get("created", datetime.datetime.now(datetime.UTC).date().isoformat()),
        "collector": f"perfmodel {__version__}",
        "settings": settings,
        **found,
    }
    store.write_capture(folder, capture, MANIFEST)


def refuse_other(folder: Path, settings: store.Json) -> bool:
    """Whether the folder holds a capture that these settings continue; makes the folder when it is new.

    Raises InputError when it holds something else, or was measured otherwise.
    """
    if not open_folder(folder, MANIFEST):
        return False
    capture = store.read_capture(folder, MANIFEST)
    if capture.get("kind") != KIND:
        raise InputError(f"{folder / MANIFEST} is of kind {capture.get('kind')!r}, expected {KIND!r}")
    before = capture["settings"]
    may_grow = ("n_chunks", "routing_files_sha256")
    changed = [key for key in settings if key not in may_grow and before.get(key) != settings[key]]
    hashes = before["routing_files_sha256"]
    changed_files = [n for n, found in settings["routing_files_sha256"].items() if hashes.get(n, found) != found]
    if changed or changed_files:
        words = [f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in changed]
        words += [f"routing {name} had other counts" for name in changed_files]
        raise InputError(
            f"{folder} was measured otherwise ({'; '.join(words)}); give the same options or another --out"
        )
    refuse_other_machine(folder, capture, settings["threads"])
    return True


def measured(folder: Path) -> list[store.Json]:
    """The lines of the batches that are measured whole; what a kill left of others is taken out of the files."""
    lines = store.mend(folder, store.WORKLOADS, ("workload", "shape", "tokens_per_gpu", "routing", "n_chunks"))
    whole = {line["workload"] for line in lines}
    steps = store.mend(folder, STEPS, ("workload", "step", "rank"))
    if any(step["workload"] not in whole for step in steps):
        kept = [store.to_line(step) for step in steps if step["workload"] in whole]
        store.write_atomically(folder / STEPS, "".join(kept))
    return lines


def line_of(batch: Batch, lines: Sequence[store.Json]) -> store.Json | None:
    """The line of a batch among those measured, null when it is not."""
    wanted = batch.key_values()
    return next((line for line in lines if all(line[key] == value for key, value in wanted.items())), None)


def time_base_ns(folder: Path) -> int:
    """From where a collection counts its times: after the last step there is, so that times of two never meet."""
    ends = [step["end_ns"] for step in store.mend(folder, STEPS, ("end_ns",))]
    return max(ends) + LEAST_GAP_NS if ends else 0


def add(folder: Path, batch: Batch, gpu_of: Sequence[int], rows: Sequence[Sequence[int]],
        steps: Sequence[Sequence[Mapping[str, object]]]) -> store.Json:  # fmt: skip
    """Write a measured batch: `rows` by source rank and expert, `steps` of each rank; returns its line.

    Raises InputError when rows do not sum to tokens x top-k, or a file cannot be written.
    """
    expected = batch.n_tokens * batch.shape.top_k
    if any(sum(row) != expected for row in rows):
        raise InputError(f"{batch.words}: ranks chose {[sum(row) for row in rows]} experts, expected {expected} each")
    content = batch.line(gpu_of, rows)
    line = {"workload": short_name(content), **content}
    by_step = sorted((s for of_rank in steps for s in of_rank), key=lambda s: (s["step"], s["rank"]))
    store.append(folder, STEPS, *({"workload": line["workload"], **step} for step in by_step))
    store.append(folder, store.WORKLOADS, line)
    return line


def _profile_path(folder: Path, line: store.Json, rank: int) -> Path:
    return folder / store.PROFILES / str(line["workload"]) / f"rank-{rank}.trace.json.gz"


def add_profile(folder: Path, line: store.Json, traces: Sequence[store.Json]) -> None:
    """Write the traces of the ranks, in their order: those of one workload make a folder."""
    for rank, trace in enumerate(traces):
        path = _profile_path(folder, line, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_packed(path, trace)


def has_profile(folder: Path, line: store.Json, n_ranks: int) -> bool:
    """Whether a measured batch has been profiled on all ranks."""
    return all(_profile_path(folder, line, rank).exists() for rank in range(n_ranks))
