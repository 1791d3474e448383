"""Columns that tell a label by themselves: they were written after the click, and no request will have them."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from usr_ray.config import Config
from usr_ray.data.decode import RowGroupDecoder
from usr_ray.data.manifest import Manifest
from usr_ray.data.mature import counted_in_training, usable_row_groups
from usr_ray.evaluation.metrics import auc
from usr_ray.schema import FIRST_ID, LABELS

_MAX_ROWS = 20_000
"""Rows that are looked at, evenly over a row group: a column as good as this shows in far fewer."""
_MIN_ROWS = 30
"""Of each label, and of a value that says it."""
_TOO_GOOD = 0.95
_NUM_BINS = 50
_EVENTS_A_VALUE = 5
"""Rows of the rarer label for each value, at least: by chance alone an AUC is then below 0.7."""
_BY_CHANCE = 1e-9
_OWN = ("user_id", "item_id", "query", "event_hour")


def telltales(config: Config, manifest: Manifest) -> list[str]:
    """Warnings, a line each, of features that alone tell a label of the training rows; ids and counters cannot.

    Raises:
        DataError: no row counts, or a file cannot be read.
    """
    which, spec = counted_in_training(config, manifest), manifest.spec
    decoder = RowGroupDecoder(manifest, which)
    sparse = [f for f in spec.sparse if f.name not in _OWN]
    dense = [f for f in spec.dense if not f.name.startswith("counter_")]
    decoder.columns = [*LABELS, "is_mature", *(f.column for f in sparse), *(f.column for f in dense)]
    if not sparse and not dense:
        return []
    rows = decoder.read(usable_row_groups(manifest, which)[0])
    if which.mature_only:
        rows = rows.filter(pc.field("is_mature"))
    rows = rows.take(np.arange(0, rows.num_rows, max(1, -(-rows.num_rows // _MAX_ROWS))))
    found = []
    for label in LABELS:
        label_N = rows[label].to_numpy()
        if _rarer(label_N) < _MIN_ROWS:
            continue
        told = {f.name: _how(label_N, rows[f.column].to_numpy(), is_of_row=f.owner == "context") for f in sparse}
        told |= {f.name: _how(label_N, binned(label_N, rows[f.column].to_numpy()), is_of_row=False) for f in dense}
        found += [
            f"features: {name} alone tells {label} ({how}); what is written after the click is no feature: take it "
            "out, or log what was known when the item was shown"
            for name, how in told.items()
            if how
        ]
    return found


def _rarer(label_N: NDArray) -> int:
    """Rows of the rarer label."""
    num_positives = int(np.count_nonzero(label_N))
    return min(num_positives, len(label_N) - num_positives)


def binned(label_N: NDArray, value_N: NDArray) -> NDArray[np.int64]:
    """Numbers as ids from FIRST_ID on, by their quantiles; a common value, as what stands for null, has its own."""
    num_bins = min(_NUM_BINS, _rarer(label_N) // (2 * _EVENTS_A_VALUE + 2))
    edges = np.unique(np.quantile(value_N, np.linspace(0, 1, num_bins + 1), method="nearest"))
    return FIRST_ID + np.searchsorted(edges, value_N, "left") + np.searchsorted(edges, value_N, "right")


def _how(label_N: NDArray, id_N: NDArray, *, is_of_row: bool) -> str:
    """By its values' rates, or of a category of the row's own by one value whose rows all have the label; '': not."""
    ids_V, value_N, rows_V = np.unique(id_N, return_inverse=True, return_counts=True)
    if len(ids_V) > _rarer(label_N) / _EVENTS_A_VALUE:  # 30 orders are in 30 of 600 values, whatever they mean
        return ""
    seen_V = np.bincount(value_N, weights=label_N)
    area = auc(label_N, (seen_V / rows_V)[value_N]) or 0.5
    if area > _TOO_GOOD:
        return f"AUC {area:.3f}"
    sure_V = (seen_V == rows_V) & (rows_V >= _MIN_ROWS) & (label_N.mean() ** rows_V < _BY_CHANCE)
    sure_V &= ids_V >= FIRST_ID
    if is_of_row and sure_V.any():
        return f"all {rows_V[sure_V].max():,} rows of one value have it"
    return ""
