"""A Ray cluster of several plain machines: a head, workers, one token. Linux; Ray on one machine is local_ray.py.

    python cluster/ray_nodes.py head   --host 10.0.0.5
    scp -p ~/.ray/auth_token 10.0.0.6:.ray/                                   # the token, to each worker's machine
    python cluster/ray_nodes.py worker --host 10.0.0.6 --head 10.0.0.5:6379   # there
    python cluster/ray_nodes.py status                                        # on the head's machine
    python cluster/ray_nodes.py stop                                          # on each machine

The machines must reach each other on all ports, and nobody else may reach them: Ray has no TLS. The dashboard
and its job server listen on the head's loopback alone; from elsewhere `ssh -L 8265:127.0.0.1:8265 10.0.0.5`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.daemons import COUNT, OBJECT_STORE_GB, PORT, Daemon, check_private
from cluster.local_ray import api, num_alive, start_flags, train_runs
from usr_ray.cli import JobParser, flags, run_job
from usr_ray.config import UserError
from usr_ray.launch.environment import LOOPBACK, RAY_ENVIRONMENT, ensure_token, token_file

START_TIMEOUT_S = 90.0
JOINED = "Ray runtime started"
_FIRST_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def start_command(arguments: argparse.Namespace) -> list[str]:
    """`ray start` of a head or a worker; the token is not in it."""
    command = [
        str(Path(sys.executable).parent / "ray"),
        *start_flags(arguments.host, arguments.object_store_gb),
        *flags(metrics_export_port=arguments.metrics_port),
    ]
    if arguments.action == "head":
        ports = flags(port=arguments.port, dashboard_host=LOOPBACK, dashboard_port=arguments.dashboard_port)
        command += ["--head", *ports]
    else:
        command += flags(address=arguments.head)
    given = {name: getattr(arguments, name) for name in ("num_cpus", "num_gpus")}
    return command + flags(**{name: count for name, count in given.items() if count is not None})


def device_of(host: str) -> str:
    """The network device that has an address, '' where none has it as its first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe, _FIRST_ADDRESS, struct.pack("256s", name.encode()[:15]))[20:24]
                if found == socket.inet_aton(host):
                    return name
    return ""


def node_environment(host: str) -> dict[str, str]:
    """The environment of Ray's processes and of the jobs they start: this Python, token authentication, the device."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    own = {"RAY_AUTH_MODE": "token", "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"}
    # Gloo takes the address that the machine's name has, and Debian gives it one of the loopback: no other machine
    # could connect to it.
    device = device_of(host)
    gloo = {"GLOO_SOCKET_IFNAME": device} if device else {}
    return gloo | inherited | RAY_ENVIRONMENT | own


def start(arguments: argparse.Namespace) -> None:
    """Start a head or a worker and wait until it is there.

    Raises:
        UserError: no address, a public one, no token on a worker's machine, or a node of this name runs already.
    """
    if not arguments.host:
        raise UserError(f"{arguments.action}: --host is missing; give this machine's address in its private network")
    check_private(arguments.host)
    node = Daemon(arguments.state_dir, arguments.action)
    if arguments.action == "head":
        token = ensure_token()
        process = node.start(
            start_command(arguments),
            node_environment(arguments.host),
            address=f"{arguments.host}:{arguments.port}",
            dashboard_port=arguments.dashboard_port,
            metrics_port=arguments.metrics_port,
        )
        node.wait(process, lambda: num_alive(arguments.dashboard_port, token) > 0, timeout_s=START_TIMEOUT_S)
        status(arguments)
        return
    if not arguments.head:
        raise UserError("worker: --head is missing; give the address that `ray_nodes.py head` printed")
    if not token_file().exists() and not os.environ.get("RAY_AUTH_TOKEN"):
        raise UserError(
            f"worker: no token in {token_file()}; copy the head's: scp -p HEAD:.ray/auth_token {token_file()}"
        )
    ensure_token()  # readable by its owner only
    process = node.start(
        start_command(arguments), node_environment(arguments.host), address=arguments.host, head=arguments.head
    )
    # `ray start` reports when the node is registered, and exits when the head refuses it.
    node.wait(process, lambda: JOINED in node.log_file.read_text(errors="replace"), timeout_s=START_TIMEOUT_S)
    print(f"worker:     {arguments.host} joined {arguments.head}; log {node.log_file}")


def status(arguments: argparse.Namespace) -> None:
    """Print what runs on this machine and, on the head's, the nodes and training runs; UserError when nothing runs."""
    nodes = {name: Daemon(arguments.state_dir, name).running() for name in ("head", "worker")}
    if not any(nodes.values()):
        raise UserError(f"no Ray node of {arguments.state_dir} runs here; start one: ray_nodes.py head --host ADDRESS")
    if nodes["worker"]:
        print(f"worker:     {nodes['worker']['address']}, of {nodes['worker']['head']}")
    if nodes["head"]:
        head, token = nodes["head"], ensure_token()
        print(f"head:       {head['address']}, pid {head['pid']}; token in {token_file()}")
        print(f"submit to:  http://{LOOPBACK}:{head['dashboard_port']} (RAY_AUTH_MODE=token; loopback only)")
        for node in api(head["dashboard_port"], "/nodes?view=summary", token)["data"]["summary"]:
            raylet = node.get("raylet", {})
            print(f"node:       {raylet.get('nodeManagerAddress', node.get('ip'))} {raylet.get('state', '')}")
        for run in train_runs(head["dashboard_port"], token):
            print(f"run:        {run['name']} {run['status']}, attempt {len(run['attempts'])}")


def stop(arguments: argparse.Namespace) -> None:
    """End this machine's nodes, a worker before the head; running jobs end with the head."""
    for name in ("worker", "head"):
        ended = Daemon(arguments.state_dir, name).stop()
        print(f"{name}: {'stopped' if ended else 'did not run'}")


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("action", choices=("head", "worker", "status", "stop"))
    parser.add_argument("--host", default="", help="this machine's address in its private network")
    parser.add_argument("--head", default="", metavar="HOST:PORT", help="the head's address, for a worker")
    parser.add_argument("--num-cpus", type=COUNT, help="logical CPUs; default: this machine's")
    parser.add_argument("--num-gpus", type=COUNT, help="GPUs; default: this machine's")
    parser.add_argument("--object-store-gb", type=OBJECT_STORE_GB, default=0.5, help="training keeps nothing there")
    parser.add_argument("--port", type=PORT, default=6379, help="of the head")
    parser.add_argument("--dashboard-port", type=PORT, default=8265)
    parser.add_argument("--metrics-port", type=PORT, default=8080)
    parser.add_argument("--state-dir", type=Path, default=ROOT / ".cache" / "ray_nodes", help="pids and logs")
    arguments = parser.parse_args(argv)
    arguments.state_dir = arguments.state_dir.resolve()
    {"head": start, "worker": start, "status": status, "stop": stop}[arguments.action](arguments)


if __name__ == "__main__":
    sys.exit(run_job(main))
