from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.fusion import chains, fusion_table, ideal_speedup, kernel_sequence
from perfmodel.readers import read_trace
from tests.traces_made import events, golden_rows, kernel, launch


def sync(start_ns: int, **more: object) -> dict:
    return {"kind": "sync", "name": "cudaStreamSynchronize", "start_ns": start_ns, **more}


def run(names: str) -> list[dict]:
    """One launch and one kernel per letter, a wait of the host for each `|`."""
    rows = []
    for i, letter in enumerate(names):
        rows += [sync(10 * i)] if letter == "|" else [launch(10 * i, link=i), kernel(10 * i + 5, name=letter, link=i)]
    return rows


@pytest.mark.parametrize(
    "row", golden_rows("skip_fusion.csv"), ids=lambda r: f"batch {r['batch']} x{r['chain_length']}"
)
def test_published_ideal_speedup(row: dict[str, str]) -> None:
    found = ideal_speedup(int(row["k_eager"]), int(row["fused_chains_ps1"]), int(row["chain_length"]))
    assert round(found, 3) == float(row["ideal_speedup"])


def test_ideal_speedup_by_hand() -> None:
    """GPT-2, one chain of 256 among 403 launches: 403 / (403 - 255)."""
    assert ideal_speedup(403, 1, 256) == 403 / 148
    assert ideal_speedup(403, 0, 512) == 1


def test_proximity_scores_by_hand() -> None:
    """a b c a b c a b d: `ab` always (3 of 3), `bc` 2 of 3, `ca` 2 of 2, `bd` 1 of 3."""
    trace = events(*run("abcabcabd"))
    found = {tuple(names): rest for names, *rest in chains(trace, 2, threshold=0.0).iter_rows()}
    assert found == {
        ("a", "b"): [3, 3, 1.0],
        ("b", "c"): [2, 3, pytest.approx(2 / 3)],
        ("c", "a"): [2, 2, 1.0],
        ("b", "d"): [1, 3, pytest.approx(1 / 3)],
    }
    assert chains(trace, 2)["names"].to_list() == [["a", "b"], ["c", "a"]]
    row = fusion_table(trace, [2]).row(0, named=True)
    assert row == {
        "length": 2, "n_kernels": 9, "n_unique_chains": 4, "n_fused": 3, "n_launches": 6, "ideal_speedup": 1.5,
    }  # fmt: skip


def test_an_orphan_follows_the_only_process_that_made_calls() -> None:
    launched, orphan = [launch(0, link=0), kernel(5, name="a", link=0)], kernel(15, name="b", link=99)
    assert chains(events(*launched, orphan), 2)["names"].to_list() == [["a", "b"]]
    assert chains(events(*launched, orphan, sync(1, process=2)), 2).is_empty()  # whose it is cannot be told


def test_a_wait_of_the_host_cuts_chains() -> None:
    assert chains(events(*run("ab|ab")), 2)["names"].to_list() == [["a", "b"]]
    assert chains(events(*run("a|b")), 2).is_empty()


def test_streams_and_devices_are_sequences_of_their_own() -> None:
    trace = events(
        kernel(1, name="a", stream=1),
        kernel(2, name="x", stream=2),
        kernel(3, name="b", stream=1),
        kernel(4, name="y", stream=1, device=1),
        kernel(5, name="z", stream=2),
    )
    assert sorted(chains(trace, 2)["names"].to_list()) == [["a", "b"], ["x", "z"]]


def test_a_wait_of_another_process_cuts_nothing() -> None:
    other = [sync(15, process=2), launch(16, link=77, process=2)]
    assert chains(events(*run("ab"), *other), 2).height == 1
    assert chains(events(*run("ab"), sync(9, process=1)), 2).is_empty()


def test_ranks_are_sequences_of_their_own_and_wait_apart() -> None:
    """Two ranks with the same process, device and stream: a b of rank 0, x y of rank 1 cut by its own wait."""
    first = [row | {"rank": 0} for row in run("ab")]
    second = [row | {"rank": 1, "link": row.get("link", 0) + 100} for row in run("x|y")]
    assert chains(events(*first, *second), 2)["names"].to_list() == [["a", "b"]]
    assert chains(events(*first, sync(9, rank=1)), 2)["names"].to_list() == [["a", "b"]]
    assert chains(events(*first, sync(9, rank=0)), 2).is_empty()


def test_kernels_are_ordered_by_start_but_cut_by_launch() -> None:
    """A kernel launched before the wait belongs before it, even if it started after the wait began."""
    trace = events(
        launch(1, link=1), launch(2, link=2), sync(3), launch(50, link=3),
        kernel(2, name="a", link=1), kernel(9, name="b", link=2), kernel(55, name="c", link=3),
    )  # fmt: skip
    sequence = kernel_sequence(trace)
    assert sequence["name"].to_list() == ["a", "b", "c"]
    assert sequence["segment"][0] == sequence["segment"][1] != sequence["segment"][2]


def test_chains_longer_than_the_trace_and_empty_traces() -> None:
    row = fusion_table(events(*run("ab")), [512]).row(0, named=True)
    assert (row["n_unique_chains"], row["n_fused"], row["ideal_speedup"]) == (0, 0, 1.0)
    nothing = events({"kind": "op", "start_ns": 0})
    assert chains(nothing, 2).is_empty()
    assert fusion_table(nothing, [2])["ideal_speedup"].to_list() == [None]
    for length in (1, 0):
        with pytest.raises(InputError):
            chains(events(*run("ab")), length)
    with pytest.raises(InputError):
        ideal_speedup(10, 6, 2)


@given(st.text(alphabet="abc|", max_size=40), st.integers(2, 9))
def test_chains_equal_counting_every_window(names: str, length: int) -> None:
    windows = [tuple(part[i : i + length]) for part in names.split("|") for i in range(len(part) - length + 1)]
    count, first = Counter(windows), Counter(names.replace("|", ""))
    expected = {window: (n, first[window[0]], n / first[window[0]]) for window, n in count.items()}
    table = chains(events(*run(names), {"kind": "op", "start_ns": 0}), length, threshold=0.0)
    assert {tuple(row[0]): row[1:] for row in table.iter_rows()} == expected
    found = fusion_table(events(*run(names), {"kind": "op", "start_ns": 0}), [length]).row(0, named=True)
    assert found["n_unique_chains"] == len(count)
    assert found["n_fused"] == most_disjoint(names, {window for window, row in expected.items() if row[2] == 1}, length)


def most_disjoint(names: str, wanted: set[tuple[str, ...]], length: int) -> int:
    """The most windows of `wanted` that fit without overlap, by trying both choices at every place."""
    best = [0] * (len(names) + length + 1)
    for i in reversed(range(len(names))):
        take = 1 + best[i + length] if tuple(names[i : i + length]) in wanted else 0
        best[i] = max(best[i + 1], take)
    return best[0]


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_tables_of_real_traces_are_consistent(shared, row) -> None:
    table = fusion_table(read_trace(shared / "traces" / row["file"]).events)
    assert table["n_kernels"].to_list() == [int(row["kernels"])] * table.height
    assert (table["n_launches"] == table["n_kernels"] - table["n_fused"] * (table["length"] - 1)).all()
    assert (table["n_fused"] * table["length"] <= table["n_kernels"]).all()
