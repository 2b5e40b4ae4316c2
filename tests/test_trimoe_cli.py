"""`perfmodel trimoe` as a person runs it, and docs/trimoe.md, which says what is computed."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from perfmodel import moe
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.placement import NEAR_DATA
from perfmodel.routing import write_counts
from perfmodel.trimoe import study_page
from perfmodel.trimoe.study import FACTORS, SPEEDUP, alone_ns, gpu_utilisation_frac
from perfmodel.trimoe.systems import TRIMOE
from tests.conftest import ROOT

QUICK = ("trimoe", "--shape", "glm-4.5-air", "--batch", "256", "--steps", "4", "--layers", "2")
PAGE = ROOT / "docs" / "trimoe.md"


def run(*words: str) -> str:
    done = CliRunner().invoke(app, [*QUICK, *words], catch_exceptions=False, standalone_mode=False)
    return done.stdout


def refused(*words: str) -> str:
    with pytest.raises(InputError) as error:
        CliRunner().invoke(app, [*QUICK, *words], catch_exceptions=False, standalone_mode=False)
    return str(error.value)


def test_the_page_says_what_is_computed_beside_what_is_published() -> None:
    page = run("--hardware", "trimoe")
    for words in ("GPU-CPU", "GPU-NDP", "GPU-only", "CPU-cold", "published 2.12x to 2.83x", "published under 3.3 %"):
        assert words in page
    for name in (*FACTORS, "utilisation", "bottleneck", "overhead", "predictor", "FLOP/s x0.25"):
        assert name in page
    assert "published figures are of deepseek-v2, qwen3-235b-a22b, glm-4.5-air at 256 to 768 tokens" in " ".join(
        page.split()
    )
    assert "4 steps of 2 layers that stand for 45; 25 of 128 experts" in page
    assert all(len(line) <= 120 for line in page.splitlines())


def test_json_holds_the_same_with_units_and_switches_change_it() -> None:
    whole = json.loads(run("--json"))
    over = {
        name: whole["systems"][name]["step_ns"] / whole["step_ns"]
        for name in ("GPU-CPU", "GPU-NDP", "GPU-only", "CPU-cold")
    }
    assert whole["speedup_over"] == pytest.approx(over) and whole["speedup"] == pytest.approx(min(over.values()))
    assert set(whole["factors"]) == set(FACTORS) and whole["n_steps"] == 4 and len(whole["sensitivity"]) == 8
    assert whole["systems"]["TriMoE"]["step_ns"] == whole["step_ns"]
    bare = json.loads(run("--json", "--no-cpu", "--no-refinement", "--no-relayout"))
    assert bare["step_ns"] == pytest.approx(bare["systems"]["no CPU"]["step_ns"])
    assert "cpu" not in bare["systems"]["TriMoE without CPU, refinement, relayout"]["utilisation"]
    slow = json.loads(run("--json", "--ndp-bandwidth", "0.5x", "--ndp-flops", "500GFLOP/s", "--hbm-slots", "0"))
    assert slow["n_slots"] == 0 and slow["step_ns"] > whole["step_ns"]
    assert json.loads(run("--json", "--hidden-moves"))["overhead_frac"] == 0 < whole["overhead_frac"]
    for cold in (0.0, 0.5):
        classes = json.loads(run("--json", "--cold-below", str(cold), "--hot-from", "3"))
        assert classes["bounds"] == {"cold_below": cold, "hot_from": 3.0}
    quarter = next(row for row in whole["sensitivity"] if row["ndp_computing_scale"] == 0.25)
    alone = json.loads(run("--json", "--ndp-flops", "0.25x"))
    assert alone["step_ns"] == pytest.approx(quarter["step_ns"])


def test_a_fitted_model_of_the_gpu_takes_the_place_of_default_constants() -> None:
    resident = ("--json", "--hbm-slots", "45")
    plain, fitted = (json.loads(run(*resident, *words)) for words in ((), ("--model", "h100-sxm-vllm-triton-bf16")))
    ours, theirs = (one["systems"]["GPU-CPU"]["utilisation"]["gpu"] for one in (plain, fitted))
    assert ours != theirs and 0.2 < ours / theirs < 5
    with pytest.raises(InputError):
        run("--model", "nope")


def test_a_recorded_routing_and_tables_of_times_are_read(tmp_path) -> None:
    counts = np.zeros((6, 3, 128), dtype=np.int64)
    counts[:, :, :8] = 16
    write_counts(tmp_path / "made.npz", counts, np.arange(3), 8, np.full(6, 16))
    (tmp_path / "gpu.csv").write_text("tokens,ns\n1,1000\n256,1000\n")
    found = json.loads(
        run(
            "--json",
            "--routing",
            str(tmp_path / "made.npz"),
            "--table",
            f"gpu={tmp_path / 'gpu.csv'}",
            "--hbm-slots",
            "8",
        )
    )
    assert found["n_steps"] == 4 and found["n_layers_simulated"] == 3  # of six, two come before
    assert found["step_ns"] == pytest.approx(45 * 8 * 1000)  # eight experts of each layer, all in device memory


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hardware", "gh200"), "'gh200' has no memory modules that compute.*trimoe"),
        (("--ndp-flops", "3"), "expected a factor such as 0.5x or a rate"),
        (("--ndp-flops", "40GB/s"), "not a rate of this kind"),
        (("--hbm-slots", "-1"), "expected a whole number, 0 or more"),
        (("--hbm-slots", "100"), "take 156 GB, the device memory of 'trimoe' is 80.0 GB"),
        (("--hbm-slots", "3", "--hbm-budget", "4GB"), "not both"),
        (("--routing", "nope"), "no routing file 'nope'.*three-class"),
        (("--table", "gpu"), "expected DOMAIN=FILE.csv"),
        (("--cold-below", "-2"), "classes begin at -2 and 4 mean loads, expected two ascending numbers from 0 on"),
        (("--cold-below", "few"), "--cold-below is 'few'"),
        (("--cold-below", "5"), "classes begin at 5 and 4 mean loads"),
        (("--batch", "many"), "--batch is 'many', expected a whole number"),
    ],
)
def test_a_mistake_gets_one_sentence(words: tuple[str, ...], said: str) -> None:
    assert re.search(said, refused(*words))


def test_the_document_is_what_is_computed() -> None:
    written = PAGE.read_text(encoding="utf-8")
    for section in (study_page._head(), study_page._ours(), study_page._statements()):
        assert section in written, "run `python docs/regenerate.py`"
    model = "glm-4.5-air"
    for flops in (1.0, study_page.SLOW_FLOPS):
        found = study_page.compared(model, computing=flops)
        assert any(
            line.startswith(f"| {model}: over the best baseline") and f"{found.speedup:.2f}x, " in line
            for line in written.splitlines()
        ), "run `python docs/regenerate.py`"
        over = " | ".join(f"{speedup:.2f}x" for speedup in found.speedups.values())
        assert f" | {over} |" in written, "run `python docs/regenerate.py`"


def test_what_the_document_says_in_words_is_so() -> None:
    work = study_page._work("deepseek-v2")
    machine = work.machine(TRIMOE)
    each_ns = alone_ns(work, study_page.WARM_TOKENS)[NEAR_DATA] / machine.n_dimms
    assert each_ns < machine.serving_ns < each_ns / study_page.SLOW_FLOPS  # the modules had better compute it, or not
    assert gpu_utilisation_frac(work, 128) < 0.30 <= gpu_utilisation_frac(work, 256)
    shape = moe.shape("deepseek-v2")
    assert round(shape.n_layers * shape.n_experts * 4 / 1000) == 38
    written = PAGE.read_text(encoding="utf-8")
    rows = [line for line in written.splitlines() if ": over the best baseline" in line]
    assert len(rows) == 3
    for row in rows:
        ours, slow = (float(cell.split("x,")[0]) for cell in row.split("|")[3:5])
        assert ours < 1.5 and slow > 1.9 and SPEEDUP.judged(ours) == "below"
