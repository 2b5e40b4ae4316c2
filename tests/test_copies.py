from pathlib import Path

import polars as pl
import pytest

from perfmodel.copies import copies, copy_route
from perfmodel.launch import launch_metrics
from perfmodel.overlap import device_doing, exposed_time
from perfmodel.readers import read_trace
from tests.traces_made import events, golden_rows, kernel

ROUTES = {
    "Memcpy HtoD (Pinned -> Device)": ("HtoD", "Pinned", "Device"),
    "Memcpy HtoD (Pageable -> Device)": ("HtoD", "Pageable", "Device"),
    "Memcpy DtoH (Device -> Host)": ("DtoH", "Device", "Host"),
    "Memcpy PtoP (Device -> Device Static)": ("PtoP", "Device", "Device Static"),
    "Memcpy DtoD": ("DtoD", None, None),
    "Memcpy HtoD (Unknown -> Managed)": ("HtoD", None, "Managed"),
    "CopyHostToDevice": ("HtoD", None, None),
    "Memset (Device)": (None, None, "Device"),
    "Memset (Unknown)": (None, None, None),
    "Memset": (None, None, None),
    "Memcpy": (None, None, None),
}


@pytest.mark.parametrize(("name", "route"), ROUTES.items())
def test_names_of_copies(name: str, route: tuple) -> None:
    assert copy_route(name) == route


def copy(start_ns: int, dur_ns: int, n_bytes: int | None, name: str, **more: object) -> dict:
    return {"kind": "copy", "name": name, "start_ns": start_ns, "dur_ns": dur_ns, "bytes": n_bytes, **more}


def test_copies_by_hand() -> None:
    """Two pinned copies that overlap by 10, half under a kernel of their device; one of unknown size; a set."""
    pinned, back = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)"
    trace = events(
        kernel(0, 50, name="gemm"),
        kernel(0, 900, name="gemm", rank=1),
        copy(30, 30, 3000, pinned),
        copy(50, 30, 1000, pinned, stream=9),
        copy(100, 20, None, back),
        copy(100, 40, 800, back, rank=1),
        {"kind": "set", "name": "Memset (Device)", "start_ns": 40, "dur_ns": 20, "bytes": None},
    )
    assert copies(trace).rows() == [
        ("copy", "DtoH", "Device", "Pageable", 2, 1, 800, 20e9, 60, 20),
        ("copy", "HtoD", "Pinned", "Device", 2, 0, 4000, pytest.approx(4000 / 60e-9), 60, 30),
        ("set", None, None, "Device", 1, 1, None, None, 20, 10),
    ]
    assert copies(events(copy(0, 0, 5, pinned)))["bytes_per_s"].to_list() == [None]
    assert copies(events({"kind": "op", "start_ns": 0})).is_empty()


@pytest.mark.parametrize(
    "row", golden_rows("kineto_golden.csv") + golden_rows("nsys_golden.csv"), ids=lambda r: r["file"]
)
def test_copies_of_real_traces_are_all_counted(shared: Path, row: dict[str, str]) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    table = copies(trace.events, doing=device_doing(trace.events))
    count = dict(table.group_by("kind").agg(pl.sum("n_copies")).iter_rows())
    assert (count.get("copy", 0), count.get("set", 0)) == (int(row["memcpy"]), int(row["memset"]))
    of_copies = table.filter(pl.col("kind") == "copy")
    assert of_copies["direction"].null_count() == 0
    assert (of_copies["exposed_ns"] <= of_copies["time_ns"]).all()
    exposed = exposed_time(trace.events)
    if of_copies.height <= 1:
        assert of_copies["exposed_ns"].sum() == exposed["copy_exposed_ns"].sum()
    assert of_copies["exposed_ns"].sum() >= exposed["copy_exposed_ns"].sum()
    total = of_copies["time_ns"].sum() + table.filter(pl.col("kind") == "set")["time_ns"].sum()
    assert total >= launch_metrics(trace).gpu_busy_ns - launch_metrics(trace).kernel_busy_ns
