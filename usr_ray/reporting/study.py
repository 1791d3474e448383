"""One HTML file about a study: the question, what came of it in words, tables, plots, trials that failed.

Every sentence says no more than the corrected intervals do.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usr_ray import __version__
from usr_ray.evaluation.statistics import MIN_ROWS, MIN_USERS
from usr_ray.experiments.analysis import (
    TOTALS,
    WHOLE,
    Contrast,
    Mean,
    Point,
    Trials,
    contrasts,
    means,
    point_name,
    value_name,
)
from usr_ray.experiments.grid import Study
from usr_ray.experiments.record import failure_of, read_study, trial_dir
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
    interval,
    moment,
    p_value,
    signed,
    span,
    words,
    write_page,
)
from usr_ray.reporting.plots import Bar, Line, Plot, axis_plot, forest_plot, heat_map, series_name
from usr_ray.reporting.study_vectors import collapse, collapse_section, picture_section, pictures

METRICS = (("auc", "AUC"), ("gauc", "GAUC"), ("log_loss", "Log loss"), ("pcoc", "PCOC"))
_MANY_ROWS = 12
"""A table of more comparisons is folded behind the one at a glance."""
Averages = Mapping[Point, Mapping[tuple[str, str, str], Mean]]
"""What analysis.means returns."""


def write_study_report(
    run_dir: Path,
    study: Study,
    output: Path | None = None,
    *,
    kind: str = "Study",
    lead: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> Path:
    """Write `<run_dir>/report.html` (or `output`) and return its path; `lead` and `sections` go before the study's own.

    Raises:
        StudyError: no trial is finished.
    """
    run_dir = Path(run_dir)
    trials, record = Trials(run_dir, study), read_study(run_dir)
    found = contrasts(trials)
    unfinished = [trial for trial in trials.all if trial not in trials.finished]
    failures = [(t.trial_id, failure_of(trial_dir(run_dir, t)) or "no result yet") for t in unfinished]
    many = "s" if len(failures) > 1 else ""
    left_out = f"{len(failures)} trial{many} without a result: named below, part of no number."
    return write_page(
        Path(output) if output else run_dir / REPORT_FILE,
        "study.html.j2",
        eyebrow=f"{kind} report · {study.name}",
        title=study.title,
        question=study.question,
        warnings=[left_out] if failures else [],
        lead=[*lead, *verdict_sentences(trials, [c for c in found if c.part == WHOLE])],
        facts=_facts(trials, record),
        sections=[*sections, *_sections(trials, found)],
        failures=failures,
        grid_json=json.dumps(record.get("grid", {}), indent=2),
    )


def verdict_sentences(trials: Trials, found: Sequence[Contrast]) -> list[str]:
    """What the comparisons amount to, in words that claim no more than the corrected p-values do."""
    num_seeds = len(trials.study.seeds)
    sentences = []
    for every in _grouped(found, lambda c: (c.axis, c.label, c.against)):
        own = [c for c in every if c.gap is not None]
        num_none = len(every) - len(own)
        pair = _pair(trials.study, every[0])
        counts = {kind: sum(c.verdict == kind for c in own) for kind in ("better", "worse")}
        clear = ", ".join(f"{kind} in {number}" for kind, number in counts.items() if number)
        if not own:
            text = f"{pair}: none of {num_none} comparisons can be made"
        elif not clear:
            text = f"{pair}: a difference holds after correction in none of {len(own)} comparisons"
        else:
            rest = len(own) - sum(counts.values())
            text = f"{pair}: {clear} of {len(own)} comparisons after correction"
            text += f"; in {rest} the interval does not tell" if rest else ""
        text += f"; {num_none} cannot be made" if own and num_none else ""
        gaps = [c.gap.value for c in own if c.gap is not None]
        sentences.append(text + (f" (AUC gap {signed(min(gaps))} to {signed(max(gaps))})." if gaps else "."))
    if found and num_seeds < 5:
        sentences.append(
            f"Only {num_seeds} seed{'s' * (num_seeds > 1)}: gaps between models are often 0.001 to 0.01, so read this "
            "as a trial run of the study, not as its answer."
        )
    if found and num_seeds == 1:
        sentences.append("With one seed the intervals know the users only, not what another seed would have given.")
    return sentences or ["The study declares no comparison; the tables have its numbers."]


def _grouped(found: Sequence[Contrast], key: Callable[[Contrast], Hashable]) -> list[list[Contrast]]:
    """Those of equal key together, groups in the order of their first."""
    groups: dict[Hashable, list[Contrast]] = {}
    for c in found:
        groups.setdefault(key(c), []).append(c)
    return list(groups.values())


def _pair(study: Study, found: Contrast) -> str:
    """'usr against plain'; with the axis where the label alone does not say it: 'd 8 against 16'."""
    return f"{value_name(study, found.axis, found.label)} against {found.against}"


def _name(study: Study, found: Contrast) -> str:
    """'d 8, usr against plain'."""
    return ", ".join(filter(None, (point_name(study, found.at), _pair(study, found))))


def _facts(trials: Trials, record: Mapping[str, Any]) -> list[Fact]:
    tables, data = record.get("tables", {}), record.get("config", {}).get("data", {})
    used = trials.dates()
    command = record["commands"][-1]["command"] if record.get("commands") else []
    versions = ", ".join(f"{table['lake']} version {table['version']}" for table in tables.values())
    facts = [
        ("Trials", f"{len(trials.finished)} of {len(trials.all)} finished", False),
        ("Seeds", ", ".join(map(str, trials.study.seeds)), False),
        ("Training dates", span(used.get("train") or data.get("train_dates")), False),
        ("Held-out dates", span(used.get("eval") or data.get("eval_dates")), False),
        ("Started", moment(record.get("created")), False),
        ("Code", f"usr-ray {__version__}", False),
        ("Tables" if len(tables) > 1 else "Table", versions, True),
        ("Command", shlex.join(command), True),
    ]
    return [fact for fact in facts if fact[1]]


def _sections(trials: Trials, found: Sequence[Contrast]) -> list[Section]:
    whole, sliced = [c for c in found if c.part == WHOLE], [c for c in found if c.part != WHOLE]
    averages, spreads = means(trials), collapse(trials)
    sections = []
    if whole:
        plots = _comparison_plots(trials, whole)
        sections += [_glance_section(trials.study, whole), _contrast_section(trials.study, "Comparisons", whole, plots)]
    if sliced:
        plots = [plot for task in TASK_NAMES for plot in _slice_plots(trials.study, sliced, task)]
        title = "Parts of the rows: history, new users and items"
        sections.append(_contrast_section(trials.study, title, sliced, plots))
    note = "Mean ± standard deviation over the seeds, on the held-out rows. Totals pool the scenarios."
    sections.append(Section("Every point", note, _mean_plots(trials, averages), _means_table(trials, averages)))
    if any(spreads.values()):
        sections.append(collapse_section(trials.study, spreads))
    if trials.study.representations:
        sections.append(picture_section(pictures(trials)))
    return sections


def _glance_section(study: Study, found: Sequence[Contrast]) -> Section:
    """A row for each compared point, a column for each scenario and task: the gap and its verdict."""
    cells = list(dict.fromkeys((c.scenario, c.task) for c in found))
    rows = []
    for group in _grouped(found, lambda c: (c.axis, c.label, c.against, c.at)):
        own = {(c.scenario, c.task): c for c in group}
        shown = [own.get(cell) for cell in cells]
        texts = [f"{signed(c.gap.value)} {VERDICTS[c.verdict][0]}" if c and c.gap else DASH for c in shown]
        rows.append(Row([_name(study, group[0]), *texts], [c.verdict if c else "none" for c in shown]))
    note = (
        "AUC gap on the held-out rows, mean over the seeds. ▲ better, ▼ worse: holds after correction for all "
        "comparisons of this table. ≈: these data do not tell the two apart. ?: too few rows or users of a label."
    )
    return Section("At a glance", note, table=Table(["Gap of", *(cell_task(*cell) for cell in cells)], rows))


def _contrast_section(study: Study, title: str, found: Sequence[Contrast], plots: Sequence[Plot]) -> Section:
    """Every comparison with its interval, spread over the seeds and corrected p."""
    pairs = {_pair(study, c) for c in found}
    columns = {  # what is equal in all rows is left out
        "Comparison": (lambda c: _pair(study, c)) if len(pairs) > 1 or not any(c.at for c in found) else None,
        "At": (lambda c: point_name(study, c.at)) if any(c.at for c in found) else None,
        "Rows": (lambda c: c.part) if any(c.part != WHOLE for c in found) else None,
        "Cell": lambda c: cell_task(c.scenario, c.task),
    }
    shown = {name: text for name, text in columns.items() if text}
    rows = [Row([*(text(c) for text in shown.values()), *_numbers(c), VERDICTS[c.verdict]], [c.verdict]) for c in found]
    ours, theirs = (
        " or ".join(dict.fromkeys(value_name(study, c.axis, label(c)) for c in found))
        for label in (lambda c: c.label, lambda c: c.against)
    )
    ours = ours if len(pairs) < 4 else "the first"
    num_tests = sum(c.gap is not None and c.gap.can_tell for c in found)
    note = (
        f"AUC of {ours} minus AUC of {theirs}, on the same rows and "
        "seeds. The 95% interval knows the seeds and the users (method in docs/studies.md); p is Holm's, over the "
        f"{num_tests} comparisons below that can tell. An interval that holds 0 means that these data cannot tell, not "
        "that there is no difference."
    )
    folded = f"All {len(found)} intervals and p-values" if len(found) > _MANY_ROWS else ""
    head = [*shown, "AUC gap", "95% interval", "SD over seeds", "p (Holm)", "Verdict"]
    return Section(title, note, plots, Table(head, rows, len(shown), folded))


def _numbers(found: Contrast) -> list[str]:
    gap = found.gap
    if gap is None:
        return [DASH] * 4
    spread = f"{gap.seed_sd:.4f}" if len(gap.by_seed) > 1 else DASH
    return [signed(gap.value), interval(gap), spread, p_value(found.adjusted_p)]


def _comparison_plots(trials: Trials, found: Sequence[Contrast]) -> list[Plot]:
    """Plots by scenario and task: a heat map over two further axes, a line over one of numbers, else a forest."""
    compared = {c.axis for c in found}
    others = [axis for axis in trials.study.axes if axis.name not in compared and len(axis.values) > 1]
    over = [axis.name for axis in others]
    plots = []
    for scenario, task in dict.fromkeys((c.scenario, c.task) for c in found):
        own = [c for c in found if (c.scenario, c.task) == (scenario, task) and c.gap is not None]
        if not own:
            continue
        title, caption = f"AUC gap, {cell_task(scenario, task)}", "Filled: holds after correction. Bars: 95% intervals."
        single = len({(c.axis, c.label, tuple(p for p in c.at if p[0] not in over)) for c in own}) == 1
        if len(over) == 2 and single:
            caption = "A star: holds after correction."
            cells = {(dict(c.at)[over[0]], dict(c.at)[over[1]]): (c.gap.value, _is_sure(c)) for c in own if c.gap}
            svg = heat_map(cells, label=title, x_axis=over[0], y_axis=over[1])
        elif len(others) == 1 and others[0].numbers is not None:
            caption = "Bars: 95% intervals."
            svg = axis_plot(
                _gap_lines(trials.study, own, over[0]), label=title, x_axis=over[0], y_axis="AUC gap", dashed_at=0.0
            )
        else:
            labels = [value_name(trials.study, c.axis, c.label) for c in own]
            colours = list(dict.fromkeys(labels))
            bars = []
            for c, label in zip(own, labels, strict=True):
                parts = (point_name(trials.study, c.at), label if len(colours) > 1 or not c.at else "")
                bars.append(_bar(c, ", ".join(filter(None, parts)), colours.index(label)))
            svg = forest_plot(bars, label=title, axis="AUC gap")
        plots.append(Plot(title, svg, caption))
    return plots


def _is_sure(found: Contrast) -> bool:
    return found.verdict in ("better", "worse")


def _bar(found: Contrast, name: str, place: int) -> Bar:
    assert found.gap is not None
    return Bar(name, found.gap.value, [(found.gap.low, found.gap.high)], series_name(place), _is_sure(found))


def _gap_lines(study: Study, found: Sequence[Contrast], axis: str) -> list[Line]:
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for c in found:
        rest = point_name(study, tuple(p for p in c.at if p[0] != axis))
        if c.gap is not None:
            point = (float(dict(c.at)[axis]), c.gap.value, (c.gap.high - c.gap.low) / 2)
            groups.setdefault(", ".join(filter(None, (value_name(study, c.axis, c.label), rest))), []).append(point)
    return [Line(name, place, *zip(*points, strict=True)) for place, (name, points) in enumerate(groups.items())]


def _slice_plots(study: Study, found: Sequence[Contrast], task: str) -> list[Plot]:
    own = [c for c in found if c.task == task and c.gap is not None and c.verdict != "few"]
    if not own:
        return []
    # Of all parts, those left out too: a scenario has one colour in both tasks' plots.
    title, scenarios = f"AUC gap by part, {TASK_NAMES[task]}", list(dict.fromkeys(c.scenario for c in found))
    is_one = len(_grouped(own, lambda c: (c.axis, c.label, c.against, c.at))) == 1
    names = [f"{words(c.scenario)}: {c.part}" + ("" if is_one else f", {_name(study, c)}") for c in own]
    bars = [_bar(c, name, scenarios.index(c.scenario)) for c, name in zip(own, names, strict=True)]
    caption = f"Parts with fewer than {MIN_ROWS} rows or {MIN_USERS} users of a label are left out."
    return [Plot(title, forest_plot(bars, label=title, axis="AUC gap"), caption)]


def _means_table(trials: Trials, averages: Averages) -> Table:
    """Metrics of every point, by scenario and task."""
    rows = []
    for point, entries in averages.items():
        for scenario, task in dict.fromkeys(key[:2] for key in entries):
            values = [entries.get((scenario, task, name)) for name, _ in METRICS]
            if any(values):
                names = [point_name(trials.study, point), cell_name(scenario), TASK_NAMES[task]]
                rows.append(Row([*names, *map(_mean, values), str(len(trials.by_point[point]))]))
    head = ["Point", "Scenario", "Task", *(name for _, name in METRICS), "Seeds"]
    return Table(head, rows, 3, f"All {len(rows)} rows" if len(rows) > 2 * _MANY_ROWS else "")


def _mean(mean: Mean | None) -> str:
    if mean is None:
        return DASH
    return f"{mean.value:.4f} ± {mean.sd:.4f}" if mean.num_seeds > 1 else f"{mean.value:.4f}"


def _mean_plots(trials: Trials, averages: Averages) -> list[Plot]:
    """AUC over the axis, for a study with one numeric axis."""
    axis = trials.study.axes[0]
    if len(trials.study.axes) != 1 or axis.numbers is None or len(axis.values) < 2:
        return []
    every = (key for entries in averages.values() for key in entries)
    cells = dict.fromkeys(key[:2] for key in every if key[2] == "auc" and key[0] not in TOTALS)
    scenarios = list(dict.fromkeys(scenario for scenario, _ in cells))
    plots = []
    for task in dict.fromkeys(task for _, task in cells):
        lines = []
        for scenario in (s for s, t in cells if t == task):
            key = (scenario, task, "auc")
            points = [(float(dict(p)[axis.name]), e[key].value, e[key].sd) for p, e in averages.items() if key in e]
            lines.append(Line(words(scenario), scenarios.index(scenario), *zip(*points, strict=True)))
        title = f"AUC of {TASK_NAMES[task]} over {axis.name}"
        svg = axis_plot(lines, label=title, x_axis=axis.name, y_axis="AUC")
        plots.append(Plot(title, svg, "Bars: standard deviation over the seeds."))
    return plots
