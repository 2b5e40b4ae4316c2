"""Commands about what there is, collecting, and the dashboard: each loads, makes one call, prints."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from perfmodel import hardware
from perfmodel.cli.shell import app, note, print_words
from perfmodel.errors import InputError, MissingExtraError


@app.command(name="list")
def list_names() -> None:
    """The names that other commands accept: hardware, shapes, routings, access modes, policies, models, captures ..."""
    from perfmodel import capture, latency, moe, offload, placement, routing
    from perfmodel.placement.export import FORMATS
    from perfmodel.placing import CACHE, OPTIMAL
    from perfmodel.placing.compare import DISPATCHED

    rows = {
        "hardware": hardware.names(),
        "shapes": moe.names(),
        "routings": [*routing.pattern_usages(), *routing.family_usages()],
        "recorded": [os.path.relpath(routing.SHIPPED)],
        "access": list(offload.ACCESS_MODES),
        "policies": list(dict.fromkeys([*placement.POLICIES, *DISPATCHED, CACHE, OPTIMAL])),
        "exports": list(FORMATS),
        "models": list(latency.shipped_models()),
        "captures": [os.path.relpath(path) for path in capture.shipped_captures()],
    }
    for title, names in rows.items():
        print_words(f"{title:10}" + f"\n{'':10}".join(names))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def collect(context: typer.Context) -> None:
    """Measure this machine: `perfmodel collect sweep --out DIR` is `python -m collectors sweep --out DIR`."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError('collecting needs torch, which is not installed: pip install "perfmodel[collect]"')
    raise typer.Exit(subprocess.call([sys.executable, "-m", _sibling("collectors"), *context.args]))


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command(name="app")
def dashboard(
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Do not open a browser window.")] = False,
    address: Annotated[str, typer.Option(help="Address to listen on; other than loopback, others can use it.")] = (
        _LOOPBACK[0]
    ),
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name by which browsers may reach it, beside localhost; may be repeated.")
    ] = None,
    base_path: Annotated[str, typer.Option(help="Path below which a proxy serves it, such as /perfmodel.")] = "",
    max_upload: Annotated[int, typer.Option(help="Largest file to upload, in MB.", min=1)] = 500,
) -> None:
    """Open the dashboard in the browser, with the shipped captures loaded; unless told, it listens on loopback only."""
    from perfmodel.readers.limits import limits_from, n_reads_from

    if importlib.util.find_spec("streamlit") is None:
        raise MissingExtraError('the dashboard needs streamlit, which is not installed: pip install "perfmodel[app]"')
    spec = importlib.util.find_spec(_sibling("app"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the dashboard's files are missing from this installation")
    script = Path(next(iter(spec.submodule_search_locations))) / "serve.py"
    limits_from(os.environ), n_reads_from(os.environ)  # one that is no number is refused here, in a sentence
    if address not in _LOOPBACK:
        note(
            f"listening on {address}: whoever reaches port {port} can use the dashboard, for it knows no users; put it "
            "behind a proxy that does (docs/deployment.md)"
        )
    hosts = [*_LOOPBACK, *(allow_host or ())]
    # Everything else is in app/.streamlit/config.toml, which Streamlit reads beside the script; what guards privacy is
    # said here again, because environment variables outrank that file. Without the name of the server Streamlit would
    # ask one on the internet for it.
    options = {
        "server.port": port,
        "server.headless": str(headless).lower(),
        "server.address": address,
        "server.baseUrlPath": base_path.strip("/"),
        "server.maxUploadSize": max_upload,
        "server.enableXsrfProtection": "true",
        "browser.serverAddress": allow_host[0] if allow_host else "localhost",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "type",
    }
    words = [f"--{name}={value}" for name, value in options.items()] + [f"--server.allowedHosts={h}" for h in hosts]
    raise typer.Exit(_go_on_as([sys.executable, "-m", "streamlit", "run", str(script), *words]))


def _go_on_as(command: list[str]) -> int:
    """Become another program, so that what stops this one stops it; where there is no such thing, wait for it."""
    if sys.platform == "win32":
        return subprocess.call(command)
    sys.stdout.flush()
    sys.stderr.flush()
    return os.execv(command[0], command)


def _sibling(name: str) -> str:
    """`app` or `collectors`: inside this package when installed from a wheel, beside it in a checkout."""
    inside = f"perfmodel.{name}"
    return inside if importlib.util.find_spec(inside) is not None else name
