"""The Placement view: what it shows is what the commands say, what is uploaded is read safely, edits are priced."""

import json
import shlex
import struct
import zipfile
from io import BytesIO
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.placement.files import read_placement
from tests.app_pages import figure, numbers, on_path, opened, ran, shown, titles
from tests.test_placing_cli import CONFIG

OLMOE = {"shape": "olmoe", "routing": "layered", "batch": "64", "op": "moe-layer"}


def command_of(test: Any, name: str) -> list[str]:
    """The words of a command that the view says gives the same numbers, `--json` added."""
    line = next(line for line in shown(test).split("\n") if line.startswith(f"perfmodel {name} "))
    return [*shlex.split(line)[1:], "--json"]


def printed(words: list[str]) -> Any:
    return json.loads(CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False).stdout)


def test_it_opens_with_the_first_point_of_the_gh200_study_and_its_policies() -> None:
    test = opened("placement")
    assert numbers(test) == {
        "Slowdown": "1.49x",
        "Latency of a layer": "2.28 ms",
        "GPU memory freed": "252 MB",
        "Free with copy-overlap": "42 of 64",
    }
    assert titles(test) == [
        "Slowdown against offloaded fraction",
        "What the time consists of",
        "Policies on steps they have not seen",
    ]
    published = next(line for line in figure(test, 0)["data"] if "poster" in line.get("name", ""))
    assert (published["x"], published["y"]) == ([0.3125], [1.5])


def test_the_commands_that_it_names_give_the_numbers_that_it_shows() -> None:
    test = opened("placement")
    found = printed(command_of(test, "predict"))
    assert f"{found['slowdown']:.2f}x" == numbers(test)["Slowdown"]
    placed = printed(command_of(test, "place"))
    best = next(row for row in test.dataframe[0].value.to_dict("records") if "(taken)" in row["policy"])
    assert best["slowdown"] == f"{placed['best']['slowdown']:.3f}x"


@pytest.mark.parametrize(
    ("tab", "more"),
    [
        ("Memory", ["GPU memory against slowdown"]),
        ("Routing", ["How often each expert is used", "How concentrated routing is"]),
        ("Edit & export", []),
    ],
)
def test_each_tab_opens_from_a_link(tab: str, more: list[str]) -> None:
    assert titles(opened("placement", tab=tab))[2:] == more


def test_a_link_with_gib_and_a_mix_of_passes_is_answered_on_a_click_and_marked_when_the_question_changes() -> None:
    test = opened("placement", **OLMOE | {"batch": "200x64,1x4096", "unit": "GiB", "gib": "12", "routing": "uniform"})
    assert 0 < float(numbers(test)["Slowdown"].removesuffix("x")) < 20
    next(button for button in test.button if "Compare" in button.label).click()
    ran(test)
    assert "Policies on steps they have not seen" in titles(test)
    test.number_input(key="gib").set_value(11.0)
    ran(test)
    assert any("changed since" in warning.value for warning in test.warning)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"batch": "many"}, "expected a whole number"),
        ({"batch": "3x"}, "expected passes x tokens"),
        ({"batch": "1,2,3,4,5,6,7,8,9"}, "9 sizes of a pass, expected at most 8"),
        ({"routing": "power-law", "argument": "<b>"}, "<b>"),
        ({"shape": "deepseek-v3", "unit": "GiB", "gib": "1"}, "GB"),
    ],
)
def test_what_cannot_be_is_refused_in_words(query: dict[str, str], message: str) -> None:
    test = opened("placement", **query)
    assert len(test.error) == 1
    assert message in shown(test)


def npz(counts: np.ndarray) -> bytes:
    file = BytesIO()
    np.savez(file, counts=counts)
    return file.getvalue()


def test_an_uploaded_model_and_its_routing_are_predicted_and_placed() -> None:
    test = opened("placement", tab="Routing", op="moe-layer", batch="64")
    test.file_uploader(key="config-upload").upload(
        "my #1 <model>.json", json.dumps(CONFIG).encode(), "application/json"
    )
    counts = np.random.default_rng(0).integers(1, 50, (6, 4, 8))
    test.file_uploader(key="routing-upload").upload("r#1@2.npz", npz(counts), "application/zip")
    ran(test)
    assert not test.error
    cells = np.array(figure(test, 2)["data"][0]["text"])
    assert cells.shape == (4, 8)
    assert "of 8" in str(numbers(test))
    assert "config.json" in shown(test) and "perfmodel-" not in shown(test)


def test_an_uploaded_model_of_too_many_experts_is_refused_before_anything_is_drawn() -> None:
    test = opened("placement")
    config = json.dumps(CONFIG | {"num_hidden_layers": 10**6, "num_experts": 10**6}).encode()
    test.file_uploader(key="config-upload").upload("config.json", config, "application/json")
    ran(test)
    assert "1,000,000 layers of 1,000,000 experts, expected at most 200,000" in shown(test)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1" + bytes(50) + b"PAR1", "Parquet"),
        (b"\xef\xbb\xbf  PAR1" + bytes(50), "Parquet"),
        (b"PK\x03\x04" + bytes(50), "damaged archive"),
        (npz(np.ones((1, 4, 9))), "found experts 9, expected 64"),
        (b"hello", "routing.csv has no rows"),
    ],
)
def test_an_upload_that_is_no_routing_is_refused_in_words(content: bytes, message: str) -> None:
    test = opened("placement", tab="Routing")
    test.file_uploader(key="routing-upload").upload("routing.csv", content, "text/csv")
    ran(test)
    assert message in shown(test) and len(test.error) == 1


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_unpacked() -> None:
    with on_path():
        import placement_controls as controls
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("counts.npy", b"")
    content = file.getvalue()
    at = content.index(b"PK\x01\x02") + 24  # of the directory entry: the size that it unpacks to
    huge = content[:at] + struct.pack("<I", 2**31 + 2**30) + content[at + 4 :]
    with pytest.raises(InputError, match=r"unpacks to 3\.0 GiB"):
        controls.refuse_bomb("counts.npz", huge)
    controls.refuse_bomb("counts.npz", content)


def test_a_placement_from_a_file_is_priced_against_the_one_before_and_one_too_many_is_refused() -> None:
    test = opened("placement", **OLMOE | {"tab": "Edit & export", "access": "zero-copy"})
    before = numbers(test)
    assert before["Before"] == before["After"]
    content = "layer,expert,tier\n" + "".join(f"0,{expert},resident\n" for expert in range(64))
    test.file_uploader(key="placement-upload").upload("p.csv", content.encode(), "text/csv")
    ran(test)
    ran(test)
    assert "resident" in shown(test) and "of GPU memory more" in shown(test)
    assert any("does not fit" in error.value for error in test.error)


@pytest.mark.browser
def test_a_proposed_placement_is_predicted_edited_and_exported(page, server, tmp_path) -> None:
    page.set_viewport_size({"width": 1280, "height": 1900})
    page.goto(f"{server}/placement?shape=olmoe&routing=layered&batch=64&op=moe-layer&tab=Edit+%26+export")
    page.get_by_role("button", name="Placement JSON").wait_for(timeout=60_000)
    metrics = page.get_by_test_id("stMetricValue")
    slowdown = metrics.nth(0).inner_text()
    assert slowdown.endswith("x") and metrics.nth(4).inner_text() == metrics.nth(5).inner_text()

    cell = page.get_by_test_id("glide-cell-2-0")
    first = cell.inner_text()
    to = "in-place" if first == "resident" else "resident"
    box = page.get_by_test_id("stDataFrame").locator("canvas").first.bounding_box()
    field = page.get_by_test_id("portal").locator("input")
    for _ in range(5):
        page.mouse.dblclick(box["x"] + box["width"] - 60, box["y"] + 35 + 17)
        try:
            field.first.wait_for(timeout=2_000)
            break
        except Exception:  # the canvas may not have been ready
            continue
    field.first.fill(to)
    page.keyboard.press("Enter")
    page.get_by_text("layer 0: expert 0").wait_for(timeout=20_000)
    assert metrics.nth(4).inner_text() != "" and page.get_by_test_id("stException").count() == 0

    page.get_by_test_id("stStatusWidget").wait_for(state="hidden", timeout=60_000)  # a rerun may take a click along
    with page.expect_download(timeout=60_000) as event:
        page.get_by_role("button", name="Placement JSON").click()
    event.value.save_as(tmp_path / "placement.json")
    placed = read_placement(tmp_path / "placement.json")
    assert (placed.shape.name, len(placed.layers), placed.placement.policy) == ("olmoe", 16, "edited")
    assert bool(placed.resident[0, 0]) == (to == "resident")

    with page.expect_download(timeout=60_000) as event:
        page.get_by_role("button", name="Export for the engine").click()
    event.value.save_as(tmp_path / "map.json")
    assert event.value.suggested_filename == "placement.sglang.json"
    rows = json.loads((tmp_path / "map.json").read_text())["physical_to_logical_map"]
    assert [sorted(row) for row in rows] == [list(range(64))] * 16


@pytest.mark.browser
def test_what_is_shown_can_be_downloaded_as_table_record_and_report(page, server, tmp_path) -> None:
    page.goto(f"{server}/placement")
    for suffix in ("csv", "json", "html"):
        with page.expect_download(timeout=60_000) as event:
            page.get_by_role("button", name=f"Download {suffix.upper()}").click()
        event.value.save_as(tmp_path / f"placement.{suffix}")
    table = pl.read_csv(tmp_path / "placement.csv")
    assert set(table["line"]) == {"zero-copy", "copy", "copy-overlap", "cpu", "paged"}
    record = json.loads((tmp_path / "placement.json").read_text())
    assert f"{record['prediction']['slowdown']:.2f}" == "1.49" and record["placing"]["best"]["policy"] == "optimal"
    assert (tmp_path / "placement.html").read_text().count('<figure role="img"') == 6


@pytest.mark.browser
def test_an_uploaded_model_is_still_there_after_another_view_until_it_is_removed(page, server) -> None:
    config = {
        **{"model_type": "qwen3_moe", "hidden_size": 1536, "num_hidden_layers": 20, "num_experts": 48},
        **{"num_experts_per_tok": 4, "moe_intermediate_size": 640, "intermediate_size": 4096, "vocab_size": 64000},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 96, "torch_dtype": "bfloat16"},
    }
    page.goto(f"{server}/placement")
    page.get_by_text("Your own model or routing").click()
    made = {"name": "config_made.json", "mimeType": "application/json", "buffer": json.dumps(config).encode()}
    page.locator("[data-testid=stSidebar] input[type=file]").first.set_input_files(made)
    experts = page.get_by_text("of 48", exact=False).first
    experts.wait_for(timeout=30_000)
    page.get_by_role("link", name="Overview", exact=True).click()
    page.get_by_text("Measurements", exact=True).wait_for(timeout=30_000)
    page.get_by_role("link", name="Placement", exact=True).click()
    experts.wait_for(timeout=30_000)
    page.get_by_text("Your own model or routing").click()
    page.get_by_role("button", name="Remove").click()
    page.get_by_text("of 64", exact=False).first.wait_for(timeout=30_000)
