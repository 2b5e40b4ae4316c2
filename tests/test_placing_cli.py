"""`perfmodel place` as a person runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from perfmodel import moe
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.placement import RESIDENT
from perfmodel.placement.export import FORMATS
from perfmodel.placement.files import read_placement
from perfmodel.routing import write_counts

CONFIG = {
    **{"model_type": "olmoe", "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 8},
    **{"num_experts_per_tok": 2, "num_attention_heads": 8, "vocab_size": 1000, "torch_dtype": "bfloat16"},
}
EXPERT_BYTES = 3 * 512 * 256 * 2


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A made-up model of 4 layers of 8 experts."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


@pytest.fixture
def invoke(config: str):  # type: ignore[no-untyped-def]
    """Run the command on the made-up model."""

    def of(*words: str, routing: str = "temporal:2", hardware: str = "gh200", access: str = "copy-overlap+cpu"):  # type: ignore[no-untyped-def]
        steps = ("--steps", "6", "--step-tokens", "64")
        asked = ("--shape", config, "--routing", routing, "--hardware", hardware, "--access", access)
        return CliRunner().invoke(app, ["place", *asked, *steps, *words], catch_exceptions=False, standalone_mode=False)

    return of


@pytest.fixture
def run(invoke):  # type: ignore[no-untyped-def]
    """The same, and what it prints."""
    return lambda *words, **named: invoke(*words, **named).stdout


def recorded(path: Path, layers: range, n_experts: int = 8, top_k: int = 2, n_tokens: int = 64) -> str:
    """A recording of some layers, made up."""
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.full(n_experts, 0.7), len(layers))
    counts = np.array([[rng.multinomial(n_tokens * top_k, row) for row in shares] for _ in range(6)])
    counts = np.minimum(counts, n_tokens)
    counts[:, :, 0] += n_tokens * top_k - counts.sum(axis=2)
    write_counts(path, counts, np.array(layers), top_k, np.full(6, n_tokens))
    return str(path)


def test_all_policies_stand_on_the_page_with_memory_and_verdict(run) -> None:  # type: ignore[no-untyped-def]
    page = run("--hbm-budget", "50%", "--limit", "1.5x", "--pareto")
    for words in (
        *("optimal", "optimal-fixed", "foreseen", "frequency", "ascending", "front-loading", "fiddler", "hybrimoe"),
        *("lru", "random", "uniform", "4 layers of 8 experts of 786 kB", "12.6 MB may be resident", "certificate"),
        *("break-even", "batches", "device memory for experts", "experts in host memory", "basis         datasheet"),
    ):
        assert words in page
    assert all(len(line) <= 120 for line in page.splitlines())


def test_json_is_complete_and_access_is_found_where_it_is_not_said(run) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(run("--hbm-budget", "50%", "--json", access="auto"))
    assert found["access"] == next(iter(found["accesses"])) and len(found["accesses"]) >= 6
    assert found["capacity_bytes"] == 16 * EXPERT_BYTES and found["best"]["policy"] == "optimal"
    best = min(one["fitted_slowdown"] for one in found["policies"] if one["policy"] not in ("lru", "foreseen"))
    assert found["best"]["fitted_slowdown"] == best
    several = json.loads(run("--hbm-budget", "50%", "--json", "--tokens", "4,64", "--policy", "frequency"))
    assert [one["batches"][0]["n_tokens"] for one in several] == [4, 64]
    assert [one["best"]["policy"] for one in several] == ["frequency"] * 2


def test_requests_and_mixes_are_passes_and_fill_the_cache(run) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(run("--requests", "100+9", "--sequences", "4", "--json", "--policy", "frequency"))
    assert [(b["n_tokens"], b["n_passes"]) for b in found["batches"]] == [(100, 4.0), (4, 8.0)]
    spent = [ns * b["n_passes"] for ns, b in zip(found["best"]["held_out_ns"], found["batches"], strict=True)]
    assert found["prediction"]["n_tokens"] == (100, 4)[int(np.argmax(spent))]
    assert any("KV cache of 4 sequences of 109 tokens" in note for note in found["notes"])
    found = json.loads(run("--mix", "20x64, 1x500,2x64", "--json", "--policy", "frequency", "--hbm-budget", "9%"))
    assert [(b["n_tokens"], b["n_passes"]) for b in found["batches"]] == [(64, 22.0), (500, 1.0)]


def test_memory_is_what_the_engine_leaves(run) -> None:  # type: ignore[no-untyped-def]
    plain = ("--json", "--policy", "frequency", "--hbm-budget", "30MB", "--workspace", "1MB", "--other-weights", "9MB")
    found = json.loads(run(*plain))
    assert found["capacity_bytes"] == 20e6 - 2 * EXPERT_BYTES  # and two staging slots
    for access in ("cpu", "zero-copy"):
        assert json.loads(run(*plain, access=access))["capacity_bytes"] == 20e6
    assert json.loads(run(*plain, "--copies", "3"))["capacity_bytes"] == 20e6 - 5 * EXPERT_BYTES
    each = json.loads(run(*plain, "--per-layer"))
    assert each["capacity_bytes"] == 20 * EXPERT_BYTES and each["best"]["n_resident"] == 20
    both = json.loads(run(*plain, "--host-budget", "64MB", "--host-holds-all", "--replicas", "2"))
    assert both["host"]["needed_bytes"] == 2 * 32 * EXPERT_BYTES


def test_the_placement_is_written_and_read_back(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "placed.json"
    found = json.loads(run("--hbm-budget", "50%", "--json", "--out", str(out)))
    placed = read_placement(out)
    assert int((placed.placement.tier == RESIDENT).sum()) == found["best"]["n_resident"] == 16
    assert placed.predicted["slowdown"] == found["best"]["slowdown"] and placed.layers == (0, 1, 2, 3)
    assert placed.made_from["access"] == "copy-overlap+cpu" and placed.made_from["batches"] == {"64": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "placed.json"]


FLAGS = {
    "sglang": "--kt-num-gpu-experts 3",
    "ktransformers": "--kt-gpu-experts-ratio",
    "llama.cpp": "--n-cpu-moe",
    "vllm": "--cpu-offload-gb",
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_engine_gets_its_files_and_flags_and_is_told_what_is_rounded(invoke, form: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    to = tmp_path / "files"
    to.mkdir()
    words = ("--hbm-budget", "45%", "--policy", "frequency", "--export", form, "--to", str(to))
    done = invoke(*words, access="copy-overlap")
    files = sorted(path.name for path in to.iterdir())
    assert all(f"wrote {to / name}" in done.stderr for name in files) and (files or form in FLAGS)
    assert FLAGS.get(form, "") in done.stderr and not any(name.endswith(".part") for name in files)
    if form in ("sglang", "llama.cpp", "vllm"):
        assert "asked for 14 resident experts" in done.stderr  # 45 % of 32, and what is kept of them
    lines = done.stderr.splitlines()
    assert not any(one != other and other in one for one in lines for other in lines if other.startswith("asked for"))


def test_none_of_the_experts_may_be_resident(run) -> None:  # type: ignore[no-untyped-def]
    found = json.loads(run("--hbm-budget", "0%", "--json", "--policy", "frequency"))
    assert found["capacity_bytes"] == 0 and {one["n_resident"] for one in found["policies"]} == {0}


def test_part_of_the_layers_is_placed_and_not_exported(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    part = recorded(tmp_path / "part.npz", range(1, 3))
    out = tmp_path / "placed.json"
    found = json.loads(run("--hbm-budget", "50%", "--json", "--out", str(out), routing=part))
    assert found["capacity_bytes"] == 8 * EXPERT_BYTES and read_placement(out).layers == (1, 2)
    assert any("2 of 4 layers were recorded" in note for note in found["notes"])
    assert found["host"]["needed_bytes"] == 16 * EXPERT_BYTES  # of all layers
    with pytest.raises(InputError, match="an engine needs all 4 layers"):
        run("--hbm-budget", "50%", "--export", "json", "--to", str(tmp_path), routing=part)


def test_another_recording_judges(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, later = (recorded(tmp_path / name, range(4)) for name in ("first.npz", "later.npz"))
    page = run("--hbm-budget", "50%", "--policy", "frequency", "--held-out", later, routing=first)
    assert "decided on first.npz, judged by later.npz" in page


def test_a_seed_changes_draws_and_nothing_else_does(run) -> None:  # type: ignore[no-untyped-def]
    words = ("--hbm-budget", "50%", "--policy", "random", "--tokens", "50", "--json")
    one, again, other = run(*words), run(*words), run(*words, "--seed", "2")
    assert one == again and one != other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policy", "nope"), "unknown placement policy 'nope'; known here: ascending"),
        (("--policy", "trimoe"), "known here"),
        (("--policy", "lru"), "no placement to choose"),
        (("--mix", "4y8"), "expected passes x tokens"),
        (("--requests", "4"), "expected tokens of prompt and output"),
        (("--mix", "1x8", "--tokens", "8"), "one of --tokens, --mix and --requests"),
        (("--tokens", "0"), "at least 1"),
        (("--limit", "0.5x"), "at least 1"),
        (("--hbm-budget", "1GB", "--other-weights", "2GB"), "no room for an expert"),
        (("--hbm-budget", "150%"), "at most 100%"),
        (("--hbm-budget", "50%", "--host-budget", "5MB"), "cannot hold"),
        (("--hbm-budget", "50%", "--host-budget", "26MB", "--host-holds-all", "--replicas", "2"), "2 replicas"),
        (("--export", "nope"), "unknown export format"),
        (("--export", "json", "--to", "/nowhere"), "no folder"),
        (("--out", "/nowhere/placed.json", "--policy", "frequency"), "cannot be written"),
        (("--out", "."), "which is a folder"),
        (("--tokens", "4,8", "--out", "x.json"), "write one placement"),
    ],
)
def test_mistakes_are_one_sentence(run, words: tuple[str, ...], said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=said) as error:
        run(*words)
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_machines_and_recordings_that_do_not_belong_are_refused(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="no link to a second memory"):
        run(hardware="xeon-spr", access="auto")
    with pytest.raises(InputError, match="no memory modules that compute"):
        run(access="near-data")
    with pytest.raises(InputError, match="is a cache"):
        run(access="paged")
    with pytest.raises(InputError, match="unknown access mode"):
        run(access="nope")
    with pytest.raises(InputError, match="experts"):
        run(routing=recorded(tmp_path / "other.npz", range(4), n_experts=16))
    with pytest.raises(InputError, match="top-k"):
        run(routing=recorded(tmp_path / "top.npz", range(4), top_k=3))


def test_a_fitted_model_gives_intervals_where_it_can() -> None:
    shape = moe.shape("mixtral-8x7b")
    words = ["place", "--shape", shape.name, "--routing", "temporal:2", "--hardware", "h100-sxm", "--op", "fused-moe"]
    words += ["--model", "h100-sxm-vllm-triton-bf16", "--hbm-budget", "100%", "--access", "copy-overlap", "--json"]
    words += ["--policy", "frequency", "--steps", "4", "--step-tokens", "128", "--tokens", "128"]
    done = CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)
    found = json.loads(done.stdout)
    low, high = found["best"]["interval_ns"]
    assert low < found["best"]["held_out_ns"][0] < high and found["best"]["slowdown"] == pytest.approx(1)
