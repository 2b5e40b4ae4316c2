"""Make what is computed in the repository: fitted models, docs/accuracy.md, golden predictions, README outputs.

    python docs/regenerate.py            # all of it
    python docs/regenerate.py pages      # only the pages on published systems and the outputs in README.md
    python docs/regenerate.py readme     # only the outputs in README.md

In the README, a block that begins with ```console holds commands after `$ ` and their output; what a command prints
replaces the lines below it. Commands that measure, export, open the dashboard or set things up keep theirs.
"""

import contextlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfmodel.latency import LatencyModel

ROOT = Path(__file__).parent.parent
KEPT = ("make", "perfmodel app", "perfmodel collect", "perfmodel export", "perfmodel baseline", "pip", "git")
GOLDEN_FRAC = 0.5
GOLDEN_CASES = (
    ("gh200", "poster", "mmlu-like", 65_536, "zero-copy"),
    ("gh200", "olmoe", "power-law:1.2", 64, "zero-copy"),
    ("gh200", "deepseek-v3", "uniform", 1024, "copy"),
    ("h100-pcie", "qwen3-235b-a22b", "power-law", 256, "cpu"),
    ("h100-pcie", "mixtral-8x7b", "uniform", 4096, "copy-overlap"),
    ("h100-sxm", "gpt-oss-120b", "mmlu-like", 16, "zero-copy"),
    ("h100-sxm", "glm-4.5-air", "power-law:0.6", 262_144, "copy"),
)
PUBLISHED = ROOT.parent / "shared" / "data" / "moe_perf_h100_sxm.parquet"
PUBLISHED_MODELS = {  # shipped name -> what its kernel's name contains
    "h100-sxm-trtllm-cutlass-bf16": "moe_torch_flow_cutlass/bf16",
    "h100-sxm-vllm-triton-bf16": "vllm_unquantizedfusedmoe_triton_tritonexperts/bf16",
    "h100-sxm-sglang-triton-bf16": "sglang_fused_moe_triton/bf16",
}
PUBLISHED_HEAD = (
    "# On public tables\n\nFused MoE layers of three serving frameworks on an H100 SXM, bf16, one GPU "
    "(ai-dynamo/aiconfigurator, Apache-2.0, commit\n095f58a51; [what they are](captures.md)). Routings are drawn "
    "anew, for counts were not published.\n"
)
SPLITS = ("shape", "routing", "tokens")
N_SHOWN = 60  # lines of one command's output


def output_of(command: str) -> list[str]:
    """What a README command prints, as the README shows it: cut after N_SHOWN lines."""
    from typer.testing import CliRunner

    from perfmodel.cli.main import app

    words = shlex.split(command)
    if words[0] != "perfmodel":
        raise SystemExit(f"README: only perfmodel commands are run, found {command!r}")
    with contextlib.chdir(ROOT):  # all in this process: most commands take less than their imports
        done = CliRunner().invoke(app, words[1:])
    if done.exit_code not in (0, 1) or not isinstance(done.exception, SystemExit | None):
        raise SystemExit(f"README: {command} failed: {done.exception or done.stderr}")
    lines = done.stdout.rstrip("\n").split("\n")
    return [*lines[:N_SHOWN], "..."] if len(lines) > N_SHOWN else lines


def with_outputs(readme: str, kept: tuple[str, ...] = KEPT) -> str:
    """The README with every command's output made anew, except of commands that begin with a word in `kept`."""

    def renew(block: re.Match[str]) -> str:
        shown, skipping = [], False
        for line in block[1].rstrip("\n").split("\n"):
            if line.startswith("$ "):
                stays = line[2:].startswith(kept)
                shown += [line] if stays else [line, *output_of(line[2:])]
                skipping = not stays
            elif not skipping:
                shown.append(line)
        return "```console\n" + "\n".join(shown) + "\n```"

    return re.sub(r"```console\n(.*?)```", renew, readme, flags=re.S)


def fit_captures() -> list[str]:
    """Fit a model to each shipped capture; write it and the calibrated machine into the package; return the pages."""
    from perfmodel.capture import shipped_captures
    from perfmodel.hardware import PROFILE_DIR, to_toml

    pages = []
    for path in shipped_captures():
        model, page = fitted_page(path.name, str(path), None)
        (PROFILE_DIR / f"{path.name}.toml").write_text(to_toml(model.profile), encoding="utf-8")
        pages.append(page)
    return pages


def fitted_page(name: str, source: str, kernel: str | None) -> tuple["LatencyModel", str]:
    """Fit a model to a source, ship it under a name, and say how well it predicts what was held out in several ways."""
    from perfmodel import report, text
    from perfmodel.errors import InputError
    from perfmodel.evaluation import evaluate, report_of
    from perfmodel.fitting import fit_source
    from perfmodel.latency import FITTED_DIR, save_model
    from perfmodel.sources import only_source, read_sources

    sys.stderr.write(f"fitting {name}\n")
    chosen = only_source(read_sources([source], kernel))
    model = fit_source(chosen)
    FITTED_DIR.mkdir(exist_ok=True)
    save_model(model, FITTED_DIR / f"{name}.json")
    rows = []
    for split in SPLITS:
        try:
            done = evaluate(model, chosen.observations, split, is_screened=chosen.is_screened, with_baselines=False)
        except InputError:  # not every capture has several routings, or batches far apart
            continue
        one = report_of([done])["kernels"][0]
        for what, found in (("all", one), ("screened", one["screened"])):
            if what == "screened" and found["n"] == one["n"]:
                continue
            figures = [text.frac(found[key]) for key in ("median_ape", "mape", "p90_ape", "coverage90", "half_width")]
            rank = found["spearman_within_tokens"]
            rows.append([split, what, str(found["n"]), *figures, "n/a" if rank is None else f"{rank:.3f}"])
    header = ["held out by", "rows", "n", "median", "MAPE", "p90", "covered", "half-width", "rank corr."]
    return model, f"## {name}\n\n```text\n{report.fit_page(model)}\n\n{report.table(rows, header)}\n```\n"


def fit_published() -> list[str] | None:
    """The same for the public H100 tables where they lie beside the repository; null where they do not."""
    if not PUBLISHED.is_file():
        return None
    return [fitted_page(name, str(PUBLISHED), kernel)[1] for name, kernel in PUBLISHED_MODELS.items()]


def write_accuracy(captures: list[str], published: list[str] | None) -> None:
    """docs/accuracy.md: held-out errors on every shipped capture, and on the public tables (kept where these are not
    at hand)."""
    head = (
        "# Accuracy\n\nMade by `python docs/regenerate.py`; do not edit. Each shape is predicted by a model fitted on "
        "all other\nshapes of the same source. Errors are |predicted / measured - 1|. [model.md](model.md) explains "
        "the model and\nthe baselines. The last table of each section holds out other things too, each time deciding "
        "anew on residual\nand intervals within what is left: the routing (from even to all others) and the batch size "
        "(from a 16th of the\nlargest on). `screened` leaves out what other kernels show to be failed configurations: "
        "more than 2.2 times slower\nthan the fastest kernel for the same workload.\n\n"
    )
    target = ROOT / "docs" / "accuracy.md"
    before = target.read_text(encoding="utf-8").partition(PUBLISHED_HEAD)[2] if target.is_file() else ""
    rest = "\n" + "\n".join(published) if published is not None else before
    target.write_text(head + "\n".join(captures) + "\n" + PUBLISHED_HEAD + rest, encoding="utf-8")


def write_golden_predictions() -> None:
    """tests/data/golden_predictions.json: a few predictions, so that a change of any is noticed and reviewed."""
    from perfmodel.hardware import hardware
    from perfmodel.hf_config import resolve
    from perfmodel.predict import predict
    from perfmodel.routing import routing

    rows = []
    for machine, name, pattern, n_tokens, access in GOLDEN_CASES:
        shape = resolve(name)
        batch = routing(pattern, shape.n_experts, shape.top_k, n_tokens)
        result = predict(hardware(machine), shape, batch, GOLDEN_FRAC, access)
        case = {"hardware": machine, "shape": name, "routing": pattern, "n_tokens": n_tokens, "access": access}
        case |= {"offload_frac": GOLDEN_FRAC, "latency_ns": result.latency_ns}
        rows.append(case | {"slowdown": result.slowdown, "bottleneck": result.bottleneck})
    target = ROOT / "tests" / "data" / "golden_predictions.json"
    target.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    from perfmodel.balance.study_page import write as write_balance
    from perfmodel.offload.kt_page import write as write_strategies
    from perfmodel.offload.study_page import write as write_study
    from perfmodel.placing.study_page import write as write_policies
    from perfmodel.schedule.captured_page import write as write_captured
    from perfmodel.schedule.flashmoe.page import write as write_flashmoe
    from perfmodel.trimoe.study_page import write as write_trimoe

    if sys.argv[1:] not in ([], ["pages"], ["readme"]):
        sys.exit(__doc__)
    if not sys.argv[1:]:
        write_accuracy(fit_captures(), fit_published())
        write_golden_predictions()
    if sys.argv[1:] != ["readme"]:
        pages = (write_study, write_strategies, write_policies, write_trimoe, write_balance, write_flashmoe)
        for write_page in (*pages, write_captured):
            write_page(ROOT / "docs")
    target = ROOT / "README.md"
    target.write_text(with_outputs(target.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "model.json").unlink(missing_ok=True)  # what the README's `perfmodel fit` writes
