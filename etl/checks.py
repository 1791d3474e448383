"""Checks of what comes in and of what was made. A failed check names where, what was found and what is needed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from usr_ray.config import UserError


class DataCheckError(UserError):
    """Logs that cannot be used, or a table that does not fit the configuration."""


_MAY_BE_NULL = {("impressions", "request_id"), ("impressions", "query"), ("clicks", "impression_id")}
"""Columns that a log of a kind must have, and whose values may be null."""


class AccountingError(Exception):
    """Rows were lost or made up on the way: a fault of this program, not of the user's data."""


@dataclass(frozen=True, slots=True)
class LogCount:
    """Where the rows of one log and date went."""

    rows_in: int = 0
    duplicates: int = 0
    rejects: int = 0
    used: int = 0
    """Impressions: samples or, outside the built dates, context; clicks and orders: attributed."""

    def __add__(self, other: LogCount) -> LogCount:
        return LogCount(
            self.rows_in + other.rows_in,
            self.duplicates + other.duplicates,
            self.rejects + other.rejects,
            self.used + other.used,
        )


def check_accounting(counts: Mapping[tuple[str, str], LogCount]) -> None:
    """Every row of every (log, date) is used, rejected or a duplicate.

    Raises:
        AccountingError: the sums differ; nothing has been written to the samples table yet.
    """
    for (log, date), count in sorted(counts.items()):
        if count.rows_in != count.duplicates + count.rejects + count.used:
            raise AccountingError(f"{log}, {date}: {count} does not add up; please report this")


def check_columns(log: str, found: Iterable[str], needed: Iterable[str]) -> None:
    """Every needed column is in the log.

    Raises:
        DataCheckError: naming the first missing column and the columns there are.
    """
    names = list(found)
    for column in needed:
        if column not in names:
            raise DataCheckError(
                f"log {log}: column '{column}' is missing; it has: {', '.join(names) or 'none'}; "
                f"add it, or name your own column for it under [logs.{log}] (docs/own-logs.md)"
                + _of_one_column(log, names)
                + _of_nulls(log, column)
            )


def _of_nulls(log: str, column: str) -> str:
    is_for = (log.rpartition("_")[2], column) in _MAY_BE_NULL
    return f'; where there is none, set logs.{log}.constants = {{ {column} = "" }}' if is_for else ""


def _of_one_column(log: str, names: Sequence[str]) -> str:
    """What probably went wrong where a log seems to have one column, or none."""
    if not names:
        return "; JSON lines have one object a line, and a file of one list over many lines is none"
    separators = [sign for sign in (";", "\t", "|", ",") if sign in names[0]]
    if len(names) == 1 and separators:
        return f"; that is one column: set logs.{log}.separator = {json.dumps(separators[0])}"
    return ""
