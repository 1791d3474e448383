"""Evaluate a trained run on some dates, beside the popularity baseline, and write the metrics.

python jobs/evaluate.py --run-dir DIR --lake DIR --dates A:B [--importance] [--compare RUN_DIR] [--output FILE]

Writes <run-dir>/evaluation-A_B.json and predictions-A_B.parquet, which jobs/report.py reads; other evaluations' files
stay. Dates that the run was trained on, or earlier ones, are evaluated too, under the split 'train' instead of 'eval'.
One process, no Ray; any number of workers would give the same numbers. --importance adds the click AUC that is lost
without each signal, by permutation: 10,000 rows are scored once more for each. --compare puts another run (the same
backbone without USR, say) and a logistic regression on crossed columns beside it, fitted on the run's training rows.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from usr_ray.cli import JobParser, add_allow_missing_dates, check_lake, check_output_file, check_run_dir, run_job
from usr_ray.config import UserError, date_ranges, parse_dates

if TYPE_CHECKING:  # torch takes seconds to load: a wrong command line is reported without it
    from usr_ray.data.manifest import Manifest
    from usr_ray.evaluation.metrics import Predictions
    from usr_ray.training.evaluate import TrainedRun


MAX_EARLIER_ROWS = 20_000_000
"""Rows of the runs that a run began with that popularity is fitted on besides its own, the newest dates first."""


say = functools.partial(print, flush=True)


def baseline_of(
    run: TrainedRun, lake: str, held_out: Manifest, predictions: Predictions, seen: Collection[str]
) -> Predictions | None:
    """The popularity baseline on the same rows; None, and a line that says why, where it cannot be had.

    It is fitted on the dates that the model was trained on (`seen`), as they are now. Items that the vocabulary has got
    since are unknown there, as they are in `predictions`.
    """
    import numpy as np

    from usr_ray.data.manifest import build_manifest
    from usr_ray.evaluation.baseline import popularity_baseline
    from usr_ray.schema import UNKNOWN_ID
    from usr_ray.training.rows import baseline_rows

    config, num_items = run.config, run.spec.sparse_feature("item_id").num_embeddings
    if not config.data.train_dates:
        print("no popularity baseline: the run's configuration names no data.train_dates")
        return None
    own = parse_dates(config.data.train_dates, where="data.train_dates")
    every = [dt.date.fromisoformat(date) for date in seen] or list(own)
    try:
        manifest = build_manifest(
            lake, dates=(min(every), max(every)), version=held_out.version, where="popularity", allow_missing=True
        )
        rows = baseline_rows(config, of_dates(manifest, seen, first_own=own[0].isoformat()) if seen else manifest)
    except UserError as error:
        print(f"no popularity baseline: {error}")
        return None
    rows = replace(rows, item_id_N=np.where(rows.item_id_N < num_items, rows.item_id_N, UNKNOWN_ID))
    return popularity_baseline(rows, predictions, len(held_out.spec.scenarios))


def of_dates(manifest: Manifest, seen: Collection[str], *, first_own: str) -> Manifest:
    """The files of the dates in `seen`; of those before `first_own`, no more than MAX_EARLIER_ROWS allows."""
    taken, num_earlier = [], 0
    for file in sorted(manifest.files, key=lambda file: file.date, reverse=True):
        if file.date < first_own and file.date in seen:
            num_earlier += sum(group.num_rows for group in file.row_groups)
        if file.date in seen and num_earlier <= MAX_EARLIER_ROWS:
            taken.append(file)
    return replace(manifest, files=tuple(reversed(taken)))


def run_to_compare(run_dir: Path, held_out: Manifest) -> TrainedRun:
    """The run of --compare, before anything is evaluated. UserError: there is none, or it is of another lake."""
    from usr_ray.training.evaluate import check_table, load_run

    other = load_run(run_dir, flag="--compare")
    check_table(other, held_out, where=f"--compare {run_dir}")
    return other


def comparison_of(
    run: TrainedRun,
    other: TrainedRun,
    other_dir: Path,
    held_out: Manifest,
    predictions: Predictions,
    baseline: Predictions | None,
    seen: Collection[str],
) -> dict[str, Any]:
    """Popularity, a logistic regression, another run and this one on the rows that all of them have.

    Raises:
        UserError: the two runs evaluate no row in common.
    """
    from usr_ray.evaluation.statistics import compare, on_common_rows
    from usr_ray.reporting.run import model_name
    from usr_ray.runs.evaluations import chosen_on, dates_of, trained_dates, trained_on
    from usr_ray.runs.plan import load_manifest
    from usr_ray.training.evaluate import evaluate, evaluation_reader
    from usr_ray.training.logistic import PlainRows, logistic_regression
    from usr_ray.training.monitor import row_progress
    from usr_ray.training.rows import training_reader
    from usr_ray.training.worker import LocalWorker

    worker = LocalWorker("cpu")
    ours, theirs = (model_name(one.config.to_dict()) for one in (run, other))
    done = row_progress(f"rows of {other_dir} evaluated", held_out.num_rows, say)
    scored = evaluate(other.module, other.tables, held_out, worker, other.config, scored=done).predictions
    assert scored is not None  # there is one rank
    fit_on = load_manifest(run.checkpoint.path.parent.parent, "train")
    fit, rows = (
        PlainRows.read(reader)
        for reader in (training_reader(run.config, fit_on), evaluation_reader(held_out, worker, run.config))
    )
    by_hand = replace(predictions, probs_NT=logistic_regression(held_out.spec, fit, rows), global_probs_NT=None)
    found = {"popularity": baseline} if baseline else {}
    found |= {"logistic regression": by_hand, theirs if theirs != ours else str(other_dir): scored, ours: predictions}
    found = on_common_rows(found)
    if not len(found[ours]):
        raise UserError(
            f"--compare {other_dir}: this run and that one evaluate no row in common (data.only_scenario); name a run "
            "that knows the same scenario"
        )
    notes = []
    if len(found[ours]) < len(predictions):
        notes.append(f"on the {len(found[ours]):,} of {len(predictions):,} rows that both runs evaluate")
    if set(fit_on.dates) < set(seen):
        notes.append(
            f"the logistic regression was fitted on {date_ranges(fit_on.dates)} alone, the run and popularity have "
            f"seen {date_ranges(seen)}"
        )
    dates = dates_of(held_out, found[ours].row_number_N)
    if why := trained_on(dates, trained_dates(other_dir)):
        notes.append(f"{other_dir} was trained on {why}: for it these dates are not held out")
    if chose := chosen_on(other.config, dates):
        notes.append(
            f"{date_ranges(chose)} also chose the epoch of {other_dir} (train.early_stopping), which flatters it"
        )
    return compare(found, ours, held_out.spec.scenarios) | {"notes": notes}


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = JobParser(__doc__)
    parser.add_place("--run-dir", check_run_dir, type=Path, required=True, help="the --run-dir of jobs/train.py")
    parser.add_place("--lake", check_lake, required=True, help="the lake of jobs/build_samples.py")
    parser.add_argument("--dates", required=True, metavar="A:B", help="first and last date, both included")
    add_allow_missing_dates(parser)
    parser.add_argument("--importance", action="store_true", help="click AUC lost without each signal, by permutation")
    parser.add_place("--compare", check_run_dir, type=Path, metavar="RUN_DIR", help="another run of the same lake")
    parser.add_place("--output", None, type=Path, metavar="FILE", help="also write the metrics as JSON here")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = _parsed(argv)
    first, last = parse_dates(arguments.dates, where="--dates")
    name = f"{first}_{last}"
    own = arguments.run_dir / f"evaluation-{name}.json"
    for flag, path in (("--output", arguments.output or own), ("--run-dir", own)):
        check_output_file(path, flag=flag, own=own)
    from usr_ray.data.lineage import warn
    from usr_ray.data.manifest import build_manifest
    from usr_ray.evaluation.files import metrics_text
    from usr_ray.evaluation.statistics import comparison_text, far_off
    from usr_ray.runs.evaluations import (
        about_rows,
        caveats,
        check_earlier,
        dates_heading,
        dates_of,
        trained_dates,
        write_evaluation,
    )
    from usr_ray.training.evaluate import check_table, evaluate, load_run
    from usr_ray.training.importance import importance, importance_text
    from usr_ray.training.monitor import row_progress
    from usr_ray.training.worker import LocalWorker

    check_earlier(arguments.run_dir, name)  # what could not be replaced is said before the work
    worker = LocalWorker()
    run = load_run(arguments.run_dir, worker.device)
    manifest = build_manifest(arguments.lake, dates=(first, last), allow_missing=arguments.allow_missing_dates)
    check_table(run, manifest)
    other = arguments.compare and run_to_compare(arguments.compare, manifest)
    scored = row_progress("rows evaluated", manifest.num_rows, say)
    result = evaluate(run.module, run.tables, manifest, worker, run.config, scored=scored)
    if result.predictions is not None and result.metrics is not None:  # rank 0
        if not len(result.predictions):  # a model of one scenario, and days that have none of its rows
            raise UserError(
                f"--dates {arguments.dates}: none of the {manifest.num_rows:,} rows is of "
                f"{run.config.data.only_scenario} (data.only_scenario) with final labels; name other dates"
            )
        rows, rows_N = result.predictions, result.predictions.row_number_N
        dates = dates_of(manifest, rows_N)
        warn(caveats(run.config, manifest, dates, len(rows)))
        about = about_rows(manifest, dates, step=run.checkpoint.step, checkpoint=run.checkpoint.path.name)
        if arguments.importance:
            about["importance"] = importance(run.module, run.tables, manifest, worker, run.config, rows_N, report=say)
        seen = trained_dates(arguments.run_dir)
        baseline = baseline_of(run, arguments.lake, manifest, rows, seen)
        if arguments.compare:
            about["comparison"] = comparison_of(run, other, arguments.compare, manifest, rows, baseline, seen)
        splits = write_evaluation(
            arguments.run_dir,
            name,
            rows,
            manifest.spec.scenarios,
            metrics=result.metrics,
            baseline=baseline,
            about=about,
            seen=seen,
            output=arguments.output,
        )
        print(f"{dates_heading(dates, seen)}:\n{metrics_text(splits)}")
        warn(far_off(result.metrics))
        if compared := about.get("comparison"):
            warn(f"--compare: {note}" for note in compared["notes"])
            print(comparison_text(compared))
        if arguments.importance:
            print(importance_text(about["importance"]))
        words = f"{run.checkpoint.path.name} on {' and '.join(date_ranges(dates).replace(':', ' to ').split(', '))}"
        print(f"{words}: {len(rows):,} rows; written to {arguments.output or own}")
    worker.close()


if __name__ == "__main__":
    sys.exit(run_job(main))
