"""The figures of a trace made again with plain loops over dicts, slowly and obviously, by docs/nomenclature.md alone.

Nothing of the package computes here but the rules that tell the class of a kernel and what a call of a name does.
"""

import gzip
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Any

from perfmodel.classify import COMMUNICATION, kernel_class
from perfmodel.readers.api import api_kind

Event = dict[str, Any]
WORK = ("kernel", "copy", "set", "replay")
_CATEGORIES = {
    "cpu_op": "op", "user_annotation": "range", "cuda_runtime": "call", "cuda_driver": "call", "kernel": "kernel",
    "gpu_memcpy": "copy", "gpu_memset": "set", "python_function": "range",
}  # fmt: skip


def kineto_events(path: Path) -> list[Event]:
    """The timed events of a Kineto file, each a dict; the rank is the one that the file records."""
    content = path.read_bytes()
    document = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content, parse_float=Decimal)
    found = []
    for e in document["traceEvents"]:
        if e.get("ph") != "X" or e.get("cat") not in _CATEGORIES:
            continue
        called = e["name"].lower()
        if e["cat"] == "python_function" and not (
            called.startswith("nn.module: ") and ("moe" in called or "expert" in called)
        ):
            continue  # of Python's calls those of MoE modules are kept
        args = e.get("args", {})
        kind = _CATEGORIES[e["cat"]]
        kind = api_kind(e["name"]) if kind == "call" else kind
        event = {"kind": kind, "name": e["name"], "start": int(Decimal(e["ts"]) * 1000), "args": args}
        event |= {"dur": int(Decimal(e["dur"]) * 1000), "link": args.get("correlation"), "bytes": args.get("bytes")}
        event |= {"end": event["start"] + event["dur"], "rank": document.get("distributedInfo", {}).get("rank")}
        if kind in WORK:
            event |= {"device": args.get("device", e["pid"]), "stream": args.get("stream", e["tid"])}
        else:
            event |= {"process": int(e["pid"]), "thread": int(e["tid"])}
        found.append(event)
    return found


def nsys_events(path: Path) -> list[Event]:
    """The timed events of an Nsight Systems export."""
    with closing(sqlite3.connect(path)) as database:
        database.row_factory = sqlite3.Row
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}

        def rows(table: str) -> list[Any]:
            return database.execute(f"SELECT * FROM {table}").fetchall() if table in tables else []

        strings = dict(tuple(row) for row in rows("StringIds"))
        found: list[Event] = []
        for table, kind in (("KERNEL", "kernel"), ("MEMCPY", "copy"), ("MEMSET", "set"), ("GRAPH_TRACE", "replay")):
            for row in rows(f"CUPTI_ACTIVITY_KIND_{table}"):
                name = strings[row["demangledName"]] if kind == "kernel" else kind
                process = row["globalPid"] >> 24 & 0xFFFFFF
                where = {"device": row["deviceId"], "stream": row["streamId"], "process": process}
                link = (process, row["correlationId"])
                size = row["bytes"] if kind in ("copy", "set") else None
                found.append({"kind": kind, "name": name, **where, "link": link, "bytes": size, **_times(row)})
        for row in rows("CUPTI_ACTIVITY_KIND_RUNTIME"):
            process, thread = row["globalTid"] >> 24 & 0xFFFFFF, row["globalTid"] & 0xFFFFFF
            name = strings[row["nameId"]].rsplit("_v", 1)[0]
            link = (process, row["correlationId"])
            where = {"process": process, "thread": thread}
            found.append({"kind": api_kind(name), "name": name, **where, "link": link, **_times(row)})
        for row in rows("NVTX_EVENTS"):
            if row["end"] is not None and row["eventType"] in (59, 60):
                where = {"process": row["globalTid"] >> 24 & 0xFFFFFF, "thread": row["globalTid"] & 0xFFFFFF}
                name = row["text"] or strings[row["textId"]]
                found.append({"kind": "range", "name": name, **where, "link": None, **_times(row)})
    return found


def _times(row: Any) -> Event:
    return {"start": row["start"], "end": row["end"], "dur": row["end"] - row["start"], "rank": None}


def join(events: list[Event]) -> None:
    """Give each piece of device work its `launch`, and each event the numbers that follow from it."""
    calls = defaultdict(list)
    for e in events:
        if e["kind"] in ("launch", "sync", "call") and e["link"] is not None:
            calls[e["rank"], e["link"]].append(e)
    for e in events:
        if e["kind"] in WORK:
            same = calls[e["rank"], e["link"]]
            before = [c for c in same if c["start"] <= e["start"]]
            e["launch"] = max(before, key=start) if before else min(same, key=start) if same else None
        elif e["kind"] == "launch":
            e["launch"] = e
        if call := e.get("launch"):
            e["delay"], e["graph"] = e["start"] - call["start"], "GraphLaunch" in call["name"]
    for thread in split((e for e in events if "thread" in e), thread_of).values():
        around: list[Event] = []
        opening = sorted((e for e in thread if e["kind"] in ("op", "range")), key=start)[::-1]
        for call in sorted((e for e in thread if e["kind"] in ("launch", "sync", "call")), key=start):
            while opening and opening[-1]["start"] <= call["start"]:
                around.append(opening.pop())
            around = [e for e in around if call["start"] <= e["end"]]
            call["op"] = innermost([e for e in around if e["kind"] == "op"], call["start"])
            call["ranges"] = [e for e in around if e["kind"] == "range" and call["start"] < e["end"]]


def start(event: Event) -> int:
    """When an event began."""
    return int(event["start"])


def innermost(intervals: list[Event], at: int) -> Event | None:
    """Of the intervals that hold a moment the one that began last, of those the one that ends first, then the last."""
    around = [e for e in intervals if e["start"] <= at <= e["end"]]
    return max(reversed(around), key=lambda e: (e["start"], -e["end"])) if around else None


def union(work: Iterable[Event]) -> int:
    """For how long anything was going on, each device of each rank for itself."""
    total = 0
    for intervals in split(work, device_of).values():
        until = None
        for e in sorted(intervals, key=start):
            begin = e["start"] if until is None else max(e["start"], until)
            total += max(e["end"] - begin, 0)
            until = e["end"] if until is None else max(until, e["end"])
    return total


def split(events: Iterable[Event], by: Callable[[Event], Any]) -> dict[Any, list[Event]]:
    """Events in groups."""
    groups = defaultdict(list)
    for e in events:
        groups[by(e)].append(e)
    return groups


def percentile(values: list[int], frac: float) -> float | None:
    """The value below which a fraction of the values lies, interpolated between two of them."""
    if not values:
        return None
    below, rest = divmod((len(values) - 1) * frac, 1)
    ordered = [*sorted(values), 0]
    return ordered[int(below)] + rest * (ordered[int(below) + 1] - ordered[int(below)])


def device_of(e: Event) -> tuple[Any, ...]:
    """What tells one device from another."""
    return e["rank"], e["device"]


def stream_of(e: Event) -> tuple[Any, ...]:
    """What tells one stream from another."""
    return e["rank"], e["device"], e["stream"]


def process_of(e: Event) -> tuple[Any, ...]:
    """The process of a host event or of the call that launched work, else of the work as far as it is recorded."""
    e = e.get("launch") or e
    return e["rank"], e.get("process")


def thread_of(e: Event) -> tuple[Any, ...]:
    """The thread of a host event or of the call that launched work; null without one."""
    e = e.get("launch") or e
    return e["rank"], e.get("process"), e.get("thread")


def with_calls(work: list[Event]) -> list[Event]:
    """Device work and the calls that launched it, each once."""
    return [*work, *({id(c): c | {"kind": "launch"} for e in work if (c := e.get("launch"))}.values())]


def figures(events: list[Event], part: Callable[[Event], Any] = lambda _: None) -> dict[str, Any]:
    """The launch metrics of some events (of all, or those of one group), as `LaunchMetrics.to_json` names them.

    Busy times and spans are those of each part and device, summed.
    """
    kernels = [e for e in events if e["kind"] == "kernel"]
    work = [e for e in events if e["kind"] in WORK]
    joined = [k for k in kernels if k.get("launch")]
    by_launch = split(joined, lambda k: id(k["launch"]))
    queues = [k["start"] - k["launch"]["end"] for k in joined]
    parts = split(work, lambda e: (part(e), *device_of(e))).values()
    busy = sum(union(same) for same in parts)
    span = sum(max(e["end"] for e in same) - min(e["start"] for e in same) for same in parts) if work else None
    launches = [e for e in events if e["kind"] == "launch"]
    delays = [k["delay"] for k in joined]
    return {
        "n_launches": len(launches),
        "launch_call_ns": sum(e["dur"] for e in launches),
        "n_kernels": len(kernels),
        "n_kernels_joined": len(joined),
        "n_kernels_orphan": len(kernels) - len(joined),
        "n_kernels_graph": sum(k["graph"] for k in joined),
        "tklqt_ns": sum(delays),
        "tklqt_graph_ns": sum(k["delay"] for k in joined if k["graph"]),
        "tklqt_non_graph_ns": sum(k["delay"] for k in joined if not k["graph"]),
        "tklqt_first_kernel_ns": sum(min(k["delay"] for k in same) for same in by_launch.values()),
        "kernel_launch_call_ns": sum(same[0]["launch"]["dur"] for same in by_launch.values()),
        "delay_min_ns": min(delays, default=None),
        "delay_median_ns": median(delays) if delays else None,
        "delay_p99_ns": percentile(delays, 0.99),
        "delay_max_ns": max(delays, default=None),
        "n_negative_delays": sum(d < 0 for d in delays),
        "n_queued": sum(q >= 0 for q in queues),
        "queue_ns": sum(q for q in queues if q > 0),
        "kernel_time_ns": sum(k["dur"] for k in kernels),
        "akd_ns": sum(k["dur"] for k in kernels) / len(kernels) if kernels else None,
        "kernel_busy_ns": sum(union(k for k in same if k["kind"] == "kernel") for same in parts),
        "gpu_busy_ns": busy,
        "gpu_span_ns": span,
        "gpu_idle_ns": None if span is None else span - busy,
        "gpu_idle_frac": (span - busy) / span if span else None,
    }


def latency(events: list[Event]) -> int | None:
    """From the start of the first operator to the end of the last kernel."""
    ops = [e["start"] for e in events if e["kind"] == "op"]
    ends = [e["end"] for e in events if e["kind"] == "kernel"]
    return max(ends) - min(ops) if ops and ends else None


def doing(e: Event) -> str | None:
    """What a device does: compute, communication, copy; null for sets and for what is no device work."""
    if e["kind"] == "kernel":
        return "communication" if kernel_class(e["name"]) in COMMUNICATION else "compute"
    return "copy" if e["kind"] == "copy" else None


def exposed(events: list[Event]) -> dict[tuple[Any, Any], dict[str, int]]:
    """For each device how long it computed, and copied or communicated while it computed and while it did not."""
    found = {}
    at_work = [e for e in events if doing(e)]
    for device, work in split(at_work, device_of).items():
        changes = sorted((t, step, doing(e)) for e in work for t, step in ((e["start"], 1), (e["end"], -1)))
        running = {"compute": 0, "communication": 0, "copy": 0}
        sums: dict[str, int] = defaultdict(int)
        for (t, step, what), (then, _, _) in zip(changes, [*changes[1:], changes[-1]], strict=True):
            running[str(what)] += step
            if running["compute"]:
                sums["compute_busy_ns"] += then - t
            for word in ("communication", "copy"):
                if running[word]:
                    sums[f"{word}_busy_ns"] += then - t
                    sums[f"{word}_{'hidden' if running['compute'] else 'exposed'}_ns"] += then - t
        found[device] = dict(sums)
    return found
