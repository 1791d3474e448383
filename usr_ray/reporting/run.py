"""One HTML file about a run, for the one who decides and the one who debugs: no address, no script, nothing to install.

`write_report` reads the run directory (report_data), works out what is beyond the metrics (report_stats), draws
(report_plots), words it (report_text) and fills templates/report.html.j2. What a run has not (yet) written is left out.
"""

from __future__ import annotations

import datetime as dt
import json
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import usr_ray
from usr_ray.config import UserError
from usr_ray.data.order_quality import order_text
from usr_ray.evaluation import statistics as report_stats
from usr_ray.evaluation.metrics import ALL
from usr_ray.evaluation.statistics import Judged
from usr_ray.files import write_whole
from usr_ray.reporting import cold as report_cold
from usr_ray.reporting import curves as report_curves
from usr_ray.reporting import funnel as report_funnel
from usr_ray.reporting import page as report_text
from usr_ray.reporting import plots as report_plots
from usr_ray.runs.read import RunRecord, read_etl_reports, read_run
from usr_ray.schema import TASKS

REPORT_FILE = "report.html"
BACKBONE_NAMES = {
    "shared_bottom": "SharedBottom",
    "mmoe": "MMoE",
    "ple": "PLE",
    "star": "STAR",
    "m2m": "M2M",
    "apg": "APG",
}


def write_report(run_dir: Path, lake: Path | str | None = None, output: Path | None = None) -> Path:
    """Write the report of a run and return its path (default `<run_dir>/report.html`).

    Args:
        run_dir: directory of jobs/train.py; evaluated by jobs/evaluate.py, else the report says that it is not.
        lake: where the ETL's reports are; None leaves the label funnel out.
        output: file to write; its folder must exist.

    Raises:
        UserError: a directory is missing, or a file in it cannot be read.
    """
    run = read_run(Path(run_dir))
    path = Path(output) if output else run.run_dir / REPORT_FILE
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: its folder does not exist; create it first")
    write_whole(path, render(run, read_etl_reports(lake)))
    return path


def render(run: RunRecord, etl_reports: list[dict[str, Any]]) -> str:
    """The page as text."""
    gaps = _gaps(run)
    context = {
        "title": model_name(run.config),
        "run_name": "/".join(run.run_dir.resolve().parts[-2:]),
        "facts": _facts(run),
        "footer": f"Written {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC by usr-ray {usr_ray.__version__}; "
        "this file needs no network.",
        "funnel": report_funnel.funnel(etl_reports, run.scenarios),
        "cold": report_cold.cold_part(
            etl_reports, run.scenarios, str(run.config.get("data", {}).get("train_dates") or "")
        ),
        "config_json": json.dumps(run.config, indent=2),
        "packages": sorted((run.record.get("packages") or {}).items()),
        **_metrics_part(run, gaps),
        **report_curves.curves_part(run.history, run.scenarios),
        **_predictions_part(run),
    }
    return load_template("report.html.j2").render(context)


def load_template(name: str) -> jinja2.Template:
    """A page of usr_ray/reporting/templates; what it forgets to be given is an error, and texts are escaped."""
    folder = resources.files("usr_ray.reporting").joinpath("templates")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader).get_template(name)


def model_name(config: Mapping[str, Any]) -> str:
    """'USR on PLE', or the parts that are on: 'PLE with GLMT', 'PLE alone'."""
    model = config.get("model", {})
    backbone = BACKBONE_NAMES.get(model.get("backbone", ""), model.get("backbone", "model"))
    parts = {"IE": "interest", "FG": "generator", "GLMT": "multitask"}
    on = [name for name, key in parts.items() if model.get(key, {}).get("enabled", False)]
    if len(on) == len(parts):
        return f"USR on {backbone}"
    return f"{backbone} with {' and '.join(on)}" if on else f"{backbone} alone"


def _facts(run: RunRecord) -> list[tuple[str, str, bool]]:
    """(name, value, is code) of what is known; the rest is left out, never made up."""
    record, about, data = run.record, run.about, run.config.get("data", {})
    table = record.get("table") or {}
    attempts = record.get("attempts") or []
    rows = {split: part["num_rows"] for split, part in (record.get("manifests") or {}).items()}
    packages = record.get("packages") or {}
    version = about.get("table_version", table.get("version"))
    manifest = str(about.get("manifest_sha256") or "")[:12]
    candidates: list[tuple[str, Any, bool]] = [
        ("Started", _time(record.get("created")), False),
        ("Ended", _time(record.get("ended")) or ("not yet" if "status" in record else None), False),
        ("Took", _took(record), False),
        ("Outcome", " ".join(str(record.get("outcome") or record.get("status") or "").split("_")), False),
        ("Steps", f"{record['step']:,}" if "step" in record else None, False),
        ("Workers", run.config.get("ray", {}).get("num_workers"), False),
        ("Order of the rows", order_text(record["shuffle"]) if record.get("shuffle") else None, False),
        ("Training dates", _with_rows(data.get("train_dates"), rows.get("train")), False),
        ("Held-out dates", _with_rows(about.get("dates") or data.get("eval_dates"), None), False),
        ("Samples table", f"version {version}" if version is not None else None, False),
        ("Held-out manifest", manifest, False),
        ("Checkpoint", about.get("checkpoint") or (f"step {about['step']:,}" if "step" in about else None), False),
        ("Code", f"usr-ray {packages['usr_ray']}" if "usr_ray" in packages else about.get("usr_ray"), False),
        ("Table", about.get("table_uri") or table.get("uri"), True),
        ("Command", shlex.join(attempts[-1].get("command") or []) if attempts else None, True),
    ]
    if len(attempts) > 1:
        candidates.insert(3, ("Attempts", f"{len(attempts)}, resumed {len(attempts) - 1} times", False))
    return [(name, str(value), is_code) for name, value, is_code in candidates if value not in (None, "")]


def _time(text: Any) -> str | None:
    return f"{dt.datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else None


def _took(record: Mapping[str, Any]) -> str | None:
    if not (record.get("created") and record.get("ended")):
        return None
    return report_text.duration(
        (dt.datetime.fromisoformat(record["ended"]) - dt.datetime.fromisoformat(record["created"])).total_seconds()
    )


def _with_rows(dates: Any, num_rows: int | None) -> str:
    text = str(dates or "").replace(":", " to ")
    return f"{text} ({num_rows:,} rows)" if num_rows and text else text


def _gaps(run: RunRecord) -> dict[tuple[str, str], Judged]:
    if run.predictions is None or run.baseline is None:
        return {}
    return report_stats.auc_gaps(run.predictions, run.baseline, run.scenarios)


def _metrics_part(run: RunRecord, gaps: Mapping[tuple[str, str], Judged]) -> dict[str, Any]:
    part: dict[str, Any] = {
        "min_rows": report_stats.MIN_ROWS,
        "rows": [],
        "footnotes": [],
        "gap_rows": [],
        "tiles": [],
        "metrics_note": "",
        "metric_names": [heading for _, heading, _ in report_text.METRIC_COLUMNS],
        "verdict": ["The run has not been evaluated yet."],
        "no_metrics": "No metrics yet: evaluate the run with python jobs/evaluate.py --run-dir "
        f"{run.run_dir} --lake DIR --dates A:B.",
    }
    if run.metrics is None:
        return part
    footnotes = report_text.Footnotes()
    name = model_name(run.config)
    rows = report_text.metric_rows(run.metrics, run.baseline_metrics, footnotes, model_name=name)
    part["rows"], part["footnotes"] = rows, footnotes.reasons
    part["verdict"] = report_text.verdict(run.metrics, gaps, run.scenarios)
    total = run.metrics[ALL]["ctr"]["num_samples"]
    part["metrics_note"] = (
        f"From {run.metrics_file}: {report_text.count(total)} impressions, each counted once, "
        "whatever the number of workers."
    )
    part["gap_rows"] = [
        {
            "cell": report_text.cell_name(cell),
            "task": report_text.TASK_NAMES[task],
            "verdict": judged.verdict,
            "value": report_text.signed(judged.gap.value),
            "interval": report_text.gap_interval(judged.gap),
        }
        for (cell, task), judged in gaps.items()
        if judged.gap is not None
    ]
    for place, scenario in enumerate(run.scenarios):
        for task, metrics in run.metrics.get(scenario, {}).items():
            judged = gaps.get((scenario, task))
            gap = judged and judged.gap
            part["tiles"].append(
                {
                    "name": f"{report_text.cell_name(scenario)} {report_text.TASK_NAMES[task]}, AUC",
                    "colour": report_plots.series_name(place),
                    "value": report_text.metric_value("auc", metrics, 4, footnotes),
                    "verdict": judged.verdict if judged and gap else "",
                    "gap_value": report_text.signed(gap.value) if gap else "",
                    "gap_interval": report_text.gap_interval(gap) if gap else "",
                }
            )
    return part


def _predictions_part(run: RunRecord) -> dict[str, Any]:
    calibrations: list[dict[str, Any]] = []
    slices: list[dict[str, Any]] = []
    rows = run.predictions
    if rows is None:
        return {"calibrations": [], "rocs": [], "slices": []}
    for place, scenario in enumerate(run.scenarios):
        name, colour = scenario.replace("_", " "), report_plots.series_colour(place)
        for task_place, task in enumerate(TASKS):
            cell = report_stats.cell_rows(rows, scenario, task_place, run.scenarios)
            bins = report_stats.calibration_bins(*cell[:2]) if cell else []
            if not bins:
                continue
            title = f"{report_text.TASK_NAMES[task]} in {name}"
            svg = report_plots.calibration_plot(bins, colour=colour, label=f"Calibration of {title}")
            sizes = [b.num_rows for b in bins]
            size = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
            positives = sum(b.num_positives for b in bins)
            caption = f"{len(bins)} bins of {size} rows; {positives:,} positives of {sum(sizes):,}."
            calibrations.append(
                {
                    "title": title,
                    "colour": report_plots.series_name(place),
                    "svg": Markup(svg),
                    "bins": bins,
                    "caption": caption,
                }
            )
        parts = report_stats.ctr_slices(rows, run.baseline, place)
        if parts:
            slices.append({"title": f"CTR in {name}", "colour": report_plots.series_name(place), "slices": parts})
    return {"calibrations": calibrations, "rocs": _rocs(run), "slices": slices}


def _rocs(run: RunRecord) -> list[dict[str, Any]]:
    plots = []
    for task_place, task in enumerate(TASKS):
        curves = []
        for place, scenario in enumerate(run.scenarios):
            for scored, is_baseline in ((run.predictions, False), (run.baseline, True)):
                cell = scored and report_stats.cell_rows(scored, scenario, task_place, run.scenarios)
                points = report_stats.roc_points(*cell[:2]) if cell else None
                if points is not None:
                    name = scenario.replace("_", " ") + (", popularity" if is_baseline else "")
                    curves.append((name, report_plots.series_colour(place), is_baseline, points))
        if curves:
            title = f"ROC of {report_text.TASK_NAMES[task]}"
            plots.append({"title": title, "svg": Markup(report_plots.roc_plot(curves, label=title))})
    return plots
