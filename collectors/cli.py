"""The command line of the collectors: check what was asked, call one function, print."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from perfmodel.errors import InputError, MissingExtraError
from perfmodel.routing import PATTERNS, pattern_shares

from . import machine
from .plan import DEVICES, DTYPES, ROUTINGS, Request, default_shapes, default_tokens
from .plan import plan as make_plan
from .sweep import StageError, sweep, words

MEMORY_FRAC = {"cpu": 0.25, "cuda": 0.6}  # of the machine's, or the GPU's, memory
FAST_BF16 = {"avx512_bf16", "amx_bf16", "svebf16", "bf16"}
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave with exit code 2."""
        self.exit(2, f"collectors: {message}\n")


def _count(name: str) -> Callable[[str], int]:
    def parse(words: str) -> int:
        if not words.isdecimal() or len(words) > 7 or int(words) < 1:
            raise argparse.ArgumentTypeError(f"{name} is {words[:20]!r}, expected a whole number from 1 to 9,999,999")
        return int(words)

    return parse


def _seed(words: str) -> int:
    if not words.isdecimal() or int(words) >= 2**31:
        raise argparse.ArgumentTypeError(f"the seed is {words!r}, expected a whole number of 0 to 2^31 - 1")
    return int(words)


def _names(words: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not names:
        raise argparse.ArgumentTypeError("expected names separated by commas")
    return names


def _token_counts(words: str) -> tuple[int, ...]:
    return tuple(sorted({_count("a number of tokens")(name) for name in _names(words)}))


def _routings(words: str) -> tuple[str, ...]:
    for name in _names(words):
        try:
            pattern_shares(name, 2)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return _names(words)


def parser() -> argparse.ArgumentParser:
    """The arguments; `stage` is how a sweep calls its measuring processes."""
    top = Parser(prog="collectors", description="Measure MoE layers and grouped GEMMs on this machine.")
    commands = top.add_subparsers(dest="command", required=True, metavar="sweep")
    one = commands.add_parser("sweep", help="make a capture folder, or continue one that was interrupted")
    one.add_argument("--out", type=Path, help="the capture folder; the same command continues it")
    one.add_argument("--device", choices=DEVICES, default="cpu")
    one.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on the CPU, bfloat16 on CUDA")
    one.add_argument("--quick", action="store_true", help="a look in under a minute: fewer shapes, sizes and repeats")
    one.add_argument("--runs", type=_count("--runs"), default=1, help="processes to repeat the whole measurement in")
    one.add_argument("--threads", type=_count("--threads"), help="CPU threads; default: physical cores")
    one.add_argument("--shapes", type=_names, help="comma list of MODEL or MODEL/DIVISOR, such as olmoe/4")
    one.add_argument("--tokens", type=_token_counts, help="comma list of batch sizes in tokens")
    one.add_argument("--routings", type=_routings, default=ROUTINGS, help=f"comma list of {', '.join(PATTERNS)}")
    one.add_argument("--routing-file", metavar="FILE[#KEY]", help="measured counts, for shapes of as many experts")
    one.add_argument("--seed", type=_seed, default=0, help="of draws and order")
    one.add_argument("--plan", action="store_true", help="print what would be measured and stop; needs no torch")
    stage = commands.add_parser("stage")
    stage.add_argument("stage")
    stage.add_argument("--out", type=Path, required=True)
    stage.add_argument("--routing-file")
    return top


def request_of(args: argparse.Namespace) -> Request:
    """The request the arguments make, defaults filled in."""
    return Request(
        device=args.device,
        dtype=args.dtype or ("bfloat16" if args.device == "cuda" else "float32"),
        shapes=args.shapes or default_shapes(args.device, args.quick),
        tokens=args.tokens or default_tokens(args.device, args.quick),
        routings=args.routings,
        routing_file=args.routing_file,
        seed=args.seed,
    )


def _require_torch(device: str) -> None:
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("measuring needs torch 2.9 or newer: pip install 'perfmodel[collect]' (or torch numpy)")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use --device cpu")


def memory_limit_bytes(device: str) -> float | None:
    """What a layer with its activations may take; null when the memory is unknown."""
    if device == "cuda":
        import torch

        return MEMORY_FRAC[device] * torch.cuda.get_device_properties(0).total_memory
    total = machine.memory_bytes()
    return None if total is None else MEMORY_FRAC[device] * total


def _sweep(args: argparse.Namespace) -> int:
    request = request_of(args)
    if args.plan:
        limit = memory_limit_bytes("cpu") if args.device == "cpu" else None
        print("\n".join(words(make_plan(request, limit), args.runs)))
        return 0
    if args.out is None:
        raise InputError("--out is missing: name the folder of the capture")
    _require_torch(args.device)
    if request.dtype == "bfloat16" and args.device == "cpu" and not FAST_BF16 & set(_flags()):
        print("note: this processor has no bf16 instructions; bf16 will be slow", file=sys.stderr)
    threads = args.threads or machine.n_physical_cores()
    limit = memory_limit_bytes(args.device)
    sweep(args.out, request, threads=threads, quick=args.quick, runs=args.runs, memory_limit_bytes=limit)
    print(f"capture in {args.out}", file=sys.stderr)
    return 0


def _flags() -> list[str]:
    flags = machine.machine(1)["cpu_flags"]
    assert isinstance(flags, list)
    return flags


def _stage(args: argparse.Namespace) -> int:
    from .stages import work

    try:
        work(args.out, args.stage, args.routing_file)
    except BrokenPipeError:  # the sweep was killed: leave as quietly, the point at hand is on disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 3 for missing packages, 130 interrupted."""
    args = parser().parse_args(arguments)
    try:
        return _stage(args) if args.command == "stage" else _sweep(args)
    except InputError as error:
        print(f"collectors: {error}", file=sys.stderr)
        return error.exit_code
    except StageError as error:
        if error.exit_code not in (2, 3):
            print(f"collectors: {error}; the same command continues from the last point", file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 1
    except KeyboardInterrupt:
        print(f"\ncollectors: interrupted; the same command continues {args.out}", file=sys.stderr)
        return INTERRUPTED
