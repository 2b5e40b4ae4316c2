"""Hardware profiles: units, evidence, and the published numbers they are copied from."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from perfmodel import hardware
from perfmodel.errors import InputError
from perfmodel.latency import load_model
from perfmodel.regression.machine import rates
from perfmodel.text import to_base

GOOD = 'device = "gpu"\n[memory_peak_bytes_per_s]\nvalue = 2\nunit = "TB/s"\nkind = "datasheet"\nsource = "a table"\n'


def profile(tmp_path: Path, text: str) -> hardware.HardwareProfile:
    path = tmp_path / "box.toml"
    path.write_text(text, encoding="utf-8")
    return hardware.hardware(str(path))


def test_the_machines_people_ask_about_are_shipped() -> None:
    hopper = {"gh200", "h100-pcie", "h100-sxm", "h200-sxm"}
    assert hopper | {"xeon-spr", "a100-sxm-80gb", "b200-sxm", "gb200", "l40s", "trimoe"} < set(hardware.names())


@pytest.mark.parametrize("name", hardware.names())
def test_every_shipped_number_has_unit_kind_and_source(name: str) -> None:
    machine = hardware.hardware(name)
    assert machine.name == name
    assert machine.quantities
    for key, quantity in machine.quantities.items():
        assert key in hardware.QUANTITIES
        assert quantity.kind in hardware.EVIDENCE
        assert len(quantity.source) > 5
        if quantity.kind == "assumed":
            assert len(quantity.source.partition(": ")[2]) > 15, f"{key}: what from, and then why or how"
        assert math.isfinite(quantity.value)
        assert quantity.value > 0


@pytest.mark.parametrize("name", hardware.names())
def test_what_is_reached_stays_below_the_peak(name: str) -> None:
    machine = hardware.hardware(name)
    for reached, peak in {
        "bf16_gemm_flops_per_s": "bf16_peak_flops_per_s",
        "memory_stream_bytes_per_s": "memory_peak_bytes_per_s",
        "host_stream_bytes_per_s": "host_peak_bytes_per_s",
        "link_h2d_copy_bytes_per_s": "link_peak_bytes_per_s",
        "link_d2h_copy_bytes_per_s": "link_peak_bytes_per_s",
        "link_kernel_read_bytes_per_s": "link_peak_bytes_per_s",
        "peer_link_all_to_all_bytes_per_s": "peer_link_peak_bytes_per_s",
        "net_link_all_to_all_bytes_per_s": "net_link_peak_bytes_per_s",
    }.items():
        if {reached, peak} <= set(machine.quantities):
            assert machine[reached] <= machine[peak], reached


def test_gh200_in_base_units() -> None:
    machine = hardware.hardware("gh200")
    assert machine.device == "gpu"
    assert machine["memory_peak_bytes_per_s"] == 4e12
    assert machine["bf16_peak_flops_per_s"] == 989e12
    assert machine["memory_capacity_bytes"] == 96e9
    assert machine["launch_overhead_ns"] == 2771.6


@pytest.mark.parametrize(
    ("name", "key", "row", "source"),
    [
        ("gh200", "link_h2d_copy_bytes_per_s", "GH200 c2c_h2d_copy", "arXiv 2407.07850"),
        ("gh200", "link_d2h_copy_bytes_per_s", "GH200 c2c_d2h_copy", "arXiv 2407.07850"),
        ("gh200", "link_kernel_read_bytes_per_s", "GH200 gpu_kernel_direct_access_host_memory", ""),
        ("gh200", "link_peak_bytes_per_s", "GH200 c2c_per_direction", "NVIDIA"),
        ("gh200", "memory_peak_bytes_per_s", "GH200-96GB hbm3", "NVIDIA"),
        ("gh200", "memory_stream_bytes_per_s", "GH200-96GB hbm3_triad", ""),
        ("gh200", "host_peak_bytes_per_s", "Grace-480GB lpddr5x", "NVIDIA"),
        ("gh200", "host_stream_bytes_per_s", "Grace-480GB lpddr5x_stream", ""),
        ("h100-sxm", "memory_peak_bytes_per_s", "H100-SXM hbm3", "NVIDIA"),
        ("h100-sxm", "memory_stream_bytes_per_s", "H100-SXM hbm3_copy_read_plus_write", ""),
        ("h100-sxm", "bf16_peak_flops_per_s", "H100-SXM bf16_dense", "NVIDIA"),
        ("h100-sxm", "bf16_gemm_flops_per_s", "H100-SXM bf16_matmul_8192", ""),
        ("h100-pcie", "memory_peak_bytes_per_s", "H100-PCIe hbm2e", "NVIDIA"),
        ("h100-pcie", "bf16_peak_flops_per_s", "H100-PCIe bf16_dense", "NVIDIA"),
        ("h100-pcie", "link_peak_bytes_per_s", "PCIe5x16 nominal_one_way", ""),
        ("h100-pcie", "link_h2d_copy_bytes_per_s", "PCIe5x16 h2d_copy", ""),
        ("a100-sxm-80gb", "link_h2d_copy_bytes_per_s", "PCIe4x16 h2d_copy", ""),
        ("l40s", "link_h2d_copy_bytes_per_s", "PCIe4x16 h2d_copy", ""),
        ("h200-sxm", "link_h2d_copy_bytes_per_s", "PCIe5x16 h2d_copy", ""),
        ("trimoe", "memory_peak_bytes_per_s", "H100-PCIe hbm2e", "NVIDIA"),
        ("trimoe", "link_peak_bytes_per_s", "PCIe5x16 nominal_one_way", ""),
        ("h100-pcie", "host_peak_bytes_per_s", "Xeon-SPR ddr5_4800_x8", ""),
        ("xeon-spr", "bf16_gemm_flops_per_s", "Xeon-SPR amx_bf16_achieved", ""),
        ("xeon-spr", "memory_peak_bytes_per_s", "Xeon-SPR ddr5_4800_x8", ""),
    ],
)
def test_profiles_repeat_the_published_numbers(shared: Path, name: str, key: str, row: str, source: str) -> None:
    with (shared / "reference" / "hardware_published.csv").open(encoding="utf-8") as table:
        rows = [line for line in csv.DictReader(table) if f"{line['device']} {line['quantity']}" == row]
    line = next(line for line in rows if line["source"].startswith(source))
    assert hardware.hardware(name)[key] == to_base(float(line["value"]), line["unit"])[0]


@pytest.mark.parametrize(
    ("name", "bf16", "fp8", "gigabytes", "terabytes_per_s", "n_cores"),
    [
        ("a100-sxm-80gb", 312, None, 80, 2.039, 108),
        ("h200-sxm", 989, 1979, 141, 4.8, 132),
        ("b200-sxm", 2250, 4500, 180, 8.0, 148),
        ("gb200", 2500, 5000, 186, 8.0, 152),
        ("l40s", 362.05, 733, 48, 0.864, 142),
    ],
)
def test_nominal_numbers_of_the_gpus_others_measured(
    name: str, bf16: float, fp8: float | None, gigabytes: float, terabytes_per_s: float, n_cores: int
) -> None:
    machine = hardware.hardware(name)
    assert machine["bf16_peak_flops_per_s"] == bf16 * 1e12
    found = machine.first("fp8_peak_flops_per_s")
    assert (found[1].value if found else None) == (fp8 * 1e12 if fp8 else None)
    assert machine["memory_capacity_bytes"] == gigabytes * 1e9
    assert machine["memory_peak_bytes_per_s"] == pytest.approx(terabytes_per_s * 1e12)
    assert machine["n_cores_count"] == n_cores


def test_launches_of_the_a100_are_the_published_ones(shared: Path) -> None:
    with (shared / "reference" / "skip_null_kernel.csv").open(encoding="utf-8") as table:
        row = next(line for line in csv.DictReader(table) if "A100" in str(line))
    machine = hardware.hardware("a100-sxm-80gb")
    numbers = {float(value) for value in row.values() if value.replace(".", "", 1).isdigit()}
    assert {machine["launch_overhead_ns"], machine["null_kernel_ns"]} <= numbers


def test_a_tile_product_of_amx_takes_sixteen_cycles() -> None:
    """TDPBF16PS: 16 x 16 outputs of 32 bf16 terms, a multiply and an add each."""
    machine = hardware.hardware("xeon-spr")
    flops_per_cycle = 16 * 16 * 32 * 2 / 16
    assert flops_per_cycle == rates.AMX_BF16_FLOPS_PER_CYCLE
    assert machine["bf16_peak_flops_per_s"] == pytest.approx(machine["n_cores_count"] * flops_per_cycle * 2e9, rel=1e-3)
    (row,) = rates.reached("bf16_gemm_flops_per_s", "amx")
    assert (row.value, row.nominal) == (machine["bf16_gemm_flops_per_s"], machine["bf16_peak_flops_per_s"])


def test_the_near_data_machine_says_what_is_published_and_what_assumed() -> None:
    machine = hardware.hardware("trimoe")
    of_paper = {key for key, quantity in machine.quantities.items() if "2603.01058" in quantity.source}
    assert {key for key in of_paper if machine.quantities[key].kind == "assumed"} == {
        "host_capacity_bytes",
        "ndp_peak_bytes_per_s",
        "ndp_peak_flops_per_s",
    }
    assert machine["n_ndp_count"] == 16
    assert machine["ndp_link_peak_bytes_per_s"] == 25e9
    plain = hardware.hardware("h100-pcie")
    differ = {key for key in plain.quantities if plain[key] != machine[key]}
    assert differ == {"host_capacity_bytes"}


def test_a_warm_expert_takes_seven_times_as_long_in_one_dimm() -> None:
    """What the assumed rate was chosen by: 45 tokens of an expert in bf16, 2 FLOP for each weight of 2 bytes."""
    machine = hardware.hardware("trimoe")
    weight_bytes, n_tokens = 7.5e7, 45
    flops = n_tokens * weight_bytes  # 2 FLOP a token for each weight of 2 bytes
    in_dimm = max(flops / machine["ndp_peak_flops_per_s"], weight_bytes / machine["ndp_peak_bytes_per_s"])
    on_cpu = max(flops / machine["host_gemm_flops_per_s"], weight_bytes / machine["host_peak_bytes_per_s"])
    assert in_dimm / on_cpu == pytest.approx(7, abs=0.2)
    assert machine["n_ndp_count"] * machine["ndp_peak_bytes_per_s"] == pytest.approx(
        4 * machine["host_peak_bytes_per_s"]
    )


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("NVIDIA B200", "b200-sxm"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        *((f"{gpu}_sxm", f"{gpu}-sxm") for gpu in ("h100", "h200", "b200")),
        ("a100_sxm", "a100-sxm-80gb"),
        ("gb200", "gb200"),
        ("gb200_sxm", "gb200"),
        ("l40s", "l40s"),
    ],
)
def test_a_gpu_is_found_by_its_drivers_name_and_by_the_folder_of_its_data(device: str, name: str) -> None:
    assert hardware.profile_name(device) == name


@pytest.mark.parametrize(
    "device",
    [
        *("", "NVIDIA H200 NVL", "NVIDIA L40", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL"),
        *("NVIDIA GH200 144G HBM3e", "NVIDIA GB300", "gb300", "b300_sxm", "gb200_nvl4", "AMD Instinct MI300X"),
    ],
)
def test_a_gpu_without_a_profile_has_none(device: str) -> None:
    assert hardware.profile_name(device) is None


def test_every_known_gpu_has_a_shipped_profile_with_what_a_capture_is_held_to() -> None:
    for name in hardware.DEVICE_NAMES:
        machine = hardware.hardware(name)
        assert machine.device == "gpu"
        assert {"memory_peak_bytes_per_s", "link_peak_bytes_per_s"} <= set(machine.quantities)


def test_links_to_other_gpus_do_not_make_another_machine() -> None:
    machine = hardware.hardware("h100-sxm")
    links = {"peer_link_peak_bytes_per_s", "net_link_peak_bytes_per_s", "n_node_gpus_count", "n_host_gpus_count"}
    assert set(machine.quantities) - set(machine.own_quantities) == links
    assert load_model("h100-sxm-vllm-triton-bf16").profile.own_quantities == machine.own_quantities


def test_missing_number_names_what_the_machine_has() -> None:
    machine = hardware.hardware("xeon-spr")
    with pytest.raises(InputError, match=r"'xeon-spr' has no link_peak_bytes_per_s; it has bf16_peak"):
        machine["link_peak_bytes_per_s"]
    assert machine.first("link_peak_bytes_per_s") is None
    found = machine.first("memory_stream_bytes_per_s", "memory_peak_bytes_per_s")
    assert found is not None
    assert found[0] == "memory_peak_bytes_per_s"


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(InputError, match=r"unknown hardware 'gb300'; known: .*gh200, h100-pcie, .*xeon-spr, or"):
        hardware.hardware("gb300")


@pytest.mark.parametrize("name", hardware.names())
def test_a_profile_written_and_read_again_is_the_same(name: str, tmp_path: Path) -> None:
    machine = hardware.hardware(name)
    (tmp_path / f"{name}.toml").write_text(hardware.to_toml(machine))
    again = hardware.load_profile(tmp_path / f"{name}.toml")
    assert again == machine


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    machine = profile(tmp_path, 'title = "my box"\nnotes = "mine"\n' + GOOD + 'date = "2026-01"\n')
    assert (machine.name, machine.title, machine.notes) == ("box", "my box", "mine")
    assert machine.quantities["memory_peak_bytes_per_s"] == hardware.Quantity(2e12, "datasheet", "a table", "2026-01")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('unit = "TB/s"', 'unit = "GB"', "memory_peak_bytes_per_s is given in GB, which is not what its name says"),
        ('unit = "TB/s"', 'unit = "TBps"', "memory_peak_bytes_per_s: unknown unit 'TBps'; known units: ns"),
        ('unit = "TB/s"', "unit = 3", "memory_peak_bytes_per_s: unknown unit 3"),
        ("[memory_peak_bytes_per_s]", "[memory_bandwidth]", "unknown quantity 'memory_bandwidth'; known: bf16_peak"),
        ('unit = "TB/s"\n', "", "memory_peak_bytes_per_s lacks unit"),
        ('source = "a table"\n', "", "lacks source"),
        ('source = "a table"', 'source = " "', "lacks source"),
        ('kind = "datasheet"\n', "", "lacks kind"),
        ("value = 2\n", "", "lacks value"),
        (
            'kind = "datasheet"',
            'kind = "guess"',
            "has kind 'guess', expected one of datasheet, paper, measured, assumed",
        ),
        ("value = 2", "value = 0", "is 0, expected a positive number"),
        ("value = 2", "value = -2", "is -2, expected a positive number"),
        ("value = 2", "value = inf", "is inf, expected a positive number"),
        ("value = 2", "value = nan", "is nan, expected a positive number"),
        ("value = 2", 'value = "2"', "is '2', expected a positive number"),
        ("value = 2", "value = true", "is True, expected a positive number"),
        ('device = "gpu"', 'device = "tpu"', "device is 'tpu', expected one of gpu, cpu"),
        ('device = "gpu"\n', "", "device is None"),
        ('device = "gpu"', 'device = "gpu"\nlink_peak_bytes_per_s = 3', "link_peak_bytes_per_s lacks kind, source"),
        ("[memory", "[[memory", "box.toml is not TOML"),
    ],
)
def test_a_careless_profile_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        profile(tmp_path, GOOD.replace(old, new))
    assert words in str(caught.value)
    assert str(caught.value).startswith("box.toml")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no hardware file .*absent\.toml.*; names of shipped profiles: .*gh200"):
        hardware.hardware(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"binary\.toml is not TOML"):
        hardware.hardware(str(tmp_path / "binary.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match=r"folder\.toml is not TOML"):
        hardware.hardware(str(tmp_path / "folder.toml"))


def test_a_shipped_profile_is_read_once_and_a_file_every_time(tmp_path: Path) -> None:
    name = hardware.names()[0]
    assert hardware.hardware(name) is hardware.hardware(name)
    path = tmp_path / "own_made.toml"
    path.write_text(hardware.to_toml(hardware.hardware(name)))
    first = hardware.hardware(str(path))
    path.write_text(hardware.to_toml(replace(first, title="another")))
    assert hardware.hardware(str(path)).title == "another"
