"""Sums over rows of the samples as they are written: what the reports of a build say of its dates. Numpy only."""

from __future__ import annotations

import functools
import json
import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.kernel.events import Bools
from etl.kernel.rows import EVENT_HOUR
from usr_ray.schema import ALL_LABELS, FIRST_ID, UNKNOWN_ID, FeatureSpec, SparseFeature, index_column

COLD = ("unknown_user", "unknown_item", "unknown_query", "no_history", "new_user", "new_item")
"""Kinds of cold impressions: the value has no id of its own; no event before; no training impression of it."""
WITH_QUERY = "with_query"
"""Impressions that have a query: what `unknown_query` is a part of."""


def counted_features(spec: FeatureSpec) -> list[SparseFeature]:
    """Features whose values can be unknown or missing."""
    return [feature for feature in spec.sparse if feature.name != EVENT_HOUR]


def count_rows(batch: pa.RecordBatch, spec: FeatureSpec, new: dict[str, Bools | None]) -> dict[int, dict[str, Any]]:
    """Scenario's position -> sums over its rows: `rows`, `mature`, labels, coverage and cold impressions.

    Args:
        batch: rows in the columns of the table.
        spec: of the table.
        new: `new_user` and `new_item` of every row; None where nobody can know.
    """
    scenario = batch.column(index_column("scenario")).to_numpy()
    sums: dict[int, dict[str, Any]] = {int(k): {} for k in np.unique(scenario)}

    def add(name: str, values: np.ndarray | None) -> None:
        found = None if values is None else np.bincount(scenario, values.astype(np.float64))
        for k, row in sums.items():
            row[name] = None if found is None else int(found[k])

    def column(name: str) -> np.ndarray:
        return batch.column(name).to_numpy(zero_copy_only=False)

    add("rows", np.ones(batch.num_rows))
    add("mature", column("is_mature"))
    for name in ALL_LABELS:
        add(name, column(name))
    for feature in counted_features(spec):
        ids = column(feature.column)
        add(f"known_{feature.name}", ids >= FIRST_ID)
        add(f"present_{feature.name}", ids >= UNKNOWN_ID)
    for kind, name in (("user", "user_id"), ("item", "item_id"), ("query", "query")):
        add(f"unknown_{kind}", column(index_column(name)) == UNKNOWN_ID)
    lengths = (pc.list_value_length(batch.column(h.item_ids)).to_numpy() == 0 for h in spec.histories)
    add("no_history", functools.reduce(operator.and_, lengths))
    add(WITH_QUERY, column(index_column("query")) >= UNKNOWN_ID)
    for name, is_new in new.items():
        add(name, is_new)
    return sums


def add_counts(parts: Iterable[dict[int, dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    """Sums of several batches or files of one date."""
    total: dict[int, dict[str, Any]] = defaultdict(dict)
    for part in parts:
        for k, row in part.items():
            for name, value in row.items():
                total[int(k)][name] = None if value is None else total[int(k)].get(name, 0) + value
    return dict(total)


def named_counts(files: Iterable[tuple[str, str]], scenarios: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row a date and scenario: `date`, `scenario` and the sums; of (date, sums as JSON) of each file."""
    by_date: dict[str, list[dict[int, dict[str, Any]]]] = defaultdict(list)
    for date, text in files:
        by_date[date].append(json.loads(text))
    return [
        {"date": date, "scenario": scenarios[k], **row}
        for date, parts in sorted(by_date.items())
        for k, row in sorted(add_counts(parts).items())
    ]
