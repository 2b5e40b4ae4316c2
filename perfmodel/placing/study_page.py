"""The page docs/placement-study.md: policies on measured routing, and a placement carried to other texts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from perfmodel import hf_config, markdown
from perfmodel.hardware import hardware
from perfmodel.predict import basis_of
from perfmodel.routing import SHIPPED, Recording, read_recording

from . import FORESEEN, OPTIMAL
from .compare import Outcome, compare, policy_names
from .question import Question
from .windows import batches

MODELS = {"olmoe": "olmoe-1b-7b__wikipedia", "mixtral-8x7b": "mixtral-8x7b__wikipedia"}
DOMAINS = ("wikipedia", "c4", "book", "arxiv", "github", "tulu")
MACHINES = (("gh200", "zero-copy"), ("gh200", "copy-overlap+cpu"), ("h100-pcie", "copy-overlap+cpu"))
BUDGETS, TOKENS = (0.25, 0.5, 0.75), (16, 512, 8192)
TRANSFER = ("gh200", "zero-copy", 16, 0.5)
LEFT_OUT = ("descending", "back-loading", FORESEEN)


def recording(key: str) -> Recording:
    """The measured counts of a model on a domain, of three of its layers, without steps."""
    return read_recording(f"{SHIPPED}#{key}")


def asked(machine: str, access: str, shape: str, key: str, n_tokens: int, resident_frac: float) -> Question:
    """One cell of the page: so many of the experts of the recorded layers may be resident."""
    profile, moe_shape = hardware(machine), hf_config.resolve(shape)
    made, _ = batches(recording(key), {n_tokens: 1.0}, moe_shape.top_k)
    n_layers = made[0].fitted.shape[1]
    capacity_bytes = resident_frac * n_layers * moe_shape.layer_bytes
    return Question(basis_of(profile, moe_shape, None), moe_shape, access, made, capacity_bytes)


def compared(machine: str, access: str, n_tokens: int) -> dict[str, dict[str, float]]:
    """Slowdown by policy and column (model and budget) in the steps that judge."""
    found: dict[str, dict[str, float]] = {}
    for shape, key in MODELS.items():
        for share in BUDGETS:
            question = asked(machine, access, shape, key, n_tokens, share)
            for one in compare(question, policy_names(question)):
                found.setdefault(one.policy, {})[f"{shape} {share:.0%}"] = one.slowdown
    return {name: row for name, row in found.items() if name not in LEFT_OUT}


def carried(policy: str) -> dict[str, dict[str, float]]:
    """Slowdown by the domain that decided and the one that judges."""
    machine, access, n_tokens, share = TRANSFER
    made = {name: asked(machine, access, "olmoe", f"olmoe-1b-7b__{name}", n_tokens, share) for name in DOMAINS}
    found: dict[str, dict[str, float]] = {}
    for decides, question in made.items():
        for judges, other in made.items():
            batch = replace(question.batches[0], held_out=other.batches[0].held_out)
            outcome: Outcome = compare(replace(question, batches=(batch,)), (policy,))[0]
            found.setdefault(decides, {})[judges] = outcome.slowdown
    return found


def page() -> str:
    """The page."""
    sections = [HEAD]
    for machine, access in MACHINES:
        sections.append(f"## {machine}, {access}")
        for n_tokens in TOKENS:
            sections += [f"{n_tokens:,} tokens:", _policies(compared(machine, access, n_tokens))]
    sections += [_transfer()]
    return "\n\n".join(map(markdown.wrapped, "\n\n".join(sections).split("\n\n"))).rstrip("\n") + "\n"


def write(docs: Path) -> None:
    """Write placement-study.md into a folder."""
    (docs / "placement-study.md").write_text(page(), encoding="utf-8")


def _policies(found: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(found.values())))
    order = sorted(found, key=lambda name: float(np.mean([found[name].get(c, np.inf) for c in columns])))
    return markdown.table(["policy", *columns], [_row(name, found[name], columns) for name in order])


def _row(name: str, values: dict[str, float], columns: Sequence[str]) -> list[str]:
    return [f"**{name}**" if name == OPTIMAL else name, *(f"{values[c]:.2f}" for c in columns)]


def _transfer() -> str:
    machine, access, n_tokens, share = TRANSFER
    found, by_use = carried(OPTIMAL), carried("uniform")
    rows = [[name, *(f"{row[other]:.2f}" for other in DOMAINS)] for name, row in found.items()]
    rows.append(["no popularity", *(f"{by_use[DOMAINS[0]][other]:.2f}" for other in DOMAINS)])
    own = np.mean([found[name][name] for name in DOMAINS])
    away = np.mean([found[a][b] for a in DOMAINS for b in DOMAINS if a != b])
    return f"""## Does a placement hold on other texts?

OLMoE on {machine}, {access}, {n_tokens} tokens, {share:.0%} of the experts resident. Rows decide, columns judge; the
last row keeps the first experts of each layer, whatever their use.

{markdown.table(["decided on", *DOMAINS], rows)}

On its own text a placement costs {own:.2f}x on average, on the others {away:.2f}x."""


HEAD = """# Policies on measured routing

Made by `python docs/regenerate.py pages`; do not edit. Slowdowns of one MoE layer against all experts resident,
predicted with default constants and the machines' published rates; nothing here was measured on a GPU.
[How they are computed](placement.md).

The routing is measured: how often OLMoE-1B-7B and Mixtral-8x7B selected each expert on about 209,000 tokens
(allenai/OLMoE), of three of their layers. There are no steps in it. Steps are drawn from the same shares for both
windows, so what is held out is only chance: whatever changes over time, and what experts do together, is not seen.
Three layers share the memory of three layers; whether some layers of the whole model would give theirs to others
cannot be told."""
