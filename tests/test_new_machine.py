"""A machine that has just arrived: what deserves a look is told, and nothing else; what cannot be judged says why."""

import json
import math
import os
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from typer.testing import CliRunner

from perfmodel import report
from perfmodel.capture import Capture, load_capture, shipped_captures
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.figures import new_machine_figures
from perfmodel.hardware import QUANTITIES, hardware
from perfmodel.latency import load_model, shipped_models
from perfmodel.physics import PEAK_GEMM_FRAC
from perfmodel.regression import HEALTHY, LOOK_AT, OPEN, NewMachine, compare, new_machine, of_capture
from perfmodel.regression.machine.circumstances import fact_items, n_runs_wanted, spread_of
from perfmodel.regression.machine.new_machine import _model_of
from perfmodel.regression.machine.rates import REACHED_FILE, _derived, apart_frac, rate_items, reached
from perfmodel.regression.verdicts import n_more_runs
from tests.captures_made import noise, write_gpu_capture, write_synthetic_capture
from tests.conftest import ROOT

Manifest = dict[str, Any]
MADE_UP = {"believable numbers", "repeats within a run"}  # of a capture whose ids and times no collector wrote
ZEN5 = {"cpu_vendor": "AuthenticAMD", "cpu_family": "26", "cpu_model_number": "2"}


def rewritten(path: Path, change: Callable[[Manifest], None]) -> Path:
    """The capture with another manifest; its calibration lines go, for they would contradict it."""
    manifest = json.loads((path / "capture.json").read_text())
    change(manifest)
    (path / "capture.json").write_text(json.dumps(manifest))
    (path / "calibration.jsonl").unlink(missing_ok=True)
    return path


def judged(path: Path, change: Callable[[Manifest], None] = lambda _: None, **options: Any) -> NewMachine:
    return new_machine(load_capture(rewritten(path, change)), **options)


def verdicts(found: NewMachine) -> dict[str, str]:
    return {item.name: item.verdict for item in found.items}


def wrong(found: NewMachine) -> set[str]:
    return {item.name for item in found.of(LOOK_AT)}


def item_of(found: NewMachine, name: str) -> Any:
    return next(item for item in found.items if item.name == name)


def scaled(*keys: str, by: float) -> Callable[[Manifest], None]:
    def change(manifest: Manifest) -> None:
        for key in keys:
            manifest["calibration"][key]["value"] *= by

    return change


def told(**facts: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["machine"].update(facts)


def loaded(**facts: Any) -> Callable[[Manifest], None]:
    return lambda manifest: manifest["machine"]["under_load"].update(facts)


def sound(manifest: Manifest) -> None:
    """What nvidia-smi tells of a card that is well."""
    manifest["machine"] |= {"power_limit_watts": 700.0, "power_limit_default_watts": 700.0, "ecc": "Enabled"}
    manifest["machine"] |= {"mig": "Disabled", "persistence": "Enabled", "sm_clock_max_mhz": 1980}
    manifest["machine"]["under_load"] |= {"pcie_gen": 5, "pcie_width": 16}


def test_a_sound_gpu_is_healthy_in_all_that_can_be_judged(tmp_path: Path) -> None:
    found = judged(write_gpu_capture(tmp_path / "made-up"), sound)
    assert wrong(found) == set() and found.exit_code == 0
    for name in ("bf16 GEMM", "fp8 GEMM", "memory stream", "link h2d copy", "link d2h copy", "launch overhead"):
        assert verdicts(found)[name] == HEALTHY, name
    assert found.datasheet == "h100-sxm" and "Healthy in all" in report.new_machine_verdict(found)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        # The made-up points still move weights at the old rates, which is told as well.
        (scaled("link_h2d_copy_bytes_per_s", by=0.5), {"link h2d copy", "believable numbers"}),
        (scaled("link_d2h_copy_bytes_per_s", "link_both_copy_bytes_per_s", by=0.5), {"link d2h copy"}),
        (loaded(pcie_gen=3), {"link"}),
        (loaded(pcie_width="8"), {"link"}),
        (told(power_limit_watts=500.0), {"power cap"}),
        (scaled("bf16_gemm_flops_per_s", by=0.6), {"bf16 GEMM"}),
        (scaled("memory_stream_bytes_per_s", by=0.6), {"memory stream", "believable numbers"}),
        (scaled("launch_overhead_ns", by=3.0), {"launch overhead"}),
        (loaded(clock_reasons=["application clocks"]), {"clocks"}),
        (loaded(clock_reasons=["hardware slowdown"]), {"throttling"}),
        (told(ecc="Disabled"), {"modes of the GPU"}),
        (told(cpu_governor="powersave"), {"settings of the host"}),
        (told(gpu_numa_node=1, n_numa_nodes=2, numa_balancing="0", numa_nodes=[{"node": 0, "n_usable_cpus": 8}]),
         {"settings of the host"}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gpu_is_told_and_nothing_else(
    change: Callable[[Manifest], None], names: set[str], tmp_path: Path
) -> None:
    def both(manifest: Manifest) -> None:
        sound(manifest)
        change(manifest)

    found = judged(write_gpu_capture(tmp_path / "made-up"), both)
    rates_and_facts = {item.name for item in found.of(LOOK_AT) if item.section != "the sweep against a model"}
    assert rates_and_facts == names and found.exit_code == 1
    assert all(item.next_steps for item in found.of(LOOK_AT))


def test_numbers_that_were_not_calibrated_are_not_judged(tmp_path: Path) -> None:
    def change(manifest: Manifest) -> None:
        sound(manifest)
        for key in ("bf16_gemm_flops_per_s", "memory_stream_bytes_per_s"):
            del manifest["calibration"][key]

    found = judged(write_gpu_capture(tmp_path / "made-up"), change)
    for name in ("bf16 GEMM", "memory stream", "all workloads", "best memory-bound GEMM"):
        assert verdicts(found)[name] == OPEN, name
    assert "was not calibrated" in item_of(found, "bf16 GEMM").words


def test_a_slice_of_a_gpu_is_not_held_against_the_whole(tmp_path: Path) -> None:
    found = judged(write_gpu_capture(tmp_path / "made-up"), told(gpu_name="NVIDIA H100 80GB HBM3 MIG 1g.10gb"))
    assert found.datasheet is None and "bf16 GEMM" not in verdicts(found)
    assert "bf16 GEMM 700" in item_of(found, "other rates").words
    capture = load_capture(tmp_path / "made-up")
    assert compare(of_capture(capture), of_capture(capture)).datasheet is None


def test_a_gpu_that_no_profile_knows_asks_for_a_datasheet(tmp_path: Path) -> None:
    found = judged(write_gpu_capture(tmp_path / "made-up"), told(gpu_name="NVIDIA made-up"))
    assert "no datasheet; give one with --hardware" in item_of(found, "other rates").words
    given = judged(tmp_path / "made-up", datasheet=hardware("h100-sxm"))
    assert verdicts(given)["bf16 GEMM"] == HEALTHY and given.datasheet == "h100-sxm"
    assert item_of(given, "host stream").frac == pytest.approx(200 / 307.2), "who gives a machine gives its host"


def test_a_model_may_be_named_or_left_out(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "made-up")
    left_out = json.loads(run("--new-machine", path, "--model", "none", "--json").stdout)
    assert left_out["model"] is None and left_out["chosen"] == "no model was asked for"
    named = json.loads(run("--new-machine", path, "--model", "epyc-zen4-2c-fp32", "--json").stdout)
    assert named["model"] == "epyc-zen4-2c-fp32" and named["expectations"][0]["workload"] == "all workloads"


def test_a_link_that_is_no_pcie_is_held_against_its_like(tmp_path: Path) -> None:
    def change(manifest: Manifest) -> None:
        manifest["machine"] |= {"gpu_name": "NVIDIA GH200 480GB", "link_kind": "nvlink-c2c", "c2c_n_links": 10}
        values = {"link_h2d_copy": 375e9, "link_d2h_copy": 297e9, "link_kernel_read": 150e9, "memory_stream": 3.5e12}
        for key, value in values.items():
            manifest["calibration"][f"{key}_bytes_per_s"]["value"] = value

    found = judged(write_gpu_capture(tmp_path / "made-up"), change)
    names = ("link h2d copy", "link d2h copy", "link kernel read", "memory stream", "link")
    assert [verdicts(found)[name] for name in names] == [HEALTHY, HEALTHY, LOOK_AT, HEALTHY, HEALTHY]
    assert item_of(found, "link kernel read").frac == pytest.approx(1 / 3)


def slowed(path: Path, factor: float) -> Path:
    """The capture with all times of its points so many times as long."""
    lines = [json.loads(line) for line in (path / "observations.jsonl").read_text().splitlines()]
    for line in lines:
        line["times_ns"] = [round(factor * one) for one in line["times_ns"]]
    (path / "observations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_slow_silicon_is_told_from_slow_software(tmp_path: Path) -> None:
    name = "all workloads, at the rates of h100-sxm"
    rates = ("bf16_gemm_flops_per_s", "memory_stream_bytes_per_s")
    silicon = judged(slowed(write_gpu_capture(tmp_path / "silicon"), 2.0), scaled(*rates, by=0.5))
    assert verdicts(silicon)["all workloads"] == HEALTHY
    assert "silicon or its settings" in item_of(silicon, name).words and verdicts(silicon)[name] == LOOK_AT
    software = judged(slowed(write_gpu_capture(tmp_path / "software"), 2.0))
    assert verdicts(software)["all workloads"] == LOOK_AT and "software" in item_of(software, name).words
    assert verdicts(software)["bf16 GEMM"] == HEALTHY


def test_one_run_shows_no_spread(tmp_path: Path) -> None:
    found = new_machine(load_capture(write_synthetic_capture(tmp_path / "made-up", n_runs=1)))
    assert verdicts(found)["runs apart from each other"] == OPEN and found.n_runs_wanted is None
    assert "--runs 5" in report.new_machine_page(found, [])


def test_a_cpu_without_a_datasheet_is_not_judged_by_one(tmp_path: Path) -> None:
    found = new_machine(load_capture(write_synthetic_capture(tmp_path / "made-up")))
    item = item_of(found, "other rates")
    assert item.verdict == OPEN and "no datasheet; give one with --hardware FILE.toml" in item.words
    assert not [one for one in found.items if one.section == "calibrated rates" and one.frac is not None]


def test_nominal_rates_of_a_cpu_are_derived_of_its_facts() -> None:
    machine = {"cpu_vendor": "GenuineIntel", "cpu_family": "6", "cpu_flags": ["avx2", "avx512f"], "n_cores": 4}
    machine |= {"cpu_base_mhz": 2500.0, "memory_n_channels": 8, "memory_transfers_per_s": 4.8e9}
    fp32 = _derived("fp32_gemm_flops_per_s", "cpu", machine, 2)
    assert fp32 is not None and fp32.value == 2 * 64 * 2.5e9 and fp32.source.startswith("derived: 2 cores")
    memory = _derived("memory_stream_bytes_per_s", "cpu", machine, 2)
    assert memory is not None and memory.value == 8 * 8 * 4.8e9
    assert _derived("bf16_gemm_flops_per_s", "cpu", machine, 2) is None, "no bf16 instructions are known of it"
    with_bf16 = machine | {"cpu_flags": ["avx2", "avx512f", "avx512_bf16"]}
    bf16 = _derived("bf16_gemm_flops_per_s", "cpu", with_bf16, 2)
    assert bf16 is not None and bf16.value == 2 * fp32.value
    for key in ("cpu_base_mhz", "cpu_vendor"):
        assert _derived("fp32_gemm_flops_per_s", "cpu", machine | {key: None}, 2) is None


def test_the_same_processor_in_shipped_captures_stands_for_a_datasheet(tmp_path: Path) -> None:
    def change(factor: float) -> Callable[[Manifest], None]:
        def like_zen5(manifest: Manifest) -> None:
            manifest["machine"] |= ZEN5
            peer = load_model("epyc-zen5-2c-fp32").profile
            for key in ("fp32_gemm_flops_per_s", "memory_stream_bytes_per_s"):
                manifest["calibration"][key]["value"] = peer[key] * factor

        return like_zen5

    same = judged(write_synthetic_capture(tmp_path / "same"), change(1.0))
    assert {verdicts(same)[name] for name in ("fp32 GEMM", "memory stream")} == {HEALTHY}
    slow = judged(write_synthetic_capture(tmp_path / "slow"), change(0.4))
    assert {"fp32 GEMM", "memory stream"} <= wrong(slow)
    assert item_of(slow, "fp32 GEMM").frac == pytest.approx(0.4, rel=1e-3)


def test_rates_of_two_dtypes_tell_which_kernels_lack_instructions(tmp_path: Path) -> None:
    def change(ratio: float) -> Callable[[Manifest], None]:
        def with_both(manifest: Manifest) -> None:
            manifest["machine"]["cpu_flags"] = ["avx2", "avx512f", "avx512_bf16"]
            fp32 = manifest["calibration"]["fp32_gemm_flops_per_s"]
            manifest["calibration"]["bf16_gemm_flops_per_s"] = fp32 | {"value": fp32["value"] * ratio}

        return with_both

    by_ratio = {
        ratio: item_of(judged(write_synthetic_capture(tmp_path / str(ratio)), change(ratio)), "bf16 beside fp32")
        for ratio in (0.8, 2.0, 4.0)
    }
    assert [item.verdict for item in by_ratio.values()] == [LOOK_AT, HEALTHY, LOOK_AT]
    assert "bf16 does without its instructions" in by_ratio[0.8].words
    assert "fp32 does not use the width" in by_ratio[4.0].words


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"n_cores": 8}, "threads and cores"),
        ({"cpu_quota_cores": 1.5}, "threads and cores"),
        ({"transparent_huge_pages": "never"}, "settings of the host"),
    ],
)
def test_settings_of_a_cpu_that_cost_speed_are_told(facts: Manifest, name: str, tmp_path: Path) -> None:
    assert wrong(judged(write_synthetic_capture(tmp_path / "made-up"), told(**facts))) - MADE_UP == {name}


def test_a_torch_that_does_not_use_what_the_processor_has_is_told(tmp_path: Path) -> None:
    def change(manifest: Manifest) -> None:
        manifest["machine"]["cpu_flags"] = ["avx2", "avx512f"]
        manifest["software"]["torch_cpu_capability"] = "AVX2"

    assert wrong(judged(write_synthetic_capture(tmp_path / "made-up"), change)) - MADE_UP == {"instruction sets"}


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)
FACTS = ["cpu_flags", "cpu_base_mhz", "n_cores", "memory_n_channels", "memory_transfers_per_s", "power_limit_watts"]
FACTS += ["power_limit_default_watts", "pcie_gen_max", "pcie_width_max", "under_load", "ecc", "mig", "cpu_quota_cores"]
FACTS += ["n_numa_nodes", "numa_nodes", "gpu_numa_node", "hypervisor", "transparent_huge_pages", "link_kind"]


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    facts=st.dictionaries(st.sampled_from(FACTS), JUNK, max_size=8),
    seen=st.dictionaries(
        st.sampled_from(["pcie_gen", "pcie_width", "clock_reasons", "power_watts", "sm_clock_mhz"]), JUNK
    ),
)
def test_whatever_a_manifest_says_of_its_machine_gives_items(facts: Manifest, seen: Manifest, gpu: Capture) -> None:
    machine = gpu.manifest["machine"] | {"under_load": seen} | facts
    for device in ("cuda", "cpu"):
        chosen = gpu.manifest | {"machine": machine, "settings": gpu.manifest["settings"] | {"device": device}}
        capture = replace(gpu, manifest=chosen)
        items = [*fact_items(capture, []), *rate_items(capture, None, [])]
        assert all(item.words and item.verdict in (HEALTHY, LOOK_AT, OPEN) for item in items)
        assert all(item.next_steps for item in items if item.verdict == LOOK_AT)


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return load_capture(write_gpu_capture(tmp_path_factory.mktemp("new") / "made-up"))


def test_the_shares_in_the_docs_are_those_of_the_data() -> None:
    page = (ROOT / "docs" / "new-machine.md").read_text(encoding="utf-8")
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    for title, quantity, of in (
        ("bf16 GEMM", "bf16_gemm_flops_per_s", "gpu"),
        ("fp8 GEMM", "fp8_gemm_flops_per_s", "gpu"),
        ("device memory", "memory_stream_bytes_per_s", "gpu"),
        ("PCIe copies", "link_h2d_copy_bytes_per_s", "pcie"),
        ("memory of a CPU", "memory_stream_bytes_per_s", "cpu"),
        ("fp32 GEMM of a CPU, base clock", "fp32_gemm_flops_per_s", "cpu"),
    ):
        rows, apart = reached(quantity, of), apart_frac(quantity, of)
        for row in rows:
            assert f" {100 * row.frac:.0f} %" in lines[title], row
        assert f"{100 * apart:.0f} %" in lines[title] and f" {100 * rows[0].frac * (1 - apart):.0f} " in lines[title], (
            title
        )


def test_what_was_reached_has_sources_and_agrees_with_the_model() -> None:
    content = tomllib.loads(REACHED_FILE.read_text(encoding="utf-8"))
    for row in content["reached"]:
        assert row["source"] and row["quantity"] in QUANTITIES, row
        assert row["quantity"].endswith("_ns") or 0.05 < row["value"] / row["nominal"] < 1, row
    assert all(row["source"] and 0 < row["frac"] < 1 for row in content["apart"])
    for row in content["reached"]:
        assert 0 < apart_frac(row["quantity"], row["of"]) < 1
    lowest = reached("bf16_gemm_flops_per_s", "gpu")[0]
    assert lowest.machine == "gb200" and lowest.frac == pytest.approx(1822 / 2500)
    assert [row.machine for row in reached("bf16_gemm_flops_per_s", "gpu", "h100-sxm")] == ["h100-sxm"]
    assert lowest.frac < PEAK_GEMM_FRAC < max(row.frac for row in reached("bf16_gemm_flops_per_s", "gpu"))
    assert reached("link_d2h_copy_bytes_per_s", "pcie")[0].frac == pytest.approx(12.1 / 16)
    for name in ("bf16_gemm_flops_per_s", "memory_stream_bytes_per_s"):
        card = hardware("h100-sxm")
        peak = card[name.replace("_gemm_", "_peak_").replace("_stream_", "_peak_")]
        assert card[name] / peak >= reached(name, "gpu", "h100-sxm")[0].frac * (1 - apart_frac(name, "gpu"))


def test_so_many_runs_conclude_in_four_of_five_cases_and_one_less_does_not(tmp_path: Path) -> None:
    """Drawn by hand: means of n runs on each side, their spread known from these alone, at no change."""
    noise = np.random.default_rng(4)
    made = write_synthetic_capture(tmp_path / "made-up", noise=lambda: float(np.exp(noise.normal(0, 0.06))))
    capture = load_capture(made)
    sd = math.sqrt(sum(one.value for one in spread_of(capture)[0].of_units))  # type: ignore[index]
    n, _ = n_runs_wanted(capture)
    rng, power = np.random.default_rng(0), {}
    assert n is not None and n > 2
    for k in (n - 1, n):
        a, b = rng.normal(0, sd, (2, 20_000, k))
        half = stats.t.ppf(0.95, 2 * (k - 1)) * np.sqrt((a.var(axis=1, ddof=1) + b.var(axis=1, ddof=1)) / k)
        power[k] = float((b.mean(axis=1) - a.mean(axis=1) + half < math.log1p(0.03)).mean())
    assert power[n] > 0.78 and power[n - 1] < 0.8


def test_runs_that_a_check_needs_are_those_that_a_comparison_asks_for(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "made-up", noise=noise(3, 0.1))
    capture = load_capture(path)
    found = spread_of(capture)
    assert found is not None
    n, is_enough = n_runs_wanted(capture, 0.01)
    more = n_more_runs(0.0, math.log1p(0.01), found[0], found[0], level=0.0075)
    assert is_enough and more is not None and n == more + found[0].n_units
    assert (n_runs_wanted(capture, 0.005)[0] or 0) > (n or 0)


def test_no_capture_is_judged_by_the_model_that_was_fitted_on_it() -> None:
    models = {name: load_model(name) for name in shipped_models()}
    chosen = {path.name: _model_of(load_capture(path), models) for path in shipped_captures()}
    judges = {name: None if model is None else model.profile.name for name, (model, _) in chosen.items()}
    assert judges == {
        "epyc-zen4-2c-fp32": "epyc-zen5-2c-fp32",
        "epyc-zen5-2c-fp32": "epyc-zen4-2c-fp32",
        "epyc-zen5-2c-bf16": None,
    }
    assert all("was fitted on this capture" in why for _, why in chosen.values())


def test_a_shipped_capture_is_judged_by_the_model_of_another_machine() -> None:
    found = new_machine(load_capture(ROOT / "traces" / "epyc-zen4-2c-fp32"))
    swept = [item for item in found.items if item.section == "the sweep against a model"]
    assert found.model == "epyc-zen5-2c-fp32" and {item.verdict for item in swept} == {HEALTHY}
    assert {"grouped_gemm, memory-bound", "moe_layer, compute-bound"} <= {item.name for item in swept}
    assert wrong(found) == {"calibration between runs"}, "one of its runs calibrated half the GEMM rate of the others"


def test_a_model_of_another_kind_of_device_is_refused(tmp_path: Path) -> None:
    capture = load_capture(write_synthetic_capture(tmp_path / "made-up"))
    with pytest.raises(InputError, match="the model is of resident experts in bf16"):
        new_machine(capture, model=load_model("h100-sxm-trtllm-cutlass-bf16"))
    with pytest.raises(InputError, match="is a gpu, and capture 'made-up' was computed on a cpu"):
        new_machine(capture, hardware("h100-sxm"))


def test_a_report_that_cannot_be_written_hides_no_answer(tmp_path: Path) -> None:
    path = write_synthetic_capture(tmp_path / "made-up")
    (tmp_path / f"junit.xml.{os.getpid()}.part").mkdir()
    files = ("--junit", tmp_path / "junit.xml", "--markdown", tmp_path / "page.md")
    done = run("--new-machine", path, "--model", "none", *files)
    assert done.exit_code == 1 and "junit.xml cannot be written" in done.stderr
    assert "could not be judged" in (tmp_path / "page.md").read_text()


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["check", *map(str, words)], catch_exceptions=True)


def test_the_command_prints_writes_and_ends_with_one_where_something_deserves_a_look(tmp_path: Path) -> None:
    def change(manifest: Manifest) -> None:
        sound(manifest)
        manifest["machine"]["power_limit_watts"] = 400.0

    path = rewritten(write_gpu_capture(tmp_path / "made-up"), change)
    files = [tmp_path / name for name in ("page.html", "page.md", "page.xml")]
    done = run("--new-machine", path, "--html", files[0], "--markdown", files[1], "--junit", files[2])
    assert done.exit_code == 1, done.output
    assert done.stdout.startswith("Healthy but for 1 of ") and "power cap" in done.stdout.splitlines()[0]
    assert "nvidia-smi -pl 700" in done.stdout
    assert "plotly" in files[0].read_text().lower() and "power cap" in files[1].read_text()
    suite = ET.parse(files[2]).getroot()[0]
    said = json.loads(run("--new-machine", path, "--json").stdout)
    assert said["schema_version"] == 1 and len(said["items"]) == len(suite.findall("testcase"))
    assert suite.attrib["failures"] == "1" == str(said["n_look_at"])
    assert suite.attrib["skipped"] == str(said["n_not_judged"])
    assert "<script" not in files[1].read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--new-machine", "x", "BASELINE"], "leave out BASELINE"),
        (["--new-machine", "x", "--axis", "machine", "--margin", "5%"], "leave out --margin, --axis"),
        (["--new-machine", "no-such-folder"], "is not a capture folder"),
        (["--new-machine", ROOT / "traces" / "epyc-zen5-2p-expert-parallel"], "is a capture of expert parallelism"),
        (["--new-machine", ROOT / "traces" / "epyc-zen4-2c-fp32", "--junit", "x.txt"], "expected a .xml file"),
        (["--new-machine", ROOT / "traces" / "epyc-zen4-2c-fp32", "--hardware", "h100-sxm"], "is a gpu"),
        (["one"], "check needs a BASELINE and a CANDIDATE, or --new-machine"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(words: list[object], said: str) -> None:
    done = run(*words)
    assert isinstance(done.exception, InputError) and said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_page_about_a_machine_without_numbers_still_says_so(tmp_path: Path) -> None:
    found = judged(write_synthetic_capture(tmp_path / "made-up"), lambda manifest: manifest["calibration"].clear())
    assert verdicts(found)["fp32 GEMM"] == OPEN and found.points is None and found.model is None
    assert new_machine_figures(found) == [] or found.items
    assert "could not be judged" in report.new_machine_verdict(found)
