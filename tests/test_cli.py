"""The command line as a person runs it: exit codes, one clear sentence for every mistake, streams that close."""

import gzip
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest

from perfmodel.capture import shipped_captures
from perfmodel.cli import shell
from tests.captures_made import SHAPES, write_synthetic_capture
from tests.commands import run
from tests.conftest import ROOT
from tests.made_up import made_up_observations
from tests.test_moe_perf import made_up_table, row

PREDICT = ["predict", "--hardware", "gh200", "--shape", "olmoe", "--tokens", "64"]


def refused(*words: str, code: int = 2) -> str:
    """Run a command that must fail: the code, nothing on stdout, no traceback; returns what it said."""
    done = run(*words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    return done.stderr


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic trace: one operator, one launch, its kernel, and a kernel that nobody launched."""
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1.0, "dur": 9.0},
        {
            "ph": "X",
            "cat": "cuda_runtime",
            "name": "cudaLaunchKernel",
            "pid": 1,
            "tid": 1,
            "ts": 2.0,
            "dur": 3.0,
            "args": {"correlation": 7},
        },
        {
            "ph": "X",
            "cat": "kernel",
            "name": "gemm<bf16>",
            "pid": 0,
            "tid": 7,
            "ts": 6.5,
            "dur": 4.0,
            "args": {"device": 0, "stream": 7, "correlation": 7},
        },
        {
            "ph": "X",
            "cat": "kernel",
            "name": "early",
            "pid": 0,
            "tid": 7,
            "ts": 0.5,
            "dur": 1.0,
            "args": {"device": 0, "stream": 7, "correlation": 3},
        },
    ]
    path = tmp_path_factory.mktemp("cli") / "synthetic.json"
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


PAGE_KEYS = {
    *("n_repaired", "n_dropped", "notes", "n_kernels_found_by", "bound", "findings", "by", "groups", "classes"),
    *("kernels", "launch_calls", "operators", "host_operators", "ranges", "copies", "exposed", "gaps", "steps"),
    *("products", "counted", "profiler_overhead", "profiler_overhead_ns"),
}


def test_analyze_json_has_exactly_the_promised_keys_and_values(trace: Path) -> None:
    found = json.loads(run("analyze", str(trace), "--json").stdout)
    assert {key: value for key, value in found.items() if key not in PAGE_KEYS} == {
        "source": "kineto",
        "n_events": 4,
        "n_launches": 1,
        "n_kernels": 2,
        "n_kernels_joined": 1,
        "n_kernels_orphan": 1,
        "n_kernels_graph": 0,
        "tklqt_ns": 4500,
        "tklqt_non_graph_ns": 4500,
        "tklqt_graph_ns": 0,
        "tklqt_first_kernel_ns": 4500,
        "delay_min_ns": 4500,
        "delay_median_ns": 4500.0,
        "delay_p99_ns": 4500.0,
        "delay_max_ns": 4500,
        "n_negative_delays": 0,
        "n_queued": 1,
        "queue_ns": 1500,
        "launch_call_ns": 3000,
        "kernel_launch_call_ns": 3000,
        "akd_ns": 2500.0,
        "kernel_time_ns": 5000,
        "kernel_busy_ns": 5000,
        "gpu_busy_ns": 5000,
        "gpu_span_ns": 10000,
        "gpu_idle_ns": 5000,
        "gpu_idle_frac": 0.5,
        "gpu_idle_eq5_ns": 4500,
        "inference_latency_ns": 9500,
        "devices": [
            {
                "rank": None,
                "device": 0,
                "n_kernels": 2,
                "kernel_time_ns": 5000,
                "kernel_busy_ns": 5000,
                "gpu_busy_ns": 5000,
                "gpu_span_ns": 10000,
                "gpu_idle_frac": 0.5,
            }
        ],
    }


def test_analyze_json_holds_everything_of_the_page(trace: Path) -> None:
    found = json.loads(run("analyze", str(trace), "--json").stdout)
    assert set(found) > PAGE_KEYS
    assert found["n_kernels_found_by"] == {"nesting": 1, "external id": 0}
    assert (found["n_repaired"], found["n_dropped"], found["notes"], found["ranges"]) == (0, 0, [], [])
    assert [finding["name"] for finding in found["findings"]] == ["host_bound", "dominant_class"]
    assert found["classes"][0] == {"class": "gemm", "n_kernels": 1, "time_ns": 4000, "time_frac": 0.8}
    assert [row["name"] for row in found["kernels"]] == ["gemm<bf16>", "early"]
    assert [(row["name"], row["kernel_time_ns"]) for row in found["operators"]] == [
        ("aten::mm", 4000),
        ("(orphans)", 1000),
    ]
    assert found["host_operators"] == [{"name": "aten::mm", "n_calls": 1, "time_ns": 9000}]
    assert len(json.loads(run("analyze", str(trace), "--json", "--top", "1").stdout)["kernels"]) == 1


def test_diff_compares_two_traces(trace: Path) -> None:
    page = run("diff", str(trace), str(trace)).stdout
    assert "b / a" in page and "aten::mm" in page and "1.00x" in page
    found = json.loads(run("diff", str(trace), str(trace), "--json").stdout)
    assert set(found) == {"n_steps_a", "n_steps_b", "metrics", "classes", "operators"}
    assert found["operators"][0]["ratio"] == 1
    assert "no such file" in refused("diff", str(trace), "nowhere.json").lower()


def test_sweep_finds_the_transition_from_traces_and_from_a_table(trace: Path, tmp_path: Path) -> None:
    found = json.loads(run("sweep", f"1={trace}", f"4={trace}", "--json").stdout)
    assert (found["transition_batch"], [row["tklqt_ns"] for row in found["table"]]) == (None, [4500, 4500])
    table = tmp_path / "sweep.csv"
    table.write_text("batch,tklqt_ns\n1,1000000\n2,1100000\n8,9000000\n")
    assert "device-bound from batch 8 on" in run("sweep", str(table)).stdout
    assert "no batch size is device-bound" in run("sweep", str(table), "--factor", "10").stdout
    table.write_text("model,gpu,batch,tklqt_us\na,X,1,1000\na,X,2,9000\na,Y,1,1000\na,Y,2,1000\n")
    both = json.loads(run("sweep", str(table), "--json").stdout)["sweeps"]
    assert [(one["name"], one["transition_batch"]) for one in both] == [("a, X", 2), ("a, Y", None)]
    assert run("sweep", str(table)).stdout.startswith("a, X\n\nbatch")
    for words, said in (
        (("x",), "expected BATCH=TRACE"),
        ((f"a={trace}",), "whole number"),
        ((str(table), "--factor", "none"), "--factor is 'none'"),
        ((str(tmp_path / "none.csv"),), "none.csv: cannot be read: No such file"),
    ):
        assert said in refused("sweep", *words)


def test_analyze_groups_its_metrics_and_refuses_other_groups(trace: Path) -> None:
    page = run("analyze", str(trace), "--by", "stream").stdout
    assert "by stream" in page and "device 0, stream 7" in page
    found = json.loads(run("analyze", str(trace), "--by", "thread", "--json").stdout)
    assert found["by"] == "thread" and sum(row["n_kernels"] for row in found["groups"]) == 2
    assert "expected one of rank, device" in refused("analyze", str(trace), "--by", "moon")
    assert "unknown hardware" in refused("analyze", str(trace), "--hardware", "gh300")
    assert "cannot" in refused("analyze", str(trace), "--ncu", str(trace.parent / "none.csv"))


@pytest.fixture
def ranks(trace: Path, tmp_path: Path) -> Path:
    """A folder of two ranks, the second computing twice as long, and a third whose file is a pointer."""
    folder = tmp_path / "ranks"
    folder.mkdir()
    document = json.loads(trace.read_text())
    (folder / "rank-0.json").write_text(json.dumps({**document, "distributedInfo": {"rank": 0}}))
    slow = [
        {**event, "dur": event["dur"] * (2 if event["cat"] == "kernel" else 1)} for event in document["traceEvents"]
    ]
    (folder / "rank-1.json").write_text(json.dumps({"distributedInfo": {"rank": 1}, "traceEvents": slow}))
    (folder / "rank-2.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    return folder


def test_a_folder_of_ranks_is_compared_rank_by_rank(ranks: Path) -> None:
    page = run("analyze", str(ranks)).stdout
    assert "2 ranks, 1 file not read" in page and "not read: rank-2.json: a Git LFS pointer" in page
    assert "Rank 1 holds up the others: it computes 10.0 µs, 33.3 % more than the median rank (7.50 µs)" in page
    found = json.loads(run("analyze", str(ranks), "--json").stdout)
    assert [row["compute_time_ns"] for row in found["ranks"]] == [5000, 10000]
    assert found["straggler"]["rank"] == 1


def test_a_folder_of_ranks_is_one_trace_where_groups_are_asked_for(ranks: Path, tmp_path: Path) -> None:
    done = run("analyze", str(ranks), "--by", "rank", "--json", "--workers", "1", "--cache", str(tmp_path / "cache"))
    found = json.loads(done.stdout)
    assert [(row["rank"], row["n_kernels"]) for row in found["groups"]] == [(0, 2), (1, 2)]
    assert found["n_kernels"] == 4 and "rank-2.json" in found["notes"][0]
    assert run("export", str(ranks), "--perfetto", str(tmp_path / "view.json")).returncode == 0


def test_ranks_are_compared_under_rules_of_ones_own(ranks: Path, tmp_path: Path) -> None:
    rules = tmp_path / "mine.toml"
    rules.write_text('[[rule]]\nclass = "collective"\npattern = "gemm"\n')
    found = json.loads(run("analyze", str(ranks), "--classes", str(rules), "--json").stdout)
    assert [row["communication_time_ns"] for row in found["ranks"]] == [4000, 8000]
    rules.write_text("[[rule]]")
    assert str(rules) in refused("analyze", str(ranks), "--classes", str(rules))


@pytest.mark.parametrize("command", ["diff", "fusion", "sweep", "export"])
def test_every_command_that_reads_traces_keeps_what_it_read(command: str, trace: Path, tmp_path: Path) -> None:
    words = {
        "diff": [str(trace), str(trace)],
        "fusion": [str(trace)],
        "sweep": [f"1={trace}"],
        "export": [str(trace), "--perfetto", str(tmp_path / "view.json")],
    }[command]
    assert run(command, *words, "--cache", str(tmp_path / "kept")).returncode == 0
    assert len(list((tmp_path / "kept").glob("*.perfmodel.parquet"))) == 1
    assert not list(trace.parent.glob("*.perfmodel.parquet"))


def test_a_person_who_waited_long_without_a_cache_is_told_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.hint_at_cache(4 * 10**9, None)
    assert not capsys.readouterr().err  # nobody watches
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    shell.hint_at_cache(2 * 10**9, None)
    shell.hint_at_cache(4 * 10**9, "beside")
    assert not capsys.readouterr().err
    shell.hint_at_cache(4 * 10**9, None)
    assert capsys.readouterr().err == "reading took 4.00 s; with `--cache beside` the next time takes a moment\n"


def test_options_for_ranks_are_refused_where_there_are_none(trace: Path, ranks: Path, tmp_path: Path) -> None:
    assert "read a folder of ranks" in refused("analyze", str(trace), "--workers", "2")
    assert "not a backend" in refused("analyze", str(ranks), "--backend", "moon")
    assert "only dask does" in refused("analyze", str(ranks), "--scheduler", "tcp://127.0.0.1:1")
    assert "--workers is 'x'" in refused("analyze", str(ranks), "--workers", "x")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("analyze", str(tmp_path / "empty"))


def test_analyze_text_says_what_was_joined_and_keeps_names_literal(trace: Path) -> None:
    page = run("analyze", str(trace)).stdout
    assert "2 kernels, 1 joined to their launch (50.0 %), 1 orphans" in page
    assert "gemm<bf16>" in page


def test_fusion_runs_on_a_trace(trace: Path) -> None:
    done = json.loads(run("fusion", str(trace), "--lengths", "2", "--json").stdout)
    assert done["lengths"][0]["length"] == 2


def test_export_writes_a_file_that_reads_back(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "view.json.gz"
    done = run("export", str(trace), "--perfetto", str(out))
    assert done.returncode == 0 and not done.stdout and "wrote 9 slices" in done.stderr
    first, second = (json.loads(run("analyze", str(path), "--json").stdout) for path in (trace, out))
    assert {**first, "n_events": 0} == {**second, "n_events": 0}
    assert "cannot write" in refused("export", str(trace), "--perfetto", str(tmp_path / "nowhere" / "view.json"))
    assert refused("export", str(trace)).count("\n") == 1


@pytest.mark.parametrize("case", ["missing", "folder", "text", "truncated", "not a trace", "no tables", "empty"])
def test_a_file_that_is_no_trace_gets_one_sentence(case: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if case == "folder":
        path = tmp_path
    elif case == "text":
        path.write_text("hello")
    elif case == "truncated":
        path.write_bytes(
            gzip.compress(json.dumps({"traceEvents": [{"ph": "X", "name": str(i)} for i in range(9999)]}).encode())[
                :2000
            ]
        )
    elif case == "not a trace":
        path.write_text('{"answer": 42}')
    elif case == "no tables":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("create table t (x)")
    elif case == "empty":
        path.write_text("")
    said = refused("analyze", str(path))
    assert said.startswith("perfmodel: ") and said.count("\n") <= 2


def test_predict_json_has_exactly_the_promised_keys() -> None:
    result = json.loads(run(*PREDICT, "--offload", "0.25", "--routing", "mmlu-like", "--json").stdout)
    assert set(result) == {"latency_ns", "baseline_latency_ns", "slowdown", "parts", "bottleneck", "interval", "basis"}
    assert result["slowdown"] == pytest.approx(result["latency_ns"] / result["baseline_latency_ns"])
    assert sum(result["parts"].values()) == pytest.approx(result["latency_ns"])
    assert (result["interval"], result["basis"]) == (None, "datasheet")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--hardware", "gh300"], "known: "),
        (["--shape", "gpt-9"], "known: "),
        (["--shape", "nowhere/config.json"], "config.json"),
        (["--routing", "zeta"], "routing"),
        (["--offload", "1.5"], "expected 0 to 1"),
        (["--offload", "-0.1"], "expected 0 to 1"),
        (["--tokens", "64.5"], "expected a whole number"),
        (["--tokens", "0"], "at least 1"),
        (["--tokens", "9" * 4000], "expected"),
        (["--tokens", "9" * 20], "at most 1,000,000,000,000"),
        (["--offload", "abc"], "--offload is 'abc'"),
        (["--offload", "nan"], "expected 0 to 1"),
        (["--access", "warp"], "known: "),
        (["--model", "nowhere.json"], "no model file"),
    ],
)
def test_bad_settings_get_one_sentence(more: list[str], words: str) -> None:
    said = refused(*PREDICT, *more)
    assert words in said and said.startswith("perfmodel: ")


def test_fit_then_predict_with_the_model(tmp_path: Path) -> None:
    capture, model = write_synthetic_capture(tmp_path / "synthetic"), tmp_path / "model.json"
    page = run("fit", str(capture), "--out", str(model)).stdout
    assert "held-out shape" in page and "roofline only" in page
    shape = SHAPES[1]
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "mixtral",
                "num_local_experts": shape.n_experts,
                "num_experts_per_tok": shape.top_k,
                "hidden_size": shape.hidden,
                "intermediate_size": shape.inter,
                "num_hidden_layers": 2,
                "torch_dtype": "float32",
            }
        )
    )
    done = run(
        "predict",
        "--hardware",
        str(capture),
        "--shape",
        str(config),
        "--tokens",
        "64",
        "--op",
        "moe-layer",
        "--model",
        str(model),
        "--json",
    )
    result = json.loads(done.stdout)
    assert result["basis"] == "fitted"
    assert result["interval"][0] < result["latency_ns"] < result["interval"][1]


def test_a_missing_option_is_one_sentence() -> None:
    assert refused("predict", "--shape", "olmoe").count("\n") == 1
    assert refused("frobnicate").count("\n") == 1


def test_a_damaged_capture_or_model_never_reads_as_slower(tmp_path: Path) -> None:
    a, b = write_synthetic_capture(tmp_path / "a"), write_synthetic_capture(tmp_path / "b")
    manifest = json.loads((b / "capture.json").read_text())
    for damage in ({"machine": [1]}, {"settings": None}, {"runs": [{}]}, {"runs": 5}, {"calibration": "x"}):
        (b / "capture.json").write_text(json.dumps({**manifest, **damage}))
        assert "damaged" in refused("check", str(a), str(b))
    (b / "capture.json").write_text(json.dumps(manifest))
    with (b / "observations.jsonl").open("a") as file:
        workload = json.loads((b / "observations.jsonl").read_text().splitlines()[0])["workload"]
        file.write(json.dumps({"workload": workload, "run": 9, "times_ns": [2**70]}) + "\n")
    assert "damaged" in refused("check", str(a), str(b))


def test_missing_workloads_are_said(tmp_path: Path) -> None:
    a, b = write_synthetic_capture(tmp_path / "a"), write_synthetic_capture(tmp_path / "b")
    rows = (b / "observations.jsonl").read_text().splitlines()
    gone = json.loads(rows[0])["workload"]
    (b / "observations.jsonl").write_text("".join(row + "\n" for row in rows if gone not in row))
    done = run("check", str(a), str(b), "--json")
    assert json.loads(done.stdout)["n_missing_workloads"] == {"baseline": 0, "candidate": 1}
    assert "note: not measured in the candidate, so not compared: " in done.stderr


def test_fit_refuses_what_is_no_capture_and_writes_nothing(tmp_path: Path) -> None:
    assert "not a capture folder" in refused("fit", str(tmp_path), "--out", str(tmp_path / "m.json"))
    assert not list(tmp_path.iterdir())


def test_check_exit_codes(tmp_path: Path) -> None:
    a = write_synthetic_capture(tmp_path / "a")
    slow = write_synthetic_capture(tmp_path / "slow", noise=lambda: 1.4)
    other = write_synthetic_capture(tmp_path / "other", machine={"cpu_model": "another synthetic CPU"})
    assert run("check", str(a), str(a)).returncode == 0
    done = run("check", str(a), str(slow))
    assert done.returncode == 1 and "regressed" in done.stdout
    assert json.loads(run("check", str(a), str(slow), "--json").stdout)["is_slower"] is True
    assert "not comparable" in refused("check", str(a), str(other), code=3)
    assert "found nothing" in refused("check", str(a), str(tmp_path / "nowhere"))
    assert "expected a percentage" in refused("check", str(a), str(a), "--margin", "lots")


def test_schedule_and_list() -> None:
    done = run("schedule", "--shape", "olmoe", "--hardware", "h100-sxm", "--gpus", "8", "--tokens", "64", "--json")
    assert [row["schedule"] for row in json.loads(done.stdout)["schedules"]] == ["bulk", "chunked", "fused"]
    assert "64 experts cannot be shared evenly by 7 GPUs" in refused(
        "schedule", "--shape", "olmoe", "--hardware", "h100-sxm", "--gpus", "7", "--tokens", "8"
    )
    listed = run("list").stdout
    assert "gh200" in listed and "deepseek-v3" in listed and "mmlu-like" in listed


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("perfmodel ")
    assert "predict" in run("--help").stdout
    assert run().returncode == 2  # no command is a usage error, answered with the help


def test_shipped_captures_are_found() -> None:
    assert shipped_captures()


# --- terminals, pipes and places of every kind ------------------------------------------------------------------------


def test_a_terminal_that_knows_few_characters_gets_others(trace: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "perfmodel", "analyze"]
    done = subprocess.run([*command, str(trace)], cwd=ROOT, capture_output=True, env=env, check=True)
    page = run("analyze", str(trace)).stdout
    assert "µs" in page and done.stdout.decode("ascii") == page.replace("µ", "u").replace("…", "~")
    done = subprocess.run([*command, str(tmp_path / "né")], cwd=ROOT, capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr.decode("ascii").count("\n")) == (2, 1) and b"n?: cannot" in done.stderr


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "0<&- >&- 2>&-"])
def test_closed_streams_are_no_defect(closed: str, trace: Path) -> None:
    command = f'"{sys.executable}" -m perfmodel analyze "$1" {closed}'
    done = subprocess.run(["sh", "-c", command, "sh", str(trace)], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [("--help",), ("analyze", "TRACE", "--json"), ("list",)])
def test_whoever_reads_may_leave(words: tuple[str, ...], trace: Path) -> None:
    words = tuple(word.replace("TRACE", str(trace)) for word in words)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "perfmodel", *words], cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_of_several_lines_is_refused_in_one() -> None:
    assert refused("analyze", "no\nsuch").count("\n") == 1


def test_export_never_replaces_what_it_reads(trace: Path, tmp_path: Path) -> None:
    source, link = tmp_path / "trace.json", tmp_path / "link.json"
    source.write_bytes(trace.read_bytes())
    link.symlink_to(source)
    for target in (source, link):
        assert "is the trace itself" in refused("export", str(source), "--perfetto", str(target))
    assert "lies in the folder" in refused("export", str(tmp_path), "--perfetto", str(tmp_path / "view.json"))
    assert "expected the name" in refused("export", str(source), "--perfetto", "")
    assert source.read_bytes() == trace.read_bytes() and set(tmp_path.iterdir()) == {source, link}


def test_a_table_with_numbers_that_are_none_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "sweep.csv"
    table.write_text("batch,tklqt_ns\n1,10\n2,NaN\n")
    assert "no number" in refused("sweep", str(table), "--json")
    table.write_text("batch,tklqt_ns\n1.5,10\n")
    assert "no whole number" in refused("sweep", str(table))


@pytest.fixture(scope="module")
def made_up_table_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up moe_perf table of one kernel, and a second kernel whose name begins with the first's."""
    observations = made_up_observations(tokens=(1, 8, 64, 512, 4096))
    rows = [
        row(
            kernel_source="made_up",
            moe_dtype=dtype,
            num_tokens=one["n_tokens"],
            hidden_size=one["hidden"],
            inter_size=one["inter"],
            topk=one["top_k"],
            num_experts=one["n_experts"],
            moe_tp_size=1,
            distribution=one["routing"],
            latency=one["time_ns"] / 1e6,
        )
        for dtype in ("fp8", "fp8_block")
        for one in observations.iter_rows(named=True)
        if dtype == "fp8" or one["shape"] == observations["shape"][0]
    ]
    return made_up_table(tmp_path_factory.mktemp("made-up-table"), *rows)


def test_a_model_is_judged_by_the_table_of_its_own_kernel_alone(made_up_table_path: Path, tmp_path: Path) -> None:
    table, model = str(made_up_table_path), str(tmp_path / "model.json")
    run("fit", table, "--kernel", "trtllm/9.9.9/made_up/fp8", "--out", model)
    result = json.loads(run("evaluate", model, table, "--json").stdout)
    (one,) = result["kernels"]
    assert (one["kernel"], one["split"], one["n"]) == ("trtllm/9.9.9/made_up/fp8", "none", 75)
    assert one["median_ape"] < 0.1 and 0.8 < one["coverage90"] <= 1 and one["baselines"] == {}
    elsewhere = json.loads(run("evaluate", model, table, "--hardware", "h200-sxm", "--json").stdout)
    assert elsewhere["overall"]["median_ape"] > one["median_ape"]
    assert elsewhere["overall"]["half_width"] > 1.5 * one["half_width"]  # its constants may be others there
    assert "is a cpu" in refused("evaluate", model, table, "--hardware", "xeon-spr")
    newer = tmp_path / "newer.parquet"
    pl.read_parquet(table).with_columns(version=pl.lit("9.9.10")).write_parquet(newer)
    done = run("evaluate", model, str(newer), "--json")
    (other,) = json.loads(done.stdout)["kernels"]
    assert (other["kernel"], other["n"]) == ("trtllm/9.9.10/made_up/fp8", 75)
    assert other["median_ape"] == one["median_ape"] and other["half_width"] > one["half_width"]
    assert "trtllm/9.9.10/made_up/fp8 on h100-sxm is judged by a model of trtllm/9.9.9/made_up/fp8 on" in done.stderr
    assert "fp8, by the model as it is" in run("evaluate", model, table).stdout
    assert "there are synthetic" in refused("evaluate", model, str(write_synthetic_capture(tmp_path / "cpu")))


def test_what_cannot_be_held_out_is_left_out_and_said(made_up_table_path: Path) -> None:
    done = run("evaluate", str(made_up_table_path), "--json")
    result = json.loads(done.stdout)
    assert [one["kernel"] for one in result["kernels"]] == ["trtllm/9.9.9/made_up/fp8"]
    assert result["kernels"][0]["split"] == "shape" and result["kernels"][0]["baselines"]["interpolation"]["n"] == 75
    assert "left out trtllm/9.9.9/made_up/fp8_block: holding out shapes needs at least 3, found 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "moon"], "unknown split 'moon'; known: shape, routing, tokens, random, none"),
        (["--split", "none"], "give MODEL.json first"),
        (["--kernel", "marlin"], "no kernel contains 'marlin'; there are "),
        (["--kernel", "made_up/fp8_block"], "holding out shapes needs at least 3, found 1"),
        (["--hardware", "h900"], "known: "),
    ],
)
def test_an_evaluation_that_makes_no_sense_gets_one_sentence(
    made_up_table_path: Path, words: list[str], said: str
) -> None:
    assert said in refused("evaluate", str(made_up_table_path), *words)


def test_one_source_that_cannot_be_split_gets_one_sentence_too(tmp_path: Path) -> None:
    capture = write_synthetic_capture(tmp_path / "two", shapes=SHAPES[:2])
    said = refused("evaluate", str(capture))
    assert "holding out shapes needs at least 3, found 2: synthetic-a, synthetic-b" in said
    assert said.count("\n") == 2  # what was read, and why it is refused
    assert "give what to judge the model by" in refused("evaluate", shipped_captures()[0].name)
    assert "no model file" in refused("evaluate", str(tmp_path / "none.json"), str(capture))
