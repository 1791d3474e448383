"""Users of a version in Redis, for services on many nodes: the values of `stores.UserStore`, one MGET a request.

    usr-ray:<id>                         versions that registry <id> has written users of, the unfinished ones included
    usr-ray:<id>:<version>               mark, written after the last user: a version without it has no users here
    usr-ray:<id>:<version>:<digest>      value of a user, as in LMDB

A request reads the mark and its user at once, so that a server that was emptied is told from one without this
user. A password is never part of the address, which is kept in version.json: USR_RAY_REDIS_PASSWORD has it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lmdb

from usr_ray.config import UserError
from usr_ray.files import one_line, write_whole
from usr_ray.serving.encode import Encoder
from usr_ray.serving.stores import USERS, StoreError, UserStore

PASSWORD = "USR_RAY_REDIS_PASSWORD"
_PREFIX = b"usr-ray:"
_REGISTRY_ID = "redis_id"
_BATCH = 1_000
"""Users that are written, or keys that are removed, at once."""
_READ_S = 0.25
"""A request's read; the service's own deadline is shorter."""
_WRITE_S = 30.0
_KEEPS = ("noeviction", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl")
"""Policies of a full server that never drop keys without an expiry, as ours are."""


def check_address(address: str) -> str:
    """The address of a server: redis://HOST:PORT/DB or rediss:// with TLS. Raises UserError."""
    if "@" in address:  # before anything that would repeat it
        raise UserError(f"--users: holds a password, which would be kept in version.json; set {PASSWORD} instead")
    try:
        parts = urlsplit(address)
        is_good = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and (parts.port or 1) > 0
        is_good = is_good and (parts.path in ("", "/") or parts.path[1:].isdecimal()) and not parts.query
    except ValueError:
        is_good = False
    if not is_good:
        raise UserError(f"--users {address}: is no address of Redis; write redis://HOST:PORT/DB")
    return address


def _client(address: str, timeout_s: float) -> Any:
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise UserError("the package redis is not installed here: pip install 'usr-ray[redis]'") from error
    return redis.Redis.from_url(
        address,
        password=os.environ.get(PASSWORD) or None,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),  # a request has no time for a second try
    )


def check_server(address: str) -> None:
    """A server is there, and keeps what it is given: said before the export. Raises UserError."""
    client = _client(check_address(address), _WRITE_S)
    try:
        client.ping()
        _check_policy(client, address)
    except (OSError, _errors()) as error:
        raise StoreError(f"--users {address}: does not answer ({one_line(error)}); start Redis there") from error


def _mark(place: str) -> bytes:
    return _PREFIX + place.encode()


class RedisUsers(UserStore):
    """The users of a version in Redis.

    Args:
        place: as `move_users` returned it.

    Raises:
        StoreError: the server does not answer, or does not have them.
    """

    def __init__(self, address: str, place: str, encoder: Encoder) -> None:
        self._sizes = (encoder.width("user"), len(encoder.numbers["user"]))
        self._address, self._place = address, place
        self._redis = _client(address, _READ_S)
        self._value(b"")  # the mark must be there

    def _value(self, digest: bytes) -> bytes | None:
        mark = _mark(self._place)
        try:
            found, value = self._redis.mget(mark, mark + b":" + digest)
        except (OSError, ValueError, _errors()) as error:
            raise StoreError(f"users: {self._address} cannot be read ({one_line(error)}); start Redis there") from error
        if found is None:
            raise StoreError(
                f"users: {self._address} has none of version {self._place.partition(':')[2]}; publish again"
            )
        return bytes(value) if value is not None else None


def _errors() -> type[Exception]:
    import redis

    return redis.RedisError


def move_users(folder: Path, address: str, version: str, registry: Path) -> str:
    """Take the users that `write_users` has written in a version's folder to Redis, whole or not at all.

    Returns:
        Their place there: two registries may publish one model in the same second.

    Raises:
        StoreError: the server does not take them, or may drop them when it is full.
    """
    client, id_ = _client(address, _WRITE_S), _registry_id(registry)
    place = f"{id_}:{version}"
    mark = _mark(place)
    try:
        client.sadd(_mark(id_), version)  # first, so that `forget_users` finds what a crash leaves
        environment = lmdb.open(str(folder / USERS), readonly=True, lock=False, create=False)
        try:
            with environment.begin() as transaction:
                batch: dict[bytes, bytes] = {}
                for digest, value in transaction.cursor():
                    batch[mark + b":" + digest] = value
                    if len(batch) == _BATCH:
                        client.mset(batch)
                        batch = {}
                if batch:
                    client.mset(batch)
        finally:
            environment.close()
        if not client.sismember(_mark(id_), version):
            raise StoreError(f"--users {address}: another publication removed version {version}; publish again")
        client.set(mark, b"1")
    except (OSError, _errors()) as error:
        raise StoreError(
            f"--users {address}: does not take the users ({one_line(error)}); nothing was published: give it "
            "memory, or take another server"
        ) from error
    for path in (folder / USERS).iterdir():
        path.unlink()
    (folder / USERS).rmdir()
    return place


def _check_policy(client: Any, address: str) -> None:
    import redis

    try:
        found = client.config_get("maxmemory*")
    except redis.ResponseError:  # a server that does not tell
        return
    if int(found.get("maxmemory", 0)) and found.get("maxmemory-policy") not in _KEEPS:
        raise StoreError(
            f"--users {address}: drops keys when it is full (maxmemory-policy {found.get('maxmemory-policy')}), and a "
            "user that was dropped would be scored as unknown; set it to noeviction, or take another server"
        )


def forget_users(address: str, registry: Path, keep: Iterable[str]) -> list[str]:
    """Remove the users of all versions of a registry but those to keep; which they were.

    Raises:
        StoreError: the server does not answer.
    """
    client, id_ = _client(address, _WRITE_S), _registry_id(registry)
    try:
        written = {name.decode() for name in client.smembers(_mark(id_))}
        for version in sorted(written - set(keep)):
            mark = _mark(f"{id_}:{version}")
            client.delete(mark)  # first: what is left of it is never read
            batch: list[bytes] = []
            for key in client.scan_iter(match=mark + b":*", count=_BATCH):
                batch.append(key)
                if len(batch) == _BATCH:
                    client.unlink(*batch)
                    batch = []
            if batch:
                client.unlink(*batch)
            client.srem(_mark(id_), version)
    except (OSError, _errors()) as error:
        raise StoreError(
            f"--users {address}: old users cannot be removed ({one_line(error)}); the new version is whole, but not "
            "served: publish again"
        ) from error
    return sorted(written - set(keep))


def _registry_id(registry: Path) -> str:
    """An id that a registry gets when it is asked first; its path may be another's elsewhere."""
    path = registry / _REGISTRY_ID
    if not path.exists():
        write_whole(path, uuid.uuid4().hex)
    return path.read_text(encoding="utf-8").strip()
