"""Expert-parallel schedules: bounds, published identities, and refusals."""

import csv
from pathlib import Path

import pytest

from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.moe import MoEShape
from perfmodel.schedule import (
    SCHEDULES,
    layer_schedule,
    overlap_efficiency,
    padding_saved_frac,
    symmetric_buffer_bytes,
    throughput_tokens_per_s,
)

SXM = hardware("h100-sxm")
PAPER = MoEShape("flashmoe-paper", n_experts=32, top_k=2, hidden=2048, inter=2048, n_gemms=2)


@pytest.mark.parametrize("tokens", [128, 4096, 65_536])
def test_fused_is_no_slower_than_chunked_than_bulk_and_none_beats_its_longest_phase(tokens: int) -> None:
    bulk, chunked, fused = (layer_schedule(PAPER, SXM, 8, tokens, name) for name in SCHEDULES)
    assert fused.latency_ns <= chunked.latency_ns
    assert fused.latency_ns <= bulk.latency_ns == pytest.approx(sum(bulk.phases.values()))
    for one in (bulk, chunked, fused):
        assert one.latency_ns >= max(one.phases.values())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_more_tokens_never_take_less_time(schedule: str) -> None:
    latencies = [layer_schedule(PAPER, SXM, 8, 2**i, schedule).latency_ns for i in range(18)]
    assert latencies == sorted(latencies)


def test_one_gpu_sends_nothing() -> None:
    alone = layer_schedule(PAPER, SXM, 1, 4096, "bulk")
    assert alone.phases["dispatch"] == alone.phases["combine"] == 0


def test_dispatch_moves_the_remote_share_of_the_rows() -> None:
    phases = layer_schedule(PAPER, SXM, 8, 4096, "bulk").phases
    moved = 4096 * 2 * 2048 * 2 * 7 / 8
    assert phases["dispatch"] == pytest.approx(20_000 + moved / 450)  # 450 bytes per ns


def test_published_identities(shared: Path) -> None:
    with (shared / "reference" / "flashmoe_latency.csv").open() as file:
        ms = {(r["system"], int(r["tokens_per_gpu"])): float(r["forward_ms"]) for r in csv.DictReader(file)}
    # 17.7 million tokens per second at 8 GPUs (Fig 10).
    assert throughput_tokens_per_s(8192, 8, ms["flashmoe", 8192] * 1e6) == pytest.approx(17.7e6, rel=0.005)
    assert overlap_efficiency(0.9, 1.0) == pytest.approx(0.9)


def test_symmetric_buffer_and_padding_by_hand() -> None:
    assert symmetric_buffer_bytes(100.0, 8192, 32) == 400  # 256 tokens an expert fill a tile of 128
    assert symmetric_buffer_bytes(100.0, 8192, 128) == 800  # 64 an expert fill half a tile
    assert padding_saved_frac([128, 64, 0, 64], 128) == pytest.approx(0.5)
    with pytest.raises(InputError, match="more than the capacity"):
        padding_saved_frac([129], 128)


def test_refusals() -> None:
    with pytest.raises(InputError, match="known: bulk"):
        layer_schedule(PAPER, SXM, 8, 64, "magic")
    with pytest.raises(InputError, match="cannot share 32 experts"):
        layer_schedule(PAPER, SXM, 5, 64, "bulk")
    with pytest.raises(InputError, match="peer_link"):
        layer_schedule(PAPER, hardware("gh200"), 8, 64, "bulk")
