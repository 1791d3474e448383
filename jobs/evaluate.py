"""Evaluate a trained run on held-out dates, beside the popularity baseline, and write the metrics.

python jobs/evaluate.py --run-dir DIR --lake DIR --dates A:B [--output FILE]

Writes <run-dir>/evaluation-A_B.json (or --output) and <run-dir>/predictions.parquet, which jobs/report.py reads. One
process, no Ray; any number of workers would give the same numbers.
"""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray import __version__
from usr_ray.cli import JobParser, check_lake, check_output_file, check_run_dir, run_job
from usr_ray.config import Config, UserError, end_of_us, parse_dates
from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.evaluation.baseline import popularity_baseline
from usr_ray.evaluation.files import (
    BASELINE_SPLIT,
    PREDICTIONS_FILE,
    SPLIT,
    metrics_text,
    write_metrics,
    write_predictions,
)
from usr_ray.evaluation.metrics import Predictions, metrics_by_scenario
from usr_ray.training.evaluate import TrainedRun, check_table, evaluate, load_run
from usr_ray.training.rows import read_training_rows
from usr_ray.training.worker import LocalWorker


def baseline_of(config: Config, lake: str, held_out: Manifest, predictions: Predictions) -> Predictions | None:
    """The popularity baseline on the same rows; None, and a line that says why, where it cannot be had."""
    if not config.data.train_dates:
        print("no popularity baseline: the run's configuration names no data.train_dates")
        return None
    dates = parse_dates(config.data.train_dates, where="data.train_dates")
    try:
        manifest = build_manifest(lake, dates=dates, version=held_out.version)
        rows = read_training_rows(manifest, ready_before_us=end_of_us(dates[1]), mature_only=config.data.mature_only)
    except UserError as error:
        print(f"no popularity baseline: {error}")
        return None
    return popularity_baseline(rows, predictions, len(held_out.spec.scenarios))


def about(run: TrainedRun, held_out: Manifest, dates: str) -> dict[str, object]:
    """Where predictions come from; the report shows it."""
    return {
        "dates": dates,
        "step": run.checkpoint.step,
        "checkpoint": run.checkpoint.path.name,
        "table_uri": held_out.table_uri,
        "table_version": held_out.version,
        "manifest_sha256": held_out.sha256,
        "evaluated_at": f"{dt.datetime.now(dt.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "usr_ray": __version__,
    }


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the --run-dir of jobs/train.py")
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_argument("--dates", required=True, metavar="A:B", help="first and last date, both included")
    parser.add_place("--output", None, type=Path, metavar="FILE", help="metrics as JSON; default in the run directory")
    arguments = parser.parse_args(argv)
    first, last = parse_dates(arguments.dates, where="--dates")
    output: Path = arguments.output or arguments.run_dir / f"evaluation-{first}_{last}.json"
    check_output_file(output, flag="--output")
    check_output_file(arguments.run_dir / PREDICTIONS_FILE, flag="--run-dir")
    worker = LocalWorker()
    run = load_run(arguments.run_dir, worker.device)
    held_out = build_manifest(arguments.lake, dates=(first, last))
    check_table(run, held_out)
    result = evaluate(run.module, run.tables, held_out, worker, run.config)
    if result.predictions is not None and result.metrics is not None:  # rank 0
        baseline = baseline_of(run.config, arguments.lake, held_out, result.predictions)
        scenarios = held_out.spec.scenarios
        splits = {SPLIT: result.metrics}
        if baseline is not None:
            splits[BASELINE_SPLIT] = metrics_by_scenario(baseline, scenarios)
        write_predictions(
            arguments.run_dir / PREDICTIONS_FILE,
            result.predictions,
            scenarios,
            baseline=baseline,
            about=about(run, held_out, f"{first}:{last}"),
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        write_metrics(output, splits)
        print(metrics_text(splits))
        print(f"{run.checkpoint.path.name} on {first} to {last}: {len(result.predictions):,} rows; written to {output}")
    worker.close()


if __name__ == "__main__":
    sys.exit(run_job(main))
