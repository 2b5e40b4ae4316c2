"""How many layers can the latency model evaluate in a second, and how long does a fit take?

    python benchmarks/predict.py [--repeats 5] [--experts 128] [--batch 4096] [--table PATH]

One core: threads of numerical libraries are set to one. Rates are medians over the repeats, each beside a floor taken in the
same run: one pass of numpy over as many numbers as the work has.

    resident layers       latencies of layers whose sums over experts are known, each with its own routing and sizes
    placements            slowdowns of placements of one layer from a table of costs by expert (a bit for every expert)
    placements, in full   the same by the formulas themselves: what the table saves
    fit, 2,000 rows       constants, residual, intervals; with --table an aiconfigurator moe_perf table, else made-up times
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ[name] = "1"

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from perfmodel import physics
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.physics import Counts, Work
