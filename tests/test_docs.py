"""Documents that cannot lie: the README's commands exist, decisions and data are indexed, names in docs are real."""

import importlib
import json
import re
import runpy
from dataclasses import fields
from pathlib import Path

import polars as pl
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from perfmodel.analysis import TABLES, analyse
from perfmodel.bound import sweep
from perfmodel.capture_lines import RESIDENCIES
from perfmodel.cli.main import app
from perfmodel.design import design
from perfmodel.diff import diff
from perfmodel.evaluation import Errors, summary
from perfmodel.explain import Explanation, Nearest
from perfmodel.fusion import chains, fusion_table
from perfmodel.groups import GROUPINGS
from perfmodel.hardware import EVIDENCE, hardware
from perfmodel.latency import FITTED_DIR, HULL, load_model
from perfmodel.latency.store import OPS
from perfmodel.offload import ACCESS_MODES, OffloadConstants
from perfmodel.offload.fitted import Fitted, HeldOut, WayFit
from perfmodel.passes import moe_passes
from perfmodel.passes.ranks import compare_devices
from perfmodel.physics import PARTS, BlasConstants, TiledConstants
from perfmodel.ranks import CLASSES_OF_RANKS, RANKS, RankSummary, Straggler, spread
from perfmodel.readers.ncu import LAUNCHES
from perfmodel.routing import PATTERNS
from perfmodel.trace import Trace
from tests.captures_made import write_synthetic_capture
from tests.conftest import ROOT
from tests.traces_made import events, kernel, launch

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_in_the_readme_and_ci_runs_the_second() -> None:
    assert "make app" in README and "make test" in README
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^app:", makefile, re.M) and re.search(r"^test:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


COMMANDS = (
    "analyze diff sweep fusion export layers fit evaluate predict routing place balance trimoe design calibrate check "
    "baseline captures schedule phases roofline list collect app"
)


@pytest.mark.parametrize("command", COMMANDS.split())
def test_every_command_has_help_and_stands_in_the_readme(command: str) -> None:
    assert f"perfmodel {command}" in README
    if command != "collect":  # its help is the collector's own
        done = CliRunner().invoke(app, [command, "--help"])
        assert done.exit_code == 0 and len(done.stdout) > 100


def test_the_outputs_in_the_readme_are_what_the_commands_print() -> None:
    regenerate = runpy.run_path(str(ROOT / "docs" / "regenerate.py"))
    slow = (*regenerate["KEPT"], "perfmodel fit", "perfmodel evaluate", "perfmodel calibrate")  # others do
    assert regenerate["with_outputs"](README, slow) == README, "run `python docs/regenerate.py readme`"


def test_links_between_documents_resolve() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_commands_in_the_documents_have_options_that_exist() -> None:
    known = {
        name: {
            o
            for each in (one, *getattr(one, "commands", {}).values())
            for p in each.params
            for o in (*p.opts, *p.secondary_opts)
        }
        for name, one in get_command(app).commands.items()
    }
    for path in ("cli.py", "expert_parallel.py"):
        known["collect"].update(re.findall(r"--[a-z-]+", (ROOT / "collectors" / path).read_text(encoding="utf-8")))
    n_seen = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name, words in re.findall(r"^(?:    |\$ )perfmodel (\w+)(.*)", page.read_text(encoding="utf-8"), re.M):
            options = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", words.partition(" #")[0]))
            assert options <= known[name], f"{page.name}: perfmodel {name}{words}"
            n_seen += len(options)
    assert n_seen > 50


def test_the_list_of_documents_in_the_readme_is_complete() -> None:
    listed = README.partition("## Documents")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in listed, page.name


def test_the_model_page_names_every_constant_and_functions_that_exist() -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    for constants in (TiledConstants, BlasConstants, OffloadConstants):
        for field in fields(constants):
            assert field.name in page, f"{constants.__name__}.{field.name}"
    modules = "physics latency offload routing evaluation baselines tile_rules explain predict transfer adapt design"
    named = re.findall(rf"`((?:{modules.replace(' ', '|')})(?:\.\w+)+)`", page)
    assert named
    for name in named:
        module, function = f"perfmodel.{name}".rsplit(".", 1)
        assert hasattr(importlib.import_module(module), function), name


def test_the_nomenclature_knows_every_pattern_access_mode_and_kind_of_evidence() -> None:
    page = (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")
    for word in (*PATTERNS, *ACCESS_MODES, *EVIDENCE):
        assert word in page


def keys_of(value: object) -> set[str]:
    """Every key and column name in a value that JSON or a table holds, at whatever depth."""
    if isinstance(value, pl.DataFrame):
        return {*value.columns}
    if isinstance(value, dict):
        return {*value}.union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list | tuple) else set()


def test_the_nomenclature_knows_every_column_and_every_key_of_json() -> None:
    trace = Trace(
        events(
            {"kind": "op", "name": "aten::mm", "start_ns": 0, "dur_ns": 9, "inputs": '[[[4, 8], [8, 2]], ["float"]]'},
            launch(1, link=1),
            kernel(5, 100, link=1, name="gemm"),
            kernel(300, 5, link=2),
        ),
        "kineto",
        4,
    )
    counted = pl.DataFrame({"flops": [1.0], "dram_bytes": [1.0], "duration_ns": [1.0]}).match_to_schema(
        LAUNCHES, missing_columns="insert"
    )
    found = [analyse(trace, hardware=hardware("gh200"), by=by, counted=counted) for by in GROUPINGS]
    made = Trace(events(kernel(0, 5, name="grouped_gemm"), kernel(9, 1, name="nccl", device=1)), "kineto", 2)
    both = compare_devices(made, "")
    ranks = RankSummary("", pl.DataFrame(schema=RANKS), pl.DataFrame(schema=CLASSES_OF_RANKS), (), {}, (), (), None)
    records = [
        *(one.to_json() for one in found),
        *(getattr(one, table) for one in found for table in TABLES),
        diff(trace, trace).to_json(),
        ranks.to_json() | vars(ranks),
        moe_passes(made).to_json(),
        *(vars(both)[name] for name in ("members", "waits", "late")),
        both.to_json(),
        spread(ranks.ranks),
        Straggler.__annotations__,
        vars(sweep([1], [1.0])),
        fusion_table(trace.events, (2,)),
        chains(trace.events, 2),
        pl.DataFrame(schema=LAUNCHES),
        trace.events,
    ]
    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")))
    assert keys_of(records) - named == set()
    assert {"explained_ns", "tklqt_ns_a", "roof_frac", "least_rank", "external id"} <= keys_of(records)


def test_the_nomenclature_knows_the_keys_of_predictions_evaluations_designs_and_model_files() -> None:
    model = load_model("epyc-zen4-2c-fp32")
    table = pl.DataFrame({"measured_ns": [1.0], "predicted_ns": [1.0], "log_half_width": [0.1], "n_tokens": [1]})
    path = FITTED_DIR / "epyc-zen4-2c-fp32.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    records = [
        {f"{part}_ns": 0 for part in PARTS},
        *(
            {field.name: None for field in fields(one)}
            for one in (Explanation, Nearest, Errors, Fitted, HeldOut, WayFit)
        ),
        summary(table),
        design(model, 1, shapes=["olmoe"]),
        {key: None for key in (*stored, *stored["confidence"], *stored["evidence"])},
        {key: None for key in (*PARTS, *HULL, *OPS, *RESIDENCIES)},
    ]
    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")))
    assert keys_of(records) - named == set()


# Keys whose value holds names of data as keys: access modes, tiers, systems, domains, parts of assignments.
BY_NAME = {
    "accesses",
    "bottleneck_frac",
    "changed",
    "covering_frac",
    "curves",
    "damaged",
    "factors",
    "fingerprint",
    "pictured",
    "speedup_over",
    "systems",
    "tier_bytes",
    "utilisation",
}


def without_names_of_data(value: object) -> object:
    """The value with lists instead of objects below the keys of BY_NAME."""
    if isinstance(value, dict):
        kept = {key: without_names_of_data(one) for key, one in value.items()}
        return {k: [*v.values()] if k in BY_NAME and isinstance(v, dict) else v for k, v in kept.items()}
    return [without_names_of_data(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("command", "among"),
    [
        (
            f"roofline {ROOT / 'traces' / 'epyc-zen4-2c-fp32'} --model epyc-zen4-2c-fp32 --top 2",
            {"ridge_flops_per_byte", "nominal", "rows_per_active_expert", "lost_ns", "gemms_ns", "n_left_out"},
        ),
        ("roofline gh200", {"reached", "nominal", "tiers", "lost_to_frac"}),
        ("routing temporal:4 --shape olmoe --steps 20 --against uniform", {"verdict", "joined_steps", "kept_frac"}),
        ("balance --shape olmoe --routing temporal:4 --gpus 4 --tokens 256 --steps 20", {"token_counts", "idle_frac"}),
        ("trimoe --shape glm-4.5-air --batch 256 --steps 4 --layers 2", {"sensitivity", "migration_frac"}),
        (
            "schedule --shape made-up --hardware h100-sxm --gpus 2 --tokens 64 --compare 1,2 --gpu-price 2",
            {"schedules", "gemm2_ns", "dominating_skew", "tokens_per_s_per_price", "dispatch_ns"},
        ),
        (
            "schedule --shape made-up --hardware h100-sxm --gpus 2 --tokens 64 --curves",
            {"pictured", "slowest_gpu", "overlap_efficiency", "exponent", "padding_frac"},
        ),
        (
            f"check {ROOT / 'traces' / 'epyc-zen5-2c-fp32'} {ROOT / 'traces' / 'epyc-zen4-2c-fp32'} --axis machine "
            "--axis software",
            {"verdicts", "against_model", "measured_over_model", "is_declared", "moved", "n_missing_workloads"},
        ),
        (
            f"check --new-machine {ROOT / 'traces' / 'epyc-zen4-2c-fp32'}",
            {"items", "least_frac", "next_steps", "n_look_at", "n_runs_wanted", "measured_over_model"},
        ),
        (
            "place --shape made-up --routing temporal:4 --steps 4 --step-tokens 64 --hardware gh200 --hbm-budget 50% "
            "--limit 1.5 --pareto",
            {"prediction", "slowdown", "notes", "leaving", "n_offloaded", "table_ns"},
        ),
    ],
)
def test_the_nomenclature_knows_the_keys_of_routing_placements_and_balancing(
    command: str, among: set[str], tmp_path: Path
) -> None:
    small = {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 2}
    small |= {"num_experts": 4, "num_experts_per_tok": 2, "model_type": "qwen3_moe", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(small))
    words = command.replace("made-up", str(tmp_path / "config.json")).split()
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False, standalone_mode=False)
    keys = keys_of(without_names_of_data(json.loads(done.stdout)))
    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")))
    assert keys - named == set()
    assert among <= keys


def test_the_nomenclature_knows_the_keys_of_baselines(tmp_path: Path) -> None:
    one, other = (write_synthetic_capture(tmp_path / name, noise=lambda at=at: at) for name, at in (("a", 1), ("b", 2)))
    printed = []
    for words in (f"save {one}", "list", "show synthetic", f"update {other} --reason slower"):
        command = ["baseline", *words.split(), "--store", str(tmp_path / "store"), "--json"]
        done = CliRunner().invoke(app, command, catch_exceptions=False, standalone_mode=False)
        printed.append(without_names_of_data(json.loads(done.stdout)))
    workload = printed[2]["workloads"][0]["workload"]
    command = ["baseline", "show", "synthetic", "--workload", workload, "--store", str(tmp_path / "store"), "--json"]
    printed.append(json.loads(CliRunner().invoke(app, command, catch_exceptions=False, standalone_mode=False).stdout))
    named = set(re.findall(r"`([^`]+)`", (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")))
    assert keys_of(printed) - named == set()
    assert {"n_unmeasured", "ratio_low", "medians", "foreign", "spread_frac"} <= keys_of(printed)


def test_every_shipped_data_file_has_its_origin_written_down() -> None:
    page = (ROOT / "perfmodel" / "data" / "README.md").read_text(encoding="utf-8")
    for entry in (ROOT / "perfmodel" / "data").iterdir():
        if entry.name != "README.md" and (entry.is_file() or any(entry.iterdir())):
            assert entry.name in page
