"""A Ray cluster on this machine alone: token, loopback, fixed ports, states of Train runs. Standard library, Linux.

    python cluster/local_ray.py start [--nodes 3]      and then
    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \
        python jobs/train.py --config FILE --lake DIR --run-dir DIR
    python cluster/local_ray.py status     where everything is; training runs and their workers
    python cluster/local_ray.py stop

With `--nodes` further nodes run beside the head, as processes with --num-cpus logical CPUs each: enough to try what the
loss of a node does. `start` brings lost ones back.
`ray stop` ends every Ray process on the machine, other people's included; `stop` here ends only what `start` started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from usr_ray.cli import run_job
from usr_ray.config import UserError
from usr_ray.trainer_environment import (
    API_SERVER,
    LOCAL_ENVIRONMENT,
    LOOPBACK,
    RAY_ENVIRONMENT,
    ensure_token,
    token_file,
)

START_TIMEOUT_S, STOP_TIMEOUT_S = 180.0, 15.0

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
(trainer_environment.LOCAL_ENVIRONMENT) also forbids a second node; so it is open while Ray reads it, and the address,
which would then be the machine's outward one, is given."""


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


def session_processes(leader: int) -> list[int]:
    """Processes of the session that `start` opened. Workers leave the process group, but never the session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def end_session(leader: int) -> None:
    """End a session, politely, then for good; detached actors outlive Ray's own end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGTERM)
    end = time.monotonic() + STOP_TIMEOUT_S
    while session_processes(leader) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in session_processes(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class LocalRay:
    """The head node, and further nodes if any, whose pids and logs are kept in `state`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.pid_file, self.log_file = state / "head.json", state / "head.log"

    def running(self) -> dict | None:
        """What `start` noted (pid, ports) while the head lives, else None."""
        head = _living(self.pid_file)
        return head if head and "--head" in head["command"] and str(head["port"]) in head["command"] else None

    def nodes(self) -> dict[str, int]:
        """Name and pid of the living nodes besides the head."""
        found = {path.stem: _living(path) for path in sorted(self.state.glob("node-*.json"))}
        return {name: node["pid"] for name, node in found.items() if node and "--address" in node["command"]}

    def start(self, arguments: argparse.Namespace) -> None:
        """Start what does not run yet, and wait until all of it answers."""
        head = self.running()
        token = ensure_token()
        if head is None:
            head = {"port": arguments.port, "dashboard_port": arguments.dashboard_port}
            head["metrics_port"] = arguments.metrics_port
            for name, port in head.items():
                _refuse_port_in_use("--" + name.replace("_", "-"), port)
            head["pid"] = self._launch(arguments, "head", [
                # The agent takes jobs; at its fixed port it fails silently beside another Ray on this machine.
                "--dashboard-agent-listen-port", "0",
                "--head", "--dashboard-host", LOOPBACK, "--port", str(arguments.port),
                "--dashboard-port", str(arguments.dashboard_port),
                "--metrics-export-port", str(arguments.metrics_port)])  # fmt: skip
            self.pid_file.write_text(json.dumps(head) + "\n", encoding="utf-8")
            self._wait(head, token, num_nodes=1)
        running = self.nodes()
        for name in [f"node-{n}" for n in range(1, arguments.nodes)]:
            if name not in running:
                # Ports of its own choice: the fixed ones are the head's.
                pid = self._launch(arguments, name, [
                    "--address", f"{LOOPBACK}:{head['port']}", "--dashboard-agent-listen-port", "0"])  # fmt: skip
                (self.state / f"{name}.json").write_text(json.dumps({"pid": pid}) + "\n", encoding="utf-8")
                self._wait(head, token, num_nodes=2 + len(running))  # one after the other: each start takes a core
                running = self.nodes()
        self.status()
        address = f"http://{LOOPBACK}:{head['dashboard_port']}"
        print(f"submit:     RAY_AUTH_MODE=token ray job submit --address {address} --working-dir . -- \\")
        print("                python jobs/train.py --config FILE --lake DIR --run-dir DIR")
        print("stop:       python cluster/local_ray.py stop")

    def _launch(self, arguments: argparse.Namespace, name: str, flags: list[str]) -> int:
        """Start a node and return the pid that leads its session; its log is <name>.log."""
        ray = [str(Path(sys.executable).parent / "ray")] if "--head" in flags else [sys.executable, "-c", _MORE_NODES]
        command = [*ray, "start", "--block", "--disable-usage-stats",
                   "--node-ip-address", LOOPBACK, *flags,
                   "--object-store-memory", str(int(arguments.object_store_gb * 1e9))]  # fmt: skip
        if arguments.num_cpus:
            command += ["--num-cpus", str(arguments.num_cpus)]
        self.state.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        # A submitted job runs `python`: this one, with ray and torch, whatever the shell's PATH says.
        environment |= {
            **RAY_ENVIRONMENT,
            **LOCAL_ENVIRONMENT,
            API_SERVER: f"http://{LOOPBACK}:{arguments.dashboard_port}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        with (self.state / f"{name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                       start_new_session=True)  # fmt: skip
        return process.pid

    def _wait(self, head: dict, token: str, *, num_nodes: int) -> None:
        """Until so many nodes have registered; everything is ended again when one of them dies or takes too long."""
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            try:
                # Jobs can be submitted once an agent has registered, later than the dashboard itself.
                summary = api(head["dashboard_port"], "/nodes?view=summary", token)["data"]["summary"]
                if sum(node["raylet"].get("state") == "ALIVE" for node in summary) >= num_nodes:
                    return
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):
                    break
            except (OSError, KeyError):
                pass
            time.sleep(0.5)  # first, since a process that has just begun has no command line yet
            if self.running() is None or 1 + len(self.nodes()) < num_nodes:
                break
        logs = sorted(self.state.glob("*.log"), key=lambda path: path.stat().st_mtime)
        tail = logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        self._end()
        raise RuntimeError(f"Ray did not come up; the end of {logs[-1]}:\n" + "\n".join(tail))

    def stop(self) -> None:
        """End the nodes and the head with all of their sessions: politely, then for good. Running jobs end with it."""
        was_running = self.running() is not None
        self._end()
        print("Ray stopped" if was_running else "Ray is not running (not started by this script)")

    def _end(self) -> None:
        head = self.running()
        for pid in [*self.nodes().values(), *([head["pid"]] if head else [])]:
            end_session(pid)
        for path in (*self.state.glob("node-*.json"), self.pid_file):
            path.unlink(missing_ok=True)

    def status(self) -> None:
        """Print where everything is; UserError when the head does not run."""
        head = self.running()
        if head is None:
            raise UserError("Ray is not running; start it: python cluster/local_ray.py start")
        print(f"Ray runs:   pid {head['pid']}, {LOOPBACK}:{head['port']}, log {self.log_file}")
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


def _living(pid_file: Path) -> dict | None:
    """What was noted of a process, with its `command` line, while it lives. A pid may belong to another one by now."""
    try:
        noted = json.loads(pid_file.read_text(encoding="utf-8"))
        words = Path(f"/proc/{noted['pid']}/cmdline").read_text(encoding="utf-8").split("\0")
    except (OSError, ValueError):
        return None
    return {**noted, "command": words} if "start" in words else None


def _refuse_port_in_use(flag: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise UserError(f"{flag} {port}: in use by another program; end it or choose another") from error


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("--nodes", type=int, default=1, help="nodes as processes, the head included")
    parser.add_argument("--num-cpus", type=int, default=0, help="logical CPUs of a node; default: this machine's")
    parser.add_argument("--object-store-gb", type=float, default=0.2, help="training keeps nothing there")
    parser.add_argument("--port", type=int, default=6379)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    parser.add_argument("--metrics-port", type=int, default=8080)
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
