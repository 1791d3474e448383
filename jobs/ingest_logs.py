"""Turn a data set into logs (docs/own-logs.md), a Parquet folder each.

spark-submit jobs/ingest_logs.py --source kuairand --input DIR --logs DIR   # or plain python: it needs no JVM
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from etl.jvm import print_error
from usr_ray import __version__
from usr_ray.cli import check_input, check_output, job_config, job_parser, run_job
from usr_ray.config import UserError


def main(argv: list[str]) -> None:
    from etl.sources import SIMULATED, SOURCES, LogWriter, find_source

    parser = job_parser(__doc__ or "")
    parser.add_argument("--source", required=True, help=f"the data set: {', '.join(SOURCES)}")
    parser.add_place("--input", check_input, type=Path, help="folder of the data set's files (simulated: none)")
    parser.add_place("--logs", check_output, type=Path, required=True, help="folder for the logs; new or empty")
    parser.add_argument("--overwrite", action="store_true", help="replace logs written by an earlier ingest")
    arguments = parser.parse_args(argv)
    name, write = arguments.source, find_source(arguments.source)
    if arguments.config is None:
        # Each data set has scenarios of its own; its example configuration knows them.
        arguments.config = ROOT / "jobs" / "configs" / f"{name}.toml"
    config = job_config(arguments)
    if name != SIMULATED and arguments.input is None:
        raise UserError(f"--source {name}: --input is missing; name the folder with the data set's files")
    started = time.monotonic()
    with LogWriter(arguments.logs, overwrite=arguments.overwrite) as writer:
        write(arguments.input or Path(), writer, config)
        num_rows = writer.commit({"source": name, "usr_ray": __version__, "config": config.to_dict()})
    width = max(map(len, num_rows))
    print(f"{'log':<{width}}  {'rows':>12}")
    for log, count in num_rows.items():
        print(f"{log:<{width}}  {count:>12,}")
    print(f"written to {arguments.logs} in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_job(main, report=print_error))
