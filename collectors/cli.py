"""The command line of the collectors: check what was asked, call one function, print."""

import argparse
import importlib.util
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from perfmodel.errors import InputError
from perfmodel.routing import PATTERNS

from . import expert_parallel, machine, routing
from .arguments import Parser, count, dtypes, minutes, names, require_torch, routings, seed, token_counts
from .campaign import Order, collect, settings_of
from .design import design, point_s
from .facts import assumed_facts
from .plan import DEVICES, DTYPES, ROUTINGS, PlannedPoint, Request, default_shapes, default_tokens, read_points
from .plan import plan as grid
from .studies import PRESETS
from .timing import CUDA, FULL, QUICK, STANDARD
from .words import grid_words, plan_words, rehearsal_words
from .workers import StageError
from .workloads import file_shares

FAST_BF16 = {"avx512_bf16", "amx_bf16", "svebf16", "bf16"}
INTERRUPTED = 130
RUNS = {"quick": 1, "standard": 3, "full": 5}
STARTED = time.monotonic()
DEVICE_FILES = Path("/dev")


def _shared_options(one: argparse.ArgumentParser, device: str) -> None:
    one.add_argument("--out", type=Path, help="the capture folder; the same command continues it")
    one.add_argument("--device", choices=("auto", *DEVICES), default=device)
    one.add_argument("--threads", type=count("--threads"), help="CPU threads; default: physical cores")
    one.add_argument("--routing-file", action="append", default=[], metavar="FILE[#KEY][@LAYER]",
                     help="measured counts, for shapes of as many experts; may be given again")  # fmt: skip
    one.add_argument("--seed", type=seed, default=0, help="of draws and order")
    one.add_argument("--nsys", action="store_true", help="also profile under Nsight Systems, where it is installed")
    one.add_argument("--plan", action="store_true", help="print what would be measured and stop; needs no torch")


def parser() -> argparse.ArgumentParser:
    """The arguments; `stage` is how a collection calls its measuring processes."""
    top = Parser(prog="collectors", description="Measure MoE layers and grouped GEMMs on this machine.")
    commands = top.add_subparsers(
        dest="command", required=True, metavar="campaign|sweep|expert-parallel|routing|rehearse"
    )
    one = commands.add_parser("campaign", help="calibrate, sweep and profile this machine in the time you give it")
    _shared_options(one, "auto")
    one.add_argument("--minutes", type=minutes, default=8.0, help="time budget; more minutes later go on")
    one.add_argument("--preset", choices=PRESETS, default="standard", help="how much there is to measure at most")
    one.add_argument("--dtype", type=dtypes, help="comma list, the main one first; default: all that are fast")
    one.add_argument("--runs", type=count("--runs"), help="processes that repeat the points; default: 1, 3 or 5")
    one = commands.add_parser("sweep", help="measure a grid of your own, to its end")
    _shared_options(one, "cpu")
    one.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on the CPU, bfloat16 on CUDA")
    one.add_argument("--quick", action="store_true", help="a look in under a minute: fewer shapes, sizes and repeats")
    one.add_argument("--runs", type=count("--runs"), default=1, help="processes to repeat the whole measurement in")
    one.add_argument("--shapes", type=names, help="comma list of MODEL, MODEL/DIVISOR or eE-kK-hH-iI")
    one.add_argument("--tokens", type=token_counts, help="comma list of batch sizes in tokens")
    one.add_argument("--points", type=Path, metavar="FILE", help="measure the points that `perfmodel design` wrote")
    one.add_argument("--routings", type=routings, default=ROUTINGS, help=f"comma list of {', '.join(PATTERNS)}")
    expert_parallel.add_arguments(
        commands.add_parser("expert-parallel", help="measure a layer whose experts lie on several processes or GPUs")
    )
    one = commands.add_parser(
        "rehearse", help="run a GPU's plan on the CPU with tiny widths and check what it computes"
    )
    one.add_argument("--preset", choices=PRESETS, default="quick", help="whose plan")
    one.add_argument("--seed", type=seed, default=0, help="of draws and order")
    routing.add_arguments(
        commands.add_parser("routing", help="record which experts a model selects, as a routing file")
    )
    stage = commands.add_parser("stage")
    stage.add_argument("arguments", nargs="+")
    stage.add_argument("--out", type=Path, required=True)
    stage.add_argument("--routing-file", action="append", default=[])
    stage.add_argument("--seconds", type=float)
    return top


def _device(asked: str, is_plan: bool) -> str:
    if asked != "auto":
        return asked
    if is_plan and importlib.util.find_spec("torch") is None:
        return "cuda" if shutil.which("nvidia-smi") else "cpu"
    require_torch("cpu")
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return "cuda"
    # Minutes on a GPU machine are dear: they must not go to its CPU because torch and driver do not fit together.
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not is_plan and not is_hidden and any(DEVICE_FILES.glob("nvidia[0-9]*")):
        built = f"it is built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is built without CUDA"
        why = str(said[-1].message).splitlines()[0] if said else built
        words = f"torch {torch.__version__} cannot use the GPU of this machine ({why})"
        raise InputError(f"{words}; --device cpu measures the CPU")
    return "cpu"


def _flags() -> list[str]:
    flags = machine.machine(1)["cpu_flags"]
    assert isinstance(flags, list)
    return flags


def _has_fast_bf16() -> bool:
    return bool(FAST_BF16 & set(_flags()))


def campaign_dtypes(device: str, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The dtypes of a campaign by their torch names, the main one first."""
    if asked is None:
        if device == "cuda":
            asked = ("bfloat16", "float8_e4m3fn")
        else:
            asked = ("float32", "bfloat16") if _has_fast_bf16() else ("float32",)
    return asked


def _campaign(args: argparse.Namespace) -> int:
    device = _device(args.device, args.plan)
    dtypes = campaign_dtypes(device, args.dtype)
    runs = args.runs or RUNS[args.preset]
    limits = QUICK if args.preset == "quick" else CUDA if device == "cuda" else STANDARD
    if args.preset == "full":
        limits = FULL
    if args.plan:
        facts = assumed_facts(device, dtypes)
        points, skipped = design(facts, args.preset, args.seed, file_shares(args.routing_file))
        seconds = [point_s(point.workload, facts, limits) for point in points]
        print("\n".join(plan_words(points, seconds, args.minutes, runs, skipped)))
        return 0
    settings = settings_of(
        "campaign", device=device, dtypes=dtypes, threads=args.threads or machine.n_physical_cores(), runs=runs,
        seed=args.seed, preset=args.preset, minutes=args.minutes, limits=limits, routing_files=args.routing_file,
    )  # fmt: skip
    return _collect(args, settings, Order(settings, limits, tuple(args.routing_file), started=STARTED))


def _sweep_dtype(asked: str | None, device: str, points: Sequence[PlannedPoint]) -> str:
    """The dtype of a sweep by its torch name: that of its points where a file gives them."""
    if not points:
        return asked or ("bfloat16" if device == "cuda" else "float32")
    stored = points[0].shape.dtype
    name = next((name for name, short in DTYPES.items() if short == stored), None)
    if name is None or asked not in (None, name):
        raise InputError(f"the points are of {stored}, expected {asked or ', '.join(DTYPES.values())}")
    return name


def _sweep(args: argparse.Namespace) -> int:
    device = _device(args.device, args.plan)
    points = read_points(args.points) if args.points else ()
    if points and (args.shapes or args.tokens):
        raise InputError("--points says what is measured; --shapes and --tokens cannot be given beside it")
    request = Request(
        device=device,
        dtype=_sweep_dtype(args.dtype, device, points),
        shapes=args.shapes or default_shapes(device, args.quick),
        tokens=args.tokens or default_tokens(device, args.quick),
        routings=args.routings,
        routing_files=tuple(args.routing_file),
        seed=args.seed,
        points=points,
    )
    limits = QUICK if args.quick else FULL
    if args.plan:
        plan = grid(request, assumed_facts(device, (request.dtype,)).memory_limit_bytes)
        print("\n".join(grid_words(plan.workloads, plan.skipped, args.runs)))
        return 0
    settings = settings_of(
        "sweep", device=device, dtypes=(request.dtype,), threads=args.threads or machine.n_physical_cores(),
        runs=args.runs, seed=args.seed, preset="quick" if args.quick else "full", minutes=None, limits=limits,
        routing_files=args.routing_file, grid_of=request,
    )  # fmt: skip
    return _collect(args, settings, Order(settings, limits, request.routing_files, request))


def _collect(args: argparse.Namespace, settings: dict[str, object], order: Order) -> int:
    if args.out is None:
        raise InputError("--out is missing: name the folder of the capture")
    require_torch(str(settings["device"]))
    settings["nsys"] = args.nsys
    if settings["device"] == "cpu" and settings["dtype"] == "bfloat16" and not _has_fast_bf16():
        print("note: this processor has no bf16 instructions; bf16 will be slow", file=sys.stderr)
    collect(args.out, order)
    print(f"capture in {args.out}", file=sys.stderr)
    return 0


def _rehearse(args: argparse.Namespace) -> int:
    require_torch("cpu")
    from .rehearse import rehearse

    points, _ = design(assumed_facts("cuda", campaign_dtypes("cuda", None)), args.preset, args.seed, {})
    tried = rehearse([point.workload for point in points])
    print("\n".join(rehearsal_words(points, tried)))
    return 0 if all(is_right for _, is_right, _ in tried) else 1


def _expert_parallel(args: argparse.Namespace) -> int:
    return expert_parallel.run(args, STARTED)


def _stage(args: argparse.Namespace) -> int:
    from .stages import work

    try:
        work(args.out, args.arguments, args.routing_file, args.seconds, STARTED)
    except SystemExit as asked:  # the device is lost: what torch gives back then may abort the process
        _leave_at_once(asked)
    return 0


def _leave_at_once(asked: SystemExit) -> None:
    """End this process with the exit code that was asked for, and let nothing be taken apart."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(asked.code if isinstance(asked.code, int) else 1)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "campaign": _campaign,
    "sweep": _sweep,
    "expert-parallel": _expert_parallel,
    "routing": routing.run,
    "rehearse": _rehearse,
    "stage": _stage,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 3 for missing packages, 130 interrupted."""
    args = parser().parse_args(arguments)
    args.words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return COMMANDS[args.command](args)
    except InputError as error:
        print(f"collectors: {error}", file=sys.stderr)
        return error.exit_code
    except StageError as error:
        if error.exit_code not in (2, 3):
            print(f"collectors: {error}; the same command continues from the last point", file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 1
    except BrokenPipeError:  # nobody reads on: the collection of a measuring process was killed, or `--plan` was piped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\ncollectors: interrupted; the same command continues {args.out}", file=sys.stderr)
        return INTERRUPTED
