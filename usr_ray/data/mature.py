"""Which rows may be trained on: those whose labels are final, and the row groups that may hold one."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from usr_ray.config import DAY_US, Config, end_of_us, parse_dates
from usr_ray.data.manifest import DataError, Manifest
from usr_ray.data.parts import RowGroupRef
from usr_ray.schema import FeatureSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class WhichRows:
    """Which rows have weight."""

    ready_before_us: int | None = None
    """Rows whose labels close later (labels_close_us) get weight 0, and row groups that hold only such rows are not
    read; None: no such limit."""
    mature_only: bool = True
    """Rows with is_mature false get weight 0, and row groups that hold only such rows are not read."""
    order_wait_us: int = 0
    """Config.order_wait_us: above 0, a row has weight once its labels of clicks have closed, and those of orders that
    close after ready_before_us are schema.OPEN_LABEL."""
    only_scenario: str = ""
    """Rows of other scenarios get weight 0, and the histories of other scenarios are empty; '': all count."""


EVERY_ROW = WhichRows(mature_only=False)


def counted_in_training(config: Config, manifest: Manifest) -> WhichRows:
    """With data.mature_only, only rows count whose labels (by data.final_labels clicks' alone) were final at the train
    cut-off, midnight UTC after the last training date: a global label that closes later has seen the held-out days.
    """
    last = parse_dates(config.data.train_dates or manifest.dates[-1], where="data.train_dates")[1]
    return WhichRows(
        ready_before_us=end_of_us(last) if config.data.mature_only else None,
        mature_only=config.data.mature_only,
        order_wait_us=config.order_wait_us,
        only_scenario=config.data.only_scenario,
    )


def labels_close_us(event_time_us: NDArray[np.int64], spec: FeatureSpec) -> NDArray[np.int64]:
    """When a row's labels are final: t + W_g + W_o, or the end of t's UTC day + W_g + W_o ("day" span).

    The second is never too early: clicks of the day and of the click window end before it by W_o or more. So labels of
    clicks, the global ones among them, are final W_o before that.
    """
    start = (event_time_us // DAY_US + 1) * DAY_US if spec.label_day_span else event_time_us
    return start + spec.label_delay_us


def usable_row_groups(manifest: Manifest, which: WhichRows) -> list[RowGroupRef]:
    """Row groups that may hold a row with weight.

    Raises:
        DataError: there is none, so there is nothing to train on.
    """
    usable = []
    for ref in manifest.row_groups():
        earliest = labels_close_us(np.array([ref.row_group.min_event_time_us]), manifest.spec)[0] - which.order_wait_us
        in_time = which.ready_before_us is None or earliest <= which.ready_before_us
        if in_time and (ref.row_group.has_mature or not which.mature_only):
            usable.append(ref)
    if usable:
        return usable
    where = f"{manifest.table_uri}, {manifest.dates[0]} to {manifest.dates[-1]}"
    if which.mature_only and not any(ref.row_group.has_mature for ref in manifest.row_groups()):
        evaluates = which.ready_before_us is None
        way_out = (
            "name earlier dates" if evaluates else "set data.mature_only=false to read labels that may still change"
        )
        raise DataError(
            f"{where}: none of the {manifest.num_rows} rows is mature; rebuild the dates with a later --watermark, "
            f"or {way_out}"
        )
    cut_off = dt.datetime.fromtimestamp((which.ready_before_us or 0) / 1e6, tz=dt.UTC)
    raise DataError(
        f"{where}: no row's labels are final by {cut_off:%Y-%m-%dT%H:%M:%SZ} (they close "
        f"{(manifest.spec.label_delay_us - which.order_wait_us) / 3.6e9:g} hours after the impression); take more days"
    )
