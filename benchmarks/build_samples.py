"""How fast are samples built: by our job, by plain Spark SQL and by DuckDB, from the same logs to equal rows?

    python benchmarks/build_samples.py [--sizes 2e5,1e6,3e6,10e6] [--repeats 3,3,2,1] [--work DIR] [--memory 4g]
    python benchmarks/build_samples.py --sizes 3e6 --append        # one size a call; the results add up
    python benchmarks/build_samples.py --sizes 3e6,10e6 --bot --systems ours --append
    python benchmarks/build_samples.py --counters --sizes 1e6      # with counters.defaults, ours and DuckDB
    python benchmarks/build_samples.py --report      # table, plot and docs/scale.md's numbers from the JSON

Each system runs in a process of its own, in turn, on two cores; its samples are compared with ours row for row before
its time counts. Ours starts from an empty lake and does all of its work (vocabularies, rejects, account, reports,
checks); the others take the vocabularies as a ready table and write the samples only. Results:
results/build_samples.json, and with --counters results/build_samples_counters.json.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from build_samples_data import CONFIG, ROOT, make_logs
from build_samples_measure import measure, spark_metrics
from build_samples_report import SMALL, counters_table, write_report
from build_samples_sql import Query, export_vocabularies, run_duckdb, run_spark_sql

from benchmarks.doc_tables import show
from usr_ray.config import Config, load_config
from usr_ray.config.counters import counter_columns
from usr_ray.files import write_whole

RESULTS = Path(__file__).parent / "results" / "build_samples.json"
COUNTED = RESULTS.with_name("build_samples_counters.json")
COUNTERS = ("counters.defaults=true",)
SYSTEMS = ("ours", "spark_sql", "duckdb")
LEFT_OUT = {"duckdb": {"user_key", "request_key"}}
"""Columns of Spark's xxhash64, which DuckDB has not: it writes hashes of its own there, which are not compared."""
WATERMARK = "2026-01-10T03:00:00Z"
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Run:
    """One system on one size of logs, in a folder of its own."""

    system: str
    size: int
    bot: bool
    folder: Path
    query: Query
    overrides: tuple[str, ...] = ()
    """Of the configuration."""

    def spark(self, cores: int, memory: str) -> list[str]:
        """spark-submit with the options that both Spark systems have."""
        options = {
            "spark.local.dir": str(self.folder / "spark"),
            "spark.eventLog.enabled": "true",
            "spark.eventLog.compress": "false",
            "spark.eventLog.rolling.enabled": "false",
            "spark.eventLog.dir": str(self.folder / "events"),
        }
        if not self.as_usr_ray:  # C1 alone (etl/spark_conf) is for jobs of seconds; these run for minutes
            java = {"spark.driver.extraJavaOptions": "-XX:ReservedCodeCacheSize=256m", "spark.driver.memory": memory}
            options = java | options
        words = [word for key, value in options.items() for word in ("--conf", f"{key}={value}")]
        submit = ["--master", f"local[{cores}]", *words]
        if self.as_usr_ray:
            return [sys.executable, "-m", "jobs", "build-samples", "--spark", shlex.join(submit)]
        return ["spark-submit", *submit]

    @property
    def as_usr_ray(self) -> bool:
        """Ours on few rows: with the settings for jobs of seconds that `usr-ray` chooses."""
        return self.system == "ours" and self.size <= SMALL

    def command(self, cores: int, memory: str) -> list[str]:
        """What is started and measured."""
        query = self.query
        if self.system == "ours":
            return [
                *self.spark(cores, memory),
                *([] if self.as_usr_ray else ["jobs/build_samples.py"]),
                "--config",
                str(CONFIG),
                "--logs",
                str(query.logs),
                "--lake",
                str(self.folder / "lake"),
                "--dates",
                f"{query.first}:{query.last}",
                "--watermark",
                query.watermark,
                *(word for override in self.overrides for word in ("--set", override)),
            ]
        one = [
            str(Path(__file__).resolve()),
            "--one",
            self.system,
            "--logs",
            str(query.logs),
            "--output",
            str(query.output),
            "--vocabularies",
            str(query.vocabularies),
            "--cores",
            str(cores),
            "--memory",
            memory,
            *(["--counters"] if self.overrides else []),
        ]
        return [*self.spark(cores, memory), *one] if self.system == "spark_sql" else [sys.executable, *one]

    @property
    def samples(self) -> Path:
        """Where its samples are."""
        return self.folder / "lake" / "samples" if self.system == "ours" else self.query.output


def perform(run: Run, *, cores: int, memory: str) -> dict[str, Any]:
    """Run a system from nothing; its row of the results."""
    from build_samples_check import files_of

    shutil.rmtree(run.folder, ignore_errors=True)
    (run.folder / "events").mkdir(parents=True)
    env = os.environ | {
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "SPARK_CONF_DIR": str(ROOT / "cluster" / "spark" / "conf"),
    }
    if run.as_usr_ray:
        del env["SPARK_CONF_DIR"]
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    usage = measure(run.command(cores, memory), cwd=ROOT, env=env, timeout_s=TIMEOUT_S)
    sizes = [Path(path).stat().st_size for path in files_of(run.samples)]
    row = {key: value for key, value in asdict(usage).items() if key != "lines"}
    row = {"system": run.system, "impressions": run.size, "bot": run.bot} | {
        key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()
    }
    row |= {"output_bytes": sum(sizes), "output_files": len(sizes)}
    if run.system != "duckdb":
        row["spark"] = spark_metrics(run.folder / "events")
    row["progress"] = [line for line in usage.lines if line.startswith("[")]
    return row


def measure_size(
    size: int,
    *,
    bot: bool,
    systems: list[str],
    repeats: int,
    arguments: argparse.Namespace,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """All systems on logs of one size, in turn, each repeated; every system's rows are compared with ours once."""
    from build_samples_check import check_equal

    config = load_config(CONFIG, ())
    work = arguments.work
    logs = make_logs(work, size, bot=bot, config=config)
    vocabularies = work / "vocabularies" / logs.name
    say(f"{logs.name}: logs are ready")
    for repeat in range(repeats):
        done: dict[str, Path] = {}
        for system in systems:
            folder = work / "runs" / f"{logs.name}-{system}"
            query = Query(logs, vocabularies, folder / "samples", *_dates(config), WATERMARK)
            run = Run(system, size, bot, folder, query)
            row = perform(run, cores=arguments.cores, memory=arguments.memory)
            say(
                f"{logs.name}, run {repeat + 1} of {repeats}, {system}: {row['wall_s']:.1f} s, processor "
                f"{row['cpu_s']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} GB"
            )
            done[system] = run.samples
            if system == "ours":
                export_vocabularies(folder / "lake", vocabularies)
            if repeat == 0 and system != systems[0]:
                compared = check_equal({systems[0]: done[systems[0]], system: run.samples}, LEFT_OUT)
                row["equal_to_ours"] = compared[system]
                say(f"{logs.name}: {system} and {systems[0]} agree on {compared[system]['rows']:,} rows")
            save(row)
            if system != systems[0]:
                shutil.rmtree(folder)
        shutil.rmtree(work / "runs")


def measure_counters(arguments: argparse.Namespace) -> None:
    """Ours and DuckDB without and with counters, and ours where one item has half of all impressions."""
    from build_samples_check import check_equal

    result = environment(arguments) | {"runs": []}
    if arguments.append and arguments.output.exists():
        result["runs"] = json.loads(arguments.output.read_text(encoding="utf-8"))["runs"]
    counters = load_config(CONFIG, COUNTERS).every_counter.items()
    num_columns = sum(len(counter_columns(name, counter)) for name, counter in counters)
    systems = [system for system in ("ours", "duckdb") if system in arguments.systems.split(",")]
    cases = [(system, words, False) for words in ((), COUNTERS) for system in systems]
    if not arguments.not_hot:
        cases.append(("ours", COUNTERS, True))
    for size in (int(float(word)) for word in arguments.sizes.split(",")):
        places: dict[tuple[str, bool], Path] = {}
        for system, words, hot in cases:
            logs = make_logs(arguments.work, size, bot=False, hot=hot, config=load_config(CONFIG, ()))
            vocabularies = arguments.work / "vocabularies" / logs.name
            folder = arguments.work / "runs" / f"{logs.name}-{system}-{len(words)}"
            query = Query(logs, vocabularies, folder / "samples", *_dates(load_config(CONFIG, ())), WATERMARK)
            run = Run(system, size, False, folder, query, words)
            row = perform(run, cores=arguments.cores, memory=arguments.memory)
            row |= {"counters": num_columns if words else 0, "hot": hot}
            if system == "ours":
                export_vocabularies(folder / "lake", vocabularies)
                places[system, bool(words)] = run.samples
            elif words and ("ours", True) in places:
                both = {"ours": places["ours", True], system: run.samples}
                row["equal_to_ours"] = check_equal(both, LEFT_OUT)[system]
                assert row["equal_to_ours"]["counters"]
            print(f"{logs.name}, {system}, {words}: {row['wall_s']:.0f} s, processor {row['cpu_s']:.0f} s", flush=True)
            result["runs"].append(row)
            write_whole(arguments.output, json.dumps(result, indent=1) + "\n")
        shutil.rmtree(arguments.work / "runs")


def _dates(config: Config) -> tuple[str, str]:
    first = dt.date.fromisoformat(config.simulated.first_date)
    return first.isoformat(), (first + dt.timedelta(days=config.simulated.num_days - 1)).isoformat()


def run_one(arguments: argparse.Namespace) -> None:
    """The process that is measured: one rival, on the logs it is given."""
    config = load_config(CONFIG, COUNTERS if arguments.counters else ())
    query = Query(arguments.logs, arguments.vocabularies, arguments.output, *_dates(config), WATERMARK)
    if arguments.one == "duckdb":
        run_duckdb(query, config, threads=arguments.cores, memory=arguments.memory.upper() + "B")
        return
    from etl.session import build_spark

    spark = build_spark("benchmark: plain Spark SQL")
    try:
        run_spark_sql(spark, query, config)
    finally:
        spark.stop()


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "settings": {"cores": arguments.cores, "spark_driver_memory": arguments.memory, "config": CONFIG.name},
        "versions": {name: metadata.version(name) for name in ("pyspark", "delta-spark", "duckdb", "pyarrow", "numpy")},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2e5,1e6,3e6,10e6", help="impressions, separated by commas")
    parser.add_argument("--repeats", default="3,3,2,1", help="runs of each system at each size")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which ones; the first is what others must equal")
    parser.add_argument("--bot", action="store_true", help="with one user of a million events")
    parser.add_argument("--work", type=Path, help="folder for logs and lakes; kept (default: a temporary one)")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--memory", default="4g", help="Spark's driver memory and DuckDB's memory limit")
    parser.add_argument("--append", action="store_true", help="keep the runs of other sizes that were recorded before")
    parser.add_argument("--counters", action="store_true", help="what counters cost")
    parser.add_argument("--not-hot", action="store_true", help="with --counters: not where one item has half of them")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=SYSTEMS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--logs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vocabularies", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.one:
        run_one(arguments)
        return
    arguments.output = arguments.output or (COUNTED if arguments.counters else RESULTS)
    if not arguments.report:
        with tempfile.TemporaryDirectory(prefix="usr-ray-bench-") as folder:
            arguments.work = (arguments.work or Path(folder)).resolve()
            (measure_counters if arguments.counters else measure_all)(arguments)
    if arguments.counters:
        show(
            counters_table(json.loads(arguments.output.read_text())),
            arguments.output,
            document="scale.md",
            place=COUNTED,
        )
        return
    write_report(json.loads(arguments.output.read_text(encoding="utf-8")), ROOT / "docs")


def measure_all(arguments: argparse.Namespace) -> None:
    """Measure every size; the results file is whole after each run."""
    sizes = [int(float(word)) for word in arguments.sizes.split(",")]
    repeats = [int(word) for word in arguments.repeats.split(",")]
    repeats += repeats[-1:] * (len(sizes) - len(repeats))
    systems = arguments.systems.split(",")
    started = time.monotonic()
    result = environment(arguments) | {"runs": []}
    if arguments.append and arguments.output.exists():
        before = json.loads(arguments.output.read_text(encoding="utf-8"))
        redone = {(system, size, arguments.bot) for system in systems for size in sizes}
        result["runs"] = [
            row for row in before["runs"] if (row["system"], row["impressions"], row["bot"]) not in redone
        ]

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:7.1f} s] {text}", flush=True)

    def save(row: dict[str, Any]) -> None:
        result["runs"].append(row)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, json.dumps(result, indent=1) + "\n")

    for size, times in zip(sizes, repeats, strict=False):
        measure_size(size, bot=arguments.bot, systems=systems, repeats=times, arguments=arguments, say=say, save=save)


if __name__ == "__main__":
    # A killed benchmark must not leave its systems behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main(sys.argv[1:])
