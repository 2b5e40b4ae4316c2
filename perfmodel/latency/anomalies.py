"""Measurements that no physics explains: failed autotuning, cliffs of alignment, a machine that was busy."""

import numpy as np
import polars as pl

from perfmodel.physics import Array

from .confidence import ANOMALY_LOG

N_SHOWN = 8
KEY = ("op", "shape", "hidden", "inter", "gemm_k", "gemm_n", "routing")


def anomalous(predicted_ns: Array, measured_ns: Array) -> Array:
    """Which measurements lie further than ANOMALY_LOG from their held-out prediction, in log units, `[row]`."""
    return np.asarray(np.abs(np.log(measured_ns / predicted_ns)) > ANOMALY_LOG)


def anomalies(observations: pl.DataFrame, predicted_ns: Array) -> list[str]:
    """The slices (sizes and routing) in which anomalous measurements lie, most first, in words; empty without any.

    A slice says how many of its batch sizes are anomalous and by what factor; at most N_SHOWN are named.
    """
    measured = observations["time_ns"].to_numpy()
    table = observations.select(*KEY, "n_tokens").with_columns(
        pl.col("op").cast(pl.String),
        is_off=pl.Series(anomalous(predicted_ns, measured)),
        factor=pl.Series(measured / predicted_ns),
    )
    slices = (
        table.group_by(KEY, maintain_order=True)
        .agg(
            n=pl.len(),
            n_off=pl.col("is_off").sum(),
            factor=pl.col("factor").filter("is_off").median(),
            low=pl.col("n_tokens").filter("is_off").min(),
            high=pl.col("n_tokens").filter("is_off").max(),
        )
        .filter(pl.col("n_off") > 0)
        .sort("n_off", descending=True, maintain_order=True)
    )
    found = [_words(row) for row in slices.head(N_SHOWN).iter_rows(named=True)]
    if slices.height > N_SHOWN:
        found.append(f"and {slices['n_off'][N_SHOWN:].sum()} in {slices.height - N_SHOWN} further slices")
    return found


def _words(row: dict[str, object]) -> str:
    inner = f"{row['gemm_k']}x{row['gemm_n']}" if row["gemm_k"] is not None else f"{row['hidden']}x{row['inter']}"
    tokens = f"{row['low']:,}" if row["low"] == row["high"] else f"{row['low']:,} to {row['high']:,}"
    return (
        f"{row['op']} {row['shape']} ({inner}), {row['routing']}: {row['n_off']} of {row['n']} batch sizes "
        f"({tokens} tokens) take {row['factor']:.2g}x what is predicted"
    )
