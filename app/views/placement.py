"""Placement: what it costs to move experts off the device."""

import frame
import loading

from perfmodel import figures, text

frame.header("Placement", "What does it cost to move these experts off the GPU, and which ones should go?")
curves = {
    f"{text.count(n)} tokens": loading.curve("gh200", "poster", "mmlu-like", n, "zero-copy", "grouped-gemm")
    for n in (64, 65_536)
}
frame.chart(figures.slowdown(curves), "Predicted slowdown against the fraction of offloaded experts")
