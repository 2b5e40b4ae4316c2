"""The shape of the house: imports run one way, the core loads without extras, units stand in names, nothing prints."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LIBRARY = sorted((ROOT / "perfmodel").rglob("*.py"))

# Each module may import from its own level and those before it (docs/decisions/0001-house.md).
LEVELS = (
    {"errors"},
    {"text", "markdown", "moe", "hf_config", "files", "routing", "workers"},
    {"trace", "hardware", "model_memory"},
    {"cache"},
    {"readers", "classify", "placement", "physics", "capture", "capture_lines", "ep_capture", "intervals", "lanes"},
    {"launch", "moe_perf", "tile_rules"},
    {"attribution", "groups", "bound", "overlap", "overhead", "fusion", "tracks", "ep_steps"},
    {"copies", "matmuls", "findings", "diff", "timeline"},
    {"analysis", "ranks", "perfetto", "passes", "waits"},
    {"latency"},
    {"baselines", "roofline", "plausible", "transfer"},
    {"evaluation"},
    {"sources"},
    {"adapt", "balance", "design", "fitting", "explain", "offload", "predict", "regression", "trimoe"},
    {"placing"},
    {"schedule", "report"},
    {"figures"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
RECORDS = ("errors", "text", "moe", "routing", "hardware", "hf_config")  # all that collectors may import
SUFFIXES = ("_ns", "_bytes", "_flops", "_per_s", "_frac", "_count", "_per_byte", "_per_token")
UNIT_WORDS = ("time", "latency", "duration", "bandwidth", "bytes", "flops")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "perfmodel").parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every dotted module name that a file imports, inside functions too; type-checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_level() -> None:
    assert {module_of(path) for path in LIBRARY} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = module_of(path)
    if own == "__init__":
        assert not imports_of(path)
        return
    for name in imports_of(path):
        parts = name.split(".")
        assert parts[0] not in ("torch", "streamlit", "collectors", "app"), f"{path.name} imports {name}"
        if parts[0] == "plotly":
            assert own == "figures"
        if parts[0] == "perfmodel" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[own], f"{own} imports {parts[1]}, which stands above it"


@pytest.mark.parametrize("path", sorted((ROOT / "collectors").rglob("*.py")), ids=lambda p: p.name)
def test_collectors_need_torch_numpy_and_the_standard_library_alone(path: Path) -> None:
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if (path.name, top) == ("routing.py", "transformers"):
            continue  # what reads models for the recorder, and an extra of its own
        assert top in sys.stdlib_module_names or top in ("torch", "numpy", "nvtx", "perfmodel"), (
            f"{path.name} imports {name}"
        )
        if top == "perfmodel" and rest:
            assert rest.split(".")[0] in (*RECORDS, "__version__"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda p: p.name)
def test_the_dashboard_meets_collectors_only_in_files_and_interprets_no_data(path: Path) -> None:
    assert not any(name.startswith(("collectors", "torch")) for name in imports_of(path))
    source = path.read_text(encoding="utf-8")
    assert "unsafe_allow" not in source
    assert "st.markdown(" not in source and "st.write(" not in source


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_library_and_command_line_load_without_extras() -> None:
    modules = sorted({module_of(p) for p in LIBRARY} - {"__init__", "__main__", "figures"})
    loaded = loaded_after("\n".join(f"import perfmodel.{name}" for name in modules))
    assert not loaded & {"torch", "streamlit", "plotly", "nvtx"}


def test_the_records_load_with_numpy_alone() -> None:
    loaded = loaded_after("\n".join(f"import perfmodel.{name}" for name in RECORDS))
    assert not loaded & {"polars", "msgspec", "sklearn", "scipy", "typer"}


def test_reading_a_trace_does_not_wait_for_scipy_or_scikit_learn() -> None:
    assert not loaded_after("import perfmodel.cli") & {"scipy", "sklearn"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_quantities_carry_their_unit_in_the_name(path: Path) -> None:
    """A parameter or field that is a plain number and speaks of time, bytes or FLOPs ends in its unit."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            named += [(a.arg, a.annotation) for a in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.ClassDef):
            named += [
                (s.target.id, s.annotation)
                for s in node.body
                if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
            ]
    for name, annotation in named:
        is_number = annotation is not None and ast.unparse(annotation).removesuffix(" | None") in ("int", "float")
        if is_number and any(word in name.split("_") for word in UNIT_WORDS) and module_of(path) != "text":
            assert name.endswith(SUFFIXES) or name.startswith("n_"), f"{path.name}: {name} does not say its unit"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_public_things_explain_themselves(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= 430, "a file beyond about 400 lines has more than one subject"
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "no module docstring"
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


# The same inside the package of regression checks, whose docstring says so.
REGRESSION_LEVELS = (
    {"evidence", "parts"},
    {"spread"},
    {"verdicts", "against"},
    {"traces", "changes"},
    {"compared"},
    {"saved", "machine"},
    {"given", "packed"},
)


@pytest.mark.parametrize("path", sorted((ROOT / "perfmodel" / "regression").rglob("*.py")), ids=lambda p: p.name)
def test_regression_checks_import_one_way(path: Path) -> None:
    level = {name: i for i, names in enumerate(REGRESSION_LEVELS) for name in names}
    own = path.relative_to(ROOT / "perfmodel" / "regression").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        parts = node.module.split(".")
        if node.level == 0 and parts[:2] == ["perfmodel", "regression"]:
            name = parts[2] if len(parts) > 2 else node.names[0].name
        elif node.level == 1 and path.parent.name == "regression":
            name = parts[0]
        else:
            continue
        assert name == own or level[name] < level[own], f"{own} imports {name}, which stands beside or above it"
