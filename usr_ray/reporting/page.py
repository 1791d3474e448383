"""Words and numbers of the report: how a metric is written, why it is undefined, what the run amounts to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from usr_ray.evaluation.metrics import ALL, GLOBAL, NDCG_K, CellMetrics, TaskMetrics
from usr_ray.evaluation.statistics import Judged, PairedGap

DASH = "\N{EN DASH}"
TASK_NAMES = {"ctr": "CTR", "ctcvr": "CTCVR"}
METRIC_COLUMNS = (
    ("auc", "AUC", 4),
    ("gauc", "GAUC", 4),
    ("log_loss", "Log loss", 4),
    ("normalised_entropy", "NE", 4),
    ("pcoc", "PCOC", 3),
    (f"ndcg_at_{NDCG_K}", f"NDCG@{NDCG_K}", 4),
)
"""Key in metrics.json, heading, decimals."""


@dataclass(slots=True)
class Footnotes:
    """Reasons for dashes, each once, lettered in the order of first use."""

    reasons: list[str] = field(default_factory=list)

    def mark(self, reason: str) -> str:
        """The letter of `reason`."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return chr(ord("a") + self.reasons.index(reason))


@dataclass(frozen=True, slots=True)
class Value:
    """A table entry: its text, and for a dash the letter and text of the reason."""

    text: str
    mark: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table of metrics: the model or the baseline in one cell and task."""

    cell: str
    task: str
    scorer: str
    is_baseline: bool
    starts_cell: bool
    """First line of its cell: the name is written once."""
    values: tuple[Value, ...]
    num_samples: int
    num_positives: int


def count(number: float | None) -> str:
    """A whole number with thousands separators; a dash for None."""
    return DASH if number is None else f"{number:,.0f}"


def share(value: float | None, decimals: int = 1) -> str:
    """A fraction in per cent; a dash for None."""
    return DASH if value is None else f"{100 * value:.{decimals}f}%"


def duration(seconds: float) -> str:
    """Seconds as '48 s', '3 min 20 s' or '2 h 05 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def cell_name(cell: str) -> str:
    """Heading of a cell of metrics.json."""
    names = {GLOBAL: "Global labels", ALL: "All scenarios pooled"}
    return names.get(cell, cell.replace("_", " ").capitalize())


def cell_task(cell: str, task: str) -> str:
    """'search CTR'."""
    return f"{cell.replace('_', ' ')} {TASK_NAMES.get(task, task)}"


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
    return "no user with both labels" if key == "gauc" else "not computed in this evaluation"


def metric_rows(
    model: CellMetrics, baseline: CellMetrics | None, footnotes: Footnotes, *, model_name: str
) -> list[Row]:
    """Lines of the table, the baseline under the model in every cell and task."""
    rows = []
    for cell, tasks in model.items():
        for place, task in enumerate(tasks):
            scorers = [(model_name, model, False)] + ([("popularity", baseline, True)] if baseline else [])
            for scorer, cells, is_baseline in scorers:
                metrics = cells[cell][task]
                rows.append(
                    Row(
                        cell=cell_name(cell),
                        task=TASK_NAMES.get(task, task),
                        scorer=scorer,
                        is_baseline=is_baseline,
                        starts_cell=place == 0 and not is_baseline,
                        values=tuple(
                            metric_value(key, metrics, decimals, footnotes) for key, _, decimals in METRIC_COLUMNS
                        ),
                        num_samples=int(metrics["num_samples"] or 0),
                        num_positives=int(metrics["num_positives"] or 0),
                    )
                )
    return rows


def metric_value(key: str, metrics: TaskMetrics, decimals: int, footnotes: Footnotes) -> Value:
    """A metric as a table entry; None becomes a dash with its reason."""
    value = metrics.get(key)
    if value is None:
        reason = why_undefined(key, metrics)
        return Value(DASH, footnotes.mark(reason), reason)
    return Value(f"{value:.{decimals}f}")


def gap_interval(gap: PairedGap) -> str:
    """'+0.0290 to +0.0334'."""
    return f"{signed(gap.low)} to {signed(gap.high)}"


def signed(value: float) -> str:
    """Four decimals with a sign; a real minus."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def verdict(model: CellMetrics, gaps: Mapping[tuple[str, str], Judged], scenarios: Sequence[str]) -> list[str]:
    """Up to four sentences: how well it ranks, whether it beats popularity, how it is calibrated, what is unknown."""
    ranked = [(s, model[s]["ctr"]["auc"]) for s in scenarios if s in model and model[s]["ctr"]["auc"] is not None]
    sentences = []
    if ranked:
        listed = _listed([f"{auc:.4f} in {s.replace('_', ' ')}" for s, auc in ranked])
        sentences.append(f"The model ranks held-out clicks with an AUC of {listed}.")
    compared = {(c, t): g for (c, t), g in gaps.items() if g.gap is not None and c in scenarios}
    if compared:
        sentences.append(_against_popularity(compared))
    pcocs = [(s, model[s]["ctr"]["pcoc"]) for s in scenarios if s in model and model[s]["ctr"]["pcoc"] is not None]
    if pcocs:
        listed = _listed([f"{_off(float(p or 0))} in {s.replace('_', ' ')}" for s, p in pcocs])
        sentences.append(f"Predicted clicks are {listed}.")
    undefined = [
        f"{TASK_NAMES.get(t, t)} in {s.replace('_', ' ')} ({why_undefined('auc', m)})"
        for s in scenarios
        for t, m in model.get(s, {}).items()
        if m["auc"] is None
    ]
    if undefined:
        sentences.append(f"Undefined: {_listed(undefined)}.")
    return sentences


def _against_popularity(gaps: Mapping[tuple[str, str], Judged]) -> str:
    names = {
        ("better",): "wins",
        ("even", "unsure"): "shows no clear difference",
        ("worse",): "loses",
        ("few",): "has too few positives to tell",
    }
    parts = []
    for kinds, words in names.items():
        of_kind = [cell_task(c, t) for (c, t), gap in gaps.items() if gap.verdict in kinds]
        if of_kind:
            parts.append(f"{words} on {_listed(of_kind)}")
    if len(parts) == 1 and all(g.verdict == "better" for g in gaps.values()):
        return "It beats the popularity baseline in every scenario and task, after correction for all comparisons."
    return f"Against the popularity baseline it {_listed(parts)} (at 5%, corrected for all comparisons)."


def _off(pcoc: float) -> str:
    percent = 100 * (pcoc - 1)
    if abs(percent) < 0.5:
        return "within 0.5% of those observed"
    return f"{abs(percent):.0f}% too {'high' if percent > 0 else 'low'}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
