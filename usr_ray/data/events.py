"""What the lake knows of users beside the samples: the attributed clicks and orders of `<lake>/state`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from usr_ray.data.manifest import open_table, table_address
from usr_ray.schema import ACTION_CLICK, PAST_CLICK, STATE

COLUMNS = ("user_id", "scenario", "action", "id", "item_id", "query", "event_time", "known_time")


def read_events(lake: Path | str) -> tuple[pa.Table, int]:
    """All history events of a lake, and the version of the table that they come from.

    Returns:
        COLUMNS: scenario (int32, position in the configuration's scenarios), action (int64, 1 click, 2 order), times as
        timestamps in microseconds, UTC; `id` is the click's or order's; query is null outside scenarios with queries.
        Sorted by (user_id, event_time, action, id, item_id): the order of a history.

    Raises:
        UserError: the lake has no such table.
    """
    table = open_table(table_address(lake, STATE), None)
    names = ["kind" if name == "action" else name for name in COLUMNS]
    events = table.to_pyarrow_table(columns=names, filters=[("part", "=", "event")])
    action = pc.add(pc.subtract(events["kind"].cast(pa.int64()), PAST_CLICK), ACTION_CLICK)
    events = events.append_column("action", action).select(list(COLUMNS))
    keys = [(name, "ascending") for name in ("user_id", "event_time", "action", "id", "item_id")]
    return events.sort_by(keys), table.version()
