"""What commands about routing share: options that say how the recording of a word is read or drawn."""

from typing import Annotated

import typer

from perfmodel.routing.named import Hints, recording_of

__all__ = ["Hints", "Kind", "Phase", "StepTokens", "Steps", "recording_of"]

Steps = Annotated[str, typer.Option("--steps", help="Of a pattern: steps to draw.")]
StepTokens = Annotated[
    str, typer.Option("--step-tokens", help="Of a pattern, or of a file that lists tokens: tokens of each step.")
]
Kind = Annotated[
    str | None, typer.Option("--kind", help="Whether a file holds counts or the ids of selected experts: counts, ids.")
]
Phase = Annotated[str | None, typer.Option("--phase", help="Only passes of prefill or decode, where a file tells.")]
