"""Which rows may be trained on: those whose labels are final, and the row groups that may hold one."""

from __future__ import annotations

import datetime as dt

import numpy as np
from numpy.typing import NDArray

from usr_ray.config import DAY_US
from usr_ray.data.manifest import DataError, Manifest
from usr_ray.data.parts import RowGroupRef
from usr_ray.schema import FeatureSpec


def labels_close_us(event_time_us: NDArray[np.int64], spec: FeatureSpec) -> NDArray[np.int64]:
    """When a row's labels are final (contract 2.6): t + W_g + W_o, or the end of t's UTC day + W_g + W_o ("day" span).

    The second is never too early: clicks of the day and of the click window end before it by W_o or more. So labels of
    clicks, the global ones among them, are final W_o before that.
    """
    start = (event_time_us // DAY_US + 1) * DAY_US if spec.label_day_span else event_time_us
    return start + spec.label_delay_us


def usable_row_groups(
    manifest: Manifest, *, ready_before_us: int | None, mature_only: bool, order_wait_us: int = 0
) -> list[RowGroupRef]:
    """Row groups that may hold a row with weight: some mature row, and labels that close by ready_before_us.

    `order_wait_us`: Config.order_wait_us; above 0 the labels of clicks must close by then.

    Raises:
        DataError: there is none, so there is nothing to train on.
    """
    usable = []
    for ref in manifest.row_groups():
        earliest = labels_close_us(np.array([ref.row_group.min_event_time_us]), manifest.spec)[0] - order_wait_us
        if (ready_before_us is None or earliest <= ready_before_us) and (ref.row_group.has_mature or not mature_only):
            usable.append(ref)
    if usable:
        return usable
    where = f"{manifest.table_uri}, {manifest.dates[0]} to {manifest.dates[-1]}"
    if mature_only and not any(ref.row_group.has_mature for ref in manifest.row_groups()):
        raise DataError(
            f"{where}: none of the {manifest.num_rows} rows is mature; rebuild the dates with a later --watermark, "
            "or set data.mature_only=false to read labels that may still change"
        )
    cut_off = dt.datetime.fromtimestamp((ready_before_us or 0) / 1e6, tz=dt.UTC)
    raise DataError(
        f"{where}: no row's labels are final by {cut_off:%Y-%m-%dT%H:%M:%SZ} (they close "
        f"{(manifest.spec.label_delay_us - order_wait_us) / 3.6e9:g} hours after the impression); take more days"
    )
