"""`collectors expert-parallel`: an MoE layer whose experts lie on several ranks, measured on all of them.

Started by torchrun this process is one of the ranks; otherwise it starts as many on this machine and waits for them.
Needs no torch before a rank begins.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

from perfmodel.errors import InputError, first_line

from . import ep_capture, ep_plan, machine
from .arguments import count, minutes, names, piece_counts, require_torch, routings, seed, token_counts
from .ep_plan import Request, plan
from .plan import DEVICES, DTYPES
from .workers import PACKAGE, environment, how_it_ended

RANKS = 4
FAILED, LOST, SAID_WHY = 1, 75, (2, 3)  # of a rank: for a reason of its own, another is gone, a sentence was printed
INTERRUPTED = 130
PATIENCE_S = 5.0  # for ranks to notice that another is gone, and to end when told to
LOOK_S = 0.05
LOST_WORDS = ("gloo", "nccl", "connection", "timed out", "timeout")  # what collectives say of a rank that is gone
PARENT = os.getppid()  # whoever started this process; another one once that is gone


def add_arguments(one: argparse.ArgumentParser) -> None:
    """The arguments of `collectors expert-parallel`; what `run` takes."""
    one.add_argument("--out", type=Path, help="the capture folder; the same command continues it")
    one.add_argument("--ranks", type=count("--ranks"), help=f"processes; default: those of torchrun, else {RANKS}")
    one.add_argument("--device", choices=("auto", *DEVICES), default="auto", help="auto: CUDA with a GPU for each rank")
    one.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, bfloat16 on CUDA")
    one.add_argument("--shapes", type=names, default=ep_plan.SHAPES, help="MODEL, MODEL/DIVISOR or eE-kK-hH-iI, ...")
    one.add_argument("--tokens", type=token_counts, default=ep_plan.TOKENS, help="comma list of tokens of each rank")
    one.add_argument("--routings", type=routings, default=ep_plan.ROUTINGS, help="comma list of patterns")
    one.add_argument("--routing-file", action="append", default=[], metavar="FILE[#KEY][@LAYER]",
                     help="measured counts, for shapes of as many experts; may be given again")  # fmt: skip
    one.add_argument(
        "--chunks", type=piece_counts, default=ep_plan.CHUNKS, help="tokens go in so many pieces, too: 2,4"
    )
    one.add_argument("--steps", type=count("--steps"), default=ep_plan.N_STEPS, help="timed steps of each batch")
    one.add_argument("--minutes", type=minutes, default=ep_plan.MINUTES, help="time budget; the same command goes on")
    one.add_argument("--threads", type=count("--threads"), help="CPU threads of a rank; default: cores over ranks")
    one.add_argument("--seed", type=seed, default=0, help="of draws and order")
    one.add_argument("--plan", action="store_true", help="print what would be measured and stop; needs no torch")


def is_rank() -> bool:
    """Whether this process was started as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run(args: argparse.Namespace, started: float) -> int:
    """Measure, as a rank or by starting ranks; the exit code. `started` is when the command began (monotonic seconds).

    Raises InputError for what cannot be used, before anything is started or made.
    """
    n_started = int(os.environ["WORLD_SIZE"]) if is_rank() else None
    n_ranks = args.ranks or n_started or RANKS
    if n_started not in (None, n_ranks):
        raise InputError(f"--ranks is {n_ranks}, and torchrun has started {n_started}")
    device = _device(args.device, n_ranks) if not args.plan else args.device.replace("auto", "cpu")
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    if (device, dtype) == ("cuda", "float32"):
        raise InputError("--dtype float32: grouped GEMMs on CUDA take bfloat16")
    request = Request(
        n_ranks=n_ranks, dtype=DTYPES[dtype], shapes=args.shapes, tokens=args.tokens, routings=args.routings,
        routing_files=tuple(args.routing_file), chunks=args.chunks, seed=args.seed,
    )  # fmt: skip
    batches, _ = plan(request, None)
    if args.plan:
        print("\n".join([*(batch.words for batch in batches), _total_words(batches, n_ranks, args.steps)]))
        return 0
    if args.out is None:
        raise InputError("--out is missing: name the folder of the capture")
    threads = args.threads or max(1, machine.n_physical_cores() // n_ranks)
    settings = ep_capture.settings_of(
        n_ranks=n_ranks, device=device, dtype=dtype, threads=threads, seed=args.seed, n_warm_up=ep_plan.N_WARM_UP,
        n_steps=args.steps, chunks=args.chunks, routing_files=args.routing_file,
    )  # fmt: skip
    if is_rank():
        _as_rank(args.out, request, settings, args.minutes, started)
    ep_capture.refuse_other(args.out, settings)
    return _start(args.words, n_ranks, threads)


def _total_words(batches: list[ep_plan.Batch], n_ranks: int, n_steps: int) -> str:
    return f"{len(batches)} batches on {n_ranks} ranks, {n_steps} steps each"


def _device(asked: str, n_ranks: int) -> str:
    require_torch("cuda" if asked == "cuda" else "cpu")
    if asked == "cpu":
        return asked
    import torch

    n_gpus, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", n_ranks))
    if n_gpus >= n_here:
        return "cuda"
    if asked == "cuda":
        raise InputError(f"--device cuda: {n_here} ranks need a GPU each, and {n_gpus} are here")
    return "cpu"


def _as_rank(folder: Path, request: Request, settings: dict[str, object], budget: float, started: float) -> NoReturn:
    """Be one of the ranks; one sentence for what goes wrong, unless another rank or whoever started them says it."""
    from .ep_measure import Order, work

    try:
        work(Order(folder, request, settings, budget, started, PARENT))
    except InputError as error:
        print(f"collectors: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except SystemExit as agreed:  # the first rank says why
        _leave(InputError.exit_code if agreed.code else 0)
    except (RuntimeError, OSError, MemoryError) as error:
        rank, is_first = os.environ["RANK"], os.environ["RANK"] == "0"
        if _is_lost(error):
            if is_first and ep_capture.MEETING not in os.environ:
                print("collectors: a rank is gone; the same command continues with the next batch", file=sys.stderr)
            _leave(LOST)
        print(f"collectors: rank {rank}: {first_line(error)}", file=sys.stderr)
        _leave(FAILED)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception:  # a mistake in this program, for which the others must not wait
        traceback.print_exc()
        _leave(FAILED)
    _leave(0)


def _is_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank did not answer."""
    import torch.distributed as dist

    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(w in words for w in LOST_WORDS)


def _leave(code: int) -> NoReturn:
    """End this process at once.

    Taking a process group apart waits for ranks that are gone, and aborts where its threads still hold Python objects.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(words: list[str], n_ranks: int, threads: int) -> int:
    """Start the ranks on this machine and wait for them; when one ends badly the others are ended.

    Ctrl-C is for this process, which ends the others; so it does when it is asked to end or its terminal closes.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if (sign := getattr(signal, name, None)) and signal.getsignal(sign) == signal.SIG_DFL:  # not under nohup
            signal.signal(sign, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        shared = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(n_ranks))
        shared |= {ep_capture.MEETING: str(Path(scratch) / "meeting"), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        ranks = []
        try:
            for rank in range(n_ranks):
                own = {**environment(threads), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, "-m", PACKAGE, *words]
                ranks.append(subprocess.Popen(command, env=own, start_new_session=True))
            return _watch(ranks)
        finally:
            _end(ranks)


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended or one has failed; says which, unless that one has said why.

    Ranks that lost another end first where that one hangs: then it is the one that is still there.
    """
    give_up = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, LOST)]
        if failed or None not in codes or time.monotonic() > give_up:
            break
        if LOST in codes:
            give_up = min(give_up, time.monotonic() + PATIENCE_S)
        time.sleep(LOOK_S)
    if not any(codes):
        return 0
    first = failed[0] if failed else codes.index(None if None in codes else LOST)
    code = codes[first] if failed else None
    if code in SAID_WHY:
        return code
    how = how_it_ended(code) if code else "does not answer" if None in codes else "lost the others"
    print(f"collectors: rank {first} {how}; the same command continues with the next batch", file=sys.stderr)
    return FAILED


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks that are still there: first asked, then not."""
    for ask in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for rank in ranks:
            if rank.poll() is None:
                ask(rank)
        until = time.monotonic() + PATIENCE_S
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(LOOK_S)
