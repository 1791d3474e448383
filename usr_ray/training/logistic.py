"""A logistic regression on crossed columns: what a team would build first, and what a network must beat.

scikit-learn fits it; here are its columns. It sees a row's categories and numbers, and no history.

Shape letters: N rows, F features, T tasks (schema.TASKS), C columns of the matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from usr_ray.config import UserError
from usr_ray.data.reader import SampleReader
from usr_ray.schema import OPEN_LABEL, TASKS, FeatureSpec

INVERSE_L2 = 0.1
"""scikit-learn's C."""
MIN_ROWS = 5
"""Training rows of a value below which it has no weight."""
SCENARIO = "scenario"


@dataclass(frozen=True, slots=True)
class PlainRows:
    """The rows that count of a reader, as arrays."""

    sparse_NF: NDArray[np.int64]
    dense_NF: NDArray[np.float32]
    scenario_N: NDArray[np.int64]
    labels_NT: NDArray[np.float32]
    row_number_N: NDArray[np.int64]

    @classmethod
    def read(cls, reader: SampleReader) -> PlainRows:
        """All rows of the first epoch, in the reader's order; ends the reader."""
        parts = []
        with reader:
            for batch in reader.batches(epoch=0):
                taken = batch.weights_B > 0
                columns = (batch.sparse_BF, batch.dense_BF, batch.scenario_B, batch.labels_BT, batch.row_number_B)
                parts.append([column[taken].numpy() for column in columns])
        sparse_NF, dense_NF, scenario_N, labels_NT, row_number_N = map(np.concatenate, zip(*parts, strict=True))
        return cls(sparse_NF.astype(np.int64), dense_NF, scenario_N, labels_NT[:, : len(TASKS)], row_number_N)


def crossed_columns(spec: FeatureSpec) -> list[tuple[str, ...]]:
    """The categories alone and by scenario; by scenario the user's side and the query, crossed with the item's: in
    pairs (but for user x item), and two categories of the user with one of the item.
    """
    user, item, query = ([f.name for f in spec.sparse if f.owner == owner] for owner in ("user", "item", "query"))
    alone = [(f.name,) for f in spec.sparse]
    pairs = [pair for pair in itertools.product((*user, *query), item) if pair != ("user_id", "item_id")]
    profile = [name for name in user if name != "user_id"]
    triples = [(*two, one) for two in itertools.combinations(profile, 2) for one in item]
    return [(SCENARIO,), *alone, *((SCENARIO, *names) for names in (*alone, *pairs, *triples))]


def design(spec: FeatureSpec, train: PlainRows, scored: PlainRows) -> tuple[sparse.csr_array, sparse.csr_array]:
    """(N, C) of both: a column for each value of each cross that training has often enough, numbers standardised."""
    places = {f.name: place for place, f in enumerate(spec.sparse)}
    sizes = {f.name: f.num_embeddings for f in spec.sparse}

    def keys(rows: PlainRows, names: Sequence[str]) -> NDArray[np.int64]:
        found = np.zeros(len(rows.scenario_N), dtype=np.int64)
        for name in names:
            ids = rows.scenario_N if name == SCENARIO else rows.sparse_NF[:, places[name]]
            found = found * sizes.get(name, len(spec.scenarios)) + ids
        return found

    parts: tuple[list[Any], list[Any]] = ([], [])
    for names in crossed_columns(spec):
        known, counts = np.unique(keys(train, names), return_counts=True)
        known = known[counts >= MIN_ROWS]
        for rows, found in zip((train, scored), parts, strict=True):
            own = keys(rows, names)
            column = np.minimum(np.searchsorted(known, own), max(0, len(known) - 1))
            inside = np.flatnonzero(known[column] == own) if len(known) else np.zeros(0, dtype=np.int64)
            entries = (np.ones(len(inside)), (inside, column[inside]))
            found.append(sparse.csr_array(entries, shape=(len(own), len(known))))
    mean, deviation = mean_and_deviation(train.dense_NF)
    for rows, found in zip((train, scored), parts, strict=True):
        found.append(sparse.csr_array((rows.dense_NF - mean) / deviation))
    return sparse.hstack(parts[0], format="csr"), sparse.hstack(parts[1], format="csr")


def mean_and_deviation(dense_NF: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each column, the deviation never 0; summed in float64, as a float32 sum of a million rows is off already."""
    mean_F = np.asarray(dense_NF.mean(axis=0, dtype=np.float64), dtype=np.float32)
    deviation_F = np.asarray(dense_NF.std(axis=0, dtype=np.float64), dtype=np.float32)
    return mean_F, deviation_F + np.float32(1e-6)


def logistic_regression(
    spec: FeatureSpec, train: PlainRows, scored: PlainRows, inverse_l2: float = INVERSE_L2
) -> NDArray[np.float64]:
    """Probabilities (N, T) of the scored rows, one regression a task; NaN where no training row's log knows the label.

    Raises:
        UserError: scikit-learn is not installed, or the training rows lack a label.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError(
            "--compare: scikit-learn is not installed for its logistic regression; run: pip install scikit-learn"
        ) from None
    columns, wanted = design(spec, train, scored)
    probs = []
    for place, task in enumerate(TASKS):
        # An unobserved 0 is no label, and an open one neither.
        known_N = np.array(spec.known_labels)[train.scenario_N, place]
        if not known_N.any():  # a run of such a scenario alone: no row is judged by this task either
            probs.append(np.full(len(scored.scenario_N), np.nan))
            continue
        known_N &= train.labels_NT[:, place] != OPEN_LABEL
        labels_N = train.labels_NT[known_N, place]
        if len(np.unique(labels_N)) < 2:
            raise UserError(f"--compare: all training rows have one label of {task}; train on dates that have both")
        fitted = LogisticRegression(C=inverse_l2, max_iter=200, tol=1e-3).fit(columns[known_N], labels_N)
        probs.append(fitted.predict_proba(wanted)[:, 1])
    return np.stack(probs, axis=1)
