"""Faults of the service: nothing but 200, 422, 429 or an answer marked degraded, and no wrong score ever."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.chaos.bench import Bench, Fault
from tests.chaos.observe import Seen
from tests.chaos.serving_bench import NOW_US, NUM_CLIENTS, Judge, requests, seal, write_version
from usr_ray.config import UserError
from usr_ray.serving.ranker import iso_time
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.versions import GOLDEN, POINTER, VERSION, Pointer, move_pointer

NUM_FLIPS = 100
DAY_US = 86_400_000_000


@contextlib.contextmanager
def serving(registry: Path, *names: str, **settings: Any) -> Iterator[tuple[Service, Judge]]:
    """A service on fresh versions of these names, the first one stable, and the judge of its answers."""
    folders = [write_version(registry, name, 1.0 - 0.4 * n) for n, name in enumerate(names)]
    move_pointer(registry, names[0])
    service = Service(Settings(registry, **{"poll_s": 3600.0, "max_wait_s": 60.0, "store_deadline_s": 30.0} | settings))
    try:
        yield service, Judge(folders)
    finally:
        service.close()


def store_gone(bench: Bench) -> Seen:
    """The user store, then the log of events, cannot be read; the version's files are deleted."""
    registry, seen = bench.case("store-gone"), Seen()
    with serving(registry, "one") as (service, judge):
        judge.ask_all(service)
        service.log.folder = registry / "log" / "file"
        service.log.folder.parent.mkdir()
        service.log.folder.touch()
        judge.ask_all(service)  # a log that is not there yet holds no event
        shutil.rmtree(registry / "versions")
        judge.ask_all(service)  # mapped files outlive their names
        service.ranker._users._environment.lmdb.close()
        judge.ask_all(service)
        judge.note(seen, "one", "degraded one")
        try:
            Service(Settings(registry))
            seen.note("restart", False, "a service started without its version")
        except UserError as error:
            seen.note("restart", "\n" not in str(error), f"a new service refuses: '{str(error)[-90:]}'")
    return seen


def store_slow(bench: Bench) -> Seen:
    """Every second read of a user takes far longer than its deadline."""
    with serving(bench.case("store-slow"), "one", store_deadline_s=0.2) as (service, judge):
        users = service.ranker._users
        read, calls = users.get, iter(range(1 << 30))

        def slow(user_id: str) -> Any:
            if next(calls) % 2:
                time.sleep(0.6)
            return read(user_id)

        users.get = slow  # type: ignore[method-assign]
        judge.ask_all(service)
        return judge.note(Seen(), "one", "degraded one")


def version_harmed(bench: Bench) -> Seen:
    """The pointer names a version with one file cut, changed or missing, each file in turn; then one with good sums."""
    registry, seen = bench.case("version-harmed"), Seen()
    with serving(registry, "one") as (service, judge):
        whole = write_version(registry, "whole", 0.5)
        paths = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
        tried = taken = 0
        for path in paths:
            for harm in ("cut", "changed", "missing"):
                name = f"harmed-{tried}"
                folder = registry / "versions" / name
                shutil.copytree(whole, folder)
                content = (folder / path).read_bytes()
                if harm == "missing":
                    (folder / path).unlink()
                else:
                    half = len(content) // 2
                    other = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
                    (folder / path).write_bytes(content[:half] if harm == "cut" else other)
                move_pointer(registry, name)
                tried += 1
                # A changed byte of version.json may be of a name that nothing depends on.
                taken += service.look() and not (path.name == VERSION and harm == "changed")
                shutil.rmtree(folder)
        move_pointer(registry, "one")
        service.look()
        judge.ask_all(service)
        seen.note("torn", not taken, f"{tried} harmed versions tried, {taken} taken")
        tampered = write_version(registry, "tampered", 0.5)
        golden = json.loads((whole / GOLDEN).read_text())
        golden[0]["items"][0]["p_ctr"] += 1e-3
        seal(tampered, {k: v for k, v in json.loads((tampered / VERSION).read_text()).items() if k != "files"}, golden)
        move_pointer(registry, "tampered")
        is_out = not service.look() and "of a golden request is" in service.last_error
        seen.note("golden", is_out, "one that computes otherwise, with good sums, stays out")
        judge.ask_all(service)
    return judge.note(seen, "one")


def pointer_flipped(bench: Bench) -> Seen:
    """The pointer moves NUM_FLIPS times, and is torn and deleted in between, while clients ask."""
    registry, seen = bench.case("pointer-flipped"), Seen()
    with serving(registry, "one", "two") as (service, judge), ThreadPoolExecutor(NUM_CLIENTS) as pool:
        over = threading.Event()

        def ask_on() -> None:
            while not over.is_set():
                judge.ask(service, sum(judge.counts.values()) % len(judge.asked))

        clients = [pool.submit(ask_on) for _ in range(NUM_CLIENTS)]
        swaps = 0
        try:
            for flip in range(NUM_FLIPS):
                if flip % 10 == 5:
                    (registry / POINTER).write_text('{"stable": ')
                    swaps += service.look()
                    (registry / POINTER).unlink()
                    swaps += service.look()
                Pointer(("two", "one")[flip % 2]).write(registry)
                swaps += service.look()
                judge.ask(service, flip % len(judge.asked))
        finally:
            over.set()
        for client in clients:
            client.result()
        seen.note("flips", swaps == NUM_FLIPS, f"{swaps} swaps")
    return judge.note(seen, "one", "two")


def store_empty(bench: Bench) -> Seen:
    """A version without an item and without a user."""
    registry = bench.case("store-empty")
    folder = write_version(registry, "empty", 1.0, is_empty=True)
    move_pointer(registry, "empty")
    service, judge = Service(Settings(registry, poll_s=3600.0, store_deadline_s=30.0)), Judge([folder])
    try:
        judge.ask_all(service)
    finally:
        service.close()
    return judge.note(Seen(), "empty")


def clock_skew(bench: Bench) -> Seen:
    """Requests from before the publication, from the future, and at the ends of time."""
    registry = bench.case("clock-skew")
    folder = write_version(registry, "one", 1.0)
    move_pointer(registry, "one")
    base = requests()[3]
    later = [base | {"time": iso_time(NOW_US + shift)} for shift in (0, 1, DAY_US, 3650 * DAY_US)]
    earlier = [iso_time(NOW_US - shift) for shift in (1, DAY_US, 3650 * DAY_US)]
    bad = [*earlier, "0001-01-01T00:00:00+00:00", "2026-01-08T12:00:00", "soon", 12]
    service, judge = Service(Settings(registry, poll_s=3600.0, store_deadline_s=30.0)), Judge([folder], later)
    seen = Seen()
    try:
        judge.ask_all(service)
        found = []
        for when in bad:
            body = json.dumps(base | {"time": when}).encode()
            status, answer = service.submit(body, ranked=False).result(60)
            found.append(status == 422 and "time" in answer["error"] and "\n" not in answer["error"])
        seen.note("refused", all(found), f"{sum(found)} of {len(bad)} times before it, or none, refused (422)")
    finally:
        service.close()
    return judge.note(seen, "one")


_EXPECTED = "200, 422, 429 or marked degraded; every score its version's own"
FAULTS = (
    Fault("serving-store-gone", "users unreadable, version deleted while it is served", _EXPECTED, store_gone),
    Fault("serving-store-slow", "every second read of a user is late", _EXPECTED, store_slow),
    Fault("serving-version-harmed", "each file cut, changed, missing; other golden answers", _EXPECTED, version_harmed),
    Fault("serving-pointer-flipped", "pointer moved 100 times and torn, under load", _EXPECTED, pointer_flipped),
    Fault("serving-store-empty", "no item and no user", _EXPECTED, store_empty),
    Fault("serving-clock-skew", "times before the publication, of the future, none", _EXPECTED, clock_skew),
)
