"""Published tables of MoE times, read in the terms of captures: what is kept and what left out. Rows are made up."""

import csv
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel import moe_perf
from perfmodel.capture import OBSERVATIONS
from perfmodel.errors import InputError
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.moe_perf import MOE_PERF, NEEDED, is_moe_perf, kernels, read_moe_perf
from perfmodel.routing import Routing, published_counts

MADE_UP: dict[str, Any] = {
    "framework": "TRTLLM",
    "version": "9.9.9",
    "device": "NVIDIA H100 80GB HBM3",
    "op_name": "moe",
    "kernel_source": "made_up_kernel",
    "moe_dtype": "bfloat16",
    "num_tokens": 64,
    "hidden_size": 2048,
    "inter_size": 768,
    "topk": 8,
    "num_experts": 128,
    "moe_tp_size": 2,
    "moe_ep_size": 1,
    "distribution": "balanced",
    "latency": 0.125,
}
EP = "of one of several expert-parallel ranks (moe_ep_size above 1)"


def row(**changes: object) -> dict[str, Any]:
    assert set(changes) <= set(MADE_UP)
    return MADE_UP | changes


def made_up_table(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "made_up_moe_perf.parquet"
    pl.DataFrame(list(rows), infer_schema_length=None, strict=False).write_parquet(path)
    return path


def only(path: Path) -> dict[str, Any]:
    table, n_left_out = read_moe_perf(path)
    assert n_left_out == {}
    return table.row(0, named=True)


def test_a_row_becomes_an_observation(tmp_path: Path) -> None:
    table, n_left_out = read_moe_perf(made_up_table(tmp_path, row()))
    assert n_left_out == {}
    assert dict(table.schema) == dict(MOE_PERF)
    found = table.row(0, named=True)
    assert len(found.pop("workload")) == 12
    assert found == {
        "op": "fused_moe",
        "shape": "h2048-i768-k8-e128",
        "n_experts": 128,
        "top_k": 8,
        "hidden": 2048,
        "inter": 384,
        "n_gemms": 3,
        "gemm_k": None,
        "gemm_n": None,
        "dtype": "bf16",
        "device": "cuda",
        "n_tokens": 64,
        "routing": "balanced",
        "tokens_per_expert": None,
        "access": "resident",
        "offload_frac": 0.0,
        "offloaded": None,
        "launch": "graph",
        "time_ns": 125000.0,
        "kernel": "trtllm/9.9.9/made_up_kernel/bf16",
        "machine": "NVIDIA H100 80GB HBM3",
        "tp": 2,
    }


def test_columns_mean_what_they_mean_in_captures() -> None:
    shared = set(MOE_PERF) & set(OBSERVATIONS)
    assert set(MOE_PERF) - shared == {"kernel", "machine", "tp"}
    assert {key: MOE_PERF[key] for key in shared - {"op"}} == {key: OBSERVATIONS[key] for key in shared - {"op"}}


def test_parts_of_one_layer_share_its_shape_and_kernels_share_a_workload(tmp_path: Path) -> None:
    rows = [row(moe_tp_size=tp, kernel_source=kernel) for tp in (1, 2, 4) for kernel in ("made_up_a", "made_up_b")]
    table, _ = read_moe_perf(made_up_table(tmp_path, *rows))
    assert table["shape"].unique().to_list() == ["h2048-i768-k8-e128"]
    assert table["inter"].to_list() == [768, 768, 384, 384, 192, 192]
    assert table["workload"].n_unique() == 3
    assert table.group_by("workload").agg(pl.col("tp").n_unique(), pl.len()).select("tp", "len").unique().rows() == [
        (1, 2)
    ]


def test_a_workload_is_the_same_on_another_machine_and_another_with_anything_else(tmp_path: Path) -> None:
    first = only(made_up_table(tmp_path, row()))["workload"]
    same = row(device="made-up GPU", version="1", framework="VLLM", latency=9.0)
    assert only(made_up_table(tmp_path, same))["workload"] == first
    others = [
        {"num_tokens": 65},
        {"topk": 4},
        {"num_experts": 64},
        {"hidden_size": 1024},
        {"moe_tp_size": 1},
        {"moe_dtype": "fp8"},
        {"distribution": "power_law_1.2"},
    ]
    found = [only(made_up_table(tmp_path, row(**other)))["workload"] for other in others]
    assert len({first, *found}) == 1 + len(others)


@pytest.mark.parametrize(
    ("moe_dtype", "dtype", "in_kernel"),
    [
        ("bfloat16", "bf16", "bf16"),
        ("float16", "fp16", "fp16"),
        ("fp8", "fp8", "fp8"),
        ("fp8_block", "fp8", "fp8_block"),
        ("FP8_BLOCK", "fp8", "fp8_block"),
        ("nvfp4", "nvfp4", "nvfp4"),
        ("int4_wo", "int4-g128", "int4_wo"),
        ("w4afp8", "int4-g128", "w4afp8"),
        ("w4a16_mxfp4", "mxfp4", "w4a16_mxfp4"),
        ("w4a8_mxfp4_mxfp8", "mxfp4", "w4a8_mxfp4_mxfp8"),
        ("w4a8_mxfp4_fp8", "mxfp4", "w4a8_mxfp4_fp8"),
    ],
)
def test_a_dtype_names_its_weights_and_the_kernel_keeps_what_was_written(
    tmp_path: Path, moe_dtype: str, dtype: str, in_kernel: str
) -> None:
    found = only(made_up_table(tmp_path, row(moe_dtype=moe_dtype)))
    assert (found["dtype"], found["kernel"].split("/")[-1]) == (dtype, in_kernel)


def test_every_dtype_has_known_bytes() -> None:
    assert set(moe_perf.WEIGHTS.values()) <= set(WEIGHT_BYTES)


@pytest.mark.parametrize(
    ("changes", "n_gemms"),
    [
        ({}, 3),
        ({"kernel_source": "made_up_NonGated"}, 2),
        ({"hidden_size": 2688, "inter_size": 1856, "topk": 6, "num_experts": 128}, 2),
        ({"hidden_size": 1024, "inter_size": 2688, "topk": 22, "num_experts": 512}, 2),
        ({"hidden_size": 4096, "inter_size": 2688, "topk": 22, "num_experts": 512}, 2),
        ({"hidden_size": 2048, "inter_size": 5120, "topk": 22, "num_experts": 512}, 2),
        ({"hidden_size": 8192, "inter_size": 5120, "topk": 22, "num_experts": 512, "moe_tp_size": 8}, 2),
        ({"hidden_size": 8192, "inter_size": 5120, "topk": 8, "num_experts": 512}, 3),
    ],
)
def test_plain_experts_are_known_by_the_kernel_or_by_the_layer(
    tmp_path: Path, changes: dict[str, Any], n_gemms: int
) -> None:
    assert only(made_up_table(tmp_path, row(**changes)))["n_gemms"] == n_gemms


REFUSED = [
    ("of an op_name other than moe", {"op_name": "gemm"}),
    ("without framework, version, device or kernel_source", {"kernel_source": None}),
    ("without framework, version, device or kernel_source", {"version": " "}),
    ("with sizes that no layer has", {"num_tokens": 0}),
    ("with sizes that no layer has", {"hidden_size": 0.5}),
    ("with sizes that no layer has", {"inter_size": None}),
    ("with sizes that no layer has", {"topk": 129}),
    (EP, {"moe_ep_size": 2}),
    ("of a moe_dtype that is not known", {"moe_dtype": "made_up_dtype"}),
    ("of a moe_dtype that is not known", {"moe_dtype": None}),
    ("of a distribution that cannot be rebuilt", {"distribution": "made_up"}),
    ("of a distribution that cannot be rebuilt", {"distribution": None}),
    ("with an inter_size that moe_tp_size does not divide", {"moe_tp_size": 5}),
    ("without a positive latency", {"latency": 0.0}),
    ("without a positive latency", {"latency": -1.0}),
    ("without a positive latency", {"latency": float("nan")}),
    ("without a positive latency", {"latency": float("inf")}),
    ("without a positive latency", {"latency": None}),
]


@pytest.mark.parametrize(("reason", "changes"), REFUSED)
def test_a_row_that_cannot_be_used_is_counted_with_its_reason(
    tmp_path: Path, reason: str, changes: dict[str, Any]
) -> None:
    bad = row(**changes)
    table, n_left_out = read_moe_perf(made_up_table(tmp_path, row(), bad, bad))
    assert (table.height, n_left_out) == (1, {reason: 2})
    with pytest.raises(InputError, match=r"has no measurement that can be used: 1 ") as caught:
        read_moe_perf(made_up_table(tmp_path, bad))
    assert reason in str(caught.value)


def test_rows_kept_and_left_out_are_all_rows(tmp_path: Path) -> None:
    rows = [row(), row(), *(row(**changes) for _, changes in REFUSED)]
    table, n_left_out = read_moe_perf(made_up_table(tmp_path, *rows))
    assert table.height + sum(n_left_out.values()) == len(rows)
    assert set(n_left_out) == {reason for reason, _ in REFUSED} | {moe_perf.MEASURED_AGAIN}


def test_of_repeated_measurements_the_median_is_kept(tmp_path: Path) -> None:
    rows = [row(latency=x) for x in (0.1, 0.2, 0.9)]
    rows.insert(1, row(version="8", latency=5.0))
    table, n_left_out = read_moe_perf(made_up_table(tmp_path, *rows))
    assert table["time_ns"].to_list() == pytest.approx([2e5, 5e6])
    assert n_left_out == {moe_perf.MEASURED_AGAIN: 2}


def test_kernels_are_told_apart_by_everything_that_names_them(tmp_path: Path) -> None:
    rows = [
        row(),
        row(version="9.9.8"),
        row(framework="VLLM"),
        row(kernel_source="made_up_other"),
        *(row(moe_dtype=dtype) for dtype in ("fp8", "fp8_block")),
    ]
    table, _ = read_moe_perf(made_up_table(tmp_path, *rows))
    assert kernels(table) == [
        "trtllm/9.9.8/made_up_kernel/bf16",
        "trtllm/9.9.9/made_up_kernel/bf16",
        "trtllm/9.9.9/made_up_kernel/fp8",
        "trtllm/9.9.9/made_up_kernel/fp8_block",
        "trtllm/9.9.9/made_up_other/bf16",
        "vllm/9.9.9/made_up_kernel/bf16",
    ]


def test_column_order_further_columns_and_the_type_of_numbers_do_not_matter(tmp_path: Path) -> None:
    plain = read_moe_perf(made_up_table(tmp_path, row(), row(num_tokens=128)))[0]
    path = tmp_path / "made_up_other_form.parquet"
    rows = pl.DataFrame([row(), row(num_tokens=128)]).with_columns(power=pl.lit(1.0)).select(pl.all().reverse())
    rows = rows.reverse().select(reversed(rows.columns))
    rows.with_columns(pl.all().cast(pl.String)).write_parquet(path)
    assert read_moe_perf(path)[0].equals(plain)
    sizes = pl.col(moe_perf.SIZES)
    rows.with_columns(sizes.cast(pl.Float64), pl.col("framework").cast(pl.Categorical)).write_parquet(path)
    assert read_moe_perf(path)[0].equals(plain)


@pytest.mark.parametrize("suffix", [".txt", ".csv"])
def test_the_older_form_is_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"made_up_moe_perf{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*MADE_UP, "power"])
        writer.writeheader()
        writer.writerows([row() | {"power": ""}, row(latency=" 0.5 ", version="8")])
        writer.writeheader()  # two collectors that began the file at once
    assert is_moe_perf(path)
    table, n_left_out = read_moe_perf(path)
    assert table["time_ns"].to_list() == [125000.0, 500000.0]
    assert n_left_out == {"of an op_name other than moe": 1}


def test_other_files_are_told_apart_and_refused_in_one_sentence(tmp_path: Path) -> None:
    rows = pl.DataFrame([row()])
    paths = {
        "lacks.parquet": "is no moe_perf table: it lacks the columns kernel_source, latency",
        "not.parquet": "cannot be read as a table: ",
        "pointer.parquet": "is a Git LFS pointer, not the data; fetch it with `git lfs pull`",
        "nested.parquet": "cannot be read as a table: |has no measurement that can be used: ",
        "empty.csv": "is no moe_perf table: it lacks the columns framework, version, ",
        "binary.txt": "cannot be read as a table: |is no moe_perf table",
        "ragged.csv": "cannot be read as a table: ",
        "bare.csv": "has no measurement that can be used: no row at all",
        "other.json": r"ends in '.json', expected .parquet, .txt, .csv",
        "folder.parquet": "no such file",
        "absent.parquet": "no such file",
    }
    rows.drop("latency", "kernel_source").write_parquet(tmp_path / "lacks.parquet")
    (tmp_path / "not.parquet").write_text("made up")
    (tmp_path / "pointer.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    rows.with_columns(topk=pl.concat_list("topk")).write_parquet(tmp_path / "nested.parquet")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "ragged.csv").write_text(rows.write_csv() + "a,b\n" + ",".join(["x"] * 40) + "\n")
    (tmp_path / "bare.csv").write_text(",".join(NEEDED) + "\n")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "folder.parquet").mkdir()
    for name, words in paths.items():
        with pytest.raises(InputError, match=words) as caught:
            read_moe_perf(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: "), name
        assert "\n" not in str(caught.value)
    told = {name for name in paths if is_moe_perf(tmp_path / name)}
    assert told == {"nested.parquet", "ragged.csv", "bare.csv"}  # which have the columns
    assert is_moe_perf(made_up_table(tmp_path, row()))


@pytest.fixture(scope="module")
def published(shared: Path) -> tuple[pl.DataFrame, dict[str, int], pl.DataFrame]:
    path = shared / "data" / "moe_perf_h100_sxm.parquet"
    if not path.is_file():
        pytest.skip("the published measurements are absent")
    return *read_moe_perf(path), pl.read_parquet(path)


def test_the_published_h100_table_is_read_whole(
    published: tuple[pl.DataFrame, dict[str, int], pl.DataFrame],
) -> None:
    table, n_left_out, raw = published
    alone = raw.filter(pl.col("moe_ep_size") == 1)
    assert table.height == alone.height == 44679
    assert n_left_out == {EP: raw.height - alone.height}
    assert table["time_ns"].sum() == pytest.approx(alone["latency"].sum() * 1e6)
    assert table["shape"].n_unique() == alone.select("hidden_size", "inter_size", "topk", "num_experts").n_unique()
    assert len(kernels(table)) == 11
    assert table.select("workload", "kernel", "machine").n_unique() == table.height


def test_plain_experts_of_the_published_table_agree_with_the_kernels_that_say_so(
    published: tuple[pl.DataFrame, dict[str, int], pl.DataFrame],
) -> None:
    table = published[0]
    said = table.filter(pl.col("kernel").str.contains("nongated"))["shape"].unique()
    plain = table.filter(pl.col("n_gemms") == 2)
    assert set(said) < set(plain["shape"]) and plain["shape"].n_unique() == 4
    assert not table.filter(pl.col("n_gemms") == 3)["shape"].is_in(plain["shape"].unique().implode()).any()


def test_counts_of_the_published_table_can_be_rebuilt(
    published: tuple[pl.DataFrame, dict[str, int], pl.DataFrame],
) -> None:
    keys = published[0].select("routing", "n_experts", "top_k", "n_tokens").unique().sort(pl.all())
    for distribution, n_experts, top_k, n_tokens in keys.gather_every(7).iter_rows():
        counts = published_counts(distribution, n_experts, top_k, n_tokens, n_draws=2)
        Routing(distribution, counts, n_tokens, top_k)
