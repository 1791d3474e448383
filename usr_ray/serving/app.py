"""The service on the network: FastAPI in front of `service.Service`, alone or as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from usr_ray import __version__
from usr_ray.cli import own_threads_apart, usable_cores
from usr_ray.config import UserError
from usr_ray.serving.openapi import (
    EVENTS_ANSWER,
    EXPLAIN_ANSWER,
    RANK_ANSWER,
    RANK_REQUEST,
    described,
    events_request,
)
from usr_ray.serving.openapi import page as fields_page
from usr_ray.serving.service import MAX_BODY_BYTES, OverloadError, Service, Settings, carries_token

APPLICATION = "usr-ray"
"""Name on Ray Serve, here and in cluster/serve/usr_ray.yaml: what `application` in a gRPC call's metadata says."""
_OPEN = ("/healthz", "/readyz", "/metrics")
"""Paths that answer without the token: they tell numbers and names of versions only."""
_PAGE = Path(__file__).with_name("page.html")
_PAGE_MAY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
"""What the page may do: run what is in it, and ask this service."""
_ANY_PATH = "any"
"""Label of requests without the token: a caller without one must not make a series for each path it thinks of."""
_Count = Callable[[str, int, float], None]
"""Service.count."""


class _Guard:
    """Asks for the token before a request is looked at. No `@app.middleware`: that starts a task for each request."""

    def __init__(self, app: ASGIApp, token: str, is_open: tuple[str | None, ...], count: _Count) -> None:
        self._app, self._token, self._open, self._count = app, token, is_open, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not carries_token(given, self._token):
                started = time.perf_counter()
                refusal = {"error": "Authorization: Bearer and the service's token are needed"}
                await JSONResponse(refusal, 401)(scope, receive, send)
                self._count(_ANY_PATH, 401, started)
                return
        await self._app(scope, receive, send)


def make_app(service: Service, token: str | None = None) -> FastAPI:
    """The ASGI application of a service.

    Args:
        token: what `Authorization: Bearer` must carry; None: requests need no token.
    """
    app = FastAPI(title="usr-ray", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    page = "/" if service.settings.page else None  # it holds no data: its own requests carry the token

    if token is not None:
        app.add_middleware(_Guard, token=token, is_open=(*_OPEN, page), count=service.count)

    async def answer(request: Request, submit: Callable[[bytes], Any]) -> Response:
        started, body = time.perf_counter(), b""
        try:
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:  # no more is read; the answer says so
                    break
        except (ClientDisconnect, asyncio.CancelledError):  # it hung up, or the service ends before it has sent all
            return Response(status_code=400)
        try:
            status, content = await asyncio.wrap_future(submit(body))
        except OverloadError as error:
            status, content = 429, {"error": str(error)}
        service.count(request.url.path, status, started)
        headers = {"Retry-After": "1"} if status == 429 else None
        return Response(orjson.dumps(content), status, headers, media_type="application/json")

    @app.post("/v1/score", openapi_extra=described(RANK_REQUEST, RANK_ANSWER))
    async def score(request: Request) -> Response:
        """Probabilities of the candidates, in their order."""
        return await answer(request, functools.partial(service.submit, ranked=False))

    @app.post("/v1/rank", openapi_extra=described(RANK_REQUEST, RANK_ANSWER))
    async def rank(request: Request) -> Response:
        """The candidates with the largest probabilities first."""
        return await answer(request, functools.partial(service.submit, ranked=True))

    scenarios = tuple(service.ranker.encoder.spec.scenarios)

    @app.post("/v1/events", openapi_extra=described(events_request(scenarios), EVENTS_ANSWER))
    async def events(request: Request) -> Response:
        """Impressions, clicks and orders, which the next request's histories see."""
        return await answer(request, service.submit_events)

    app.add_exception_handler(HTTPException, _refused)
    _add_about(app, service)
    if page is not None:
        _add_page(app, service, answer)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """404 and 405 as every other refusal."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow") or ""
    words = {
        404: "is no path of this service; /docs has them all",
        405: f"does not take {request.method}; it takes {allowed}",
    }
    content = {"error": f"{request.url.path} {words.get(error.status_code, error.detail)}"}
    return Response(orjson.dumps(content), error.status_code, error.headers, media_type="application/json")


def _add_about(app: FastAPI, service: Service) -> None:
    """What the service tells of itself."""

    @app.get("/v1/model")
    async def model() -> dict[str, Any]:
        """The version that is served."""
        return service.about()

    @app.get("/healthz")
    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """A service that has started has verified its version and answered its golden requests."""
        return {"version": service.ranker.version["version"]}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def fields() -> Response:
        return HTMLResponse(fields_page(app.openapi()))


def _add_page(app: FastAPI, service: Service, answer: Callable[..., Any]) -> None:
    """The page and the paths that it asks."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": _PAGE_MAY, "Cache-Control": "no-store"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)

    @app.get("/v1/examples")
    async def examples() -> dict[str, Any]:
        """Scenarios, and requests of users, queries and candidates to pick from."""
        return service.examples()

    @app.post("/v1/explain", openapi_extra=described(RANK_REQUEST, EXPLAIN_ANSWER))
    async def explain(request: Request) -> Response:
        """The answer of /v1/score, with the history that the model saw and what each signal adds to p_ctr."""
        return await answer(request, service.submit_explained)  # type: ignore[no-any-return]


def num_cpus(settings: Settings) -> int:
    """CPUs of a replica: its workers compute, or wait for a GPU."""
    return settings.num_workers * settings.num_threads if settings.device == "cpu" else 2


def deployment(
    settings: Settings,
    token: str | None,
    *,
    num_replicas: int = 1,
    make_service: Callable[[Settings], Service] = Service,
) -> Any:
    """An application of Ray Serve: `ray.serve.run(deployment(...))`; `make_service` is called in each replica."""
    from ray import serve

    # The replica's own queue is the bound, and answers 429: Serve must let one request more in than it takes.
    @serve.deployment(
        name="usr_ray",
        num_replicas=num_replicas,
        max_ongoing_requests=4 * settings.max_queued,
        ray_actor_options={"num_cpus": num_cpus(settings), "num_gpus": int(settings.device == "cuda")},
    )
    @serve.ingress()
    class UsrRay:
        """One process with its own copy of the stable version; gRPC comes to the methods of service.proto's names."""

        def __init__(self) -> None:
            self._service = make_service(settings)
            self._methods: Any = None

        def __serve_build_asgi_app__(self) -> FastAPI:
            return make_app(self._service, token)

        async def _answer(self, name: str, message: bytes, context: Any) -> Any:
            if self._methods is None:  # the first message: where gRPC is off, its packages may be missing
                from usr_ray.serving.grpc_service import Methods

                self._methods = Methods(self._service, token)
            started = time.perf_counter()
            begun = self._methods.begun(name, message, context.invocation_metadata())
            return self._methods.ended(name, await asyncio.wrap_future(begun), context, started)

        async def Score(self, message: bytes, grpc_context: Any) -> Any:
            return await self._answer("Score", message, grpc_context)

        async def Rank(self, message: bytes, grpc_context: Any) -> Any:
            return await self._answer("Rank", message, grpc_context)

        async def Events(self, message: bytes, grpc_context: Any) -> Any:
            return await self._answer("Events", message, grpc_context)

        async def Model(self, message: bytes, grpc_context: Any) -> Any:
            return await self._answer("Model", message, grpc_context)

    return UsrRay.bind()  # type: ignore[attr-defined]


def grpc_options(port: int | None) -> dict[str, Any] | None:
    """Options of Ray Serve's proxy; None without a port. Its reflection, which asks for no token, is off."""
    if port is None:
        return None
    functions = ["usr_ray.serving.grpc_service.add_ranking"]
    return {"port": port, "grpc_servicer_functions": functions, "enable_reflection": False}


def application(arguments: dict[str, Any]) -> Any:
    """What `serve deploy` and a RayService call (cluster/serve/usr_ray.yaml).

    Args:
        arguments: the fields of `Settings`, and `token_file`, whose content requests must carry.

    Raises:
        UserError: no token.
    """
    settings: dict[str, Any] = {n: Path(v) if n in ("registry", "log_dir") else v for n, v in arguments.items()}
    path = settings.pop("token_file", None)
    token = "" if path is None else Path(path).read_text(encoding="utf-8").strip()
    if not token:
        raise UserError(f"token_file {path}: holds no token; write one into it, and name it among the args")
    return deployment(Settings(**settings), token)


def check_cluster(settings: Settings, num_replicas: int) -> None:
    """Refuse a Ray on which Serve runs already, or which has no room: `serve.run` would wait for it for ever.

    A Serve that runs keeps the host, port and token of whoever started it, and drops ours without a word.

    Raises:
        UserError: see above.
    """
    import ray
    import ray.util

    if any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise UserError(
            "RAY_ADDRESS: Ray Serve runs on this cluster already, and would keep its own host, port and token; use "
            "`serve deploy` with cluster/serve/usr_ray.yaml, or end that one with `serve shutdown`"
        )
    resources = ray.cluster_resources()
    for name, each in (("GPU", int(settings.device == "cuda")), ("CPU", num_cpus(settings))):
        there = int(resources.get(name, 0))
        if num_replicas * each > there:
            raise UserError(
                f"--replicas {num_replicas}: needs {num_replicas * each} {name} of Ray, which has {there}; take fewer, "
                "or a machine or cluster that has them"
            )


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Whatever Ray says of a proxy or a replica that does not start becomes one line."""
    import ray

    try:
        yield
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        raise UserError(
            f"Ray Serve: the service does not start ({_ends(error)}); see that the ports are free and the "
            "registry can be read on every node, or try --alone, which says more"
        ) from error


def _ends(error: BaseException) -> str:
    """The first and the last line of an error of Ray's: what it did, and the cause below its traceback."""
    lines = [line.strip(" .") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ... ".join(dict.fromkeys((lines[0], lines[-1])))


def serve_on_ray(
    settings: Settings,
    token: str | None,
    *,
    host: str,
    port: int,
    grpc_port: int | None,
    num_replicas: int,
    own_cluster: bool,
    wait: Callable[[str], None],
) -> None:
    """Serve until `wait` returns.

    Args:
        token: see `make_app`.
        grpc_port: taken on every address of the machine, for Serve's proxy knows no host for it; None: no gRPC.
        num_replicas: each is a process with its own copy of the version.
        own_cluster: start a Ray on the loopback of this machine; False: use that of the environment.
        wait: called with the service's address once it answers.

    Raises:
        UserError: see `check_cluster`; a proxy or a replica does not start.
    """
    import ray
    from ray import serve

    cores = num_replicas * num_cpus(settings) + 1
    own: dict[str, Any] = {
        "address": "local",
        "num_cpus": max(cores, usable_cores()),
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    with own_threads_apart(os.environ):
        ray.init(log_to_driver=False, **(own if own_cluster else {}))
    try:
        check_cluster(settings, num_replicas)
        try:
            with _starting():
                serve.start(http_options={"host": host, "port": port}, grpc_options=grpc_options(grpc_port))
                app = deployment(settings, token, num_replicas=num_replicas)
                serve.run(app, name=APPLICATION, route_prefix="/")
            wait(f"http://{host}:{port}")
        finally:
            serve.shutdown()
    finally:
        ray.shutdown()
