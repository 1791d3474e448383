"""Are two builds of the samples equal, row for row and column by column? Not a benchmark itself: DuckDB reads both.

The rows are compared by a sum and an exclusive or of their 64-bit hashes over all compared columns, which no order of
the rows changes; where they differ, the first rows that do are shown, column by column.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

KEY = "impression_id"
COUNTER = "counter_"
"""Beginning of the columns of `[counters]`: logarithms, compared within TOLERANCE and not by their bits."""
TOLERANCE = 1e-6


class RowsDifferError(Exception):
    """Two systems gave different samples: a speed of theirs would mean nothing."""


@dataclass(frozen=True)
class Digest:
    """What a set of rows comes to, whatever their order."""

    rows: int
    hash_sum: int
    hash_xor: int


def files_of(table: Path) -> list[str]:
    """Parquet files of a samples table: what a Delta log names, or all of a folder without one."""
    if (table / "_delta_log").is_dir():
        from deltalake import DeltaTable

        return DeltaTable(str(table)).file_uris()
    return sorted(str(path) for path in table.glob("**/*.parquet"))


def open_samples(connection: duckdb.DuckDBPyConnection, name: str, table: Path) -> list[str]:
    """Register a samples table as a view; its columns."""
    files = ", ".join(f"'{path}'" for path in files_of(table))
    connection.execute(
        f"CREATE OR REPLACE VIEW {name} AS SELECT * FROM read_parquet([{files}], hive_partitioning = true, "
        "hive_types = {'impression_date': DATE})"
    )
    return [row[0] for row in connection.execute(f"DESCRIBE {name}").fetchall()]


def digest(connection: duckdb.DuckDBPyConnection, name: str, columns: list[str]) -> Digest:
    """Digest of a view's rows over the given columns."""
    row = connection.execute(
        f"SELECT count(*), coalesce(sum(h::HUGEINT), 0), coalesce(bit_xor(h), 0) "
        f"FROM (SELECT hash({', '.join(columns)}) AS h FROM {name})"
    ).fetchone()
    assert row is not None
    return Digest(*(int(value) for value in row))


def check_equal(tables: dict[str, Path], without: dict[str, set[str]], *, threads: int = 2) -> dict[str, Any]:
    """Compare every table with the first; what was compared.

    Args:
        tables: name -> folder of the samples.
        without: name -> columns that this system cannot write; they are left out of its comparison.
        threads: of DuckDB.

    Raises:
        RowsDifferError: with the first rows that differ.
    """
    compared = {}
    with duckdb.connect(config={"threads": threads}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        (first, *others) = tables
        columns = {name: open_samples(connection, name, path) for name, path in tables.items()}
        for other in others:
            left_out = without.get(other, set()) | {name for name in columns[first] if name.startswith(COUNTER)}
            names = sorted(set(columns[first]) - left_out)
            if missing := set(names) ^ (set(columns[other]) - left_out):
                raise RowsDifferError(f"{first} and {other} differ in the columns {sorted(missing)}")
            of_first, of_other = (digest(connection, name, names) for name in (first, other))
            if of_first != of_other:
                raise RowsDifferError(_first_differences(connection, first, other, names))
            compared[other] = {
                "rows": of_other.rows,
                "columns": len(names),
                "hash_sum": str(of_other.hash_sum),
                "left_out": sorted(name for name in left_out if not name.startswith(COUNTER)),
            }
            counters = [name for name in columns[other] if name.startswith(COUNTER)]
            if counters:
                compared[other] |= {
                    "counters": len(counters),
                    "furthest": _furthest(connection, first, other, counters),
                }
    return compared


def _furthest(connection: duckdb.DuckDBPyConnection, first: str, other: str, names: list[str]) -> float:
    """The largest difference of a counter: the last digit of a logarithm is not the same in every library.

    RowsDifferError above TOLERANCE, or where only one of the two has such a column.
    """
    worst: dict[str, float] = {}
    for start in range(0, len(names), 20):  # a few columns at a time keep the join small
        part = names[start : start + 20]
        gaps = ", ".join(f"max(abs(a.{name} - b.{name}))" for name in part)
        found = connection.execute(f"SELECT {gaps} FROM {first} a JOIN {other} b USING ({KEY})").fetchone() or ()
        worst |= dict(zip(part, map(float, found), strict=True))
    name = max(worst, key=lambda key: worst[key])
    if worst[name] > TOLERANCE:
        raise RowsDifferError(f"{first} and {other} differ in {name} by up to {worst[name]}")
    return worst[name]


def _first_differences(connection: duckdb.DuckDBPyConnection, first: str, other: str, names: list[str]) -> str:
    """The first rows that only one of two views has, column by column."""
    (rows_first,), (rows_other,) = (
        connection.execute(f"SELECT count(*) FROM {name}").fetchone() or (0,) for name in (first, other)
    )
    lines = [f"{first} has {rows_first:,} rows, {other} {rows_other:,}"]
    for name in names:
        (num_rows, example) = connection.execute(
            f"SELECT count(*), min({KEY}) FROM {first} a FULL JOIN {other} b USING ({KEY}) "
            f"WHERE a.{name} IS DISTINCT FROM b.{name}"
            if name != KEY
            else f"SELECT count(*), min({KEY}) FROM {first} a ANTI JOIN {other} b USING ({KEY})"
        ).fetchone() or (0, None)
        if num_rows:
            pair = [
                connection.execute(f"SELECT {name} FROM {view} WHERE {KEY} = ?", [example]).fetchall()
                for view in (first, other)
            ]
            lines.append(f"  {name}: {num_rows:,} rows; {KEY} {example}: {pair[0]} and {pair[1]}")
    return "\n".join(lines)
