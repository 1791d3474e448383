"""A Ray cluster on this machine alone: token, loopback, fixed ports, states of Train runs. Standard library, Linux.

    python cluster/local_ray.py start [--nodes 3]      # and then
    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \
        python jobs/train.py --config FILE --lake DIR --run-dir DIR
    python cluster/local_ray.py status     # where everything is; training runs and their workers
    python cluster/local_ray.py stop

With `--nodes` further nodes run beside the head, as processes with --num-cpus logical CPUs each: enough to try the
loss of a node. `start` brings lost ones back.
`ray stop` ends every Ray process on the machine, including other people's; `stop` here ends only what `start` started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.daemons import COUNT, OBJECT_STORE_GB, PORT, Daemon
from usr_ray.cli import JobParser, flags, number_in, own_threads_apart, run_job
from usr_ray.config import UserError
from usr_ray.launch.environment import (
    API_SERVER,
    LOCAL_ENVIRONMENT,
    LOOPBACK,
    RAY_ENVIRONMENT,
    ensure_token,
    free_port,
    token_file,
)

START_TIMEOUT_S = 180.0

_MORE_NODES = f"""
import os
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"
from ray._private import services
from ray.scripts.scripts import main
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
services.get_node_ip_address = lambda address=None: "{LOOPBACK}"
main()
"""
"""Ray's own command, for a node that is not the head. The switch that keeps a cluster on the loopback
(launch/environment.LOCAL_ENVIRONMENT) also forbids a second node; so it is open while Ray reads it, and the address,
which would then be the machine's outward one, is given."""


def start_flags(host: str, object_store_gb: float) -> list[str]:
    """What every `ray start` of ours has."""
    size = flags(node_ip_address=host, object_store_memory=int(object_store_gb * 1e9))
    return ["start", "--block", "--disable-usage-stats", *size]


def api(port: int, path: str, token: str, timeout_s: float = 5.0) -> dict:
    """One GET of the dashboard's REST interface, as its JSON; OSError when it does not answer."""
    request = urllib.request.Request(f"http://{LOOPBACK}:{port}{path}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return json.load(response)


def train_runs(port: int, token: str) -> list[dict]:
    """Ray Train's runs, newest first; none before the first. Ray's open dashboard has the data but no page for it."""
    try:
        return api(port, "/api/train/v2/runs/v1", token)["train_runs"]
    except OSError:
        return []


def num_alive(port: int, token: str) -> int:
    """Nodes that have registered: jobs can be submitted once an agent has, later than the dashboard itself."""
    try:
        nodes = api(port, "/nodes?view=summary", token)["data"]["summary"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise
        return 0
    except (OSError, KeyError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


class LocalRay:
    """The head node, and further nodes if any, whose pids and logs are kept in `state`."""

    def __init__(self, state: Path) -> None:
        self.state, self.head = state, Daemon(state, "head")

    def nodes(self) -> dict[str, int]:
        """Name and pid of the living nodes besides the head."""
        names = sorted(path.stem for path in self.state.glob("node-*.json"))
        return {name: note["pid"] for name in names if (note := Daemon(self.state, name).running())}

    def start(self, arguments: argparse.Namespace) -> None:
        """Start what does not run yet, and wait until all of it answers; otherwise end everything.

        Raises:
            UserError: another program has one of the ports.
        """
        token, head = ensure_token(), self.head.running()
        if head is None:
            head = {name: getattr(arguments, name) for name in ("port", "dashboard_port", "metrics_port")}
            for name, port in head.items():
                if free_port(port) != port:
                    flag = "--" + name.replace("_", "-")
                    raise UserError(f"{flag} {port}: in use by another program; end it or choose another")
            ports = flags(
                dashboard_host=LOOPBACK,
                port=arguments.port,
                dashboard_port=arguments.dashboard_port,
                metrics_export_port=arguments.metrics_port,
            )
            self._launch(self.head, head, arguments, token, ["--head", *ports])
        for number in range(1, arguments.nodes):
            node = Daemon(self.state, f"node-{number}")
            if node.running() is None:  # one after the other: each start takes a core
                self._launch(node, head, arguments, token, flags(address=f"{LOOPBACK}:{head['port']}"))
        self.status()
        address = f"http://{LOOPBACK}:{head['dashboard_port']}"
        print(f"submit:     RAY_AUTH_MODE=token ray job submit --address {address} --working-dir . -- \\")
        print("                python jobs/train.py --config FILE --lake DIR --run-dir DIR")
        print("stop:       python cluster/local_ray.py stop")

    def _launch(
        self, node: Daemon, head: dict[str, Any], arguments: argparse.Namespace, token: str, own: list[str]
    ) -> None:
        """Start a node and wait until as many have registered as run."""
        ray = [str(Path(sys.executable).parent / "ray")] if node is self.head else [sys.executable, "-c", _MORE_NODES]
        # The agent takes jobs; at its fixed port it fails silently beside another node or Ray on this machine.
        own = [*flags(dashboard_agent_listen_port=0), *own]
        command = [*ray, *start_flags(LOOPBACK, arguments.object_store_gb), *own]
        if arguments.num_cpus:
            command += flags(num_cpus=arguments.num_cpus)
        with own_threads_apart(os.environ):
            environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        # A submitted job runs `python`: this one, with ray and torch, whatever the shell's PATH says.
        environment |= {
            **RAY_ENVIRONMENT,
            **LOCAL_ENVIRONMENT,
            API_SERVER: f"http://{LOOPBACK}:{arguments.dashboard_port}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        try:
            process = node.start(command, environment, **(head if node is self.head else {}))
            port = head["dashboard_port"]
            node.wait(process, lambda: num_alive(port, token) > len(self.nodes()), timeout_s=START_TIMEOUT_S)
        except BaseException:
            self._end()
            raise

    def stop(self) -> None:
        """End the nodes and the head with all of their sessions: SIGTERM, then SIGKILL. Running jobs end with them."""
        print("Ray stopped" if self._end() else "Ray is not running (not started by this script)")

    def _end(self) -> bool:
        """End everything; True where the head ran."""
        for path in self.state.glob("node-*.json"):
            Daemon(self.state, path.stem).stop()
        return self.head.stop()

    def status(self) -> None:
        """Print where everything is; UserError when the head does not run."""
        head = self.head.running()
        if head is None:
            raise UserError("Ray is not running; start it: python cluster/local_ray.py start")
        print(f"Ray runs:   pid {head['pid']}, {LOOPBACK}:{head['port']}, log {self.head.log_file}")
        for name, pid in self.nodes().items():
            print(f"{name + ':':<12}pid {pid}, log {self.state / (name + '.log')}")
        print(f"dashboard:  http://{LOOPBACK}:{head['dashboard_port']} (asks for the token in {token_file()})")
        print(f"metrics:    http://{LOOPBACK}:{head['metrics_port']}/metrics (Prometheus text)")
        for run in train_runs(head["dashboard_port"], ensure_token()):
            attempt = run["attempts"][-1] if run["attempts"] else {"workers": []}
            workers = ", ".join(f"rank {w['world_rank']} pid {w['pid']} {w['status']}" for w in attempt["workers"])
            print(
                f"run:        {run['name']} {run['status']}, attempt {len(run['attempts'])}: {workers or 'no workers'}"
            )


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("--nodes", type=number_in("[1, 100]", int), default=1, help="as processes, with the head")
    parser.add_argument("--num-cpus", type=COUNT, default=0, help="logical CPUs of a node; default: this machine's")
    parser.add_argument("--object-store-gb", type=OBJECT_STORE_GB, default=0.2, help="training keeps nothing there")
    parser.add_argument("--port", type=PORT, default=6379)
    parser.add_argument("--dashboard-port", type=PORT, default=8265)
    parser.add_argument("--metrics-port", type=PORT, default=8080)
    parser.add_argument("--state-dir", type=Path, default=ROOT / ".cache" / "local_ray", help="pid and log of the head")
    arguments = parser.parse_args(argv)
    ray = LocalRay(arguments.state_dir.resolve())
    if arguments.action == "start":
        ray.start(arguments)
    elif arguments.action == "stop":
        ray.stop()
    else:
        ray.status()


if __name__ == "__main__":
    sys.exit(run_job(main))
