"""Under which circumstances a capture was taken: settings of the machine, how steady its runs are, what is missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy import special

from perfmodel import text
from perfmodel.capture import Capture
from perfmodel.plausible import ERROR, Finding
from perfmodel.regression.evidence import Evidence, of_capture
from perfmodel.regression.spread import OVERALL, Mean, means_of
from perfmodel.regression.verdicts import DEFAULT_MARGIN_FRAC, NO_CHANGE_LEVEL, n_more_runs

from .items import FACTS, HEALTHY, OPEN, STEADINESS, Item, judged, number, words_of

RARE = 0.01  # a spread so unlikely beside that of shipped captures deserves a look
N_SHOWN = 3  # reasons, findings and keys that an item names
GOVERNORS = ("powersave", "conservative", "ondemand")  # do not hold the clock up while little is to do
HELD_DOWN = ("application clocks", "display clocks")  # somebody's setting, not heat, power or idleness

# Items that rest on the findings of perfmodel.plausible: section, name, rules, words where there is none, next steps.
BY_FINDINGS: tuple[tuple[str, str, tuple[str, ...], str, tuple[str, ...]], ...] = (
    (
        FACTS,
        "throttling",
        ("throttling",),
        "no slowdown by heat or by the board was told",
        ("cooling, power supply and power brake: nvidia-smi -q -d PERFORMANCE,TEMPERATURE",),
    ),
    (
        STEADINESS,
        "repeats within a run",
        ("errors", "constant times"),
        "the error of most points is as small as was asked for",
        ("other load on the machine; a longer --minutes budget",),
    ),
    (
        STEADINESS,
        "other processes",
        ("disturbed",),
        "few points or none were disturbed by other processes",
        ("what else ran: top, nvidia-smi pmon; measure again on an idle machine",),
    ),
    (
        STEADINESS,
        "calibration between runs",
        ("scatter", "drift"),
        "the calibrated numbers are the same in each run",
        ("clocks, power cap and temperature over the runs; other load; a neighbour on the same host",),
    ),
    (
        STEADINESS,
        "runs of a workload",
        ("runs apart",),
        "no run of a workload is several times slower than another",
        ("the workloads and runs named by `perfmodel captures check`; other load at that time",),
    ),
)
IN_ITEMS = {rule for _, _, rules, _, _ in BY_FINDINGS for rule in rules}


def fact_items(capture: Capture, findings: Sequence[Finding]) -> list[Item]:
    """The settings of the machine and its software that cost speed, what could not be seen or measured, and whether the
    numbers can be believed (`plausible.check_capture`)."""
    machine = capture.manifest["machine"]
    is_gpu = capture.manifest["settings"]["device"] == "cuda"
    items = [_believable(findings)]
    items += (
        [*_gpu_settings(machine), *_by_findings(FACTS, findings)]
        if is_gpu
        else _cpu_settings(machine, capture.manifest)
    )
    return [*items, _host(machine), *_not_seen(capture, is_gpu)]


def _believable(findings: Sequence[Finding]) -> Item:
    wrong = [one for one in findings if one.severity == ERROR or (one.group == "physics" and one.rule not in IN_ITEMS)]
    well = "no rate or time is impossible, and what must be ordered is"
    steps = ("`perfmodel captures check` names each; the collector's clock and the manifest",)
    return judged(FACTS, "believable numbers", _first([one.sentence for one in wrong]), well, steps)


def _by_findings(section: str, findings: Sequence[Finding]) -> list[Item]:
    return [
        judged(section, name, _first([one.sentence for one in findings if one.rule in rules]), well, steps)
        for of, name, rules, well, steps in BY_FINDINGS
        if of == section
    ]


def _first(sentences: Sequence[str]) -> str | None:
    """The first of some sentences and how many more there are, null for none."""
    if not sentences:
        return None
    more = f", and {len(sentences) - 1} more" if len(sentences) > 1 else ""
    return text.shortened(sentences[0], 160) + more


def _gpu_settings(machine: Mapping[str, Any]) -> list[Item]:
    seen = machine.get("under_load")
    seen = seen if isinstance(seen, dict) else {}
    return [_power(machine, seen), _link(machine, seen), _clocks(machine, seen), _modes(machine)]


def _power(machine: Mapping[str, Any], seen: Mapping[str, Any]) -> Item:
    limit, default = number(machine.get("power_limit_watts")), number(machine.get("power_limit_default_watts"))
    if limit is None or default is None:
        return Item(FACTS, "power cap", OPEN, "the driver told no power limit, or not its default")
    drawn = number(seen.get("power_watts"))
    well = f"{limit:g} W, as the card's default" + (f"; {drawn:g} W drawn under load" if drawn else "")
    wrong = f"{limit:g} W, below the card's default of {default:g} W" if limit < 0.99 * default else None
    return judged(FACTS, "power cap", wrong, well, (f"who set it: nvidia-smi -q -d POWER; nvidia-smi -pl {default:g}",))


def _link(machine: Mapping[str, Any], seen: Mapping[str, Any]) -> Item:
    if machine.get("link_kind") == "nvlink-c2c":
        n = machine.get("c2c_n_links")
        return Item(FACTS, "link", HEALTHY, f"NVLink-C2C{f', {n} links' if n else ''}")
    pairs = [
        (words, number(seen.get(key)), number(machine.get(f"{key}_max")))
        for words, key in (("generation", "pcie_gen"), ("width", "pcie_width"))
    ]
    told = [(words, now, most) for words, now, most in pairs if now is not None and most is not None]
    if not told:
        return Item(FACTS, "link", OPEN, "the driver told no PCIe generation and width under load")
    wrong = [f"{words} {now:g} under load, and {most:g} is possible" for words, now, most in told if now < most]
    well = "PCIe " + ", ".join(f"{words} {now:g}" for words, now, _ in told) + ", the most that card and slot can"
    steps = (
        "slot, riser and BIOS (link speed, bifurcation); reseat the card; nvidia-smi -q -d PCIE; lspci -vv: LnkSta",
    )
    return judged(FACTS, "link", f"PCIe {', '.join(wrong)}" if wrong else None, well, steps)


def _clocks(machine: Mapping[str, Any], seen: Mapping[str, Any]) -> Item:
    reasons = seen.get("clock_reasons")
    if not isinstance(reasons, list):
        return Item(FACTS, "clocks", OPEN, "the driver told no reason for its clocks under load")
    clock, most = number(seen.get("sm_clock_mhz")), number(machine.get("sm_clock_max_mhz"))
    words = f"SM clock {clock:g}{f' of {most:g}' if most else ''} MHz under load" if clock else "clocks under load"
    words += f" ({', '.join(map(str, reasons)) or 'nothing held them down'})"
    wrong = f"{words}: a setting holds them down" if any(one in HELD_DOWN for one in reasons) else None
    steps = ("nvidia-smi -q -d CLOCK; nvidia-smi -rac and -rgc reset application and locked clocks",)
    return judged(FACTS, "clocks", wrong, words, steps)


def _modes(machine: Mapping[str, Any]) -> Item:
    told = {key: str(machine[key]) for key in ("ecc", "mig", "persistence", "compute_mode") if machine.get(key)}
    if not told:
        return Item(FACTS, "modes of the GPU", OPEN, "the driver told neither ECC nor MIG")
    wrong = [
        f"{words} is {told[key].lower()}"
        for key, words, expected in (("ecc", "ECC", "Enabled"), ("mig", "MIG", "Disabled"))
        if told.get(key, expected) != expected
    ]
    well = ", ".join(f"{key.replace('_', ' ')} {value.lower()}" for key, value in told.items())
    steps = ("nvidia-smi -q -d ECC; nvidia-smi -mig 0: rates of a slice are not those of the GPU",)
    return judged(FACTS, "modes of the GPU", ", ".join(wrong) or None, well, steps)


def _cpu_settings(machine: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[Item]:
    cores, threads = number(machine.get("n_cores")), number(manifest["settings"].get("threads"))
    quota, wrong = number(machine.get("cpu_quota_cores")), []
    if cores and threads and threads < cores:
        wrong.append(f"{threads:g} threads computed on {cores:g} cores")
    if cores and threads and threads > cores:
        wrong.append(f"{threads:g} threads shared {cores:g} cores (SMT)")
    if quota and threads and quota < threads:
        wrong.append(f"the control group allows the time of {quota:g} cores to {threads:g} threads")
    well = f"{threads:g} threads on {cores:g} cores" if cores and threads else "nothing is held back"
    steps = ("--threads of the collection; cgroup cpu.max; taskset, OMP_PLACES=cores, OMP_PROC_BIND=true",)
    items = [judged(FACTS, "threads and cores", ", ".join(wrong) or None, well, steps)]
    flags, used = words_of(machine.get("cpu_flags")), manifest["software"].get("torch_cpu_capability")
    if used is None or not flags:
        return [*items, Item(FACTS, "instruction sets", OPEN, "the capture tells no instruction sets, or not torch's")]
    lacks = []
    if "avx512f" in flags and not str(used).startswith("AVX512"):
        lacks.append(f"torch computes with {used}, and the processor has AVX-512")
    if manifest["software"].get("torch_mkldnn") is False:
        lacks.append("torch was built without oneDNN (mkldnn), which has the bf16 kernels")
    has = ", ".join(flags)
    steps = ("ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS, ONEDNN_MAX_CPU_ISA; the build of torch",)
    return [*items, judged(FACTS, "instruction sets", ", ".join(lacks) or None, f"torch uses {used} of {has}", steps)]


def _host(machine: Mapping[str, Any]) -> Item:
    """Settings of the system that cost speed on either kind of device."""
    wrong = []
    if str(machine.get("cpu_governor")) in GOVERNORS:
        wrong.append(f"the governor is {machine['cpu_governor']}")
    if machine.get("transparent_huge_pages") == "never":
        wrong.append("transparent huge pages are off")
    nodes = number(machine.get("n_numa_nodes")) or 1
    if nodes > 1 and str(machine.get("numa_balancing")) not in ("0", "None"):
        wrong.append(f"NUMA balancing moves pages between {nodes:g} nodes")
    listed = machine.get("numa_nodes")
    several = [node for node in listed if isinstance(node, dict)] if isinstance(listed, list) else []
    usable = [number(node.get("node")) for node in several if node.get("n_usable_cpus")]
    of_gpu = number(machine.get("gpu_numa_node"))
    if of_gpu is not None and of_gpu >= 0 and usable and of_gpu not in usable:
        wrong.append(f"the GPU hangs on memory node {of_gpu:g}, and the process may use the cores of others alone")
    told = {
        "governor": machine.get("cpu_governor"),
        "huge pages": machine.get("transparent_huge_pages"),
        "memory nodes": machine.get("n_numa_nodes"),
    }
    words = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
    if not words and not wrong:
        return Item(FACTS, "settings of the host", OPEN, "the capture tells no governor, huge pages or memory nodes")
    steps = (
        "cpupower frequency-set -g performance; /sys/kernel/mm/transparent_hugepage/enabled",
        "numactl --cpunodebind, --membind; sysctl kernel.numa_balancing=0",
    )
    return judged(FACTS, "settings of the host", ", ".join(wrong) or None, words, steps)


def _not_seen(capture: Capture, is_gpu: bool) -> list[Item]:
    """What hides from whoever measures: below a hypervisor, and what was left out and why."""
    machine, items = capture.manifest["machine"], []
    if machine.get("hypervisor"):
        hidden = "clocks, memory modules and neighbours on the same host hide from it"
        items.append(Item(FACTS, "below the hypervisor", OPEN, f"a virtual machine: {hidden}"))
    reasons = [
        f"{way}: {reason}" for way, reason in capture.capabilities.items() if reason is not None and is_gpu
    ]  # on a CPU nothing is offloaded, whatever the machine
    counted = capture.left_out["reason"].value_counts(sort=True, name="n")
    reasons += [f"{row['n']}x {row['reason']}" for row in counted.iter_rows(named=True)]
    reasons += [str(sentence) for sentence in capture.manifest.get("skipped") or ()]
    if reasons:
        shown = "; ".join(text.shortened(reason, 90) for reason in reasons[:N_SHOWN])
        more = f"; and {len(reasons) - N_SHOWN} more reasons" if len(reasons) > N_SHOWN else ""
        items.append(Item(FACTS, "left out", OPEN, shown + more))
    return items


def steadiness_items(capture: Capture, findings: Sequence[Finding], others: Sequence[Capture]) -> list[Item]:
    """How far repeats and runs lie apart, beside `others` (shipped captures), and what disturbed them."""
    return [*_spread(capture, others), *_by_findings(STEADINESS, findings), _load(capture)]


def spread_of(capture: Capture) -> tuple[Mean, Mean] | None:
    """The mean of all workloads together with its variance between runs, and that of a typical workload on its own;
    null where no workload was measured in two runs."""
    side = of_capture(capture)
    keys = _whole(side)
    if len(side.runs) < 2 or not keys:
        return None
    means = means_of(side, keys)
    each = sorted((means[key] for key in keys), key=lambda one: one.of_units[-1].value)
    return means[OVERALL], each[len(each) // 2]


def _whole(side: Evidence) -> list[str]:
    """The workloads that were measured in every run."""
    return [key for key, one in side.workloads.items() if len(one.run_ns) == len(side.runs)]


def _spread(capture: Capture, others: Sequence[Capture]) -> list[Item]:
    name = "runs apart from each other"
    found = spread_of(capture)
    if found is None:
        words = "one run shows no spread between runs: collect with --runs 5"
        return [Item(STEADINESS, name, OPEN, words)]
    known = [(one.name, spread) for one in others if (spread := spread_of(one)) is not None]
    own = [math.sqrt(mean.of_units[-1].value) for mean in found]
    words = (
        f"all workloads together {text.frac(own[0])}, a typical one {text.frac(own[1])} beside that (sd between runs)"
    )
    if not known:
        return [Item(STEADINESS, name, OPEN, f"{words}; no other capture is shipped to hold it against")]
    typical = [max(spread[i].of_units[-1].value for _, spread in known) for i in (0, 1)]
    words += f"; shipped captures up to {text.frac(math.sqrt(typical[0]))} and {text.frac(math.sqrt(typical[1]))}"
    unlikely = [_is_wider(found[i], typical[i], [spread[i] for _, spread in known]) for i in (0, 1)]
    steps = (
        "clocks, power and temperature from run to run; other load; a neighbour on the same host",
        "--runs 5 or more, on three occasions: `perfmodel baseline` joins them",
    )
    return [judged(STEADINESS, name, words if any(unlikely) else None, words, steps)]


def _is_wider(mean: Mean, typical: float, known: Sequence[Mean]) -> bool:
    """Whether a variance is beyond doubt larger than the largest of shipped captures (F test)."""
    own = mean.of_units[-1]
    df = max(one.of_units[-1].df for one in known)
    dfs = [value if math.isfinite(value) else 1e6 for value in (own.df, df)]
    return bool(special.fdtrc(*dfs, own.value / typical) < RARE)


def n_runs_wanted(capture: Capture, margin_frac: float = DEFAULT_MARGIN_FRAC) -> tuple[int | None, bool]:
    """How many runs on each side a check needs to tell a change of the margin from none, over all workloads, by the
    spread of this capture (null with a single run), and whether that is enough: on a virtual machine runs of one short
    occasion are not, however many."""
    found = spread_of(capture)
    if found is None:
        return None, False
    runs_alone = replace(found[0], fixed=())
    n_more = n_more_runs(
        0.0, math.log1p(margin_frac), runs_alone, runs_alone, NO_CHANGE_LEVEL, n_least=2 - runs_alone.n_units
    )
    return None if n_more is None else runs_alone.n_units + n_more, not found[0].fixed


def _load(capture: Capture) -> Item:
    """Whether the machine was busy before the first run: later runs see the load of those before."""
    runs = capture.manifest.get("runs") or []
    load = number(runs[0].get("load_before")) if runs else None
    cpus = number(capture.manifest["machine"].get("n_logical_cpus"))
    if load is None or not cpus:
        return Item(STEADINESS, "load before the first run", OPEN, "the capture does not tell it")
    words = f"{load:g} on {cpus:g} logical CPUs"
    steps = ("what else runs on the machine; measure again when it is idle",)
    # A load of all CPUs is what a collection that has just ended leaves behind (shipped captures: 0.9 to 1.9 on 2).
    return judged(STEADINESS, "load before the first run", words if load > 1.25 * cpus else None, words, steps)
