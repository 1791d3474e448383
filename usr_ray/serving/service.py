"""The service without a network: a version that is swapped while it answers, a bounded queue, metrics.

A thread looks at the registry's pointer. When it names another version, that one is opened beside the running one: its
files verified, its golden requests answered. Only then does the reference change, so that a request is answered by one
version or the other, whole. A version that cannot be opened leaves the running one in place; where it is the canary or
the shadow, the stable version answers to all without it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from usr_ray.config import UserError
from usr_ray.files import one_line
from usr_ray.serving.batching import LateError
from usr_ray.serving.encode import micros_of
from usr_ray.serving.events import EventError, EventLog, checked_rows
from usr_ray.serving.explain import Explainer
from usr_ray.serving.metrics import ServiceMetrics
from usr_ray.serving.ranker import ProbabilityError, Ranker, RequestError, iso_time
from usr_ray.serving.versions import CANARY, GOLDEN, SHADOW, Pointer, read_pointer, version_folder

_LOG = logging.getLogger(__name__)
MAX_BODY_BYTES = 4 << 20
INTERNAL = "internal error; the service's own output has its stack trace"
_RETRY_S = 1.0, 60.0
"""First and longest wait before a version that was not opened is tried again: each try reads all of its files."""
_MAX_SHADOWS = 64
"""Requests that wait for the shadow; the next ones go without."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a service runs."""

    registry: Path
    num_threads: int = 1
    """Threads of ONNX Runtime for one request."""
    num_workers: int = 2
    """Requests that are computed at once."""
    max_queued: int = 32
    """Requests that are computed or wait; one more is refused at once (429). Of posts of events as many more."""
    poll_s: float = 0.5
    """Seconds between two looks at the pointer."""
    max_wait_s: float = 0.5
    """A request that waited longer for a worker is not computed (429): the caller has likely gone."""
    store_deadline_s: float = 0.05
    """A request whose user cannot be read within it is answered without history, marked degraded."""
    log_dir: Path | None = None
    """Where events (`events.EventLog`) and scores of the shadow are kept; None: REGISTRY/log."""
    device: str = "cpu"
    """'cuda': requests in progress share a call on a GPU; more workers make larger batches."""
    page: bool = False
    """Show the page, which shows histories and examples of users to whoever may ask."""


Read = Callable[[bytes], Any]
"""The raw request in a body. Raises RequestError."""


class OverloadError(Exception):
    """The queue is full; the text is for the caller."""


class _Queue:
    """Work of one kind: its threads, and how many of it are computed or wait."""

    def __init__(self, num_workers: int, max_queued: int, name: str) -> None:
        self.size = 0
        self._max_queued = max_queued
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix=name)
        self._lock = threading.Lock()

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """A future of the work; OverloadError when too much of it is in progress."""
        with self._lock:
            if self.size >= self._max_queued:
                raise OverloadError("too many requests wait; try again after a second")
            self.size += 1
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Any) -> None:
        with self._lock:
            self.size -= 1

    def close(self) -> None:
        """Finish the work."""
        self._pool.shutdown()


def carries_token(given: bytes, token: str) -> bool:
    """Whether the content of an authorization header or metadata is `Bearer` and the token; in constant time."""
    return hmac.compare_digest(given, f"Bearer {token}".encode())


class Service:
    """Answers requests with the stable version of a registry.

    Raises:
        UserError: there is no stable version, or it cannot be opened.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._log_dir = settings.log_dir or settings.registry / "log"
        self.log = EventLog(self._log_dir / "events")
        with contextlib.suppress(OSError):  # answers are degraded then
            self.log.catch_up()  # before the first request, which would not wait for it
        self.last_error = ""
        """Why the versions that the pointer names are not those that are served; '' where they are."""
        self._retry_at, self._retry_s = 0.0, _RETRY_S[0]
        self._tried: Pointer | None = read_pointer(settings.registry)
        """The pointer whose versions were opened last, or were tried; None: it cannot be read."""
        self._served, missing = self._opened(self._tried, {})
        self._explainers: dict[Ranker, Explainer] = {}
        self._scoring = _Queue(settings.num_workers, settings.max_queued, "score")
        # Posts wait for the disk, one after the other: answers must not wait for them.
        self._keeping = _Queue(1, settings.max_queued, "keep")
        self._shadow_pool = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._shadow_slots = threading.BoundedSemaphore(_MAX_SHADOWS)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.metrics = ServiceMetrics(lambda: self.num_queued, self._as_of_s, lambda: self.last_error != "")
        self._note(missing)
        self._watcher = threading.Thread(target=self._watch, name="pointer", daemon=True)
        self._watcher.start()

    # ---- requests

    def submit(self, body: bytes, *, ranked: bool, read: Read | None = None) -> Any:
        """A future of (status, answer) of one request; OverloadError when too many are in progress.

        Args:
            body: not read before a worker takes it.
            ranked: for /v1/rank; False: for /v1/score.
            read: None: `parsed` reads it.
        """
        return self._submit(self._scoring, self._answer, body, ranked, read or parsed)

    def submit_events(self, body: bytes, *, read: Read | None = None) -> Any:
        """A future of (status, answer) of a post of events, once they are on the disk; as `submit`."""
        return self._submit(self._keeping, self._keep, body, read or parsed)

    def submit_explained(self, body: bytes) -> Any:
        """A future of (status, answer) of one request with its history and signals; raises as `submit`."""
        return self._submit(self._scoring, self._explain, body)

    def examples(self) -> dict[str, Any]:
        """What the page offers to pick: scenarios, and the requests that the stable version was published with."""
        pointer, rankers = self._served
        spec = rankers[pointer.stable].encoder.spec
        golden = version_folder(self.settings.registry, pointer.stable) / GOLDEN
        return {
            "version": pointer.stable,
            "scenarios": list(spec.scenarios),
            "query_scenarios": list(spec.query_scenarios),
            "requests": [case["request"] for case in json.loads(golden.read_text(encoding="utf-8"))],
        }

    @property
    def num_queued(self) -> int:
        """Requests that are computed or wait."""
        return self._scoring.size + self._keeping.size

    def _submit(self, queue: _Queue, work: Callable[..., Any], *arguments: Any) -> Any:
        return queue.submit(self._in_time, time.perf_counter(), work, *arguments)

    def _in_time(self, started: float, work: Callable[..., Any], *arguments: Any) -> Any:
        waited = time.perf_counter() - started
        self.metrics.spent("wait", waited)
        if waited > self.settings.max_wait_s:
            return 429, {"error": "waited too long for a worker; try again after a second"}
        try:
            return work(*arguments)
        except (RequestError, EventError) as error:
            return 422, {"error": str(error)}
        except LateError:
            return 429, {"error": "the device is behind; try again after a second"}
        except ProbabilityError as error:
            return 500, {"error": str(error)}
        except Exception:  # a fault of ours: it must be counted and seen like every other answer
            _LOG.exception("a request failed")
            return 500, {"error": INTERNAL}

    @property
    def ranker(self) -> Ranker:
        """The stable version."""
        pointer, rankers = self._served
        return rankers[pointer.stable]

    def _answer(self, body: bytes, ranked: bool, read: Read) -> tuple[int, dict[str, Any]]:
        pointer, rankers = self._served  # one version for the whole request
        asked_us = time.time_ns() // 1000  # the shadow's "now" too: past midnight its counters would be others
        request = read(body)
        bucket, ranker = _chosen(pointer, rankers, request)
        answer = ranker.answer(request, ranked=ranked, spent=self.metrics.spent) | {"bucket": bucket}
        if pointer.shadow is not None:
            asked = request.get("time") or iso_time(asked_us)
            self._compare(rankers[pointer.shadow], {**request, "time": asked}, answer)
        self.metrics.candidates.inc(len(request["candidates"]))  # an answer may have the first k alone
        self.metrics.degraded.inc(answer["degraded"])
        self.metrics.unknown.labels("users").inc(answer["unknown"]["user"])
        self.metrics.unknown.labels("candidates").inc(len(answer["unknown"]["candidates"]))
        return 200, answer

    def _explain(self, body: bytes) -> tuple[int, dict[str, Any]]:
        pointer, rankers = self._served
        request = parsed(body)
        bucket, ranker = _chosen(pointer, rankers, request)
        explainer = self._explainers.get(ranker) or Explainer(ranker)
        with self._lock:
            if ranker in self._served[1].values():  # it reads whole vocabularies: once a version
                self._explainers[ranker] = explainer
        return 200, explainer.answer(request) | {"bucket": bucket}

    def _keep(self, body: bytes, read: Read) -> tuple[int, dict[str, Any]]:
        ranker = self.ranker
        rows = checked_rows(read(body), ranker.encoder.spec.scenarios, ranker.null_values)
        try:
            num_new = self.log.append(rows)
        except OSError as error:
            return 503, {"error": f"events: cannot be kept ({one_line(error)}); post them again later"}
        self.metrics.events.inc(num_new)
        return 200, {"accepted": num_new, "known_before": len(rows) - num_new}

    def _compare(self, shadow: Ranker, request: dict[str, Any], answer: dict[str, Any]) -> None:
        """Let the shadow score a request that was answered, unless it is behind; its scores go to the log only."""
        if not self._shadow_slots.acquire(blocking=False):
            self.metrics.shadows.labels("skipped").inc()
            return
        self._shadow_pool.submit(self._score_shadow, shadow, request, answer).add_done_callback(
            lambda _: self._shadow_slots.release()
        )

    def _score_shadow(self, shadow: Ranker, request: dict[str, Any], answer: dict[str, Any]) -> None:
        try:
            # Without k: `score` would give the first k as they were sent, `answer` has the best k.
            found = shadow.score({name: value for name, value in request.items() if name != "k"})
            returned = {item["id"] for item in answer["items"]}
            line = {
                "time": iso_time(time.time_ns() // 1000),
                "user_id": request["user_id"],
                "scenario": request["scenario"],
                **{name: answer[name] for name in ("request_id", "version", "bucket", "items")},
                "shadow": {
                    "version": found["version"],
                    "items": [item for item in found["items"] if item["id"] in returned],
                },
            }
            self._log_dir.mkdir(parents=True, exist_ok=True)
            with (self._log_dir / f"shadow-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.metrics.shadows.labels("logged").inc()
        except Exception:  # a shadow's fault, or a full disk, must not reach a request
            self.metrics.shadows.labels("failed").inc()

    def count(self, path: str, status: int, started: float) -> None:
        """Count one answered request, which came at `started` (time.perf_counter)."""
        self.metrics.requests.labels(path, status).inc()
        self.metrics.seconds.labels(path, status).observe(time.perf_counter() - started)

    def _as_of_s(self) -> float:
        """Of the oldest version: a canary or shadow that is compared with one of today knows less of its users."""
        return min(micros_of(ranker.version["as_of"]) for ranker in self._served[1].values()) / 1e6

    def about(self) -> dict[str, Any]:
        """The answer to GET /v1/model."""
        pointer, rankers = self._served
        named = {"stable": pointer.stable, "canary": pointer.canary, "shadow": pointer.shadow}
        versions = {
            place: name and {key: value for key, value in rankers[name].version.items() if key != "files"}
            for place, name in named.items()
        }
        return versions | {"share": pointer.share, "last_error": self.last_error}

    # ---- versions

    def look(self) -> bool:
        """Serve the versions that the pointer names, if it was moved; True when they were swapped.

        What could not be opened is tried again after a while, which doubles while pointer and error are the same.
        """
        try:
            pointer = read_pointer(self.settings.registry)
        except UserError as error:
            self._tried = None
            self._note(str(error))
            return False
        if pointer == self._tried and (not self.last_error or time.monotonic() < self._retry_at):
            return False
        if pointer != self._tried:
            self._retry_s = _RETRY_S[0]
        self._tried = pointer
        try:
            served, missing = self._opened(pointer, self._served[1])
        except Exception as broken:  # a disk that fails, too: what runs goes on
            self._note(_words(broken))
            return False
        self._note(missing)
        if served == self._served:
            return False
        # Requests that hold the old version finish with it; its files are unmapped when the last of them lets it go.
        self._served = served
        there = set(served[1].values())
        with self._lock:  # workers add to it
            self._explainers = {ranker: explainer for ranker, explainer in self._explainers.items() if ranker in there}
        return True

    def _note(self, error: str) -> None:
        """Keep why the pointer's versions are not served ('': they are), and when they are tried again."""
        if error and error != self.last_error:
            self.metrics.failed_swaps.inc()
            self._retry_s = _RETRY_S[0]
        self.last_error = error
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _RETRY_S[1])

    def _opened(self, pointer: Pointer, before: dict[str, Ranker]) -> tuple[tuple[Pointer, dict[str, Ranker]], str]:
        """What is served of a pointer with its versions, of which those of `before` stay open; why it is not all of it.

        Canary and shadow are opened each by itself: without one the stable version answers to all.
        """
        settings, errors = self.settings, list[str]()

        def opened(name: str) -> Ranker:
            return before.get(name) or Ranker.open(
                version_folder(settings.registry, name),
                num_threads=settings.num_threads,
                log=self.log,
                deadline_s=settings.store_deadline_s,
                device=settings.device,
            )

        rankers = {pointer.stable: opened(pointer.stable)}
        for place, less in ((CANARY, {"canary": None, "share": 0.0}), (SHADOW, {"shadow": None})):
            name = getattr(pointer, place)
            if name is None:
                continue
            try:
                rankers[name] = rankers.get(name) or opened(name)
            except Exception as error:  # none of the stable version's
                errors.append(f"served without its {place}: {_words(error)}")
                pointer = replace(pointer, **less)
        return (pointer, rankers), "; ".join(errors)

    def _watch(self) -> None:
        while not self._stopped.wait(self.settings.poll_s):
            try:
                self.look()
            except Exception as error:  # nothing may end the thread
                self.last_error = _words(error)

    def close(self) -> None:
        """Finish the requests in progress and end the threads."""
        self._stopped.set()
        self._watcher.join()
        self._scoring.close()
        self._keeping.close()
        self._shadow_pool.shutdown()


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def _chosen(pointer: Pointer, rankers: dict[str, Ranker], request: Any) -> tuple[str, Ranker]:
    """The bucket that a request's user falls into, and its version."""
    user_id = str(request.get("user_id") if isinstance(request, dict) else None)
    bucket = pointer.bucket(user_id.encode(errors="replace").decode())  # what is no Unicode is refused later, in words
    return bucket, rankers[str(pointer.canary if bucket == CANARY else pointer.stable)]


def check_size(body: bytes) -> None:
    """Raises RequestError where a body is longer than one may be."""
    if len(body) > MAX_BODY_BYTES:
        raise RequestError(f"request: has {len(body):,} bytes; {MAX_BODY_BYTES:,} are the most")


def parsed(body: bytes) -> Any:
    """The JSON of a request. Raises RequestError."""
    check_size(body)

    def refuse(name: str) -> Callable[[], None]:
        raise RequestError(f"request: holds {name}; JSON has finite numbers only")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"request: is no JSON ({error})") from error
