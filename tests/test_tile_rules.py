"""Launch configurations: defaults at their thresholds, the nearest tuned batch size, shapes that nobody tuned."""

import polars as pl
import pytest

from perfmodel import tile_rules
from perfmodel.physics import TILE_FIELDS
from perfmodel.tile_rules import TileRule, candidates
from tests.made_up import made_up_machine, made_up_observations

NOBODYS = (7, 333)  # experts and inter that no file is for


def default(framework: str, n_tokens: int, dtype: str = "bf16", n_experts: int = NOBODYS[0]) -> dict[str, float]:
    found = TileRule(framework, "h100-sxm", dtype).at(n_experts, NOBODYS[1], n_tokens)
    assert found.shape == (1, len(TILE_FIELDS))
    return dict(zip(TILE_FIELDS, found[0].tolist(), strict=True))


@pytest.mark.parametrize(
    ("n_tokens", "rows", "cols", "terms", "warps", "stages"),
    [
        (1, 16, 64, 128, 4, 4),
        (32, 16, 64, 128, 4, 4),
        (33, 32, 64, 128, 4, 3),
        (64, 32, 64, 128, 4, 3),
        (65, 32, 128, 64, 4, 3),
        (96, 32, 128, 64, 4, 3),
        (97, 64, 128, 64, 4, 3),
        (128, 64, 128, 64, 4, 3),
        (129, 64, 128, 64, 8, 3),
        (512, 64, 128, 64, 8, 3),
        (513, 128, 128, 64, 8, 3),
    ],
)
def test_vllm_defaults_change_where_they_say(
    n_tokens: int, rows: int, cols: int, terms: int, warps: int, stages: int
) -> None:
    found = default("vllm", n_tokens)
    assert [found[k] for k in ("rows", "cols", "terms", "warps", "stages")] == [rows, cols, terms, warps, stages]
    assert found["is_tuned"] == 0
    assert default("vllm", n_tokens, "fp8")["terms"] == 128


def test_vllm_groups_tiles_of_many_tokens_an_expert_and_blocks_of_quantised_weights() -> None:
    assert [default("vllm", n)["group"] for n in (7 * 128, 7 * 129 - 1, 7 * 129)] == [1, 1, 16]
    blocks = [default("vllm", n, "fp8_block") for n in (16, 17, 64, 65)]
    assert [(one["rows"], one["group"]) for one in blocks] == [(16, 1), (16, 32), (16, 32), (64, 32)]
    assert {(one["cols"], one["terms"]) for one in blocks} == {(128, 128)}


def test_sglang_defaults_change_with_the_tokens_of_an_expert() -> None:
    few, many = (default("sglang", n) for n in (7, 8))
    assert (few["rows"], few["cols"], few["terms"], few["group"]) == (16, 32, 64, 1)
    assert (many["rows"], many["cols"], many["terms"], many["group"]) == (64, 64, 32, 8)
    few, many = (default("sglang", n, "fp8") for n in (7, 8))
    assert (few["rows"], few["cols"], few["warps"]) == (64, 128, 4)
    assert (many["rows"], many["cols"], many["warps"]) == (128, 256, 8)
    assert default("sglang", 1, "fp8_block") == default("sglang", 10**6, "fp8_block")


def test_of_tuned_batch_sizes_the_nearest_counts_and_the_smaller_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {8: (16.0, 64.0, 64.0, 1.0, 4.0, 3.0), 16: (32.0,) * 6, 64: (64.0,) * 6}
    monkeypatch.setattr(tile_rules, "_tuned", lambda *_: {(8, 512): tuned})
    rule = TileRule("vllm", "synthetic", "bf16")
    rows = {n: rule.at(8, 512, n)[0, 0] for n in (1, 8, 11, 12, 13, 39, 40, 41, 10**6)}
    assert rows == {1: 16, 8: 16, 11: 16, 12: 16, 13: 32, 39: 32, 40: 32, 41: 64, 10**6: 64}
    assert rule.at(8, 512, 8)[0].tolist() == [*tuned[8], 1.0]
    assert rule.at(8, 513, 8)[0, -1] == rule.at(9, 512, 8)[0, -1] == 0.0


def test_every_shipped_file_is_found_by_its_framework_machine_and_dtype() -> None:
    table = pl.read_parquet(tile_rules.TABLE).with_columns(pl.col("framework", "device", "dtype").cast(pl.String))
    mine = table.filter(framework="vllm", device="NVIDIA_H100_80GB_HBM3", dtype="bf16")
    assert mine.height > 100
    rule = TileRule("vllm", "h100-sxm", "bf16")
    for row in mine.sample(30, seed=0).iter_rows(named=True):
        expected = [float(row[name]) for name in TILE_FIELDS[:-1]]
        assert rule.at(row["n_experts"], row["inter"], row["n_tokens"])[0].tolist() == [*expected, 1.0]
    elsewhere = TileRule("vllm", "synthetic-gpu", "bf16")  # a machine that nobody tuned for
    assert elsewhere.at(row["n_experts"], row["inter"], row["n_tokens"])[0, -1] == 0.0


def test_rows_of_a_table_have_each_their_own() -> None:
    observations = made_up_observations(tokens=(4096, 1, 64))
    rule = TileRule("vllm", "h100-sxm", "bf16")
    found = rule.of(observations)
    assert found.shape == (observations.height, len(TILE_FIELDS))
    for i in (0, 1, 2, 17, observations.height - 1):
        row = observations.row(i, named=True)
        assert found[i].tolist() == rule.at(row["n_experts"], row["inter"], row["n_tokens"])[0].tolist()


def test_only_triton_kernels_may_follow_a_rule() -> None:
    machine = made_up_machine("synthetic")
    assert candidates("trtllm/1/cutlass/bf16", machine) == [None]
    found = candidates("sglang/0/made_up_triton/fp8_block", machine)
    assert found == [TileRule("sglang", "synthetic", "fp8_block"), TileRule("vllm", "synthetic", "fp8_block"), None]
    own = candidates("vllm/0/made_up_Triton/mxfp4", machine)[0]
    assert own == TileRule("vllm", "synthetic", "bf16")
    assert [rule.framework for rule in candidates("made_up_triton", machine)[:-1]] == ["vllm", "sglang"]
