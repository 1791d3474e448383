"""A stand-alone Spark cluster of plain machines, or of this one: a master, workers, one secret. Linux.

    python cluster/spark/standalone.py start --workers 2                     # master and workers here, on the loopback
    spark-submit --master spark://127.0.0.1:7077 --properties-file .cache/spark_standalone/submit.conf \
        jobs/build_samples.py --config FILE --logs DIR --lake DIR --dates A:B
    python cluster/spark/standalone.py status
    python cluster/spark/standalone.py stop

On several machines `master --host 10.0.0.5` on the first, its `secret` file copied to the same place on the others, and
there `worker --host 10.0.0.6 --master spark://10.0.0.5:7077`. Logs and lake must be reachable under one name from all
of them, and Python must be at one path. Spark's UIs have no log-in: they listen on --host alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cluster.daemons import COUNT, PORT, Daemon, check_private
from usr_ray.cli import JobParser, flags, number_in, run_job
from usr_ray.config import UserError
from usr_ray.launch.environment import LOOPBACK, private_file
from usr_ray.launch.spark import spark_home

MASTER_CLASS, WORKER_CLASS = "org.apache.spark.deploy.master.Master", "org.apache.spark.deploy.worker.Worker"
CONFIG_FILES = ("cluster.conf", "object_stores.conf")
START_TIMEOUT_S = 90.0


def settings(state: Path, *, cores: int, memory: str) -> tuple[str, str]:
    """(what the daemons read, what spark-submit reads): with the secret, so both are readable by their owner only."""
    secret = private_file(state / "secret")
    shared = f"spark.authenticate true\nspark.authenticate.secret {secret}\nspark.network.crypto.enabled true\n"
    daemon = shared + "spark.master.rest.enabled false\nspark.worker.cleanup.enabled true\n"
    parts = [(ROOT / "cluster" / "spark" / name).read_text(encoding="utf-8") for name in CONFIG_FILES]
    # An executor larger than every worker would never start.
    fitting = f"spark.executor.cores {cores}\nspark.executor.memory {memory}\n"
    return daemon, "\n".join([*parts, "# ---- of cluster/spark/standalone.py", shared + fitting])


class Standalone:
    """The daemons of this machine, kept in `state`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.state = arguments, arguments.state_dir.resolve()
        self.daemon_conf, self.submit_conf = self.state / "daemon.conf", self.state / "submit.conf"

    def daemons(self) -> list[Daemon]:
        """The daemons that were started here, workers first."""
        names = sorted((path.stem for path in self.state.glob("*.json")), key=lambda name: (name == "master", name))
        return [Daemon(self.state, name) for name in names]

    def start_master(self) -> None:
        """Start the master and wait for its page."""
        arguments = self.arguments
        self._write_settings()
        master = Daemon(self.state, "master")
        command = [MASTER_CLASS, *flags(host=arguments.host, port=arguments.port, webui_port=arguments.ui_port)]
        process = self._launch(master, command, host=arguments.host, port=arguments.port, ui_port=arguments.ui_port)
        master.wait(process, lambda: self._page() is not None, timeout_s=START_TIMEOUT_S)

    def start_worker(self, name: str, master: str) -> None:
        """Start a worker; it joins now or when the master comes up. UserError without the master's secret."""
        arguments = self.arguments
        if not (self.state / "secret").exists():
            raise UserError(f"worker: no secret in {self.state / 'secret'}; copy the master's file there (scp -p)")
        self._write_settings()
        work = self.state / "work" / name
        size = flags(cores=arguments.cores, memory=arguments.executor_memory)
        command = [WORKER_CLASS, *flags(host=arguments.host, work_dir=work, webui_port=0), *size, master]
        process = self._launch(Daemon(self.state, name), command, host=arguments.host, master=master)
        Daemon(self.state, name).wait(process, work.exists, timeout_s=START_TIMEOUT_S)

    def start_all(self) -> None:
        """A master and --workers workers here, and wait until they have joined (else RuntimeError)."""
        self.start_master()
        for number in range(1, self.arguments.workers + 1):
            self.start_worker(f"worker-{number}", f"spark://{self.arguments.host}:{self.arguments.port}")
        last = Daemon(self.state, f"worker-{self.arguments.workers}")
        end = time.monotonic() + START_TIMEOUT_S
        while (self._page() or {}).get("aliveworkers", 0) < self.arguments.workers:
            if time.monotonic() > end or last.running() is None:
                raise RuntimeError(f"the workers did not join the master; see {last.log_file}")
            time.sleep(0.3)
        self.status()

    def status(self) -> None:
        """Print the daemons of this machine and what the master knows; UserError when none runs."""
        running = {daemon.name: note for daemon in self.daemons() if (note := daemon.running())}
        if not running:
            raise UserError(f"no Spark daemon of {self.state} runs here; start it: standalone.py start")
        for name, note in running.items():
            print(f"{name + ':':<11} pid {note['pid']}, log {self.state / name}.log")
        page = self._page() if "master" in running else None
        if page is not None:
            master = running["master"]
            print(f"master at:  spark://{master['host']}:{master['port']}")
            print(f"page:       http://{master['host']}:{master['ui_port']}")
            print(f"workers:    {page['aliveworkers']} alive, {page['cores']} cores, {page['memory']} MB")
            print(f"submit:     spark-submit --master spark://{master['host']}:{master['port']} \\")
            print(f"                --properties-file {self.submit_conf} jobs/build_samples.py ...")

    def stop(self) -> None:
        """End this machine's daemons, the master last."""
        for daemon in self.daemons():
            print(f"{daemon.name}: {'stopped' if daemon.stop() else 'did not run'}")

    def _write_settings(self) -> None:
        texts = settings(self.state, cores=self.arguments.cores, memory=self.arguments.executor_memory)
        for path, text in zip((self.daemon_conf, self.submit_conf), texts, strict=True):
            path.unlink(missing_ok=True)
            private_file(path, text)

    def _launch(self, daemon: Daemon, command: list[str], **note: Any) -> Any:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SPARK_")}
        home = spark_home({})  # PyPI's pyspark, which is a whole Spark
        if home is None:
            raise UserError("pyspark is not installed here; install usr-ray[etl]")
        environment |= {
            "SPARK_HOME": str(home),
            "SPARK_CONF_DIR": str(ROOT / "cluster" / "spark" / "conf"),  # for log4j2; its defaults are not read
            "SPARK_LOCAL_IP": self.arguments.host,  # the only setting that Spark's pages respect
            "SPARK_DAEMON_MEMORY": "512m",
            "SPARK_DAEMON_JAVA_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",  # they do little
        }
        spark_class, properties = str(home / "bin" / "spark-class"), ["--properties-file", str(self.daemon_conf)]
        return daemon.start([spark_class, command[0], *properties, *command[1:]], environment, **note)

    def _page(self) -> dict[str, Any] | None:
        url = f"http://{self.arguments.host}:{self.arguments.ui_port}/json/"
        try:
            with urllib.request.urlopen(url, timeout=3) as response:
                return json.load(response)
        except (OSError, ValueError):
            return None


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("action", choices=("start", "master", "worker", "status", "stop"))
    parser.add_argument("--host", default=LOOPBACK, help="this machine's address in its private network")
    parser.add_argument("--port", type=PORT, default=7077, help="of the master")
    parser.add_argument("--ui-port", type=PORT, default=8081, help="of the master's page; Ray's metrics have 8080")
    parser.add_argument("--master", default="", metavar="URL", help="spark://HOST:PORT, for a worker")
    parser.add_argument("--workers", type=COUNT, default=2, help="how many `start` starts here")
    parser.add_argument("--cores", type=number_in("[1, 100000]", int), default=1, help="of each worker")
    parser.add_argument("--executor-memory", default="1g", help="of each worker, all of it for one executor")
    parser.add_argument(
        "--state-dir", type=Path, default=ROOT / ".cache" / "spark_standalone", help="pids, logs, secret"
    )
    arguments = parser.parse_args(argv)
    check_private(arguments.host)
    cluster = Standalone(arguments)
    if arguments.action == "start":
        cluster.start_all()
    elif arguments.action == "master":
        cluster.start_master()
        cluster.status()
    elif arguments.action == "worker":
        if not re.fullmatch(r"spark://[^/]+:\d+", arguments.master):
            raise UserError(f"--master {arguments.master!r}: write it as spark://10.0.0.5:7077")
        cluster.start_worker("worker-1", arguments.master)
        cluster.status()
    elif arguments.action == "stop":
        cluster.stop()
    else:
        cluster.status()


if __name__ == "__main__":
    sys.exit(run_job(main))
