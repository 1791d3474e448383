"""Do two checkouts of this project give the same tables, scores and metrics? A refactoring shows it by this.

    python tests/same_results.py --before OTHER_CHECKOUT --work DIR [--data REAL_LOGS] [--sources simulated kuairand]

Each checkout ingests and builds each source by its own jobs with the *other* checkout's configuration file, so that a
changed default shows. Both then train (one worker, one epoch, this machine's processor), evaluate and score on the
*other* checkout's lake: the order of training follows the names of a table's files, which no two builds share. Then
every column of the samples, every score and every metric is compared, bit for bit. Prints a line a table; exit code 1
when anything differs. Real logs are read from --data (folders kuairand-pure and kuaisearch-demo).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"simulated": "", "kuairand": "kuairand-pure", "kuaisearch": "kuaisearch-demo"}
TRAIN = ["--set", "ray.num_workers=1", "--set", "train.num_epochs=1", "--set", "ray.dashboard=false"]
KEY = "impression_id"
SPARK_CONF = ("etl/spark_conf", "cluster/spark/conf")
"""Of one machine's jobs, now and before."""


def run(checkout: Path, command: list[str], log: Path) -> None:
    """One job of a checkout, with that checkout's code; its output goes to a file that an error names."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SPARK_CONF_DIR": next(str(d) for d in map(checkout.joinpath, SPARK_CONF) if d.is_dir()),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=out, stderr=out, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}; see {log}")


def make(checkout: Path, source: str, config: Path, work: Path, data: Path | None, shared: Path) -> None:
    """Logs, lake, run, evaluation and scores of one source by one checkout; finished folders are kept."""
    if (work / "done").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    dates = tomllib.loads(config.read_text(encoding="utf-8"))["data"]
    whole = f"{dates['train_dates'].split(':')[0]}:{dates['eval_dates'].split(':')[-1]}"
    logs, lake, run_dir, scores = (str(work / name) for name in ("logs", "lake", "run", "scores"))
    own, settings, held_out = sys.executable, ["--config", str(config)], ["--dates", dates["eval_dates"]]
    where = ["--input", str(data / FOLDERS[source])] if data and FOLDERS[source] else []
    ingest = [own, "jobs/ingest_logs.py", "--source", source, *where, "--logs", logs, *settings]
    build = ["spark-submit", "jobs/build_samples.py", "--logs", logs, "--lake", lake, "--dates", whole, *settings]
    train = [own, "jobs/train.py", "--lake", str(shared), "--run-dir", run_dir, *settings, *TRAIN]
    evaluate = [own, "jobs/evaluate.py", "--run-dir", run_dir, "--lake", str(shared), *held_out]
    score = [own, "jobs/score.py", "--run-dir", run_dir, "--lake", str(shared), *held_out, "--output", scores]
    for command in (ingest, build, train, evaluate, score):
        run(checkout, command, work / "jobs.log")
    (work / "done").touch()


def table(path: Path) -> pa.Table:
    """A Delta table's rows by impression; columns by name."""
    rows = DeltaTable(path).to_pyarrow_table()
    rows = rows.select(sorted(rows.column_names))
    return rows.take(pc.sort_indices(rows, sort_keys=[(KEY, "ascending")])).combine_chunks()


def differing(before: pa.Table, after: pa.Table) -> list[str]:
    """What differs: column names, or the number of rows. Columns that only `after` has are named by `more`."""
    if before.num_rows != after.num_rows:
        return [f"{before.num_rows} and {after.num_rows} rows"]
    missing = [f"{name} (gone)" for name in before.column_names if name not in after.column_names]
    both = [name for name in before.column_names if name in after.column_names]
    return missing + [name for name in both if not before[name].equals(after[name].cast(before[name].type))]


def metrics(path: Path) -> dict[str, Any]:
    return json.loads(next(path.glob("evaluation-*.json")).read_text(encoding="utf-8"))


def compare(before: Path, after: Path, source: str) -> bool:
    """Print a line a table; whether all is equal."""
    same = True
    for name in ("lake/samples", "scores"):
        old, new = table(before / name), table(after / name)
        found = differing(old, new)
        more = [column for column in new.column_names if column not in old.column_names]
        verdict = "equal" if not found else f"DIFFERENT: {', '.join(found)}"
        print(f"{source} {name}: {old.num_rows:,} rows, {verdict}; new columns: {', '.join(more) or 'none'}")
        same &= not found
    old_metrics, new_metrics = metrics(before / "run"), metrics(after / "run")
    shared = {k: new_metrics.get(k) for k in old_metrics}
    print(f"{source} metrics: {'equal' if shared == old_metrics else 'DIFFERENT'}")
    return same and shared == old_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout of this project")
    parser.add_argument("--work", type=Path, required=True, help="folder for logs, lakes and runs; what is done stays")
    parser.add_argument("--data", type=Path, help="folder of the real logs")
    parser.add_argument("--sources", nargs="+", choices=FOLDERS, default=["simulated"])
    arguments = parser.parse_args()
    before, work = arguments.before.resolve(), arguments.work.resolve()
    same = True
    for source in arguments.sources:
        config = before / "jobs" / "configs" / f"{source}.toml"
        for name, checkout in (("before", before), ("after", ROOT)):
            data = arguments.data and arguments.data.resolve()
            make(checkout, source, config, work / name / source, data, work / "before" / source / "lake")
        same &= compare(work / "before" / source, work / "after" / source, source)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
