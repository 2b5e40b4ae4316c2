"""The command about expert-parallel layers: it loads, asks, prints."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfmodel import report, text
from perfmodel.cli.drawing import Html, check_html, write_html
from perfmodel.cli.latency import machine_of
from perfmodel.cli.shell import Json, app, fraction, number, print_json, print_words, progress, whole, width
from perfmodel.errors import InputError

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which other commands do not need
    from perfmodel.hardware import HardwareProfile
    from perfmodel.model_memory import ModelMemory
    from perfmodel.schedule import Overheads
    from perfmodel.schedule.alternatives import Prices
    from perfmodel.schedule.question import Question

ALL, AUTO = "all", "auto"
FULL, NONE = "full", "none"
MOST_CHUNKS = 256  # more smaller pieces than any engine makes, and simulating thousands takes minutes
MOST_TOKENS = 2**20  # of more, a simulation of the fused schedule takes minutes


@app.command()
def schedule(
    shape: Annotated[str, typer.Option(help="Catalogue name or Hugging Face config.json; `perfmodel list`.")],
    hardware_name: Annotated[
        str, typer.Option("--hardware", help="Profile of the GPUs, with a peer link; `perfmodel list`.")
    ],
    gpus: Annotated[str, typer.Option(help="GPUs that share the experts.")],
    tokens: Annotated[str, typer.Option(help="Tokens on each GPU.")],
    routing: Annotated[
        str, typer.Option(help="A pattern (see `perfmodel list`), or a file of counts as FILE[#KEY][@LAYER].")
    ] = "uniform",
    layer: Annotated[
        str | None, typer.Option(help="Which layer of a file and of --map, counted from 0; the first.")
    ] = None,
    schedule_name: Annotated[
        str, typer.Option("--schedule", help="bulk, chunked, fused, several with commas, or all.")
    ] = ALL,
    gpus_per_node: Annotated[
        str | None, typer.Option(help="GPUs that the peer link joins; as the profile says.")
    ] = None,
    gpus_per_host: Annotated[
        str | None, typer.Option(help="GPUs that share the host of the profile; as it says, or a host for each.")
    ] = None,
    expert_map: Annotated[
        str | None, typer.Option("--map", help="Where experts live, as `perfmodel balance --out` writes it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A fitted latency model, or the name of a shipped one.")] = None,
    launches: Annotated[
        str | None, typer.Option(help="Kernels that the host launches: 40 for all, or bulk=85,chunked=33.")
    ] = None,
    launch_time: Annotated[str | None, typer.Option(help="The host's time for one launch; 5us.")] = None,
    capacity_factor: Annotated[
        str | None,
        typer.Option(help="Of bulk: pad to so many even shares, dropping the rest; full (to the fullest), none."),
    ] = None,
    chunks: Annotated[str | None, typer.Option(help="Pieces of a chunked layer; 4.")] = None,
    once_per_gpu: Annotated[
        bool,
        typer.Option(
            "--once-per-gpu", help="Of bulk and chunked: a token goes once to each GPU with any of its experts."
        ),
    ] = False,
    offload: Annotated[
        str | None,
        typer.Option(help="Part of each GPU's experts outside device memory; auto: what does not fit; none."),
    ] = None,
    access: Annotated[
        str | None, typer.Option(help="How offloaded experts are used; zero-copy, or see `perfmodel list`.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="The same tokens on 1,2,4,8 GPUs, what does not fit offloaded unless --offload says."),
    ] = None,
    gpu_price: Annotated[str | None, typer.Option(help="Of --compare: what one GPU costs, in any currency.")] = None,
    host_price: Annotated[str | None, typer.Option(help="Of --compare: what one host with its memory costs.")] = None,
    curves: Annotated[
        bool,
        typer.Option("--curves", help="Also where the time goes, and speed-up against batch and skew."),
    ] = False,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """What an expert-parallel layer costs under bulk, chunked and fused schedules, and what would change that."""
    from perfmodel.balance import read_map
    from perfmodel.latency import load_model
    from perfmodel.model_memory import model_memory
    from perfmodel.routing import is_pattern
    from perfmodel.schedule.alternatives import compare as compared
    from perfmodel.schedule.asked import question_of
    from perfmodel.schedule.curves import curves as along_both
    from perfmodel.schedule.pictured import picture
    from perfmodel.schedule.what_if import answer

    profile = machine_of(hardware_name)
    n_gpus, n_layer = whole(gpus, "--gpus"), _from_zero(layer or "0", "--layer")
    check_html(html)
    notes: list[str] = []
    names = _schedules(schedule_name, profile, notes)
    numbers = list(dict.fromkeys(whole(word.strip(), "--compare") for word in compare.split(","))) if compare else []
    _check_used(
        (
            "--layer",
            layer,
            "a pattern has no layers: give --routing a file, or --map",
            expert_map or not is_pattern(routing),
        ),
        ("--access", access, "nothing is offloaded: give --offload or --compare", offload or numbers),
        ("--capacity-factor", capacity_factor, "it is of bulk, which --schedule leaves out", "bulk" in names),
        ("--chunks", chunks, "it is of chunked, which --schedule leaves out", "chunked" in names),
    )
    prices = _prices(gpu_price, host_price, bool(numbers))
    chosen = None if expert_map is None else read_map(expert_map)
    question = question_of(
        profile,
        shape,
        routing,
        n_gpus,
        _at_most(tokens, "--tokens", MOST_TOKENS, " on each GPU"),
        layer=n_layer,
        model=load_model(model) if model else None,
        expert_map=chosen,
        gpus_per_node=whole(gpus_per_node, "--gpus-per-node") if gpus_per_node else None,
        gpus_per_host=whole(gpus_per_host, "--gpus-per-host") if gpus_per_host else None,
        access=_one_mode(access or "zero-copy"),
        overheads=_overheads(names, launches, launch_time, capacity_factor, chunks, once_per_gpu),
    )
    memory = model_memory(shape)
    question = replace(
        question, offload_frac=_offload_frac("0" if offload in (None, NONE) else offload, question, memory, notes)
    )
    fitted = memory if offload in (AUTO, None) else None
    try:
        alternatives = compared(question, numbers, names, fitted, prices) if numbers else []
        found = answer(question, routing, names, alternatives, notes, progress)
        pictured = picture(question, routing, names) if curves or html else None
        both = along_both(question, names, progress) if pictured else ()
    finally:
        progress("")
    words = report.schedule_page(found, width())
    if pictured:
        words += f"\n\n{report.pictured_page(pictured, both, width())}"

    def draw() -> list[tuple[Any, str]]:
        from perfmodel import figures

        return figures.schedule_figures(pictured, both) if pictured else []

    write_html(html, f"Expert-parallel schedules: {shape} on {gpus} x {hardware_name}", words, draw)
    if as_json:
        more = (
            {"pictured": pictured.to_json(), "curves": {one.along: one.to_json() for one in both}} if pictured else {}
        )
        print_json(report.schedule_json(found) | more)
    else:
        print_words(words)


def _schedules(words: str, profile: "HardwareProfile", notes: list[str]) -> list[str]:
    """The schedules of --schedule; of all, those that the machine can have."""
    from perfmodel.schedule import overheads_of
    from perfmodel.schedule.asked import possible_schedules

    if words != ALL:
        names = list(dict.fromkeys(word.strip() for word in words.split(",")))
        for name in names:
            overheads_of(name)
        return names
    able = list(possible_schedules(profile))
    if "fused" not in able:
        notes.append("fused is left out: it needs a GPU whose number of multiprocessors is known (n_cores_count)")
    return able


def _overheads(
    names: Sequence[str],
    launches: str | None,
    launch_time: str | None,
    capacity: str | None,
    chunks: str | None,
    once_per_gpu: bool,
) -> "dict[str, Overheads]":
    """The overheads of each schedule: the defaults with what the options say."""
    from perfmodel.schedule import DEFAULTS, overheads_of

    found = dict(DEFAULTS)

    def change(schedule: str, **values: Any) -> None:
        found[schedule] = replace(found[schedule], **values)

    for word in launches.split(",") if launches else ():
        name, is_named, value = word.rpartition("=")
        for one in [name.strip()] if is_named else names:
            overheads_of(one)
            if one not in names:
                raise InputError(f"--launches is of {one}, and --schedule of {', '.join(names)}")
            change(one, n_launches=_from_zero(value.strip(), "--launches"))
    for name in names if launch_time else ():
        change(name, host_launch_ns=text.parse_ns(launch_time or ""))
    if once_per_gpu:  # and nothing is padded, unless --capacity-factor says so, which is refused
        change("chunked", once_per_gpu=True)
        change("bulk", capacity_factor=None, once_per_gpu=True)
    if capacity is not None:
        said = {FULL: 0.0, NONE: None}
        change("bulk", capacity_factor=said[capacity] if capacity in said else number(capacity, "--capacity-factor"))
    if chunks is not None:
        change("chunked", n_chunks=_at_most(chunks, "--chunks", MOST_CHUNKS, ""))
    return found


def _offload_frac(words: str, question: "Question", memory: "ModelMemory", notes: list[str]) -> float:
    """What --offload says; a note where more must leave device memory, or what a whole model takes is not known."""
    from perfmodel.schedule.alternatives import fitting_frac
    from perfmodel.schedule.asked import memory_notes

    if words == AUTO:
        if "memory_capacity_bytes" not in question.profile.quantities:
            raise InputError(
                f"hardware {question.profile.name!r} has no memory_capacity_bytes: give --offload a number"
            )
        if memory.non_expert_bytes is None:
            notes.append(f"weights besides experts are not known and count as none ({'; '.join(memory.notes)})")
        return fitting_frac(question, memory)
    found = fraction(words, "--offload")
    notes += memory_notes(replace(question, offload_frac=found), memory, "--offload auto")
    return found


def _prices(gpu: str | None, host: str | None, has_numbers: bool) -> "Prices | None":
    from perfmodel.schedule.alternatives import Prices

    if gpu is None and host is None:
        return None
    if not has_numbers or gpu is None:
        raise InputError("prices compare numbers of GPUs: give --compare and --gpu-price with them")
    return Prices(number(gpu, "--gpu-price"), number(host, "--host-price") if host else 0.0)


def _one_mode(access: str) -> str:
    from perfmodel.offload import ACCESS_MODES

    if access not in ACCESS_MODES:
        raise InputError(f"--access is {access!r}, expected one of {', '.join(ACCESS_MODES)}")
    return access


def _at_most(word: str, option: str, most: int, where: str) -> int:
    found = whole(word, option)
    if found > most:
        raise InputError(f"{option} is {word}, expected at most {most:,}{where}")
    return found


def _check_used(*options: tuple[str, str | None, str, object]) -> None:
    """Refuse an option of which nothing would come: its name, what it says, why it would not, what makes use of it."""
    for name, said, why, use in options:
        if said is not None and not use:
            raise InputError(f"{name} would change nothing: {why}")


def _from_zero(word: str, option: str) -> int:
    return 0 if word == "0" else whole(word, option)
