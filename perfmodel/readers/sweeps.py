"""Which sweeps over batch sizes does a table hold: TKLQT of each batch size, from a .csv file of published figures."""

from pathlib import Path

import polars as pl

from perfmodel import text
from perfmodel.errors import InputError, about

PUBLISHED = Path(__file__).parents[1] / "data" / "published" / "bert_gh200_sweep.csv"
_TKLQT = "tklqt_"
_EXPECTED = "expected the columns batch and tklqt_ns (or _us, _ms, _s), numbers"


def read_sweeps(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """The sweeps in a .csv file, by name: batch sizes and their TKLQT in ns.

    Columns `batch` and `tklqt_ns` (or `_us`, `_ms`, `_s`); columns of text, as a model or a platform, tell several
    sweeps apart, and with none there is one sweep without a name. A sweep of which no TKLQT is known is left out.
    Raises InputError when the file has no such columns, no such sweep, or a sweep with gaps.
    """
    with about(path):
        try:
            table = _named(pl.read_csv(Path(path).read_bytes()))
        except pl.exceptions.PolarsError as error:
            raise InputError(f"cannot be read ({str(error).splitlines()[0]}); {_EXPECTED}") from None
        sweeps = [part for part in table.partition_by("name", maintain_order=True) if part["tklqt_ns"].count()]
        if not sweeps:
            raise InputError(f"no batch size with a TKLQT; {_EXPECTED}")
        if any(sum(sweep.null_count().row(0)) for sweep in sweeps):
            raise InputError("empty cells; expected a batch size and a TKLQT in every row of a sweep")
    return {sweep["name"][0]: (sweep["batch"].to_list(), sweep["tklqt_ns"].to_list()) for sweep in sweeps}


def _named(table: pl.DataFrame) -> pl.DataFrame:
    """Columns `name` (what the columns of text say), `batch` and `tklqt_ns`."""
    units = [name.removeprefix(_TKLQT) for name in table.columns if name.startswith(_TKLQT)]
    units = [unit for unit in units if text.UNITS.get(unit, ("",))[0] == "ns"]
    if "batch" not in table.columns or not units:
        raise InputError(f"a table with the columns {', '.join(table.columns)}; {_EXPECTED}")
    if table["batch"].dtype.is_float() and (table["batch"] % 1 != 0).any():
        raise InputError("a batch size that is no whole number; expected a batch size and a TKLQT in every row")
    tklqt = _TKLQT + units[0]
    factor, _ = text.to_base(1.0, units[0])
    names = [name for name, dtype in table.schema.items() if dtype == pl.String and name not in ("batch", tklqt)]
    return table.select(
        pl.concat_str(names, separator=", ").alias("name") if names else pl.lit("").alias("name"),
        pl.col("batch").cast(pl.Int64),
        tklqt_ns=pl.col(tklqt).cast(pl.Float64) * factor,
    )
