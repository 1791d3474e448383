"""Numbers whose scale the training dates decide: what is fitted, and what becomes of a value. Numpy and Arrow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from etl.kernel.events import Ints, context_column
from etl.kernel.packs import unpack
from usr_ray.config import DAY_US
from usr_ray.schema import FIRST_ID, UNKNOWN_ID

COUNTED = pa.schema([("feature", pa.string()), ("number", pa.float64()), ("count", pa.int64())])
"""How many impressions have a value of a number; every pair at most once a pack."""


def bucket_ids(values: NDArray[np.float64], edges: Sequence[float]) -> Ints:
    """FIRST_ID + how many edges are not above the value; UNKNOWN_ID for null, NaN and infinity (`bucket` in Spark).

    As float32: 0.1 is in the bucket that begins at 0.1 whether a log held it in 32 bits or a request wrote it out.
    """
    usable = np.isfinite(values)
    with np.errstate(over="ignore"):  # infinite then: the last bucket, or the first
        singles = np.where(usable, values, 0.0).astype(np.float32)
    found = np.searchsorted(np.array(edges, np.float32), singles, side="right")
    return np.where(usable, found + FIRST_ID, UNKNOWN_ID).astype(np.int64)


def standardised(values: NDArray[np.float64], mean: float, deviation: float) -> NDArray[np.float32]:
    """(x - mean) / deviation; 0 for null, NaN and infinity."""
    usable = np.isfinite(values)
    return ((np.where(usable, values, mean) - mean) / deviation).astype(np.float32)


def number_counts(
    batches: Iterable[pa.RecordBatch], names: Sequence[str], days: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    """Rows of COUNTED: the context numbers `names` of the impressions on some days (since 1970), of `pack` rows."""
    for batch in batches:
        for targets in batch.column("targets"):
            rows = unpack(targets)
            on_days = np.isin(rows["event_time"].to_numpy() // DAY_US, days)
            for name in names:
                values = rows[context_column(name)].to_numpy()[on_days]
                found, counts = np.unique(values[np.isfinite(values)], return_counts=True)
                arrays = [pa.repeat(name, len(found)), pa.array(found), pa.array(counts.astype(np.int64))]
                yield pa.RecordBatch.from_arrays(arrays, schema=COUNTED)
