"""Checking captures: sound ones pass, and each of many ways to break one is found with the sentence that says it."""

import gzip
import importlib
import importlib.util
import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collectors.timing import median_error_frac
from perfmodel import report
from perfmodel.capture import load_capture, shipped_captures
from perfmodel.capture_lines import ACCESS, ORDERS, RESIDENCIES, content_id
from perfmodel.errors import InputError
from perfmodel.plausible import ERROR, check_capture, is_sound, verdict
from perfmodel.plausible.ceilings import manifest_link
from perfmodel.plausible.identity import identity_in
from perfmodel.plausible.points import active_bytes, error_frac, expert_weights
from perfmodel.plausible.summary import machine_words, studies, summary
from tests.captures_made import GPU_RUNS, write_gpu_capture

Json = dict[str, Any]
Break = Callable[[Path], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpu_capture(tmp_path_factory.mktemp("made") / "gpu")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "gpu"))


def lines_of(folder: Path, name: str) -> list[Json]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def write_lines(folder: Path, name: str, lines: list[Json]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines(name: str, change: Callable[[list[Json]], object]) -> Break:
    """A break of the lines of a file: `change` edits the list in place."""

    def do(folder: Path) -> None:
        found = lines_of(folder, name)
        change(found)
        write_lines(folder, name, found)

    return do


def manifest(change: Callable[[Json], object]) -> Break:
    def do(folder: Path) -> None:
        found = json.loads((folder / "capture.json").read_text())
        change(found)
        (folder / "capture.json").write_text(json.dumps(found))

    return do


def workload(where: Callable[[Json], bool], **changes: object) -> Break:
    """Change the first workload that fits, its id and its observations along, so that only the change is wrong."""

    def do(folder: Path) -> None:
        planned = lines_of(folder, "workloads")
        line = next(line for line in planned if where(line))
        before = line["workload"]
        line.update(changes)
        line["workload"] = content_id(line)
        observed = lines_of(folder, "observations")
        for point in observed:
            if point["workload"] == before:
                point["workload"] = line["workload"]
        write_lines(folder, "workloads", planned)
        write_lines(folder, "observations", observed)

    return do


def times(factor: float, where: Callable[[Json], bool] = lambda _: True) -> Break:
    """Every time of the workloads that fit, times a factor."""

    def do(folder: Path) -> None:
        chosen = {line["workload"] for line in lines_of(folder, "workloads") if where(line)}
        assert chosen
        observed = lines_of(folder, "observations")
        for point in observed:
            if point["workload"] in chosen:
                point["times_ns"] = [max(1, round(t * factor)) for t in point["times_ns"]]
        write_lines(folder, "observations", observed)

    return do


def calibrated(quantity: str, factor: float) -> Break:
    """A number of the manifest and of the calibration lines, times a factor."""

    def do(folder: Path) -> None:
        manifest(lambda m: m["calibration"][quantity].update(value=m["calibration"][quantity]["value"] * factor))(
            folder
        )
        found = lines_of(folder, "calibration")
        for line in found:
            line["value"] *= factor if line["quantity"] == quantity else 1
        write_lines(folder, "calibration", found)

    return do


def profile(words: str) -> Break:
    def do(folder: Path) -> None:
        with gzip.open(folder / "profiles" / "moe_layer-made-up.trace.json.gz", "wt") as file:
            file.write(words)

    return do


def resident(w: Json) -> bool:
    return w["access"] == "resident" and w.get("launch") is None


def offloaded(access: str, n_tokens: int | None = None) -> Callable[[Json], bool]:
    return lambda w: w["access"] == access and n_tokens in (None, w["n_tokens"])


def compute_bound(w: Json) -> bool:
    return w["shape"] == "mixtral-8x7b" and w["n_tokens"] == 4096 and w["op"] == "grouped_gemm"


def memory_bound(w: Json) -> bool:
    return w["shape"] == "mixtral-8x7b" and w["n_tokens"] == 1 and w["op"] == "grouped_gemm"


def zero_copy(w: Json) -> bool:
    return offloaded("zero-copy")(w) and w.get("launch") is None


GOOD_TRACE = '{"traceEvents": [{"cat": "kernel", "name": "perfmodel::x"}], "note": "%s"}'

# Name of the break, the break, severity and group of what must be found, and its sentence.
BREAKS: list[tuple[str, Break, str, str, str]] = [
    ("workloads missing", lambda f: (f / "workloads.jsonl").unlink(), "error", "form", "workloads.jsonl is missing"),
    ("manifest without machine", manifest(lambda m: m.pop("machine")), "error", "form", "lacks 'machine'"),
    ("damaged line", lines("observations", lambda x: x[3].update(times_ns=[-5])),
     "error", "form", "cannot be used: .*>"),
    ("cut line", lambda f: (f / "observations.jsonl").write_text((f / "observations.jsonl").read_text() + '{"wo'),
     "warning", "form", "cut short"),
    ("id", lines("workloads", lambda x: x[0].update(seed=8)), "error", "form", "not the hash of its line"),
    ("planned twice", lines("workloads", lambda x: x.append(x[0])), "error", "form", "stands there more than once"),
    ("n_workloads", manifest(lambda m: m.update(n_workloads=3)),
     "error", "form", "n_workloads is 3, and 120 are planned"),
    ("counts do not sum", workload(resident, n_tokens=2), "error", "form", "sums to 8, expected tokens x top-k = 16"),
    ("too few counts", workload(resident, n_experts=128), "error", "form", "64 entries for 128 experts"),
    ("GEMM sizes", workload(compute_bound, gemm_k=17), "error", "form", "17 x .* is neither gate and up nor down"),
    ("another device", workload(resident, device="cpu"),
     "error", "form", "device is 'cpu', and the settings say 'cuda'"),
    ("unknown dtype", workload(resident, dtype="fp7"), "error", "form", "dtype 'fp7' is unknown"),
    ("unknown access", workload(zero_copy, access="telepathy"),
     "error", "form", "access is 'telepathy', expected one of"),
    ("offload_frac", workload(zero_copy, offload_frac=0.25), "error", "form", "is 0.25, and 32 of 64 experts"),
    ("expert twice", workload(zero_copy, offloaded=[1, 1]), "error", "form", "names an expert twice"),
    ("expert out of range", workload(zero_copy, offloaded=[64]), "error", "form", "outside 0 to 63"),
    ("offloaded not named", workload(zero_copy, offloaded=None), "error", "form", "offloaded experts are not named"),
    ("resident with offloaded", workload(resident, offloaded=[1]), "error", "form", "everything is resident, yet"),
    ("no residency", workload(zero_copy, residency=None), "error", "form", "residency is None under zero-copy"),
    ("residency of copy", workload(offloaded("copy"), residency="mapped"), "error", "form", "which only zero-copy has"),
    ("graph of the host", workload(offloaded("cpu"), launch="graph"), "error", "form", "graph cannot replay cpu"),
    ("unknown launch", workload(resident, launch="rocket"), "error", "form", "launch is 'rocket'"),
    ("wrong order", workload(offloaded("copy", 4096), offloaded=list(range(32))), "warning", "form", "not the coldest"),
    ("unplanned", lines("observations", lambda x: x[0].update(workload="0" * 12)), "error", "form", "is not planned"),
    ("measured twice", lines("observations", lambda x: x.append(x[0])), "error", "form", "measured 2 times in run 0"),
    ("no time", lines("observations", lambda x: x[0].update(times_ns=[])), "error", "form", "has no time"),
    ("point lost", lines("observations", lambda x: x.pop()), "error", "form", "run 1 lacks 1 point of 120, and says"),
    ("n_left_out", manifest(lambda m: m["runs"][0].update(n_left_out=4)),
     "error", "form", "says 4 points were left out, and fewer"),
    ("run backwards", manifest(lambda m: m["runs"][1].update(finished=5)), "error", "form", "before it started"),
    ("run twice", manifest(lambda m: m["runs"][1].update(run=0)), "error", "form", "run 0 has 2 records"),
    ("run not ended", manifest(lambda m: m["runs"].pop()), "warning", "form", "run 1 has 120 points and no record"),
    ("clock back", lines("observations", lambda x: x[50].update(started=x[0]["started"])),
     "error", "form", "the one above"),
    ("left out without reason", lines("left_out", lambda x: x[0].update(reason=" ")), "error", "form", "no reason"),
    ("left out of no plan", lines("left_out", lambda x: x.append({"workload": "x", "run": 0, "reason": "y"})),
     "error", "form", "workload x is not planned"),
    ("unknown quantity", lines("calibration", lambda x: x[0].update(quantity="charm")),
     "error", "form", "'charm' is unknown"),
    ("unit of another", lines("calibration", lambda x: x[0].update(unit="ns")), "error", "form", "given in ns"),
    ("zero", lines("calibration", lambda x: x[0].update(value=0)), "error", "form", "gave 0, expected a positive"),
    ("nested params", lines("calibration", lambda x: x[0].update(params={"a": [1]})), "error", "form", "are not flat"),
    ("summary of others", manifest(lambda m: m["calibration"]["bf16_gemm_flops_per_s"].update(value=6e14)),
     "error", "form", "6e\\+14, and its calibration lines say 7e\\+14 to"),
    ("no kernel said", manifest(lambda m: m.update(kernel=None)), "error", "form", "which grouped GEMM ran"),
    ("profile of nothing", profile("{}"), "warning", "form", "no kernel of the GPU"),
    # whose machine it is
    ("host", manifest(lambda m: m["machine"].update(node=socket.gethostname())),
     "error", "identity", "name of this machine"),
    ("path", manifest(lambda m: m.update(out="/data/alice/run")),
     "error", "identity", "absolute path: /data/alice/run"),
    ("home", manifest(lambda m: m.update(out="/home/alice")), "error", "identity", "a home folder: /home/alice"),
    ("mail", profile(GOOD_TRACE % "alice@example.org"), "error", "identity", "e-mail address: alice@example.org"),
    ("uuid", profile(GOOD_TRACE % "GPU-6f4a2f2e-9d1c-4b7e-8a51-0123456789ab"),
     "error", "identity", "a UUID: 6f4a2f2e-"),
    ("address", profile(GOOD_TRACE % "tcp://10.1.2.3:80"), "error", "identity", "an IP address: 10.1.2.3"),
    ("mac", profile(GOOD_TRACE % "0a:1b:2c:3d:4e:5f"), "error", "identity", "a MAC address: 0a:1b"),
    ("serial", manifest(lambda m: m["machine"].update(gpu_serial="1320000000000")),
     "error", "identity", "key of identity"),
    ("broken profile", lambda f: (f / "profiles" / "moe_layer-made-up.trace.json.gz").write_bytes(b"no"),
     "error", "identity", "cannot be looked into"),
    # the folder
    ("strange file", lambda f: (f / "core.1234").write_text("x"), "warning", "size", "no part of a capture"),
    ("half-written", lambda f: (f / "capture.json.part").write_text("x"), "warning", "size", "half-written"),
    ("link", lambda f: (f / "profiles" / "x.sqlite").symlink_to("/etc/passwd"), "error", "size", "a link"),
    ("too large", lambda f: (f / "README.md").write_text("x " * 1_000_001), "warning", "size", "takes 2.13 MB"),
    # physics
    ("times / 100", times(0.01, compute_bound),
     "error", "physics", "it computes at .* H100|it computes at .* h100-sxm"),
    ("all times / 100", times(0.01), "error", "physics", "weights are read at"),
    ("compute / 3", times(1 / 3, compute_bound), "error", "physics", "more than the 1.09 PFLOP/s that the datasheet"),
    ("memory / 4", times(1 / 4, memory_bound), "error", "physics", "weights are read at .* more than the 3.42 TB/s"),
    ("too short", times(1e-4, lambda w: w["n_tokens"] == 1), "error", "physics", "less than the 400 ns of a call"),
    ("zero-copy / 4", times(1 / 4, zero_copy),
     "error", "physics", "offloaded weights come at .* more than the 65.3 GB/s"),
    ("copy / 4", times(1 / 4, offloaded("copy")), "error", "physics", "offloaded weights come at"),
    ("link x 10", calibrated("link_h2d_copy_bytes_per_s", 10), "error", "physics", "PCIe 5.0 x16|h100-sxm allows"),
    ("both ways x 2", calibrated("link_both_copy_bytes_per_s", 2),
     "error", "physics", "link_both_copy_bytes_per_s is 192"),
    ("memory x 2", calibrated("memory_stream_bytes_per_s", 2), "error", "physics", "6.06 TB/s, more than 3.42 TB/s"),
    ("GEMM x 2", calibrated("bf16_gemm_flops_per_s", 2), "error", "physics", "1.41 PFLOP/s, more than 1.09 PFLOP/s"),
    ("host x 100", calibrated("host_stream_bytes_per_s", 100), "error", "physics", "the memory of any CPU allows"),
    ("launch in s", calibrated("launch_overhead_ns", 1e-9), "error", "physics", "launch_overhead_ns is 0.00 ns"),
    ("call in ps", calibrated("call_overhead_ns", 1e6), "error", "physics", "call_overhead_ns is 9.00 s"),
    ("pageable over pinned", calibrated("link_h2d_pageable_bytes_per_s", 5),
     "warning", "physics", "passes through pinned"),
    ("contended over alone", calibrated("link_h2d_contended_bytes_per_s", 1.4),
     "warning", "physics", "host's memory is shared"),
    ("fp8 under bf16", calibrated("fp8_gemm_flops_per_s", 0.5), "warning", "physics", "bf16 takes more work than fp8"),
    ("link misread", manifest(lambda m: m["machine"].update(pcie_gen_max="3")),
     "warning", "physics", "misreads the link"),
    ("detail beyond all", lines("calibration", lambda x: x.append({**x[0], "quantity": None, "value": 1e17})),
     "error", "physics", "100 PFLOP/s, more than any machine does"),
    ("falls with tokens", times(0.3, lambda w: w["n_tokens"] == 4096 and w["access"] == "copy-overlap"), "warning",
     "physics", "4096 tokens take .* and 64 take"),
    ("layer below its GEMMs", times(0.5, lambda w: w["op"] == "moe_layer" and w["n_tokens"] == 64 and resident(w)),
     "warning", "physics", "its two grouped GEMMs alone"),
    ("offloading is free", times(0.001, offloaded("cpu", 1)),
     "warning", "physics", "experts offloaded, and .* resident"),
    ("replays counted wrongly", times(8, lambda w: w.get("launch") == "graph" and resident({**w, "launch": None})),
     "warning", "physics", "replayed it takes .* and launched by the host"),
    ("replays too short", times(0.5, lambda w: w.get("launch") == "graph" and w["access"] == "zero-copy"),
     "warning", "physics", "replayed it takes"),
    # noise
    ("throttled", manifest(lambda m: m["machine"].update(under_load={"clock_reasons": ["hardware thermal slowdown"]})),
     "warning", "noise", "slowed down under load: hardware thermal slowdown"),
    ("scatter", manifest(lambda m: m["calibration"]["call_overhead_ns"].update(spread_frac=0.3)), "warning", "noise",
     "call_overhead_ns scatters by 30.0 %"),
    ("constant", lines("observations", lambda x: [p.update(times_ns=[p["times_ns"][0]] * 5) for p in x]), "error",
     "noise", "of \\d+ long points all agree to the nanosecond"),
    ("noisy", lines("observations", lambda x: [p.update(times_ns=[*p["times_ns"], 3 * p["times_ns"][0]]) for p in x]),
     "warning", "noise", "100.0 % of the points have an error above the 2.0 %"),
    ("disturbed", manifest(lambda m: m["runs"][0].update(n_disturbed=60)), "warning", "noise", "busy during 60 of 120"),
    ("runs apart", lines("observations", lambda x: x[0].update(times_ns=[9 * t for t in x[0]["times_ns"]])), "warning",
     "noise", "a factor of 9"),
    ("drift", lines("calibration", lambda x: x[0].update(value=x[0]["value"] / 2)),
     "warning", "noise", "drifts from 350"),
    # design
    ("one run", lines("observations", lambda x: x.__delitem__(slice(120, None))),
     "warning", "design", "have a single run"),
    ("two shapes", lines("observations", lambda x: x.__delitem__(slice(88, None))), "warning", "design", "2 shapes: "),
    ("few batches", lines("observations", lambda x: x.__delitem__(slice(10, None))),
     "warning", "design", "has 1 batch size"),
]  # fmt: skip


@pytest.mark.parametrize(("_name", "do", "severity", "group", "sentence"), BREAKS, ids=[b[0] for b in BREAKS])
def test_each_break_is_found_with_its_sentence(
    folder: Path, _name: str, do: Break, severity: str, group: str, sentence: str
) -> None:
    do(folder)
    found = check_capture(folder)
    matching = [f for f in found if (f.severity, f.group) == (severity, group) and re.search(sentence, f.sentence)]
    assert matching, "\n".join(f"{f.severity} {f.group}: {f.where}: {f.sentence}" for f in found) or "nothing was found"
    assert is_sound(found) == (severity != ERROR) or any(f.severity == ERROR for f in found)


def test_a_sound_capture_has_no_finding_and_breaks_are_not_found_by_chance(folder: Path) -> None:
    assert check_capture(folder) == []
    assert verdict("gpu", []) == "gpu is sound"


@pytest.mark.parametrize("path", shipped_captures(), ids=lambda p: p.name)
def test_shipped_captures_are_sound(path: Path) -> None:
    found = check_capture(path)
    assert is_sound(found), [f for f in found if f.severity == ERROR]


@pytest.mark.parametrize("path", shipped_captures(), ids=lambda p: p.name)
def test_a_shipped_capture_with_times_of_a_hundredth_is_not(path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(path, tmp_path / path.name))
    times(0.01)(copy)
    sentences = " ".join(f.sentence for f in check_capture(copy) if f.severity == ERROR)
    for word in ("it computes at", "its weights are read at"):
        assert word in sentences


def test_findings_carry_the_value_and_the_limit_they_broke(folder: Path) -> None:
    calibrated("memory_stream_bytes_per_s", 2)(folder)
    found = next(f for f in check_capture(folder) if f.rule == "impossible rate")
    assert found.value == pytest.approx(2 * 3.0e12 * 1.01)  # the better of two runs, made up
    assert found.limit == pytest.approx(1.02 * 3350e9)  # the datasheet's, with its margin


@pytest.mark.parametrize(
    "do",
    [
        lambda f: (f / "capture.json").unlink(),
        lambda f: (f / "capture.json").write_text("[1]"),
        lambda f: (f / "capture.json").write_text('{"schema": 9}'),
        lambda f: (f / "capture.json").write_text('{"schema": 1}'),
        lambda f: (f / "capture.json").write_text('{"schema": 1, "x": NaN}'),
        lambda f: (f / "capture.json").write_bytes(b"\xff\xfe"),
        manifest(lambda m: m.update(calibration={"x": {"value": "fast"}})),
        manifest(lambda m: m.update(runs=[{"run": "first"}])),
    ],
)
def test_what_is_no_capture_is_refused_in_one_sentence(folder: Path, do: Break) -> None:
    do(folder)
    with pytest.raises(InputError) as caught:
        check_capture(folder)
    assert "\n" not in str(caught.value)


def test_odd_lines_are_findings_and_never_a_crash(folder: Path) -> None:
    """Lines that are JSON and nonsense, in every file at once."""
    odd: list[Any] = [{}, [], 1, None, {"workload": 1}, {"workload": "x" * 12, "run": 10**30, "times_ns": [1]}]
    for name in ("workloads", "observations", "calibration", "left_out"):
        file = folder / f"{name}.jsonl"
        file.write_text(file.read_text() + "".join(json.dumps(line) + "\n" for line in odd) + "{nonsense\n\n")
    found = check_capture(folder)
    damaged = [f for f in found if f.rule == "damaged line"]
    assert len(damaged) >= 4 * len(odd)
    assert {f.where.partition(",")[0] for f in damaged} == {
        "workloads.jsonl", "observations.jsonl", "calibration.jsonl", "left_out.jsonl",
    }  # fmt: skip


ODD: tuple[object, ...] = (None, -1, [], {}, 1e308)


def test_no_odd_value_of_any_field_is_more_than_a_finding_or_a_sentence(folder: Path) -> None:
    """Each field of a line in each file, and each of the manifest, replaced by each odd value in turn."""
    for name, n_kept in (("workloads", 8), ("observations", 8), ("calibration", 4), ("left_out", 1)):
        write_lines(folder, name, lines_of(folder, name)[:n_kept])
    sound = {file.name: file.read_text() for file in folder.glob("*.json*")}

    def reads_or_refuses() -> None:
        try:
            json.dumps([vars(finding) for finding in check_capture(folder)], allow_nan=False)
            capture = load_capture(folder)
            report.capture_page(summary(capture), machine_words(capture), 100)
        except InputError as error:
            assert "\n" not in str(error).rstrip()

    for name in ("workloads", "observations", "calibration", "left_out"):
        first, *others = lines_of(folder, name)
        for key in first:
            for value in ODD:
                write_lines(folder, name, [{**first, key: value}, *others])
                reads_or_refuses()
        (folder / f"{name}.jsonl").write_text(sound[f"{name}.jsonl"])
    whole = json.loads(sound["capture.json"])
    for part in (whole, whole["settings"], whole["machine"], whole["calibration"], whole["runs"][0]):
        for key in list(part):
            before = part[key]
            for value in ODD:
                part[key] = value
                (folder / "capture.json").write_text(json.dumps(whole))
                reads_or_refuses()
            part[key] = before


def test_a_layer_of_nothing_is_found_and_read_on(folder: Path) -> None:
    nothing = {"n_experts": 0, "top_k": 0, "tokens_per_expert": [], "hidden": 0, "n_tokens": 0}
    workload(resident, **nothing)(folder)
    assert any("not those of a layer" in f.sentence for f in check_capture(folder))
    with pytest.raises(InputError, match="breaks tokens x top-k"):
        load_capture(folder)


@pytest.mark.parametrize(
    "words",
    [
        '{"cublas": "13.1.0.3", "cudnn_version": "9.10.2.21", "driver": "580.82.07"}',
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl<int>>(int, char*)",
        '"Input Dims": [[4, 8], [8, 2]], "ts": 4617081588784.877, "trace_id": "8D53A765176A4F68BBEB19E68EE3DF3C"',
        "read /proc/meminfo and /sys/devices/system/node, bytes/s, moe_layer-olmoe/4, 1/2/3, http status 4/5/6",
        "listens on 127.0.0.1 or 0.0.0.0", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
        "memcpy@GLIBC_2.14", '{"root": 1, "share of root": 2}', "12:34:56", "https://example.org/path/of/page",
    ],
)  # fmt: skip
def test_innocent_words_give_nobody_away(words: str) -> None:
    assert list(identity_in(words, ["root", "vm"])) == []


def test_names_are_found_where_they_stand_for_themselves() -> None:
    assert [kind for _, kind, _ in identity_in('{"node": "vm"}', ["vm"])] == ["the name of this machine or user"]
    assert [kind for _, kind, _ in identity_in("on gpu-box-7.lab", ["gpu-box-7"])] == [
        "the name of this machine or user"
    ]
    assert list(identity_in("on gpu-box-71", ["gpu-box-7"])) == []
    assert [kind for _, kind, _ in identity_in(r'"a":"\/data\/bob\/x"', [])] == ["an absolute path"]
    assert [s for s, _, _ in identity_in('"/usr/lib/libcuda.so"', [])] == ["warning"]
    for words, severities in (
        ("at 10.1.2.3, 172.31.0.9", ["error", "error"]), ("http://52.1.2.3:80/", ["error"]),
        ("172.32.0.9", ["warning"]), ("12.8.3.14", ["warning"]), ("1.2.3.4.5", []), ("1.2.3.256", []),
    ):  # fmt: skip
        assert [s for s, _, _ in identity_in(words, [])] == severities, words


def test_an_sqlite_profile_is_looked_into(folder: Path) -> None:
    (folder / "profiles" / "made-up.sqlite").write_bytes(
        b"SQLite\0CUPTI_ACTIVITY_KIND_KERNEL perfmodel::x\0/data/bob/x\0"
    )
    assert [f.sentence for f in check_capture(folder)] == ["an absolute path: /data/bob/x"]


@pytest.mark.parametrize(
    ("machine", "gigabytes_per_s"),
    [
        ({"pcie_gen_max": "5", "pcie_width_max": "16"}, 63.0),
        ({"pcie_gen_max": 4, "pcie_width_max": 8, "pcie_max_transfers_per_s": 32e9, "pcie_max_lanes": 16}, 15.75),
        ({"pcie_gen_max": None, "pcie_max_transfers_per_s": 32e9, "pcie_max_lanes": 16}, 63.0),
        ({"link_kind": "nvlink-c2c", "pcie_gen_max": 5, "pcie_width_max": 16}, 450.0),
        ({"c2c_n_links": 10}, 450.0),
        ({"link_kind": "nvlink-c2c", "link_nominal_bytes_per_s": 900e9}, 900.0),
        ({"link_kind": "pcie", "c2c_n_links": None, "pcie_gen_max": "5"}, None),
        ({"pcie_gen_max": "[N/A]", "pcie_width_max": "16"}, None),
        ({"pcie_gen_max": "9", "pcie_width_max": "16"}, None),
        ({"pcie_gen_max": True, "pcie_width_max": "16"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_links_rate_is_that_of_its_generation_and_width(machine: Json, gigabytes_per_s: float | None) -> None:
    link = manifest_link(machine)
    assert (None if link is None else link.value) == (
        None if gigabytes_per_s is None else pytest.approx(1.02 * gigabytes_per_s * 1e9, rel=1e-3)
    )


def test_bytes_and_errors_by_hand() -> None:
    from perfmodel.capture_lines import WorkloadLine

    w = WorkloadLine(
        "x", "moe_layer", "s", 4, 2, 10, 20, 3, None, None, "bf16", "cuda", 3, "uniform", [3, 0, 2, 1], "copy", 0.5,
        offloaded=[0, 1],
    )  # fmt: skip
    assert expert_weights(w) == 3 * 10 * 20
    assert active_bytes(w) == (2 * 600 * 2, 1 * 600 * 2)  # experts 2 and 3 here, expert 0 there; 1 is idle
    assert error_frac([10, 20, 30]) == pytest.approx(1.2533**2 * (20 / 3) / 3**0.5 / 20)
    assert error_frac([7, 9, 12, 5]) == pytest.approx(median_error_frac([7.0, 9.0, 12.0, 5.0]))


def test_the_library_and_the_collectors_agree_on_ids_and_words(made: Path) -> None:
    from collectors import plan, store
    from perfmodel import capture_lines

    if importlib.util.find_spec("collectors.workloads"):
        workloads = importlib.import_module("collectors.workloads")
    else:
        workloads = plan
    for line in lines_of(made, "workloads"):
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in line.items() if k not in ("workload", "study")}
        assert workloads.Workload(**fields).id == line["workload"] == content_id(line)
    assert (ACCESS, RESIDENCIES, ORDERS) == (workloads.ACCESS_MODES, workloads.RESIDENCIES, workloads.ORDERS)
    assert capture_lines.DTYPES == plan.DTYPES
    names = ("CAPTURE", "WORKLOADS", "OBSERVATIONS", "PROFILES", "CALIBRATION", "LEFT_OUT", "SCHEMA")
    ours = ("MANIFEST", "WORKLOADS", "OBSERVATIONS_FILE", "PROFILES", "CALIBRATION", "LEFT_OUT", "SCHEMA")
    for theirs, our in zip(names, ours, strict=True):
        assert getattr(store, theirs) == getattr(capture_lines, our)


def test_a_campaign_that_ran_out_of_time_is_sound(folder: Path) -> None:
    """The first run left ten points to do, the second repeats the others, and one workload failed for good."""
    planned = [line["workload"] for line in lines_of(folder, "workloads")]
    todo, failed = set(planned[-10:]), planned[0]
    lines("observations", lambda x: x.__setitem__(slice(None), [p for p in x if p["workload"] not in {*todo, failed}]))(
        folder
    )
    lines("left_out", lambda x: x.append({"workload": failed, "run": 0, "reason": "no memory", "started": 1}))(folder)
    lines("left_out", lambda x: x.append({"profile": "a.trace.json.gz", "reason": "no kernel", "started": 1}))(folder)
    manifest(lambda m: m["settings"].update(minutes=8.0, kind="campaign"))(folder)
    manifest(lambda m: m["runs"][0].update(n_todo=10, n_left_out=1))(folder)
    assert check_capture(folder) == []
    manifest(lambda m: m["runs"][0].update(n_todo=9, n_left_out=0))(folder)
    assert [f.sentence for f in check_capture(folder)] == [
        "run 0 lacks 10 points of 120, and says that 9 were left out or left to do"
    ]


def test_a_stream_of_the_manifest_may_be_a_copy_or_a_triad(folder: Path) -> None:
    lines(
        "calibration", lambda x: [p.update(quantity="memory_triad_bytes_per_s") for p in x if "memory" in p["quantity"]]
    )(folder)
    line = {"probe": "read", "params": {}, "run": 0, "quantity": "memory_stream_bytes_per_s", "value": 2.5e12}
    lines("calibration", lambda x: x.append(line | {"unit": "bytes_per_s", "how": ""}))(folder)
    assert check_capture(folder) == []


def test_an_offloaded_call_without_a_twin_launched_like_it_is_held_against_the_replayed_one(folder: Path) -> None:
    planned = lines_of(folder, "workloads")
    launched = {w["workload"] for w in planned if resident(w) and w["op"] == "moe_layer"}
    lines("observations", lambda x: x.__setitem__(slice(None), [p for p in x if p["workload"] not in launched]))(folder)
    times(0.001, offloaded("cpu", 1))(folder)
    assert any(f.rule == "offloading is free" for f in check_capture(folder))


def test_the_summary_counts_what_is_there(made: Path) -> None:
    capture = load_capture(made)
    table = studies(capture)
    assert table["n_points"].sum() == capture.observations.height == 240
    assert table["n_workloads"].sum() == 120
    assert set(table["n_runs"]) == {GPU_RUNS}
    graphs = table.filter(launch="graph", access="resident", dtype="bf16").to_dicts()[0]
    assert (graphs["n_workloads"], graphs["n_shapes"], graphs["least_tokens"], graphs["most_tokens"]) == (9, 3, 1, 4096)
    found = summary(capture)
    assert found["left_out"] == [{"reason": "the machine is not coherent", "n": 1, "example": "system read"}]
    assert found["n_calibration_lines"] == 32
    json.dumps(found, allow_nan=False)
