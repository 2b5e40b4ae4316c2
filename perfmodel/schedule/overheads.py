"""What a schedule costs beside the work itself: launches, starts of collectives, padding, pieces, lost processors."""

from dataclasses import dataclass

from perfmodel.errors import InputError

SCHEDULES = ("bulk", "chunked", "fused")


@dataclass(frozen=True)
class Overheads:
    """The overheads of one engine's schedule.

    `n_launches` kernels of a layer pass, each of which the host needs `host_launch_ns` to launch; `collective_ns` is
    the start of one collective beside the link's alpha (synchronising, its kernel's launch). `n_chunks` pieces pipeline
    a layer. `comm_sm_frac` is the share of processors that communication kernels hold. `capacity_factor` pads what each
    GPU has for each expert to this multiple of the even share, and drops rows beyond it; 0 pads to the fullest, so that
    nothing is dropped; null sends and computes rows alone. With `once_per_gpu` a token goes once to each GPU that has
    any of its experts, and one partial sum of its rows comes back (DeepEP's kernels for training and prefill); else
    each row goes by itself. `work_factor` is how many times longer than the model says
    all work of phases takes: what a measured engine adds that nothing here explains. The fused schedule knows neither
    collectives nor capacity, and sends rows. Raises InputError for values that make no sense.
    """

    n_launches: int
    host_launch_ns: float = 5_000.0
    collective_ns: float = 20_000.0
    n_chunks: int = 1
    comm_sm_frac: float = 0.0
    capacity_factor: float | None = None
    work_factor: float = 1.0
    once_per_gpu: bool = False

    def __post_init__(self) -> None:
        low = {"n_launches": 0, "host_launch_ns": 0, "collective_ns": 0, "n_chunks": 1, "comm_sm_frac": 0}
        for name, least in low.items():
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not self.comm_sm_frac < 1 or not self.work_factor > 0 or (self.capacity_factor or 0) < 0:
            raise InputError(
                f"comm_sm_frac {self.comm_sm_frac}, work_factor {self.work_factor}, capacity_factor "
                f"{self.capacity_factor}: expected below 1, above 0, and null or at least 0"
            )
        if self.once_per_gpu and self.capacity_factor is not None:
            raise InputError(
                f"capacity_factor is {self.capacity_factor}, and tokens that are sent once to each GPU are not padded "
                "to a capacity of experts: expected null"
            )


# Launches: Megatron-CUTLASS, COMET, FlashMoE (arXiv 2506.04667 Table 1, two A100, 32 experts each). Assumed: the host's
# 5 us for a kernel that a framework launches, 20 us to start a collective, 4 chunks, 20 of 132 processors for
# communication (DeepEP's default).
DEFAULTS = {
    "bulk": Overheads(n_launches=85, capacity_factor=0.0),
    "chunked": Overheads(n_launches=33, n_chunks=4, comm_sm_frac=20 / 132),
    "fused": Overheads(n_launches=1, collective_ns=0.0),
}


def overheads_of(schedule: str) -> Overheads:
    """The default overheads of a schedule; raises InputError listing the valid names."""
    if schedule not in DEFAULTS:
        raise InputError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    return DEFAULTS[schedule]
