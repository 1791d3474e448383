"""Requests that are scored in one call of the program for rows: for a GPU, which one request does not fill.

The first request of a batch waits a few milliseconds, and longer while the device is busy; it then takes all that wait
and runs them together. One that is late by then leaves, and the next is the first. Each request's rows carry its user,
query, context and histories (`tiled`), so a batch holds requests of any scenarios and users.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.schema import FeatureSpec

Inputs = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[np.float32]]
MAX_ROWS = 16_384
"""Most rows of one call; a request that is longer goes alone."""
_NO_DEADLINE_S = 3600.0
_PARTS = {f"{owner}_{kind}" for owner in ("request", "item") for kind in ("sparse", "dense")}
"""Inputs of request.onnx that are `sparse` and `dense` of model.onnx, in two parts. Scenarios may begin so too."""


class LateError(Exception):
    """The device did not come to a request within its deadline."""


def tiled(inputs: Inputs, spec: FeatureSpec) -> dict[str, NDArray[Any]]:
    """The inputs of model.onnx for those of request.onnx: what is the request's stands on every candidate's row."""
    num_rows = len(inputs["item_sparse"])
    found = {
        name: value if len(value) == num_rows else np.repeat(value, num_rows, axis=0)
        for name, value in inputs.items()
        if name not in _PARTS
    }
    for kind, features in (("sparse", spec.sparse), ("dense", spec.dense)):
        of_item = np.array([feature.owner == "item" for feature in features])
        parts = {is_item: inputs.get(f"{'item' if is_item else 'request'}_{kind}") for is_item in (True, False)}
        given = {is_item: part for is_item, part in parts.items() if part is not None}
        if given:
            whole = np.empty((num_rows, len(features)), next(iter(given.values())).dtype)
            for is_item, part in given.items():
                whole[:, of_item == is_item] = part
            found[kind] = whole
    return found


class Batcher:
    """Takes the place of a version's program for requests; threads call it side by side.

    Args:
        run: the program for rows: takes inputs of any number of rows, gives outputs by name.
        wait_s: how long the first request of a batch waits for others.
    """

    def __init__(self, run: Callable[[Inputs], Outputs], spec: FeatureSpec, *, wait_s: float = 0.002) -> None:
        self._run, self._spec, self._wait_s = run, spec, wait_s
        self.deadline_s: float | None = None
        """A request that has no answer by then raises LateError; None: the first calls of a device take their time."""
        self._waiting: list[tuple[dict[str, NDArray[Any]], Future[Outputs]]] = []
        """Requests in the order they came; the first takes them all once the device is free."""
        self._is_busy = False
        self._changed = threading.Condition()

    def predict(self, inputs: Inputs) -> Outputs:
        """The outputs for the inputs of one request. Raises LateError, and what the program raises."""
        found: Future[Outputs] = Future()
        ends = time.monotonic() + (_NO_DEADLINE_S if self.deadline_s is None else self.deadline_s)
        one = tiled(inputs, self._spec), found
        with self._changed:
            self._waiting.append(one)
            is_first = len(self._waiting) == 1
        if is_first:
            time.sleep(self._wait_s)

        def leads() -> bool:
            return not self._is_busy and bool(self._waiting) and self._waiting[0] is one

        with self._changed:
            self._changed.wait_for(lambda: found.done() or leads(), max(ends - time.monotonic(), 0.0))
            if is_leader := leads():
                batch, self._waiting = self._waiting, []  # the next request is the first of another batch
                self._is_busy = True
            elif not found.done():
                found.cancel()  # where its part of a batch has not begun it is left out
                self._waiting = [other for other in self._waiting if other is not one]
                self._changed.notify_all()  # whoever is the first now
                raise LateError
        if is_leader:
            self._lead(batch)
        return found.result()

    def _lead(self, batch: list[Any]) -> None:
        try:
            for part in _parts(batch):
                self._answer(part)
                with self._changed:
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _answer(self, part: list[tuple[dict[str, NDArray[Any]], Future[Outputs]]]) -> None:
        part = [(rows, found) for rows, found in part if found.set_running_or_notify_cancel()]
        if not part:
            return
        try:
            inputs = {name: np.concatenate([rows[name] for rows, _ in part]) for name in part[0][0]}
            outputs = self._run(inputs)
        except Exception as error:  # of each that waits, or they would wait in vain
            for _, found in part:
                found.set_exception(error)
            return
        ends = np.cumsum([len(rows["scenario"]) for rows, _ in part]).tolist()
        for (rows, found), end in zip(part, ends, strict=True):
            found.set_result({name: values[end - len(rows["scenario"]) : end] for name, values in outputs.items()})


def _parts(batch: list[Any]) -> list[list[Any]]:
    """The requests of a batch in their order, at most MAX_ROWS rows a call."""
    parts: list[list[Any]] = []
    num_rows = 0
    for one in batch:
        size = len(one[0]["scenario"])
        if not parts or num_rows + size > MAX_ROWS:
            parts.append([])
            num_rows = 0
        parts[-1].append(one)
        num_rows += size
    return parts
