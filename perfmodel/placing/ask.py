"""What a person asks of a placement, with all that answers it: for commands and for the dashboard."""

import re
from dataclasses import dataclass, field, replace

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.model_memory import ModelMemory
from perfmodel.moe import MoEShape
from perfmodel.placement import Placement, Tiers
from perfmodel.placement.files import PlacedModel
from perfmodel.predict import Basis, Settings, basis_of
from perfmodel.routing import Recording

from . import OPTIMAL
from .answers import ALL, Answer, answered, trade_off, with_limit
from .compare import Outcome, Progress, quietly
from .question import Question
from .room import N_STAGING, Engine, Room, room_for
from .windows import batches, passes_of

AUTO = "auto"  # the access mode is the fastest of all that the machine has
BATCH_SIZES = tuple(4**i for i in range(9))  # at which a placement is tried where a limit is asked for
_EXPERT_FRAC = re.compile(r"\s*([0-9.]+)\s*%\s*")
_MIX = re.compile(r"\s*([0-9.]+)\s*x\s*([0-9]+)\s*")
_REQUESTS = re.compile(r"\s*([0-9]+)\s*\+\s*([0-9]+)\s*")

Sizes = dict[int, float]  # passes by tokens


@dataclass(frozen=True, eq=False)
class Case:
    """A model on a machine with its routing and its memory: everything of a question but the passes.

    `access` is one mode, several, or AUTO; `later` the recording that judges (null: the later half of `recording`).
    """

    basis: Basis
    shape: MoEShape
    memory: ModelMemory
    recording: Recording
    engine: Engine
    room: Room
    access: str = AUTO
    op: str = "moe-layer"
    later: Recording | None = None
    settings: Settings = field(default_factory=Settings)
    seed: int = 1

    def question(self, sizes: Sizes, access: str | None = None) -> tuple[Question, str]:
        """The question for passes placed for together, and in words which steps decide and judge; under another access
        mode than that of the case where one is given."""
        made, words = batches(self.recording, sizes, self.shape.top_k, later=self.later, seed=self.seed)
        question = Question(
            self.basis,
            self.shape,
            access or ("zero-copy" if self.access == AUTO else self.access),
            made,
            self.room.capacity_bytes,
            self.room.host_bytes,
            self.op,
            self.settings,
            self.engine.is_per_layer,
            self.seed,
        )
        return question, words

    def answer(
        self,
        sizes: Sizes,
        policy: str = ALL,
        *,
        limit: float | None = None,
        is_pareto: bool = False,
        progress: Progress = quietly,
    ) -> Answer:
        """Policies compared for these passes; with what a limit of slowdown allows, and with slowdown by memory.

        Raises InputError as `answers.answered` does.
        """
        question, words = self.question(sizes)
        placed = answered(question, words, self.room.notes, self.engine, policy, self.access == AUTO, progress)
        if limit is not None:
            more = self.question(dict.fromkeys(BATCH_SIZES, 1.0))[0].batches
            placed = with_limit(placed, limit, more, progress)
        if is_pareto:
            placed = replace(placed, trade_off=trade_off(placed.question, placed.best.policy, progress))
        return placed


def ask(
    profile: HardwareProfile,
    shape: MoEShape,
    memory: ModelMemory,
    recording: Recording,
    engine: Engine,
    *,
    access: str = AUTO,
    op: str = "moe-layer",
    model: LatencyModel | None = None,
    later: Recording | None = None,
    residency: str | None = None,
    seed: int = 1,
) -> Case:
    """What is asked about where the experts of a model should live; its layers are those of the recording.

    Staging slots are counted where experts are copied. Raises InputError where nothing fits (`room.room_for`) and where
    the model is of another kind of device.
    """
    engine = replace(engine, n_staging=N_STAGING if access == AUTO or {"copy", "copy-overlap"} & modes(access) else 0)
    room = room_for(profile, shape, memory, engine, recording.loads.shape[1])
    basis = basis_of(profile, shape, model)
    settings = Settings(residency=residency)
    return Case(basis, shape, memory, recording, engine, room, access, op, later, settings, seed)


def modes(access: str) -> set[str]:
    """The access modes that a word names, known or not."""
    return set(access.split("+"))


def handed_over(
    question: Question,
    recording: Recording,
    memory: ModelMemory,
    tier: Tiers,
    policy: str = OPTIMAL,
    *,
    outcome: Outcome | None = None,
    windows: str = "",
    is_whole: bool = False,
) -> PlacedModel:
    """A placement of a question's layers as placement files and engines take it, with what an outcome says of it.

    Raises InputError where all layers are needed (`is_whole`) and the recording has only some.
    """
    layers = tuple(int(layer) for layer in recording.layers)
    if is_whole and len(layers) != question.shape.n_layers:
        raise InputError(
            f"an engine needs all {question.shape.n_layers} layers, {recording.name} has {len(layers)}; "
            "--out writes those that it has"
        )
    if memory.moe_layers is not None and len(layers) == len(memory.moe_layers) and layers[-1] < len(layers):
        layers = memory.moe_layers  # those of a pattern are counted among themselves
    return PlacedModel(
        Placement(policy, tier),
        question.shape,
        layers,
        memory.n_model_layers,
        {
            "hardware": question.basis.device.profile.name,
            "access": question.access,
            "windows": windows,
            "capacity_bytes": question.capacity_bytes,
            "batches": {str(b.n_tokens): b.n_passes for b in question.batches},
        },
        {}
        if outcome is None
        else {
            "slowdown": outcome.slowdown,
            "held_out_ns": outcome.held_out_ns.tolist(),
            "dispatch": outcome.dispatch,
        },
    )


def sizes_of(
    tokens: str | None, mix: str | None, requests: str | None, n_sequences: int = 1
) -> tuple[list[Sizes], int]:
    """The questions that words such as 64,4096 or 200x64,1x4096 or 512+128 mean, each as passes by tokens: one for each
    batch size, or one for a mix of passes; and the tokens of a sequence in the KV cache, 0 where nothing says.

    Raises InputError for other words, and for more than one of them.
    """
    if sum(word is not None for word in (tokens, mix, requests)) > 1:
        raise InputError("give one of --tokens, --mix and --requests")
    if requests is not None:
        match = _REQUESTS.fullmatch(requests)
        if match is None:
            raise InputError(f"--requests is {requests!r}, expected tokens of prompt and output such as 512+128")
        prompt, output = (text.whole(word, "--requests") for word in match.groups())
        return [passes_of(prompt, output, n_sequences)], prompt + output
    if mix is None:
        return [{text.whole(word.strip(), "--tokens"): 1.0} for word in (tokens or "64").split(",")], 0
    found: Sizes = {}
    for word in mix.split(","):
        match = _MIX.fullmatch(word)
        if match is None:
            raise InputError(f"--mix has {word!r}, expected passes x tokens such as 200x64")
        size = text.whole(match[2], "--mix")
        found[size] = found.get(size, 0.0) + text.number(match[1], "--mix")
    return [found], 0


def option_of(words: str) -> str:
    """The option that words about passes belong to: `tokens`, `mix` or `requests`, as `sizes_of` takes them."""
    return "requests" if "+" in words else "mix" if "x" in words else "tokens"


def with_device_memory(engine: Engine, words: str | None) -> Engine:
    """An engine that may use a size of device memory such as 40GiB, or a share of the experts such as 50% (null: all
    that the machine has); raises InputError for other words."""
    if words is None:
        return engine
    share = _EXPERT_FRAC.fullmatch(words)
    if share is None:
        return replace(engine, device_bytes=float(text.parse_bytes(words)))
    is_none = re.fullmatch(r"0+\.?0*", share[1]) is not None  # nothing resident is a question as well
    frac = 0.0 if is_none else text.number(share[1], "--hbm-budget") / 100
    if frac > 1:
        raise InputError(f"--hbm-budget is {words} of the experts, expected at most 100%")
    return replace(engine, expert_frac=frac)


def passes_in_words(sizes: Sizes) -> str:
    """The passes of one question in words."""
    return ", ".join(
        text.counted(n, "token") if n_passes == 1 else f"{text.count(n_passes)} x {text.counted(n, 'token')}"
        for n, n_passes in sizes.items()
    )
