"""What `perfmodel check` tells people and build servers: exit codes, JSON, JUnit, Markdown, and recipes that run."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from typer.main import get_command

from perfmodel import regression, report
from perfmodel.capture import load_capture
from perfmodel.cli.main import app, main
from perfmodel.regression import AXES, AXIS_WORDS, FAILURES, Comparison, Measured, of_capture
from perfmodel.regression.evidence import alternate
from perfmodel.report import check_files
from tests.captures_made import SHAPES, noise, write_synthetic_capture
from tests.conftest import ROOT

REGRESSION_PAGE = (ROOT / "docs" / "regression.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / "docs" / "examples" / "regression.yml"
Ends = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ends:
    """Runs `perfmodel check`, errors and all, in this process: its exit code, stdout and stderr."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["perfmodel", "check", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made-up captures: a baseline, one as fast, one slower, a noisy one, another machine, one of a single run, and one
    that lost a workload; none has the times of another to the ns."""
    place, rng = tmp_path_factory.mktemp("sides"), np.random.default_rng(5)

    made = {
        "before": write_synthetic_capture(place / "before", noise=noise(rng, 0.002)),
        "after": write_synthetic_capture(place / "after", noise=noise(rng, 0.002)),
        "slow": write_synthetic_capture(place / "slow", noise=noise(rng, 0.002, 1.4)),
        "noisy": write_synthetic_capture(place / "noisy", n_runs=2, noise=noise(rng, 0.5)),
        "other": write_synthetic_capture(place / "other", machine={"cpu_model": "another synthetic CPU"}),
        "once": write_synthetic_capture(place / "once", n_runs=1, noise=noise(rng, 0.002, 1.4)),
        "lost": write_synthetic_capture(place / "lost", noise=noise(rng, 0.002)),
    }
    rows = (made["lost"] / "observations.jsonl").read_text().splitlines()
    gone = json.loads(rows[0])["workload"]
    (made["lost"] / "observations.jsonl").write_text("".join(row + "\n" for row in rows if gone not in row))
    return made


def compared(folders: dict[str, Path], candidate: str, **options: Any) -> Comparison:
    a, b = (of_capture(load_capture(folders[name])) for name in ("before", candidate))
    return regression.compare(a, b, **{"with_model": False} | options)


def words_of(found: Comparison) -> str:
    """The page as one line."""
    return " ".join(report.check_page(found).split())


# What the command ends with


@pytest.mark.parametrize(
    ("candidate", "words", "code"),
    [
        ("after", (), 0),
        ("noisy", (), 0),
        ("noisy", ("--inconclusive", "fail"), 4),
        ("slow", ("--inconclusive", "fail"), 1),
        ("slow", ("--fail-on", "none"), 0),
        ("slow", ("--fail-on", "explained,slower-than-model,missing"), 0),
        ("slow", ("--margin", "50%"), 0),
        ("slow", ("--fail-on", "weather"), 2),
        ("slow", ("--axis", "weather"), 2),
        ("slow", ("--json-file", "report.txt"), 2),
        ("other", (), 3),
        ("other", ("--axis", "hardware"), 0),
        ("lost", (), 0),
        ("lost", ("--fail-on", "missing"), 1),
        ("lost", ("--fail-on", "regressed,missing"), 1),
        ("after", ("--fail-on", "missing"), 0),
        ("once", (), 1),
    ],
)
def test_the_exit_code(ends: Ends, folders: dict[str, Path], candidate: str, words: Sequence[str], code: int) -> None:
    found, out, err = ends(folders["before"], folders[candidate], "--model", "none", *words)
    assert found == code, err
    assert bool(out) == (code in (0, 1, 4))  # whoever gets a verdict gets a page, and nobody else
    assert (err.count("\n") == 1 and err.startswith("perfmodel: ")) == (code in (2, 3))


def test_sides_without_a_common_workload_end_with_3(ends: Ends, folders: dict[str, Path], tmp_path: Path) -> None:
    few = write_synthetic_capture(tmp_path / "few", shapes=(replace(SHAPES[0], name="synthetic-e", hidden=1024),))
    code, out, err = ends(folders["before"], few, "--fail-on", "none")
    assert (code, out) == (3, "") and "share no workload" in err


def test_the_documented_codes_conditions_and_axes_are_those_of_the_command() -> None:
    options = {p.name: p for p in get_command(app).commands["check"].params}
    section = REGRESSION_PAGE.partition("## What it ends with")[2].partition("\n## ")[0]
    assert re.findall(r"^\| (\d) \|", section, re.M) == ["0", "1", "2", "3", "4"]
    for condition in FAILURES:
        assert f"| `{condition}` |" in section and condition in (options["fail_on"].help or "")
    axes = REGRESSION_PAGE.partition("## May they be compared?")[2].partition("\n## ")[0]
    for axis in (*AXIS_WORDS, *AXES):
        assert re.search(rf"^\| .*`{axis}`.*\|", axes, re.M), axis
        assert re.search(rf"\b{axis}\b", options["axis"].help or ""), axis
    for fact in (fact for facts in AXIS_WORDS.values() for fact in facts):
        assert f"`{fact}`" in axes, fact


def test_a_check_without_html_needs_no_plotly(
    ends: Ends, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "perfmodel.figures", None)  # whoever imports it fails
    assert ends(folders["before"], folders["slow"], "--model", "none")[0] == 1


# No pass in silence


def test_lost_workloads_are_in_every_output(folders: dict[str, Path]) -> None:
    found = compared(folders, "lost")
    (gone,) = found.lost
    page, json_, summary = words_of(found), found.to_json(), report.check_markdown(found, [])
    assert page.startswith("As fast as the baseline, within the margin. The candidate did not measure 1 workload")
    assert "over 31 of the baseline's 32 workloads (90 % interval" in page
    assert f"not measured in the candidate, so not compared: {gone.label} (--fail-on missing ends" in page
    assert json_["lost_workloads"] == [{"workload": gone.workload, "label": gone.label}]
    assert json_["n_missing_workloads"] == {"baseline": 0, "candidate": 1}
    assert (json_["failures"], found.failures(["missing"])) == ([], ["missing"])
    assert summary.startswith("⚠️ **ok: candidate takes ")
    assert report.check_markdown(found, ["missing"]).startswith("❌ ")
    for fail_on, element in (([], "skipped"), (["missing"], "failure")):
        suite = ET.fromstring(report.check_junit(found, fail_on))[0]
        case = suite.findall("testcase")[-1]
        assert gone.label in case.attrib["name"] and case.find(element) is not None
        assert suite.attrib["failures"] == str(len(fail_on))


def test_workloads_that_are_new_are_said_and_fail_nothing(folders: dict[str, Path]) -> None:
    a, b = (of_capture(load_capture(folders[name])) for name in ("lost", "after"))
    found = regression.compare(a, b, with_model=False)
    assert "1 workload of the candidate: not measured in the baseline" in words_of(found)
    assert (found.lost, found.failures(FAILURES)) == ((), [])


def test_a_single_run_a_side_is_said_and_never_firmer_than_suspect(folders: dict[str, Path]) -> None:
    found = compared(folders, "once")
    assert found.overall.verdict.verdict == "suspect"
    assert "regressed" not in {case.verdict.verdict for case in found.cases}
    assert "nothing slower is firmer than suspect" in words_of(found)
    assert "nothing slower is firmer" in report.check_markdown(found, [])
    assert "nothing slower is firmer" not in report.check_page(compared(folders, "slow"))


def test_an_open_answer_says_what_would_decide_it(folders: dict[str, Path]) -> None:
    found = compared(folders, "noisy")
    n_more = found.overall.verdict.n_more_runs
    assert n_more is not None and f"runs); {n_more} more runs of each side would tell" in words_of(found)
    for n, words in ((None, "no number of such runs would tell: let both sides"), (1, "1 more run of each side")):
        case = replace(found.overall, verdict=replace(found.overall.verdict, n_more_runs=n))
        assert words in words_of(replace(found, cases=(case, *found.each)))
    assert "would tell" not in report.check_page(compared(folders, "slow")).splitlines()[1]


def test_sides_that_are_the_same_or_swapped_are_noted(folders: dict[str, Path]) -> None:
    side = of_capture(load_capture(folders["before"]))
    assert "nothing was compared" in regression.compare(side, side, with_model=False).notes[0]
    assert compared(folders, "after").notes == ()

    def at(name: str, start_s: float) -> regression.Evidence:
        one = of_capture(load_capture(folders[name]))
        runs = tuple(replace(run, started=start_s + run.run, finished=start_s + run.run + 1) for run in one.runs)
        return replace(one, runs=runs)

    for start_s, notes in ((100.0, 0), (0.0, 1), (102.0, 0)):  # after, before, and among the baseline's runs
        found = regression.compare(at("before", 50.0), at("after", start_s), with_model=False)
        assert len(found.notes) == notes, start_s
    assert "the right way round" in report.check_page(
        regression.compare(at("before", 50.0), at("after", 0.0), with_model=False)
    )


# Files


def test_a_report_that_cannot_be_written_hides_no_verdict(ends: Ends, folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder stands where the JUnit report is written before it is renamed: the page is out, the other report is
    there, and the code is the verdict's, or 2 where that would pass."""
    (tmp_path / f"junit.xml.{os.getpid()}.part").mkdir()
    for candidate, expected in (("after", 2), ("slow", 1), ("noisy", 2)):
        files = ["--junit", tmp_path / "junit.xml", "--markdown", tmp_path / f"{candidate}.md"]
        code, out, err = ends(folders["before"], folders[candidate], "--model", "none", *files)
        assert (code, err.count("perfmodel: ")) == (expected, 1)
        assert "candidate takes" in out and "junit.xml cannot be written" in err
        assert (tmp_path / f"{candidate}.md").is_file()
    assert not [path for path in tmp_path.glob("*.part") if path.is_file()]


def test_the_summary_of_a_job_is_written_where_there_is_one(
    ends: Ends, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = folders["before"], folders["after"], "--model", "none"
    assert ends(*sides, "--summary")[0] == 0  # nowhere to write to
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert ends(*sides, "--no-summary")[0] == 0
    assert not (tmp_path / "summary.md").exists()
    assert ends(*sides)[0] == ends(*sides, "--summary")[0] == 0
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert page == 2 * page[: len(page) // 2] and page.startswith("✅ **ok: ")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    code, out, err = ends(*sides)
    assert code == 2 and "candidate takes" in out and "GITHUB_STEP_SUMMARY names cannot be written" in err


def test_json_on_stdout_and_in_a_file_are_one(ends: Ends, folders: dict[str, Path], tmp_path: Path) -> None:
    sides = folders["before"], folders["lost"], "--model", "none", "--fail-on", "missing", "--inconclusive", "fail"
    code, out, err = ends(*sides, "--json", "--json-file", tmp_path / "check.json")
    assert out == (tmp_path / "check.json").read_text(encoding="utf-8")
    found = json.loads(out)
    assert (found["fail_on"], found["failures"], found["exit_code"]) == (["missing"], ["missing"], code) and code == 1
    assert "note: not measured in the candidate" in err


def test_the_same_inputs_give_the_same_bytes_and_code_in_another_process(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Sets iterate in another order under another hash seed; a model is fitted in both. The summary of a job is written
    unasked and keeps what it had."""
    written = []
    for seed in ("1", "2"):
        place = tmp_path / seed
        place.mkdir()
        names = {"--json-file": "a.json", "--junit": "a.xml", "--markdown": "a.md", "--html": "a.html"}
        options = [word for option, name in names.items() for word in (option, str(place / name))]
        command = [sys.executable, "-m", "perfmodel", "check", str(folders["before"]), str(folders["slow"])]
        (place / "summary.md").write_text("before\n")
        env = os.environ | {"PYTHONHASHSEED": seed, "GITHUB_STEP_SUMMARY": str(place / "summary.md")}
        done = subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and all(line.startswith("wrote ") for line in done.stderr.splitlines()), done.stderr
        assert (place / "summary.md").read_text().startswith("before\n❌ **regressed: candidate takes 1.4")
        written.append({name: (place / name).read_bytes() for name in names.values()} | {"": done.stdout.encode()})
    assert written[0] == written[1]


# JSON


class Side(msgspec.Struct, forbid_unknown_fields=True):
    """Under `against_model` and `against_datasheet`."""

    measured_ns: float
    measured_low_ns: float
    measured_high_ns: float
    model_ns: float
    model_low_ns: float | None
    model_high_ns: float | None
    verdict: str
    reason: str | None
    measured_over_model: float


class Judged(msgspec.Struct, forbid_unknown_fields=True):
    """One of `verdicts`."""

    workload: str
    label: str
    ratio: float
    ratio_low: float
    ratio_high: float
    baseline_ns: float
    candidate_ns: float
    n_runs_baseline: int
    n_runs_candidate: int
    verdict: str
    n_more_runs: int | None
    cell: str
    expected_ratio: float | None
    part: str | None
    against_model: Side | None
    against_datasheet: Side | None


class Cell(msgspec.Struct, forbid_unknown_fields=True):
    cell: str
    n_workloads: int


class Lost(msgspec.Struct, forbid_unknown_fields=True):
    workload: str
    label: str


class Record(msgspec.Struct):
    """The whole of it, which may get further keys under one `schema_version`."""

    schema_version: int
    baseline: str
    candidate: str
    margin_frac: float
    axes: list[str]
    is_slower: bool
    fail_on: list[str]
    failures: list[str]
    exit_code: int
    model: str | None
    no_model: str | None
    datasheet: str | None
    cells: list[Cell]
    n_missing_workloads: dict[str, int]
    lost_workloads: list[Lost]
    verdicts: list[Judged]
    changes: list[regression.Change]
    quantities: list[regression.Moved]
    parts: list[regression.PartChange]
    details: list[regression.Detail]
    notes: list[str]


@pytest.mark.parametrize("candidate", ["after", "slow", "lost", "once", "noisy"])
def test_json_has_these_keys_with_these_types(folders: dict[str, Path], candidate: str) -> None:
    words = report.check_json(compared(folders, candidate, with_model=candidate == "slow"), FAILURES)
    found = msgspec.json.decode(words, type=Record)
    assert next(iter(json.loads(words))) == "schema_version" and found.schema_version == 1
    assert sum(cell.n_workloads for cell in found.cells) == len(found.verdicts) - 1
    assert (found.verdicts[1].against_model is not None) == (candidate == "slow")
    for one in found.verdicts:
        assert one.ratio_low <= one.ratio <= one.ratio_high
        assert one.candidate_ns / one.baseline_ns == pytest.approx(one.ratio)
    assert all(re.fullmatch("[a-z][a-z_]*", key) for key in re.findall(r'"([^"]*)":', words))


def test_times_of_a_case_are_the_geometric_means_of_its_runs(folders: dict[str, Path]) -> None:
    found, side = compared(folders, "slow"), of_capture(load_capture(folders["slow"]))
    for case in found.each:
        runs = list(side.workloads[case.verdict.workload].run_ns.values())
        assert case.verdict.candidate_ns == pytest.approx(float(np.exp(np.mean(np.log(runs)))))


# JUnit and Markdown

SUITES = {"name", "time", "tests", "failures", "errors"}  # what the schemas of consumers have in common
SUITE = SUITES | {"skipped", "timestamp", "hostname", "id", "package", "file"}
CASE = {"name", "classname", "time", "file", "assertions", "status"}


@pytest.mark.parametrize("candidate", ["after", "slow", "noisy", "lost"])
@pytest.mark.parametrize("fail_on", [[], list(FAILURES)])
def test_junit_is_what_its_readers_know(folders: dict[str, Path], candidate: str, fail_on: list[str]) -> None:
    """Attributes and order as in Jenkins' and Surefire's schemas; counts are those of the elements; names are unique,
    for by them servers find the cases of two builds; a case has one outcome."""
    root = ET.fromstring(report.check_junit(compared(folders, candidate), fail_on, must_conclude=True))
    (suite,) = root
    properties, *cases = suite
    assert (root.tag, suite.tag, properties.tag) == ("testsuites", "testsuite", "properties")
    assert {*root.attrib} <= SUITES and {*suite.attrib} <= SUITE and {"name", "tests", "failures"} <= {*suite.attrib}
    assert all({*one.attrib} == {"name", "value"} for one in properties)
    for case in cases:
        assert case.tag == "testcase" and {"name", "classname", "time"} <= {*case.attrib} <= CASE
        assert float(case.attrib["time"]) >= 0
        (outcome,) = case
        assert outcome.tag in ("failure", "skipped", "system-out")
        assert {*outcome.attrib} == {"failure": {"type", "message"}, "skipped": {"message"}}.get(outcome.tag, set())
    assert len({case.attrib["name"] for case in cases}) == len(cases) == 33
    for counted, tag in (("failures", "failure"), ("skipped", "skipped"), ("errors", "error")):
        assert suite.attrib[counted] == str(len(suite.findall(f"testcase/{tag}")))
    assert (root.attrib["tests"], suite.attrib["tests"]) == ("33", "33")
    failed = int(suite.attrib["failures"]) > 0
    assert failed == (compared(folders, candidate).exit_code(fail_on, must_conclude=True) != 0)


HOSTILE = "`|<script>&[x](javascript:1)\n# \x00 𝄞" * 12


def test_a_summary_of_500_workloads_and_everything_that_changed_fits(folders: dict[str, Path]) -> None:
    found = compared(folders, "slow")
    each = [
        replace(case, verdict=replace(case.verdict, label=f"{i} {HOSTILE}"))
        for i, case in enumerate((found.each * 200)[:6000])
    ]
    changes = tuple(regression.Change(f"machine.{i}{HOSTILE}", HOSTILE, HOSTILE, True) for i in range(1500))
    lost = tuple(Measured(str(i), HOSTILE, {}) for i in range(900))
    for n in (500, 6000):
        cases = (found.overall, *each[:n])
        notes = (HOSTILE * 2,) * 300
        more = replace(found, cases=cases, changes=changes, lost=lost, notes=notes, baseline=HOSTILE)
        page = report.check_markdown(more, FAILURES)
        assert len(page.encode()) < 1_000_000
        head, _, folds = page.partition("<details>")
        assert sum(line.startswith("| `") for line in head.splitlines()) == check_files.N_FIRST == 20
        assert f"{n - 20:,} other workloads" in folds and page.count("<details>") == page.count("</details>") == 2
        left = [int(words.replace(",", "")) for words in re.findall(r"^\.\.\. and ([\d,]+) more", folds, re.M)]
        n_rows = sum(line.startswith("| `") for line in folds.splitlines())
        assert n_rows + sum(left) == n - 20 + len(changes)
        assert "<script" not in re.sub(r"`[^`]*`", "", page)


# Recipes

COMMAND = re.compile(r"""perfmodel"? +(check|collect)\b((?:[^\n#|]|#(?!\s))*)""")


def scripts() -> dict[str, str]:
    """Every script of the workflow and of the page, by where it is; the workflow's by job and step."""
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    found = {
        f"{job}: {step['name']}": step["run"] for job, one in jobs.items() for step in one["steps"] if "run" in step
    }
    fences = re.findall(r"^```(sh|yaml)\n(.*?)^```", REGRESSION_PAGE, re.M | re.S)
    return found | {f"regression.md {i}: {kind}": words for i, (kind, words) in enumerate(fences)}


def test_every_command_and_option_of_the_recipes_exists() -> None:
    known = {
        name: {o for p in one.params for o in (*p.opts, *p.secondary_opts)}
        for name, one in get_command(app).commands.items()
    }
    known["collect"] = set(re.findall(r"--[a-z-]+", (ROOT / "collectors" / "cli.py").read_text(encoding="utf-8")))
    n_seen = 0
    for where, script in scripts().items():
        for command, words in COMMAND.findall(script):
            options = set(re.findall(r"(?<!\S)(--[a-z-]+)", words))
            assert options <= known[command], where
            n_seen += len(options)
        for conditions in re.findall(r"--fail-on (\S+)", script):
            assert set(conditions.split(",")) <= set(FAILURES)
        for axis in re.findall(r"--axis (\S+)", script):
            assert axis in (*AXIS_WORDS, *AXES)
    assert n_seen > 20 and len(scripts()) >= 6


@pytest.mark.parametrize(("code_of_check", "n_runs"), [(0, 5), (1, 5), (4, 10)])
def test_the_workflow_takes_turns_and_goes_on_where_five_runs_cannot_tell(
    tmp_path: Path, code_of_check: int, n_runs: int
) -> None:
    """The script runs as a runner runs it, with commands in place of both installations that write down what was asked:
    base, head, base, head, each with one more run; `check` ends with a code of the test's."""
    for side in ("base", "head"):
        binary = tmp_path / f"venv-{side}" / "bin" / "perfmodel"
        binary.parent.mkdir(parents=True)
        binary.write_text(
            f'#!/bin/sh\n[ "$1" = check ] && exit {code_of_check}\necho "{side} $*" >> asked\n[ -d captures ]\n'
        )
        binary.chmod(0o755)
    script = scripts()["pull-request: Measure both in turns"]
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == 0
    asked = [(words.split()[0], words.split()[-1]) for words in (tmp_path / "asked").read_text().splitlines()]
    assert asked == [(side, str(run)) for run in range(1, n_runs + 1) for side in ("base", "head")]
    for words in (tmp_path / "asked").read_text().splitlines():
        side = words.split()[0]
        assert f"collect sweep --quick --device auto --out captures/{side} --runs " in words


def test_the_recipe_on_the_page_takes_turns(tmp_path: Path) -> None:
    (script,) = (words for where, words in scripts().items() if where.endswith(": sh"))
    loop = re.search(r"^for run.*?^done$", script, re.M | re.S)
    assert loop is not None
    asked = subprocess.run(
        ["bash", "-e", "-c", re.sub(r"\S+/bin/perfmodel", "echo $side", loop[0])],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [words.split()[0] for words in asked] == ["base", "head"] * 5
    assert [int(words.split()[-1]) for words in asked] == [run for run in range(1, 6) for _ in range(2)]


def test_runs_in_turns_are_seen_as_such_and_runs_after_another_are_not(folders: dict[str, Path]) -> None:
    """What the recipes rest on: the times of the runs of two captures tell whether they took turns."""
    turns = [(side, 10.0 * i) for i, side in enumerate(["before", "after"] * 5)]
    after = [(side, 10.0 * i) for i, side in enumerate(["before"] * 5 + ["after"] * 5)]
    for order, is_in_turns in ((turns, True), (after, False)):
        sides = []
        for name in ("before", "after"):
            starts = [start_s for side, start_s in order if side == name]
            one = of_capture(load_capture(folders[name]))
            runs = tuple(replace(run, started=starts[i], finished=starts[i] + 9) for i, run in enumerate(one.runs))
            sides.append(replace(one, runs=runs))
        assert alternate(*sides) == is_in_turns


@pytest.mark.parametrize(("width", "heads"), [(80, ("ratio",)), (100, ("ratio", "90 %")), (130, ("ratio", "90 %"))])
def test_a_page_keeps_to_the_columns_of_a_terminal(
    folders: dict[str, Path], width: int, heads: tuple[str, ...]
) -> None:
    """No workload looks like another: what they share stands in the head, numbers go before names do."""
    found = compared(folders, "slow", with_model=True)
    lines = report.check_page(found, width).splitlines()
    assert max(map(len, lines)) <= width
    (head,) = [line for line in lines if line.startswith("workload")]
    assert [word in head for word in ("ratio", "90 %")] == [word in heads for word in ("ratio", "90 %")]
    rows = lines[lines.index(head) + 1 :][:20]
    assert len({row.split("  ")[0] for row in rows}) == 20
