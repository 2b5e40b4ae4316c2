"""What a model is fitted to: captures pooled or refused, tables split by kernel, kernels chosen by name."""

from pathlib import Path

import polars as pl
import pytest

from perfmodel.errors import InputError, NotComparableError
from perfmodel.hardware import hardware
from perfmodel.moe_perf import MOE_PERF
from perfmodel.sources import only_source, read_sources
from tests.captures_made import write_gpu_capture, write_synthetic_capture
from tests.made_up import made_up_machine
from tests.test_moe_perf import made_up_table, row

CUTLASS = "trtllm/9.9.9/made_up_cutlass"


def made_up_kernels(folder: Path, **changes: object) -> str:
    """A table of three kernels, two of which have names of which one begins the other."""
    return str(
        made_up_table(
            folder,
            *(row(kernel_source="made_up_cutlass", moe_dtype=dtype, **changes) for dtype in ("fp8", "fp8_block")),
            row(kernel_source="made_up_triton", framework="VLLM", latency=9.0, **changes),
            row(kernel_source="made_up_triton", framework="VLLM", latency=9.0, num_tokens=32, **changes),
            row(kernel_source="made_up_cutlass", latency=1.0, **changes),
        )
    )


def names(sources: list) -> list[str]:
    return [one.kernel for one in sources]


def test_a_table_is_split_by_kernel_and_its_rows_are_in_order(tmp_path: Path) -> None:
    found = read_sources([made_up_kernels(tmp_path)])
    assert names(found) == [f"{CUTLASS}/{x}" for x in ("bf16", "fp8", "fp8_block")] + ["vllm/9.9.9/made_up_triton/bf16"]
    last = found[-1]
    assert last.observations["n_tokens"].to_list() == [32, 64]
    assert last.is_screened.to_list() == [True, False]  # of 64 tokens another kernel is nine times as fast
    assert last.profile == hardware("h100-sxm") and last.offloaded.is_empty()
    assert (last.dtype, found[1].dtype, found[2].dtype) == ("bf16", "fp8", "fp8")
    assert set(last.observations.columns) == set(MOE_PERF) - {"kernel", "machine", "tp"}
    assert last.evidence == {
        "table": "made_up_moe_perf.parquet",
        "n_workloads": 2,
        "launch": "graph",
        "machine": "NVIDIA H100 80GB HBM3",
    }


def test_a_kernel_is_chosen_by_its_whole_name_else_by_a_part_of_it(tmp_path: Path) -> None:
    table = made_up_kernels(tmp_path)
    assert names(read_sources([table], f"{CUTLASS}/fp8")) == [f"{CUTLASS}/fp8"]  # and not fp8_block
    assert names(read_sources([table], "FP8")) == [f"{CUTLASS}/fp8", f"{CUTLASS}/fp8_block"]
    assert names(read_sources([table], "TRITON")) == ["vllm/9.9.9/made_up_triton/bf16"]
    with pytest.raises(InputError, match=r"no kernel contains 'marlin'; there are trtllm/9\.9\.9/made_up_c"):
        read_sources([table], "marlin")


def test_of_several_tables_a_kernel_may_be_in_one_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = str(made_up_table(tmp_path / "a", row()))
    second = made_up_kernels(tmp_path / "b")
    for order in ([first, second], [second, first]):
        assert names(read_sources(order, "triton")) == ["vllm/9.9.9/made_up_triton/bf16"]


def test_a_gpu_without_a_profile_needs_one_only_where_its_kernel_is_wanted(tmp_path: Path) -> None:
    table = str(made_up_table(tmp_path, row(), row(device="NVIDIA Z1", kernel_source="another_kernel")))
    assert names(read_sources([table], "made_up_kernel")) == ["trtllm/9.9.9/made_up_kernel/bf16"]
    with pytest.raises(InputError, match="'NVIDIA Z1'; give one with --hardware"):
        read_sources([table])
    machine = made_up_machine("synthetic-z1")
    assert {one.profile.name for one in read_sources([table], machine=machine)} == {"synthetic-z1"}


def test_kernels_are_never_pooled(tmp_path: Path) -> None:
    found = read_sources([made_up_kernels(tmp_path)])
    with pytest.raises(InputError, match="4 kernels cannot share a model, choose one with --kernel: trtllm"):
        only_source(found)
    assert only_source(found[:1]) is found[0]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    table = made_up_table(tmp_path, row(), row(moe_ep_size=2), row(num_tokens=0))
    read_sources([str(table)], progress=said.append)
    assert said == [
        "left out: 1 measurement with sizes that no layer has",
        "left out: 1 measurement of one of several expert-parallel ranks (moe_ep_size above 1)",
    ]


def test_captures_of_one_machine_are_pooled(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    b = write_synthetic_capture(tmp_path / "b", noise=lambda: 2.0)
    said: list[str] = []
    source = only_source(read_sources([str(a), str(b)], progress=said.append))
    assert source.name == "a, b" and source.kernel == "synthetic" and source.dtype == "fp32"
    assert said == ["32 workloads of 4 shapes"]
    assert source.is_screened.to_list() == [True] * 32 and source.offloaded.is_empty()
    assert [c["name"] for c in source.evidence["captures"]] == ["a", "b"]
    alone = only_source(read_sources([str(a)])).observations
    both = source.observations.join(alone, on="workload", suffix="_alone")
    ratio = both.select(pl.col("time_ns") / pl.col("time_ns_alone")).to_series()
    assert ratio.to_list() == pytest.approx([1.5] * 32, rel=1e-3)  # the median of five runs and five twice as long


def test_captures_that_differ_are_two_sources_unless_they_must_agree(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    b = write_synthetic_capture(tmp_path / "b", machine={"cpu_model": "another synthetic CPU"})
    c = write_synthetic_capture(tmp_path / "c", noise=lambda: 2.0)
    found = read_sources([str(a), str(b), str(c)])
    assert sorted(one.name for one in found) == ["a, c", "b"]
    with pytest.raises(NotComparableError, match=r"'a' and 'b' differ in .* and cannot share a model"):
        read_sources([str(a), str(b)], must_agree=True)
    assert only_source(read_sources([str(a), str(c)], must_agree=True)).name == "a, c"


def test_the_same_capture_twice_is_refused(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    b = write_synthetic_capture(tmp_path / "b", machine={"cpu_model": "another synthetic CPU"})
    for must_agree in (False, True):
        with pytest.raises(InputError, match="'a' holds the same measurements as one given before it"):
            read_sources([str(a), str(a)], must_agree=must_agree)
    with pytest.raises(InputError, match="the same measurements"):
        read_sources([str(a), str(b), str(a)])


def test_a_capture_and_a_table_are_two_sources(tmp_path: Path) -> None:
    capture = write_synthetic_capture(tmp_path / "a")
    table = made_up_table(tmp_path, row())
    assert names(read_sources([str(table), str(capture)])) == ["synthetic", "trtllm/9.9.9/made_up_kernel/bf16"]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "not a capture folder"), (tmp_path / "none.parquet", "no such file")):
        with pytest.raises(InputError, match=words):
            read_sources([str(path)])


def test_what_a_capture_measured_in_another_dtype_is_a_kernel_to_be_asked_for(tmp_path: Path) -> None:
    capture, said = str(write_gpu_capture(tmp_path / "made-up")), []
    main = only_source(read_sources([capture], progress=said.append))
    assert (main.kernel, main.dtype, set(main.observations["dtype"])) == ("synthetic", "bf16", {"bf16"})
    assert said[-1] == "for measurements in another dtype add --kernel fp8"
    fp8 = only_source(read_sources([capture], "fp8"))
    assert (fp8.kernel, fp8.dtype, set(fp8.observations["dtype"])) == ("synthetic/fp8", "fp8", {"fp8"})
    assert set(fp8.offloaded["dtype"]) == {"fp8"}
    again = only_source(read_sources([capture], "synthetic"))
    assert again.kernel == "synthetic" and again.observations.equals(main.observations)


def test_resident_workloads_of_the_rarer_launch_stand_beside_offloaded_ones_alone(tmp_path: Path) -> None:
    source = only_source(read_sources([str(write_gpu_capture(tmp_path / "made-up"))]))
    assert source.observations["launch"].is_null().all() and source.other_launch is not None
    assert set(source.other_launch["launch"]) == {"graph"} and set(source.other_launch["access"]) == {"resident"}
    assert not set(source.other_launch["workload"]) & set(source.observations["workload"])
    assert "graph" in set(source.offloaded["launch"])


def test_a_kernel_of_another_version_is_found_where_that_is_wanted(tmp_path: Path) -> None:
    table = made_up_kernels(tmp_path)
    asked = f"{CUTLASS}/fp8".replace("9.9.9", "1.0")
    assert names(read_sources([table], asked, any_version=True)) == [f"{CUTLASS}/fp8"]
    assert names(read_sources([table], f"{CUTLASS}/fp8", any_version=True)) == [f"{CUTLASS}/fp8"]
    with pytest.raises(InputError, match="no kernel contains"):
        read_sources([table], asked)
    with pytest.raises(InputError, match=r"no kernel contains .* \(choose with --kernel\)"):
        read_sources([table], asked.replace("cutlass", "marlin"), any_version=True)


def test_machines_are_never_pooled_and_no_kernel_is_asked_for_where_there_is_one(tmp_path: Path) -> None:
    table = made_up_table(tmp_path, row(), row(device="NVIDIA H200"))
    with pytest.raises(InputError, match=r"several machines cannot share a model.* on h100-sxm, .* on h200-sxm"):
        only_source(read_sources([str(table)]))
