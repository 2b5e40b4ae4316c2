"""Documents that cannot lie: the README's commands exist, decisions and data are indexed, names in docs are real."""

import re
import runpy
import subprocess
import sys

import pytest

from perfmodel.hardware import EVIDENCE
from perfmodel.offload import ACCESS_MODES
from perfmodel.physics import constant_names
from perfmodel.routing import PATTERNS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_stand_in_the_readme_and_ci_runs_the_second() -> None:
    assert "make app" in README and "make test" in README
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^app:", makefile, re.M) and re.search(r"^test:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "command",
    ["analyze", "diff", "sweep", "fusion", "export", "fit", "predict", "check", "schedule", "list", "collect", "app"],
)
def test_every_command_has_help_and_stands_in_the_readme(command: str) -> None:
    assert f"perfmodel {command}" in README
    if command != "collect":  # its help is the collector's own
        done = subprocess.run(
            [sys.executable, "-m", "perfmodel", command, "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0 and len(done.stdout) > 100


def test_the_outputs_in_the_readme_are_what_the_commands_print() -> None:
    regenerate = runpy.run_path(str(ROOT / "docs" / "regenerate.py"))
    slow = (*regenerate["KEPT"], "perfmodel fit")  # tests/test_shipped.py fits
    assert regenerate["with_outputs"](README, slow) == README, "run `python docs/regenerate.py readme`"


def test_links_between_documents_resolve() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_model_page_names_every_constant_and_functions_that_exist() -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    for name in constant_names():
        assert name in page
    import perfmodel.latency
    import perfmodel.offload
    import perfmodel.physics

    for module, function in re.findall(r"`(physics|latency|offload)\.(\w+)`", page):
        assert hasattr(getattr(perfmodel, module), function), f"{module}.{function}"


def test_the_nomenclature_knows_every_pattern_access_mode_and_kind_of_evidence() -> None:
    page = (ROOT / "docs" / "nomenclature.md").read_text(encoding="utf-8")
    for word in (*PATTERNS, *ACCESS_MODES, *EVIDENCE):
        assert word in page


def test_every_shipped_data_file_has_its_origin_written_down() -> None:
    page = (ROOT / "perfmodel" / "data" / "README.md").read_text(encoding="utf-8")
    for entry in (ROOT / "perfmodel" / "data").iterdir():
        if entry.name != "README.md" and (entry.is_file() or any(entry.iterdir())):
            assert entry.name in page
