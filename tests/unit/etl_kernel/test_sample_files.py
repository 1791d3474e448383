"""Rules and sums of the rows as they are written, against plain Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from etl.build.sample_counts import add_counts, count_rows
from etl.build.sample_files import broken_rule
from etl.lake.tables import label_constraints
from usr_ray.schema import ALL_LABELS, FeatureSpec, SparseFeature, index_column

pytestmark = pytest.mark.unit

BAD = {
    # In the order is_click, is_order, is_click_global, is_order_global.
    "is_click_is_0_or_1": (0.5, 0, 1, 0),
    "is_order_is_0_or_1": (1, float("nan"), 1, 1),
    "is_click_global_is_0_or_1": (1, 0, 2, 0),
    "is_order_global_is_0_or_1": (1, 0, 1, 0.5),
    "is_order_le_is_click": (0, 1, 1, 1),
    "is_click_le_is_click_global": (1, 0, 0, 0),
    "is_order_le_is_order_global": (1, 1, 1, 0),
    "is_order_global_le_is_click_global": (0, 0, 0, 1),
}


def labels(*rows: tuple[float, ...]) -> pa.RecordBatch:
    columns = [pa.array([row[n] for row in rows], pa.float32()) for n in range(len(ALL_LABELS))]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema([(name, pa.float32()) for name in ALL_LABELS]))


def test_every_rule_of_the_table_is_seen_to() -> None:
    assert set(BAD) == set(label_constraints())
    good = [(0, 0, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1), (0, 0, 1, 1)]
    assert broken_rule(labels(*good)) is None
    for name, row in BAD.items():
        assert broken_rule(labels(*good, row)) == name


def test_a_null_where_none_may_be_is_a_broken_rule() -> None:
    schema = pa.schema([pa.field(name, pa.float32(), nullable=False) for name in ALL_LABELS])
    batch = pa.RecordBatch.from_arrays([pa.array([None], pa.float32())] * len(ALL_LABELS), schema=schema)
    assert broken_rule(batch) == "is_click IS NOT NULL"


SPEC = FeatureSpec(
    scenarios=("search", "feed", "related"),
    query_scenarios=("search",),
    history_length=2,
    label_delay_us=0,
    dense=(),
    sparse=tuple(
        SparseFeature(name=n, column=index_column(n), num_embeddings=9, owner="context")
        for n in ("user_id", "item_id", "query", "event_hour", "device")
    ),
)


def test_sums_equal_a_loop_over_the_rows_and_add_up() -> None:
    rng = np.random.default_rng(3)
    rows = [
        {"scenario_index": int(rng.choice([0, 2])), "is_mature": bool(rng.integers(2))}
        | {name: float(rng.integers(2)) for name in ALL_LABELS}
        | {feature.column: int(rng.integers(4)) for feature in SPEC.sparse}
        | {h.item_ids: [5] * int(rng.integers(2)) for h in SPEC.histories}
        for _ in range(200)
    ]
    is_new = rng.integers(2, size=200).astype(np.bool_)
    halves = [
        count_rows(pa.RecordBatch.from_pylist(rows[part]), SPEC, {"new_user": is_new[part], "new_item": None})
        for part in (slice(0, 90), slice(90, 200))
    ]
    found = add_counts(halves)
    assert sorted(found) == [0, 2]
    for k, sums in found.items():
        of_k = [(row, new) for row, new in zip(rows, is_new, strict=True) if row["scenario_index"] == k]
        mine = [row for row, _ in of_k]
        want = {"rows": len(mine), "mature": sum(row["is_mature"] for row in mine), "new_item": None}
        want |= {name: int(sum(row[name] for row in mine)) for name in ALL_LABELS}
        for name in ("user_id", "item_id", "query", "device"):
            want[f"known_{name}"] = sum(row[f"{name}_index"] >= 2 for row in mine)
            want[f"present_{name}"] = sum(row[f"{name}_index"] >= 1 for row in mine)
        for kind, name in (("user", "user_id"), ("item", "item_id"), ("query", "query")):
            want[f"unknown_{kind}"] = sum(row[f"{name}_index"] == 1 for row in mine)
        want["no_history"] = sum(not any(row[h.item_ids] for h in SPEC.histories) for row in mine)
        want["with_query"] = sum(row["query_index"] >= 1 for row in mine)
        want["new_user"] = sum(bool(new) for _, new in of_k)
        assert sums == want
