"""Serve the stable version of a registry over HTTP, on Ray Serve.

python jobs/serve.py --registry DIR [--host 127.0.0.1] [--port 8000] [--token-file FILE] [--replicas N] [--alone]
    [--grpc-port PORT] [--page] [--device cuda]

--alone serves from this process without Ray. --grpc-port serves over gRPC too. Anything but the loopback needs a token.
--page shows a page at / with histories of users to whoever may ask. docs/serving.md has the paths.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, check_file, check_input, check_output, number_in, run_job
from usr_ray.config import UserError
from usr_ray.launch.environment import OWN, prepare_environment

if TYPE_CHECKING:
    from usr_ray.serving.service import Service


GRACE_S = 5
"""For requests in progress once the service is told to end: one whose client sends no more would hold it for ever."""


def read_token(path: Path | None, host: str) -> str | None:
    """The token in a file.

    Raises:
        UserError: it is empty, or there is none though others than this machine could ask.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise UserError(f"--host {host}: is not an IP address; write one, such as 127.0.0.1") from error
    if path is None and not is_loopback:
        raise UserError(f"--host {host}: whoever reaches it could ask; name a --token-file, or keep to 127.0.0.1")
    if path is None:
        return None
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise UserError(f"--token-file {path}: holds no token; write one into it, such as of `openssl rand -hex 32`")
    return token


def listening_at(host: str, port: int, flag: str) -> socket.socket:
    """A socket that listens. Raises UserError where the port of a flag is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(f"{flag} {port}: cannot be listened on at {host} ({why}); name another") from error


def check_registry(registry: Path, device: str) -> None:
    """Say here, in one line, what each replica would refuse, or do without, behind Ray's back.

    Raises:
        UserError: the stable version is not there or of another format, or has no program for a GPU.
    """
    from usr_ray.serving.runtime import ONNX, read_manifest, require_program
    from usr_ray.serving.versions import CANARY, MODEL, SHADOW, STABLE, read_pointer, read_version, version_folder

    pointer = read_pointer(registry)
    for place in (STABLE, CANARY, SHADOW):
        name = getattr(pointer, place)
        if name is None:
            continue
        try:
            folder = version_folder(registry, name)
            read_version(folder)
            if device == "cuda":
                require_program(folder / MODEL, read_manifest(folder / MODEL, "files"), ONNX)
        except UserError as error:
            if place == STABLE:
                raise
            print(f"warning: served without its {place}: {error}", flush=True)


def wait_for_signal(address: str) -> None:
    """Say where the service is, and return when the process is told to end."""
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    print(f"serving at {address}", flush=True)
    stop.wait()


def serve_alone(service: Service, token: str | None, *, host: str, port: int, grpc_port: int | None) -> None:
    """Serve from this process until it is told to end, and finish the requests in progress.

    Raises:
        UserError: a port is taken.
    """
    import uvicorn

    from usr_ray.serving.app import make_app

    grpc_server = None
    with listening_at(host, port, "--port") as listening:
        if grpc_port is not None:
            from usr_ray.serving.grpc_service import GrpcServer

            grpc_server = GrpcServer(service, token, host=host, port=grpc_port)
            print(f"serving gRPC at {host}:{grpc_server.port}", flush=True)
        # uvicorn finishes its requests, and then raises the signal anew: by default that ends the process at once.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            print(f"serving at http://{host}:{port}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                config = uvicorn.Config(
                    make_app(service, token), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S
                )
                uvicorn.Server(config).run([listening])
        finally:
            if grpc_server is not None:
                grpc_server.close()


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--registry", check_input, type=Path, required=True, help="of jobs/publish.py")
    parser.add_place("--log-dir", check_output, type=Path, metavar="DIR", help="events are kept here (REGISTRY/log)")
    parser.add_place("--token-file", check_file, type=Path, metavar="FILE", help="the bearer token that requests carry")
    parser.add_argument("--host", default="127.0.0.1", metavar="IP", help="address to listen on")
    count = number_in("[1, 65535]", int)
    parser.add_argument("--port", type=count, default=8000, help="of HTTP")
    parser.add_argument("--replicas", type=count, default=1, help="processes, each with its own copy of the version")
    parser.add_argument("--workers", type=count, default=2, help="requests that a replica computes at once")
    parser.add_argument("--max-queued", type=count, default=32, help="requests that a replica takes before it says 429")
    parser.add_argument("--alone", action="store_true", help="one process, without Ray")
    parser.add_argument("--grpc-port", type=count, metavar="PORT", help="of gRPC")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: requests share calls on a GPU")
    parser.add_argument("--page", action="store_true", help="a page at /; it shows what users have done")
    arguments = parser.parse_args(argv)
    if arguments.alone and arguments.replicas > 1:
        raise UserError("--replicas: --alone is one process; leave one of them out, or give it more --workers")
    token = read_token(arguments.token_file, arguments.host)
    if arguments.grpc_port is not None and not arguments.alone and token is None:
        raise UserError("--grpc-port: Ray Serve listens for gRPC on every address; name a --token-file, or add --alone")
    cluster = prepare_environment(dashboard=False)
    from usr_ray.serving.app import serve_on_ray  # imports Ray, which reads the environment
    from usr_ray.serving.service import Service, Settings

    settings = Settings(
        registry=arguments.registry.absolute(),
        num_workers=arguments.workers,
        max_queued=arguments.max_queued,
        log_dir=arguments.log_dir and arguments.log_dir.absolute(),
        device=arguments.device,
        page=arguments.page,
    )
    if arguments.alone:
        service = Service(settings)
        if service.last_error:
            print(f"warning: {service.last_error}", flush=True)
        try:
            serve_alone(service, token, host=arguments.host, port=arguments.port, grpc_port=arguments.grpc_port)
        finally:
            service.close()
        return
    check_registry(settings.registry, settings.device)
    if cluster == OWN:  # elsewhere the proxies listen on other machines
        listening_at(arguments.host, arguments.port, "--port").close()
        if arguments.grpc_port is not None:
            listening_at("0.0.0.0", arguments.grpc_port, "--grpc-port").close()
    serve_on_ray(
        settings,
        token,
        host=arguments.host,
        port=arguments.port,
        grpc_port=arguments.grpc_port,
        num_replicas=arguments.replicas,
        own_cluster=cluster == OWN,
        wait=wait_for_signal,
    )


if __name__ == "__main__":
    sys.exit(run_job(main))
