"""What the Placement view asks its user, and what is loaded for it: model, machine, routing, passes, memory.

Everything is cached by names and digests: what comes with the project for all sessions, what was uploaded for its own.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import frame
import link
import loading
import streamlit as st
import uploads

from perfmodel import hardware, hf_config, moe, routing
from perfmodel.errors import InputError
from perfmodel.latency import LatencyModel
from perfmodel.model_memory import ModelMemory, model_memory
from perfmodel.moe import MoEShape
from perfmodel.offload import study, usable_modes
from perfmodel.placing.answers import MIXES
from perfmodel.placing.ask import AUTO, Case, Sizes, ask, modes, option_of, sizes_of, with_device_memory
from perfmodel.placing.question import Question
from perfmodel.placing.room import Engine, Room, room_for
from perfmodel.predict import OPS, Prediction, predict, slowdown_curve
from perfmodel.routing import Recording, Routing
from perfmodel.routing.named import Hints, recording_of

CONFIG_MB, ROUTING_MB = 1, 200  # of an upload
MOST_SIZES = 8  # of passes in one question
MOST_EXPERTS = 200_000  # of all layers of an uploaded model: eight times as many as any published one has
UNPACKED_BYTES = 2**31  # of the arrays in an uploaded .npz or .pt
SHIPPED_WORDS = "perfmodel/data/routing/olmoe-mixtral.npz"  # what `perfmodel list` calls it
BATCHES = ("64", "512", "4096", "65536", "524288", "64,4096", "200x64,1x4096", "512+128")
SHARE, GIB = "% of the experts", "GiB"
NO_MODEL = "none: rates of the machine"

Files = Mapping[str, Any]  # uploaded files by digest


@dataclass(frozen=True)
class Choice:
    """What was chosen, in names and numbers: the key of every cache. Digests are empty where nothing was uploaded."""

    hardware: str
    shape: str
    routing: str
    batch: str
    n_sequences: int
    budget: str
    access: str
    op: str
    model: str | None
    host_gib: float | None
    is_per_layer: bool
    n_context_tokens: int
    seed: int
    config_digest: str = ""
    routing_digest: str = ""

    @property
    def sizes(self) -> list[Sizes]:
        """The questions as passes by tokens; raises InputError for words that are none."""
        words = {"tokens": None, "mix": None, "requests": None, option_of(self.batch): self.batch}
        found = sizes_of(words["tokens"], words["mix"], words["requests"], self.n_sequences)[0]
        n_sizes = sum(len(sizes) for sizes in found)
        if n_sizes > MOST_SIZES:
            raise InputError(f"{n_sizes} sizes of a pass, expected at most {MOST_SIZES}")
        return found

    @property
    def engine(self) -> Engine:
        """The memory that was said of the engine; raises InputError for words that are no size."""
        host = None if self.host_gib is None else self.host_gib * 2**30
        engine = Engine(
            n_context_tokens=self.n_context_tokens,
            n_sequences=self.n_sequences,
            host_bytes=host,
            is_per_layer=self.is_per_layer,
        )
        return with_device_memory(engine, self.budget)

    def options(self) -> list[str]:
        """The options of `perfmodel place` that ask the same."""
        found = ["--shape", self.shape, "--routing", self.routing_name, "--hardware", self.hardware]
        found += ["--hbm-budget", self.budget, f"--{option_of(self.batch)}", self.batch, "--access", self.access]
        found += ["--op", self.op, *(["--model", self.model] if self.model else [])]
        found += ["--sequences", str(self.n_sequences)] if self.n_sequences != 1 else []
        found += ["--context", str(self.n_context_tokens)] if self.n_context_tokens else []
        found += ["--host-budget", f"{self.host_gib:g}GiB"] if self.host_gib is not None else []
        found += ["--per-layer"] if self.is_per_layer else []
        return found + (["--seed", str(self.seed)] if self.seed != 1 else [])

    @property
    def routing_name(self) -> str:
        """The routing as commands take it."""
        return f"{SHIPPED_WORDS}#{self.routing}" if is_shipped(self.routing) else self.routing


def is_shipped(name: str) -> bool:
    """Whether a routing is a key of the recording that comes with the project."""
    return name in _shipped_keys()


@st.cache_data(show_spinner=False)
def _shipped_keys() -> dict[str, int]:
    """Keys of the shipped recording with their number of experts."""
    keys = routing.routing_keys(routing.SHIPPED)
    return {key: routing.read_shares(f"{routing.SHIPPED}#{key}").shape[1] for key in keys}


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a Choice (and more) that is cached: for all sessions, or for one where a file was uploaded."""
    shared = st.cache_resource(max_entries=128, show_spinner=False)(function)
    own = st.cache_resource(scope="session", max_entries=32, show_spinner=False)(function)
    return lambda *key, files: (own if files else shared)(*key, _files=files)


def _model(config_digest: str, shape: str, _files: Files) -> tuple[MoEShape, ModelMemory]:
    if not config_digest:
        return hf_config.resolve(shape), model_memory(shape)
    with uploads.saved_file(_files[config_digest], "uploaded model/config.json") as path:
        found = hf_config.resolve(str(path))
        if found.n_layers * found.n_experts > MOST_EXPERTS:
            raise InputError(
                f"config.json has {found.n_layers:,} layers of {found.n_experts:,} experts, expected at most "
                f"{MOST_EXPERTS:,} experts in all"
            )
        return found, model_memory(str(path))


def _recording(routing_digest: str, name: str, config_digest: str, shape: str, _files: Files) -> Recording:
    moe_shape, memory = model(config_digest, shape, files=_files)
    hints = Hints(moe_shape, n_model_layers=memory.n_model_layers)
    if not routing_digest:
        return recording_of(f"{routing.SHIPPED}#{name}" if is_shipped(name) else name, hints)
    file = _files[routing_digest]
    plain = Path(file.name).name.replace("#", "_").replace("@", "_")
    refuse_bomb(plain, file.getvalue())
    with uploads.saved_file(file, plain) as path:
        return recording_of(f"{path}{name.removeprefix(file.name)}", hints)


def refuse_bomb(name: str, content: bytes) -> None:
    """Raise InputError for an archive (.npz, .pt) that is damaged or unpacks to more than memory should take."""
    if content.startswith(b"PK"):
        try:
            n_bytes = sum(one.file_size for one in ZipFile(BytesIO(content)).infolist())
        except (BadZipFile, ValueError, NotImplementedError):
            raise InputError(f"{name} is a damaged archive") from None
        if n_bytes > UNPACKED_BYTES:
            raise InputError(
                f"{name} unpacks to {n_bytes / 2**30:,.1f} GiB, expected at most {UNPACKED_BYTES / 2**30:g}"
            )


def _fitted(choice: Choice) -> LatencyModel | None:
    return None if choice.model is None else loading.models()[choice.model]


def recording(choice: Choice, files: Files) -> Recording:
    """What the router did, recorded or drawn."""
    found: Recording = _recordings(
        choice.routing_digest, choice.routing, choice.config_digest, choice.shape, files=files
    )
    return found


def batch_of(choice: Choice, n_tokens: int, files: Files) -> Routing:
    """The routing of one batch, as `perfmodel predict` has it: of a pattern, or by the shares of a recording."""
    shape, _ = model(choice.config_digest, choice.shape, files=files)
    if not choice.routing_digest and routing.is_pattern(choice.routing):
        return routing.routing(choice.routing, shape.n_experts, shape.top_k, n_tokens)
    recorded = recording(choice, files)
    return routing.batch_of(recorded.name, recorded.shares, n_tokens, shape.top_k)


def _curve(choice: Choice, access: str, n_tokens: int, _files: Files) -> list[Prediction]:
    shape, _ = model(choice.config_digest, choice.shape, files=_files)
    batch = batch_of(choice, n_tokens, _files)
    profile = hardware.hardware(choice.hardware)
    return slowdown_curve(profile, shape, batch, access, op=choice.op, model=_fitted(choice))


def _point(choice: Choice, access: str, n_tokens: int, offload_frac: float, _files: Files) -> Prediction:
    shape, _ = model(choice.config_digest, choice.shape, files=_files)
    batch = batch_of(choice, n_tokens, _files)
    profile = hardware.hardware(choice.hardware)
    fitted = _fitted(choice)
    return predict(profile, shape, batch, offload_frac, access, op=choice.op, model=fitted, explained=True)


def _case(choice: Choice, _files: Files) -> Case:
    shape, memory = model(choice.config_digest, choice.shape, files=_files)
    return ask(
        hardware.hardware(choice.hardware),
        shape,
        memory,
        recording(choice, _files),
        choice.engine,
        access=choice.access,
        op=choice.op,
        model=_fitted(choice),
        seed=choice.seed,
    )


def _question(choice: Choice, access: str, n_asked: int, _files: Files) -> tuple[Question, str]:
    found: tuple[Question, str] = case(choice, files=_files).question(choice.sizes[n_asked], access)
    return found


model = _kept(_model)
_recordings = _kept(_recording)
curve, point, case, question = _kept(_curve), _kept(_point), _kept(_case), _kept(_question)


def published(choice: Choice, n_tokens: int) -> dict[str, list[tuple[float, float]]]:
    """What was published of this very question, by source: offloaded fractions and slowdowns."""
    is_study = (choice.hardware, choice.shape, choice.routing) == (study.MACHINE, study.SHAPE, study.PATTERN)
    if not is_study or choice.config_digest or choice.routing_digest or choice.op != OPS[0]:
        return {}
    found = [(one.offload_frac, one.slowdown) for one in study.PUBLISHED if one.n_tokens == n_tokens]
    return {"published, ISC 2026 poster": found} if found else {}


def room(choice: Choice, files: Files) -> tuple[MoEShape, ModelMemory, Room]:
    """The model and the memory for all of its experts; raises InputError where they do not fit."""
    shape, memory = model(choice.config_digest, choice.shape, files=files)
    return shape, memory, room_for(hardware.hardware(choice.hardware), shape, memory, choice.engine)


def _uploaded(key: str, files: dict[str, Any], n_most_mb: int) -> str:
    """The digest of what was uploaded in a box, which joins `files`; empty for nothing, or what is too large.

    A box is empty again when its user comes back from another view: the session has what was in it until it is removed.
    """
    file = st.session_state.get(f"kept-{key}")
    if file is None:
        return ""
    if st.session_state.get(key) is None:
        frame.literal(file.name)
        if st.button("Remove", key=f"remove-{key}", icon=":material/close:"):
            del st.session_state[f"kept-{key}"]
            st.rerun()
    if file.size > n_most_mb * 10**6:
        frame.refused(
            "This file is too large:", f"{file.name} has {file.size:,} bytes, expected at most {n_most_mb} MB"
        )
        return ""
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    files[digest] = file
    return digest


def _keep(key: str) -> None:
    """What a box holds now is what its session has."""
    st.session_state[f"kept-{key}"] = st.session_state[key]


def choose() -> tuple[Choice, dict[str, Any]]:
    """The controls, in the sidebar; returns what they say and the files that were uploaded."""
    files: dict[str, Any] = {}
    with st.sidebar:
        names = moe.names()
        shape = st.selectbox("Model", names, index=names.index("poster"), key="shape", bind="query-params")
        machines = loading.offload_machines()
        machine = st.selectbox(
            "Hardware",
            machines,
            index=machines.index("gh200"),
            key="hardware",
            bind="query-params",
            help="Machines of the catalogue that have a second memory.",
        )
        batch = st.selectbox(
            "Tokens of a pass",
            BATCHES,
            index=BATCHES.index("65536"),
            key="batch",
            bind="query-params",
            accept_new_options=True,
            help="64 is one batch size; 64,4096 two, each by itself; 200x64,1x4096 a mix of passes placed for "
            "together; 512+128 requests of 512 tokens of prompt and 128 of output. Type your own.",
        )
        unit = st.segmented_control(
            "GPU memory for experts in", [SHARE, GIB], default=SHARE, required=True, key="unit", bind="query-params"
        )
        if unit == SHARE:
            share = st.slider("Experts on the GPU, %", 0.0, 100.0, 68.75, 3.125, key="share", bind="query-params")
            budget = f"{share:g}%"
        else:
            capacity = hardware.hardware(machine)["memory_capacity_bytes"] / 2**30
            size = st.number_input(
                "GPU memory the engine may use, GiB",
                0.1,
                4096.0,
                round(capacity, 1),
                key="gib",
                bind="query-params",
                help="Weights besides experts, KV cache, workspace and slots for copies are taken off first.",
            )
            budget = f"{size:g}GiB"
        usable = usable_modes(hardware.hardware(machine))
        able = [mode for mode in usable if mode != "paged"]
        accesses = [AUTO, *able, *(mix for mix in MIXES if modes(mix) <= set(able))]
        access = st.selectbox(
            "Access to offloaded experts",
            accesses,
            index=accesses.index("zero-copy") if "zero-copy" in accesses else 0,
            key="access",
            bind="query-params",
            help="auto: the fastest of all that the machine has. With a plus, several share the work.",
        )
        op = st.selectbox("What is timed", OPS, key="op", bind="query-params")
        config_digest, routing_name, routing_digest = _routing(shape, files)
        with st.expander("More"):
            fitted = st.selectbox(
                "Fitted latency model",
                [NO_MODEL, *(name for name, one in loading.models().items() if one.profile.device == "gpu")],
                key="model",
                bind="query-params",
                help="Gives intervals where it can vouch for them.",
            )
            has_host = st.toggle("Limit host memory", key="limit_host", bind="query-params")
            host_gib = st.number_input(
                "Host memory for experts, GiB",
                1.0,
                65536.0,
                256.0,
                key="host",
                bind="query-params",
                disabled=not has_host,
            )
            per_layer = st.toggle("As many resident experts in each layer", key="per_layer", bind="query-params")
            sequences = st.number_input("Sequences at a time", 1, 10**6, 1, key="sequences", bind="query-params")
            context = st.number_input("KV cache tokens each", 0, 10**8, 0, key="context", bind="query-params")
            seed = st.number_input("Seed", 1, 10**6, 1, key="seed", bind="query-params")
    choice = Choice(
        machine,
        "config.json" if config_digest else shape,
        routing_name,
        batch.strip(),
        int(sequences),
        budget,
        access,
        op,
        None if fitted == NO_MODEL else fitted,
        host_gib if has_host else None,
        per_layer,
        int(context),
        int(seed),
        config_digest,
        routing_digest,
    )
    return choice, files


def _routing(shape: str, files: dict[str, Any]) -> tuple[str, str, str]:
    """The controls of routing, and what may be uploaded: the digest of a config, name and digest of the routing."""
    catalogue = moe.shape(shape).n_experts
    patterns = [*routing.PATTERNS, *routing.FAMILIES]
    recorded = [key for key, n_experts in _shipped_keys().items() if n_experts == catalogue]
    name = st.selectbox(
        "Routing",
        [*patterns, *recorded],
        index=patterns.index("mmlu-like"),
        key="routing",
        bind="query-params",
        help="A pattern, or a recording that comes with the project; your own below.",
    )
    usage = next((u for u in (*routing.pattern_usages(), *routing.family_usages()) if u.startswith(f"{name}[")), "")
    if usage:
        argument = st.text_input(
            "Argument of the pattern",
            key="argument",
            bind="query-params",
            placeholder=usage.partition("[:")[2].rstrip("]").lower(),
            help="As in power-law:1.2 or coverage:0.9/0.65; left empty, the pattern's own.",
        ).strip()
        name = f"{name}:{argument}" if argument else name
    with st.expander("Your own model or routing"):
        st.file_uploader(
            "Model: a Hugging Face config.json",
            key="config-upload",
            max_upload_size=CONFIG_MB,
            type=["json"],
            on_change=_keep,
            args=("config-upload",),
        )
        config_digest = _uploaded("config-upload", files, CONFIG_MB)
        st.file_uploader(
            "Routing: .npz, .npy, .csv, .json, .jsonl or .pt of counts or expert ids",
            key="routing-upload",
            max_upload_size=ROUTING_MB,
            help="Not Parquet: write it as .npz, .csv or .jsonl. Nothing in a .pt file is run.",
            on_change=_keep,
            args=("routing-upload",),
        )
        routing_digest = _uploaded("routing-upload", files, ROUTING_MB)
        key = st.text_input(
            "Key and layer of the file", key="part", placeholder="counts@0", disabled=not routing_digest
        )
        st.caption("What is uploaded stays in this session; a link cannot hold it.")
    if routing_digest:
        part = key.strip()
        own = files[routing_digest].name
        name = f"{own}{part}" if not part or part.startswith("@") else f"{own}#{part}"
    return config_digest, name, routing_digest


def offered(error: InputError) -> None:
    """Say why these settings cannot be computed, and end the page."""
    frame.refused("These settings cannot be computed:", error)
    link.end()
