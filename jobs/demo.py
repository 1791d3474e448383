"""The whole way once, as `make demo` runs it: from logs to a trained, evaluated and served model, with a report.

Every step is one of the jobs, and the command that is printed before it runs it alone. Here all but the build run in
this process, which loads torch and starts Ray for them while the build's JVM works.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from usr_ray.cli import (
    EXIT_USER_ERROR,
    check_input,
    check_logs,
    check_output_table,
    flags,
    job_config,
    job_parser,
    run_job,
)
from usr_ray.config import Config, UserError, parse_dates
from usr_ray.launch.environment import LOOPBACK, OWN, free_port, prepare_environment
from usr_ray.launch.spark import spark_environment, spark_submit

MARKER = ".usr-ray-demo"
SIMULATED = "simulated"
FIRST_PORT = 8000
SERVE_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "lmdb", "xxhash", "fastapi", "uvicorn", "orjson")
"""What the extra [serve] brings for publishing and serving."""
JAVA_ALWAYS_SAYS = "WARNING: Using incubator modules"
"""Spark asks for a module of Java's incubator, and Java says so."""
NUM_TIMED = 50
NUM_SHOWN = 5
START_S = 60.0
"""Seconds within which the service must answer."""
PLAIN = ("model.interest.enabled=false", "model.generator.enabled=false", "model.multitask.enabled=false")
"""The backbone without any part of USR."""


class StepFailed(SystemExit):
    """A job of the demo ended with an exit code other than 0; the job has already said why."""


def fresh_folder(work: Path) -> None:
    """Empty the demo's own folder. A folder that the demo did not make is never touched (UserError)."""
    if work.exists() and any(work.iterdir()):
        if not (work / MARKER).exists():
            raise UserError(f"--work {work}: is not empty and no earlier demo's; name an empty or a new folder")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).touch()


def announce(title: str, command: Sequence[str]) -> None:
    """Print what comes, and the command that does it alone."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)


def ended(title: str, code: int, started: float) -> None:
    """Print how long a step took; stop the demo with its exit code when it failed."""
    if code != 0:
        print(f"demo: stopped, '{title}' ended with exit code {code}", file=sys.stderr)
        raise StepFailed(code)
    print(f"   {title}: {time.monotonic() - started:.0f} s", flush=True)


def build(*words: str, meanwhile: Callable[[], None]) -> None:
    """Run jobs/build_samples.py, with a JVM, and `meanwhile` beside it."""
    command = [spark_submit(), "jobs/build_samples.py", *words]
    announce("build samples", command)
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=spark_environment(), stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        said = threading.Thread(target=pass_on, args=(process.stderr,))
        said.start()
        try:
            meanwhile()
            process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            said.join()  # the pipe is closed behind it, not under it
    ended("build samples", process.returncode, started)


def pass_on(lines: Iterable[str]) -> None:
    """Write what a JVM says on its standard error to ours, but for the line that no option of Java's takes away."""
    for line in lines:
        if not line.startswith(JAVA_ALWAYS_SAYS):
            with contextlib.suppress(OSError):  # nobody reads us any more; a pipe that nobody reads would stop the JVM
                print(line, end="", file=sys.stderr, flush=True)


def job(title: str, name: str, *words: str, may_refuse: bool = False) -> bool:
    """Run another job in this process; stop the demo with its exit code when it fails. False: it refused, and might."""
    announce(title, [sys.executable, f"jobs/{name}.py", *words])
    started, handler = time.monotonic(), signal.getsignal(signal.SIGTERM)
    try:
        code = run_job(importlib.import_module(f"jobs.{name}").main, [*words])
    finally:
        signal.signal(signal.SIGTERM, handler)  # a training without Ray sets one that saves and ends
    if code == EXIT_USER_ERROR and may_refuse:
        return False
    ended(title, code, started)
    return True


def load_ahead(config: Config, run: Path, stack: contextlib.ExitStack, *, cluster: str, serves: bool) -> None:
    """Load what the jobs after the build load, and start their Ray, which ends with `stack`, and the workers of `run`.

    What fails here is left to the job that needs it, which says it in its own words. Not in a thread: Linux ends Ray's
    processes with the thread that started them.
    """
    with contextlib.suppress(Exception):
        if config.ray.num_workers:
            trainer = importlib.import_module("usr_ray.launch.trainer")
            session = importlib.import_module("usr_ray.launch.session")
            stack.enter_context(session.ray_session(config.ray, cluster=cluster))
            if cluster == OWN:
                stack.enter_context(trainer.workers_ahead(config, run))
        else:
            importlib.import_module("usr_ray.launch.alone")
        for name in ("usr_ray.reporting.run", *(("usr_ray.serving.publish", "onnxscript") if serves else ())):
            importlib.import_module(name)


def serve(run: Path, lake: Path, registry: Path) -> None:
    """Publish the run, start the service and show its answer to one request."""
    missing = [name for name in SERVE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"\ndemo: not served, as {', '.join(missing)} is not installed; pip install 'usr-ray[serve]'", flush=True)
        return
    places = flags(run_dir=run, lake=lake, registry=registry)
    if not job("publish", "publish", *places, may_refuse=True):
        print("demo: not served, as the line above says; the run and its report are whole", flush=True)
        return
    port = free_port(FIRST_PORT)
    command = [sys.executable, "jobs/serve.py", "--alone", *flags(registry=registry, port=port)]
    announce("serve", command)
    service = subprocess.Popen(command, cwd=ROOT)
    try:
        ask(f"http://{LOOPBACK}:{port}", registry, service)
    finally:
        service.terminate()
        service.wait()


def ask(address: str, registry: Path, service: subprocess.Popen[bytes]) -> None:
    """Rank the candidates of a published request once the service answers, and time the same request."""
    deadline = time.monotonic() + START_S
    while service.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/readyz", timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    else:
        print("demo: stopped, the service does not answer", file=sys.stderr)
        raise StepFailed(service.poll() or 1)
    version = json.loads((registry / "current.json").read_text(encoding="utf-8"))["stable"]
    golden = json.loads((registry / "versions" / version / "golden.json").read_text(encoding="utf-8"))
    request = next((case["request"] for case in golden if "query" in case["request"]), golden[0]["request"])
    words = {key: value for key, value in request.items() if key not in ("candidates", "time")}
    shown = json.dumps(words)[:-1] + f', "candidates": [{len(request["candidates"])} items]}}'
    print(f"$ POST {address}/v1/rank {shown}", flush=True)
    seconds = []
    answer: dict[str, Any] = {}
    for _ in range(NUM_TIMED + 1):
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(f"{address}/v1/rank", json.dumps(request).encode(), timeout=10) as response:
                answer = json.load(response)
        except OSError as error:
            print(f"demo: stopped, the service does not answer {address}/v1/rank ({error})", file=sys.stderr)
            raise StepFailed(1) from error
        seconds.append(time.perf_counter() - started)
    names = [name for name in answer["items"][0] if name != "id"]
    width = max(len(item["id"]) for item in answer["items"])
    print("   " + "  ".join([" #", "item".ljust(width), *(name.rjust(14) for name in names)]))
    for place, item in enumerate(answer["items"][:NUM_SHOWN], 1):
        cells = [
            f"{place:2}",
            item["id"].ljust(width),
            *("-".rjust(14) if item[name] is None else f"{item[name]:14.4f}" for name in names),
        ]
        print("   " + "  ".join(cells))
    p50 = statistics.median(seconds[1:]) * 1e3
    print(f"   p50 of {NUM_TIMED} requests one after the other, each on a connection of its own: {p50:.1f} ms")
    print(
        f"   look at it: usr-ray serve --registry {shlex.quote(str(registry))} --alone --page, then open http://{LOOPBACK}:8000/",
        flush=True,
    )


def build_dates(config: Config) -> str:
    """First training date to last held-out date."""
    first = parse_dates(config.data.train_dates, where="data.train_dates")[0]
    last = parse_dates(config.data.eval_dates, where="data.eval_dates")[1]
    return f"{first}:{last}"


def train_twin(run: Path, lake: Path, settings: Sequence[str]) -> list[str]:
    """Train the backbone without USR; the flags with which jobs/evaluate.py compares the two."""
    plain = [word for override in PLAIN for word in ("--set", override)]
    job("train the plain twin", "train", *flags(lake=lake, run_dir=run), "--brief", *settings, *plain)
    return ["--compare", str(run), "--importance"]


def main(argv: list[str]) -> None:
    parser = job_parser(__doc__ or "")
    parser.add_argument("--source", default=SIMULATED, help="data set to ingest (ignored with --logs)")
    parser.add_place("--input", check_input, type=Path, help="folder of the data set's files")
    parser.add_place("--logs", check_logs, type=Path, help="logs that are already there (docs/own-logs.md)")
    parser.add_argument("--no-serve", action="store_true", help="end with the report: do not publish and serve the run")
    parser.add_argument("--compare", action="store_true", help="also train the plain twin and a logistic regression")
    parser.add_place("--work", check_output_table, type=Path, required=True, help="for logs, lake and run; emptied")
    arguments = parser.parse_args(argv)
    config = job_config(arguments)
    if not (config.data.train_dates and config.data.eval_dates):
        raise UserError(f"{arguments.config}: the demo needs data.train_dates and data.eval_dates; set both")
    if arguments.logs is None and arguments.source != SIMULATED and arguments.input is None:
        raise UserError(f"--source {arguments.source}: --input is missing; name the folder with the data set's files")
    started = time.monotonic()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as jobs/train.py has it; read when torch is loaded
    # Nobody watches a minute's run by Ray's API: an actor less.
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    cluster = prepare_environment(dashboard=config.ray.dashboard)
    # The build runs where the program is, the paths are those of the caller.
    work: Path = arguments.work.absolute()
    for flag in ("input", "logs", "config"):
        place = getattr(arguments, flag)
        setattr(arguments, flag, place and place.absolute())
    fresh_folder(work)
    logs, lake, run = arguments.logs or work / "logs", work / "lake", work / "run"
    settings = flags(config=arguments.config) if arguments.config else []
    settings += [word for override in arguments.overrides for word in ("--set", override)]
    if arguments.logs is None:
        where = flags(source=arguments.source, **({"input": arguments.input} if arguments.input else {}), logs=logs)
        job("ingest", "ingest_logs", *where, *settings)
    with contextlib.ExitStack() as stack:
        load = functools.partial(load_ahead, config, run, stack, cluster=cluster, serves=not arguments.no_serve)
        build(*flags(logs=logs, lake=lake, dates=build_dates(config)), *settings, meanwhile=load)
        job("train", "train", *flags(lake=lake, run_dir=run), "--brief", *settings)
        beside = train_twin(work / "run-plain", lake, settings) if arguments.compare else []
    places = flags(run_dir=run, lake=lake)
    if config.data.allow_missing_dates:
        beside = ["--allow-missing-dates", *beside]
    job("evaluate", "evaluate", *places, "--dates", config.data.eval_dates, *beside)
    job("report", "report", *places)
    if not arguments.no_serve:
        serve(run, lake, work / "registry")
    print(f"\ndemo: done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_job(main))
