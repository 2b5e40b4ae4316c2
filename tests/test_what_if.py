"""What if: launches, skew, other numbers of GPUs, offloaded experts; answers are checked against the layer itself."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from perfmodel import text
from perfmodel.balance import read_map, write_map
from perfmodel.cli.main import app
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, hardware
from perfmodel.latency import load_model
from perfmodel.model_memory import ModelMemory, model_memory
from perfmodel.moe import MoEShape, shape
from perfmodel.offload import link_rate
from perfmodel.placement.balance import linear, map_of, round_robin
from perfmodel.placement.eplb import rebalance
from perfmodel.routing import power_law_shares, uniform_shares
from perfmodel.schedule import DEFAULTS, SCHEDULES, Overheads
from perfmodel.schedule.alternatives import Alternative, Prices, compare, fitting_frac, verdict
from perfmodel.schedule.costs import received_tier
from perfmodel.schedule.question import Question, shared_host
from perfmodel.schedule.what_if import (
    answer,
    cited,
    dominating_skew,
    launch_batch,
    max_over_mean,
    skew_frac,
    skewed,
    unpadded_bulk_ns,
)

OLMOE = shape("olmoe")
SXM, GH200 = hardware("h100-sxm"), hardware("gh200")


def asked(one: MoEShape = OLMOE, n_gpus: int = 8, tokens: int = 256, exponent: float = 0.0, **more: object) -> Question:
    profile = more.pop("profile", SXM)
    return Question(profile, one, power_law_shares(one.n_experts, exponent), n_gpus, tokens, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_from_the_batch_on_launches_are_less_than_a_tenth_of_the_layer_and_before_they_are_more(schedule: str) -> None:
    question = asked()

    def launch_frac(n_tokens: int) -> float:
        found = replace(question, tokens_per_gpu=n_tokens).timeline(schedule)
        return found.phases["launch"] / found.latency_ns

    batch = launch_batch(question, schedule)
    assert batch is not None
    assert launch_frac(batch) < 0.1
    if batch > 1:
        assert launch_frac(batch - 1) >= 0.1
    assert all(launch_frac(batch * 2**i) < 0.1 for i in range(4))


def test_launches_never_end_to_matter_where_each_takes_a_second() -> None:
    slow = {**DEFAULTS, "bulk": Overheads(1000, host_launch_ns=1e9)}
    assert launch_batch(asked(overheads=slow), "bulk") is None
    none = {**DEFAULTS, "bulk": Overheads(0)}
    assert launch_batch(asked(overheads=none), "bulk") == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stragglers_dominate_from_the_skew_on_that_is_found(schedule: str) -> None:
    question = asked(tokens=512)
    skew = dominating_skew(question, schedule)
    assert skew is not None
    assert skew_frac(skewed(question, skew.exponent), schedule) > 0.5
    assert skew_frac(skewed(question, skew.exponent - 0.03), schedule) < 0.5
    assert skew.max_over_mean == max_over_mean(skewed(question, skew.exponent).layer) > 1.2
    assert dominating_skew(asked(n_gpus=1), schedule) is None
    assert skew_frac(question, schedule) == 0


def test_a_skew_that_dominates_is_found_where_extreme_skew_reads_few_weights_and_is_faster_again() -> None:
    question = asked(shape("qwen3-30b-a3b"), n_gpus=4, tokens=1024)
    found = dominating_skew(question, "fused")
    assert found is not None
    assert skew_frac(skewed(question, found.exponent), "fused") > 0.5 > skew_frac(skewed(question, 10.0), "fused")
    assert skew_frac(skewed(question, found.exponent - 0.05), "fused") < 0.5


def test_skew_keeps_the_order_of_the_experts_and_a_power_law_is_itself() -> None:
    shares = np.random.default_rng(0).permutation(power_law_shares(64, 1.0)[0])[None]
    question = replace(asked(), shares=shares)
    assert skewed(question, 1.0).shares == pytest.approx(shares)
    assert skewed(question, 0.0).shares == pytest.approx(uniform_shares(64))
    steeper = skewed(question, 2.0).shares
    assert (np.argsort(steeper[0]) == np.argsort(shares[0])).all()


def test_a_round_robin_map_balances_what_a_linear_one_does_not() -> None:
    question = asked(tokens=8192, exponent=1.0)
    spread = replace(question, expert_map=round_robin(1, 64, 8))
    assert max_over_mean(spread.layer) < max_over_mean(question.layer)
    assert spread.latency_ns("fused") < question.latency_ns("fused")


def test_the_gpus_of_a_host_share_it_and_links_stay() -> None:
    quarter = shared_host(SXM, 4)
    assert quarter["host_peak_bytes_per_s"] == SXM["host_peak_bytes_per_s"] / 4
    assert quarter["host_gemm_flops_per_s"] == SXM["host_gemm_flops_per_s"] / 4
    assert quarter["host_capacity_bytes"] == SXM["host_capacity_bytes"] / 4
    assert quarter["link_h2d_copy_bytes_per_s"] == SXM["link_h2d_copy_bytes_per_s"]
    assert link_rate(shared_host(SXM, 8), "copy") == (307.2e9 / 8, "host_peak_bytes_per_s")  # the tighter of the two
    assert shared_host(SXM, 1) is SXM
    assert (asked(n_gpus=8).n_per_host, asked(n_gpus=8).n_hosts, asked(n_gpus=2).n_per_host) == (4, 2, 2)
    assert asked(profile=GH200).n_hosts == 8
    cpu = asked(offload_frac=0.5, access="cpu", tokens=64)
    assert replace(cpu, gpus_per_host=1).latency_ns("bulk") < cpu.latency_ns("bulk")
    assert replace(cpu, gpus_per_host=8).latency_ns("bulk") > cpu.latency_ns("bulk")


def test_each_gpu_offloads_its_own_least_used_experts() -> None:
    question = asked(exponent=1.0, offload_frac=0.25, profile=GH200)
    tier = received_tier(question.layer)
    assert tier.shape == (8, 8)
    assert (tier == np.array([0] * 6 + [1] * 2)).all()  # popularity falls with the number of the expert
    resident, zero_copy = asked(exponent=1.0, profile=GH200), question.timeline("bulk")
    assert zero_copy.phases["offload"] > 0 and "offload" not in resident.timeline("bulk").phases
    for mode in ("copy", "copy-overlap", "cpu", "paged"):
        found = replace(question, access=mode)
        for schedule in SCHEDULES:
            assert found.latency_ns(schedule) >= found.timeline(schedule).bound_ns
    with pytest.raises(InputError, match="has no memory modules that compute"):
        replace(question, access="near-data").latency_ns("bulk")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gpus_without_experts_or_rows_stand_idle_whatever_model_and_access(schedule: str) -> None:
    on_two = map_of("made-up", np.arange(64)[None] % 2 * 3, 4)  # GPUs 1 and 2 hold nothing
    fitted = load_model("h100-sxm-vllm-triton-bf16")
    for access in ("zero-copy", "paged", "copy"):
        for frac in (0.0, 0.25, 1.0):
            question = asked(n_gpus=4, tokens=1, model=fitted, expert_map=on_two, offload_frac=frac, access=access)
            found = question.timeline(schedule)
            assert found.bound_ns <= found.latency_ns < 1e9
            assert question.layer.traffic.received.sum(axis=1)[[1, 2]].tolist() == [0, 0]


def test_what_fits_is_device_memory_less_everything_else() -> None:
    one = MoEShape("made-up", n_experts=16, top_k=2, hidden=4096, inter=8192, n_layers=60)  # 201.3 MB an expert
    memory = ModelMemory(non_expert_bytes=20e9)
    # (80 - 20 - 2.147 of workspace - 2 x 0.2013 of staging) GB hold 4.75 experts of 60 layers.
    question = asked(one, 2, 64)
    assert question.profile["memory_capacity_bytes"] == 80e9
    assert fitting_frac(replace(question, n_gpus=4), memory) == 0
    with pytest.raises(InputError, match=r"4 of 8 experts of a layer must leave each GPU, 96\.6 GB for all"):
        fitting_frac(replace(question, profile=replace_capacity(90e9)), memory)
    assert fitting_frac(replace(question, profile=replace_capacity(97e9)), memory) == 0.5
    assert fitting_frac(question, memory) == 0.5
    assert fitting_frac(question, ModelMemory()) == pytest.approx(2 / 8)  # 77.45 GB hold 6.4
    with pytest.raises(InputError, match="leave no room for an expert"):
        fitting_frac(question, ModelMemory(non_expert_bytes=79e9))


def replace_capacity(host_bytes: float) -> HardwareProfile:
    known = SXM.quantities
    return replace(
        SXM, quantities={**known, "host_capacity_bytes": replace(known["host_capacity_bytes"], value=host_bytes)}
    )


def test_numbers_of_gpus_are_compared_at_equal_tokens_and_by_their_price() -> None:
    one = MoEShape("made-up", n_experts=16, top_k=2, hidden=4096, inter=8192, n_layers=60)
    question = asked(one, 4, 256)
    found = compare(question, (1, 2, 4), SCHEDULES, ModelMemory(non_expert_bytes=20e9), Prices(10.0, 6.0))
    assert [a.tokens_per_gpu for a in found] == [1024, 512, 256]
    assert [a.n_hosts for a in found] == [1, 1, 1]
    assert [a.price for a in found] == [16.0, 26.0, 46.0]
    assert [a.offload_frac for a in found] == [0.75, 0.5, 0.0]
    by_hand = replace(question, n_gpus=2, tokens_per_gpu=512, offload_frac=0.5)
    assert found[1].latency_ns == {name: by_hand.latency_ns(name) for name in SCHEDULES}
    assert found[2].latency_ns == {name: question.latency_ns(name) for name in SCHEDULES}
    best = min((found[2].latency_ns or {}).values())
    assert found[2].tokens_per_s == pytest.approx(1024 / best * 1e9)
    assert found[2].to_json()["tokens_per_s_per_price"] == pytest.approx(1024 / best * 1e9 / 46)
    assert found[2].to_json()["tokens_per_s_per_gpu"] == pytest.approx(256 / best * 1e9)
    fixed = compare(replace(question, offload_frac=0.25), (2, 4), ("bulk",), None)
    assert [a.offload_frac for a in fixed] == [0.25, 0.25] and fixed[0].price is None
    tight = replace(question, profile=replace_capacity(50e9))
    cannot = compare(tight, (2, 4), ("bulk",), ModelMemory(non_expert_bytes=20e9))
    assert cannot[0].latency_ns is None and "must leave each GPU" in cannot[0].reason
    assert cannot[0].to_json()["tokens_per_s"] is None and cannot[0].fastest is None
    assert cannot[1].latency_ns is not None
    with pytest.raises(InputError, match="1024 tokens of all GPUs do not divide over 3 GPUs"):
        compare(question, (3,), ("bulk",), None)
    with pytest.raises(InputError, match="without it"):
        compare(replace(question, expert_map=linear(1, 16, 4)), (2,), ("bulk",), None)


def alternative(n_gpus: int, n_hosts: int, rate: float | None, price: float | None, offload_frac: float) -> Alternative:
    latency_ns = None if rate is None else {"bulk": n_gpus * 1e9 / rate}
    return Alternative(n_gpus, n_hosts, 1, offload_frac, latency_ns, price)


def test_the_verdict_names_the_price_of_a_host_at_which_it_turns() -> None:
    # 100 / (2 + x) = 220 / (4 + 4 x) for hosts of x GPUs: 400 + 400 x = 440 + 220 x, x = 40 / 180
    few, many = alternative(2, 1, 100.0, 2.1, 0.5), alternative(4, 4, 220.0, 4.4, 0.0)
    found = verdict([few, many])
    assert found and found.best is many and found.other is few
    assert found.gain == pytest.approx((220 / 4.4) / (100 / 2.1))
    assert found.even_host_price == pytest.approx(40 / 180)
    dear = verdict([replace(few, price=3.0), replace(many, price=8.0)])  # the same, of hosts as dear as GPUs
    assert dear and dear.best.n_gpus == 2 and dear.even_host_price == pytest.approx(40 / 180)
    alike = verdict([alternative(4, 1, 100.0, None, 0.5), alternative(8, 2, 300.0, None, 0.0)])
    assert alike and alike.gain == pytest.approx(1.5) and alike.even_host_price is None  # as many hosts for each GPU
    both = verdict([few, many, alternative(8, 8, 430.0, 8.8, 0.0)])
    assert both and both.other is few  # rather than the runner-up that offloads as little
    alone = verdict([many, alternative(1, 1, None, 1.1, 0.0)])
    assert alone and alone.other is None and verdict([alternative(1, 1, None, 1.1, 0.0)]) is None


def test_an_answer_holds_together_and_says_what_it_rests_on() -> None:
    question = asked(tokens=256, n_gpus=16)
    found = answer(question, "uniform", SCHEDULES)
    by_name = {one.schedule: one.latency_ns for one in found.timelines}
    assert found.speedup_over == {
        "bulk": by_name["bulk"] / by_name["fused"],
        "chunked": by_name["chunked"] / by_name["fused"],
    }
    # 256 tokens of 2048 bf16 values, four copies, 32 times over: an expert's 4 tokens fill so little of a tile of 128.
    assert found.buffer_bytes == 4 * 256 * 2048 * 2 * 32
    words = "\n".join(cited(question, SCHEDULES))
    for said in ("peer_link_peak_bytes_per_s 450 GB/s x 0.80, datasheet", "net_link_peak_bytes_per_s 50.0 GB/s x 0.80"):
        assert said in words
    assert "a message between nodes begins after 5.00 µs, assumed" in words
    assert "bulk: launches 85 (arXiv 2506.04667 Table 1), of 5.00 µs (assumed)" in words
    assert "link_kernel_read" in "\n".join(cited(asked(profile=GH200, offload_frac=0.5), ("bulk",)))
    assert answer(asked(tokens=8), "uniform", ("bulk",)).speedup_over == {}


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    loads = power_law_shares(64, 1.0).repeat(3, axis=0)
    for one in (rebalance(loads, 72, 1, 1, 8), map_of("x", np.arange(64)[None] % 7 % 4, 4)):
        write_map(tmp_path / "map.json", one, np.arange(len(one.phy2log)))
        again = read_map(tmp_path / "map.json")
        assert (again.policy, again.n_gpus) == (one.policy, one.n_gpus)
        assert (again.phy2log == one.phy2log).all() and (again.gpu_of == one.gpu_of).all()
        assert (again.shares == one.shares).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_gpus": None}, "is no map of experts as `perfmodel balance --out` writes it"),
        ({"gpu_of_slot": [[0, "x"]]}, "is no map of experts"),
        ({"gpu_of_slot": [[0, 0.5]]}, "is no map of experts"),
        ({"gpu_of_slot": [[0, 1], [0]]}, "is no map of experts"),
        ({"physical_to_logical_map": [[0, 2**70]]}, "is no map of experts"),
        ({"n_gpus": "2"}, "is no map of experts"),
        ({"gpu_of_slot": [0, 1]}, "are not both"),
        ({"gpu_of_slot": [[0, 2]]}, "a slot is on no GPU of 0 to 1"),
        ({"physical_to_logical_map": [[0, -1]]}, "or of no expert"),
    ],
)
def test_a_damaged_map_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    whole = {"policy": "x", "n_gpus": 2, "gpu_of_slot": [[0, 1]], "physical_to_logical_map": [[0, 1]]}
    (tmp_path / "map.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(InputError, match=words):
        read_map(tmp_path / "map.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)
KEYS = ("policy", "n_gpus", "gpu_of_slot", "physical_to_logical_map")


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({key: JSON | st.just([[0, 1]]) | st.just(2) for key in KEYS}) | JSON)
def test_any_json_is_a_map_that_holds_together_or_is_refused_in_a_sentence(content: object) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "map.json"
        path.write_text(json.dumps(content))
        try:
            found = read_map(path)
        except InputError as error:
            assert str(error).startswith("map.json") and "\n" not in str(error)
            return
    assert found.gpu_of.shape == found.phy2log.shape
    assert found.gpu_of.min() >= 0 and found.gpu_of.max() < found.n_gpus


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["schedule", *words], catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


SMALL = ("--shape", "olmoe", "--hardware", "h100-sxm", "--gpus", "4", "--tokens", "64")


def test_the_command_says_all_of_it_as_words_and_as_json(tmp_path: Path) -> None:
    found = json.loads(run(*SMALL, "--compare", "2,4", "--gpu-price", "3", "--host-price", "1", "--json"))
    question = asked(n_gpus=4, tokens=64)
    assert [one["schedule"] for one in found["schedules"]] == list(SCHEDULES)
    assert [one["latency_ns"] for one in found["schedules"]] == [question.latency_ns(name) for name in SCHEDULES]
    assert found["alternatives"][1]["latency_ns"] == {name: question.latency_ns(name) for name in SCHEDULES}
    assert found["alternatives"][0]["price"] == 7
    assert found["n_gpus_per_host"] == 4 and found["n_gpus_per_node"] == 4
    page = run(*SMALL, "--routing", "power-law:0.5", "--compare", "2,4", "--gpu-price", "3")
    for words in ("bound  ", "fusing", "launches", "stragglers", "payload", "tokens/s per price", "Not measured"):
        assert words in page
    assert max(map(len, page.split("\n"))) <= 120
    bare = {**DEFAULTS, "bulk": replace(DEFAULTS["bulk"], capacity_factor=None)}
    assert "padded to the fullest expert" in found["reasons"][-3]
    assert found["unpadded_bulk_ns"] == asked(n_gpus=4, tokens=64, overheads=bare).latency_ns("bulk")
    many = asked(tokens=2048, exponent=0.5)
    assert (unpadded_bulk_ns(many) or 0) < 0.6 * many.latency_ns("bulk")
    assert unpadded_bulk_ns(replace(many, overheads=bare)) is unpadded_bulk_ns(asked(n_gpus=1)) is None
    assert "bulk without capacity and its padding" in " ".join(page.split())
    unpadded = run(*SMALL, "--capacity-factor", "none")
    assert "without capacity" not in unpadded
    padded = text.frac(asked(n_gpus=4, tokens=64, exponent=0.5).timeline("fused").computed_padding_frac)
    assert f"{padded} of the rows that it computes are padding" in " ".join(page.split())
    full = run(*SMALL[:-1], "8192")
    assert "of the rows that it computes" not in " ".join(full.split())
    assert "give most tokens/s for their price" in page and found["best"]["gain"] > 1
    assert "in chunked and fused they overlap" in page


def test_options_reach_the_schedules_and_a_picture_is_written(tmp_path: Path) -> None:
    def latency_ns(*more: str) -> list[float]:
        return [one["latency_ns"] for one in json.loads(run(*SMALL, "--json", *more))["schedules"]]

    usual = latency_ns()
    more = {**DEFAULTS, "chunked": replace(DEFAULTS["chunked"], n_launches=500, n_chunks=2)}
    expected = [asked(n_gpus=4, tokens=64, overheads=more).latency_ns(name) for name in SCHEDULES]
    assert latency_ns("--launches", "chunked=500", "--chunks", "2") == expected
    assert latency_ns("--launches", "0")[0] < usual[0]
    assert latency_ns("--launch-time", "9us")[0] == 85 * 9000
    assert "of 9.00 µs (as given)" in run(*SMALL, "--launch-time", "9us")
    assert latency_ns("--offload", "none") == usual
    twice = json.loads(run(*SMALL, "--compare", "2,2,4", "--json"))["alternatives"]
    assert [one["n_gpus"] for one in twice] == [2, 4]
    assert latency_ns("--schedule", "chunked") == usual[1:2]
    dropped = json.loads(run(*SMALL, "--routing", "power-law", "--capacity-factor", "1", "--json"))["schedules"][0]
    assert dropped["dropped_frac"] > 0
    assert json.loads(run(*SMALL, "--capacity-factor", "none", "--json"))["schedules"][0]["padding_frac"] == 0
    once = {name: replace(DEFAULTS[name], capacity_factor=None, once_per_gpu=name != "fused") for name in SCHEDULES}
    expected = [asked(n_gpus=4, tokens=64, overheads=once).latency_ns(name) for name in SCHEDULES]
    assert latency_ns("--once-per-gpu") == latency_ns("--once-per-gpu", "--capacity-factor", "none") == expected
    assert "a token sent once to each GPU" in run(*SMALL, "--once-per-gpu")
    write_map(tmp_path / "map.json", round_robin(1, 64, 4), np.arange(1))
    mapped = asked(n_gpus=4, tokens=64, expert_map=round_robin(1, 64, 4))
    assert latency_ns("--map", str(tmp_path / "map.json")) == [mapped.latency_ns(name) for name in SCHEDULES]
    nodes = asked(n_gpus=4, tokens=64, gpus_per_node=2)
    assert latency_ns("--gpus-per-node", "2") == [nodes.latency_ns(name) for name in SCHEDULES]
    pytest.importorskip("plotly")
    run(*SMALL, "--html", str(tmp_path / "gantt.html"))
    assert "plotly" in (tmp_path / "gantt.html").read_text()[:10_000].lower()


def test_what_does_not_fit_is_offloaded_or_called_hypothetical() -> None:
    large = ("--shape", "deepseek-v3", "--hardware", "gh200", "--gpus", "4", "--tokens", "64", "--schedule", "bulk")
    assert "hypothetical" in json.loads(run(*large, "--json"))["notes"][0]
    found = json.loads(run(*large, "--offload", "auto", "--json"))
    question = asked(shape("deepseek-v3"), 4, 64, profile=GH200)
    assert found["offload_frac"] == fitting_frac(question, model_memory("deepseek-v3"))
    assert 0.3 < found["offload_frac"] < 0.8 and found["access"] == "zero-copy" and not found["notes"]


def test_a_cpu_with_a_link_has_no_fused_schedule_and_says_so(tmp_path: Path) -> None:
    link = '\n[peer_link_peak_bytes_per_s]\nvalue = 1\nunit = "GB/s"\nkind = "assumed"\nsource = "made up: a link"\n'
    source = Path("perfmodel/data/hardware/epyc-zen4-2c-fp32.toml").read_text(encoding="utf-8")
    (tmp_path / "cpu.toml").write_text(source + link)
    words = ("--shape", "olmoe", "--hardware", str(tmp_path / "cpu.toml"), "--gpus", "4", "--tokens", "16", "--json")
    found = json.loads(run(*words))
    assert [one["schedule"] for one in found["schedules"]] == ["bulk", "chunked"]
    assert "fused is left out" in found["notes"][0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--gpus 7", "64 experts cannot be shared evenly by 7 GPUs"),
        ("--tokens 2000000", "expected at most 1,048,576 on each GPU"),
        ("--schedule magic", "unknown schedule 'magic'; known: bulk, chunked, fused"),
        ("--compare 3", "256 tokens of all GPUs do not divide over 3 GPUs"),
        ("--gpu-price 3", "give --compare and --gpu-price with them"),
        ("--compare 2 --host-price 3", "give --compare and --gpu-price with them"),
        ("--launches magic=3", "unknown schedule 'magic'"),
        ("--launches bulk=-1", "--launches is -1"),
        ("--offload 0.5 --access zero-copy+cpu", "expected one of zero-copy"),
        ("--offload 2", "offloaded fraction is 2"),
        ("--html x.png", "expected an .html file"),
        ("--map absent.json", "no map file 'absent.json'"),
        ("--capacity-factor 1 --once-per-gpu", "tokens that are sent once to each GPU are not padded"),
        ("--capacity-factor much", "--capacity-factor is 'much'"),
        ("--gpus-per-node 3", "4 GPUs in nodes of 3"),
        ("--layer -1", "--layer is -1"),
        ("--hardware l40s", "'l40s' has no peer_link_peak_bytes_per_s"),
        ("--hardware l40s", "shipped machines that have: a100-sxm-80gb"),
        ("--layer 3", "--layer would change nothing: a pattern has no layers"),
        ("--access cpu", "--access would change nothing: nothing is offloaded"),
        ("--schedule fused --chunks 8", "--chunks would change nothing"),
        ("--schedule chunked,fused --capacity-factor 2", "--capacity-factor would change nothing"),
        ("--schedule fused --launches bulk=3", "--launches is of bulk, and --schedule of fused"),
        ("--chunks 257", "--chunks is 257, expected at most 256"),
    ],
)
def test_a_mistake_is_one_sentence(more: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        run(*SMALL, *more.split())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_page_says_why_one_kernel_is_slower_and_that_bulk_drops_rows() -> None:
    large = ("--shape", "mixtral-8x7b", "--hardware", "h100-sxm", "--gpus", "2", "--tokens", "4096")
    assert "tiles of 128 x 64, the others in whatever tiles suit" in " ".join(run(*large).split())
    skewed_words = " ".join(run(*SMALL, "--routing", "power-law", "--capacity-factor", "1").split())
    dropped = json.loads(run(*SMALL, "--routing", "power-law", "--capacity-factor", "1", "--json"))["schedules"][0]
    assert f"as bulk, which drops {text.frac(dropped['dropped_frac'])} of rows" in skewed_words
    uneven = run(*SMALL, "--routing", "power-law", "--offload", "0.25", "--capacity-factor", "none")
    assert "in bulk" not in uneven
