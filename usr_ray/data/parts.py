"""What a manifest is made of: files of the samples, their row groups, and files of the tables by encoded id."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroup:
    """One Parquet row group, the smallest unit of reading."""

    num_rows: int
    num_bytes: int
    """Uncompressed."""
    min_event_time_us: int
    """Microseconds since 1970 UTC; the start of the file's date where the footer has no statistics."""
    max_event_time_us: int
    """Microseconds since 1970 UTC; the end of the file's date where the footer has no statistics."""
    has_mature: bool
    """False: every row has is_mature = false."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One Parquet file of the table."""

    path: str
    """Relative to the table, or absolute where the table refers to a file outside of itself."""
    date: str
    """impression_date of all its rows, YYYY-MM-DD."""
    size_bytes: int
    row_groups: tuple[RowGroup, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGroupRef:
    """Where a row group is: in the manifest and in the numbering of rows."""

    file: int
    """Position in Manifest.files."""
    index: int
    """Position in the file."""
    first_row: int
    """row_number of its first row: rows of the manifest before it, pruned row groups included."""
    row_group: RowGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFile:
    """One Parquet file of `<lake>/item_features`, or of a table of vectors."""

    path: str
    """Relative to that table."""
    size_bytes: int
