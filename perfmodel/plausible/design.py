"""Is there enough of it: runs to compare, shapes to hold out, tokens to draw a line through."""

from collections import Counter, defaultdict
from collections.abc import Iterator

from perfmodel import text
from perfmodel.capture_lines import MANIFEST, RESIDENT, WORKLOADS
from perfmodel.plausible.folder import WARNING, Finding, Folder

MIN_RUNS = 2  # a run is what repeats when a measurement is repeated
MIN_SHAPES = 3  # a fit holds each shape out in turn (perfmodel.latency.evaluate_by_shape)
MIN_TOKENS = 3  # batch sizes, to tell a line from a bend


def enough_runs(folder: Folder) -> Iterator[Finding]:
    """Most points were measured in more than one run."""
    runs = Counter(workload for workload, _ in {(o.workload, o.run) for _, o in folder.observations})
    single = sum(n < MIN_RUNS for n in runs.values())
    if runs and single > len(runs) / 2:
        words = f"{single} of {text.counted(len(runs), 'workload')} have a single run: `--runs` repeats them in fresh "
        words += "processes, and without that a comparison assumes how far runs lie apart"
        yield Finding(WARNING, "design", "runs", words, MANIFEST, single, len(runs) / 2)


def enough_to_fit(folder: Folder) -> Iterator[Finding]:
    """Resident calls in the dtype of the settings, launched in one way, are of enough shapes for a fit."""
    measured = {o.workload for _, o in folder.observations}
    by_launch: dict[str | None, list[str]] = defaultdict(list)
    for key, w in folder.workloads.items():
        if key in measured and w.access == RESIDENT and w.dtype == folder.dtype:
            by_launch[w.launch].append(w.shape)
    shapes = set(sorted(by_launch.values(), key=len)[-1]) if by_launch else set()  # a fit takes the more numerous
    if len(shapes) < MIN_SHAPES:
        words = f"resident {folder.dtype} points are of {text.counted(len(shapes), 'shape')}: `perfmodel fit` needs "
        words += f"{MIN_SHAPES} to hold each out in turn"
        yield Finding(WARNING, "design", "shapes", words, WORKLOADS, len(shapes), MIN_SHAPES)


def enough_tokens(folder: Folder) -> Iterator[Finding]:
    """The capture covers enough batch sizes."""
    sizes = {folder.workloads[o.workload].n_tokens for _, o in folder.observations if o.workload in folder.workloads}
    if len(sizes) < MIN_TOKENS:
        words = (
            f"the capture has {text.counted(len(sizes), 'batch size')}, expected at least {MIN_TOKENS} to see a bend"
        )
        yield Finding(WARNING, "design", "batch sizes", words, WORKLOADS, len(sizes), MIN_TOKENS)


CHECKS = (enough_runs, enough_to_fit, enough_tokens)
