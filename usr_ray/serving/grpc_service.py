"""The service over gRPC: the messages and answers of HTTP (service.proto), by the same checks and the same queue.

A message becomes what the JSON of HTTP would have brought, and the answer's JSON a message, so neither knows more than
the other. Statuses: INVALID_ARGUMENT for 422, RESOURCE_EXHAUSTED for 429, UNAUTHENTICATED for 401, UNAVAILABLE for 503.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from usr_ray.config import UserError
from usr_ray.serving.ranker import RequestError
from usr_ray.serving.service import INTERNAL, MAX_BODY_BYTES, OverloadError, Service, carries_token, check_size

_LOG = logging.getLogger(__name__)
RANKING = "usr_ray.v1.Ranking"
METHODS = {"Score": "RankAnswer", "Rank": "RankAnswer", "Events": "EventsAnswer", "Model": "Struct"}
"""Method -> message of its answer."""
_DESCRIPTORS = Path(__file__).with_name("service.binpb")
_RETRY_AFTER = (("retry-after", "1"),)
_EXACT = 1 << 53
_MAX_WORDS = 1_000
"""Characters of a refusal, sent in a header: a client that gets 8 KiB of it says RESOURCE_EXHAUSTED instead."""
_MORE_THREADS = 4
"""Threads beyond those for accepted requests: this many more are told at once that there are too many."""


def message_classes() -> dict[str, Any]:
    """Name -> class of the messages of service.proto. Raises UserError without the packages."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2
    except ImportError as error:
        raise UserError("the package protobuf is not installed here: pip install 'usr-ray[grpc]'") from error
    pool = descriptor_pool.Default()
    for file in descriptor_pb2.FileDescriptorSet.FromString(_DESCRIPTORS.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    own = pool.FindFileByName("service.proto").message_types_by_name
    return {name: message_factory.GetMessageClass(own[name]) for name in own} | {"Struct": struct_pb2.Struct}


def raw_of(kind: Any, content: bytes) -> Any:
    """The raw request in a message, as the JSON of HTTP would have brought it.

    Raises:
        RequestError: it is too long, no message of this kind, has a field that service.proto has not, or a number that
            JSON has not.
    """
    from google.protobuf import json_format, message, unknown_fields

    check_size(content)
    try:
        found = kind.FromString(content)
    except message.DecodeError as error:
        raise RequestError(f"request: is no {kind.DESCRIPTOR.name} of service.proto") from error
    parts = [found, *getattr(found, "candidates", ())]
    if any(len(unknown_fields.UnknownFieldSet(part)) for part in parts):
        raise RequestError("request: has a field that service.proto does not have")
    try:
        raw = json_format.MessageToDict(found, preserving_proto_field_name=True)
    except json_format.Error as error:
        raise RequestError(f"request: {error}") from error
    if kind.DESCRIPTOR.name == "EventsRequest":
        return _integral(raw.get("logs", {}))
    raw.setdefault("candidates", [])
    if "k" in raw:
        raw["k"] = int(raw["k"])  # JSON of protobuf writes integers of 64 bits as strings
    return _integral(raw)


def _integral(value: Any) -> Any:
    """Whole numbers as integers: a message has doubles only, and an id or a category may be an integer.

    Beyond 2^53 they stay doubles, which are refused as ids: what was sent may have been rounded.
    """
    if isinstance(value, dict):
        return {key: _integral(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_integral(part) for part in value]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        return value
    return int(value) if abs(value) < _EXACT else float(value)


class Methods:
    """What becomes of a message, whether our own server or Ray Serve's proxy brought it.

    Messages come as bytes: they are read by the queue's workers, once the token was seen and there was room.

    Args:
        token: see app.make_app.
    """

    def __init__(self, service: Service, token: str | None) -> None:
        import grpc

        self._codes, self._service, self._token = grpc.StatusCode, service, token
        classes = message_classes()
        read = {name: partial(raw_of, classes[name]) for name in ("RankRequest", "EventsRequest")}
        self._submits: dict[str, Callable[[bytes], Any]] = {
            "Score": partial(service.submit, ranked=False, read=read["RankRequest"]),
            "Rank": partial(service.submit, ranked=True, read=read["RankRequest"]),
            "Events": partial(service.submit_events, read=read["EventsRequest"]),
        }
        self._answers = {name: classes[answer] for name, answer in METHODS.items()}

    def begun(self, name: str, content: bytes, metadata: Iterable[tuple[str, Any]]) -> Future[tuple[int, Any]]:
        """A future of (status of HTTP, answer) of a message with the metadata of its call."""
        found: Future[tuple[int, Any]] = Future()
        given = str(dict(metadata).get("authorization", "")).encode()
        if self._token is not None and not carries_token(given, self._token):
            found.set_result((401, {"error": "authorization: Bearer and the service's token are needed"}))
        elif name == "Model":
            found.set_result((200, self._service.about()))
        else:
            try:
                return self._submits[name](content)  # type: ignore[no-any-return]
            except OverloadError as error:
                found.set_result((429, {"error": str(error)}))
        return found

    def ended(self, name: str, found: tuple[int, Any], context: Any, started: float) -> Any:
        """The message of an answer; of a refusal an empty one, with code, words and metadata in the context."""
        from google.protobuf import json_format

        status, content = found
        answer = self._answers[name]()
        if status == 200:
            try:
                json_format.ParseDict(content, answer)
            except json_format.ParseError:  # a fault of ours: counted and told like every other
                _LOG.exception("an answer fits no message")
                status, content, answer = 500, {"error": INTERNAL}, self._answers[name]()
        if name != "Model":
            self._service.count(f"grpc/{name}", status, started)
        if status == 200:
            return answer
        if status == 429:
            context.set_trailing_metadata([*_RETRY_AFTER])
        named = {
            401: self._codes.UNAUTHENTICATED,
            422: self._codes.INVALID_ARGUMENT,
            429: self._codes.RESOURCE_EXHAUSTED,
            500: self._codes.INTERNAL,
        }
        context.set_code(named.get(status, self._codes.UNAVAILABLE))
        context.set_details(content["error"][:_MAX_WORDS])
        return answer


def add_ranking(servicer: Any, server: Any) -> None:
    """Add the methods to Ray Serve's proxy (`grpc_servicer_functions`); the deployment gets messages as bytes."""
    _add_answers(server, lambda name: getattr(servicer, name))


def _add_answers(server: Any, answer: Callable[[str], Any], serialize: Callable[[Any], bytes] | None = None) -> None:
    """Have a server answer each method by `answer(its name)`, which takes the bytes of a message."""
    import grpc

    handlers = {name: grpc.unary_unary_rpc_method_handler(answer(name), None, serialize) for name in METHODS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RANKING, handlers),))


class GrpcServer:
    """Serves until `close`, without Ray.

    Args:
        token: see app.make_app.
        port: 0: any free one.

    Raises:
        UserError: the packages are not installed, or the port is taken.
    """

    def __init__(self, service: Service, token: str | None, *, host: str, port: int) -> None:
        try:
            import grpc
        except ImportError as error:
            raise UserError("the package grpcio is not installed here: pip install 'usr-ray[grpc]'") from error
        self._methods = Methods(service, token)
        threads = 2 * service.settings.max_queued + _MORE_THREADS  # requests, and posts of events
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="grpc"),
            options=[("grpc.max_receive_message_length", MAX_BODY_BYTES), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=threads,
        )
        _add_answers(
            self._server, lambda name: partial(self._answer, name), lambda message: message.SerializeToString()
        )
        try:
            self.port = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise UserError(f"--grpc-port {port}: cannot be listened on; name another") from error
        self._server.start()

    def close(self) -> None:
        """Finish the requests in progress."""
        self._server.stop(grace=5).wait()

    def _answer(self, name: str, content: bytes, context: Any) -> Any:
        started = time.perf_counter()
        begun = self._methods.begun(name, content, context.invocation_metadata())
        return self._methods.ended(name, begun.result(), context, started)
