"""The command line: each command loads, makes one call, prints. Data on stdout, progress and errors on stderr."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from perfmodel import __version__, fusion, hardware, report, text
from perfmodel.errors import InputError, MissingExtraError
from perfmodel.readers import read_trace
from perfmodel.trace import Trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Trace analysis and roofline performance models for MoE models whose experts do not all fit on the GPU.",
)

MAX_WHOLE = 10**12
LONG_READ_BYTES = 20 * 2**20  # reading more than this takes seconds
EXIT_BUG = 70  # none of the documented codes: a defect of ours must not read as "slower"

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Top = Annotated[str | None, typer.Option(help="Rows of each table; 10 in text and all in JSON unless given.")]
TracePath = Annotated[str, typer.Argument(help="PyTorch-profiler .json(.gz) or Nsight Systems .sqlite")]


def _print(words: str) -> None:
    sys.stdout.write(words + "\n")


def _print_json(value: Any) -> None:
    _print(json.dumps(value, indent=2, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        _print(f"perfmodel {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def analyze(
    trace: TracePath,
    hardware_name: Annotated[
        str | None, typer.Option("--hardware", help="Profile of the machine that ran it: what its link could do.")
    ] = None,
    top: Top = None,
    as_json: Json = False,
) -> None:
    """Where does the time of a trace go: coverage, launch metrics (TKLQT and friends), busy and idle time."""
    from perfmodel.analysis import analyse

    profile = hardware.hardware(hardware_name) if hardware_name else None
    n_top = _whole(top, "--top") if top else None
    found = analyse(_read(trace), profile)
    if as_json:
        _print_json(found.to_json(n_top))
    else:
        _print(report.trace_page(found, Path(trace).name, n_top or report.N_TOP, _width()))


@app.command(name="diff")
def diff_command(
    a: TracePath,
    b: Annotated[str, typer.Argument(help="The trace to compare with it.")],
    top: Top = None,
    as_json: Json = False,
) -> None:
    """What differs between two traces: launch metrics, kernel classes and operators, not kernel names."""
    from perfmodel.diff import diff

    found = diff(_read(a), _read(b))
    n_top = _whole(top, "--top") if top else report.N_TOP
    if as_json:
        _print_json(found.to_json())
    else:
        _print(report.diff_page(found, (Path(a).name, Path(b).name), n_top, _width()))


@app.command(name="fusion")
def fusion_command(
    trace: TracePath,
    lengths: Annotated[str, typer.Option(help="Chain lengths, separated by commas.")] = "2,4,8,16,32,64",
    threshold: Annotated[float, typer.Option(help="Lowest proximity score to list, 0 to 1.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Which chains of kernels always follow one another, and what fusing them would save at best."""
    wanted = [_whole(word, "--lengths") for word in lengths.split(",")]
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold is {threshold:g}, expected 0 to 1")
    loaded = _read(trace)
    by_length = fusion.fusion_table(loaded.events, wanted)
    chains = fusion.chains(loaded.events, min(wanted), threshold)
    if as_json:
        _print_json({"lengths": by_length.to_dicts(), "chains": chains.to_dicts()})
    else:
        _print(report.fusion_page(by_length, chains, Path(trace).name, _width()))


@app.command()
def export(
    trace: TracePath,
    perfetto: Annotated[str, typer.Option(help="File to write for ui.perfetto.dev: .json, or .json.gz to pack it.")],
) -> None:
    """Write the trace for a viewer, with lines added that say what waited: launch delay, queueing, idle, classes."""
    from perfmodel.perfetto import export_perfetto

    n_slices = export_perfetto(_read(trace), perfetto)
    _note(f"wrote {text.count(n_slices)} slices to {perfetto}; open it at https://ui.perfetto.dev")


@app.command()
def fit(
    captures: Annotated[list[str], typer.Argument(help="Capture folders of one machine, kernel and dtype.")],
    out: Annotated[str, typer.Option(help="Where to write the model, as JSON.")],
) -> None:
    """Fit the physical latency model to measurements and say how well it predicts shapes it has not seen."""
    from perfmodel import fitting

    if not Path(out).resolve().parent.is_dir():
        raise InputError(f"cannot write {out!r}: its folder does not exist")
    model, errors = fitting.fit_captures(captures, progress=_note)
    model.save(out)
    _print(report.fit_page(model, errors))
    _note(f"wrote {out}")


@app.command()
def predict(
    hardware_name: Annotated[
        str, typer.Option("--hardware", help="Profile name, .toml file or capture folder; `perfmodel list`.")
    ],
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json; `perfmodel list`.")],
    tokens: Annotated[str, typer.Option(help="Tokens in the batch.")],
    routing: Annotated[
        str, typer.Option(help="uniform, power-law[:EXPONENT], mmlu-like, or a counts file (FILE#KEY of an .npz).")
    ] = "uniform",
    offload: Annotated[
        str, typer.Option(help="Fraction of each layer's experts in host memory, least used first.")
    ] = "0",
    access: Annotated[str, typer.Option(help="zero-copy, copy, copy-overlap or cpu.")] = "zero-copy",
    op: Annotated[
        str, typer.Option(help="grouped-gemm (the experts alone) or moe-layer (router to combine).")
    ] = "grouped-gemm",
    model: Annotated[
        str | None, typer.Option(help="A model written by `perfmodel fit`, or the name of a shipped one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Store the weights in this dtype instead of the shape's.")] = None,
    as_json: Json = False,
) -> None:
    """What a MoE layer costs when a fraction of its experts leaves device memory, and why."""
    from perfmodel import hf_config, latency
    from perfmodel import predict as predicting
    from perfmodel.routing import routing as routing_of

    offload_frac = _fraction(offload, "--offload")
    profile = _machine(hardware_name)
    moe_shape = hf_config.resolve(shape)
    moe_shape = replace(moe_shape, dtype=dtype) if dtype else moe_shape
    batch = routing_of(routing, moe_shape.n_experts, moe_shape.top_k, _whole(tokens, "--tokens"))
    fitted = latency.load_model(model) if model else None
    result = predicting.predict(profile, moe_shape, batch, offload_frac, access, op=op, model=fitted)
    if as_json:
        _print_json(result.to_json())
    else:
        _print(
            f"{moe_shape.name} on {profile.title}, {text.count(batch.n_tokens)} tokens, {batch.name}, {access}\n"
            f"{result}"
        )


def _machine(name: str) -> hardware.HardwareProfile:
    """The machine of that name, TOML file, or capture folder."""
    if name not in hardware.names() and Path(name).is_dir():
        from perfmodel.capture import load_capture, profile_of

        return profile_of(load_capture(name))
    return hardware.hardware(name)


@app.command()
def check(
    baseline: Annotated[str, typer.Argument(help="Capture folder of the machine, driver or build as it was.")],
    candidate: Annotated[str, typer.Argument(help="Capture folder of what is to be judged.")],
    margin: Annotated[str, typer.Option(help="Slowdown that does not matter.")] = "3%",
    axis: Annotated[
        list[str] | None,
        typer.Option(help="What may differ: machine, software, kernel, settings, or with a key (software.torch)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Is the candidate slower than the baseline: exit 0 no, 1 slower, 2 bad usage, 3 not comparable."""
    from perfmodel import regression
    from perfmodel.capture import load_capture

    sides = load_capture(baseline), load_capture(candidate)
    verdicts = regression.check(*sides, _fraction(margin, "--margin"), axis or ())
    missing = {"baseline": regression.n_missing(*sides[::-1]), "candidate": regression.n_missing(*sides)}
    if as_json:
        rows = [asdict(v) for v in verdicts]
        _print_json({"slower": regression.is_slower(verdicts), "n_missing_workloads": missing, "verdicts": rows})
    else:
        _print(report.check_page(verdicts))
    for side, n_missing in missing.items():
        if n_missing:
            _note(f"{n_missing} workloads of the other capture are missing in the {side} and were not compared")
    raise typer.Exit(1 if regression.is_slower(verdicts) else 0)


@app.command()
def schedule(
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json.")],
    hardware_name: Annotated[str, typer.Option("--hardware", help="Profile with a peer link, such as h100-sxm.")],
    gpus: Annotated[str, typer.Option(help="GPUs that share the experts.")],
    tokens: Annotated[str, typer.Option(help="Tokens per GPU.")],
    as_json: Json = False,
) -> None:
    """What an expert-parallel layer costs under bulk, chunked and fused schedules (closed forms)."""
    from perfmodel import hf_config
    from perfmodel import schedule as schedules

    profile, moe_shape = hardware.hardware(hardware_name), hf_config.resolve(shape)
    rows = [
        schedules.layer_schedule(moe_shape, profile, _whole(gpus, "--gpus"), _whole(tokens, "--tokens"), name)
        for name in schedules.SCHEDULES
    ]
    if as_json:
        _print_json([asdict(row) for row in rows])
    else:
        _print(report.schedule_page(rows))


@app.command(name="list")
def list_names() -> None:
    """The names that other commands accept: hardware, shapes, routings, access modes, fitted models, captures."""
    from perfmodel import capture, latency, moe, offload, routing

    rows = {
        "hardware": hardware.names(),
        "shapes": moe.names(),
        "routings": [*(name for name in routing.PATTERNS if name != "power-law"), "power-law[:EXPONENT]"],
        "access": list(offload.ACCESS_MODES),
        "models": list(latency.shipped_models()),
        "captures": [os.path.relpath(path) for path in capture.shipped_captures()],
    }
    for title, names in rows.items():
        _print(f"{title:10}" + f"\n{'':10}".join(names))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def collect(context: typer.Context) -> None:
    """Measure this machine: `perfmodel collect sweep --out DIR` is `python -m collectors sweep --out DIR`."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError('collecting needs torch, which is not installed: pip install "perfmodel[collect]"')
    raise typer.Exit(subprocess.call([sys.executable, "-m", _sibling("collectors"), *context.args]))


@app.command(name="app")
def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.")] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Do not open a browser window.")] = False,
) -> None:
    """Open the dashboard in the browser, with the shipped captures loaded; it listens on loopback only."""
    if importlib.util.find_spec("streamlit") is None:
        raise MissingExtraError('the dashboard needs streamlit, which is not installed: pip install "perfmodel[app]"')
    spec = importlib.util.find_spec(_sibling("app"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the dashboard's files are missing from this installation")
    main_script = Path(next(iter(spec.submodule_search_locations))) / "main.py"
    # Everything else is in app/.streamlit/config.toml, which Streamlit reads beside the script; what guards privacy is
    # said here again, because environment variables outrank that file.
    options = [f"--server.port={port}", f"--server.headless={str(headless).lower()}"]
    options += ["--server.address=127.0.0.1", "--browser.gatherUsageStats=false"]
    raise typer.Exit(subprocess.call([sys.executable, "-m", "streamlit", "run", str(main_script), *options]))


def _read(path: str) -> Trace:
    """The trace in a file; a person who watches is told that a large one is being read."""
    is_long = sys.stderr.isatty() and Path(path).is_file() and Path(path).stat().st_size > LONG_READ_BYTES
    if is_long:
        sys.stderr.write(f"reading {Path(path).name} ({text.n_bytes(Path(path).stat().st_size)}) ...")
        sys.stderr.flush()
    try:
        return read_trace(path)
    finally:
        if is_long:
            sys.stderr.write("\r\x1b[K")  # the line is gone when the page comes


def _width() -> int:
    """The columns of the terminal, or those of a page that goes elsewhere."""
    return max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else report.WIDTH


def _sibling(name: str) -> str:
    """`app` or `collectors`: inside this package when installed from a wheel, beside it in a checkout."""
    inside = f"perfmodel.{name}"
    return inside if importlib.util.find_spec(inside) is not None else name


def _whole(word: str, option: str) -> int:
    try:
        number = int(word)
    except ValueError:
        raise InputError(f"{option} is {word!r}, expected a whole number") from None
    if not 1 <= number <= MAX_WHOLE:
        raise InputError(f"{option} is {word}, expected at least 1 and at most {MAX_WHOLE:,}")
    return number


def _fraction(word: str, option: str) -> float:
    try:
        return float(word[:-1]) / 100 if word.endswith("%") else float(word)
    except ValueError:
        raise InputError(f"{option} is {word!r}, expected a percentage such as 3% or a fraction such as 0.03") from None


def _note(words: str) -> None:
    sys.stderr.write(words + "\n")


def main() -> NoReturn:
    """Run the command line; a user's mistake becomes one sentence on stderr and an exit code, never a traceback."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        _note(f"perfmodel: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has left
        sys.exit(0)
    except OSError as error:
        _note(f"perfmodel: {error.strerror or error}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _note("perfmodel: interrupted")
        sys.exit(130)
    except Exception as error:
        sys.exit(_usage_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: Exception) -> int:
    """Say what is wrong with the words of a command, as typer found it; anything else is a bug and shows its trace."""
    if not hasattr(error, "format_message"):
        traceback.print_exception(error)
        return EXIT_BUG
    message = " ".join(error.format_message().split())
    if type(error).__name__ == "NoArgsIsHelpError":
        _note(error.format_message())
    else:
        _note(f"perfmodel: {message}")
    return 2
