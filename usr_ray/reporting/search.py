"""The report of a search: every trial, what mattered, and the choice judged on other dates than it was made on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usr_ray.config import Config
from usr_ray.config.training import METRICS
from usr_ray.experiments.analysis import Trials, means
from usr_ray.experiments.search_record import FINAL_DIR
from usr_ray.experiments.space import Choice, TriedPoint, badness, best_epoch, choosing_dates, importance, with_values
from usr_ray.reporting.page import DASH, REPORT_FILE, Row, Section, Table, cell_task, listed, span
from usr_ray.reporting.plots import Dimension, Plot, bars_plot, parallel_plot
from usr_ray.reporting.study import write_study_report
from usr_ray.schema import TASKS

if TYPE_CHECKING:  # tune imports Ray; the report of a search needs none
    from usr_ray.experiments.search import TuneResult


def write_search_report(run_dir: Path, config: Config, result: TuneResult) -> Path:
    """Write `<run_dir>/report.html` and return its path."""
    dates, choice = choosing_dates(config), result.choice
    changed = ", ".join(f"{path} = {_value(value)}" for path, value in choice.overrides().items())
    lead = [
        f"{len(result.points)} trials trained on {span(dates.train)}; {span(dates.choose)} chose {changed} with "
        f"{config.tune.metric} {choice.value:.4f}. The choice is judged on {span(config.data.eval_dates)}, which no "
        "trial has seen:",
        *_nothing_better(config, choice),
        *_by_log_loss(Trials(Path(run_dir) / FINAL_DIR, result.study), config),
    ]
    sections = [search_section(config, result.points, choice.point)]
    page = Path(run_dir) / REPORT_FILE
    return write_study_report(
        Path(run_dir) / FINAL_DIR, result.study, page, kind="Search", lead=lead, sections=sections
    )


def _nothing_better(config: Config, choice: Choice) -> list[str]:
    if with_values(config, choice.overrides()) != config:
        return []
    return ["That is the configuration as given: the search found nothing better, and both sides below are the same."]


def _by_log_loss(trials: Trials, config: Config) -> list[str]:
    """Of a search that log loss chose: log loss on the judging dates, since the comparisons are of AUC."""
    if config.tune.metric != "log_loss":
        return []
    of = {dict(point)["configuration"]: entries for point, entries in means(trials).items()}
    parts = []
    for cell in ((scenario, task, "log_loss") for scenario in config.scenarios for task in TASKS):
        tuned, given = (of.get(label, {}).get(cell) for label in ("tuned", "given"))
        if tuned and given:
            parts.append(f"{tuned.value:.4f} against {given.value:.4f} in {cell_task(*cell[:2])}")
    if not parts:
        return []
    return [
        f"Log loss on those dates, chosen against given, means over the seeds: {listed(parts)}. The comparisons below "
        "are of AUC: a better calibration does not show in them."
    ]


def search_section(config: Config, points: Sequence[TriedPoint], chosen: TriedPoint) -> Section:
    """The trials as a table, parallel coordinates and importance."""
    metric = config.tune.metric
    keys = list(config.tune.space)
    scored = sorted((c for p in points if (c := best_epoch(p, config))), key=lambda c: badness(c, config))
    with_value = {choice.point.trial_id for choice in scored}
    unknown = [(None, point) for point in points if point.trial_id not in with_value]
    rows = []
    for value, point in [*((choice.value, choice.point) for choice in scored), *unknown]:
        numbers = [DASH if value is None else f"{value:.4f}", f"{len(point.curve)} of {point.num_epochs}"]
        ending = "chosen" if point == chosen else point.error[:80]
        drawn = [_value(point.values[key]) for key in keys]
        rows.append(
            Row([point.trial_id, point.status, *numbers, *drawn, ending], ["better" if ending == "chosen" else ""])
        )
    plots = []
    if len(scored) > 1:
        title = "Trials by parallel coordinates"
        dimensions = [*(_dimension(config, key) for key in keys), Dimension(metric, is_log=False)]
        lines = [[*(_place(config, key, c.point.values[key]) for key in keys), c.value] for c in scored]
        place = next((n for n, choice in enumerate(scored) if choice.point == chosen), 0)
        svg = parallel_plot(dimensions, lines, place, label=title)
        plots.append(Plot(title, svg, "Each line is a trial; the bold one was chosen.", is_wide=True))
    if shares := importance(scored, config.tune.space):
        title = f"What went with {metric}"
        caption = (
            "Rank correlation (choices: correlation ratio of ranks), less what chance gives, over the trials drawn: an "
            "association, and a weak one where trials are few."
        )
        plots.append(Plot(title, bars_plot(shares, label=title), caption))
    note = (
        f"{metric} on the choosing dates, best epoch of each trial, or with a schedule the last one of a whole trial; "
        f"{'lower' if METRICS[metric] == 'min' else 'higher'} is better. The chosen value is the best of many draws, "
        "so it flatters: see the comparison below."
    )
    return Section("Search", note, plots, Table(["Trial", "Status", metric, "Epochs", *_short(keys), ""], rows, 2))


def _short(keys: Sequence[str]) -> list[str]:
    """The last words of the keys, as a column's head; whole keys where two end alike."""
    ends = [key.rsplit(".", 1)[-1].replace("_", " ") for key in keys]
    return ends if len(set(ends)) == len(ends) else list(keys)


def _dimension(config: Config, key: str) -> Dimension:
    space = config.tune.space[key]
    return Dimension(key, is_log=space.kind == "log_uniform", labels=tuple(map(str, space.values)))


def _place(config: Config, key: str, value: Any) -> float:
    space = config.tune.space[key]
    return float(space.values.index(value)) if space.kind == "choice" else float(value)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
