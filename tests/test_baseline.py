"""Saved baselines: what is saved comes back, a store grows and changes with reasons, and nothing is left half-done."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from perfmodel import regression, report
from perfmodel.capture import load_capture, shipped_captures
from perfmodel.capture_lines import Calibrated
from perfmodel.cli.main import app
from perfmodel.errors import InputError, NotComparableError
from perfmodel.regression import Evidence, Measured, Run, of_capture, saved
from perfmodel.regression.saved import load, restored, save, stored, update
from tests.captures_made import SHAPES, noise, write_synthetic_capture

START = 1_790_000_000


def capture(
    path: Path,
    factor: float = 1.0,
    seed: int = 1,
    started: int | None = None,
    n_runs: int = 3,
    n_shapes: int = 1,
    **facts: dict[str, Any],
) -> Path:
    """A made-up capture `factor` times as slow as others; its runs begin at `started`, a minute apart."""
    write_synthetic_capture(path, n_runs, noise(seed, 0.01, factor), shapes=SHAPES[:n_shapes])
    manifest = json.loads((path / "capture.json").read_text())
    for key, changed in facts.items():
        manifest[key] |= changed
    if started is not None:
        manifest["runs"] = [
            {"run": run, "started": started + 60 * run, "finished": started + 60 * run + 50} for run in range(n_runs)
        ]
    (path / "capture.json").write_text(json.dumps(manifest))
    return path


def side(*arguments: Any, **options: Any) -> Evidence:
    return of_capture(load_capture(capture(*arguments, **options)))


def only(path: Path, keep: Callable[[str], bool]) -> Evidence:
    """A capture without the workloads that `keep` refuses, in its files too."""
    for name in ("workloads.jsonl", "observations.jsonl"):
        lines = (path / name).read_text().splitlines(keepends=True)
        (path / name).write_text("".join(line for line in lines if keep(json.loads(line)["workload"])))
    return of_capture(load_capture(path))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def same(one: Evidence, other: Evidence) -> bool:
    """Whether two sides say the same, but for their name and what their captures hold."""
    return replace(one, name="", capture=None).__dict__ == replace(other, name="", capture=None).__dict__


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["baseline", *map(str, words)])


# What comes back


names = st.text(min_size=1, max_size=12)
facts = st.dictionaries(names, st.none() | st.booleans() | st.integers(0, 9) | names | st.lists(st.integers(0, 9)))


@st.composite
def made_up_traces(draw: st.DrawFn) -> Evidence:
    runs = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(sorted))
    seconds = st.none() | st.integers(0, 2_000_000_000)

    def measured(least: float) -> dict[str, Measured]:
        value = st.floats(least, 1e15)
        keys = draw(st.lists(names, min_size=1, max_size=3, unique=True))
        return {
            key: Measured(
                key,
                draw(names),
                {run: draw(value) for run in runs},
                draw(st.none() | st.floats(0, 1)),
                draw(facts),
            )
            for key in keys
        }

    return Evidence(
        name="made up",
        kind="traces",
        fingerprint=draw(facts),
        workloads=measured(1e-3),
        runs=tuple(Run(run, 0, draw(seconds), draw(seconds)) for run in runs),
        may_drift=draw(st.booleans()),
        details=measured(0.0),
        notes=tuple(draw(st.lists(names, max_size=2, unique=True))),
    )


@given(made_up_traces())
@settings(max_examples=25)
def test_what_is_saved_comes_back_whatever_it_is_called(made: Evidence) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = save(made, folder)
        again = load(Path(folder) / found.baseline)
        assert same(again, made)
        with tempfile.TemporaryDirectory() as other:
            save(made, other)
            assert content(Path(other)) == content(Path(folder))


def test_a_saved_capture_gives_the_verdicts_of_the_capture_and_the_model_fitted_to_it(tmp_path: Path) -> None:
    a = side(tmp_path / "a", started=START, n_shapes=4)
    b = side(tmp_path / "b", 1.05, seed=2, started=START + 9000, n_shapes=4)
    again = load(tmp_path / "store" / save(a, tmp_path / "store").baseline)
    assert same(again, a)
    assert again.capture is not None and a.capture is not None
    assert again.capture.digest == a.capture.digest and again.capture.fingerprint == a.capture.fingerprint
    direct, saved = (regression.compare(one, b).to_json() for one in (a, again))
    assert saved["model"] == "a" and saved["verdicts"][0]["against_model"]["model_low_ns"] is not None
    for found in (direct, saved):
        found["verdicts"].sort(key=lambda row: row["workload"])
        found.pop("baseline")
    numbers = flat(direct)
    assert len(numbers) > 500
    for place, value in flat(saved).items():
        is_number = isinstance(value, float)
        assert numbers[place] == (pytest.approx(value, rel=1e-6) if is_number else value), place


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Plain values by their place."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, one in items for k, v in flat(one, f"{place}/{key}").items()}
    return {place: value}


def test_a_shipped_capture_keeps_its_shipped_model(tmp_path: Path) -> None:
    folder = next(path for path in shipped_captures() if path.name == "epyc-zen4-2c-fp32")
    shipped = of_capture(load_capture(folder))
    again = load(tmp_path / save(shipped, tmp_path).baseline)
    assert same(again, shipped)
    assert again.capture is not None and shipped.capture is not None
    assert regression.model_for(again.capture).evidence_["captures"][0]["digest"] == shipped.capture.digest
    columns = ["workload", "run", "n_tokens", "routing", "tokens_per_expert", "access", "study", "time_ns"]
    one, other = (side.capture.observations.select(columns).sort("workload", "run") for side in (again, shipped))  # type: ignore[union-attr]
    assert one.equals(other)


def test_files_are_for_people_and_git_and_name_no_place(tmp_path: Path) -> None:
    found = save(side(tmp_path / "a", started=START), tmp_path / "store")
    assert found.baseline.startswith("synthetic-cpu-fp32-") and len(found.baseline.rpartition("-")[2]) == 8
    files = content(tmp_path / "store" / found.baseline)
    assert len(files) == 1 + 8 and str(tmp_path).encode() not in b"".join(files.values())
    for name, words in files.items():
        value = json.loads(words)
        assert value["schema_version"] == 1 and words.endswith(b"}\n"), name
        assert list(value) == sorted(value)
    workload = json.loads(files[next(name for name in files if name != "baseline.json")])
    assert next(iter(workload["medians_ns"].values())).keys() == {"0", "1", "2"}
    assert b'"tokens_per_expert": [' in b"".join(files.values())


def test_the_costliest_details_of_each_kind_are_kept_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restored, "MAX_DETAILS", 2)
    details = {f"op {i}": Measured(f"op {i}", f"op {i}", {0: 10.0 * i}, facts={"kind": "operator"}) for i in range(5)}
    details["launches"] = Measured("launches", "launches", {0: 3.0}, facts={"kind": "metric"})
    made = Evidence("made up", "traces", {}, {"step": Measured("step", "step", {0: 99.0})}, (Run(0),), details=details)
    again = load(tmp_path / save(made, tmp_path).baseline)
    assert set(again.details) == {"op 3", "op 4", "launches"}
    assert again.notes == (f"3 details of baseline {again.name} that cost less were not kept",)


# Occasions


def test_three_occasions_stand_in_one_baseline_and_measure_the_drift(tmp_path: Path) -> None:
    store = tmp_path / "store"
    sides = [side(tmp_path / f"{i}", 1 + i / 10, seed=i, started=START + 9000 * i) for i in range(3)]
    found = [save(one, store, add=i > 0) for i, one in enumerate(sides)]
    assert [one.n_occasions for one in found] == [1, 2, 3] and found[2].n_runs == 9
    assert "slower beyond doubt" in found[1].notes[0] and "creep" in found[1].notes[0]
    again = load(store / found[0].baseline)
    assert list(again.occasions.values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [one.started for one in again.runs] == [START + 9000 * i + 60 * j for i in range(3) for j in range(3)]
    key = next(iter(again.workloads))
    assert list(again.workloads[key].run_ns.values()) == [
        ns for one in sides for ns in one.workloads[key].run_ns.values()
    ]
    # The three means lie 10 % apart: a fourth such capture is nothing new, though its runs differ by 1 % alone.
    fourth = regression.check(again, side(tmp_path / "4", 1.15, seed=4, started=START + 90_000))[0]
    assert fourth.verdict == "inconclusive"
    assert again.capture is not None and again.capture.digest != sides[0].capture.digest  # type: ignore[union-attr]


def test_what_cannot_be_added_is_refused_in_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    store, a = tmp_path / "store", side(tmp_path / "a", started=START)
    with pytest.raises(InputError, match="holds no baseline to add to"):
        save(a, store, add=True)
    assert not store.exists()
    name = save(a, store).baseline
    before = content(store)
    with pytest.raises(InputError, match=f"already, {name}: add another occasion"):
        save(side(tmp_path / "b", seed=2), store)
    with pytest.raises(InputError, match="holds the measurements of 'a' already"):
        save(a, store, add=True)
    with pytest.raises(InputError, match="run 0 of 'grown' already"):
        save(side(tmp_path / "grown", started=START, n_runs=4), store, add=True)
    with pytest.raises(NotComparableError, match=r"differs in software\.torch") as caught:
        save(side(tmp_path / "c", seed=3, software={"torch": "1"}), store, add=True)
    assert caught.value.exit_code == 3
    assert content(store) == before


def test_an_occasion_may_bring_workloads_and_lack_some(tmp_path: Path) -> None:
    store = tmp_path / "store"
    many = capture(tmp_path / "many", n_shapes=2, seed=2)
    name = save(side(tmp_path / "few"), store).baseline
    found = save(of_capture(load_capture(many)), store, add=True)
    assert (found.n_new, found.n_unmeasured, found.n_workloads, len(found.rows)) == (8, 0, 16, 8)
    less = only(capture(tmp_path / "less", seed=3), lambda key: key != min(load(store / name).workloads))
    notes = save(less, store, add=True).notes
    assert any("workloads of the baseline were not measured on this occasion" in words for words in notes)


def test_calibrations_of_occasions_are_pooled_to_the_middle_with_the_larger_scatter() -> None:
    rates = [{"rate_per_s": Calibrated(v, 0.01, 5, "one way")} for v in (90.0, 100.0, 130.0)]
    other = {"rate_per_s": Calibrated(900.0, 0.5, 5, "another way"), "only_ns": Calibrated(7.0, 0.02, 1, None)}
    found = restored.pooled([other, *rates])
    # Deviations from 100 are 10, 0 and 30, their middle 10 as a standard deviation 14.826 %.
    assert found["rate_per_s"] == {"value": 100.0, "spread_frac": pytest.approx(0.14826), "n": 15, "how": "one way"}
    assert found["only_ns"] == {"value": 7.0, "spread_frac": 0.02, "n": 1}


# Taking a change over


def test_an_update_replaces_what_was_measured_and_says_why(tmp_path: Path) -> None:
    store = tmp_path / "store"
    name = save(side(tmp_path / "a", started=START), store).baseline
    before = content(store)
    fast = side(tmp_path / "fast", 0.8, seed=2, started=START + 9000)
    told = update(fast, store, "a faster\n gather", dry_run=True)
    assert content(store) == before and not told.is_written
    found = update(fast, store, "a faster\n gather")
    assert found == replace(told, is_written=True)
    assert found.entry.reason == "a faster gather" and found.entry.taken == "2026-01-01"
    assert found.entry.ratio == pytest.approx(0.8, rel=0.02)
    assert found.entry.ratio_low < found.entry.ratio < found.entry.ratio_high  # type: ignore[operator]
    assert found.entry.new_ns / found.entry.old_ns == pytest.approx(found.entry.ratio, rel=1e-4)  # type: ignore[operator]
    assert [row.ratio for row in found.rows] == sorted((row.ratio for row in found.rows), reverse=True)
    assert same(load(store / name), fast)
    assert [entry.event for entry in saved.read(store / name).head.history] == ["saved", "updated"]
    for empty in ("", "  \n"):
        with pytest.raises(InputError, match="--reason is empty"):
            update(side(tmp_path / f"x{len(empty)}", seed=5), store, empty)
    with pytest.raises(InputError, match="holds the measurements of 'fast' already"):
        update(fast, store, "again")


def test_an_update_by_a_part_keeps_the_rest_and_says_so(tmp_path: Path) -> None:
    store = tmp_path / "store"
    a = side(tmp_path / "a", started=START)
    name = save(a, store).baseline
    first = min(a.workloads)
    part = only(capture(tmp_path / "part", 2.0, seed=2, started=START + 9000), lambda key: key == first)
    found = update(part, store, "one kernel changed")
    assert (found.n_unmeasured, found.n_occasions, len(found.rows)) == (7, 2, 1)
    assert found.notes[0] == "7 workloads were not measured and stay as they are"
    assert "no run measured all workloads" in found.notes[1]
    again = load(store / name)
    assert [(one.occasion, one.started) for one in again.runs] == [(0, None)] * 3
    assert list(again.workloads[first].run_ns.values()) == list(part.workloads[first].run_ns.values())
    assert all(again.workloads[key].run_ns == a.workloads[key].run_ns for key in a.workloads if key != first)
    # One that measured all is judged over all, and each part against its own.
    candidate = capture(tmp_path / "b", seed=3)
    verdicts = {one.workload: one for one in regression.check(again, of_capture(load_capture(candidate)))}
    assert verdicts.pop("all workloads").ratio == pytest.approx(2 ** (-1 / 8), rel=0.01)
    assert verdicts.pop(first).verdict == "improved" and {one.verdict for one in verdicts.values()} == {"ok"}
    # An occasion that measured all makes it whole again.
    whole = tmp_path / "whole"
    shutil.copytree(store, whole)
    assert not any("no run" in words for words in save(side(tmp_path / "c", seed=6), whole, add=True).notes)
    assert [one.occasion for one in load(whole / name).runs] == [0] * 3 + [1] * 3 + [2] * 3
    # A capture that grew replaces the one that it grew from where nothing of that stays.
    grown = only(capture(tmp_path / "grown", 2.0, seed=4, started=START + 9000, n_runs=4), lambda key: key == first)
    assert update(grown, store, "more runs").n_runs == 3 + 4


def test_another_torch_takes_the_place_of_the_old_baseline_with_its_history(tmp_path: Path) -> None:
    store = tmp_path / "store"
    old = save(side(tmp_path / "a", n_shapes=2), store).baseline
    (store / old / "notes.txt").write_text("ours")
    new = side(tmp_path / "new", 1.1, seed=2, software={"torch": "1"})
    with pytest.raises(NotComparableError, match=r"software\.torch: '0' against '1'"):
        update(new, store, "torch 1")
    found = update(new, store, "torch 1", ["torch"])
    assert found.replaced == old and found.baseline != old
    assert [path.name for path in store.iterdir()] == [found.baseline]
    head = saved.read(store / found.baseline).head
    assert [entry.event for entry in head.history] == ["saved", "updated"]
    assert head.history[1].changed == {"software.torch": ("0", "1")} and head.history[1].n_left == 8
    assert "8 workloads of the baseline were not measured and leave it" in found.notes
    assert "left alone: notes.txt" in found.notes
    assert same(load(store / found.baseline), new)


# Which baseline of a store


def test_the_baseline_of_a_store_that_fits_is_found(tmp_path: Path) -> None:
    store = tmp_path / "store"
    folders = {
        torch: capture(tmp_path / f"torch{torch}", seed=i, software={"torch": torch}, machine={"driver": "5"})
        for i, torch in enumerate("123")
    }
    made = {torch: save(of_capture(load_capture(path)), store).baseline for torch, path in folders.items()}
    candidate = capture(tmp_path / "b", 1.0, seed=9, software={"torch": "2"}, machine={"driver": "5"})
    assert regression.sides(store, candidate, ["software"])[0].name == made["2"]
    assert regression.sides(candidate, store)[1].name == made["2"]
    fourth = capture(tmp_path / "d", seed=9, software={"torch": "4"}, machine={"driver": "5"})
    with pytest.raises(NotComparableError, match=r"several baselines of store .* fit 'd'") as caught:
        regression.sides(store, fourth, ["software"])
    assert all(name in str(caught.value) for name in made.values())
    with pytest.raises(NotComparableError, match=r"no baseline of store .* differs in software\.torch"):
        regression.sides(store, fourth)
    with pytest.raises(InputError, match="unknown axis 'weather'"):
        regression.sides(store, fourth, ["weather"])
    with pytest.raises(InputError, match="both sides are stores"):
        regression.sides(store, store)
    with pytest.raises(InputError, match="is a baseline, expected the store"):
        save(of_capture(load_capture(fourth)), store / made["1"])
    shutil.rmtree(store / made["1"])
    shutil.rmtree(store / made["3"])
    assert regression.sides(store, fourth, ["software"])[0].name == made["2"]
    with pytest.raises(NotComparableError, match=r"software\.torch: '2' against '4'"):
        regression.sides(store, fourth)


def test_a_machine_that_firmware_gave_a_little_less_memory_is_the_same(tmp_path: Path) -> None:
    store = tmp_path / "store"
    name = save(side(tmp_path / "a", machine={"memory_bytes": 2**34}), store).baseline
    found = save(side(tmp_path / "b", seed=2, machine={"memory_bytes": 2**34 - 4096}), store, add=True)
    assert (found.baseline, found.n_occasions) == (name, 2)


# Crashes, neighbours, and other hands


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Evidence, Evidence]:
    """The folder of a saved baseline, the side in it, and another that takes 1.2 times as long."""
    one, other = side(tmp_path / "a", started=START), side(tmp_path / "b", 1.2, seed=2, started=START + 9000)
    return tmp_path / "store" / save(one, tmp_path / "store").baseline, one, other


def test_a_crash_at_any_write_leaves_the_old_or_the_new_baseline(
    two: tuple[Path, Evidence, Evidence], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, one, other = two
    whole, outcomes = stored.write_whole, []
    for n_writes in range(11):  # pending.json, baseline.json and eight workloads; the last is not interrupted
        again = tmp_path / f"store{n_writes}"
        shutil.copytree(folder.parent, again)
        left = iter(range(n_writes))

        def dying(path: str | Path, words: bytes, left: Any = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            whole(path, words)

        with monkeypatch.context() as patched:
            patched.setattr(stored, "write_whole", dying)
            if n_writes < 10:
                with pytest.raises(KeyboardInterrupt):
                    update(other, again, "slower")
            else:
                update(other, again, "slower")
        found = load(again / folder.name)
        assert same(found, one) or same(found, other)
        outcomes.append(same(found, other))
        if outcomes[-1]:  # what was begun is made an end of by the next that writes
            third = side(tmp_path / f"c{n_writes}", 1.2, seed=3, started=START + 90_000)
            assert save(third, again, add=True).n_occasions == 2
        else:
            update(other, again, "slower")
            assert same(load(again / folder.name), other)
        assert not (again / folder.name / "pending.json").exists()
    assert outcomes == [False] + [True] * 10


def test_a_crash_while_a_first_baseline_is_written_leaves_all_of_it_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = side(tmp_path / "a"), stored.write_whole

    def dying(path: str | Path, words: bytes) -> None:
        if Path(path).name != "pending.json":
            raise KeyboardInterrupt
        whole(path, words)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stored, "write_whole", dying)
        save(made, tmp_path / "store")
    (folder,) = (tmp_path / "store").iterdir()
    assert [file.name for file in folder.iterdir()] == ["pending.json"]
    assert same(load(folder), made)
    assert list(saved.listed(tmp_path / "store").baselines) == [folder.name]


def test_a_crash_between_the_new_name_and_the_new_content_leaves_the_old_baseline(
    two: tuple[Path, Evidence, Evidence], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, one, _ = two
    new = side(tmp_path / "new", seed=3, software={"torch": "1"})

    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(stored, "write_whole", dying)
        update(new, folder.parent, "torch 1", ["torch"])
    (renamed,) = folder.parent.iterdir()
    assert renamed != folder and same(load(renamed), one)
    assert update(new, folder.parent, "torch 1", ["torch"]).baseline == renamed.name
    assert same(load(renamed), new)


def test_who_saves_at_the_same_time_waits(tmp_path: Path) -> None:
    store = tmp_path / "store"
    sides = [side(tmp_path / f"{i}", seed=i, started=START + 9000 * i) for i in range(6)]
    name = save(sides[0], store).baseline
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda one: save(one, store, add=True), sides[1:]))
    found = load(store / name)
    assert len(found.runs) == 18 and all(len(one.run_ns) == 18 for one in found.workloads.values())
    assert sorted(path.suffix for path in (store / name).iterdir()) == [".json"] * 9


def test_saving_the_same_bytes_touches_no_file(two: tuple[Path, Evidence, Evidence]) -> None:
    folder, *_ = two
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    stored.write(folder, saved.read(folder))
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def damaged(words: str, name: str) -> str:
    return {
        "cut": words[: len(words) // 2],
        "no object": "[]",
        "no version": words.replace('"schema_version"', '"schema"'),
        "later version": words.replace('"schema_version": 1', '"schema_version": 2'),
        "unknown field": words.replace('"schema_version": 1', '"schema_version": 1, "reasn": "x"'),
        "conflict": f"<<<<<<< ours\n{words}=======\n{words}>>>>>>> theirs\n",
        "NaN": words.replace('"0": ', '"0": NaN, "9": '),
        "negative": words.replace('"0": ', '"0": -'),
        "infinite": words.replace('"0": ', '"0": 1e999, "7": '),
        "unknown run": words.replace('"0": ', '"77": '),
        "unknown occasion": words.replace(' "medians_ns": {\n  "', ' "medians_ns": {\n  "x'),
        "another workload": words.replace('"workload": "', '"workload": "x'),
        "no medians": words.partition(' "medians_ns"')[0] + ' "medians_ns": {}, "schema_version": 1, "workload": "'
        f'{name.removesuffix(".json")}"}}',
        "deep": "[" * 100_000,
        "binary": "\udcff",
    }  # type: ignore[return-value]


KINDS = tuple(damaged("", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_workload_is_refused_by_the_name_of_its_file(two: tuple[Path, Evidence, Evidence], kind: str) -> None:
    folder, *_ = two
    file = next(file for file in sorted(folder.iterdir()) if file.name != "baseline.json")
    words = damaged(file.read_text(), file.name)[kind]  # type: ignore[index]
    file.write_bytes(words.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=file.name) as caught:
        load(folder)
    assert folder.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["cut", "no object", "no version", "later version", "unknown field", "conflict"])
def test_a_damaged_head_is_refused_and_told_by_list(two: tuple[Path, Evidence, Evidence], kind: str) -> None:
    folder, _, other = two
    file = folder / "baseline.json"
    file.write_text(damaged(file.read_text(), "")[kind])  # type: ignore[index]
    for use in (lambda: load(folder), lambda: save(other, folder.parent, add=True)):
        with pytest.raises(InputError, match=r"baseline\.json"):
            use()
    listed = run("list", "--store", folder.parent)
    assert listed.exit_code == 2 and "baseline.json" in listed.stderr


def test_a_workload_that_contradicts_itself_is_refused(two: tuple[Path, Evidence, Evidence]) -> None:
    folder, *_ = two
    file = next(file for file in sorted(folder.iterdir()) if file.name != "baseline.json")
    whole = json.loads(file.read_text())
    for key, value, why in (
        ("n_tokens", 10**6, "breaks tokens x top-k"),
        ("op", "sort", "op 'sort' is unknown"),
        ("workload", "0" * 12, f"{file.name} is of workload '000000000000'"),
    ):
        file.write_text(json.dumps(whole | {"line": whole["line"] | {key: value}}))
        with pytest.raises(InputError, match=why) as caught:
            load(folder)
        assert folder.name in str(caught.value)


def test_missing_huge_and_foreign_files_are_told(
    two: tuple[Path, Evidence, Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = two
    (folder.parent / "README").write_text("ours")
    (folder / "0.json").write_text("{")
    assert saved.listed(folder.parent).foreign == ("README", f"{folder.name}/0.json")
    load(folder)  # and are left alone
    file = next(file for file in sorted(folder.iterdir()) if file.name not in ("baseline.json", "0.json"))
    with monkeypatch.context() as patched, pytest.raises(InputError, match="more than 0 MiB"):
        patched.setattr(stored, "MAX_FILE_BYTES", 100)
        load(folder)
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name} is missing"):
        load(folder)


def test_a_pending_file_writes_nowhere_else(two: tuple[Path, Evidence, Evidence]) -> None:
    folder, _, other = two
    (folder / "pending.json").write_text(json.dumps({"schema_version": 1, "files": {"../x.json": "{}"}}))
    with pytest.raises(InputError, match=r"pending\.json names '\.\./x\.json'"):
        save(other, folder.parent, add=True)
    assert not (folder.parent / "x.json").exists()


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for broken in (math.nan, "\ud800"):
        made = Evidence("made up", "traces", {"x": broken}, {"s": Measured("s", "s", {0: 1.0})}, (Run(0),))
        with pytest.raises(InputError, match="numbers that are none"):
            save(made, tmp_path)
    for n_ns, started in ((0.0, None), (-1.0, None), (1e99, None), (1.0, 1e18)):
        made = Evidence("made up", "traces", {}, {"s": Measured("s", "s", {0: n_ns})}, (Run(0, 0, started),))
        with pytest.raises(InputError, match="this cannot be saved: Expected `float`"):
            save(made, tmp_path)
    assert not content(tmp_path)


# As a user


def test_the_commands_save_list_show_and_update(tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store")
    a, b = capture(tmp_path / "a", started=START), capture(tmp_path / "b", 0.8, seed=2, started=START + 9000)
    saved = run("save", a, *store)
    assert saved.exit_code == 0 and "8 workloads, 3 runs on 1 occasion" in saved.stdout
    assert isinstance(run("save", b, *store).exception, InputError)
    (row,) = json.loads(run("list", *store, "--json").stdout)["baselines"]
    assert (row["n_workloads"], row["n_runs"], row["taken"], row["capture"]) == (8, 3, "2026-01-01", "a")
    assert row["machine"] in run("list", *store).stdout
    page = run("show", "synthetic", *store)
    assert page.exit_code == 0 and "moe_layer synthetic-a, 512 tokens, uniform" in page.stdout
    key = json.loads(run("show", row["baseline"], *store, "--json").stdout)["workloads"][0]["workload"]
    one = json.loads(run("show", row["baseline"], *store, "--workload", key, "--json").stdout)
    assert [median["run"] for median in one["medians"]] == [0, 1, 2]
    assert "0  " in run("show", row["baseline"], *store, "--workload", one["label"]).stdout
    assert "no workload 'x'" in str(run("show", row["baseline"], *store, "--workload", "x").exception)
    assert "there: synthetic-cpu" in str(run("show", "zz", *store).exception)
    before = content(tmp_path / "store")
    dry = run("update", b, *store, "--reason", "faster", "--dry-run")
    assert dry.exit_code == 0 and "new over old" in dry.stdout and content(tmp_path / "store") == before
    done = run("update", b, *store, "--reason", "faster", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["entry"]["reason"] == "faster"
    assert "faster" in run("show", "synthetic", *store).stdout
    assert run("list", "--store", tmp_path / "none").exception.exit_code == 2  # type: ignore[union-attr]


def test_an_improvement_comes_with_the_command_that_takes_it_over(tmp_path: Path) -> None:
    store, a = tmp_path / "my store", capture(tmp_path / "a")
    fast = capture(tmp_path / "fast", 0.8, seed=2)
    save(of_capture(load_capture(a)), store)

    def check(baseline: object, candidate: object, *words: str) -> Result:
        return CliRunner().invoke(app, ["check", str(baseline), str(candidate), "--model", "none", *words])

    command = f"perfmodel baseline update {fast} --store '{store}' --reason \"...\""
    (folder,) = store.iterdir()
    for baseline in (store, folder):
        done = check(baseline, fast, "--markdown", str(tmp_path / "page.md"))
        assert done.exit_code == 0 and f"\n\n    {command}\n" in done.stdout
        assert f"\n\n    {command}\n" in (tmp_path / "page.md").read_text()
    assert json.loads(check(store, fast, "--json").stdout)["update_command"] == command
    assert check(store, fast, "--fail-on", "regressed,improved").exit_code == 1
    assert check(store, a, "--fail-on", "regressed,improved").exit_code == 0
    assert json.loads(check(store, a, "--json").stdout)["update_command"] is None
    assert json.loads(check(a, fast, "--json").stdout)["update_command"] is None  # no saved baseline
    other = capture(tmp_path / "other", 0.8, seed=3, software={"torch": "1"})
    declared = json.loads(check(store, other, "--json", "--axis", "software").stdout)
    assert declared["verdicts"][0]["verdict"] == "improved" and declared["update_command"] is None


def test_the_command_of_the_usual_store_names_no_store() -> None:
    found = regression.Comparison("a", "b", 0.03, (), (), (), (), None, None, None, {})
    assert report.update_command(found, "baselines", "b") is None
    fast = regression.Verdict("all", "all", 0.8, 0.7, 0.9, 3, 3, "improved", None, 1.0, 0.8)
    faster = replace(found, cases=(regression.Case(fast, None, None, None, "fine"),))
    expected = "perfmodel baseline update 'my cand' --reason \"...\""
    assert report.update_command(faster, "baselines", "my cand") == expected
