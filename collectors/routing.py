"""Record which experts a model selects for a text, or make such counts up, as a routing file.

A model is read from a local folder by transformers, an optional package; nothing is fetched. Neither torch nor
transformers is imported before they are needed.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perfmodel import hf_config
from perfmodel.errors import InputError, MissingExtraError, first_line
from perfmodel.routing import family_usages, pattern_usages, synthetic_counts, synthetic_steps, write_counts

from . import machine
from .progress import Progress

if TYPE_CHECKING:
    import torch

DEFAULT_TOKENS, DEFAULT_STEP_TOKENS, DEFAULT_STEPS = 16_384, 512, 16
CHARACTERS_PER_TOKEN = 64  # more than a tokenizer needs: how much of a long text is read for so many tokens
SPARE_FRAC = 0.1  # of memory, kept free for activations
INTERRUPTED = 130
MODEL_ONLY, SYNTHETIC_ONLY = ("text", "step_tokens", "device", "dtype", "trust_remote_code"), ("shape", "steps", "seed")
# Where configs that perfmodel does not know keep these numbers.
N_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k", "moe_top_k")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `collectors routing`; what `run` takes."""

    def count(words: str) -> int:
        if not words.isdecimal() or len(words) > 9 or int(words) < 1:
            raise argparse.ArgumentTypeError(f"found {words[:20]!r}, expected a whole number of at least 1")
        return int(words)

    names = ", ".join([*pattern_usages(), *family_usages()])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of a Hugging Face model with routers; nothing is fetched")
    source.add_argument("--synthetic", metavar="NAME", help=f"no model: {names}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="the routing file to write")
    parser.add_argument("--text", type=Path, help="UTF-8 text that the model reads")
    parser.add_argument(
        "--tokens", type=count, help=f"of the text, default {DEFAULT_TOKENS}; or of each synthetic step"
    )
    parser.add_argument(
        "--step-tokens", type=count, help=f"a step is a window of so many, default {DEFAULT_STEP_TOKENS}"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where the model runs, default auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default as it is stored")
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help="run the model's own code")
    parser.add_argument("--shape", metavar="NAME", help="of a synthetic file: a catalogue name or config.json")
    parser.add_argument("--steps", type=count, help=f"of a synthetic file, default {DEFAULT_STEPS}")
    parser.add_argument("--seed", type=int, help="of a synthetic file, default 0")


def run(args: argparse.Namespace) -> int:
    """Write the routing file that the arguments ask for; 0, or 130 when interrupted, and then nothing is written.

    Raises InputError for what cannot be used: arguments, model, text or output.
    """
    unused = SYNTHETIC_ONLY if args.synthetic is None else MODEL_ONLY
    for name in unused:
        if getattr(args, name) is not None:
            other = "--synthetic" if args.synthetic is None else "--model"
            raise InputError(f"--{name.replace('_', '-')} belongs to {other}")
    if args.out.suffix != ".npz" or args.out.is_dir():
        raise InputError(f"--out is {args.out.name!r}, expected a file name that ends in .npz")
    if not args.out.absolute().parent.is_dir():
        raise InputError(f"--out: there is no folder {args.out.parent}")
    try:
        words = _synthetic(args) if args.synthetic is not None else _recorded(args)
    except KeyboardInterrupt:
        print("\ncollectors: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print(f"{args.out}: {words}", file=sys.stderr)
    return 0


def _words(counts: np.ndarray, top_k: int, n_tokens: int) -> str:
    n_steps, n_layers, n_experts = counts.shape
    return f"{n_steps} steps, {n_layers} layers, {n_experts} experts, top-{top_k}, {n_tokens} tokens"


def _synthetic(args: argparse.Namespace) -> str:
    if args.shape is None:
        raise InputError("--shape is missing: name the model whose layers, experts and top-k the file has")
    shape = hf_config.resolve(args.shape)
    n_steps, n_tokens, seed = args.steps or DEFAULT_STEPS, args.tokens or DEFAULT_STEP_TOKENS, args.seed or 0
    if seed < 0:
        raise InputError(f"--seed is {seed}, expected a whole number of at least 0")
    size = n_steps * shape.n_layers * shape.n_experts
    if size > 1 << 27:
        raise InputError(f"{n_steps} steps of {args.shape} are {size} counts, expected at most {1 << 27}")
    shares = synthetic_steps(args.synthetic, n_steps, shape.n_layers, shape.n_experts, seed)
    counts = synthetic_counts(shares, n_tokens, shape.top_k, seed)
    layers = np.arange(shape.n_layers, dtype=np.int64)
    write_counts(args.out, counts, layers, shape.top_k, np.full(n_steps, n_tokens, dtype=np.int64))
    return _words(counts, shape.top_k, n_steps * n_tokens)


def _recorded(args: argparse.Namespace) -> str:
    for name, words in (("model", "the folder of a model"), ("text", "a text file")):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing: name {words}")
    if not (args.model / "config.json").is_file():
        raise InputError(f"--model {args.model}: expected a local folder with config.json in it")
    transformers = _transformers()
    from .selections import record

    device = _device(args.device or "auto")
    n_tokens, step_tokens = args.tokens or DEFAULT_TOKENS, args.step_tokens or DEFAULT_STEP_TOKENS
    trusted = bool(args.trust_remote_code)
    config = _loaded("config.json", transformers.AutoConfig, args.model, trust_remote_code=trusted)
    n_experts, top_k = _experts(args.model, config)
    token_ids = _token_ids(transformers, args.model, args.text, n_tokens, trusted)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and min(step_tokens, len(token_ids)) > longest:
        raise InputError(f"--step-tokens is {step_tokens}, and the model has {longest} positions")
    model = _model(transformers, args.model, device, args.dtype or "auto", trusted)
    embeddings = getattr(model.get_input_embeddings(), "weight", None)
    rows = None if embeddings is None else embeddings.shape[0]
    if rows is not None and int(token_ids.max()) >= rows:  # on a GPU such an index would end the process
        raise InputError(f"the tokenizer makes token {int(token_ids.max())}, and the model knows {rows} tokens")
    windows = token_ids[None].split(step_tokens, dim=1)
    progress = Progress(len(windows), 0)

    def tick() -> None:
        progress.n_done += 1
        progress.show(f"windows of {step_tokens} tokens")

    try:
        recorded = record(model, windows, n_experts, top_k, tick)
    except InputError:
        raise
    except Exception as error:  # whatever a model may raise is its own affair; the user gets a sentence
        raise InputError(f"the model cannot read {step_tokens} tokens on {device}: {first_line(error)}") from None
    finally:
        progress.close()
    write_counts(args.out, recorded.counts, recorded.layers, recorded.top_k, recorded.n_tokens)
    return _words(recorded.counts, recorded.top_k, int(recorded.n_tokens.sum()))


def _transformers() -> Any:
    """The package, told to keep off the network and quiet."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"recording needs {package}: pip install 'perfmodel[routing]'")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _device(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use --device cpu")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _loaded(what: str, factory: Any, folder: Path, **settings: object) -> Any:
    """What a factory of transformers makes of a folder; InputError with the first line of its complaint."""
    try:
        return factory.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # it raises many kinds, for unknown models, missing files and packages
        raise InputError(f"--model {folder}: no usable {what}: {first_line(error)}") from None


def _experts(folder: Path, config: Any) -> tuple[int, int]:
    """Experts of a layer and how many each token selects; InputError where the config does not say."""
    try:
        shape = hf_config.read_config(folder / "config.json")
    except InputError as error:
        text = config.get_text_config()
        n_experts, top_k = (
            next((value for key in keys if isinstance(value := getattr(text, key, None), int)), None)
            for keys in (N_EXPERTS_KEYS, TOP_K_KEYS)
        )
        if not n_experts or not top_k or not 1 <= top_k <= n_experts:
            raise InputError(f"--model {folder}: not a model with experts that can be recorded: {error}") from None
        return n_experts, top_k
    return shape.n_experts, shape.top_k


def _token_ids(transformers: Any, folder: Path, text: Path, n_tokens: int, trusted: bool) -> "torch.Tensor":
    """The first n_tokens tokens of a text, all where there are fewer, `[tokens]`."""
    import torch

    try:
        with text.open(encoding="utf-8") as file:
            words = file.read(n_tokens * CHARACTERS_PER_TOKEN)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {text}: expected a UTF-8 text: {error}") from None
    tokenizer = _loaded("tokenizer", transformers.AutoTokenizer, folder, trust_remote_code=trusted)
    found = list(tokenizer(words)["input_ids"])[:n_tokens]
    if not words.strip() or not found:
        raise InputError(f"--text {text}: there are no words in it")
    return torch.tensor(found, dtype=torch.int64)


def _model(transformers: Any, folder: Path, device: str, dtype: str, trusted: bool) -> Any:
    """The model on the device, in evaluation mode; InputError where it cannot be read or does not fit."""
    import torch

    free = machine.available_bytes()
    # By the names that transformers reads: some folders hold the same weights in another layout as well.
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    stored = sum(file.stat().st_size for file in files)
    if free is not None and stored > (1 - SPARE_FRAC) * free:
        raise InputError(f"the model takes {stored} bytes, and {free} bytes of memory are free")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    name = "dtype" if version >= (4, 56) else "torch_dtype"
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _loaded(
        "weights", transformers.AutoModelForCausalLM, folder, trust_remote_code=trusted, **{name: wanted}
    ).eval()
    if device == "cuda":  # through host memory: loading straight to the GPU would need one more package
        needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        free = torch.cuda.mem_get_info()[0]
        if needed > (1 - SPARE_FRAC) * free:
            raise InputError(
                f"the model takes {needed} bytes, and {free} bytes of GPU memory are free; use --device cpu"
            )
        try:
            model.to(device)
        except (RuntimeError, ValueError) as error:  # some quantised models refuse to be moved
            raise InputError(f"the model cannot be moved to the GPU: {first_line(error)}") from None
    return model
