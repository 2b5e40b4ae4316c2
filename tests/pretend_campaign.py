"""A whole campaign on the made-up CUDA device: tiny shapes, tiny probes, and measuring processes that are calls."""

import contextlib
import gc
import io
import json
import queue
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from collectors import (
    cli,
    machine,
    memory,
    modes,
    points,
    probes,
    probes_cuda,
    probes_host,
    probes_link,
    studies,
    system_memory,
    workers,
)
from collectors.timing import Limits
from collectors.workloads import scaled_shape
from tests import pretend_cuda

TINY = studies.Scale(
    shapes=("e8-k2-h2048-i1024", "e16-k4-h2048-i1024"), tokens=(1, 16, 32), routings=studies.SKEWS[:2], rows=(1, 9),
    n_experts=(8,), offload_shapes=("e8-k2-h2048-i1024",), offload_tokens=(1, 16), fracs=(1.0, 1 / 2),
    layer_shapes=("e8-k2-h2048-i1024",), layer_tokens=(1, 16),
)  # fmt: skip
DIVISOR = 32  # of all widths


class Interrupted(BaseException):
    """The command is interrupted while a process works."""


class Died(BaseException):
    """A measuring process is ended by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = number


def tiny_shape(name: str, dtype: str):
    """A shape with the experts of the real one and narrow."""
    whole = scaled_shape(name, dtype)
    hidden, inter = (max(16, round(n / DIVISOR / 16) * 16) for n in (whole.hidden, whole.inter))
    return scaled_shape(f"e{whole.n_experts}-k{whole.top_k}-h{hidden}-i{inter}", dtype)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and probes that take seconds on a CPU."""
    monkeypatch.setitem(studies.CUDA_SCALES, "quick", TINY)
    monkeypatch.setitem(studies.CUDA_SCALES, "standard", TINY)
    monkeypatch.setattr(studies, "scaled_shape", tiny_shape)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 1 << 18)

    def both(value: object) -> dict[str, object]:
        return dict.fromkeys(("quick", "standard"), value)

    limits = Limits(min_repeat_ns=50_000, point_ns=1_000_000, min_repeats=3, max_repeats=3)
    small = {
        probes_cuda: {"SIDES": both((64,)), "STREAM_BYTES": both(1 << 16), "BURST": 8, "N_GRAPH": 8, "WARM_S": 0.01,
                      "EXPERT_K": 64, "EXPERT_N": 64},
        probes_link: {"CORE_BYTES": 1 << 16, "COVER_BYTES": 1 << 17, "SIZES": both((1 << 12, 1 << 16)),
                      "BOTH_SIZES": both((1 << 16,)), "READ_SIZES": both((1 << 16,)), "BESIDE_EXPERT": (64, 64),
                      "LEAST_WINDOW_NS": 2_000_000},
        probes_host: {"LEAST_STREAM_BYTES": 1 << 16, "PROBE_SIDE": 64, "GEMM_SIDES": (128, 64),
                      "EXPERTS": ((64, 64),), "EXPERT_NS": both(100_000_000)},
        probes: {"BLOCK_BYTES": 1 << 14},
        memory: {"MAX_POSITIONS": 18},
        points: {"MAX_POSITIONS": 18},
        system_memory: {"STRIDE_BYTES": 1 << 16},
        modes: {"CHUNK_BYTES": 1 << 14},
        cli: {"QUICK": limits, "CUDA": limits},
    }  # fmt: skip
    for module, names in small.items():
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)


@dataclass
class Processes:
    """Measuring processes that run in this one, one after another, as the real supervisor starts them.

    `now` is the last thing begun, `codes` are the stages so far with their exit codes, `leaks` what they left behind
    that outlives their points. `on_begin` is called with each thing as it begins. `dies_of` is the signal that ends a
    process as it gives back what it has on a lost device, null when it leaves as it should.
    """

    device: pretend_cuda.PretendedCuda
    now: dict = field(default_factory=dict)
    codes: list = field(default_factory=list)
    leaks: list = field(default_factory=list)
    on_begin: Callable[[dict], None] = lambda word: None
    dies_of: int | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "Processes":
        monkeypatch.setattr(workers, "_started", self._started)
        monkeypatch.setattr(cli, "_leave_at_once", self._leave)
        monkeypatch.setattr(workers, "end", lambda process: None)
        monkeypatch.setattr(cli, "STARTED", time.monotonic())
        return self

    def _leave(self, asked):
        raise asked if self.dies_of is None else Died(self.dies_of)

    def _started(self, stage, left_s):
        said, words, n_threads = queue.Queue(), _Said(self), torch.get_num_threads()
        assert stage.wrap(["program"])[-1] == "program"
        try:
            limit = [] if left_s is None else ["--seconds", str(max(0.0, left_s))]
            cli.STARTED = time.monotonic()
            with contextlib.redirect_stdout(words):
                code = cli.main(["stage", *stage.arguments, *limit, "--out", str(stage.folder)])
        except SystemExit as ended:
            code = ended.code
        except Died as death:
            code = -death.signal
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            torch.set_num_threads(n_threads)
        gc.collect()
        if not self.device.is_lost:
            self.leaks += [words for words in self.device.driver.leaks() if "held" not in words]  # idle ones are kept
            self.leaks += [f"{n} bytes pinned" for n in self.device.pinned.values()]
        pretend_cuda.forget(self.device)
        self.codes.append((stage.arguments[0], code))
        for line in words.getvalue().splitlines():
            said.put(line)
        said.put(None)
        return types.SimpleNamespace(returncode=code, wait=lambda timeout: code), said


class _Said(io.StringIO):
    """The stdout of a process."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.processes = processes

    def write(self, words: str) -> int:
        n = super().write(words)
        if words.startswith('{"begin"'):
            self.processes.now = json.loads(words)["begin"]
            self.processes.on_begin(self.processes.now)
        return n
