from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel.errors import InputError
from perfmodel.readers import read_trace
from perfmodel.readers.ncu import LAUNCHES, read_ncu

ABOUT = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size"]
ABOUT += ["Device", "CC"]
PRINTED = [
    "==PROF== Connected to process 42 (/synthetic/app)",
    'loss, "0.5',
    "",
    "==PROF== Disconnected from process 42",
]

SASS = "sass_thread_inst_executed_op"
FULL = {
    "gpu__time_duration.sum": ("usecond", "2.50"),
    "dram__bytes_read.sum": ("Mbyte", "1.50"),
    "dram__bytes_write.sum": ("Kbyte", "512"),
    "lts__t_bytes.sum": ("byte", "4,000,000"),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "62.5"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "80"),
    **{f"sm__{SASS}_f{op}_pred_on.sum": ("inst", n) for op, n in (("add", "10"), ("mul", "200"), ("fma", "3,000"))},
    **{f"smsp__{SASS}_h{op}_pred_on.sum": ("inst", n) for op, n in (("add", "1"), ("mul", "1"), ("fma", "1"))},
    f"sm__{SASS}_dfma_pred_on.sum": ("inst", "5"),
    "sm__ops_path_tensor_src_bf16_dst_fp32.sum": ("", "1,000,000"),
}


def quoted(cells: Sequence[str], separator: str = ",", quotes: str = '""') -> str:
    return separator.join(f"{quotes[0]}{cell}{quotes[1]}" for cell in cells)


def about(launch: int, name: str = "synthetic_gemm(float*, int)") -> list[str]:
    return [str(launch), "42", "app", "host", name, "1", "7", "(128, 1, 1)", "(80, 2, 1)", "0", "9.0"]


def raw_page(metrics: Mapping[str, tuple[str, str]], n_launches: int = 1, **style: str) -> list[str]:
    """Synthetic lines of a raw page: titles, units, a row a launch."""
    units = [unit for unit, _ in metrics.values()]
    values = [value for _, value in metrics.values()]
    rows = [[*ABOUT, *metrics], [*[""] * len(ABOUT), *units]]
    return [quoted(row, **style) for row in [*rows, *([*about(i), *values] for i in range(n_launches))]]


def long_form(metrics: Mapping[str, tuple[str, str]]) -> list[str]:
    titles = [*ABOUT, "Section Name", "Metric Name", "Metric Unit", "Metric Value", "Rule Name", "Rule Description"]
    rows = [[*about(0), "Synthetic", name, unit, value, "", ""] for name, (unit, value) in metrics.items()]
    rule = [*about(0), "Synthetic", "", "", "", "SOLBottleneck", "Do better."]
    return [quoted(row) for row in [titles, *rows, rule]]


def read(tmp_path: Path, lines: Sequence[str]) -> pl.DataFrame:
    path = tmp_path / "synthetic.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_ncu(path)


def only(table: pl.DataFrame) -> dict[str, Any]:
    assert table.schema == LAUNCHES
    assert table.height == 1
    return table.row(0, named=True)


@pytest.mark.parametrize("form", [raw_page, long_form])
def test_counters_in_base_units(tmp_path: Path, form: Any) -> None:
    launch = only(read(tmp_path, [*PRINTED[:3], *form(FULL), PRINTED[3]]))
    assert launch == pytest.approx(
        {
            "process": 42,
            "id": 0,
            "name": "synthetic_gemm(float*, int)",
            "grid": "(80, 2, 1)",
            "block": "(128, 1, 1)",
            "duration_ns": 2500.0,
            "fp64_flops": None,  # two of its three counters were not collected
            "fp32_flops": 10 + 200 + 2 * 3000.0,
            "fp16_flops": 1 + 1 + 2 * 1.0,
            "tensor_flops": 1e6,
            "flops": 1e6 + 6210 + 4,
            "dtype": "bf16",
            "dram_read_bytes": 1.5e6,
            "dram_write_bytes": 512e3,
            "dram_bytes": 2.012e6,
            "l2_bytes": 4e6,
            "sm_throughput_frac": 0.625,
            "dram_throughput_frac": 0.8,
        }
    )


def test_rates_become_counts_over_the_duration(tmp_path: Path) -> None:
    """What `--set roofline` collects: operations per elapsed cycle, cycles and bytes per second."""
    per_cycle = {f"smsp__{SASS}_f{op}_pred_on.sum.per_cycle_elapsed": ("inst/cycle", "100") for op in ("add", "mul")}
    metrics = {
        "gpu__time_duration.sum": ("ms", "2"),
        "smsp__cycles_elapsed.avg.per_second": ("Ghz", "1.50"),
        "dram__bytes.sum.per_second": ("Gbyte/s", "1,000"),
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "0"),
        **per_cycle,
        f"derived__smsp__{SASS}_ffma_pred_on_x2": ("inst/cycle", "800"),
        f"derived__sm__{SASS}_ffma_pred_on_x2": ("inst/cycle", "32,768"),
    }
    launch = only(read(tmp_path, raw_page(metrics)))
    assert launch["fp32_flops"] == pytest.approx((100 + 100 + 2 * 400) * 1.5e9 * 2e-3)
    assert (launch["flops"], launch["dtype"]) == (launch["fp32_flops"], "fp32")
    assert launch["dram_bytes"] == pytest.approx(2e9)
    assert launch["dram_read_bytes"] is None
    other = {**metrics, "smsp__cycles_elapsed.avg.per_second": ("cycle/nsecond", "1.50")}
    assert only(read(tmp_path, raw_page(other)))["fp32_flops"] == pytest.approx(launch["fp32_flops"])


@pytest.mark.parametrize(
    ("unit", "value", "ns"),
    [
        ("ns", "7", 7),
        ("nsecond", "7", 7),
        ("us", "7", 7e3),
        ("µs", "7", 7e3),
        ("msecond", "7", 7e6),
        ("second", "7", 7e9),
        ("s", "0.5", 5e8),
        ("ns", "n/a", None),
        ("ns", "", None),
        ("ns", "nan", None),
        ("ns", "7 (3; 4)", 7),
        ("us", "1,234", 1_234e3),
        ("us", "1.234", 1_234),
    ],
)
def test_units_of_time(tmp_path: Path, unit: str, value: str, ns: float | None) -> None:
    metrics = {"gpu__time_duration.sum": (unit, value), "lts__t_bytes.sum": ("byte", "1")}
    assert only(read(tmp_path, raw_page(metrics)))["duration_ns"] == (None if ns is None else pytest.approx(ns))


@pytest.mark.parametrize(
    ("style", "values"),
    [
        ({}, ("1.234,5", "1.234", "2.000.000")),
        ({"separator": ";"}, ("1234,5", "1 234", "2\u202f000\u00a0000")),
        ({"quotes": "“”"}, ("1,234.5", "1,234", "2,000,000")),
        ({"separator": "\t"}, ("1’234.5", "1'234", "2,000,000")),
    ],
)
def test_numbers_and_quotes_of_any_locale(tmp_path: Path, style: dict[str, str], values: tuple[str, str, str]) -> None:
    names = ("gpu__time_duration.sum", "dram__bytes_read.sum", "lts__t_bytes.sum")
    metrics = {name: (unit, value) for name, unit, value in zip(names, ("ns", "byte", "byte"), values, strict=True)}
    launch = only(read(tmp_path, raw_page(metrics, **style)))
    assert (launch["duration_ns"], launch["dram_read_bytes"], launch["l2_bytes"]) == (1234.5, 1234, 2e6)


def test_a_table_that_powershell_redirected(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.csv"
    path.write_text("\n".join(raw_page(FULL)), encoding="utf-16")
    assert only(read_ncu(path))["duration_ns"] == 2500


def test_titles_of_the_details_page(tmp_path: Path) -> None:
    metrics = {
        "Duration": ("us", "2"),
        "Memory Throughput": ("Gbyte/second", "500"),
        "Compute (SM) Throughput": ("%", "10"),
        "DRAM Throughput": ("%", "20"),
    }
    lines = long_form(metrics)
    lines.insert(2, lines[2].replace("Gbyte/second", "%").replace('"500"', '"33"'))
    launch = only(read(tmp_path, lines))
    assert (launch["duration_ns"], launch["dram_bytes"]) == (2000, 1e6)
    assert (launch["sm_throughput_frac"], launch["dram_throughput_frac"]) == (0.1, 0.2)
    assert launch["flops"] is None


def test_launches_of_several_tables_and_processes(tmp_path: Path) -> None:
    first = raw_page({"gpu__time_duration.sum": ("ns", "5")}, n_launches=2)
    second = raw_page({"gpu__time_duration.sum": ("us", "6"), "lts__t_bytes.sum": ("byte", "8")})
    table = read(tmp_path, [*first, *PRINTED, *second])
    assert table["duration_ns"].to_list() == [5, 5, 6000]
    assert table["l2_bytes"].to_list() == [None, None, 8]
    lines = long_form({"gpu__time_duration.sum": ("ns", "5")})
    table = read(tmp_path, [*lines, lines[1].replace('"42"', '"43"').replace('"5"', '"9"')])
    assert table.select("process", "id", "duration_ns").rows() == [(42, 0, 5), (43, 0, 9)]


@pytest.mark.parametrize(
    ("counters", "flops"),
    [
        ({"src_bf16_dst_fp32": 8, "src_fp16_dst_fp32": 2}, 10),
        ({"src_bf16_dst_fp32": 8, "src_bf16_dst_fp32_sparsity_on": 0, "src_bf16_dst_fp32_sparsity_off": 8}, 8),
        ({"src_fp8_sparsity_on": 1, "src_fp8_sparsity_off": 4}, 5),
        ({"src_fp16": 9, "src_fp16_dst_fp16": 3, "src_fp16_dst_fp32": 6}, 9),
        ({"op_hmma_src_bf16_dst_fp32": 1, "op_gmma_src_bf16_dst_fp32": 7}, 8),
    ],
)
def test_tensor_operations_count_once_however_they_are_split(
    tmp_path: Path, counters: dict[str, int], flops: float
) -> None:
    metrics = {f"sm__ops_path_tensor_{name}.sum": ("", str(n)) for name, n in counters.items()}
    assert only(read(tmp_path, raw_page(metrics)))["tensor_flops"] == flops


@pytest.mark.parametrize(
    ("name", "value", "flops"),
    [
        ("sm__inst_executed_pipe_tensor.sum", "0", 0),
        ("sm__inst_executed_pipe_tensor.sum", "64", None),  # an instruction does more on a newer device
        ("sm__inst_executed_pipe_tensor_op_imma.sum", "0", None),  # others may have run
        ("sm__inst_executed_pipe_tensor.sum.peak_sustained", "0", None),
    ],
)
def test_whether_the_tensor_pipe_was_idle(tmp_path: Path, name: str, value: str, flops: float | None) -> None:
    single = {f"sm__{SASS}_f{op}_pred_on.sum": ("inst", "4") for op in ("add", "mul", "fma")}
    launch = only(read(tmp_path, raw_page({name: ("inst", value), **single})))
    assert launch["tensor_flops"] == flops
    assert launch["flops"] == (None if flops is None else 16)


def test_where_fp32_was_not_collected_other_pipes_are_not_the_whole(tmp_path: Path) -> None:
    def flops(n_tensor: str) -> float | None:
        double = {f"sm__{SASS}_d{op}_pred_on.sum": ("inst", "4") for op in ("add", "mul", "fma")}
        return only(read(tmp_path, raw_page({"sm__ops_path_tensor_src_bf16.sum": ("", n_tensor), **double})))["flops"]

    assert (flops("0"), flops("9")) == (None, 9 + 16)


BAD = {
    "report.ncu-rep": ("NVR", "ncu --import report.ncu-rep --csv --page raw > report.csv"),
    "empty.csv": ("", "found no line with the title Kernel Name"),
    "other.csv": ("a,b\n1,2\n", "found no line with the title Kernel Name"),
    "nothing.csv": ("\n".join(raw_page(FULL, n_launches=0)), "nothing was profiled"),
    "cut.csv": ("\n".join(raw_page(FULL))[:-30], "cut off: a line has"),
    "no units.csv": ("\n".join(raw_page(FULL)[::2]), "without the row of units"),
    "unit.csv": ("\n".join(raw_page({"lts__t_bytes.sum": ("furlong", "1")})), "lts__t_bytes.sum in 'furlong'"),
    "kind.csv": ("\n".join(raw_page({"lts__t_bytes.sum": ("us", "1")})), "in 'us', expected bytes"),
    "blank.csv": ("\n".join(raw_page({"lts__t_bytes.sum": ("", "1")})), "in 'no unit', expected bytes"),
    "both.csv": ("\n".join(raw_page({"lts__t_bytes.sum": ("byte", "0.5"), "x__y": ("", "0,5")})), "one locale"),
    "useless.csv": ("\n".join(raw_page({"launch__registers": ("", "32")})), "--set roofline --metrics"),
    "summary.csv": ('"Kernel Name","Invocations","Metric Name"\n"k","2","Duration"\n', "a summary over launches"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError) as refusal:
        read_ncu(path)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_files_that_are_not_there_and_counters_in_place_of_a_trace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_ncu(tmp_path / "none.csv")
    for lines in ([*PRINTED[:1], *raw_page(FULL)], raw_page(FULL)):
        path = tmp_path / "synthetic.csv"
        path.write_text("\n".join(lines))
        with pytest.raises(InputError, match=r"counters of Nsight Compute.*--ncu FILE"):
            read_trace(path)
