"""Why a request was answered as it was: the history that the model saw, and which signals moved each candidate.

A signal of a candidate (its id, a category, a number, a counter) is given the other candidates' values, one after the
other; what belongs to the request (user, query, context, each history) is left empty. A signal's effect is p_ctr as it
is less the mean of p_ctr with the signal replaced: above 0, the signal has raised the candidate.

Shape letters: N candidates, R replacements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.config.counters import COUNTER_COLUMN
from usr_ray.schema import ACTION_ORDER, UNKNOWN_ID, DenseFeature, FeatureSpec, SparseFeature
from usr_ray.serving.ranker import Ranker, RequestError, iso_time

MAX_EXPLAINED = 100
"""Candidates of a request: each costs some ten requests' work."""
_MAX_OTHERS = 8
"""Other candidates whose values a signal is given."""
Inputs = Mapping[str, NDArray[Any]]
Predict = Callable[[Inputs], Mapping[str, NDArray[np.float32]]]


class Explainer:
    """Explains the answers of one version."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker = ranker
        self._names = {feature: ranker.encoder.values(feature) for feature in ("item_id", "query")}

    def answer(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to POST /v1/score with `history` and, for each item, `signals`: name to effect on p_ctr.

        Raises:
            RequestError: see `Ranker.score`; more than MAX_EXPLAINED candidates.
        """
        request = self._ranker.checked(raw)
        if len(request.candidates) > MAX_EXPLAINED:
            raise RequestError(
                f"candidates: {len(request.candidates)}; {MAX_EXPLAINED} are the most that are explained"
            )
        inputs, unknown, is_degraded = self._ranker.encoded(request)
        answer = self._ranker.answered(request, (inputs, unknown, is_degraded), ranked=False)
        effects = effects_of(self._ranker.predict, inputs, self._ranker.encoder.spec)
        for n, item in enumerate(answer["items"]):
            item["signals"] = {name: float(effect_N[n]) for name, effect_N in effects.items()}
        return answer | {"history": self._history(inputs), "time": iso_time(request.time_us)}

    def _history(self, inputs: Inputs) -> list[dict[str, Any]]:
        """The events that the model saw, the newest first; an id that has no value in the vocabulary is None."""
        spec = self._ranker.encoder.spec
        events = []
        for scenario, names in zip(spec.scenarios, spec.histories, strict=True):
            for place in np.flatnonzero(inputs[names.actions][0]).tolist():
                query = None if names.query_ids is None else inputs[names.query_ids][0, place]
                events.append(
                    {
                        "scenario": scenario,
                        "action": "order" if inputs[names.actions][0, place] == ACTION_ORDER else "click",
                        "item": self._names["item_id"].get(int(inputs[names.item_ids][0, place])),
                        "query": None if query is None else self._names["query"].get(int(query)),
                        "age_s": float(inputs[names.ages_s][0, place]),
                    }
                )
        return sorted(events, key=lambda event: float(event["age_s"]))


def effects_of(predict: Predict, inputs: Inputs, spec: FeatureSpec) -> dict[str, NDArray[np.float64]]:
    """Signal -> what it adds to each candidate's p_ctr (N)."""
    as_it_is_N = predict(inputs)["p_ctr"].astype(np.float64)
    effects = {}
    for name, others in _item_signals(inputs, spec):
        num_candidates = len(as_it_is_N)
        replaced_RN = predict(others)["p_ctr"].astype(np.float64).reshape(-1, num_candidates)
        effects[name] = as_it_is_N - replaced_RN.mean(axis=0)
    for name, emptied in _request_signals(inputs, spec):
        effects[name] = as_it_is_N - predict(emptied)["p_ctr"]
    return effects


def _item_signals(inputs: Inputs, spec: FeatureSpec) -> Iterator[tuple[str, Inputs]]:
    """Each signal of the items, with inputs of R * N candidates: it is replaced once in each group of N."""
    lists = {feature.column: feature.name for feature in spec.lists if feature.owner == "item"}
    names = ("item_sparse", "item_dense", *lists)
    of_items = {name: value for name, value in inputs.items() if name in names}
    num_candidates = len(of_items["item_sparse"])
    num_others = min(num_candidates - 1, _MAX_OTHERS)
    # The others at even distances round the list of candidates.
    shifts = [1 + n * (num_candidates - 1) // num_others for n in range(num_others)]
    for kind, features in (("item_sparse", spec.sparse), ("item_dense", spec.dense)):
        signals: dict[str, list[int]] = {}
        for column, name in enumerate(f.name for f in features if f.owner == "item"):
            counter = COUNTER_COLUMN.fullmatch(name)
            signals.setdefault(counter[1] if counter else name, []).append(column)
        for signal, columns in signals.items():
            repeated = {name: np.concatenate([value] * max(num_others, 1)) for name, value in of_items.items()}
            if shifts:
                values = [np.roll(of_items[kind][:, columns], -shift, axis=0) for shift in shifts]
                repeated[kind][:, columns] = np.concatenate(values)
            else:
                nothing = [_nothing(f) for f in features if f.owner == "item"]
                repeated[kind][:, columns] = [nothing[column] for column in columns]
            yield signal, {**inputs, **repeated}
    for of_list, name in lists.items():
        repeated = {other: np.concatenate([value] * max(num_others, 1)) for other, value in of_items.items()}
        values = [np.roll(of_items[of_list], -shift, axis=0) for shift in shifts]
        repeated[of_list] = np.concatenate(values) if values else np.zeros_like(of_items[of_list])
        yield name, {**inputs, **repeated}


def _request_signals(inputs: Inputs, spec: FeatureSpec) -> Iterator[tuple[str, Inputs]]:
    """Each signal of the request, with inputs that have nothing in its place."""
    for owner in ("user", "query", "context"):
        emptied = {}
        for name, features in (("request_sparse", spec.sparse), ("request_dense", spec.dense)):
            columns = [f for f in features if f.owner != "item"]
            own = [n for n, f in enumerate(columns) if f.owner == owner]
            if own and name in inputs:
                emptied[name] = inputs[name].copy()
                emptied[name][:, own] = [_nothing(columns[n]) for n in own]
        for feature in spec.lists:
            if feature.owner == owner:
                emptied[feature.column] = np.zeros_like(inputs[feature.column])
        if any((value != inputs[name]).any() for name, value in emptied.items()):
            yield owner, {**inputs, **emptied}
    for scenario, names in zip(spec.scenarios, spec.histories, strict=True):
        parts = [n for n in (names.item_ids, names.actions, names.ages_s, names.query_ids) if n is not None]
        if inputs[names.actions].any():
            yield f"history of {scenario}", {**inputs, **{name: np.zeros_like(inputs[name]) for name in parts}}


def _nothing(feature: SparseFeature | DenseFeature) -> int:
    """What a column holds where there is no value: of a user or item, one that nobody knows."""
    if feature.name in ("user_id", "item_id"):
        return UNKNOWN_ID
    return feature.nothing if isinstance(feature, SparseFeature) else 0
