"""A Ray head node on this machine alone: token, loopback, fixed ports, states of Train runs. Standard library, Linux.

    python cluster/local_ray.py start      and then
    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \
        python jobs/train.py --config FILE --lake DIR --run-dir DIR
    python cluster/local_ray.py status     where everything is; training runs and their workers
    python cluster/local_ray.py stop

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

START_TIMEOUT_S, STOP_TIMEOUT_S = 90.0, 15.0


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
    """The head node whose pid and log are kept in `state`."""

    def __init__(self, state: Path) -> None:
        self.pid_file, self.log_file = state / "head.json", state / "head.log"

    def running(self) -> dict | None:
        """What `start` noted (pid, ports) while the head lives, else None."""
        try:
            head = json.loads(self.pid_file.read_text(encoding="utf-8"))
            command = Path(f"/proc/{head['pid']}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        # A pid may have been given to another process since.
        return head if b"--head" in command and str(head["port"]).encode() in command else None

    def start(self, arguments: argparse.Namespace) -> None:
        """Start the head and wait until its dashboard answers; nothing to do when it runs already."""
        head = self.running()
        if head is None:
            token = ensure_token()
            head = {"port": arguments.port, "dashboard_port": arguments.dashboard_port}
            head["metrics_port"] = arguments.metrics_port
            for name, port in head.items():
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    try:
                        probe.bind((LOOPBACK, port))
                    except OSError as error:
                        flag = "--" + name.replace("_", "-")
                        raise UserError(
                            f"{flag} {port}: in use by another program; end it or choose another"
                        ) from error
            process = self._launch(arguments)
            head["pid"] = process.pid
            self.pid_file.write_text(json.dumps(head) + "\n", encoding="utf-8")
            self._wait(head, token, process)
        self.status()
        address = f"http://{LOOPBACK}:{head['dashboard_port']}"
        print(f"submit:     RAY_AUTH_MODE=token ray job submit --address {address} --working-dir . -- \\")
        print("                python jobs/train.py --config FILE --lake DIR --run-dir DIR")
        print("stop:       python cluster/local_ray.py stop")

    def _launch(self, arguments: argparse.Namespace) -> subprocess.Popen:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
                   "--node-ip-address", LOOPBACK, "--dashboard-host", LOOPBACK,
                   "--port", str(arguments.port), "--dashboard-port", str(arguments.dashboard_port),
                   "--metrics-export-port", str(arguments.metrics_port),
                   "--object-store-memory", str(int(arguments.object_store_gb * 1e9))]  # fmt: skip
        if arguments.num_cpus:
            command += ["--num-cpus", str(arguments.num_cpus)]
        self.pid_file.parent.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        # A submitted job runs `python`: this one, with ray and torch, whatever the shell's PATH says.
        environment |= {
            **RAY_ENVIRONMENT,
            **LOCAL_ENVIRONMENT,
            API_SERVER: f"http://{LOOPBACK}:{arguments.dashboard_port}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        with self.log_file.open("w", encoding="utf-8") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                    start_new_session=True)  # fmt: skip

    def _wait(self, head: dict, token: str, process: subprocess.Popen) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            try:
                # Jobs can be submitted once an agent has registered, later than the dashboard itself.
                nodes = api(head["dashboard_port"], "/nodes?view=summary", token)
                if nodes["data"]["summary"]:
                    return
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):
                    break
            except OSError:
                pass
            if process.poll() is not None:
                break
            time.sleep(0.5)
        tail = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        end_session(process.pid)
        self.pid_file.unlink(missing_ok=True)
        raise RuntimeError("Ray did not come up; the end of its log:\n" + "\n".join(tail))

    def stop(self) -> None:
        """End the head and all of its session: politely, then for good. Running jobs end with it."""
        head = self.running()
        if head is None:
            self.pid_file.unlink(missing_ok=True)
            print("Ray is not running (not started by this script)")
            return
        end_session(head["pid"])
        self.pid_file.unlink(missing_ok=True)
        print("Ray stopped")

    def status(self) -> None:
        """Print where everything is; UserError when the head does not run."""
        head = self.running()
        if head is None:
            raise UserError("Ray is not running; start it: python cluster/local_ray.py start")
        print(f"Ray runs:   pid {head['pid']}, {LOOPBACK}:{head['port']}, log {self.log_file}")
        print(f"dashboard:  http://{LOOPBACK}:{head['dashboard_port']} (asks for the token in {token_file()})")
        print(f"metrics:    http://{LOOPBACK}:{head['metrics_port']}/metrics (Prometheus text)")
        for run in train_runs(head["dashboard_port"], ensure_token()):
            attempt = run["attempts"][-1] if run["attempts"] else {"workers": []}
            workers = ", ".join(f"rank {w['world_rank']} pid {w['pid']} {w['status']}" for w in attempt["workers"])
            print(
                f"run:        {run['name']} {run['status']}, attempt {len(run['attempts'])}: {workers or 'no workers'}"
            )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "stop", "status"))
    parser.add_argument("--num-cpus", type=int, default=0, help="logical CPUs; default: this machine's")
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
