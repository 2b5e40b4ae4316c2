"""Who waits for whom: collectives matched over ranks with waits that are known, whatever the ranks' clocks say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.passes.ranks import LayerRanks, layers_of_file, summarise_layers
from perfmodel.waits import (
    BUSY,
    COLLECTIVES,
    MEMBER,
    Waits,
    collectives,
    compute_of_steps,
    late_members,
    matched_waits,
    straggler_statistics,
    waits_of_steps,
)
from tests.traces_made import complete, events, kernel, launch, write_json

Json = dict[str, Any]
Arrivals = list[list[int]]  # of each occurrence, when each rank arrives
EXCHANGE_NS = 100  # how long an exchange takes once the last rank has come


def table(arrivals: Arrivals, clocks: list[int] | None = None, name: str = "all_to_all", **more: Any) -> pl.DataFrame:
    """COLLECTIVES of ranks that arrive so, each on its own clock."""
    rows = []
    for times in arrivals:
        end = max(times) + EXCHANGE_NS
        rows += [
            {"rank": r, "name": name, "start_ns": at + (clocks[r] if clocks else 0), "dur_ns": end - at, **more}
            for r, at in enumerate(times)
        ]
    return pl.DataFrame(rows, schema=COLLECTIVES)


def waits(found: pl.DataFrame) -> Waits:
    return matched_waits(found, found.select(MEMBER).unique())


def by_rank(found: Waits, column: str) -> list[list[Any]]:
    """A column of each occurrence, a list over ranks, in order."""
    one = found.occurrences.sort("step", "name", "group", "nth", "rank", nulls_last=False)
    return [part[column].to_list() for part in one.partition_by("step", "name", "group", "nth", maintain_order=True)]


ARRIVALS = [[0, 30, 70], [1000, 1000, 1000], [2050, 2000, 2010], [3000, 3001, 3009]]


def test_a_wait_is_the_duration_beyond_that_of_the_last_to_come() -> None:
    found = waits(table(ARRIVALS))
    assert by_rank(found, "wait_ns") == [[70, 40, 0], [0, 0, 0], [0, 50, 40], [9, 8, 0]]
    assert by_rank(found, "is_last") == [
        [False, False, True], [True, False, False], [True, False, False], [False, False, True],
    ]  # fmt: skip
    assert found.notes == ()
    steps = waits_of_steps(found)
    assert steps["wait_ns"].to_list() == [79, 98, 40]
    assert steps["n_last"].to_list() == [2, 0, 2]
    assert steps["caused_ns"].to_list() == [90, 0, 127]
    assert steps["caused_ns"].sum() == steps["wait_ns"].sum()


clock = st.integers(-(10**18), 10**18)
arrivals = st.lists(st.lists(st.integers(0, 10**6), min_size=3, max_size=3), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(arrivals, st.lists(clock, min_size=3, max_size=3), st.integers(0, 10**6))
def test_moving_the_clock_of_a_rank_changes_no_wait(made: Arrivals, clocks: list[int], jitter: int) -> None:
    apart = [[at + i * 10**7 for at in times] for i, times in enumerate(made)]
    known = [[max(times) - at for at in times] for times in apart]
    for offsets in (None, clocks):
        found = waits(table(apart, offsets))
        assert by_rank(found, "wait_ns") == known
    # Where ends do not agree, the verdict does not depend on clocks either.
    rough = table(apart).with_columns(dur_ns=pl.col("dur_ns") + pl.col("rank") * jitter * (pl.col("start_ns") % 3))
    moved = rough.with_columns(start_ns=pl.col("start_ns") + pl.col("rank").replace_strict(dict(enumerate(clocks))))
    assert by_rank(waits(rough), "wait_ns") == by_rank(waits(moved), "wait_ns")


def test_ranks_that_show_different_numbers_of_a_name_are_not_matched_in_that_step() -> None:
    steps = pl.concat([table(ARRIVALS, step=1), table([[t + 10**4 for t in one] for one in ARRIVALS], step=2)])
    lacking = steps.filter(~((pl.col("step") == 1) & (pl.col("rank") == 1) & (pl.col("start_ns") == 30)))
    found = waits(lacking)
    assert found.occurrences["step"].unique().to_list() == [2]
    assert found.notes == ("all_to_all left out in 1 step: ranks show different numbers of them",)


def test_collectives_of_several_groups_are_matched_within_theirs() -> None:
    """Ranks 0 and 2, and 1 and 3, each in a group, beside one of all: the n-th of a name would mix them."""
    pairs = {"[0, 2]": (0, 2), "[1, 3]": (1, 3)}
    rows = []
    for shift, (ranks, members) in enumerate(pairs.items()):
        group = json.dumps([str(shift), json.loads(ranks)])
        for i in range(4):
            at = 1000 * i + 400 * shift
            late = {members[0]: at, members[1]: at + 10 * (i + 1) * (shift + 1)}
            end = max(late.values()) + EXCHANGE_NS
            rows += [
                {"rank": r, "name": "all_to_allv", "group": group, "start_ns": t, "dur_ns": end - t}
                for r, t in late.items()
            ]
    found = waits(pl.DataFrame(rows, schema=COLLECTIVES))
    assert found.notes == ()
    assert by_rank(found, "wait_ns") == [[10, 0], [20, 0], [30, 0], [40, 0], [20, 0], [40, 0], [60, 0], [80, 0]]
    alone = pl.DataFrame([{"rank": 0, "name": "x", "group": '["9", [0, 7]]', "start_ns": 0, "dur_ns": 9}], COLLECTIVES)
    assert waits(pl.concat([pl.DataFrame(rows, schema=COLLECTIVES), alone])).occurrences.height == 16


def test_what_does_not_end_together_is_not_taken_for_one_collective() -> None:
    """Two groups that no trace names, each regular by itself: their n-th ends drift apart."""
    rng = np.random.default_rng(0)
    apart = np.cumsum(rng.integers(10**6, 3 * 10**6, (2, 9)), axis=1)
    rows = [
        {"rank": r, "name": "nccl", "start_ns": int(t), "dur_ns": 2000} for r, times in enumerate(apart) for t in times
    ]
    found = waits(pl.DataFrame(rows, schema=COLLECTIVES))
    assert found.occurrences.is_empty()
    assert "nccl left out: what would be matched does not run together" in found.notes[0]


def test_too_few_to_check_are_matched_and_said_to_be() -> None:
    found = waits(table(ARRIVALS[:2]))
    assert found.occurrences.height == 6
    assert "could not be checked" in found.notes[0]


def test_straggler_statistics_are_those_of_the_paper() -> None:
    """t / t_a of 3, 1, 2 and none where the fastest took no time; the delay counts there too."""
    pairs = [(10, 30), (20, 20), (40, 80), (0, 500)]
    rows = [{"nth": i, "dur_ns": dur} for i, pair in enumerate(pairs) for dur in pair]
    found = straggler_statistics(pl.DataFrame(rows), ["nth"])
    assert found == {"n": 4, "ratio_median": 2.0, "ratio_p95": pytest.approx(2.9), "delay_max_ns": 500}
    assert straggler_statistics(pl.DataFrame(rows[:1]), ["nth"])["ratio_median"] is None


def test_the_late_rank_and_what_it_computed_longer() -> None:
    found = waits_of_steps(waits(table(ARRIVALS, step=3)))
    seconds = {0: {"gemm": 100, "attention": 50}, 1: {"gemm": 120, "attention": 50}, 2: {"gemm": 200, "attention": 90}}
    rows = [
        {"rank": r, "device": None, "step": 3, "class": kind, "time_ns": t}
        for r, one in seconds.items()
        for kind, t in {**one, BUSY: sum(one.values())}.items()
    ]
    schema = {"rank": pl.Int32, "device": pl.Int64, "step": pl.Int64, "class": pl.String, "time_ns": pl.Int64}
    row = late_members(found, pl.DataFrame(rows, schema=schema)).row(0, named=True)
    assert row == row | {
        "step": 3, "rank": 2, "caused_ns": 127, "n_last": 2, "wait_ns": 217, "class": "gemm", "longer_ns": 90,
        "busy_longer_ns": 130,
    }  # fmt: skip


def test_collectives_of_a_device_bear_their_names_groups_and_steps() -> None:
    said = '["all_to_allv", 3, "[0, 1]"]'
    made = events(
        {"kind": "range", "name": "ProfilerStep#4", "start_ns": 0, "dur_ns": 100},
        launch(10, 1),
        kernel(200, 50, link=1, name="ncclDevKernel_SendRecv", collective=said),
        kernel(300, 5, link=2, name="deep_ep::combine"),
        launch(20, 3),
        kernel(400, 7, link=3, name="grouped_gemm"),
    )
    found = collectives(made).select("step", "name", "group", "dur_ns").rows()
    assert found == [(4, "all_to_allv", '["3", [0, 1]]', 50), (None, "deep_ep::combine", None, 5)]
    compute = compute_of_steps(made).select("step", "class", "time_ns").rows()
    assert compute == [(4, BUSY, 7), (4, "grouped_gemm", 7)]


def test_ranges_of_a_host_that_launches_kernels_are_no_collectives() -> None:
    issued = {"kind": "range", "name": "nccl:all_to_all", "start_ns": 0, "dur_ns": 9}
    assert collectives(events(issued))["name"].to_list() == ["nccl:all_to_all"]
    assert collectives(events(issued, kernel(5, name="gemm"))).is_empty()


def test_a_large_group_whose_ranks_are_not_all_written_is_known_by_its_name() -> None:
    """Groups 0 and 1 of two ranks each, of four that were read."""
    said = '["all_gather", "{}", "[0, 1, 2, ...]"]'
    one = [collectives(events(kernel(0, 5, name="nccl", collective=said.format(g))))["group"][0] for g in (0, 1)]
    assert one == ['["0", null]', '["1", null]']
    halves = [table([[0, 40], [1000, 1000], [2000, 2005]], group=group) for group in one]
    both = pl.concat([halves[0], halves[1].with_columns(pl.col("rank") + 2, pl.col("start_ns") + 777)])
    assert by_rank(waits(both), "wait_ns") == [[40, 0], [0, 0], [5, 0]] * 2


@pytest.mark.parametrize("said", ["[]", "nonsense", '["x", null, "[]"]', '["x", null, "nonsense"]', "[1]"])
def test_a_process_group_that_cannot_be_read_is_not_known(said: str) -> None:
    found = collectives(events(kernel(0, 5, name="ncclDevKernel_AllReduce", collective=said)))
    assert found["group"].to_list() == [None] and found["name"][0] in ("x", "ncclDevKernel_AllReduce")


# --- folders of ranks ------------------------------------------------------------------------------------------------


def write_rank(folder: Path, rank: int, gemm_us: list[int], base_ns: int = 17 * 10**17, world: int = 2) -> None:
    """A step a GEMM: launched at once, then an all-to-all that ends for all when the slowest has computed."""
    rows = []
    at = 0
    for i, mine in enumerate(gemm_us):
        slowest = 40  # longer than any GEMM here
        rows += [
            complete("user_annotation", f"ProfilerStep#{i}", at, 100, 1, 1),
            complete("user_annotation", "moe_layer", at + 1, 50, 1, 1),
            complete("cuda_runtime", "cudaLaunchKernel", at + 2, 1, 1, 1, correlation=2 * i + 1),
            complete("cuda_runtime", "cudaLaunchKernel", at + 4, 1, 1, 1, correlation=2 * i + 2),
            complete("kernel", "grouped_gemm", at + 10, mine, rank, 7, device=rank, stream=7, correlation=2 * i + 1),
            complete(
                "kernel", "deep_ep::combine", at + 10 + mine, slowest - mine + 10, rank, 7,
                device=rank, stream=7, correlation=2 * i + 2,
            ),
        ]  # fmt: skip
        at += 1000
    document = {"distributedInfo": {"rank": rank, "world_size": world}, "traceEvents": rows}
    write_json(folder / f"rank-{rank}.json", {**document, "baseTimeNanoseconds": base_ns})


def made_run(folder: Path, **more: Any) -> Path:
    """Two ranks; in step 1 rank 1 computes 25 µs longer, in step 2 rank 0 does by 10."""
    folder.mkdir()
    write_rank(folder, 0, [20, 10, 30], **more)
    write_rank(folder, 1, [20, 35, 20])
    return folder


def summarised(folder: Path) -> LayerRanks:
    return summarise_layers(folder, backend="sequential")


def test_a_folder_of_ranks_says_who_waits_for_whom_in_each_step(tmp_path: Path) -> None:
    found = summarised(made_run(tmp_path / "run"))
    late = found.late.select("step", "rank", "wait_ns", "class", "longer_ns").rows()
    assert late == [
        (0, 0, 0, None, None),
        (1, 1, 25_000, "grouped_gemm", 25_000),
        (2, 0, 10_000, "grouped_gemm", 10_000),
    ]
    assert found.waits["wait_ns"].to_list() == [0, 0, 25_000, 0, 0, 10_000]
    assert found.members["n_passes"].to_list() == [3, 3]
    assert found.latency_ns == 50_000
    assert found.stragglers["passes"] == {"n": 3, "ratio_median": 1.0, "ratio_p95": 1.0, "delay_max_ns": 0}
    assert found.stragglers["collectives"] == {
        "n": 3, "ratio_median": 1.5, "ratio_p95": pytest.approx(1.5 + 0.9 * (40 / 15 - 1.5)), "delay_max_ns": 25_000,
    }  # fmt: skip
    assert found.stragglers["compute"]["ratio_median"] == 1.5


def test_clocks_of_ranks_that_differ_by_days_change_nothing(tmp_path: Path) -> None:
    one, other = summarised(made_run(tmp_path / "a")), summarised(made_run(tmp_path / "b", base_ns=16 * 10**17))
    assert one.waits.equals(other.waits) and one.late.equals(other.late) and one.stragglers == other.stragglers


def test_what_a_worker_sends_is_small_and_plain(tmp_path: Path) -> None:
    file = made_run(tmp_path / "run") / "rank-1.json"
    assert json.loads(json.dumps(layers_of_file(str(file), None, None, None)))["rank"] == 1
    assert "cut off" in layers_of_file(str(write_json(tmp_path / "x.json", '{"traceEvents": [{')), None, None, None)


def test_a_rank_that_cannot_be_read_or_lacks_a_step_is_said(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    write_json(folder / "rank-2.json", '{"traceEvents": [{')
    write_rank(folder, 3, [20, 20])
    found = summarised(folder)
    assert list(found.failed) == ["rank-2.json"]
    assert found.waits["step"].unique().to_list() == [0, 1]
    assert any("deep_ep::combine left out in 1 step" in note for note in found.notes)
    assert any("passes are not compared in 1 of 3 steps" in note for note in found.notes)


def test_a_real_run_of_two_devices_in_one_trace_is_matched(shared: Path) -> None:
    found = summarised(shared / "traces" / "nsysai__mfu_2gpu_before.sqlite")
    assert found.stragglers["collectives"]["n"] == 33
    assert found.waits["wait_ns"].sum() == found.waits["caused_ns"].sum() > 0
    assert found.waits["n_last"].sum() == 33


SHIPPED = Path(__file__).parent.parent / "traces" / "epyc-zen5-4p-expert-parallel"


def test_shipped_ranks_wait_for_the_one_with_the_hot_experts_as_their_capture_says() -> None:
    """Profiles of two steps against the timers of others of the same layer, of which rank 0 has the hot experts."""
    workload = "d6b115624e20"
    found = summarised(SHIPPED / "profiles" / workload)
    assert not [note for note in found.notes if "left out" in note or "not compared" in note]
    in_steps = found.late.filter(pl.col("step").is_not_null())
    assert in_steps["rank"].to_list() == [0, 0] and set(in_steps["class"]) == {"aten::_grouped_mm"}
    timed: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(4)}
    for line in (SHIPPED / "steps.jsonl").read_text().splitlines():
        one = json.loads(line)
        if one["workload"] == workload:
            gemms = sum(dur for name, _, _, dur in one["phases"] if name.startswith("gemm"))
            timed[one["rank"]].append((one["end_ns"] - one["start_ns"], gemms))
    known = found.members.sort("rank").select("dur_ns", "compute_busy_ns").rows()
    for (dur_ns, compute_ns), steps in zip(known, timed.values(), strict=True):
        of_layer, of_gemms = np.median(steps, axis=0)
        assert dur_ns == pytest.approx(of_layer, rel=0.1)
        assert of_gemms < compute_ns < 1.25 * of_gemms  # other operators compute as well


def test_members_whose_collectives_end_apart_are_matched_whatever_their_clocks() -> None:
    """Between hosts one may have all its rows long before the others: no constant shift makes ends agree."""
    begins = np.arange(6)[:, None] * 10**8 + np.array([[0, 9, 3], [8, 0, 1], [2, 5, 0]] * 2) * 10**6
    ends = begins.max(axis=1, keepdims=True) + np.array([[9, 0, 0], [0, 5, 0], [8, 0, 4]] * 2) * 10**6 + 10**4
    for clocks in ([0, 0, 0], [0, 10**15, -(3 * 10**9)]):
        rows = [
            {"rank": r, "name": "gloo:all_to_all", "start_ns": int(begins[k, r]) + clocks[r],
             "dur_ns": int(ends[k, r] - begins[k, r])}
            for k in range(6) for r in range(3)
        ]  # fmt: skip
        found = waits(pl.DataFrame(rows, schema=COLLECTIVES))
        assert found.notes == () and found.occurrences.height == 18
    late = pl.col("start_ns") + 10**7 * pl.int_range(pl.len()).over("rank")  # a clock that runs away
    apart = pl.DataFrame(rows, schema=COLLECTIVES).with_columns(
        start_ns=pl.when(pl.col("rank") == 1).then(late).otherwise("start_ns")
    )
    assert waits(apart).occurrences.is_empty()


def test_real_ranks_whose_collectives_run_in_different_orders_are_not_matched(shared: Path, tmp_path: Path) -> None:
    for rank in (0, 1):
        name = f"hta__trace_filter__sampled_rank-{rank}.json.gz"
        (tmp_path / name).symlink_to(shared / "traces" / name)
    found = summarised(tmp_path)
    assert found.waits.is_empty() and any("does not run together" in note for note in found.notes)


# --- the command -----------------------------------------------------------------------------------------------------


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["layers", *words], catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_the_page_of_a_folder_shows_the_worst_step_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = str(made_run(tmp_path / "run"))
    page = run(folder, "--tokens", "100")
    assert "In step 1 the others wait for rank 1" in " ".join(page.split())
    assert "4,000,000 tokens/s on 2 GPUs" in " ".join(page.split())  # 200 tokens in 50 µs
    assert "In step 2 the others wait for rank 0" in " ".join(run(folder, "--step", "2").split())
    assert "In step 0 nobody waits." in run(folder, "--step", "0")
    assert {row["step"] for row in json.loads(run(folder, "--step", "2", "--json"))["waits"]} == {2}
    with pytest.raises(InputError, match=r"no step 7 .*; there are 0, 1, 2"):
        run(folder, "--step", "7")


def test_runs_on_more_gpus_have_an_overlap_efficiency(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    slow = tmp_path / "slow"
    slow.mkdir()
    for rank in range(4):
        document = json.loads((folder / f"rank-{rank % 2}.json").read_text())
        for event in document["traceEvents"]:
            event["dur"] *= 2
        write_json(slow / f"rank-{rank}.json", {**document, "distributedInfo": {"rank": rank}})
    rows = json.loads(run(f"4={slow}", f"2={folder}", "--tokens", "100", "--json"))["runs"]
    assert [row["n_gpus"] for row in rows] == [2, 4]
    assert rows[0]["overlap_efficiency_frac"] == 1
    assert rows[1]["overlap_efficiency_frac"] == pytest.approx(rows[0]["latency_ns"] / rows[1]["latency_ns"])
    assert rows[0]["tokens_per_s"] == pytest.approx(4e6)
    page = run(f"4={slow}", f"2={folder}")
    assert "O_e = T(2) / T(N)" in page and "note: 2 GPUs: 3 MoE layer passes told by" in page


def test_a_single_trace_has_a_page_of_its_passes(tmp_path: Path) -> None:
    file = str(made_run(tmp_path / "run") / "rank-0.json")
    page = run(file)
    assert "The median pass takes 50.0 µs; it has 2 kernels from 2 launch calls" in " ".join(page.split())
    found = json.loads(run(file, "--json", "--top", "1"))
    assert len(found["passes"]) == 1 and found["n_passes"] == 3 and found["how"] == "ranges"
    assert json.loads(run(file, "--json", "--step", "2"))["passes"][0]["pass"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{run}"], "found 2 traces, expected one, or N=TRACE"),
        (["2={run}", "2={run}"], "two runs on the same number of GPUs"),
        (["1={run}"], "MoE layer passes on 2 ranks or devices, expected 1 at most"),
        (["2={run}", "--step", "1"], "--step shows one step of one run"),
        (["{run}", "--step", "x"], "--step is 'x', expected a whole number"),
        (["{run}", "--range", "("], "is no regular expression"),
        (["{run}", "--range", "nothing"], "no range or operator has a name in which 'nothing' is found"),
        (["2={none}"], "found no MoE layer pass"),
        (["{none}"], "found no MoE layer pass"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], message: str, tmp_path: Path) -> None:
    run_folder = made_run(tmp_path / "run")
    none = tmp_path / "none"
    none.mkdir()
    write_json(none / "rank-0.json", {"traceEvents": [complete("kernel", "gemm", 0, 1, 0, 7, device=0)]})
    with pytest.raises(InputError, match=message):
        run(*(word.format(run=run_folder, none=none) for word in words))
