"""What does a runtime or driver call do: start device work, wait for the device, or neither."""

import re
from functools import lru_cache

# Calls that start device work: kernels, graphs, copies and sets, under the names of CUDA, HIP, MTIA, SYCL (ur, pi) and
# Level Zero (ze). Building or editing a graph and launching a host function start nothing on a device.
_LAUNCH = re.compile(
    r"launch(?!hostfunc)|mem(?:cpy|set)(?!node|.*node)|memoryco?py|memory(?:copy|fill)|memprefetch|runfunction", re.I
)
# Calls in which the host waits until the device has done something; cudaStreamWaitEvent makes only a stream wait.
_SYNC = re.compile(r"synchronize|^(?:ur|pi)events?wait|queuefinish", re.I)


@lru_cache(maxsize=4096)
def api_kind(name: str) -> str:
    """Which kind of EVENTS is a call of this name: `sync`, `launch`, or `call` for any other."""
    if _SYNC.search(name):
        return "sync"
    return "launch" if _LAUNCH.search(name) else "call"
