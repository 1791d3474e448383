"""Score one request: a user and candidates in, probabilities out. The service's core, and a library of its own.

    ranker = Ranker.load("registry")
    ranker.rank(scenario="search", user_id="u1", query="shoes", candidates=["i1", "i2"])

One instance serves any number of threads: files are memory-mapped, and ONNX Runtime's sessions are shared.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.config import UserError
from usr_ray.schema import OF_ORDERS, TASKS
from usr_ray.serving.batching import Batcher
from usr_ray.serving.counters import Counters
from usr_ray.serving.encode import (
    EPOCH,
    EncodeError,
    Encoder,
    Profile,
    UserEvents,
    category_text,
    micros_of,
    without_nulls,
)
from usr_ray.serving.events import EventLog, Row, Rules, with_live
from usr_ray.serving.runtime import ExportedModel
from usr_ray.serving.stores import ItemTable, StoreError, UserStore
from usr_ray.serving.versions import (
    GOLDEN,
    MODEL,
    STABLE,
    OtherVersions,
    RegistryError,
    model_spec,
    open_counters,
    open_encoder,
    stable_folder,
    verified_version,
)

MAX_CANDIDATES = 2000
_NUM_READERS = 4
"""Threads that read users: a store that hangs blocks this many, and the next requests are answered without it."""
_DEVICE_DEADLINE_S = 0.5
"""Longest wait for a call that a GPU shares among requests, once it has answered the golden ones."""
GOLDEN_TOLERANCE = 1e-6
_USED = ("version", "model_id", "as_of", "rules")
"""Entries of version.json that a ranker needs."""
_MAX_WEIGHT = 1e300
_SUSPECT = 1e4
"""Of a scaled number: a program that is sound gives no NaN for smaller ones."""
STAGES = ("checks", "encoder", "program")
"""Stages of an answer: the request's fields; stores and encoder; the program and making the answer."""
_FIELDS = ("request_id", "scenario", "user_id", "query", "context", "time", "candidates", "task", "k")


Program = ExportedModel | Batcher
"""What scores the inputs of one request."""


class RequestError(UserError):
    """A request that cannot be answered: one line naming the field, what was found and what is needed."""


class ProbabilityError(UserError):
    """The program gave a probability that is no number, and no value of the request is to blame."""


def iso_time(micros: int) -> str:
    """ISO 8601 of microseconds since 1970, UTC."""
    return (EPOCH + dt.timedelta(microseconds=micros)).isoformat()


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request."""

    request_id: str | None
    scenario: int
    user_id: str
    query: str | None
    context: Profile
    time_us: int
    candidates: list[str]
    given: dict[int, Profile]
    """Features of candidates that came with the request, by place."""
    weights: tuple[float, float]
    """Weights of p_ctr and p_ctcvr in a ranking."""
    k: int | None


class Ranker:
    """One version of a model with its items and users; made by `load` or `open`."""

    def __init__(
        self,
        version: Mapping[str, Any],
        program: Program,
        encoder: Encoder,
        stores: tuple[ItemTable, UserStore],
        *,
        exact_from_us: int,
        counters: Counters | None = None,
    ) -> None:
        self.version = version
        self.encoder = encoder
        self._program = program
        self._items, self._users = stores
        self._counters = counters
        self._exact_from_us = exact_from_us
        self._rules = Rules(**version["rules"])
        self.null_values: Mapping[str, Collection[str]] = version.get("null_values", {})
        """Log -> texts that stand for no value in it; versions published before the builds noted them have none."""
        self._log: EventLog | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._deadline_s: float | None = None
        self._others: OtherVersions | None = None

    @classmethod
    def load(cls, registry: Path | str, *, num_threads: int = 1) -> Ranker:
        """The stable version of a registry, without events since it was published.

        Raises:
            UserError: no registry, or a version that is damaged or does not answer its golden requests as it did.
        """
        return cls.open(stable_folder(Path(registry)), num_threads=num_threads)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        num_threads: int = 1,
        log: EventLog | None = None,
        deadline_s: float | None = None,
        device: str = "cpu",
    ) -> Ranker:
        """A version by its folder, for a service.

        Args:
            num_threads: threads of ONNX Runtime for one request.
            log: the events since the version was published.
            deadline_s: how long a request waits for what is known of its user; None: as long as it takes.
            device: 'cuda': requests of several threads share a call on a GPU (batching.Batcher).

        Raises:
            UserError: see `load`; there is no GPU, or the version has no program for rows.
        """
        ranker = cls.of_files(folder, verified_version(folder, *_USED), num_threads=num_threads, device=device)
        ranker.check_golden(json.loads((folder / GOLDEN).read_text(encoding="utf-8")))
        ranker._log = log
        ranker._others = OtherVersions(folder, ranker.encoder)
        ranker.read_within(deadline_s)
        if isinstance(ranker._program, Batcher):
            ranker._program.deadline_s = _DEVICE_DEADLINE_S
        return ranker

    @classmethod
    def of_files(cls, folder: Path, version: Mapping[str, Any], *, num_threads: int = 1, device: str = "cpu") -> Ranker:
        """A version that is neither verified nor asked its golden requests, as `publish` has none of it yet.

        Raises:
            UserError: the model, or a store, is damaged.
        """
        program: Program = ExportedModel(
            folder / MODEL, num_threads=num_threads, per_request=device == "cpu", device=device
        )
        if device != "cpu":
            program = Batcher(program.predict, model_spec(folder))
        counters = open_counters(folder)
        encoder = open_encoder(folder, counters)
        stores = ItemTable(folder), _open_users(folder, version, encoder)
        exact_from_us = micros_of(version["as_of"])
        return cls(version, program, encoder, stores, exact_from_us=exact_from_us, counters=counters)

    def read_within(self, deadline_s: float | None) -> None:
        """Answer without history, marked degraded, where a user cannot be read within this many seconds."""
        self._deadline_s = deadline_s
        self._readers = None if deadline_s is None else ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="read")

    def check_golden(self, golden: Sequence[Mapping[str, Any]]) -> None:
        """Answer requests whose answers are known.

        Raises:
            RegistryError: a probability differs by more than GOLDEN_TOLERANCE. StoreError: see `golden_items`.
        """
        for case in golden:
            for found, expected in zip(self.golden_items(case["request"]), case["items"], strict=True):
                for name, value in expected.items():
                    if found[name] is None:  # of orders that nobody logs: older versions kept a number
                        continue
                    if found[name] != value and not (name != "id" and abs(found[name] - value) <= GOLDEN_TOLERANCE):
                        raise RegistryError(
                            f"version {self.version['version']}: {name} of a golden request is {found[name]}, it was "
                            f"{value} when it was published; publish it again with jobs/publish.py on such a machine"
                        )

    def golden_items(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The items of an answer that others are compared with. Raises StoreError where the user cannot be read."""
        answer = self.score(request)
        if answer["degraded"]:
            raise StoreError(
                f"version {self.version['version']}: user {request['user_id']!r} of a golden request cannot be read; "
                "see that the store of its users answers, and try again"
            )
        found: list[dict[str, Any]] = answer["items"]
        return found

    def rank(self, **request: Any) -> dict[str, Any]:
        """Score, the candidates with the largest probabilities first, at most `k` of them."""
        return self.answer(request, ranked=True)

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Probabilities of the candidates of a request (docs/serving.md), in their order.

        Raises:
            RequestError: a field is missing, unknown, or holds what it cannot. StoreError: the store is damaged.
        """
        return self.answer(request, ranked=False)

    def answer(
        self, raw: Mapping[str, Any], *, ranked: bool, spent: Callable[[str, float], None] | None = None
    ) -> dict[str, Any]:
        """The answer to POST /v1/score, or with `ranked` to /v1/rank.

        Args:
            spent: called with the name of each stage and its seconds.
        """
        times = [time.perf_counter()]
        request = self.checked(raw)
        times.append(time.perf_counter())
        encoded = self.encoded(request)
        times.append(time.perf_counter())
        answer = self.answered(request, encoded, ranked=ranked)
        times.append(time.perf_counter())
        if spent is not None:
            for stage, (start, end) in zip(STAGES, pairwise(times), strict=True):
                spent(stage, end - start)
        return answer | {"items": answer["items"][: request.k]}

    def answered(
        self, request: Request, encoded: tuple[dict[str, NDArray[Any]], dict[str, Any], bool], *, ranked: bool
    ) -> dict[str, Any]:
        """The answer to a checked request that was encoded, with all of its candidates.

        Raises:
            RequestError: a number of the request is so large that a probability is none. ProbabilityError: it is none,
                and the numbers are the lake's or the model's.
        """
        inputs, unknown, is_degraded = encoded
        probs = self.predict(inputs)
        order = np.arange(len(request.candidates))
        if ranked:
            # In float64: as float32 a large weight is infinite, a small one 0, and all candidates are equal.
            ctr_N, ctcvr_N = (probs[name].astype(np.float64) for name in ("p_ctr", "p_ctcvr"))
            value_N = request.weights[0] * ctr_N + request.weights[1] * ctcvr_N
            order = np.argsort(-value_N, kind="stable")
        names, spec = list(probs), self.encoder.spec
        # Where nobody logs orders their heads were not trained on such rows: what they say is no probability.
        unknown_names = OF_ORDERS if spec.scenarios[request.scenario] in spec.no_order_scenarios else ()
        is_number_N = np.isfinite([probs[name] for name in names if name not in unknown_names]).all(axis=0)
        if not is_number_N.all():
            raise self._not_answered(request, int(np.argmin(is_number_N)))
        none = [None] * len(order)
        columns = (none if name in unknown_names else probs[name][order].tolist() for name in names)
        rows = zip(*columns, strict=True)
        items = [
            {"id": request.candidates[n], **dict(zip(names, row, strict=True))}
            for n, row in zip(order.tolist(), rows, strict=True)
        ]
        return {
            "request_id": request.request_id,
            "model_id": self.version["model_id"],
            "version": self.version["version"],
            "bucket": STABLE,
            "items": items,
            "unknown": unknown,
            "degraded": is_degraded,
        }

    def _not_answered(self, request: Request, place: int) -> UserError:
        """Why a candidate has a probability that is no number."""
        where, names = f"candidates[{place}]", self.encoder.numbers
        sent = list(zip((f"context.{name}" for name in names["context"]), request.context.numbers, strict=True))
        if place in request.given:
            own = (f"{where}.features.{name}" for name in names["item"])
            sent += zip(own, request.given[place].numbers, strict=True)
        name, value = max(sent, key=lambda s: abs(s[1]), default=("", 0.0))
        if abs(value) < _SUSPECT:
            return ProbabilityError(
                f"version {self.version['version']}: {request.candidates[place]!r:.60} has a probability that is no "
                "number; the model, or a number that the lake has of it or of the user, is to blame: publish again"
            )
        return RequestError(
            f"{where}: {request.candidates[place]!r:.60} has a probability that is no number with {name}, which is "
            f"{value:.6g} as the model takes it; send null where a value is not known"
        )

    def predict(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[np.float32]]:
        """The program's outputs for the inputs of one request (`encoded`)."""
        return self._program.predict(inputs)

    def encoded(self, request: Request) -> tuple[dict[str, NDArray[Any]], dict[str, Any], bool]:
        """The program's inputs, what of the request the lake has not seen, and whether the user could not be read."""
        encoder = self.encoder
        item_ids, of_items, is_new = self._items.find(request.candidates, encoder)
        if request.given:
            ids, numbers = np.array(of_items.ids), np.array(of_items.numbers)
            for place, profile in request.given.items():
                ids[place], numbers[place] = profile.ids, profile.numbers
            of_items = Profile(ids, numbers)
        is_degraded = False
        found, rows = None, list[Row]()
        try:
            found, rows = self._read(request.user_id)
        except (StoreError, OSError, TimeoutError):
            is_degraded = True
        events, user = (UserEvents.none(), encoder.nothing("user")) if found is None else found
        if rows:
            events = with_live(events, rows, self._rules, encoder, request.time_us)
        counters = None
        if self._counters is not None:
            profiles = {"user": user, "context": request.context, "item": of_items}
            counters = self._counters.values(encoder, request.scenario, request.time_us, request.query, profiles)
        inputs = encoder.inputs(
            scenario=request.scenario,
            time_us=request.time_us,
            user_id=request.user_id,
            query=request.query,
            user=user,
            context=request.context,
            events=events,
            items=(item_ids, of_items),
            counters=counters,
        )
        new = [item for item, is_unknown in zip(request.candidates, is_new, strict=True) if is_unknown]
        is_new_user = found is None and not is_degraded  # else nobody knows
        return inputs, {"user": is_new_user, "candidates": new}, is_degraded

    def _read(self, user_id: str) -> tuple[tuple[UserEvents, Profile] | None, list[Row]]:
        """What the store and the log hold of a user. Raises StoreError, OSError, or TimeoutError."""

        def read() -> tuple[tuple[UserEvents, Profile] | None, list[Row]]:
            return self._users.get(user_id), [] if self._log is None else self._log.of_user(user_id)

        if self._readers is None:
            return read()
        future = self._readers.submit(read)
        try:
            return future.result(self._deadline_s)
        finally:
            future.cancel()  # where it waits for a reader that hangs, it must not be read later

    # ---- checks

    def checked(self, raw: Mapping[str, Any]) -> Request:
        """A request whose every field was checked. Raises RequestError."""
        if not isinstance(raw, Mapping):
            raise RequestError(f"request: is {type(raw).__name__}; an object is needed")
        unknown = sorted(set(raw) - set(_FIELDS))
        if unknown:
            raise RequestError(f"unknown field {unknown[0]!r:.60}; a request has: {', '.join(_FIELDS)}")
        spec = self.encoder.spec
        scenario = raw.get("scenario")
        if scenario not in spec.scenarios:
            raise RequestError(f"scenario: {scenario!r:.60} is not known; there are: {', '.join(spec.scenarios)}")
        nulls = self.null_values.get(f"{scenario}_impressions", ())
        query = without_nulls(raw.get("query"), nulls)
        query = None if query in (None, "") else _text(query, "query")  # as the build takes it
        if query and scenario not in spec.query_scenarios:
            raise RequestError(f"query: {scenario} has no queries; leave it out")
        candidates, given = self._candidates(raw.get("candidates"))
        weights = _weights(raw.get("task", "ctr"))
        if weights[1] and scenario in spec.no_order_scenarios:
            raise RequestError(
                f"task: nobody logs the orders of {scenario} (labels.no_order_scenarios), so that p_ctcvr is not known "
                "there; rank by 'ctr'"
            )
        return Request(
            request_id=None if raw.get("request_id") is None else _text(raw["request_id"], "request_id"),
            scenario=spec.scenarios.index(str(scenario)),
            user_id=_text(raw.get("user_id"), "user_id"),
            query=query,
            context=self._profile("context", raw.get("context"), "context", nulls),
            time_us=self._time(raw.get("time")),
            candidates=candidates,
            given=given,
            weights=weights,
            k=_count(raw.get("k")),
        )

    def _candidates(self, raw: Any) -> tuple[list[str], dict[int, Profile]]:
        if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_CANDIDATES:
            found = f"{len(raw)} of them" if isinstance(raw, list) else f"{type(raw).__name__}"
            raise RequestError(f"candidates: {found}; a list of 1 to {MAX_CANDIDATES} items is needed")
        if _are_texts(raw):
            return raw, {}
        names, given, nulls = [], {}, self.null_values.get("items", ())
        for place, candidate in enumerate(raw):
            where = f"candidates[{place}]"
            item = candidate if isinstance(candidate, Mapping) else {"id": candidate}
            strange = sorted(set(item) - {"id", "features"})
            if strange:
                raise RequestError(f"{where}: unknown field {strange[0]!r:.60}; an item has: id, features")
            names.append(_text(item.get("id"), where))
            if item.get("features") is not None:
                given[place] = self._profile("item", item["features"], f"{where}.features", nulls, names[-1])
        return names, given

    def _profile(self, owner: str, raw: Any, where: str, nulls: Collection[str], own_id: str | None = None) -> Profile:
        if raw is not None and not isinstance(raw, Mapping):
            raise RequestError(f"{where}: is {type(raw).__name__}; an object of features is needed")
        try:
            if raw and self._others is not None:
                raw = self._others.without(owner, raw)
            if nulls and raw:
                raw = {name: without_nulls(value, nulls) for name, value in raw.items()}
            return self.encoder.profile(owner, raw or {}, own_id)
        except EncodeError as error:
            raise RequestError(f"{where}: {error}") from error

    def _time(self, raw: Any) -> int:
        if raw is None:
            time_us = time.time_ns() // 1000
        else:
            try:
                time_us = micros_of(raw)
            except (TypeError, ValueError) as error:
                needed = "ISO 8601 with a zone is needed, such as 2026-01-08T12:00:00Z"
                raise RequestError(f"time: {raw!r:.60} cannot be read; {needed}") from error
        if time_us < self._exact_from_us and raw is None:
            raise RequestError(
                f"time: it is {iso_time(time_us)} by the service's clock, which is before "
                f"{iso_time(self._exact_from_us)}, from when on this version answers; set the clock, or publish again "
                "by a clock that is right"
            )
        if time_us < self._exact_from_us:
            raise RequestError(
                f"time: {iso_time(time_us)} is before {iso_time(self._exact_from_us)}, up to which this version's "
                "histories go; leave it out, or publish from the lake of that day"
            )
        return time_us


def _open_users(folder: Path, version: Mapping[str, Any], encoder: Encoder) -> UserStore:
    address = version.get("users_at")
    if address is None:
        return UserStore(folder, encoder)
    from usr_ray.serving.redis_users import RedisUsers

    return RedisUsers(address, version["users_place"], encoder)


def _are_texts(raw: list[Any]) -> bool:
    """Each would pass `_text`, as nearly all do: told in a tenth of the time that it takes one by one."""
    try:
        return set(map(type, raw)) == {str} and all(raw) and "".join(raw).encode() is not None
    except UnicodeEncodeError:
        return False


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RequestError(f"{where}: is {value!r:.40}; a string that is not empty, or an integer, is needed")
    try:
        return category_text(value) or ""
    except EncodeError as error:
        raise RequestError(f"{where}: {error}") from error


def _weights(task: Any) -> tuple[float, float]:
    if isinstance(task, str) and task in TASKS:
        return float(task == "ctr"), float(task == "ctcvr")
    if isinstance(task, Mapping) and task and set(task) <= set(TASKS):
        found = [task.get(name, 0) for name in TASKS]
        if all(isinstance(w, int | float) and not isinstance(w, bool) and abs(w) <= _MAX_WEIGHT for w in found):
            return float(found[0]), float(found[1])
    raise RequestError(f"task: {task!r:.60} is none; 'ctr', 'ctcvr', or an object of weights of both is needed")


def _count(k: Any) -> int | None:
    if k is None or (isinstance(k, int) and not isinstance(k, bool) and k >= 1):
        return k
    raise RequestError(f"k: is {k!r:.40}; an integer from 1 on is needed")


__all__ = ["Ranker", "RequestError", "StoreError", "iso_time"]
