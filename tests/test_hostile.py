"""Files made to hurt: they are refused in one sentence before memory is gone, and nothing in them runs in a browser."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perfmodel.classify import kernel_class
from perfmodel.errors import InputError, TooLargeError
from perfmodel.matmuls import matmuls
from perfmodel.perfetto import export_perfetto
from perfmodel.readers import document as document_reader
from perfmodel.readers import read_trace
from perfmodel.readers.kineto import read_kineto
from perfmodel.readers.limits import Limits, limits_from
from perfmodel.readers.unpack import zstd
from perfmodel.trace import Trace
from tests.captures_made import write_synthetic_capture
from tests.served import until
from tests.traces_made import events

LIMITS = Limits(unpacked_bytes=2**20, n_events=1000, seconds=60)
KERNEL = '{"ph":"X","cat":"kernel","name":"k","ts":1,"dur":1,"pid":0,"tid":7,"args":{"device":0,"stream":7}}'
PWN = "<img src=http://192.0.2.1/i.png onerror='window.__pwned=1'><script>window.__pwned=1</script>"
LINK = "[x](javascript:window.__pwned=1) ![i](http://192.0.2.1/m.png) <a href='http://192.0.2.1/'>a</a>"


def zipped(content: bytes, method: int = zipfile.ZIP_DEFLATED, name: str = "trace.json") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def document(*events: str) -> bytes:
    return b'{"traceEvents":[' + ",".join(events).encode() + b"]}"


def bomb(n_bytes: int) -> bytes:
    return document(KERNEL)[:-2] + b" " * n_bytes + b"]}"


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "Zstandard": zstd.compress,
    "zip": zipped,
    "zip with bzip2": lambda content: zipped(content, zipfile.ZIP_BZIP2),
    "zip with LZMA": lambda content: zipped(content, zipfile.ZIP_LZMA),
    "gzip in zip": lambda content: zipped(gzip.compress(content)),
    "nothing": lambda content: content,
}


@pytest.mark.parametrize("packing", PACKED)
def test_content_beyond_the_limit_is_refused_and_at_the_limit_read(tmp_path: Path, packing: str) -> None:
    path = tmp_path / "trace"
    path.write_bytes(PACKED[packing](bomb(2**20)))
    with pytest.raises(TooLargeError, match=r"more than 1.05 MB.*perfmodel analyze FILE"):
        read_trace(path, limits=LIMITS)
    assert read_trace(path).n_events == 1
    content = bomb(0)
    path.write_bytes(PACKED[packing](bomb(2**20 - len(content) - 1)))
    assert read_trace(path, limits=LIMITS).n_events == 1


def test_the_ratio_counts_only_beyond_what_fits_in_memory() -> None:
    assert Limits(unpacked_ratio=100).of_content(1000)[0] == 2**28
    assert Limits(unpacked_ratio=100).of_content(2**24) == (100 * 2**24, "more than 100 times its own size")
    assert Limits().of_content(2**30)[0] == 4 * 2**30


def test_events_beyond_the_limit_are_refused_and_at_the_limit_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(document(*[KERNEL] * 1000))
    assert read_trace(path, limits=LIMITS).n_events == 1000
    path.write_bytes(document(*[KERNEL] * 1001))
    with pytest.raises(TooLargeError, match="more than 1,000 events"):
        read_trace(path, limits=LIMITS)


def test_the_ranks_of_a_folder_count_together_and_none_is_left_out_for_its_size(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"rank-{rank}.json").write_bytes(document(*[KERNEL] * 400))
    with pytest.raises(TooLargeError, match="more than 1,000 events"):
        read_trace(tmp_path, limits=LIMITS)
    (tmp_path / "rank-2.json").write_bytes(bomb(2**20))
    with pytest.raises(TooLargeError, match=r"more than 1\.05 MB"):
        read_trace(tmp_path, limits=LIMITS)
    (tmp_path / "rank-2.json").unlink()
    assert read_trace(tmp_path, limits=LIMITS).n_events == 800


def test_mending_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(document(*['{"ph":x}'] * 300_000))
    with pytest.raises(TooLargeError, match="more than 1 s"):
        read_trace(path, limits=Limits(seconds=1))


def test_ten_million_empty_events_are_refused_while_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(b'{"traceEvents":[' + b"{}," * 10_000_001 + b"{}]}", 1))
    with pytest.raises(TooLargeError, match="more than 1,000,000 events"):
        read_trace(path, limits=Limits(n_events=1_000_000))


@pytest.mark.parametrize(
    "content",
    [
        b'{"traceEvents":[' + b" " * 150_000_000,
        b'{"x":[' + b'{"traceEvents":[]},' * 200_000 + b"1]}",
        b'{"traceEvents":[{"args":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        b'{"a":' * 100_000,
        b"[" * 100_000,
    ],
    ids=["blanks", "false keys", "deep arguments", "deep objects", "deep arrays"],
)
def test_documents_that_would_take_all_time_or_memory_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_trace(path, limits=Limits())


def test_every_key_that_might_open_the_events_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    is_head = document_reader._is_head
    monkeypatch.setattr(document_reader, "_is_head", lambda head: tried.append(len(head)) or is_head(head))
    content = b'{"x":[' + b'{"traceEvents":[]},' * 2000 + b"1]}"
    with pytest.raises(InputError, match="JSON with x"):
        read_kineto(io.BufferedReader(io.BytesIO(content)), block_bytes=64)  # type: ignore[arg-type]
    assert tried == sorted(set(tried))
    assert len(tried) == document_reader._MAX_KEYS


def test_names_without_end_take_no_longer_than_their_beginning() -> None:
    began = time.monotonic()
    assert kernel_class("cutlass::Kernel<" * 300_000 + "::reduction") == kernel_class("cutlass::Kernel<" * 512)
    assert time.monotonic() - began < 2


def test_products_inside_each_other_without_end_take_seconds() -> None:
    n = 40_000
    operands = json.dumps([[[4, 8], [8, 2]], ["float", "float"]])
    nested = [
        {"kind": "op", "name": "aten::mm", "start_ns": i, "dur_ns": 2 * (n - i), "inputs": operands} for i in range(n)
    ]
    began = time.monotonic()
    found = matmuls(Trace(events(*nested), "kineto", n))
    assert found.height == 1
    assert time.monotonic() - began < 5  # turn by turn it takes a minute


def test_copies_faster_than_any_counter_are_drawn_without_a_rate(tmp_path: Path) -> None:
    copies = [
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": i, "dur": 5, "pid": 0, "tid": 1}
        | {"args": {"device": 0, "stream": 1, "bytes": size}}
        for i, size in ((0, 10**18), (100, 10**6))
    ]
    (tmp_path / "a.json").write_text(json.dumps({"traceEvents": copies}))
    export_perfetto(read_trace(tmp_path / "a.json"), tmp_path / "out.json.gz")
    assert gzip.decompress((tmp_path / "out.json.gz").read_bytes()).count(b"bytes per second") >= 2


def test_a_zip_archive_may_not_list_files_without_end(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i}{'x' * 40}/", b"")
    path = tmp_path / "many.zip"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="cannot be unpacked"):
        read_trace(path)


def test_what_headers_claim_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    packed = gzip.compress(bomb(1000))
    path.write_bytes(packed[:-4] + struct.pack("<I", 2**32 - 1))  # the length at the end of gzip
    with pytest.raises(InputError, match="damaged"):
        read_trace(path, limits=LIMITS)
    archive = bytearray(zipped(bomb(2**21)))
    at = archive.rfind(b"PK\x01\x02")
    archive[at + 24 : at + 28] = struct.pack("<I", 100)  # the unpacked size, in the list of files
    path.write_bytes(archive)
    with pytest.raises(InputError):
        read_trace(path, limits=LIMITS)


def database(path: Path, *statements: str) -> Path:
    with sqlite3.connect(path) as made:
        for statement in statements:
            made.execute(statement)
    made.close()
    return path


TABLE = (
    "CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start, end, deviceId, streamId, correlationId, globalPid, shortName{})"
)
ROW = "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (1, 2, 0, 7, 1, 0, 1)"
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x start, x + 1 end, 0 deviceId FROM n"


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        ([f"CREATE VIEW CUPTI_ACTIVITY_KIND_KERNEL AS {ENDLESS}", "CREATE TABLE t (x)"], "without CUDA activity"),
        ([TABLE.format(", text NOT NULL AS (hex(zeroblob(9000000)))"), ROW], "computed"),
        ([TABLE.format(", CHECK (length(hex(zeroblob(9000000))) > 1)"), ROW], "computed"),
        (
            [TABLE.format(""), ROW, f"ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL ADD text DEFAULT '{'x' * 9999}'"],
            "computed",
        ),
        ([TABLE.format(""), *[ROW] * 1001], "more than 1,000 events"),
    ],
    ids=["endless view", "computed column", "check", "long default", "rows"],
)
def test_a_database_may_not_compute_nor_hold_too_many_rows(tmp_path: Path, statements: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_trace(database(tmp_path / "made.sqlite", *statements), limits=LIMITS)


def test_a_damaged_database_is_refused(tmp_path: Path) -> None:
    path = database(tmp_path / "made.sqlite", TABLE.format(""), *[ROW] * 200)
    whole = bytearray(path.read_bytes())
    for at, lie in ((28, struct.pack(">I", 2**31)), (16, b"\0\3"), (100, b"\xff" * 8)):  # pages, page size, first page
        path.write_bytes(whole[:at] + lie + whole[at + len(lie) :])
        with pytest.raises(InputError):
            read_trace(path, limits=LIMITS)
    path.write_bytes(whole)
    assert read_trace(path, limits=LIMITS).n_events == 200


def test_within_limits_nothing_reaches_parquet_or_another_program(tmp_path: Path) -> None:
    (tmp_path / "StringIds.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="folder of Parquet files, which is not read here"):
        read_trace(tmp_path, limits=LIMITS)
    report = tmp_path / "made.nsys-rep"
    report.write_bytes(b"report")
    with pytest.raises(InputError, match="report, which is not read here"):
        read_trace(report, limits=LIMITS)


def test_limits_come_from_the_environment() -> None:
    assert limits_from({}) == Limits()
    limits = limits_from({"PERFMODEL_MAX_EVENTS": "5", "PERFMODEL_MAX_UNPACKED_RATIO": "7"})
    assert (limits.n_events, limits.unpacked_ratio, limits.unpacked_bytes) == (5, 7, Limits().unpacked_bytes)
    for words in ("0", "-1", "4 GiB", "1e9"):
        with pytest.raises(InputError, match="PERFMODEL_MAX_EVENTS"):
            limits_from({"PERFMODEL_MAX_EVENTS": words})


def hostile_names() -> bytes:
    """A trace whose every name is a script, an image and a link."""

    def event(cat: str, name: str, ts: int, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": 5, "args": args}

    events = [
        event("cpu_op", f"op {PWN} {LINK}", 0, **{"External id": 1, "Input Dims": [[PWN]], "Input type": [PWN]}),
        event("user_annotation", f"ProfilerStep#1 {PWN}{LINK}", 0),
        event("cuda_runtime", f"cudaLaunchKernel{PWN}", 1, correlation=1, **{"External id": 1}),
        event("kernel", f"gemm {LINK} {PWN}", 10, correlation=1, device=0, stream=7, **{"External id": 1}),
        event("kernel", "huge", 20, correlation=2, device=0, stream=7) | {"dur": 2**63},
        event("kernel", "back", 30, correlation=3, device=0, stream=8) | {"dur": -5},
        event("gpu_memcpy", f"Memcpy HtoD {PWN}", 40, device=0, stream=PWN, bytes=10),
    ]
    rest = {"deviceProperties": [{"name": PWN, "id": 0}], "distributedInfo": {"backend": PWN, "rank": 0}, PWN: LINK}
    return json.dumps({"traceEvents": events, **rest}).encode()


def damaged_database(tmp_path: Path) -> bytes:
    whole = database(tmp_path / "damaged.sqlite", TABLE.format(""), ROW).read_bytes()
    return whole[:28] + struct.pack(">I", 2**31) + whole[32:]


def uploaded(page: Any, *files: tuple[str, bytes]) -> None:
    """Upload files through the box of a view, and wait until they were read or refused."""
    page.get_by_role("button", name="Upload traces").click()
    made = [{"name": name, "mimeType": "application/json", "buffer": content} for name, content in files]
    box = page.locator("input[type=file]").first
    box.wait_for(state="attached")
    box.set_input_files(made)
    box.wait_for(state="detached", timeout=90_000)  # the box is gone when all were read
    until(page, "!document.querySelector('[data-testid=stStatusWidget]')")


@pytest.mark.browser
def test_hostile_files_hurt_neither_browser_nor_server(page: Any, server: str, tmp_path: Path) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(f"{server}/trace")
    uploaded(
        page,
        ("bomb_made.json.gz", gzip.compress(bomb(150_000_000), 1)),
        ("bomb_made.zip", zipped(bomb(150_000_000))),
        ("nested_made.zip", zipped(zipped(zipped(document(KERNEL))))),
        ("deep_made.json", b'{"traceEvents":[{"args":' + b"[" * 100_000),
        ("lying_made.gz", gzip.compress(document(KERNEL))[:-4] + b"\xff\xff\xff\xff"),
        ("damaged_made.sqlite", damaged_database(tmp_path)),
        ("columns_made.parquet", b"PAR1 made up PAR1"),
    )
    words = page.locator("[data-testid=stMain]").inner_text()
    assert page.get_by_text("This cannot be read as a trace:").count() == 7
    for said in ("bytes of blanks", "zip archive inside a packed", "Parquet file", "damaged"):
        assert said in words
    assert "/tmp" not in words
    uploaded(page, (f"{PWN}.json", hostile_names()), ("../../../../etc/passwd_made.json", document(KERNEL)))
    page.get_by_text("Remove", exact=True).nth(1).wait_for()
    for view in ("Overview", "Roofline", "Trace"):  # within the session, so that the traces stay open
        page.get_by_role("link", name=view, exact=True).click()
        page.wait_for_timeout(1500)
    assert page.get_by_text("Remove", exact=True).count() == 2
    assert page.get_by_test_id("stException").count() == 0
    assert page.evaluate("window.__pwned") is None
    assert not page.locator("a[href^='javascript'], a[href*='192.0.2.1'], img[src*='192.0.2.1']").count()
    assert not dialogs


def with_hostile_names(folder: Path) -> Path:
    """A capture whose every name is a script, a link or a sign that Markdown knows."""
    words = f"{PWN} {LINK} :smile: $x^2$ :red[x] \u202e https://192.0.2.1/a"
    manifest = json.loads((folder / "capture.json").read_text())
    for facts in (manifest["machine"], manifest["software"]):
        facts[words] = words + folder.name
    (folder / "capture.json").write_text(json.dumps(manifest | {"kernel": words}))
    for name in ("workloads.jsonl", "observations.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in rows:
            row.update({key: words + row[key] for key in ("workload", "shape", "routing") if key in row})
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.mark.browser
def test_names_in_captures_are_shown_letter_by_letter(page: Any, server: str, tmp_path: Path) -> None:
    from tests.test_app_regression import choose

    page.goto(f"{server}/regression?model=none")
    page.get_by_test_id("stPlotlyChart").first.wait_for(timeout=60_000)
    page.get_by_role("button", name="Upload").first.click()
    box = page.get_by_test_id("stFileUploader").locator("input[type=file]").nth(1)
    packed = []
    for name, noise in (("before", 1.0), ("after", 1.4)):
        folder = with_hostile_names(write_synthetic_capture(tmp_path / name, noise=lambda noise=noise: noise))
        content, long = io.BytesIO(), f"{name}{PWN.replace('/', '_')}"
        with zipfile.ZipFile(content, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, f"{long}/{file.name}")
        packed.append({"name": f"{name}.zip", "mimeType": "application/zip", "buffer": content.getvalue()})
    box.set_input_files(packed)
    page.get_by_test_id("stPopoverBody").get_by_role("button", name="Remove").nth(1).wait_for(timeout=30_000)
    page.keyboard.press("Escape")
    choose(page, "Baseline", "uploaded: before")
    page.get_by_text("These two are not compared").wait_for()
    choose(page, "Candidate", "uploaded: after")
    page.get_by_role("button", name="Declare what differs").click()
    page.get_by_test_id("stAlertContentError").get_by_text("Slower than the baseline").wait_for(timeout=30_000)
    plot = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    page.mouse.move(plot["x"] + plot["width"] / 2, plot["y"] + plot["height"] / 2)  # hover words have names too
    page.get_by_text("What changed", exact=True).wait_for()
    assert page.evaluate("window.__pwned") is None
    assert not page.locator("a[href^='javascript'], a[href*='192.0.2.1'], img[src*='192.0.2.1'], .katex").count()
    assert page.get_by_test_id("stException").count() == 0
