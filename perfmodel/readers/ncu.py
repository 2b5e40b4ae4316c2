"""What did each kernel compute and move: Nsight Compute tables as one row a launch, in base units."""

import csv
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from perfmodel.errors import InputError, about
from perfmodel.text import NS_PER_S

LAUNCHES = pl.Schema(
    {
        "process": pl.Int64(),
        "id": pl.Int64(),
        "name": pl.String(),
        "grid": pl.String(),
        "block": pl.String(),
        "duration_ns": pl.Float64(),
        "fp64_flops": pl.Float64(),
        "fp32_flops": pl.Float64(),
        "fp16_flops": pl.Float64(),
        "tensor_flops": pl.Float64(),
        "flops": pl.Float64(),
        "dtype": pl.String(),
        "dram_read_bytes": pl.Float64(),
        "dram_write_bytes": pl.Float64(),
        "dram_bytes": pl.Float64(),
        "l2_bytes": pl.Float64(),
        "sm_throughput_frac": pl.Float64(),
        "dram_throughput_frac": pl.Float64(),
    }
)

TO_COLLECT = (
    "collect with `ncu --set roofline --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,"
    "lts__t_bytes.sum,regex:sm__ops_path_tensor_src_.*` and export with `--csv --page raw`"
)

# Unit word, lower case -> dimension and factor to its base unit. A kilobyte of Nsight Compute has 1,000 bytes.
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_TIMES = {"n": 1.0, "u": 1e3, "µ": 1e3, "μ": 1e3, "m": 1e6, "": 1e9}
_UNITS = {
    "%": ("frac", 0.01),
    **{word: ("count", 1.0) for word in ("", "inst", "cycle", "thread", "op", "sector", "warp")},
    **{f"{p}{word}": ("ns", f) for p, f in _TIMES.items() for word in ("s", "second")},
    **{f"{p}{word}": ("bytes", f) for p, f in _PREFIXES.items() for word in ("b", "byte")},
    **{f"{p}hz": ("count/s", f) for p, f in _PREFIXES.items()},
}

# The details page shows metrics under titles; two of one title differ in whether their unit is a share or a rate.
_TITLES = {
    ("Duration", ""): "gpu__time_duration.sum",
    ("Compute (SM) Throughput", "%"): "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    ("SOL SM", "%"): "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    ("DRAM Throughput", "%"): "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ("SOL DRAM", "%"): "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ("Memory Throughput", "/"): "dram__bytes.sum.per_second",
}
_PIPES = {"fp64": "d", "fp32": "f", "fp16": "h"}
_OPERATIONS = {"add": 1, "mul": 1, "fma": 2}
_TENSOR = re.compile(
    r"(?P<counter>(?:sm|smsp)__ops_path_tensor(?P<op>_op_[a-z]+)?_src_(?P<source>\w+?)(?P<target>_dst_\w+?)?"
    r"(?P<sparsity>_sparsity_(?:on|off))?)\.sum(?:\.per_second|\.per_cycle_elapsed)?"
)
_TENSOR_BUSY = re.compile(
    r"(?:sm|smsp)__(?:inst_executed_pipe_tensor|pipe_tensor(?:_op)?_cycles_active)\.(?!.*peak_sustained$).*"
)
_NUMBER = re.compile(r"[-+]?[\d.,]*\d(?:[eE][-+]?\d+)?")
_TITLE = "Kernel Name"
_QUOTES = str.maketrans("“”„‟", '""""')
_THOUSANDS = str.maketrans("", "", " '’\u00a0\u202f")

About = dict[str, str]  # the cells that say which launch it is, by title
Cells = dict[str, tuple[str, str]]  # value and unit as written, by metric


def read_ncu(path: str | Path) -> pl.DataFrame:
    """What did each profiled kernel compute and move: LAUNCHES, one row a launch, from `ncu --csv`.

    The raw page (a row a launch, units in the row below the titles) and the long form (a row a metric) are read, with
    whatever a program printed in between. FLOPs count a fused multiply-add as 2. An instruction on two packed halves
    counts once, so `fp16_flops` may be half of the truth, never more. `tensor_flops` come from the counters
    `sm__ops_path_tensor_*`, and are 0 where the tensor pipe was idle. `flops` sums the pipes that were collected; it is
    null where the tensor pipe is not known, or idle and fp32 not known. Where only rates were recorded, a count is rate
    times duration. `dtype` is the type in which most FLOPs ran. Null: not collected. Kernels were run one by one at
    fixed clocks, so durations must not be mixed with those of traces.

    Raises InputError where the file is no such table, is cut off, or holds nothing that a roofline needs.
    """
    path = Path(path)
    with about(path):
        return _launches(path)


def _launches(path: Path) -> pl.DataFrame:
    raw = path.read_bytes()
    if path.suffix == ".ncu-rep" or raw.startswith(b"NVR\0"):
        command = shlex.join(["ncu", "--import", path.name, "--csv", "--page", "raw"])
        raise InputError(
            "an Nsight Compute report, which only `ncu` can open; "
            f"run `{command} > {shlex.quote(path.stem + '.csv')}` and read the .csv file"
        )
    launches = list(_records(_rows(raw)))
    if not launches:
        raise InputError("an Nsight Compute table without a kernel: nothing was profiled")
    decimal = _decimal_sign(value for _, cells in launches for value, _ in cells.values())
    table = pl.DataFrame([_launch(about, _Values(cells, decimal)) for about, cells in launches], LAUNCHES, orient="row")
    if not any(table[c].count() for c in LAUNCHES if c.endswith(("_ns", "_flops", "_bytes", "_frac"))):
        raise InputError(f"an Nsight Compute table without any metric of a roofline; {TO_COLLECT}")
    return table


def _rows(raw: bytes) -> Iterator[list[str]]:
    """The cells of each line, in whatever encoding, with whatever quotes and separator the locale or a shell made."""
    text = raw.decode("utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "replace")
    lines = [line.translate(_QUOTES) for line in text.splitlines() if line.strip() and not line.startswith("==")]
    title = next((line for line in lines if _TITLE in line), "")
    separator = max(",;\t", key=title.count)
    if _TITLE not in _cells(title, separator):
        raise InputError(
            f"not an Nsight Compute table: found no line with the title {_TITLE}; export with `ncu --csv --page raw`"
        )
    return (_cells(line, separator) for line in lines)


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def _records(rows: Iterator[list[str]]) -> Iterator[tuple[About, Cells]]:
    """The launches of all tables among the rows, each with its cells; what a program printed is passed over."""
    header: list[str] = []
    units: list[str] = []
    long_form: dict[tuple[str | None, ...], tuple[About, Cells]] = {}
    for row in rows:
        if _TITLE in row:
            header, units = row, []
            if "ID" not in header:
                raise InputError("a summary over launches; export every launch with `ncu --csv --page raw`")
        elif len(row) != len(header):
            if header and len(row) > 1 and row[0].isdigit():
                raise InputError(f"cut off: a line has {len(row)} cells below {len(header)} titles; export it again")
        elif not row[header.index("ID")]:
            units = row
        else:
            about = dict(zip(header, row, strict=True))
            if "Metric Name" in about:
                cells = long_form.setdefault((about.get("Process ID"), about["ID"]), (about, {}))[1]
                unit = about.get("Metric Unit", "")
                title = (about["Metric Name"], "%" if unit == "%" else "/" if "/" in unit else "")
                cells.setdefault(_TITLES.get(title, title[0]), (about.get("Metric Value", ""), unit))
            elif units:
                metrics = zip(header, row, units, strict=True)
                yield about, {name: (value, unit) for name, value, unit in metrics if "__" in name}
            else:
                raise InputError("an Nsight Compute table without the row of units below its titles; export it again")
    yield from long_form.values()


def _decimal_sign(values: Iterable[str]) -> str:
    """Which of `.` and `,` begins the decimals: what some number of the file shows; where none does, the point."""
    shown = set()
    for value in values:
        number = value.translate(_THOUSANDS)
        point, comma = number.count("."), number.count(",")
        if not _NUMBER.fullmatch(number) or point + comma == 0:
            continue
        if point and comma:
            shown.add("." if number.rfind(".") > number.rfind(",") else ",")
        elif point + comma > 1:
            shown.add("," if point else ".")
        elif not re.fullmatch(r"[-+]?[1-9]\d{0,2}[.,]\d{3}", number):  # 1,234 may be either
            shown.add("." if point else ",")
    if len(shown) > 1:
        raise InputError("an Nsight Compute table in which both . and , begin decimals; export it in one locale")
    return shown.pop() if shown else "."


@dataclass(frozen=True)
class _Values:
    """The metrics of one launch in base units."""

    cells: Cells
    decimal: str

    def plain(self, name: str) -> float | None:
        """The number that stands at a metric, whatever its unit; null where none does."""
        text = self.cells.get(name, ("", ""))[0]
        number = text.partition(" (")[0].translate(_THOUSANDS)  # a metric with instances lists them behind
        if not _NUMBER.fullmatch(number):
            return None
        other = "," if self.decimal == "." else "."
        return float(number.replace(other, "").replace(self.decimal, "."))

    def get(self, name: str, dimension: str) -> float | None:
        """The value of a metric, null where it was not collected; InputError where its unit is of another dimension."""
        value, unit = self.plain(name), self.cells.get(name, ("", ""))[1]
        if value is None:
            return None
        above, _, below = unit.strip().lower().partition("/")
        found, factor = _UNITS.get(above, ("", 1.0))
        if below and below in _UNITS:
            per, divisor = _UNITS[below]
            found, factor = (
                f"{found}/{'s' if per == 'ns' else per}",
                factor / divisor * (NS_PER_S if per == "ns" else 1),
            )
        if found != dimension or (below and below not in _UNITS):
            raise InputError(f"an Nsight Compute table with {name} in {unit or 'no unit'!r}, expected {dimension}")
        return value * factor

    def first(self, dimension: str, *names: str) -> float | None:
        """The first of several metrics that was collected."""
        return next((value for name in names if (value := self.get(name, dimension)) is not None), None)

    @property
    def duration_ns(self) -> float | None:
        """How long the kernel ran."""
        return self.get("gpu__time_duration.sum", "ns")

    def total(self, counter: str, dimension: str = "count") -> float | None:
        """A counter summed over the kernel: as collected, else its rate times duration, or times cycles."""
        value = self.get(f"{counter}.sum", dimension)
        if value is not None or self.duration_ns is None:
            return value
        seconds = self.duration_ns / NS_PER_S
        rate = self.get(f"{counter}.sum.per_second", f"{dimension}/s")
        if rate is not None:
            return rate * seconds
        per_cycle = self.get(f"{counter}.sum.per_cycle_elapsed", f"{dimension}/count")
        if per_cycle is None and counter.startswith("smsp__"):  # of "sm__" it would be the peak
            scaled = [(self.plain(f"derived__{counter}_x{scale}"), scale) for scale in (2, 4)]
            per_cycle = _first(value / scale if value is not None else None for value, scale in scaled)
        clocks = ("smsp__cycles_elapsed.avg.per_second", "sm__cycles_elapsed.avg.per_second")
        cycles_per_s = self.first("count/s", *clocks)
        return None if per_cycle is None or cycles_per_s is None else per_cycle * cycles_per_s * seconds


def _launch(about: About, values: _Values) -> tuple[object, ...]:
    """A row of LAUNCHES."""
    pipes = {name: _pipe_flops(values, letter) for name, letter in _PIPES.items()}
    by_type = _tensor_flops(values)
    tensor = None if by_type is None else sum(by_type.values())
    known = {name: n for name, n in pipes.items() if n is not None}
    for name, n in (by_type or {}).items():
        known[name] = known.get(name, 0.0) + n
    is_known = tensor is not None and (tensor > 0 or pipes["fp32"] is not None)
    read = _first(values.total(f"dram__bytes{op}", "bytes") for op in ("_read", "_op_read"))
    write = _first(values.total(f"dram__bytes{op}", "bytes") for op in ("_write", "_op_write"))
    both = read + write if read is not None and write is not None else None
    busy = "throughput.avg.pct_of_peak_sustained_elapsed"
    return (
        _whole(about.get("Process ID", "")),
        _whole(about["ID"]),
        about[_TITLE],
        about.get("Grid Size"),
        about.get("Block Size"),
        values.duration_ns,
        *pipes.values(),
        tensor,
        sum(known.values()) if is_known else None,
        max(known, key=lambda name: known[name]) if is_known else None,
        read,
        write,
        _first([values.total("dram__bytes", "bytes"), both]),
        values.total("lts__t_bytes", "bytes"),
        values.get(f"sm__{busy}", "frac"),
        values.first("frac", f"dram__{busy}", f"gpu__dram_{busy}"),
    )


def _first(values: Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _pipe_flops(values: _Values, letter: str) -> float | None:
    """FLOPs of one precision outside the tensor pipe; null where not all of its three counters were collected."""
    counts = []
    for operation, n_flops in _OPERATIONS.items():
        counter = f"sass_thread_inst_executed_op_{letter}{operation}_pred_on"
        count = _first(values.total(f"{unit}__{counter}") for unit in ("sm", "smsp"))
        counts.append(None if count is None else count * n_flops)
    return None if None in counts else sum(count for count in counts if count is not None)


def _tensor_flops(values: _Values) -> dict[str, float] | None:
    """Operations of the tensor pipe by type of operand, from the counters that split them least; none where it
    was idle, null where that is not known."""
    split: dict[str, dict[tuple[bool, ...], set[str]]] = {}
    for name in values.cells:
        found = _TENSOR.fullmatch(name)
        if found and values.total(found["counter"]) is not None:
            by = tuple(found[part] is not None for part in ("op", "target", "sparsity"))
            split.setdefault(found["source"], {}).setdefault(by, set()).add(found["counter"])
    if split:
        least = {source: kinds[min(kinds)] for source, kinds in split.items()}
        return {source: sum(values.total(c) or 0.0 for c in counters) for source, counters in least.items()}
    is_idle = any(values.plain(name) == 0 for name in values.cells if _TENSOR_BUSY.fullmatch(name))
    return {} if is_idle else None
