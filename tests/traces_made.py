"""Synthetic traces for tests: events of our own making, written as the vendors write them."""

import csv
import gzip
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel.trace import EVENTS
from tests.conftest import ROOT

Json = dict[str, Any]


def golden_rows(name: str) -> list[Any]:
    """The rows of a reference table, for parametrising; one that is skipped where the shared folder is absent."""
    path = ROOT.parent / "shared" / "reference" / name
    if not path.is_file():
        absent = pytest.mark.skip(reason="the reference material beside the project is absent")
        return [pytest.param({}, id="absent", marks=absent)]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def events(*rows: Mapping[str, Any]) -> pl.DataFrame:
    """EVENTS from rows that name only what matters; a name and device 0 for device work are filled in."""
    filled = []
    for row in rows:
        on_device = (
            {"device": 0, "stream": 7} if row["kind"] in ("kernel", "copy", "set") else {"process": 1, "thread": 1}
        )
        filled.append({"name": row["kind"], "dur_ns": 1, **on_device, **row})
    return pl.DataFrame(filled, schema=EVENTS)


def kernel(start_ns: int, dur_ns: int = 1, **more: Any) -> Json:
    return {"kind": "kernel", "start_ns": start_ns, "dur_ns": dur_ns, **more}


def launch(start_ns: int, link: int | None, dur_ns: int = 1, **more: Any) -> Json:
    return {"kind": "launch", "name": "cudaLaunchKernel", "start_ns": start_ns, "dur_ns": dur_ns, "link": link, **more}


def complete(cat: str, name: str, ts: Any, dur: Any, *where: Any, **args: Any) -> Json:
    """A complete event of Chrome JSON at (pid, tid), else (1, 1); times in microseconds."""
    pid, tid = where or (1, 1)
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur, "args": args}


def native(document: Json) -> str:
    """A document laid out as Kineto writes it: an event begins on a line of its own and takes several."""
    lines = ["{"]
    for key, value in document.items():
        if key == "traceEvents":
            body = ",".join("\n  " + json.dumps(event).replace(', "ts"', ',\n    "ts"', 1) for event in value)
            lines.append(f'  "traceEvents": [{body}\n  ],')
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)},")
    return "\n".join(lines).rstrip(",") + "}"


LAYOUTS = {
    "native": native,
    "indented": lambda document: json.dumps(document, indent=2),
    "sorted keys": lambda document: json.dumps(document, sort_keys=True),
    "one line": lambda document: json.dumps(document, separators=(",", ":")),
}


def write_json(path: Path, document: Any, packed: bool = False) -> Path:
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


_KERNEL = (
    "start INT, end INT, deviceId INT, streamId INT, correlationId INT, globalPid INT, demangledName INT, shortName INT"
)
_TABLES = {
    "StringIds": "id INT, value TEXT",
    "CUPTI_ACTIVITY_KIND_KERNEL": _KERNEL,
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start INT, end INT, globalTid INT, correlationId INT, nameId INT",
    "CUPTI_ACTIVITY_KIND_MEMCPY": (
        "start INT, end INT, deviceId INT, streamId INT, correlationId INT, globalPid INT, bytes INT, copyKind INT, "
        "srcKind INT, dstKind INT"
    ),
    "CUPTI_ACTIVITY_KIND_MEMSET": (
        "start INT, end INT, deviceId INT, streamId INT, correlationId INT, globalPid INT, bytes INT"
    ),
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": (
        "start INT, end INT, deviceId INT, streamId INT, correlationId INT, globalPid INT, graphId INT"
    ),
    "NVTX_EVENTS": "start INT, end INT, eventType INT, text TEXT, textId INT, globalTid INT",
    "META_DATA_EXPORT": "name TEXT, value TEXT",
    "TARGET_INFO_SYSTEM_ENV": "name TEXT, value TEXT",
}


def pid(process: int, thread: int = 0) -> int:
    """A globalTid of Nsight Systems: hardware 8 bits, VM 8, process 24, thread 24."""
    return 1 << 56 | process << 24 | thread


def write_nsys(path: Path, tables: Mapping[str, Sequence[tuple[Any, ...]]]) -> Path:
    """An Nsight Systems export with the given rows; names of tables without their common prefix are completed."""
    with closing(sqlite3.connect(path)) as database:
        for short, rows in tables.items():
            name = short if short in _TABLES else f"CUPTI_ACTIVITY_KIND_{short}"
            database.execute(f"CREATE TABLE {name} ({_TABLES[name]})")
            marks = ", ".join("?" * len(_TABLES[name].split(",")))
            database.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)
        database.commit()
    return path
