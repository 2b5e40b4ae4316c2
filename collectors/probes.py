"""Probes: what is measured of a machine itself, each a record; the engine that runs one and makes its line.

A probe sets up inside `measure`, so that its buffers are gone when the next one needs the memory. It raises on what it
cannot measure (InputError says why); the caller notes that and goes on with the next.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perfmodel.errors import InputError

from . import machine, memory
from .calibration import Entry, Scalar, line, probe_key, stated
from .memory import free_host_bytes
from .studies import PRESETS
from .timing import Limits, host_clock

TORCH_DTYPES = {**memory.TORCH_DTYPES, "tf32": torch.float32, "fp16": torch.float16}
BLOCK_BYTES = 1 << 23  # random numbers drawn once; the rest of a buffer repeats them
MEMORY_FRAC = 0.5  # of what is free a probe takes at most this


@dataclass(frozen=True)
class Measured:
    """What a probe saw: ns per call of each repeat, what a call stands for (bytes, FLOPs, else 1), how it was made.

    `facts` are what else was seen meanwhile, such as clocks.
    """

    times_ns: list[float]
    per_call: float
    how: str
    facts: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Probe:
    """One thing to measure in one configuration; `quantity` is a name of perfmodel.hardware or null.

    `core` probes are few and are repeated at the end of a run, to see a machine drift.
    """

    name: str
    params: Mapping[str, Scalar]
    quantity: str | None
    unit: str
    core: bool
    measure: Callable[[Limits], Measured]

    @property
    def key(self) -> str:
        """The name of the probe and its configuration, as `calibration.key` makes it of a line."""
        return probe_key(self.name, self.params)


def probes(device: str, dtypes: Sequence[str], threads: int, preset: str) -> list[Probe]:
    """What to measure of this machine, the most important first.

    `device` computes (`cpu`, `cuda`), `dtypes` are those of the workloads, `threads` those of the CPU. Raises
    InputError on an unknown device, dtype or preset.
    """
    # The two modules need the records above.
    from . import probes_cuda, probes_host

    if preset not in PRESETS:
        raise InputError(f"the preset is {preset!r}, expected one of {', '.join(PRESETS)}")
    if device not in ("cpu", "cuda"):
        raise InputError(f"the device is {device!r}, expected cpu or cuda")
    unknown = [dtype for dtype in dtypes if dtype not in TORCH_DTYPES]
    if unknown or not dtypes:
        raise InputError(f"dtypes are {', '.join(dtypes) or 'none'}, expected some of {', '.join(TORCH_DTYPES)}")
    if device == "cuda":
        return probes_cuda.cuda_probes(dtypes, threads, preset)
    return probes_host.cpu_probes(dtypes, threads, preset)


def stated_numbers(device: str) -> dict[str, Entry]:
    """The numbers of calibration that the system tells instead of a probe: cores, last-level cache, memory."""
    found: dict[str, Entry] = {}
    memory_bytes = machine.memory_bytes()
    host = stated(memory_bytes, "memory of the machine or its control group") if memory_bytes is not None else None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["n_cores_count"] = stated(properties.multi_processor_count, "told by the driver")
        found["l2_capacity_bytes"] = stated(properties.L2_cache_size, "told by the driver")
        found["memory_capacity_bytes"] = stated(properties.total_memory, "told by the driver")
        return found if host is None else {**found, "host_capacity_bytes": host}
    found["n_cores_count"] = stated(machine.n_physical_cores(), "physical cores this process may use")
    cache_bytes = machine.last_level_cache_bytes()
    if cache_bytes is not None:
        found["l2_capacity_bytes"] = stated(cache_bytes, "last-level caches the usable cores reach, told by the kernel")
    return found if host is None else {**found, "memory_capacity_bytes": host}


def run_probe(probe: Probe, limits: Limits, run: int) -> dict[str, object]:
    """Measure one probe: its line of calibration.jsonl.

    Raises InputError, RuntimeError (torch's own, CUDA's among them), OSError or MemoryError, whatever went wrong.
    """
    began = time.perf_counter()
    try:
        with torch.inference_mode():
            found = probe.measure(limits)
    except (InputError, RuntimeError, OSError, MemoryError):
        raise
    except Exception as error:  # another torch, another driver: the other probes go on
        raise InputError(f"{type(error).__name__}: {error}") from error
    finally:
        give_back_memory()
    took_s = time.perf_counter() - began
    made = line(
        probe.name, probe.params, run, probe.quantity, probe.unit, found.times_ns, found.per_call, found.how, took_s
    )
    return made if found.facts is None else {**made, "facts": dict(found.facts)}


def give_back_memory() -> None:
    """Return torch's cached device and pinned memory, so that a probe of 1 GB does not starve what follows."""
    if not torch.cuda.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # after a lost context the probe's own error is the one to hear
        torch.cuda.empty_cache()
        empty_pinned = getattr(torch._C, "_host_emptyCache", None)
        if empty_pinned is not None:
            empty_pinned()


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run CPU kernels on so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def waited_clock(work: Callable[[], object]) -> float:
    """Wall time in ns from an idle device to the end of everything the work put there."""
    torch.cuda.synchronize()

    def all_of_it() -> None:
        work()
        torch.cuda.synchronize()

    return host_clock(all_of_it)


def need_free(n_bytes: int, device: str) -> None:
    """Raise InputError when so many bytes are more than a probe may take of what is free on the host or the device."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_host_bytes()
    if n_bytes > MEMORY_FRAC * free:
        where = "device" if device == "cuda" else "host"
        raise InputError(f"{n_bytes} bytes of {where} memory are needed, more than half of the {free} that are free")


def random_bytes(n_bytes: int, device: str = "cpu", pinned: bool = False) -> Tensor:
    """A flat buffer of bytes that are normal random numbers as bf16 and finite as fp32; every page is touched.

    Memory and links may treat zeros better than data, and GEMMs draw less power on them. Raises InputError when the
    memory is not free.
    """
    need_free(n_bytes, device)
    whole = torch.empty(n_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    whole.fill_(1)  # by all threads, each the pages it will read: they lie on the node of their reader
    block = torch.randn(BLOCK_BYTES // 2, device=device).to(torch.bfloat16).view(torch.uint8)
    for part in whole.split(BLOCK_BYTES):
        part.copy_(block.narrow(0, 0, part.numel()))
    return whole
