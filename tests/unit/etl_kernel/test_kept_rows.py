"""What rows of a restated date keep: found by impression, user, item and date, whatever the column's type."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa

from etl.kernel.rows import Lookup, _before, _kept
from usr_ray.config import DAY_US

DAY = dt.date(1970, 1, 2)
ROWS = pa.table(
    {
        "impression_id": ["a", "b", "c", "d", "e"],
        "user_id": pa.array([0, 1, 0, 1, 0], pa.int32()),
        "item_id": pa.array([0, 0, 1, 1, 0], pa.int32()),
        "event_time": np.array([DAY_US, DAY_US + 5, DAY_US, 2 * DAY_US, DAY_US]),
    }
)
FOUND = {
    "user_id": Lookup(pa.array([None, "u", "v"]), np.zeros(0), np.zeros(0), None, {}),
    "item_id": Lookup(pa.array([None, "x", "y"]), np.zeros(0), np.zeros(0), None, {}),
}
KEPT = pa.StructArray.from_arrays(
    [
        pa.array(["c", "b", "d", "a", "e"]),
        pa.array(["u", "v", "v", "u", "v"]),
        pa.array(["y", "x", "y", "y", "x"]),
        pa.array([DAY] * 5),
        pa.array([[1], [2, 3], [], [4], [5]], pa.list_(pa.int64())),
        pa.array([0.5, 1, 2, 3, 4], pa.float32()),
    ],
    names=["impression_id", "user_id", "item_id", "impression_date", "tags", "price"],
)


def test_a_row_keeps_what_it_had_where_impression_user_item_and_date_are_the_same() -> None:
    places = _before(ROWS, FOUND, KEPT)
    # a has another item, d another date and e another user than the row that was there.
    assert places.to_pylist() == [None, 1, 0, None, None]
    tags = pa.array([[7]] * 5, pa.list_(pa.field("element", pa.int64(), nullable=False)))
    assert _kept(KEPT.field("tags"), places, tags).to_pylist() == [[7], [2, 3], [1], [7], [7]]
    assert _kept(KEPT.field("tags"), places, tags).type == tags.type
    price = _kept(KEPT.field("price"), places.slice(1, 2), pa.array([9, 9], pa.float32()))
    assert price.to_pylist() == [1.0, 0.5]


def test_where_no_row_of_the_chunk_was_there_all_are_those_of_now() -> None:
    places = _before(ROWS, FOUND, KEPT.slice(0, 0))
    assert places.to_pylist() == [None] * 5
    assert _kept(KEPT.slice(0, 0).field("price"), places, pa.array([9.0] * 5)).to_pylist() == [9.0] * 5
