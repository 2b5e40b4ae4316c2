"""The constants of each access mode: what a machine's rates do not say of experts that live outside device memory."""

from dataclasses import dataclass

from perfmodel.physics import Prior


@dataclass(frozen=True)
class OffloadConstants:
    """What the access modes cost beyond the rates of the machine; every default is an assumption (docs/decisions/0023).

    The first three are those of PyTorch's grouped_mm on SM90: a tile of 128 rows in a cluster of two shares one read of
    the weights, so 256 rows do; how often the cache misses at the next 256 and how far experts overlap was chosen so
    that the GH200 study's two slowdowns come out, which do not identify them (docs/gh200-study.md).
    """

    reread_frac: float = 0.3  # zero-copy: how often weights are read again for each further block of rows
    reread_rows: float = 256.0  # rows that one read of the weights serves
    link_overlap_frac: float = 0.1  # zero-copy: how far experts overlap: 0 one after another, 1 pooled
    link_eff: float = 1.0  # share of the rate at which kernels read host memory
    copy_eff: float = 1.0  # share of the rate of copies
    copy_ns: float = 2000.0  # what one expert's copy costs beyond its bytes
    copy_overlap_frac: float = 1.0  # how much of a copy hides beside computing
    counts_ns: float = 15000.0  # a layer whose host must learn the counts before it can go on: reading them back
    host_eff_compute: float = 1.0  # share of the host's expert GEMM rate
    host_eff_memory: float = 1.0  # share of the host's streaming rate when reading weights
    host_expert_ns: float = 2000.0  # what one expert costs the host beyond its work
    merge_ns: float = 10000.0  # waiting for the results of the host or of memory modules and adding them
    ndp_eff: float = 1.0  # share of the near-data units' rates


ASSUMED = OffloadConstants()

PRIORS = {
    "reread_frac": Prior(0.5, 0.0, 2.0, unit=1.0),
    "reread_rows": Prior(0.7, 32.0, 1024.0),
    "link_overlap_frac": Prior(0.5, 0.0, 1.0, unit=1.0),
    "link_eff": Prior(0.1, 0.2, 1.5, anchor=True),
    "copy_eff": Prior(0.1, 0.2, 1.5, anchor=True),
    "copy_ns": Prior(1.5, 1.0, 1e6),
    "copy_overlap_frac": Prior(0.5, 0.0, 1.0, unit=1.0),
    "counts_ns": Prior(1.0, 100.0, 1e6),
    "host_eff_compute": Prior(0.3, 0.05, 3.0, anchor=True),
    "host_eff_memory": Prior(0.3, 0.05, 3.0, anchor=True),
    "host_expert_ns": Prior(1.5, 1.0, 1e7),
    "merge_ns": Prior(1.5, 1.0, 1e7),
    "ndp_eff": Prior(0.3, 0.05, 2.0),
}
