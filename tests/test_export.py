"""Placement files and what engines read of a placement."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.placement import TIERS, Placement
from perfmodel.placement.export import (
    DEVICE_FORMATS,
    FORMATS,
    DeviceMap,
    PlacedModel,
    device_map,
    export,
    rounding,
    write,
)
from perfmodel.placement.export.devices import local_slots
from perfmodel.placement.export.llama_cpp import llama_cpp, n_cpu_moe
from perfmodel.placement.files import placement_json, read_placement, write_placement

# Experts of 3 x 4 x 8 bf16 weights, 192 bytes, in layers 1 and 3 of a model of five layers.
SMALL = MoEShape("made-up", n_experts=4, top_k=2, hidden=4, inter=8, n_layers=2)


def placed(tier: list[list[int]]) -> PlacedModel:
    """Every other layer of a model holds experts: 1, 3 ... of one layer more than twice as many."""
    layers = tuple(range(1, 2 * len(tier), 2))
    return PlacedModel(Placement("made-up", np.array(tier, dtype=np.int8)), SMALL, layers, 2 * len(tier) + 1)


def array_in(content: bytes) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.load(io.BytesIO(content), allow_pickle=False)
    return found


@st.composite
def placements(draw: st.DrawFn) -> PlacedModel:
    n_layers, n_experts = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    cells = st.lists(st.integers(0, len(TIERS) - 1), min_size=n_layers * n_experts, max_size=n_layers * n_experts)
    places = sorted(draw(st.sets(st.integers(0, 120), min_size=n_layers, max_size=n_layers)))
    shape = MoEShape(
        draw(st.text(max_size=9)),
        n_experts,
        draw(st.integers(1, n_experts)),
        draw(st.integers(1, 99)),
        draw(st.integers(1, 99)),
        n_gemms=draw(st.sampled_from((2, 3))),
        dtype=draw(st.sampled_from(sorted(moe.WEIGHT_BYTES))),
    )
    return PlacedModel(
        Placement(draw(st.text(max_size=9)), np.array(draw(cells), dtype=np.int8).reshape(n_layers, n_experts)),
        shape,
        tuple(places),
        draw(st.one_of(st.none(), st.integers(places[-1] + 1, 200))),
        draw(
            st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)))
        ),
        {"step_ns": draw(st.floats(0, 1e12))},
    )


def loads(one: PlacedModel, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, 1000, one.placement.tier.shape)


def same(a: PlacedModel, b: PlacedModel) -> bool:
    plain = [(p.shape, p.layers, p.n_model_layers, p.made_from, p.predicted, p.placement.policy) for p in (a, b)]
    return plain[0] == plain[1] and np.array_equal(a.placement.tier, b.placement.tier)


@given(placements())
def test_a_placement_comes_back_from_its_file_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, one: PlacedModel
) -> None:
    path = tmp_path_factory.getbasetemp() / "placement.json"
    write_placement(path, one)
    assert same(read_placement(path), one)
    assert sum(one.tier_bytes.values()) == pytest.approx(one.placement.tier.size * one.shape.expert_bytes)


def test_a_file_whose_tiers_stand_in_another_order_means_the_same_tiers(tmp_path: Path) -> None:
    one = placed([[0, 1, 2, 0], [0, 0, 2, 1]])
    content = json.loads(placement_json(one))
    content["tiers"] = ["host", "resident", "copied"]
    content["tier"] = [[[1, 2, 0][tier] for tier in row] for row in content["tier"]]
    (tmp_path / "p.json").write_text(json.dumps(content))
    assert same(read_placement(tmp_path / "p.json"), one)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "other"}, "not a placement file"),
        ({"schema": 9}, "schema 9, this version reads 1"),
        ({"tier": [[0, 1, 2], [0, 0, 2]]}, "lists of 4 numbers"),
        ({"tier": [[0, 1, 2, 9], [0, 0, 2, 1]]}, "tier holds 9, expected 0 to 4"),
        ({"tier": [[0, 1, 2, True], [0, 0, 2, 1]]}, "tier holds True"),
        ({"tier": [[0, 1, 2, None], [0, 0, 2, 1]]}, "tier holds None"),
        ({"tier": [[0, 1, 2, 0.5], [0, 0, 2, 1]]}, "tier holds 0.5"),
        ({"tier": []}, "tiers of shape (0, 4)"),
        ({"tiers": ["resident", "moon"]}, "expected names of resident, copied"),
        ({"tier": [[0, 0, 0, 0], [0, 0, 0, 0]]}, "tier_bytes does not belong"),
        ({"layers": [3, 1]}, "each above the one before"),
        ({"layers": [1]}, "1 places of layers for 2"),
        ({"layers": [1, "3"]}, "layers holds '3'"),
        ({"n_model_layers": 3}, "a model of 3 layers with experts in layer 3"),
        ({"n_model_layers": 0}, "a model of 0 layers"),
        ({"n_model_layers": True}, "n_model_layers is of type bool, expected a whole number or null"),
        ({"policy": None}, "policy is of type NoneType, expected text"),
        ({"extra": 1}, "key 'extra' is unknown"),
        ({"shape": {"name": "x"}}, "shape has the keys name, expected"),
    ],
)
def test_a_damaged_placement_file_is_refused_in_one_sentence(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    content = json.loads(placement_json(placed([[0, 1, 2, 0], [0, 0, 2, 1]]))) | change
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read_placement(path)
    assert "p.json" in str(caught.value) and "\n" not in str(caught.value)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_whatever_stands_in_a_placement_file_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = json.loads(placement_json(placed([[0, 1, 2, 0], [0, 0, 2, 1]])))
    at = content["shape"] if data.draw(st.booleans()) else content
    at[data.draw(st.sampled_from(sorted(at)))] = data.draw(ANY_JSON)
    path = tmp_path_factory.getbasetemp() / "odd.json"
    path.write_text(json.dumps(content))
    try:
        assert read_placement(path).placement.tier.shape == (2, 4)
    except InputError as error:
        assert "\n" not in str(error)


def test_missing_keys_and_files_and_values_that_are_no_json_are_refused(tmp_path: Path) -> None:
    content = json.loads(placement_json(placed([[0, 1, 2, 0], [0, 0, 2, 1]])))
    del content["tier"]
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="key 'tier' is missing"):
        read_placement(tmp_path / "p.json")
    (tmp_path / "cut.json").write_text('{"kind": ')
    with pytest.raises(InputError, match=r"cut\.json is not a JSON file"):
        read_placement(tmp_path / "cut.json")
    with pytest.raises(InputError, match="no placement file"):
        read_placement(tmp_path / "none.json")
    odd = PlacedModel(Placement("x", np.zeros((1, 4), dtype=np.int8)), SMALL, (0,), made_from={"at": float("nan")})
    with pytest.raises(InputError, match="JSON values only"):
        write_placement(tmp_path / "odd.json", odd)
    with pytest.raises(InputError, match="cannot be written"):
        write_placement(tmp_path / "nowhere" / "p.json", placed([[0, 1, 2, 0]]))
    assert {path.name for path in tmp_path.iterdir()} == {"p.json", "cut.json"}


def test_every_format_writes_files_that_its_options_name(tmp_path: Path) -> None:
    one = placed([[0, 1, 2, 0], [0, 0, 2, 1]])
    for form in FORMATS:
        found = export(form, one, np.array([[4, 3, 2, 1], [1, 2, 3, 4]]), "mine")
        paths = write(tmp_path, found)
        assert paths and all(path.name.startswith("mine.") and path.stat().st_size for path in paths)
        named = re.findall(r"mine[\w.-]+", " ".join(found.flags))
        assert {name.replace(".pt", ".npy") for name in named} <= {path.name for path in paths}
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(InputError, match=r"unknown export format 'x'; known: json, sglang"):
        export("x", one)


@pytest.mark.parametrize("form", ["eplb", "plumb", "sglang-count"])
def test_formats_that_hold_loads_ask_for_a_load(form: str) -> None:
    with pytest.raises(InputError, match="needs a routing"):
        export(form, placed([[0, 1, 2, 0]]))


def test_the_map_for_sglang_lists_resident_experts_first_and_one_number_for_all_layers() -> None:
    one = placed([[1, 0, 0, 0], [1, 1, 0, 1]])  # 3 and 1 resident: 2 in each layer
    found = export("sglang", one, np.array([[90, 1, 2, 7], [5, 40, 10, 45]]))
    content = json.loads(found.files["placement.sglang.json"])
    assert list(content) == ["physical_to_logical_map"]  # SGLang passes every key on as an argument
    assert content["physical_to_logical_map"] == [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3], [2, 3, 1, 0], [0, 1, 2, 3]]
    assert "--kt-num-gpu-experts 2" in found.flags[0]
    assert found.rounding is not None
    # Expert 1 of the first layer leaves (1 of 100), expert 3 of the second one comes (45 of 100).
    assert found.rounding.asked_frac == pytest.approx((0.10 + 0.10) / 2)
    assert found.rounding.lost_frac == pytest.approx((0.01 - 0.45) / 2)
    assert found.rounding.n_got == 4 and found.rounding.got_bytes == 4 * 192
    assert "1 resident expert of 1 layer leave" in found.warnings[0]
    assert "1 other take" in found.warnings[0]


@given(placements(), st.integers(0, 99))
def test_maps_for_sglang_are_permutations_that_keep_the_resident_experts_where_their_number_allows(
    one: PlacedModel, seed: int
) -> None:
    found = export("sglang", one, loads(one, seed))
    rows = np.array(json.loads(found.files["placement.sglang.json"])["physical_to_logical_map"])
    assert len(rows) == (one.n_model_layers or one.layers[-1] + 1)
    assert (np.sort(rows, axis=1) == np.arange(one.shape.n_experts)).all()
    n_gpu = int(found.flags[0].rsplit(maxsplit=1)[1])
    for row, resident in zip(rows[list(one.layers)], one.resident, strict=True):
        assert resident[row[:n_gpu]].sum() == min(n_gpu, resident.sum())
    assert found.rounding is not None and found.rounding.got_bytes <= found.rounding.asked_bytes
    dense = [layer for layer in range(len(rows)) if layer not in one.layers]
    assert (rows[dense] == np.arange(one.shape.n_experts)).all()


def test_counts_for_sglang_have_rows_of_zeros_for_layers_without_experts() -> None:
    counts = json.loads(
        export("sglang-count", placed([[0] * 4] * 2), np.full((2, 4), 0.25)).files["placement.sglang-count.json"]
    )
    assert counts == {"logical_count": [[0] * 4, [250_000] * 4, [0] * 4, [250_000] * 4, [0] * 4]}


@given(placements())
def test_the_global_top_n_of_the_counts_for_ktransformers_is_the_placement(one: PlacedModel) -> None:
    found = export("ktransformers", one)
    counts = array_in(found.files["placement.kt-counts.npy"])
    assert counts.shape[0] == 1 and counts.shape[2] == one.shape.n_experts
    ratio = float(found.flags[1].rsplit(maxsplit=1)[1])
    n_gpu = int(one.placement.tier.size * ratio)  # as the engine takes it
    assert n_gpu == one.resident.sum()
    mask = np.zeros(counts[0].size, dtype=bool)
    mask[np.argsort(-counts[0].ravel(), kind="stable")[:n_gpu]] = True
    assert (mask.reshape(counts[0].shape)[list(one.layers)] == one.resident).all()
    stored = array_in(found.files["placement.kt-mask.npy"])
    assert (stored[list(one.layers)] == one.resident).all() and stored.dtype == bool
    assert json.loads(found.files["placement.kt-mask.json"])["gpu_experts_mask"] == stored.tolist()
    dense = sorted(set(range(len(stored))) - set(one.layers))
    assert stored[dense].all() and not counts[0][dense].any()
    assert found.rounding is not None and found.rounding.is_exact


def test_the_conversion_command_makes_counts_that_torch_reads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = export("ktransformers", placed([[0, 1, 1, 1], [0, 0, 1, 0]]), None, "mine")
    write(tmp_path, found)
    code = re.search(r'python -c "(.+)"', found.flags[0])
    assert code is not None
    exec(code[1].replace("'mine", f"'{tmp_path}/mine"), {})
    counts = torch.load(tmp_path / "mine.kt-counts.pt", weights_only=True)["logical_count"]
    assert counts.dim() == 3 and counts.sum(dim=0)[1].tolist() == [2, 1, 1, 1]
    top = torch.topk(counts.sum(dim=0).float().reshape(-1), 4).indices
    assert sorted(top.tolist()) == [4, 12, 13, 15]


def test_the_rules_for_ktransformers_name_every_layer_once() -> None:
    yaml = pytest.importorskip("yaml")
    one = placed([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])  # 5 resident: one whole layer, the second
    found = export("ktransformers-yaml", one)
    rules = yaml.safe_load(found.files["placement.kt-rules.yaml"])
    ops = {}
    for layer in range(7):
        name = f"model.layers.{layer}.mlp.experts"
        first = next((rule for rule in rules if re.match(rule["match"]["name"], name)), None)
        ops[layer] = first and first["replace"]["kwargs"]["generate_op"]
    assert ops == {0: None, 1: "KExpertsCPU", 2: None, 3: "KExpertsMarlin", 4: None, 5: "KExpertsCPU", 6: None}
    assert found.rounding is not None and (found.rounding.n_asked, found.rounding.n_got) == (5, 4)
    assert found.rounding.asked_frac is None and "keeps 4 in 768 B" in found.warnings[1]


def bytes_left_by(rules: str, one: PlacedModel, tensors: dict[str, int]) -> float:
    """Bytes of expert tensors that stay on the device when `-ot` rules are searched in names, the first match first."""
    pairs = [rule.split("=") for rule in rules.split(",") if rule]
    kept = 0.0
    for layer in range(one.n_model_layers or 130):
        names = [f"blk.{layer}.attn_q.weight", f"blk.{layer}.ffn_gate_inp.weight", f"blk.{layer}.ffn_up_shexp.weight"]
        assert not any(re.search(regex, name) for regex, _ in pairs for name in names)
        for tensor, n_gemms in tensors.items():
            gone = next((to for regex, to in pairs if re.search(regex, f"blk.{layer}.ffn_{tensor}_exps.weight")), None)
            assert gone in (None, "CPU") and (gone is None or layer in one.layers)
            kept += (gone is None and layer in one.layers) * n_gemms * one.shape.layer_bytes / one.shape.n_gemms
    return kept


@given(placements(), st.booleans(), st.integers(0, 99))
def test_the_rules_for_llama_cpp_leave_the_bytes_that_they_say(one: PlacedModel, fused: bool, seed: int) -> None:
    found = llama_cpp(one, loads(one, seed), fused=fused)
    tensors = {"gate_up": 2, "down": 1} if fused else {"gate": 1, "up": 1, "down": 1}
    tensors = {"up": 1, "down": 1} if one.shape.n_gemms == 2 else tensors
    rules = re.search(r"-ot '(.+)'", found.flags[0])
    kept_bytes = bytes_left_by(rules[1] if rules else "", one, tensors)
    assert found.rounding is not None
    assert kept_bytes == pytest.approx(found.rounding.got_bytes)
    assert kept_bytes <= found.rounding.asked_bytes * (1 + 1e-12)
    # No tensor more would fit, so less than the largest one is given away.
    largest = max(tensors.values()) * one.shape.layer_bytes / one.shape.n_gemms
    assert found.rounding.asked_bytes - kept_bytes < largest * (1 + 1e-12)


def test_the_layers_with_the_most_popular_resident_experts_stay_with_llama_cpp() -> None:
    one = placed([[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]])  # 6 of 12: one layer and one or two projections
    assert llama_cpp(one).flags[0] == (
        r"-ngl 999 -ot 'blk\.1\.ffn_(up|down|gate|gate_up)_(ch|)exps\.=CPU,blk\.5\.ffn_(up|down)_(ch|)exps\.=CPU'"
    )
    load = np.array([[97, 1, 1, 1], [1, 1, 1, 97], [25, 25, 25, 25]])
    found = llama_cpp(one, load)
    rules = re.search(r"-ot '(.+)'", found.flags[0])
    assert rules is not None and not re.search(rules[1].split("=")[0], "blk.1.ffn_up_exps.weight")
    assert found.rounding is not None and found.rounding.asked_frac == pytest.approx((0.97 + 0.03 + 0.5) / 3)
    # Layer 1 whole; of layer 5 (worth 50 of 100) gate and not up: 6 experts are 18 GEMMs, 12 of layer 1, 4 of layer 5.
    assert found.rounding.got_frac == pytest.approx((1 + 1 / 3) / 3)
    assert "layer 5 is split" in " ".join(found.warnings)


def test_n_cpu_moe_counts_layers_of_the_model_from_its_start() -> None:
    assert n_cpu_moe(placed([[1] * 4] * 3))[0] == 6
    assert n_cpu_moe(placed([[0] * 4, [1] * 4, [1] * 4]))[0] == 4  # the bytes of one layer keep the last, layer 5
    assert n_cpu_moe(placed([[0] * 4] * 3))[0] == 0


def test_many_layers_make_a_short_rule() -> None:
    shape = moe.shape("qwen3-235b-a22b")
    tier = np.ones((94, 128), dtype=np.int8)
    tier[60:] = 0
    one = PlacedModel(Placement("made-up", tier), shape, tuple(range(94)), 94)
    rule = r"blk\.([0-9]|[1-5][0-9])\.ffn_(up|down|gate|gate_up)_(ch|)exps\.=CPU"
    assert llama_cpp(one).flags == (f"-ngl 999 -ot '{rule}'", "-ngl 999 --n-cpu-moe 60")


def test_vllm_offloads_whole_tensors_of_the_first_layers_until_its_limit() -> None:
    shape = MoEShape("made-up", n_experts=8, top_k=2, hidden=4096, inter=16384)  # 403 MB an expert, 3 GiB a layer
    tier = np.zeros((4, 8), dtype=np.int8)
    tier[:, 5:] = 1  # 12 of 32 experts: 4.5 GiB
    found = export("vllm", PlacedModel(Placement("x", tier), shape, (0, 1, 2, 3), 4))
    assert json.loads(found.files["placement.vllm.json"]) == {"cpu_offload_gb": 4.5, "cpu_offload_params": ["experts"]}
    # 3 GiB of layer 0, then w13 of layer 1 (2 GiB) passes the limit; its w2 stays.
    assert found.rounding is not None and found.rounding.n_got == pytest.approx(20 - 4 / 3)


@given(placements())
def test_vllm_never_keeps_more_bytes_than_asked_for_and_all_where_nothing_leaves(one: PlacedModel) -> None:
    found = export("vllm", one).rounding
    assert found is not None and found.got_bytes <= found.asked_bytes * (1 + 1e-12)
    if one.resident.all():
        assert found.is_exact


def test_arrays_for_other_planners() -> None:
    one, load = placed([[0, 1, 2, 0], [0, 0, 2, 1]]), np.array([[4, 3, 2, 1], [1, 2, 3, 4]])
    weight = array_in(export("eplb", one, load).files["placement.eplb-weight.npy"])
    assert weight.dtype == np.int64 and (weight == load).all()
    table = array_in(export("plumb", one, load).files["placement.plumb.npy"])
    assert table.dtype == np.float32 and (table == load).all()


def test_loads_that_do_not_belong_are_refused() -> None:
    one = placed([[0, 1, 2, 0], [0, 0, 2, 1]])
    with pytest.raises(InputError, match=r"load of shape \(1, 4\), expected \(2, 4\)"):
        export("sglang", one, np.ones((1, 4)))
    with pytest.raises(InputError, match="not all zero"):
        rounding(one, np.ones((2, 4)), np.array([[1, 1, 1, 1], [0, 0, 0, 0]]))


DEVICES = np.array([[0, 1, 1, 0], [1, 0, 0, 1]])


def test_maps_of_devices_in_the_words_of_each_engine() -> None:
    mapped = device_map(DEVICES, 2, (1, 3), 5)
    assert mapped.physical_to_logical.tolist() == [[0, 3, 1, 2], [1, 2, 0, 3]]
    files = {
        form: next(iter(DEVICE_FORMATS[form](mapped, "m").files.values()))
        for form in DEVICE_FORMATS
        if form != "vllm-ranks"
    }
    assert array_in(files["phy2log"]).tolist() == [[0, 3, 1, 2], [1, 2, 0, 3]]
    local = array_in(files["vllm-expert-map"])
    assert local.dtype == np.int32
    assert local.tolist() == [[[0, -1, -1, 1], [-1, 0, 1, -1]], [[-1, 0, 1, -1], [0, -1, -1, 1]]]
    ascend = json.loads(files["vllm-ascend"])
    assert ascend["moe_layer_count"] == 2
    assert ascend["layer_list"][1] == {
        "layer_id": 1,
        "device_count": 2,
        "device_list": [{"device_id": 0, "device_expert": [1, 2]}, {"device_id": 1, "device_expert": [0, 3]}],
    }
    rows = json.loads(files["sglang-map"])["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3], [0, 3, 1, 2], [0, 1, 2, 3], [1, 2, 0, 3], [0, 1, 2, 3]]
    with pytest.raises(InputError, match="layer 3 is mapped otherwise than layer 1"):
        DEVICE_FORMATS["vllm-ranks"](mapped, "m")
    alike = DEVICE_FORMATS["vllm-ranks"](device_map(DEVICES[:1], 2, (1,)), "m")
    assert json.loads(alike.files["m.vllm-ranks.json"]) == {"expert_to_ep_rank": [0, 1, 1, 0]}
    assert "proposed" in alike.warnings[0]


def test_copies_of_experts_have_slots_of_their_own() -> None:
    mapped = DeviceMap(np.array([[[0, 1, 2], [2, 3, 0]]]), 4, (2,))
    assert mapped.has_copies and mapped.n_devices == 2
    found = DEVICE_FORMATS["sglang-map"](mapped, "m")
    assert "--ep-size 2 --ep-num-redundant-experts 2" in found.flags[0]
    assert json.loads(found.files["m.sglang-map.json"])["physical_to_logical_map"][0] == [0, 1, 2, 3, 0, 1]
    assert local_slots(mapped).tolist() == [[[0, 1, 2, -1], [2, -1, 0, 1]]]
    with pytest.raises(InputError, match="copies"):
        DEVICE_FORMATS["vllm-ranks"](mapped, "m")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ([[0, 0, 0, 1]], "device 0 has 3 of the 4 experts of layer 7"),
        ([[0, 1, 2, 1]], "expected devices 0 to 1"),
    ],
)
def test_uneven_or_unknown_devices_are_refused(device: list[list[int]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        device_map(np.array(device), 2, (7,))


def test_an_expert_without_a_slot_is_refused() -> None:
    with pytest.raises(InputError, match="expert 3 of layer 4 has no slot"):
        DeviceMap(np.array([[[0, 1], [2, 2]]]), 4, (4,))
