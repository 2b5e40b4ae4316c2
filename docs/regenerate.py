"""Make everything in the repository that is computed: fitted models, docs/accuracy.md, and the README's outputs.

    python docs/regenerate.py            # all of it
    python docs/regenerate.py readme     # only the outputs in README.md

In the README, a block that begins with ```console holds commands after `$ ` and their output; what a command prints
replaces the lines below it. Commands that measure, open the dashboard or set things up keep theirs.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FITTED = ROOT / "perfmodel" / "data" / "fitted"
KEPT = ("make", "perfmodel app", "perfmodel collect", "pip", "git")
N_SHOWN = 30  # lines of one command's output


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


def with_outputs(readme: str) -> str:
    """The README with every command's output made anew."""

    def renew(block: re.Match[str]) -> str:
        shown, skipping = [], False
        for line in block[1].rstrip("\n").split("\n"):
            if line.startswith("$ "):
                kept = line[2:].startswith(KEPT)
                shown += [line] if kept else [line, *output_of(line[2:])]
                skipping = not kept
            elif not skipping:
                shown.append(line)
        return "```console\n" + "\n".join(shown) + "\n```"

    return re.sub(r"```console\n(.*?)```", renew, readme, flags=re.S)


def fit_shipped() -> list[str]:
    """Fit a model to each shipped capture, write it into the package, and return a page about each."""
    from perfmodel.capture import shipped_captures
    from perfmodel.fitting import fit_captures
    from perfmodel.report import fit_page

    FITTED.mkdir(exist_ok=True)
    pages = []
    for path in shipped_captures():
        model, errors = fit_captures([str(path)])
        model.save(FITTED / f"{path.name}.json", model.evidence_)
        pages.append(f"## {path.name}\n\n```text\n{fit_page(model, errors)}\n```\n")
    return pages


def write_accuracy(pages: list[str]) -> None:
    """docs/accuracy.md: held-out errors on every shipped capture."""
    head = (
        "# Accuracy\n\nMade by `python docs/regenerate.py`; do not edit. Each shape is predicted by a model fitted on all "
        "other shapes of the\nsame capture. Errors are |predicted / measured - 1|. See [model.md](model.md) for the model "
        "and the baselines.\n\n"
    )
    (ROOT / "docs" / "accuracy.md").write_text(head + "\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["readme"]:
        write_accuracy(fit_shipped())
    target = ROOT / "README.md"
    target.write_text(with_outputs(target.read_text(encoding="utf-8")), encoding="utf-8")
