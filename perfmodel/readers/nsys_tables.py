"""Where do the tables of an Nsight Systems export come from: one SQLite file, or a folder with a Parquet file each."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import adbc_driver_manager as adbc
import adbc_driver_sqlite
import polars as pl

from perfmodel.errors import InputError
from perfmodel.readers.limits import Limits

# Up to this size a file is checked as a whole; of a larger one, which may hold much else, the tables that are read.
CHECK_WHOLE_BYTES = 2**29
_IS_TABLE = "m.sql LIKE 'CREATE TABLE%'"
_DEFAULT_CHARACTERS = 1000
PIECE_ROWS = 2**17  # rows of a table that are in memory as the database gives them

# Text in a number's place is no number: SQLite's own cast would make it 0.
_INTEGER = """CASE WHEN typeof("{0}") IN ('integer', 'real') THEN CAST("{0}" AS INTEGER) END AS "{0}" """
_ROW = "rowid"  # SQLite's own number of a row
_BYTES = """CAST(COALESCE("{0}", '') AS BLOB) AS "{0}" """

# Columns of whole numbers, then columns of text -> the rows of a table, piece by piece, one at least.
Read = Callable[[str, Sequence[str], Sequence[str]], Iterator[pl.DataFrame]]


@dataclass(frozen=True)
class Tables:
    """An export as tables: `columns` names those of each table, `read` reads some of them."""

    columns: Mapping[str, Set[str]]
    read: Read

    def rows(self, table: str, numbers: Sequence[str] = (), texts: Sequence[str] = ()) -> pl.DataFrame:
        """The columns of a table that it has among those named: numbers as Int64, null where none stands; texts as
        String, empty where none stands and with a mark in the place of bytes that are no text."""
        return pl.concat(self.pieces(table, numbers, texts))

    def pieces(self, table: str, numbers: Sequence[str] = (), texts: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
        """What `rows` gives, at most PIECE_ROWS rows at a time, in order; one piece without rows of an empty table."""
        there = self.columns[table]
        return self.read(table, [c for c in numbers if c in there], [c for c in texts if c in there])


@contextmanager
def sqlite_tables(path: Path, limits: Limits | None = None) -> Iterator[Tables]:
    """The tables of an SQLite export, opened read-only; raises InputError when SQLite cannot read what was asked.

    Within `limits` views and virtual tables do not count, for they may compute without end; tables that compute are
    refused, and TooLargeError is raised before tables are read that have more rows altogether than is allowed.
    """
    with _refusing(adbc.Error):
        database = adbc_driver_sqlite.connect(f"file:{quote(str(path.absolute()))}?mode=ro")
        connection = adbc.AdbcConnection(database)
    with database, connection:
        is_small = path.stat().st_size <= CHECK_WHOLE_BYTES
        if limits is not None:
            _refuse_computing(connection)
        if is_small:
            _refuse_damage(connection)
        which = "m.type IN ('table', 'view')" if limits is None else _IS_TABLE
        names = _query(
            connection,
            "SELECT CAST(m.name AS BLOB), CAST(c.name AS BLOB) FROM sqlite_master m, pragma_table_info(m.name) c "
            f"WHERE {which}",
        )
        n_rows = 0
        columns: dict[str, set[str]] = {}
        for table, column in zip(*map(_text, names.iter_columns()), strict=True):
            columns.setdefault(table, set()).add(column)

        def read(table: str, numbers: Sequence[str], texts: Sequence[str]) -> Iterator[pl.DataFrame]:
            nonlocal n_rows
            if not is_small:
                _refuse_damage(connection, table)
            if limits is not None:
                n_rows += _query(connection, f'SELECT count(*) FROM "{table}"').item()
                limits.refuse_events(n_rows)
            at = None if _ROW in {column.lower() for column in columns[table]} else _first_row(connection, table)
            if at is None:
                yield _sqlite_rows(connection, table, numbers, texts)
            n_numbers = PIECE_ROWS
            while at is not None:
                end = at + n_numbers
                piece = _sqlite_rows(connection, table, numbers, texts, f"WHERE {_ROW} >= {at} AND {_ROW} < {end}")
                n_numbers *= 1 if piece.height > PIECE_ROWS // 2 else 2  # some numbers may be missing, or most
                at = _first_row(connection, table, f"WHERE {_ROW} >= {end}")
                yield piece

        yield Tables(columns, read)


@contextmanager
def _refusing(*errors: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"begins like an SQLite database but SQLite cannot read it ({reason}); expected an Nsight Systems export. "
            "Export or copy it again"
        ) from None


def _query(connection: Any, sql: str) -> pl.DataFrame:
    """The rows of a query; the driver takes a column's type from its first rows and fails where another follows, and
    hands over text unchecked, so that text must be asked for as BLOB."""
    with _refusing(adbc.Error, pl.exceptions.PolarsError), closing(adbc.AdbcStatement(connection)) as statement:
        statement.set_options(**{"adbc.sqlite.query.batch_rows": str(PIECE_ROWS // 2)})
        statement.set_sql_query(sql)
        stream, _ = statement.execute_query()
        # Joined, and so copied: one column of the driver's batches would keep all others of its batch in memory.
        return pl.DataFrame(stream).rechunk()


def _refuse_computing(connection: Any) -> None:
    """Raise InputError where tables hold more than stands in the file: columns or checks that are computed, or long
    defaults of columns that rows lack. Exports have none; checking or reading them could take all time and memory."""
    found = _query(
        connection,
        "SELECT count(*) FROM sqlite_master m, pragma_table_xinfo(m.name) c "
        f"WHERE {_IS_TABLE} AND (c.hidden > 1 OR length(c.dflt_value) > {_DEFAULT_CHARACTERS} "
        "OR m.sql LIKE '%CHECK%(%')",
    )
    if found.item():
        raise InputError("a database with columns that are computed or checked, as no Nsight Systems export has them")


def _first_row(connection: Any, table: str, which: str = "") -> int | None:
    """The least number of some rows of a table; null where there are none, and of a view, whose rows have none."""
    try:
        first = _query(connection, f'SELECT min({_ROW}) FROM "{table}" {which}').item()
    except InputError:
        return None
    return first if type(first) is int else None


def _sqlite_rows(
    connection: Any, table: str, numbers: Sequence[str], texts: Sequence[str], which: str = ""
) -> pl.DataFrame:
    text = [_BYTES.format(column) for column in texts]
    try:
        plainly = ", ".join([*(f'"{c}"' for c in numbers), *text])
        frame = _query(connection, f'SELECT {plainly} FROM "{table}" {which}')
        plain = set(frame.select(numbers).dtypes) <= {pl.Int64()}
    except InputError:
        plain = False  # types differ within a column, or the table is damaged: then the next query fails too
    if not plain:
        number = [_INTEGER.format(column) for column in numbers]
        frame = _query(connection, f'SELECT {", ".join([*number, *text])} FROM "{table}" {which}')
    return frame.select(*(pl.col(c).cast(pl.Int64) for c in numbers), *(_text(frame[c]) for c in texts))


def _refuse_damage(connection: Any, table: str | None = None) -> None:
    """Raise InputError where the pages of a database or of one table do not hang together: SQLite then reads rows
    twice, of another table, or leaves some out unasked."""
    of_table = f"('{table}')" if table else ""
    found = _query(connection, f"SELECT CAST(quick_check AS BLOB) FROM pragma_quick_check{of_table}").to_series()
    # A value of another type or a missing one is no damage of the file; it is looked at where it is used.
    damage = [line for line in _text(found) if line != "ok" and " value in " not in line]
    if damage:
        reason = " ".join(damage[0].split())
        raise InputError(f"a damaged SQLite database ({reason}); export or copy it again")


def parquet_tables(folder: Path) -> Tables:
    """The tables of a folder that `nsys export --type parquetdir` wrote; raises InputError for a damaged file."""
    files = {file.stem: file for file in sorted(folder.glob("*.parquet"))}

    def read(table: str, numbers: Sequence[str], texts: Sequence[str]) -> Iterator[pl.DataFrame]:
        with _refusing_file(files[table]):
            frame = pl.read_parquet(files[table], columns=[*numbers, *texts])
        for at in range(0, max(frame.height, 1), PIECE_ROWS):
            piece = frame.slice(at, PIECE_ROWS)
            yield piece.select(*(_number(piece[c]) for c in numbers), *(_text(piece[c]) for c in texts))

    columns = {}
    for table, file in files.items():
        with _refusing_file(file):
            columns[table] = set(pl.read_parquet_schema(file))
    return Tables(columns, read)


@contextmanager
def _refusing_file(file: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"its {file.name} cannot be read ({reason}); export or copy it again") from None


def _number(column: pl.Series) -> pl.Series:
    """Whole numbers as Int64; ids that use the highest bit keep their bits; null where no number stands."""
    if column.dtype == pl.UInt64:
        return column.reinterpret(signed=True)
    if not column.dtype.is_numeric():
        return pl.repeat(None, len(column), dtype=pl.Int64, eager=True).alias(column.name)
    return column.cast(pl.Int64, strict=False)


def _text(column: pl.Series) -> pl.Series:
    """Bytes or text as String; names cut at a byte limit may end inside a character."""
    if column.dtype != pl.Binary:
        return column.cast(pl.String).fill_null("")
    try:
        return column.cast(pl.String).fill_null("")
    except pl.exceptions.PolarsError:
        return pl.Series(column.name, [(value or b"").decode("utf-8", "replace") for value in column], pl.String)
