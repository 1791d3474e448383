"""The service over gRPC: the messages and answers of HTTP (service.proto), by the same checks and the same queue.

A message becomes the JSON that HTTP would have brought, and the answer's JSON a message, so neither knows more than the
other. Statuses: INVALID_ARGUMENT for 422, RESOURCE_EXHAUSTED for 429, UNAUTHENTICATED for 401, UNAVAILABLE for 503.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from usr_ray.config import UserError
from usr_ray.serving.service import MAX_BODY_BYTES, OverloadError, Service

RANKING = "usr_ray.v1.Ranking"
_DESCRIPTORS = Path(__file__).with_name("service.binpb")
_RETRY_AFTER = (("retry-after", "1"),)
_EXACT = 1 << 53
_MAX_WORDS = 1_000
"""Of a refusal, which travels in a header: a client that gets 8 KiB of it says RESOURCE_EXHAUSTED instead."""
_MORE_THREADS = 4
"""Than requests are taken: so many more are told at once that there are too many."""
Submit = Callable[[bytes], Any]


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


def body_of(message: Any) -> bytes:
    """The JSON of a message, as HTTP would have brought it.

    Raises:
        ValueError: it has a field that service.proto has not, or a number that JSON has not.
    """
    from google.protobuf import json_format, unknown_fields

    parts = [message, *getattr(message, "candidates", ())]
    if any(len(unknown_fields.UnknownFieldSet(part)) for part in parts):
        raise ValueError("request: has a field that service.proto does not have")
    try:
        raw = json_format.MessageToDict(message, preserving_proto_field_name=True)
    except json_format.Error as error:
        raise ValueError(f"request: {error}") from error
    if message.DESCRIPTOR.name == "EventsRequest":
        raw = raw.get("logs", {})
    else:
        raw.setdefault("candidates", [])
        if "k" in raw:
            raw["k"] = int(raw["k"])  # JSON of protobuf writes integers of 64 bits as strings
    return json.dumps(_integral(raw)).encode()


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


class GrpcServer:
    """Serves until `close`.

    Args:
        service: answers.
        token: see app.make_app.
        host: address to listen on.
        port: of gRPC; 0: any.

    Raises:
        UserError: the packages are not installed, or the port is taken.
    """

    def __init__(self, service: Service, token: str | None, *, host: str, port: int) -> None:
        try:
            import grpc
        except ImportError as error:
            raise UserError("the package grpcio is not installed here: pip install 'usr-ray[grpc]'") from error
        self._grpc, self._service, self._token = grpc, service, token
        self._classes = message_classes()
        threads = service.settings.max_queued + _MORE_THREADS
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="grpc"),
            options=[("grpc.max_receive_message_length", MAX_BODY_BYTES), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=threads,
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(RANKING, self._handlers()),))
        try:
            self.port = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise UserError(f"--grpc-port {port}: cannot be listened on; name another") from error
        self._server.start()

    def close(self) -> None:
        """Finish the requests in work."""
        self._server.stop(grace=5).wait()

    def _handlers(self) -> dict[str, Any]:
        service = self._service
        ways: dict[str, tuple[str, str, Submit | None]] = {
            "Score": ("RankRequest", "RankAnswer", partial(service.submit, ranked=False)),
            "Rank": ("RankRequest", "RankAnswer", partial(service.submit, ranked=True)),
            "Events": ("EventsRequest", "EventsAnswer", service.submit_events),
            "Model": ("ModelRequest", "Struct", None),
        }
        return {
            name: self._grpc.unary_unary_rpc_method_handler(
                partial(self._answer, name, self._classes[answer], submit),
                request_deserializer=self._classes[request].FromString,
                response_serializer=self._classes[answer].SerializeToString,
            )
            for name, (request, answer, submit) in ways.items()
        }

    def _answer(self, name: str, answer: Any, submit: Submit | None, message: Any, context: Any) -> Any:
        from google.protobuf import json_format

        self._check_token(context)
        if submit is None:
            return json_format.ParseDict(self._service.about(), answer())
        try:
            status, content = submit(body_of(message)).result()
        except ValueError as error:
            status, content = 422, {"error": str(error)}
        except OverloadError:
            status, content = 429, {"error": "too many requests wait; try again after a second"}
        self._service.count(f"grpc/{name}", status)
        if status != 200:
            self._refuse(context, status, content["error"])
        return json_format.ParseDict(content, answer())

    def _check_token(self, context: Any) -> None:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if self._token is not None and not hmac.compare_digest(str(given).encode(), f"Bearer {self._token}".encode()):
            self._refuse(context, 401, "authorization: Bearer and the service's token are needed")

    def _refuse(self, context: Any, status: int, words: str) -> None:
        codes = self._grpc.StatusCode
        if status == 429:
            context.set_trailing_metadata(_RETRY_AFTER)
        named = {401: codes.UNAUTHENTICATED, 422: codes.INVALID_ARGUMENT, 429: codes.RESOURCE_EXHAUSTED}
        context.abort(named.get(status, codes.UNAVAILABLE), words[:_MAX_WORDS])
