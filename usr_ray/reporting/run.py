"""One HTML file about a run, for those who decide and those who debug: no address, no script, nothing to install.

What a run has not (yet) written is left out.
"""

from __future__ import annotations

import datetime as dt
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from usr_ray.config import date_ranges, dates_in
from usr_ray.data.order import order_text
from usr_ray.evaluation.metrics import ALL, GLOBAL, NDCG_K, CellMetrics, TaskMetrics
from usr_ray.evaluation.statistics import (
    MIN_ROWS,
    MIN_USERS,
    Judged,
    auc_gaps,
    calibration_bins,
    cell_rows,
    ctr_slices,
    pcoc_interval,
    roc_points,
)
from usr_ray.reporting.lake import cold_part, funnel
from usr_ray.reporting.page import (
    DASH,
    REPORT_FILE,
    TASK_NAMES,
    VERDICTS,
    Fact,
    Row,
    Section,
    Table,
    cell_name,
    cell_task,
    count,
    duration,
    listed,
    moment,
    signed,
    span,
    words,
    write_page,
)
from usr_ray.reporting.plots import Bar, Line, Plot, calibration_plot, forest_plot, roc_plot, series_name, step_plot
from usr_ray.runs.evaluations import rows_left_out
from usr_ray.runs.read import RunRecord, check_lake, next_step, read_etl_reports, read_run
from usr_ray.schema import TASKS

BACKBONE_NAMES = {
    "shared_bottom": "SharedBottom",
    "mmoe": "MMoE",
    "ple": "PLE",
    "star": "STAR",
    "m2m": "M2M",
    "apg": "APG",
    "pepnet": "PEPNet",
}
METRIC_COLUMNS = (
    ("auc", "AUC", 4),
    ("gauc", "GAUC", 4),
    ("log_loss", "Log loss", 4),
    ("normalised_entropy", "NE", 4),
    ("pcoc", "PCOC", 3),
    (f"ndcg_at_{NDCG_K}", f"NDCG@{NDCG_K}", 4),
)
"""Key in metrics.json, heading, decimals."""
MAX_SIGNALS = 15
"""Bars of a plot of importance; the table has them all."""


def write_report(run_dir: Path, lake: Path | str | None = None, output: Path | None = None) -> Path:
    """Write the report of a run and return its path (default `<run_dir>/report.html`).

    Args:
        run_dir: where jobs/evaluate.py has not evaluated the run, the report says so.
        lake: where the ETL's reports are; None leaves the label funnel out.
        output: its folder is made with it.

    Raises:
        UserError: a directory is missing, or a file in it cannot be read.
    """
    run = read_run(Path(run_dir))
    path = Path(output) if output else run.run_dir / REPORT_FILE
    reports, scenarios = read_etl_reports(lake), run.scenarios
    if lake is not None:
        check_lake(run.run_dir, lake)
    is_compared = run.predictions is not None and run.baseline is not None
    gaps = auc_gaps(run.predictions, run.baseline, scenarios) if is_compared else {}  # type: ignore[arg-type]
    name = model_name(run.config)
    scorers = [(name, run.metrics), ("popularity", run.evaluation and run.evaluation.baseline_metrics)]
    run_name = "/".join(run.run_dir.resolve().parts[-2:])
    return write_page(
        path,
        "run.html.j2",
        eyebrow=f"Run report · {run_name}",
        title=name,
        question="",
        lead=verdict(run.metrics, gaps, scenarios, _pcoc_intervals(run), rows_name(run))
        if run.metrics
        else ["The run has not been evaluated yet."],
        warnings=_warnings(run),
        rows_name=rows_name(run),
        others=_evaluations_section(run),
        facts=_facts(run),
        run=run,
        next_step=next_step(run),
        scorers=[(scorer, metrics) for scorer, metrics in scorers if metrics],
        colours={scenario: series_name(place) for place, scenario in enumerate(scenarios)},
        metric_columns=METRIC_COLUMNS,
        gaps=gaps,
        min_rows=MIN_ROWS,
        min_users=MIN_USERS,
        footnotes=Footnotes(),
        curves=curves_section(run.history, scenarios),
        calibration=_calibration_section(run),
        ranking=_ranking_section(run),
        comparison=comparison_section(run.about.get("comparison")),
        importance=importance_section(run.about.get("importance"), scenarios),
        slices={} if run.predictions is None else _slices(run),
        funnel=funnel(reports, scenarios),
        cold=cold_part(reports, scenarios, str(run.config.get("data", {}).get("train_dates") or "")),
        config_json=json.dumps(run.config, indent=2, ensure_ascii=False),
        packages=sorted((run.record.get("packages") or {}).items()),
    )


def comparison_section(found: Mapping[str, Any] | None) -> Section:
    """The run beside other scorers of the same rows; empty where evaluate.py was not asked for it."""
    rows = []
    for entry in found["cells"] if found else ():
        for name, area in entry["auc"].items():
            lead = entry["leads"].get(name)
            texts = ["", "", ""]
            if lead:
                texts = [signed(lead["value"]), f"{signed(lead['low'])} to {signed(lead['high'])}"]
                texts.append(VERDICTS[lead["verdict"]])
            auc = DASH if area is None else f"{area:.4f}"
            cell = cell_name(entry["cell"])
            rows.append(Row([cell, TASK_NAMES[entry["task"]], name, auc, *texts], [lead["verdict"] if lead else ""]))
    head = ["Scenario", "Task", "Scorer", "AUC", "Lead of the run", "95% interval", "The run is"]
    note = (
        "All on the same rows; the logistic regression has crossed categories and no histories. Intervals are paired, "
        "over users: they do not know the noise of another training seed. Verdicts hold after Holm's correction over "
        "this table."
    )
    note += "".join(f" Mind: {text}." for text in (found or {}).get("notes", ()))
    return Section("Beside simpler models", note, table=Table(head, rows, 3))


def model_name(config: Mapping[str, Any]) -> str:
    """'USR on PLE', or the parts that are on: 'PLE with GLMT', 'PLE alone'."""
    model = config.get("model", {})
    backbone = BACKBONE_NAMES.get(model.get("backbone", ""), model.get("backbone", "model"))
    parts = {"IE": "interest", "FG": "generator", "GLMT": "multitask"}
    on = [name for name, key in parts.items() if model.get(key, {}).get("enabled", False)]
    if len(on) == len(parts):
        return f"USR on {backbone}"
    return f"{backbone} with {' and '.join(on)}" if on else f"{backbone} alone"


def _facts(run: RunRecord) -> list[Fact]:
    """What is known; the rest is left out, never made up."""
    record, about, data = run.record, run.about, run.config.get("data", {})
    table, attempts, packages = record.get("table") or {}, record.get("attempts") or [], record.get("packages") or {}
    num_rows = (record.get("manifests") or {}).get("train", {}).get("num_rows")
    trained = span((record.get("manifests") or {}).get("train", {}).get("dates") or data.get("train_dates"))
    evaluated = date_ranges(run.evaluation.dates) if run.evaluation else data.get("eval_dates")
    version = about.get("table_version", table.get("version"))
    times = [dt.datetime.fromisoformat(record[key]) for key in ("created", "ended") if record.get(key)]
    resumed = f"{len(attempts)}, resumed {len(attempts) - 1} times" if len(attempts) > 1 else ""
    changed = [entry for attempt in attempts for entry in attempt.get("changed", {}).items()]
    changes = [f"{key} from {' to '.join(map(str, two))}" for key, two in changed if not key.startswith("ray.")]
    candidates: list[tuple[str, Any, bool]] = [
        ("Started", moment(record.get("created")), False),
        ("Ended", moment(record.get("ended")) or ("not yet" if "status" in record else ""), False),
        ("Took", duration((times[1] - times[0]).total_seconds()) if len(times) == 2 else "", False),
        ("Attempts", resumed, False),
        ("Settings changed", "; ".join(changes), False),
        ("Outcome", str(record.get("outcome") or record.get("status") or "").replace("_", " "), False),
        ("Steps", f"{record['step']:,}" if "step" in record else "", False),
        ("Workers", run.config.get("ray", {}).get("num_workers"), False),
        ("Order of the rows", order_text(record["shuffle"]) if record.get("shuffle") else "", False),
        ("Training dates", f"{trained} ({num_rows:,} rows in the table)" if num_rows and trained else trained, False),
        ("Held-out dates" if run.is_held_out else "Evaluated on (not held out)", span(evaluated), False),
        ("Samples table", f"version {version}" if version is not None else "", False),
        ("Manifest evaluated", str(about.get("manifest_sha256") or "")[:12], False),
        ("Checkpoint", about.get("checkpoint") or (f"step {about['step']:,}" if "step" in about else ""), False),
        ("Code", f"usr-ray {packages['usr_ray']}" if "usr_ray" in packages else about.get("usr_ray"), False),
        ("Table", about.get("table_uri") or table.get("uri"), True),
        ("Command", shlex.join(attempts[-1].get("command") or []) if attempts else "", True),
    ]
    return [(name, str(value), is_code) for name, value, is_code in candidates if value not in (None, "")]


@dataclass(slots=True)
class Footnotes:
    """Reasons for dashes, each once, lettered in the order of first use."""

    reasons: list[str] = field(default_factory=list)

    def why(self, key: str, metrics: TaskMetrics) -> tuple[str, str]:
        """(letter, reason) of a metric that is None."""
        reason = why_undefined(key, metrics)
        if reason not in self.reasons:
            self.reasons.append(reason)
        return chr(ord("a") + self.reasons.index(reason)), reason


def why_undefined(key: str, metrics: TaskMetrics) -> str:
    """The reason that `metrics[key]` is None."""
    num_samples, num_positives = metrics["num_samples"], metrics["num_positives"]
    if num_samples == 0:
        return "no orders in this source: not known, which is not 0" if metrics.get("num_unknown") else "no rows"
    if metrics["log_loss"] is None:
        return "the model has no global heads"
    if num_positives == 0:
        return "no positive row"
    if num_positives == num_samples:
        return "no negative row"
    if key not in metrics:
        return "not computed in this evaluation"
    return f"no {'user' if key == 'gauc' else 'request'} with both labels"


def rows_name(run: RunRecord) -> str:
    """What the evaluated rows are."""
    return "held-out rows" if run.is_held_out else "rows of dates that are not held out"


def _warnings(run: RunRecord) -> list[str]:
    """What a reader must know of the dates before any number."""
    found, data = run.evaluation, run.config.get("data", {})
    warnings = []
    if found is not None and not found.is_held_out:
        warnings.append(
            f"These are not held-out numbers: {span(date_ranges(found.dates))} was evaluated, and the run was trained "
            f"on {span(found.trained_on)}. Evaluate it on later dates."
        )
    whole, evaluated = run.about.get("table_rows", 0), found.metrics[ALL]["ctr"]["num_samples"] if found else None
    if evaluated is not None and evaluated < whole:
        warnings.append(f"{rows_left_out(int(evaluated), whole, data.get('only_scenario') or '')}.")
    chose = dates_in(data.get("eval_dates") or "") & found.dates if found is not None else frozenset()
    if chose and run.config.get("train", {}).get("early_stopping"):
        warnings.append(f"{span(date_ranges(chose))} also chose the epoch (train.early_stopping), which flatters.")
    for split, name in (("train", "Training"), ("eval", "Held-out")):
        asked = data.get(f"{split}_dates") or ""
        there = (run.record.get("manifests") or {}).get(split, {}).get("dates")
        if there and (gone := dates_in(asked) - dates_in(there)):
            warnings.append(f"{name} dates: of {span(asked)} the table had no rows of {span(date_ranges(gone))}.")
    return warnings


def _evaluations_section(run: RunRecord) -> Section:
    """A line for each evaluation of the run."""
    rows = []
    for one in run.evaluations:
        pooled = one.metrics[ALL]["ctr"]
        auc = DASH if pooled["auc"] is None else f"{pooled['auc']:.4f}"
        kind = "held out" if one.is_held_out else f"not held out: trained on {span(one.trained_on)}"
        shown = "above" if one is run.evaluation else ""
        rows.append(Row([one.file, span(date_ranges(one.dates)), kind, shown, auc, count(pooled["num_samples"])]))
    head = ["File", "Dates", "Kind", "Shown", "AUC of clicks", "Rows"]
    return Section("All evaluations of this run", "The newest first.", table=Table(head, rows, 4))


def verdict(
    model: CellMetrics,
    gaps: Mapping[tuple[str, str], Judged],
    scenarios: Sequence[str],
    pcocs: Mapping[str, tuple[float, float]],
    rows: str = "held-out rows",
) -> list[str]:
    """Up to four sentences: how well it ranks, whether it beats popularity, how it is calibrated, what is unknown.

    `pcocs`: scenario -> `pcoc_interval` of its clicks, where there is one.
    """
    clicks = [(words(s), model[s]["ctr"]) for s in scenarios if s in model]

    sentences = []
    if ranked := [f"{auc:.4f} in {name}" for name, of in clicks if (auc := of["auc"]) is not None]:
        sentences.append(f"The model ranks {rows.replace('rows', 'clicks', 1)} with an AUC of {listed(ranked)}.")
    if any(judged.gap is not None for (c, _), judged in gaps.items() if c in scenarios):
        sentences.append(_against_popularity({key: judged for key, judged in gaps.items() if key[0] in scenarios}))
    found = {s: model[s]["ctr"]["pcoc"] for s in scenarios if s in model}
    if off := [f"{_off(pcoc, pcocs.get(s))} in {words(s)}" for s, pcoc in found.items() if pcoc is not None]:
        sentences.append(f"Predicted clicks are {listed(off)}.")
    undefined = [
        f"{TASK_NAMES.get(t, t)} in {words(s)} ({why_undefined('auc', m)})"
        for s in scenarios
        for t, m in model.get(s, {}).items()
        if m["auc"] is None
    ]
    return [*sentences, *([f"Undefined: {listed(undefined)}."] if undefined else [])]


def _against_popularity(gaps: Mapping[tuple[str, str], Judged]) -> str:
    kinds = {
        ("better",): "wins",
        ("even", "unsure"): "shows no clear difference",
        ("worse",): "loses",
        ("few",): "has too few positives or users to tell",
    }
    found = {judged.verdict for judged in gaps.values()}
    if found <= {"better", "none"}:
        where = " that can be compared" if "none" in found else ""
        return f"It beats the popularity baseline in every scenario and task{where}, after correction for all of them."
    parts = []
    for verdicts, text in kinds.items():
        if of_kind := [cell_task(c, t) for (c, t), judged in gaps.items() if judged.verdict in verdicts]:
            parts.append(f"{text} on {listed(of_kind)}")
    return f"Against the popularity baseline it {listed(parts)} (at 5%, corrected for all comparisons)."


def _off(pcoc: float, interval: tuple[float, float] | None) -> str:
    """What PCOC says; "too high" only where other users would not make that much by chance."""
    percent = 100 * (pcoc - 1)
    if abs(percent) < 0.5:
        return "within 0.5% of those observed"
    if interval is None:  # of one user, or without rows: nothing says how far chance goes
        return f"{abs(percent):.0f}% {'above' if percent > 0 else 'below'} those observed"
    if interval[0] <= 1 <= interval[1]:
        return f"{abs(percent):.0f}% {'above' if percent > 0 else 'below'} those observed, which may be chance,"
    return f"{abs(percent):.0f}% too {'high' if percent > 0 else 'low'}"


def _pcoc_intervals(run: RunRecord) -> dict[str, tuple[float, float]]:
    found = {}
    for scenario in run.scenarios if run.predictions is not None else ():
        cell = run.predictions and cell_rows(run.predictions, scenario, 0, run.scenarios)
        if cell and (interval := pcoc_interval(cell[0], cell[1], cell[2])):
            found[scenario] = interval
    return found


def curves_section(history: Sequence[Mapping[str, Any]], scenarios: Sequence[str]) -> Section:
    """Learning curves; a term that is zero throughout is switched off and left out."""
    plots = []
    for title, caption, keys, style in _curves(scenarios):
        lines = []
        for place, (name, key) in enumerate(keys.items()):  # a line keeps its colour when others are absent
            points = [(row["step"], row[key]) for row in history if isinstance(row.get(key), int | float)]
            is_off = key.startswith(("loss/", "contrastive/", "variance/")) and not any(y for _, y in points)
            if points and not is_off:
                lines.append(Line(name, place, [x for x, _ in points], [y for _, y in points]))
        if lines:
            plots.append(Plot(title, step_plot(lines, label=title, **style), caption))
    num_steps = sum(row.get("kind", "train") == "train" for row in history)
    note = f"From history.jsonl, {num_steps:,} log steps; a value is the mean since the log step before."
    return Section("Training", note, plots)


def _curves(scenarios: Sequence[str]) -> list[tuple[str, str, dict[str, str], dict[str, bool]]]:
    """(title, caption, name of a line -> key of a row of history.jsonl, style) of every plot."""
    names = {words(s): s for s in scenarios}
    cells = {**names, GLOBAL: GLOBAL}
    of_views = {f"{p[0]} in {n}": f"variance/{p}/{s}" for p in ("interest", "feature") for n, s in names.items()}
    loss_note = (
        "Mean binary cross-entropy of the rows whose label is known and final, by scenario; global: of the global "
        "labels, before its weight."
    )
    contrastive = {"i": "contrastive/interest", "f": "contrastive/feature"}
    zero = {"from_zero": True}
    tasks = TASK_NAMES.items()
    return [
        ("Loss", "The weighted sum that the optimisers see.", {"loss": "loss"}, {}),
        *((f"Loss of {n}", loss_note, {c: f"loss/{s}/{t}" for c, s in cells.items()}, {}) for t, n in tasks),
        *(
            (f"Held-out AUC of {n}", "After each epoch.", {c: f"{s}/{t}/auc" for c, s in names.items()}, {})
            for t, n in tasks
        ),
        ("Contrastive loss", "Of interests (i) and of features (f), before their weights.", contrastive, {}),
        ("Variance inside a view", "Near 0 the vectors of a view have collapsed into one.", of_views, zero),
        (
            "Gradient norm",
            "Largest of the dense gradients since the log step before, unclipped.",
            {"norm": "gradient_norm"},
            zero,
        ),
        (
            "Samples per second",
            "Rows that count, all workers together, over wall time.",
            {"rows/s": "samples_per_s"},
            zero,
        ),
        (
            "Data stall",
            "Share of the time that the loop waited for the reader.",
            {"stall": "data_stall"},
            {"from_zero": True, "percent": True},
        ),
    ]


def _calibration_section(run: RunRecord) -> Section:
    plots = []
    for place, scenario in enumerate(run.scenarios if run.predictions is not None else ()):
        for task_place, task in enumerate(TASKS):
            cell = run.predictions and cell_rows(run.predictions, scenario, task_place, run.scenarios)
            bins = calibration_bins(*cell) if cell else []
            if not bins:
                continue
            title, colour = f"{TASK_NAMES[task]} in {words(scenario)}", series_name(place)
            sizes = [b.num_rows for b in bins]
            size = f"{min(sizes):,}" if min(sizes) == max(sizes) else f"{min(sizes):,} to {max(sizes):,}"
            caption = (
                f"{len(bins)} bins of {size} rows; {sum(b.num_positives for b in bins):,} positives of {sum(sizes):,}."
            )
            svg = calibration_plot(bins, colour=colour, label=f"Calibration of {title}")
            plots.append(Plot(title, svg, caption, colour, bins=bins))
    note = (
        "Rows sorted by predicted probability and cut into bins of nearly equal size. Points on the dashed line are "
        "calibrated; bars are 95% intervals of the observed rate (Wilson's, which take the rows of a user together)."
    )
    return Section("Calibration", note, plots)


def _ranking_section(run: RunRecord) -> Section:
    plots = []
    for task_place, task in enumerate(TASKS):
        curves = []
        for place, scenario in enumerate(run.scenarios):
            for scored, is_baseline in ((run.predictions, False), (run.baseline, True)):
                cell = scored and cell_rows(scored, scenario, task_place, run.scenarios)
                points = roc_points(*cell[:2]) if cell else None
                if points is not None:
                    name = words(scenario) + (", popularity" if is_baseline else "")
                    curves.append((name, series_name(place), is_baseline, points))
        if curves:
            title = f"ROC of {TASK_NAMES[task]}"
            plots.append(Plot(title, roc_plot(curves, label=title)))
    return Section("Ranking", f"ROC curves on the {rows_name(run)}; dashed is the popularity baseline.", plots)


def _slices(run: RunRecord) -> dict[str, Any]:
    """Scenario -> parts of its rows; scenarios without rows are left out."""
    assert run.predictions is not None
    found = {s: ctr_slices(run.predictions, run.baseline, place) for place, s in enumerate(run.scenarios)}
    return {scenario: parts for scenario, parts in found.items() if parts}


def importance_section(found: Mapping[str, Any] | None, scenarios: Sequence[str]) -> Section:
    """Bars for each scenario, and a table with the cold rows apart; empty without `found`."""
    parts = [part for part in found["parts"] if part["drops"] and part["scenario"] in scenarios] if found else []
    if not found or not parts:
        return Section("What each signal carries")
    plots = [_signal_plot(part, scenarios.index(part["scenario"])) for part in parts if part["rows"] == "all"]
    note = (
        f"The click AUC that is lost when rows exchange their values of one signal, on {found['num_rows']:,} of the "
        "evaluated rows; bars are 95% intervals over users, filled points those that leave out 0, before any "
        "correction. A counter's columns, a scenario's history, the categories of all its events, and an id with its "
        "vector go together. A signal of little loss need not be useless: another may say the same. In the table, "
        "rows of users, items and queries that the vocabularies do not know are apart; they exchange values among "
        "themselves."
    )
    return Section("What each signal carries", note, plots, _signal_table(parts))


def _signal_plot(part: Mapping[str, Any], place: int) -> Plot:
    scenario = words(part["scenario"])
    colour = series_name(place)
    bars = [
        Bar(words(name), drop["drop"], [(drop["low"], drop["high"])], colour, drop["low"] > 0 or drop["high"] < 0)
        for name, drop in sorted(part["drops"].items(), key=lambda entry: -entry[1]["drop"])[:MAX_SIGNALS]
    ]
    title = f"Clicks in {scenario}"
    more = len(part["drops"]) - len(bars)
    caption = f"AUC {part['auc']:.4f} of {part['num_rows']:,} rows, {part['num_positives']:,} of them clicked."
    caption += f" The {len(bars)} largest; {more} more are in the table." if more else ""
    svg = forest_plot(bars, label=f"Click AUC lost without each signal in {scenario}", axis="click AUC lost")
    return Plot(title, svg, caption, colour)


def _signal_table(parts: Sequence[Mapping[str, Any]]) -> Table:
    largest: dict[str, float] = {}
    for part in sorted(parts, key=lambda part: part["rows"] != "all"):  # cold rows are few, and only name what is new
        for name, drop in part["drops"].items():
            before = largest.get(name, drop["drop"])
            largest[name] = max(before, drop["drop"]) if part["rows"] == "all" else before
    heads = [words(p["scenario"]) + ("" if p["rows"] == "all" else f", {p['rows']}") for p in parts]
    rows = [
        Row(["all rows as they are: AUC", *(f"{part['auc']:.4f}" for part in parts)]),
        Row(["rows", *(count(part["num_rows"]) for part in parts)]),
        Row(["clicks", *(count(part["num_positives"]) for part in parts)]),
    ]
    for name in sorted(largest, key=lambda name: -largest[name]):
        drops = [part["drops"].get(name) for part in parts]
        rows.append(Row([words(name), *(DASH if d is None else signed(d["drop"]) for d in drops)]))
    return Table(["AUC lost without", *heads], rows, 1, folded="All signals, and cold rows apart", is_dense=True)
