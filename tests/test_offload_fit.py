"""Constants of offloading from made-up observations: recovered where they can be, held out, never pooled, saved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel.capture import load_capture, per_workload, profile_of
from perfmodel.errors import InputError
from perfmodel.fitting import fit_source
from perfmodel.latency import LatencyModel
from perfmodel.offload import Host, OffloadConstants
from perfmodel.offload.constants import ASSUMED, PRIORS
from perfmodel.offload.fit import CONSTANTS_OF, fit_offload, judge_offload
from perfmodel.offload.fitted import Fitted, OffloadFit, Way, from_json
from perfmodel.physics import PYTORCH_KERNEL, Ceilings, Form
from perfmodel.report import fit_page
from perfmodel.sources import only_source, read_sources
from tests.captures_made import write_gpu_capture
from tests.offload_made import FRACS, SHAPES, WAYS, synthetic_model, synthetic_observations

MAPPED, SPLIT, COPY, OVERLAP, CPU = WAYS
TRUTH = {
    MAPPED: replace(ASSUMED, reread_frac=0.45, reread_rows=128.0, link_overlap_frac=0.35, link_eff=0.9),
    SPLIT: replace(ASSUMED, reread_frac=0.0, link_eff=0.95),
    COPY: replace(ASSUMED, copy_eff=0.9, copy_ns=6000.0),
    OVERLAP: replace(ASSUMED, copy_eff=0.92, copy_ns=5000.0, copy_overlap_frac=0.7),
    CPU: replace(ASSUMED, host_eff_compute=0.6, host_eff_memory=0.7, host_expert_ns=9000.0, merge_ns=30000.0),
}


@pytest.fixture(scope="module")
def made() -> pl.DataFrame:
    return synthetic_observations(TRUTH)


@pytest.fixture(scope="module")
def fitted(made: pl.DataFrame) -> OffloadFit:
    return fit_offload(synthetic_model(), made)


# How far a recovered constant may be from the truth: the resident constants that the fit believes are wrong by up to
# 8 %, and times are noisy by 2 %.
WITHIN_FRAC = {
    "link_eff": 0.03,
    "reread_frac": 0.05,
    "reread_rows": 0.0,
    "copy_eff": 0.03,
    "copy_ns": 0.3,
    "copy_overlap_frac": 0.15,
    "host_eff_compute": 0.03,
    "host_eff_memory": 0.05,
    "host_expert_ns": 0.15,
    "merge_ns": 0.3,
    "link_overlap_frac": 0.2,
}


@pytest.mark.parametrize("way", [MAPPED, COPY, OVERLAP, CPU], ids=str)
def test_constants_are_recovered_although_resident_ones_are_wrong(fitted: OffloadFit, way: Way) -> None:
    found, is_measured = fitted.constants_of(way.access, way.residency)
    assert is_measured
    for name in set(fitted.ways[way].constants) & set(WITHIN_FRAC):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH[way], name), rel=WITHIN_FRAC[name] + 1e-12), name
        assert fitted.ways[way].constants[name].is_known, name


def test_a_kernel_that_never_reads_twice_is_found_to_do_so(fitted: OffloadFit) -> None:
    constants = fitted.ways[SPLIT].constants
    assert constants["reread_frac"].high < 0.01 and constants["reread_frac"].is_known
    assert constants["link_eff"].value == pytest.approx(0.95, rel=0.03)
    # Without re-reads nobody can say how many rows a read would serve: the assumption stands, as unknown.
    rows = constants["reread_rows"]
    assert not rows.is_known and rows.low < rows.high and rows.value == ASSUMED.reread_rows


def test_errors_are_held_out_by_shape_and_by_fraction_and_are_near_the_noise(fitted: OffloadFit) -> None:
    assert set(fitted.ways) == set(WAYS)
    for one in fitted.ways.values():
        assert one.by_shape is not None and one.by_frac is not None and one.log_half_width is not None
        n_fracs = len(FRACS) + 1  # 5/16 of Mixtral's 8 experts are 3/8
        assert (one.by_shape.n_groups, one.by_frac.n_groups) == (len(SHAPES), n_fracs)
        for held in (one.by_shape, one.by_frac):
            assert 0.005 < held.median_frac < 0.025  # 2 % noise has a median of 1.3 %
            assert held.median_frac < held.p90_frac < 0.06 and held.p90_frac < held.worst_frac
        assert one.log_half_width == max(one.by_shape.quantile, one.by_frac.quantile)
        assert one.n_with_resident == one.n_observations == len(SHAPES) * 4 * len(FRACS) * 2


def test_ways_are_never_pooled(made: pl.DataFrame, fitted: OffloadFit) -> None:
    alone = made.filter(pl.col("access").is_in(["copy", "resident"]))
    assert fit_offload(synthetic_model(), alone).ways == {COPY: fitted.ways[COPY]}


def test_what_was_never_measured_keeps_what_was_assumed(fitted: OffloadFit) -> None:
    assert fitted.constants_of("zero-copy", "system") == (OffloadConstants(), False)
    assert fitted.constants_of("near-data") == (OffloadConstants(), False)
    assert fitted.constants_of("zero-copy") == fitted.constants_of("zero-copy", "mapped")
    copy, _ = fitted.constants_of("copy")
    assert copy.merge_ns == ASSUMED.merge_ns and copy.reread_frac == ASSUMED.reread_frac


def test_a_measured_resident_time_keeps_errors_of_the_resident_model_out(made: pl.DataFrame) -> None:
    few = made.filter(pl.col("shape").is_in(SHAPES[:2]) & (pl.col("op") == "grouped_gemm"))
    few = few.filter((pl.col("access") == "resident") | (pl.col("residency") == "mapped"))
    beside = fit_offload(synthetic_model(), few).ways[MAPPED]
    alone = fit_offload(synthetic_model(), few.filter(pl.col("access") != "resident")).ways[MAPPED]
    assert beside.n_with_resident == beside.n_observations and alone.n_with_resident == 0
    assert beside.by_shape is None  # two shapes cannot be held out
    assert beside.by_frac is not None and alone.by_frac is not None
    assert beside.by_frac.median_frac < alone.by_frac.median_frac


def test_a_fitted_model_of_the_host_leaves_only_the_merge_to_learn(made: pl.DataFrame) -> None:
    form = Form(
        "made-up",
        None,
        {},
        lambda w: [],
        lambda w: w,
        lambda w, roof, c: {"compute": w.n_rows / roof.flops_per_s},
        lambda w, roof, c: [],
    )
    cpu = made.filter(pl.col("access").is_in(["cpu", "resident"]) & (pl.col("shape") == "olmoe"))
    found = fit_offload(synthetic_model(), cpu, host=Host(form, Ceilings(1.0, 1.0, ()), None))
    assert set(found.ways[CPU].constants) == {"merge_ns", "counts_ns"}


def test_a_fit_is_saved_and_read_back(fitted: OffloadFit) -> None:
    content = json.loads(json.dumps(fitted.to_json()))
    assert from_json(content) == fitted
    assert set(content) == {"zero-copy/mapped", "zero-copy/split", "copy", "copy-overlap", "cpu"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("copy", "constants", "copy_eff", "value"), -1.0),
        (("copy", "constants", "copy_eff", "low"), 9.0),
        (("copy", "constants", "copy_eff", "is_known"), "yes"),
        (("copy", "log_half_width"), float("nan")),
        (("copy", "by_shape"), {"n": 3}),
        (("teleport",), {}),
    ],
)
def test_a_file_that_no_fit_could_have_written_is_refused(
    fitted: OffloadFit, place: tuple[str, ...], value: object
) -> None:
    content = json.loads(json.dumps(fitted.to_json()))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(content)


def test_ranges_stay_within_what_is_possible_and_say_what_is_known() -> None:
    assert Fitted.of("reread_frac", 0.01, 0.02) == Fitted(0.01, 0.0, 0.01 + 1.645 * 0.02, True)
    assert Fitted.of("merge_ns", 10000.0, PRIORS["merge_ns"].sigma).is_known is False
    assert {name for names in CONSTANTS_OF.values() for name in names} <= set(PRIORS)


def test_a_capture_is_fitted_from_its_folder(tmp_path: Path) -> None:
    # The made-up machine copies and reads in place at 45 GB/s, in series with computing, whatever its calibration says.
    capture = load_capture(write_gpu_capture(tmp_path / "synthetic"))
    observations = per_workload(capture.observations)
    model = LatencyModel(profile_of(capture), "bf16", PYTORCH_KERNEL)
    model.fit(observations.filter((pl.col("dtype") == "bf16") & (pl.col("access") == "resident")))
    found = fit_offload(model, observations)
    assert set(found.ways) == set(WAYS)
    copy, mapped = (found.ways[way] for way in (COPY, MAPPED))
    assert copy.constants["copy_eff"].value == pytest.approx(45 / 55, rel=0.05)
    assert mapped.constants["link_eff"].value == pytest.approx(45 / 50, rel=0.05)
    assert (copy.n_observations, mapped.n_observations) == (9, 18)  # launched by the host, and from graphs too
    assert copy.by_shape is not None and copy.by_frac is None  # one fraction was measured
    assert copy.log_half_width is None and mapped.log_half_width is not None  # nine errors promise nothing


def test_nothing_offloaded_is_nothing_to_fit(made: pl.DataFrame) -> None:
    with pytest.raises(InputError, match="no bf16 workload with offloaded experts among 32 observations"):
        fit_offload(synthetic_model(), made.filter(pl.col("access") == "resident"))


def test_offloaded_rows_are_judged_by_the_constants_of_their_way(made: pl.DataFrame, fitted: OffloadFit) -> None:
    model = synthetic_model()
    model.offload_ = None
    assumed = judge_offload(model, made)
    model.offload_ = OffloadFit({COPY: fitted.ways[COPY]}).to_json()
    found = judge_offload(model, made)
    assert set(found) == {str(way) for way in WAYS}
    assert {way: one["is_fitted"] for way, one in found.items()} == {str(way): way == COPY for way in WAYS}
    assert {way: one for way, one in found.items() if way != "copy"} == {
        w: o for w, o in assumed.items() if w != "copy"
    }
    assert found["copy"]["n"] == fitted.ways[COPY].n_observations
    assert found["copy"]["median_ape"] < 0.02 < assumed["copy"]["median_ape"]  # 2 % noise has a median of 1.3 %
    assert found["copy"]["median_ape"] < found["copy"]["p90_ape"] <= found["copy"]["worst_ape"]


def test_a_way_whose_rate_no_probe_measured_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_gpu_capture(tmp_path / "synthetic")
    manifest = json.loads((folder / "capture.json").read_text())
    rates = manifest["calibration"]

    def without(*beginnings: str) -> Any:
        manifest["calibration"] = {name: value for name, value in rates.items() if not name.startswith(beginnings)}
        (folder / "capture.json").write_text(json.dumps(manifest))
        source = only_source(read_sources([str(folder)]))
        return source, fit_source(source)

    source, model = without("host_gemm")
    assert set(model.offload_) == {str(way) for way in WAYS if way != CPU}
    assert "no constants of cpu: hardware 'synthetic' has no host_gemm_flops_per_s" in fit_page(model)
    assert set(judge_offload(model, source.every)) == set(model.offload_)
    source, model = without("link", "host")
    assert model.offload_ is None and judge_offload(model, source.every) == {}
    assert fit_page(model).count("has no link to a second memory tier") == len(WAYS)
