"""What the Trace view computes of a trace, kept for its session under the digest of its content."""

import polars as pl
import streamlit as st

from perfmodel import fusion, launch
from perfmodel.analysis import Analysis
from perfmodel.diff import TraceDiff, diff
from perfmodel.errors import InputError
from perfmodel.groups import launch_metrics_by
from perfmodel.passes import Passes, moe_passes
from perfmodel.timeline import Timeline, step_windows, timeline
from perfmodel.waits import MEMBER, collectives, matched_waits, waits_of_steps

N_KEPT = 16  # results of one kind that a session keeps


# What follows is kept by digest: `_found` and the like take no part in the key.


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner=False)
def joined(digest: str, _found: Analysis) -> pl.DataFrame:
    """`launch.joined_work` of a trace."""
    return launch.joined_work(_found.trace.events)


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner="Sorting launches into groups")
def grouped(digest: str, by: str, _found: Analysis) -> pl.DataFrame:
    """The launch metrics of the groups of a trace."""
    return launch_metrics_by(_found.trace.events, by, joined(digest, _found))


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner=False)
def windows(digest: str, _found: Analysis) -> pl.DataFrame:
    """The steps of a trace, each with the window that shows it."""
    return step_windows(_found.trace.events, joined(digest, _found))


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner="Drawing the window")
def drawn(digest: str, start_ns: int, end_ns: int, _found: Analysis) -> Timeline:
    """What a window of a trace shows."""
    return timeline(_found.trace.events, start_ns, end_ns, joined(digest, _found))


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner="Looking for chains of kernels")
def fused(digest: str, length: int, threshold: float, _found: Analysis) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The ideal speed-up by chain length, and the chains of one length."""
    events = _found.trace.events
    return fusion.fusion_table(events, fusion.SHORT_LENGTHS), fusion.chains(events, length, threshold)


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner="Looking for passes of MoE layers")
def passes(digest: str, _found: Analysis) -> Passes | str:
    """The passes of MoE layers in a trace, or why there are none."""
    try:
        return moe_passes(_found.trace)
    except InputError as error:
        return str(error)


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner="Matching collectives over ranks")
def waited(digest: str, _found: Analysis) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Who waited for whom in collectives, step by step, and what could not be matched."""
    found = collectives(_found.trace.events)
    matched = matched_waits(found, found.select(MEMBER).unique())
    return waits_of_steps(matched), matched.notes


@st.cache_resource(scope="session", max_entries=N_KEPT, show_spinner="Comparing two traces")
def compared(digest_a: str, digest_b: str, _a: Analysis, _b: Analysis) -> TraceDiff:
    """What differs between two traces."""
    return diff(_a.trace, _b.trace)
