"""One HTML file about a study: the question, what came of it in words, tables, plots, trials that failed.

Numbers are study_analysis's; every sentence says no more than the corrected intervals do.
"""

from __future__ import annotations

import datetime as dt
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from usr_ray import __version__
from usr_ray.experiments.analysis import TOTALS, WHOLE, Contrast, Mean, Point, Trials, contrasts, means, point_name
from usr_ray.experiments.grid import Study
from usr_ray.experiments.record import failure_of, read_record, trial_dir
from usr_ray.files import write_whole
from usr_ray.reporting import page as report_text
from usr_ray.reporting.run import load_template
from usr_ray.reporting.study_plots import Bar, Curve, axis_plot, forest_plot, heat_map
from usr_ray.reporting.study_tables import VERDICTS, contrast_section, glance_section, means_table, pair_name
from usr_ray.reporting.study_vectors import collapse, collapse_section, picture_section, pictures

REPORT_FILE = "report.html"


def write_study_report(run_dir: Path, study: Study, output: Path | None = None, **extra: Any) -> Path:
    """Write `<run_dir>/report.html` (or `output`) and return its path.

    Args:
        run_dir: of run_study.
        study: the grid, as it was run.
        output: another file.
        extra: `lead` sentences and `sections` that go before the study's own (tune_report).

    Raises:
        StudyError: no trial is finished.
    """
    run_dir = Path(run_dir)
    trials, record = Trials(run_dir, study), read_record(run_dir)
    found = contrasts(trials)
    whole = [c for c in found if c.part == WHOLE]
    context = {
        "eyebrow": f"Study report · {study.name}",
        "title": study.title,
        "question": study.question,
        "lead": [*extra.get("lead", []), *verdict_sentences(trials, whole)],
        "facts": _facts(trials, record),
        "sections": [*extra.get("sections", []), *_sections(trials, found)],
        "failures": [
            (t.trial_id, failure_of(trial_dir(run_dir, t)) or "no result yet")
            for t in trials.all
            if t not in trials.finished
        ],
        "grid_json": json.dumps(record.get("grid", {}), indent=2),
        "footer": f"Written {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC by usr-ray {__version__}; this file needs no "
        "network.",
    }
    path = Path(output) if output else run_dir / REPORT_FILE
    write_whole(path, load_template("study.html.j2").render(context))
    return path


def verdict_sentences(trials: Trials, found: Sequence[Contrast]) -> list[str]:
    """What the comparisons amount to, in words that claim no more than the corrected p-values do."""
    num_seeds = len(trials.study.seeds)
    sentences = []
    for axis, label, against in dict.fromkeys((c.axis, c.label, c.against) for c in found):
        own = [c for c in found if (c.axis, c.label, c.against) == (axis, label, against)]
        pair = pair_name(axis, label, against)
        counts = {kind: sum(c.verdict == kind for c in own) for kind in VERDICTS}
        clear = ", ".join(f"{kind} in {counts[kind]}" for kind in ("better", "worse") if counts[kind])
        rest = len(own) - counts["better"] - counts["worse"]
        if not clear:
            text = f"{pair}: a difference holds after correction in none of {len(own)} comparisons"
        else:
            text = f"{pair}: {clear} of {len(own)} comparisons after correction"
            text += f"; in {rest} the interval does not tell" if rest else ""
        gaps = [c.gap.value for c in own if c.gap is not None]
        if gaps:
            text += f" (AUC gap {report_text.signed(min(gaps))} to {report_text.signed(max(gaps))})"
        sentences.append(text + ".")
    if found and num_seeds < 5:
        sentences.append(
            f"Only {num_seeds} seed{'s' * (num_seeds > 1)}: gaps between models are often 0.001 to 0.01, so read this "
            "as a trial run of the study, not as its answer."
        )
    if found and num_seeds == 1:
        sentences.append("With one seed the intervals know the users only, not what another seed would have given.")
    return sentences or ["The study declares no comparison; the tables have its numbers."]


def _facts(trials: Trials, record: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    config, tables = record.get("config", {}), record.get("tables", {})
    data = config.get("data", {})
    command = record["commands"][-1]["command"] if record.get("commands") else []
    versions = ", ".join(f"{table['lake']} version {table['version']}" for table in tables.values())
    facts = [
        ("Trials", f"{len(trials.finished)} of {len(trials.all)} finished", False),
        ("Seeds", ", ".join(map(str, trials.study.seeds)), False),
        ("Training dates", str(data.get("train_dates", "")).replace(":", " to "), False),
        ("Held-out dates", str(data.get("eval_dates", "")).replace(":", " to "), False),
        ("Started", str(record.get("created", "")), False),
        ("Code", f"usr-ray {__version__}", False),
        ("Tables" if len(tables) > 1 else "Table", versions, True),
        ("Command", shlex.join(command), True),
    ]
    return [fact for fact in facts if fact[1]]


def _sections(trials: Trials, found: Sequence[Contrast]) -> list[dict[str, Any]]:
    whole, sliced = [c for c in found if c.part == WHOLE], [c for c in found if c.part != WHOLE]
    averages = means(trials)
    sections = []
    if whole:
        sections.append(glance_section(whole))
        sections.append(contrast_section("Comparisons", whole, _comparison_plots(trials, whole)))
    if sliced:
        sections.append(
            contrast_section(
                "Parts of the rows: history, new users and items",
                sliced,
                [_slice_plot(sliced, task) for task in ("ctr", "ctcvr")],
            )
        )
    sections.append(_means_section(trials, averages))
    spreads = collapse(trials)
    if any(spreads.values()):
        sections.append(collapse_section(spreads))
    if trials.study.representations:
        sections.append(picture_section(pictures(trials)))
    return sections


def _comparison_plots(trials: Trials, found: Sequence[Contrast]) -> list[dict[str, Any]]:
    """By scenario and task: a heat map over two further axes, a line over one of numbers, else a forest."""
    compared = {c.axis for c in found}
    others = [axis for axis in trials.study.axes if axis.name not in compared and len(axis.values) > 1]
    over = [axis.name for axis in others]
    plots = []
    for scenario, task in dict.fromkeys((c.scenario, c.task) for c in found):
        own = [c for c in found if (c.scenario, c.task) == (scenario, task) and c.gap is not None]
        if not own:
            continue
        title = f"AUC gap, {report_text.cell_task(scenario, task)}"
        single = len({(c.label, tuple(p for p in c.at if p[0] not in over)) for c in own}) == 1
        if len(over) == 2 and single:
            svg = heat_map(
                {
                    (dict(c.at)[over[0]], dict(c.at)[over[1]]): (c.gap.value, c.verdict in ("better", "worse"))
                    for c in own
                    if c.gap
                },
                label=title,
                x_axis=over[0],
                y_axis=over[1],
            )
        elif len(others) == 1 and others[0].numbers is not None:
            svg = axis_plot(_gap_curves(own, over[0]), label=title, x_axis=over[0], y_axis="AUC gap", dashed_at=0.0)
        else:
            svg = forest_plot(_bars(own), label=title, axis="AUC gap")
        plots.append(
            {
                "title": title,
                "svg": Markup(svg),
                "caption": "A star: holds after correction."
                if len(over) == 2 and single
                else "Filled: holds after correction. Bars: 95% intervals.",
            }
        )
    return plots


def _gap_curves(found: Sequence[Contrast], axis: str) -> list[Curve]:
    groups: dict[str, list[Contrast]] = {}
    for c in found:
        rest = point_name(tuple(p for p in c.at if p[0] != axis))
        groups.setdefault(", ".join(filter(None, (c.label, rest))), []).append(c)
    return [
        Curve(
            name,
            place,
            [float(dict(c.at)[axis]) for c in own],
            [c.gap.value for c in own if c.gap],
            [(c.gap.high - c.gap.low) / 2 for c in own if c.gap],
        )
        for place, (name, own) in enumerate(groups.items())
    ]


def _bars(found: Sequence[Contrast]) -> list[Bar]:
    labels = list(dict.fromkeys(c.label for c in found))
    return [
        Bar(
            ", ".join(filter(None, (point_name(c.at), c.label if len(labels) > 1 or not c.at else ""))),
            c.gap.value,
            c.gap.low,
            c.gap.high,
            labels.index(c.label),
            c.verdict in ("better", "worse"),
        )
        for c in found
        if c.gap is not None
    ]


def _slice_plot(found: Sequence[Contrast], task: str) -> dict[str, Any]:
    own = [c for c in found if c.task == task and c.gap is not None and c.verdict != "few"]
    if not own:
        return {}
    title = f"AUC gap by part, {report_text.TASK_NAMES[task]}"
    scenarios = list(dict.fromkeys(c.scenario for c in own))
    bars = [
        Bar(
            f"{c.scenario.replace('_', ' ')}: {c.part}",
            c.gap.value,
            c.gap.low,
            c.gap.high,
            scenarios.index(c.scenario),
            c.verdict in ("better", "worse"),
        )
        for c in own
        if c.gap
    ]
    return {
        "title": title,
        "svg": Markup(forest_plot(bars, label=title, axis="AUC gap")),
        "caption": "Parts with fewer than 30 rows of the rarer label are left out.",
    }


def _means_section(trials: Trials, averages: Mapping[Point, Mapping[tuple[str, str, str], Mean]]) -> dict[str, Any]:
    return {
        "title": "Every point",
        "note": "Mean ± standard deviation over the seeds, on the held-out rows. Totals pool the scenarios.",
        "plots": _mean_plots(trials, averages),
        "table": means_table(trials, averages),
    }


def _mean_plots(trials: Trials, averages: Mapping[Point, Mapping[tuple[str, str, str], Mean]]) -> list[dict[str, Any]]:
    """AUC over the axis, for a study with one numeric axis."""
    numeric = [a for a in trials.study.axes if a.numbers is not None and len(a.values) > 1]
    if len(trials.study.axes) != 1 or not numeric:
        return []
    (axis,) = numeric
    cells = [key[:2] for key in next(iter(averages.values())) if key[2] == "auc" and key[0] not in TOTALS]
    plots = []
    for task in dict.fromkeys(task for _, task in cells):
        curves = []
        for place, scenario in enumerate(s for s, t in cells if t == task):
            points = [
                (float(dict(p)[axis.name]), e[scenario, task, "auc"])
                for p, e in averages.items()
                if (scenario, task, "auc") in e
            ]
            curves.append(
                Curve(
                    scenario.replace("_", " "),
                    place,
                    [x for x, _ in points],
                    [m.value for _, m in points],
                    [m.sd for _, m in points],
                )
            )
        title = f"AUC of {report_text.TASK_NAMES[task]} over {axis.name}"
        plots.append(
            {
                "title": title,
                "caption": "Bars: standard deviation over the seeds.",
                "svg": Markup(axis_plot(curves, label=title, x_axis=axis.name, y_axis="AUC")),
            }
        )
    return plots
