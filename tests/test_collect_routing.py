"""Recorded selections against selections worked out apart from the recorder, on tiny models with random weights.

The models, their tokenizer and the text are made up here; only the code of the families is real.
"""

import argparse
import importlib.util
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from collectors import routing, selections
from perfmodel.errors import InputError, MissingExtraError
from perfmodel.routing import layer_shares, read_shares, routing_keys
from tests.conftest import ROOT

transformers = pytest.importorskip("transformers")
N_WORDS, N_TOKENS, STEP_TOKENS = 90, 50, 20
SIZES: dict[str, Any] = {
    "vocab_size": N_WORDS + 4,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
Chosen = list[set[int]]


def deepseek() -> Any:
    return transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=16, num_experts_per_tok=3,
        n_group=4, topk_group=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip


def qwen3() -> Any:
    return transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=16, num_experts=16, num_experts_per_tok=4, mlp_only_layers=[1]
    )


def llama4() -> Any:
    return transformers.Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=48, num_local_experts=8, num_experts_per_tok=2,
        interleave_moe_layer_step=1,
    )  # fmt: skip


def gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **{**SIZES, "max_position_embeddings": 4096}, head_dim=8, num_local_experts=8, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


# Family: its config, experts, top-k, and the places of its MoE layers.
FAMILIES: dict[str, tuple[Callable[[], Any], int, int, list[int]]] = {
    "mixtral": (
        lambda: transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2), 8, 2, [0, 1, 2],
    ),
    "olmoe": (lambda: transformers.OlmoeConfig(**SIZES, num_experts=16, num_experts_per_tok=4), 16, 4, [0, 1, 2]),
    "qwen3_moe": (qwen3, 16, 4, [0, 2]),
    "deepseek_v3": (deepseek, 16, 3, [1, 2]),
    "gpt_oss": (gpt_oss, 8, 2, [0, 1, 2]),
    "llama4": (llama4, 8, 2, [0, 1, 2]),
}  # fmt: skip


def tiny(family: str) -> nn.Module:
    """A model of the family with random weights, router biases included, so that biases decide some selections."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0]()).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or "router.bias" in name:
                tensor.normal_(std=0.2)
            if "gate.weight" in name or "router.weight" in name:
                tensor.normal_(std=0.5)
    return model


def save(model: nn.Module, folder: Path) -> Path:
    """The model as it comes from a hub: config, weights, and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(N_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in np.random.default_rng(0).integers(N_WORDS, size=N_TOKENS)))
    return path


def arguments(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    routing.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(*words: object) -> int:
    return routing.run(arguments(*words))


def token_ids(text: Path) -> list[int]:
    return [int(word[1:]) + 4 for word in text.read_text().split()]


# Selections worked out from the numbers a router sees, one token after the other


def largest(scores: list[float], top_k: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda expert: -scores[expert])[:top_k])


def by_logits(router: nn.Module, hidden: list[float], top_k: int) -> set[int]:
    """Softmax keeps the order, so the largest logits are selected; gpt-oss has a bias in them."""
    weight, bias = router.weight.tolist(), getattr(router, "bias", None)
    logits = [math.fsum(w * x for w, x in zip(row, hidden, strict=True)) for row in weight]
    return largest([a + b for a, b in zip(logits, bias.tolist(), strict=True)] if bias is not None else logits, top_k)


def by_groups(router: nn.Module, hidden: list[float], top_k: int) -> set[int]:
    """DeepSeek-V3: sigmoid plus bias; the 2 of 4 groups whose two best experts sum highest; the best of their experts.

    `arXiv 2412.19437, section 2.1.2, with the node-limited routing of its released code.`
    """
    logits = [math.fsum(w * x for w, x in zip(row, hidden, strict=True)) for row in router.weight.tolist()]
    bias = router.e_score_correction_bias.tolist()
    scores = [1 / (1 + math.exp(-logit)) + b for logit, b in zip(logits, bias, strict=True)]
    groups = [sum(sorted(scores[4 * g : 4 * g + 4])[-2:]) for g in range(4)]
    kept = largest(groups, 2)
    return largest([score if e // 4 in kept else -math.inf for e, score in enumerate(scores)], top_k)


def slow_counts(family: str, model: nn.Module, ids: list[int]) -> np.ndarray:
    """Counts `[step, layer, expert]`: what each router is shown, caught here, and the rules above."""
    _, n_experts, top_k, places = FAMILIES[family]
    rule = by_groups if family == "deepseek_v3" else by_logits
    routers = [m for name, m in model.named_modules() if name.endswith((".gate", ".router"))]
    assert len(routers) == len(places)
    shown: list[list[list[float]]] = [[] for _ in routers]
    for router, rows in zip(routers, shown, strict=True):
        router.register_forward_pre_hook(
            lambda module, args, rows=rows: rows.extend(args[0].reshape(-1, args[0].shape[-1]).tolist())
        )
    counts = np.zeros((-(-len(ids) // STEP_TOKENS), len(routers), n_experts), dtype=np.int64)
    for step in range(len(counts)):
        for rows in shown:
            rows.clear()
        with torch.no_grad():
            model(torch.tensor([ids[step * STEP_TOKENS : (step + 1) * STEP_TOKENS]]))
        for layer, (router, rows) in enumerate(zip(routers, shown, strict=True)):
            for hidden in rows:
                for expert in rule(router, hidden, top_k):
                    counts[step, layer, expert] += 1
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_is_what_the_model_selects(family: str, tmp_path: Path, text: Path) -> None:
    folder, out = save(tiny(family), tmp_path / "model"), tmp_path / "counts.npz"
    assert run("--model", folder, "--text", text, "--out", out, "--step-tokens", STEP_TOKENS, "--device", "cpu") == 0
    _, n_experts, top_k, places = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    expected = slow_counts(family, model, token_ids(text))
    with np.load(out) as arrays:
        assert sorted(arrays) == ["counts", "layers", "n_tokens", "top_k"]
        assert arrays["counts"].tolist() == expected.tolist()
        assert arrays["layers"].tolist() == places
        assert arrays["n_tokens"].tolist() == [20, 20, 10]
        assert int(arrays["top_k"]) == top_k
        assert (arrays["counts"].sum(axis=2) == arrays["n_tokens"][:, None] * top_k).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["counts.npz", "model"]
    assert read_shares(str(out)).shape == (len(places), n_experts)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_selections_are_the_largest_of_the_routers_logits(family: str, text: Path) -> None:
    # These families return their logits, an oracle that needs no hook at all.
    model, ids = tiny(family), torch.tensor([token_ids(text)])
    _, n_experts, top_k, places = FAMILIES[family]
    recorded = selections.record(model, [ids], n_experts, top_k, lambda: None)
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    for place in range(len(places)):
        expected = np.bincount(logits[place].topk(top_k).indices.ravel(), minlength=n_experts)
        assert recorded.counts[0, place].tolist() == expected.tolist()


def test_the_bias_and_groups_of_deepseek_matter_in_this_test() -> None:
    # Otherwise the test above could not tell the selection from the largest logits.
    model, rng = tiny("deepseek_v3"), np.random.default_rng(1)
    router = model.model.layers[1].mlp.gate
    rows = rng.normal(size=(40, 32)).tolist()
    assert sum(by_groups(router, row, 3) != by_logits(router, row, 3) for row in rows) > 10


# Blocks that show their selection in other ways; made up here


class LogitsOnly(nn.Module):
    """As transformers 4 had them: the gate is a plain matrix, the selection a local variable."""

    def __init__(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 6, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.select = select
        self.chosen: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.chosen.append(self.select(self.gate(hidden)))
        return hidden


class FedExperts(nn.Module):
    """The selection is seen only where it enters the experts, by name."""

    class Experts(nn.Module):
        def forward(self, hidden: torch.Tensor, *, top_k_index: torch.Tensor) -> torch.Tensor:
            return hidden + top_k_index.sum()

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 6, bias=False)
        self.experts = self.Experts()
        self.chosen: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.chosen.append(self.router(hidden).argsort(dim=-1)[..., -2:])
        return self.experts(hidden, top_k_index=self.chosen[-1])


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module, unused: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.layers = nn.ModuleList(blocks)
        self.unused = unused

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.layers:
            hidden = block(hidden)
        return hidden


WINDOWS = torch.arange(25)[None].split(10, dim=1)


def record(model: nn.Module, top_k: int = 2) -> selections.Recorded:
    return selections.record(model, WINDOWS, 6, top_k, lambda: None)


def two_stage(logits: torch.Tensor) -> torch.Tensor:
    """Several calls of topk: the last one over experts counts, not an earlier draft nor one over something else."""
    torch.topk(-logits, 2)
    chosen = torch.topk(input=logits, k=2, dim=-1, sorted=False).indices
    logits[..., :3].topk(2, dim=-1)
    return chosen


@pytest.mark.parametrize(
    "make", [lambda: LogitsOnly(two_stage), lambda: LogitsOnly(lambda x: x.topk(2)[1]), FedExperts]
)
def test_selections_inside_a_layer_are_found(make: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    model = Model(nn.Identity(), make(), make())
    recorded = record(model)
    assert recorded.layers.tolist() == [1, 2]
    assert recorded.n_tokens.tolist() == [10, 10, 5]
    for place, layer in enumerate((1, 2)):
        chosen = model.layers[layer].chosen[1:]  # the first window is looked at twice
        for step in range(3):
            expected = np.bincount(chosen[step].ravel(), minlength=6)
            assert recorded.counts[step, place].tolist() == expected.tolist()
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_top_1_routers_may_leave_the_last_dimension_out() -> None:
    class Top1Router(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = super().forward(hidden.reshape(-1, 8))
            return logits.argmax(dim=-1), logits

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routing = Top1Router(8, 6)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.routing(hidden)
            return hidden

    assert record(Model(Block()), top_k=1).counts.sum(axis=2).tolist() == [[10], [10], [5]]


def test_layers_that_do_not_run_are_left_out() -> None:
    model = Model(FedExperts(), unused=FedExperts())
    assert len(selections.moe_layers(model, 6)) == 2
    assert record(model).layers.tolist() == [0]
    with pytest.raises(InputError, match="no MoE layer of the model ran"):
        record(Model(nn.Identity(), unused=FedExperts()))
    with pytest.raises(InputError, match="no router of 6 experts"):
        record(Model(nn.Identity()))
    with pytest.raises(InputError, match="no router of 6 experts"):  # a gate of another size, such as a shared expert's
        record(Model(nn.ModuleDict({"gate": nn.Linear(8, 1)})))


@pytest.mark.parametrize(
    ("select", "words"),
    [
        (lambda x: x.argsort(dim=-1)[..., -2:], r"module layers\.0\.gate shows the selections of 0 tokens of 10, exp"),
        (lambda x: x[:, :5].topk(2).indices, r"module layers\.0\.gate shows the selections of 5 tokens of 10, expec"),
        (lambda x: x.topk(3).indices, r"selections of 0 tokens of 10, expected 2 of 6 experts for each"),
    ],
)
def test_selections_that_cannot_be_accounted_for_are_refused(select: Callable[..., Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        record(Model(LogitsOnly(select)))


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([[0, 0]], r"module layers\.0\.router selects an expert twice for one token, expected 2 different ones"),
        ([[6, 1]], r"module layers\.0\.router selects experts 1 to 6, expected 0 to 5"),
        ([[-1, 1]], r"module layers\.0\.router selects experts -1 to 1, expected 0 to 5"),
    ],
)
def test_impossible_selections_are_refused(indices: list[list[int]], words: str) -> None:
    class Router(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(hidden), torch.tensor(indices * hidden.numel().__floordiv__(8))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = Router(8, 6)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.router(hidden)
            return hidden

    with pytest.raises(InputError, match=words):
        record(Model(Block()))


# The command


def test_no_network_is_needed_and_nothing_is_printed_but_progress(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    out = tmp_path / "counts.npz"
    assert run("--model", mixtral, "--text", text, "--out", out, "--tokens", 30, "--dtype", "bfloat16") == 0
    with np.load(out) as arrays:
        assert arrays["n_tokens"].tolist() == [30]
    printed = capfd.readouterr()
    assert not printed.out
    assert f"{out}: 1 steps, 3 layers, 8 experts, top-2, 30 tokens" in printed.err
    assert len(printed.err.splitlines()) <= 3
    content = out.read_bytes()
    for secret in (str(mixtral), str(text), str(tmp_path), socket.gethostname()):
        assert secret.encode() not in content


def test_an_interrupt_leaves_what_was_there(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "counts.npz"
    out.write_bytes(b"old")
    command = ("--model", mixtral, "--text", text, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(selections, "record", interrupted)
        assert run(*command) == 130
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", lambda file, **_: file.write(b"half") and interrupted())
        assert run(*command) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["counts.npz"]
    assert out.read_bytes() == b"old"
    assert run(*command) == 0
    assert routing_keys(out) == ["counts"]


def test_a_failing_model_is_one_sentence(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_args: object, **_settings: object) -> None:
        raise RuntimeError("\nCUDA error: no kernel image\nfor this device")

    monkeypatch.setattr(selections, "record", broken)
    with pytest.raises(InputError, match=r"^the model cannot read 512 tokens on cpu: CUDA error: no kernel image$"):
        run("--model", mixtral, "--text", text, "--out", tmp_path / "a.npz", "--device", "cpu", "--tokens", 9)


def test_what_cannot_be_used_is_said_in_a_sentence(mixtral: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "counts.npz"
    empty, latin, dense = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "dense"
    long = tmp_path / "long.txt"
    long.write_text("w1 " * 65)
    empty.write_text(" \n")
    latin.write_bytes(b"caf\xe9")
    dense.mkdir()
    transformers.LlamaConfig(**SIZES).save_pretrained(dense)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "of-tomorrow"}')
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    for file in mixtral.iterdir():
        if file.suffix != ".safetensors":
            (hollow / file.name).write_bytes(file.read_bytes())
    model = ("--model", mixtral, "--out", out)
    for command, words in (
        (("--model", "someone/model", "--text", text, "--out", out), "expected a local folder with config.json in it"),
        (("--model", unknown, "--text", text, "--out", out), "no usable config.json: .*of-tomorrow"),
        (("--model", dense, "--text", text, "--out", out), "not a model with experts that can be recorded"),
        (("--model", hollow, "--text", text, "--out", out), "no usable weights: "),
        (model, "--text is missing"),
        ((*model, "--text", tmp_path / "none.txt"), "none.txt: expected a UTF-8 text"),
        ((*model, "--text", latin), "latin.txt: expected a UTF-8 text"),
        ((*model, "--text", empty), "there are no words in it"),
        ((*model, "--text", long), "--step-tokens is 512, and the model has 64 positions"),
        ((*model, "--text", text, "--steps", 3), "--steps belongs to --synthetic"),
        (("--model", mixtral, "--text", text, "--out", tmp_path / "counts.npy"), "ends in .npz"),
        (("--model", mixtral, "--text", text, "--out", tmp_path / "none" / "a.npz"), "there is no folder"),
        (("--synthetic", "temporal", "--out", out), "--shape is missing"),
        (("--synthetic", "zeta", "--shape", "olmoe", "--out", out), "unknown routing 'zeta'"),
        (("--synthetic", "temporal", "--shape", "none", "--out", out), "unknown shape 'none'"),
        (("--synthetic", "temporal", "--shape", "olmoe", "--out", out, "--text", text), "--text belongs to --model"),
        (("--synthetic", "temporal", "--shape", "olmoe", "--out", out, "--seed", -1), "--seed is -1"),
        (("--synthetic", "temporal", "--shape", "olmoe", "--out", out, "--steps", 10**7), "expected at most"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            run(*command)
        assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_tokenizer_of_another_model_is_refused(mixtral: Path, text: Path, tmp_path: Path) -> None:
    # On a GPU an index outside the embedding would end the process.
    small = save(tiny("mixtral"), tmp_path / "small")
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MixtralConfig(**{**SIZES, "vocab_size": 40}, num_local_experts=8, num_experts_per_tok=2)
    )
    model.save_pretrained(small)
    with pytest.raises(InputError, match=r"the tokenizer makes token \d\d, and the model knows 40 tokens"):
        run("--model", small, "--text", text, "--out", tmp_path / "counts.npz")


def test_missing_packages_are_named(mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(MissingExtraError, match=r"needs transformers: pip install 'perfmodel\[routing\]'"):
        run("--model", mixtral, "--text", text, "--out", tmp_path / "counts.npz")


def test_a_gpu_that_is_not_there_is_said(mixtral: Path, text: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="finds no CUDA device here; use --device cpu"):
        run("--model", mixtral, "--text", text, "--out", tmp_path / "counts.npz", "--device", "cuda")


def test_memory_is_looked_at_before_a_model_is_read(
    mixtral: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing.machine, "available_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"the model takes \d+ bytes, and 1000 bytes of memory are free"):
        run("--model", mixtral, "--text", text, "--out", tmp_path / "counts.npz")


def test_synthetic_files_have_the_layers_of_their_model(tmp_path: Path) -> None:
    out = tmp_path / "counts.npz"
    command = ("--synthetic", "temporal:3", "--shape", "olmoe", "--steps", 5, "--tokens", 32, "--out", out)
    assert run(*command) == 0
    with np.load(out) as arrays:
        first = arrays["counts"]
        assert first.shape == (5, 16, 64)
        assert (first.sum(axis=2) == 32 * 8).all()
        assert arrays["n_tokens"].tolist() == [32] * 5
        assert arrays["layers"].tolist() == list(range(16))
        assert int(arrays["top_k"]) == 8
    assert run(*command) == 0
    with np.load(out) as arrays:
        assert (arrays["counts"] == first).all()
    assert run(*command, "--seed", 1) == 0
    with np.load(out) as arrays:
        assert (arrays["counts"] != first).any()
    assert layer_shares(f"{out}@15").shape == (1, 64)


def test_the_arguments_load_without_torch() -> None:
    code = (
        "import argparse, sys\nfrom collectors import routing\nrouting.add_arguments(argparse.ArgumentParser())\n"
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
