"""What a machine says of itself: parsers on made-up answers, nothing that tells whose it is, null where not told."""

import ctypes
import getpass
import json
import re
import socket
import struct
import types
from pathlib import Path

import pytest

from collectors import gpu, machine, memory_modules, smi

MADE_UP_UUID = "GPU-00000000-1111-2222-3333-444444444444"


def identities() -> set[str]:
    return {socket.gethostname(), getpass.getuser(), str(Path.home())} - {"", "/", "root"}


# --- the host ---


def test_machine_says_what_it_is_and_not_whose():
    found = machine.machine(1)
    assert found["n_cores"] >= 1 and found["n_threads"] == 1
    for key in ("cpu_model", "cpu_vendor", "cpu_family", "cpu_flags", "l2_bytes", "l3_bytes", "memory_bytes"):
        assert key in found  # what older captures say
    text = json.dumps(found)
    assert not identities() & set(text.split('"'))
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-", text)


@pytest.mark.parametrize(("words", "cpus"), [("", []), ("0-2,8", [0, 1, 2, 8]), ("5", [5]), ("0, 3-4\n", [0, 3, 4])])
def test_lists_of_processors_are_read_as_the_kernel_writes_them(words, cpus):
    assert machine.cpus_of(words) == cpus


def test_memory_nodes_count_their_processors_and_those_we_may_use(tmp_path, monkeypatch):
    for node, (cpus, kb) in enumerate((("0-3", 1000), ("4-7", 2000), ("", 500))):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "cpulist").write_text(cpus + "\n")
        (folder / "meminfo").write_text(f"Node {node} MemTotal:  {kb} kB\nNode {node} MemFree: 1 kB\n")
    monkeypatch.setattr(machine, "NODE_DIR", tmp_path)
    monkeypatch.setattr(machine, "CPUS_AT_START", [2, 3, 4])
    assert machine.numa_nodes() == [
        {"node": 0, "n_cpus": 4, "n_usable_cpus": 2, "memory_bytes": 1000 * 1024},
        {"node": 1, "n_cpus": 4, "n_usable_cpus": 1, "memory_bytes": 2000 * 1024},
        {"node": 2, "n_cpus": 0, "n_usable_cpus": 0, "memory_bytes": 500 * 1024},
    ]
    assert machine.cpus_of_node(0) == [2, 3] and machine.cpus_of_node(2) == machine.cpus_of_node(9) == []


def test_nodes_in_use_are_those_with_processors_of_ours(tmp_path, monkeypatch):
    for node, cpus in enumerate(("0-3", "4-7", "")):  # the last is memory alone, as on a GH200
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(machine, "NODE_DIR", tmp_path)
    for cpus, n_nodes in (([1, 2], 1), ([3, 4], 2), ([99], 1)):
        monkeypatch.setattr(machine, "cpu_list", lambda cpus=cpus: cpus)
        assert machine.n_nodes_in_use() == n_nodes


@pytest.mark.parametrize(
    ("near", "n_all", "stays"),
    [("0-7", 16, True), ("0-2", 16, False), ("0-15", 128, True), ("0-7", 128, False), ("", 16, False), ("0", 1, True)],
)
def test_a_process_stays_near_where_it_has_enough_processors(tmp_path, monkeypatch, near, n_all, stays):
    (tmp_path / "node0").mkdir()
    (tmp_path / "node0" / "cpulist").write_text(near + "\n")
    monkeypatch.setattr(machine, "NODE_DIR", tmp_path)
    monkeypatch.setattr(machine, "CPUS_AT_START", tuple(range(n_all)))
    kept: list[list[int]] = []
    monkeypatch.setattr(machine.os, "sched_setaffinity", lambda pid, cpus: kept.append(cpus), raising=False)
    machine.stay_near(0)
    assert kept == ([machine.cpus_of(near)] if stays else [])


@pytest.mark.parametrize(
    ("files", "cores", "n_cores"),
    [
        ({"cpu.max": "1600000 100000"}, 16.0, 16),
        ({"cpu.max": "max 100000"}, None, 112),
        ({"cpu.max": "50000 100000"}, 0.5, 1),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 2.5, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 112),
        ({}, None, 112),
        # A batch job: its step has no limit, the job has; and of the first kind of groups.
        ({"own": "0::/jobs/job_7/step", "jobs/job_7/cpu.max": "800000 100000", "cpu.max": "max 100000"}, 8.0, 8),
        ({"own": "3:cpu,cpuacct:/job", "cpu/job/cpu.cfs_quota_us": "400000",
          "cpu/job/cpu.cfs_period_us": "100000"}, 4.0, 4),
    ],
)  # fmt: skip
def test_cores_are_no_more_than_the_group_has_time_for(tmp_path, monkeypatch, files, cores, n_cores):
    for name, words in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(words + "\n")
    monkeypatch.setattr(machine, "GROUP_DIR", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "CPU_DIR", tmp_path)  # tells no siblings: each processor is a core
    monkeypatch.setattr(machine, "cpu_list", lambda: list(range(112)))
    assert machine.cpu_quota_cores() == cores and machine.n_physical_cores() == n_cores


def test_memory_is_that_of_the_narrowest_group(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "GROUP_DIR", tmp_path)
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    whole = machine.memory_bytes()
    (tmp_path / "own").write_text("0::/jobs/job_7/step\n")
    (tmp_path / "jobs/job_7/step").mkdir(parents=True)
    (tmp_path / "jobs/memory.max").write_text("9000000\n")
    (tmp_path / "jobs/job_7/memory.max").write_text("7000000\n")
    (tmp_path / "jobs/job_7/step/memory.max").write_text("max\n")
    assert machine.memory_bytes() == 7_000_000 < whole
    (tmp_path / "own").write_text("0::/\n")
    assert machine.memory_bytes() == whole


def test_an_arm_processor_is_called_by_its_name():
    assert machine._cpu_model({"CPU implementer": "0x41", "CPU part": "0xd4f"}) == "Arm Neoverse V2"
    assert machine._cpu_model({"model name": "Made Up 9"}) == "Made Up 9"


def test_a_product_that_names_the_host_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "DMI_DIR", tmp_path)
    (tmp_path / "product_name").write_text("Box 9000\n")
    (tmp_path / "sys_vendor").write_text(f"of {socket.gethostname().upper()}\n")
    assert machine._product("product_name") == "Box 9000"
    assert machine._product("sys_vendor") is None
    assert machine._product("nothing") is None


def test_a_pci_link_is_read_and_its_id_not_kept(monkeypatch):
    files = {"numa_node": "1", "max_link_width": "16", "max_link_speed": "32.0 GT/s PCIe"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path.name) if "0001:3b:00.0" in str(path) else None)
    found = machine.pci_link(1, 0x3B, 0)
    assert found == {"gpu_numa_node": 1, "pcie_max_transfers_per_s": 32e9, "pcie_max_lanes": 16}
    assert set(machine.pci_link(0, 0, 0).values()) == {None}
    files |= {"numa_node": "-1", "max_link_width": "255", "max_link_speed": "Unknown"}
    assert set(machine.pci_link(1, 0x3B, 0).values()) == {None}


# --- modules of memory ---


def structure(kind: int, body: bytes) -> bytes:
    """An SMBIOS structure with one string, made up for tests."""
    return struct.pack("<BBH", kind, 4 + len(body), 7) + body + b"SERIAL\0\0"


def module(megabytes: int, kind: int, speed: int, configured: int) -> bytes:
    body = bytearray(0x22 - 4)
    struct.pack_into("<H", body, 0x0C - 4, megabytes)
    body[0x12 - 4] = kind
    struct.pack_into("<H", body, 0x15 - 4, speed)
    struct.pack_into("<H", body, 0x20 - 4, configured)
    return structure(17, bytes(body))


def test_the_firmware_table_tells_modules_kind_and_the_slowest_speed():
    table = structure(4, bytes(8)) + module(32767, 0x22, 4800, 4400) + module(0, 0x22, 0, 0)
    table += module(16384, 0x22, 4800, 4800)
    assert memory_modules.of_table(table) == {
        "memory_n_modules": 2,
        "memory_kind": "DDR5",
        "memory_transfers_per_s": 4400e6,
    }
    nothing = {"memory_n_modules": None, "memory_kind": None, "memory_transfers_per_s": None}
    for damaged in (b"", table[:3], b"\x11\x00\x00\x00", b"\x11\x22" + bytes(2)):
        assert memory_modules.of_table(damaged) == nothing


def test_error_counters_tell_channels_and_a_missing_source_is_null(tmp_path):
    for controller, channel in ((0, 0), (0, 1), (1, 0), (1, 0)):
        name = len(list(tmp_path.glob("mc*/dimm*")))
        folder = tmp_path / f"mc{controller}" / f"dimm{name}"
        folder.mkdir(parents=True)
        (folder / "size").write_text("32768\n")
        (folder / "dimm_mem_type").write_text("Registered-DDR5\n")
        (folder / "dimm_location").write_text(f"channel {channel} slot {name}\n")
    found = memory_modules.memory_modules(tmp_path, tmp_path / "none")
    assert (found["memory_n_modules"], found["memory_n_channels"]) == (4, 3)
    assert found["memory_kind"] == "Registered-DDR5" and found["memory_transfers_per_s"] is None
    assert set(memory_modules.memory_modules(tmp_path / "a", tmp_path / "b").values()) == {None}


# --- nvidia-smi ---


def asker(answers: dict[str, str], unknown: tuple[str, ...] = ()):
    """A made-up nvidia-smi; like the real one it refuses a whole question for one unknown field."""

    def ask(arguments):
        assert arguments[0] == f"--id={MADE_UP_UUID}"
        names = arguments[1].removeprefix("--query-gpu=").split(",")
        if set(names) & set(unknown):
            return None
        return ", ".join(answers.get(name, "[N/A]") for name in names) + "\n"

    return ask


def test_fields_become_numbers_words_and_nulls():
    answers = {
        "driver_version": "580.10",
        "power.limit": "700.00",
        "pcie.link.gen.max": "5",
        "mig.mode.current": "Disabled",
    }
    found = smi.gpu_smi(MADE_UP_UUID, asker(answers))
    assert (found["driver"], found["power_limit_watts"], found["pcie_gen_max"]) == ("580.10", 700.0, 5)
    assert found["mig"] == "Disabled" and found["persistence"] is None
    assert set(found) == set(smi.STATIC)


def test_a_field_the_driver_does_not_know_costs_only_itself():
    old = {"clocks_throttle_reasons.active": "0x0000000000000044", "clocks.sm": "1410"}
    ask = asker(old, unknown=("clocks_event_reasons.active", "power.draw"))
    fields = smi.known(MADE_UP_UUID, smi.SEEN, ask)
    assert "power_watts" not in fields and fields["clock_reasons"] == "clocks_throttle_reasons.active"
    sample = smi.query(MADE_UP_UUID, fields, ask)
    assert sample["sm_clock_mhz"] == 1410
    assert smi.reasons(sample["clock_reasons"]) == ["power cap", "hardware thermal slowdown"]


def test_no_nvidia_smi_is_nothing_and_no_error(monkeypatch):
    assert smi.gpu_smi(MADE_UP_UUID, lambda _: None) == {}
    assert smi.query(MADE_UP_UUID, {}, lambda _: "") == {}
    assert set(smi.modes(MADE_UP_UUID, lambda _: None).values()) == {None}
    monkeypatch.setenv("PATH", "")
    assert smi.ask(["-L"]) is None
    with smi.Sampler(MADE_UP_UUID) as sampler:
        pass
    assert sampler.failed and sampler.samples == []


@pytest.mark.parametrize(
    ("words", "value"),
    [("", None), ("[N/A]", None), ("[Not Supported]", None), ("N/A", None), ("12", 12), ("1.50", 1.5)],
)
def test_what_nvidia_smi_does_not_tell_is_null(words, value):
    assert smi.number(words) == value


def test_samples_become_medians_and_all_reasons():
    samples = [
        {"sm_clock_mhz": 1980, "power_watts": 300.0, "clock_reasons": "0x0000000000000000"},
        {"sm_clock_mhz": 1500, "power_watts": 700.5, "clock_reasons": "0x0000000000000004"},
        {"sm_clock_mhz": 1600, "power_watts": None, "clock_reasons": "0x0000000000000024"},
    ]
    found = smi.seen(samples)
    assert (found["sm_clock_mhz"], found["power_watts"], found["n_samples"]) == (1600, 500.25, 3)
    assert found["clock_reasons"] == ["power cap", "software thermal slowdown"]
    assert found["temperature_c"] is None
    assert smi.seen([])["clock_reasons"] == [] and smi.seen([])["sm_clock_mhz"] is None


def test_links_of_the_first_gpu_are_added_and_names_are_not_kept():
    page = "    GPU Virtualization Mode\n        Virtualization Mode               : Pass-Through\n"
    links = "".join(
        f"GPU {i}: NVIDIA GH200 (UUID: {MADE_UP_UUID})\n"
        + "".join(f"\t C2C Link {k}: 44.712 GB/s\n" for k in range(10))
        for i in range(2)
    )

    def ask(arguments):
        if arguments[0] == "-q":
            return page
        return {("c2c", "-s"): links, ("conf-compute", "-f"): "CC status: OFF\n"}.get(tuple(arguments))

    found = smi.modes(MADE_UP_UUID, ask)
    assert found["virtualization"] == "Pass-Through" and found["confidential_compute"] == "off"
    assert found["c2c_n_links"] == 10 and found["c2c_peak_bytes_per_s"] == pytest.approx(447.12e9)
    assert MADE_UP_UUID not in json.dumps(found)


# --- the driver and the GPU's part ---


class Driver:
    """A made-up CUDA driver library."""

    def __init__(self, attributes: dict[int, int], init: int = 0) -> None:
        self.attributes, self.init = attributes, init

    def cuInit(self, flags):
        return self.init

    def cuDriverGetVersion(self, version):
        version._obj.value = 13020
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 40 + ordinal
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert device.value == 41
        if attribute not in self.attributes:
            return 1
        value._obj.value = self.attributes[attribute]
        return 0


def test_attributes_are_those_of_the_driver_header():
    """Numbers of cuda.h (CUDA 13.0), enumeration CUdevice_attribute."""
    assert gpu.ATTRIBUTES["pageable_memory_access"] == 88
    assert gpu.ATTRIBUTES["pageable_uses_host_page_tables"] == 100
    assert gpu.ATTRIBUTES["gpu_memory_numa_node"] == 131 and gpu.ATTRIBUTES["host_numa_node"] == 134
    assert gpu.ATTRIBUTES["gpu_is_integrated"] == 18


def test_a_driver_is_asked_and_what_it_refuses_is_null():
    found = gpu.driver_facts(Driver({88: 1, 100: 1, 131: -1, 134: 0}), 1)
    assert found == {
        "driver_cuda": "13.2", "pageable_memory_access": True, "pageable_uses_host_page_tables": True,
        "gpu_memory_numa_node": None, "host_numa_node": 0, "gpu_is_integrated": None,
    }  # fmt: skip
    assert gpu.reads_pageable(found)
    assert not gpu.reads_pageable(gpu.driver_facts(Driver({88: 1, 100: 0}), 1))  # would migrate pages instead
    assert not gpu.reads_pageable(gpu.driver_facts(None, 0))
    broken = gpu.driver_facts(Driver({88: 1}, init=999), 1)
    assert broken["driver_cuda"] == "13.2" and broken["pageable_memory_access"] is None


def test_the_kind_of_link_is_told_only_by_evidence():
    assert gpu.link_kind({"c2c_n_links": 10}) == gpu.link_kind({"pageable_uses_host_page_tables": True}) == "nvlink-c2c"
    assert gpu.link_kind({"pcie_gen_max": 5, "pageable_memory_access": True}) == "pcie"
    assert gpu.link_kind({}) is None


def test_the_gpu_part_keeps_no_id(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    properties = types.SimpleNamespace(
        name="made up", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20,
        uuid=MADE_UP_UUID.removeprefix("GPU-"), pci_domain_id=0x7A, pci_bus_id=0x3B, pci_device_id=0,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(gpu, "driver_library", lambda: Driver({88: 0, 100: 0}))
    monkeypatch.setattr(
        smi, "gpu_smi", lambda uuid: {"driver": "580.1", "pcie_gen_max": 5} if uuid == MADE_UP_UUID else {}
    )
    monkeypatch.setattr(smi, "modes", lambda _: {"c2c_n_links": None})
    found = gpu.gpu("cuda")
    assert gpu.gpu("cpu") == {}
    assert (found["gpu_name"], found["gpu_capability"], found["gpu_n_sms"]) == ("made up", "9.0", 132)
    assert found["gpu_memory_bytes"] == 80 << 30 and found["link_kind"] == "pcie" and found["driver"] == "580.1"
    assert found["link_nominal_bytes_per_s"] is None  # the made-up link does not tell its lanes
    text = json.dumps(found)
    assert properties.uuid not in text and "3b:00" not in text


@pytest.mark.parametrize(
    ("facts", "gigabytes_per_s"),
    [
        ({"pcie_gen_max": 5, "pcie_width_max": 16}, 63.0),  # 32 GT/s x 16 lanes / 8 bits x 128/130
        ({"pcie_gen_max": 4, "pcie_width_max": 16}, 31.5),
        ({"pcie_gen_max": 2, "pcie_width_max": 8}, 4.0),
        ({"pcie_gen_max": None, "pcie_max_transfers_per_s": 16e9, "pcie_max_lanes": 8}, 15.75),
        ({"pcie_gen_max": 5, "pcie_width_max": 16, "c2c_peak_bytes_per_s": 447.12e9}, 447.1),
    ],
)
def test_the_nominal_rate_of_a_link_is_its_lanes_times_their_data(facts, gigabytes_per_s):
    assert gpu.link_nominal_bytes_per_s(facts) == pytest.approx(gigabytes_per_s * 1e9, rel=1e-3)


def test_the_nominal_rate_of_an_untold_link_is_null():
    for facts in ({}, {"pcie_gen_max": 5}, {"pcie_width_max": 16}, {"pcie_gen_max": 9, "pcie_width_max": 16}):
        assert gpu.link_nominal_bytes_per_s(facts) is None


def test_software_of_a_torch_without_cuda_is_null():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    found = gpu.cuda_software()
    assert set(found) == {"torch_cuda", "cublas", "cudnn"}
    if torch.version.cuda is None:
        assert set(found.values()) == {None}
    assert gpu._library_version("libnothing.so.99", "f") is None
    assert machine.gpu("cpu") == {}
    assert {*found, "torch_mkldnn", "torch_mkl", "torch_cpu_capability"} == set(machine.torch_build())


def test_a_library_version_is_put_together(monkeypatch):
    class Library:
        @staticmethod
        def getProperty(which, part):
            ctypes.cast(part, ctypes.POINTER(ctypes.c_int))[0] = (13, 1, 7)[which]
            return 0

    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Library)
    assert gpu._library_version("libmade_up.so", "getProperty") == "13.1.7"


@pytest.mark.gpu
def test_a_real_gpu_says_what_it_is_and_not_whose():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    found = {**gpu.gpu("cuda"), **gpu.cuda_software()}
    assert found["driver_cuda"] and found["cublas"] and found["cudnn"]
    text = json.dumps(found)
    assert str(torch.cuda.get_device_properties(0).uuid) not in text
    assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}-|[0-9a-f]{2}:[0-9a-f]{2}\.\d", text)
