"""Make what is computed in the repository: fitted models, docs/accuracy.md, golden predictions, README outputs.

    python docs/regenerate.py            # all of it
    python docs/regenerate.py readme     # only the outputs in README.md

In the README, a block that begins with ```console holds commands after `$ ` and their output; what a command prints
replaces the lines below it. Commands that measure, export, open the dashboard or set things up keep theirs.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = ("make", "perfmodel app", "perfmodel collect", "perfmodel export", "pip", "git")
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
N_SHOWN = 40  # lines of one command's output


def output_of(command: str) -> list[str]:
    """What a README command prints, as the README shows it: cut after N_SHOWN lines."""
    words = shlex.split(command)
    if words[0] != "perfmodel":
        raise SystemExit(f"README: only perfmodel commands are run, found {command!r}")
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"README: {command} failed: {done.stderr}")
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


def fit_shipped() -> list[str]:
    """Fit a model to each shipped capture; write it and the calibrated machine into the package; return the pages."""
    from perfmodel.capture import shipped_captures
    from perfmodel.fitting import fit_captures
    from perfmodel.hardware import PROFILE_DIR, to_toml
    from perfmodel.latency import FITTED_DIR
    from perfmodel.report import fit_page

    FITTED_DIR.mkdir(exist_ok=True)
    pages = []
    for path in shipped_captures():
        model, errors = fit_captures([str(path)])
        model.save(FITTED_DIR / f"{path.name}.json")
        (PROFILE_DIR / f"{path.name}.toml").write_text(to_toml(model.profile), encoding="utf-8")
        pages.append(f"## {path.name}\n\n```text\n{fit_page(model, errors)}\n```\n")
    return pages


def write_accuracy(pages: list[str]) -> None:
    """docs/accuracy.md: held-out errors on every shipped capture."""
    head = (
        "# Accuracy\n\nMade by `python docs/regenerate.py`; do not edit. Each shape is predicted by a model fitted on "
        "all other\nshapes of the same capture. Errors are |predicted / measured - 1|. [model.md](model.md) explains "
        "the model and\nthe baselines.\n\n"
    )
    (ROOT / "docs" / "accuracy.md").write_text(head + "\n".join(pages), encoding="utf-8")


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
    if sys.argv[1:] != ["readme"]:
        write_accuracy(fit_shipped())
        write_golden_predictions()
    target = ROOT / "README.md"
    target.write_text(with_outputs(target.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "model.json").unlink(missing_ok=True)  # what the README's `perfmodel fit` writes
