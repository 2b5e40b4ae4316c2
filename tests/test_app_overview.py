"""The first page: what it says of the shipped captures and of the GH200 study, and what a link changes."""

from perfmodel.capture import load_capture, shipped_captures
from perfmodel.latency import load_model, shipped_models
from perfmodel.report import capture_headlines
from perfmodel.report.headlines import EVEN, SAME
from tests.app_pages import numbers, opened, shown, titles

NAMES = [path.name for path in shipped_captures() if path.name in shipped_models()]


def test_the_overview_opens_with_offloading_and_accuracy_and_says_what_the_capture_holds() -> None:
    test = opened("overview")
    assert titles(test)[0] == "Slowdown against offloaded fraction"
    assert titles(test)[1].startswith("Predicted vs measured: median error")
    assert "1.49x on GH200 with 20 of 64 experts read in place, 65,536 tokens" in shown(test)  # the study's first point
    capture = load_capture(shipped_captures()[0])
    assert numbers(test)["Workloads measured"] == str(capture.observations["workload"].n_unique())


def test_a_link_opens_the_capture_that_it_names() -> None:
    words = shown(opened("overview", capture=NAMES[1]))
    assert f"perfmodel captures show traces/{NAMES[1]}" in words


def test_a_link_that_names_no_capture_opens_the_first() -> None:
    assert f"traces/{NAMES[0]}" in shown(opened("overview", capture="<b>nothing</b>"))


def test_headlines_are_counted_over_pairs_that_differ_in_routing_alone() -> None:
    capture, model = load_capture(shipped_captures()[0]), load_model(NAMES[0])
    error, roofs, skew = capture_headlines(capture, model)
    assert f"{100 * model.errors_['model']['all']['median_ape_frac']:.1f} % in the median" in error
    n_memory, n_compute = (
        int(roofs.split(f" stand under the {bound}")[0].split()[-1]) for bound in ("memory", "compute")
    )
    assert n_memory + n_compute == int(roofs.split()[1])
    # Slowly: every workload of the named routing beside the even one of the same shape, width and tokens.
    named = skew.split(" routing")[0]
    medians: dict[tuple, dict[str, list[float]]] = {}
    for row in capture.observations.iter_rows(named=True):
        medians.setdefault(tuple(row[key] for key in SAME), {}).setdefault(row["routing"], []).append(row["time_ns"])
    n_pairs = sum(named in by_routing and EVEN in by_routing for by_routing in medians.values())
    assert f"median of {n_pairs} pairs" in skew
