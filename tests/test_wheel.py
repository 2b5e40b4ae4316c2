"""The built wheel with its core dependencies alone, in a fresh environment, used from a foreign folder."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.traces_made import pid, write_nsys


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_installs_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name.split("/")[0]} == {"perfmodel"}
    own = [path.relative_to(ROOT) for path in (ROOT / "perfmodel").rglob("*") if path.is_file()]
    assert {path.as_posix() for path in own if "__pycache__" not in path.parts} <= set(names)
    for wanted in ("collectors/__main__.py", "app/main.py", "app/.streamlit/config.toml"):
        assert f"perfmodel/{wanted}" in names
    assert any(name.startswith("perfmodel/traces/") and name.endswith("capture.json") for name in names)
    assert sum(name.startswith("perfmodel/traces/") and name.endswith("/expert_parallel.json") for name in names) == 2
    assert not any("__pycache__" in name for name in names)


def test_a_fresh_installation_works_without_torch_streamlit_or_plotly(wheel: Path, tmp_path: Path) -> None:
    environment, foreign = tmp_path / "environment", tmp_path / "elsewhere"
    venv.create(environment, with_pip=True)
    foreign.mkdir()
    bin_dir = environment / ("Scripts" if os.name == "nt" else "bin")
    install = [bin_dir / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, cwd=foreign, check=True, capture_output=True)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([bin_dir / "perfmodel", *words], cwd=foreign, capture_output=True, text=True, check=False)

    listed = run("list")
    assert listed.returncode == 0, listed.stderr
    assert "site-packages/perfmodel/traces/" in listed.stdout  # the shipped captures are those of the wheel
    predicted = run("predict", "--hardware", "gh200", "--shape", "poster", "--tokens", "65536", "--offload", "0.5")
    assert predicted.returncode == 0, predicted.stderr
    assert "slowdown" in predicted.stdout
    shipped, *_ = environment.glob("**/perfmodel/traces/*/profiles/moe_layer-olmoe-4-4-power-law-1.2.trace.json.gz")
    export = write_nsys(foreign / "export.sqlite", {"KERNEL": [(20, 30, 0, 7, 1, pid(5), None, None)]})
    for trace, said in ((shipped, "aten::_grouped_mm"), (export, "1 kernels, 0 joined")):
        analysed = run("analyze", str(trace))
        assert analysed.returncode == 0, analysed.stderr
        assert said in analysed.stdout
    for command, extra in (("collect", "perfmodel[collect]"), ("app", "perfmodel[app]")):
        refused = run(command)
        assert (refused.returncode, refused.stdout) == (3, "")
        assert f'pip install "{extra}"' in refused.stderr
        assert "Traceback" not in refused.stderr
    planned = subprocess.run(
        [bin_dir / "python", "-m", "perfmodel.collectors", "sweep", "--plan", "--quick", "--out", "plan"],
        cwd=foreign,
        capture_output=True,
        text=True,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
