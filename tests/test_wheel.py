"""The built wheel, installed into a fresh environment and used from a foreign folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

BUILD = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run([*BUILD, str(out), str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_installs_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]} == {"perfmodel"}
    for wanted in ("data/hardware/gh200.toml", "collectors/__main__.py", "app/main.py", "app/.streamlit/config.toml"):
        assert f"perfmodel/{wanted}" in names
    assert any(name.startswith("perfmodel/traces/") and name.endswith("capture.json") for name in names)


def test_the_installed_wheel_works_from_a_foreign_folder(wheel: Path, tmp_path: Path) -> None:
    """The environment borrows this one's dependencies, but finds `perfmodel` only in the wheel."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    script = f"""
import sys
sys.path[:] = [{str(site)!r}] + [p for p in sys.path if p and "__editable__" not in p and p != {str(ROOT)!r}]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import perfmodel.cli, perfmodel.collectors
assert perfmodel.__file__.startswith({str(site)!r}), perfmodel.__file__
assert perfmodel.cli._sibling("app") == "perfmodel.app"
sys.argv = ["perfmodel", *sys.argv[1:]]
perfmodel.cli.main()
"""
    foreign = tmp_path / "elsewhere"
    foreign.mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *words], cwd=foreign, capture_output=True, text=True, check=False
        )

    listed = run("list")
    assert listed.returncode == 0, listed.stderr
    assert "site/perfmodel/traces/" in listed.stdout  # the shipped captures are those of the wheel
    predicted = run("predict", "--hardware", "gh200", "--shape", "poster", "--tokens", "65536", "--offload", "0.5")
    assert predicted.returncode == 0, predicted.stderr
    assert "slowdown" in predicted.stdout
