"""Overview: what is loaded, the machine, three findings in words, the numbers that matter."""

import frame
import loading

from perfmodel import figures

frame.header("perfmodel", "Where MoE time goes, what moving experts off the GPU costs, and whether to believe it.")
name, (capture, model) = next(iter(loading.shipped().items()))
frame.chart(figures.parity(model.points_, model.errors_["model"]["all"]), "Predicted against measured latency")
