"""What the views' vectors look like: spread at the end of training, and pictures of i_k and f_k on held-out rows.

Shape letters: B rows, S views, D width, N points of all views together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from usr_ray.experiments.analysis import Point, Trials, point_name
from usr_ray.experiments.grid import Study
from usr_ray.experiments.record import trial_dir
from usr_ray.reporting.page import DASH, Row, Section, Table
from usr_ray.reporting.plots import Plot, scatter_plot
from usr_ray.runs.evaluations import HISTORY_FILE
from usr_ray.runs.plan import load_manifest
from usr_ray.runs.read import read_history
from usr_ray.training.evaluate import evaluation_reader, load_run, score_batches
from usr_ray.training.worker import LocalWorker

NUM_ROWS = 400
"""Held-out rows in a picture; every view of each is a point."""
_VARIANCE = "variance/"


@dataclass(frozen=True, slots=True)
class Picture:
    """Vectors of one kind of one trained model, in two dimensions."""

    point: str
    symbol: str
    """'i' (user interest) or 'f' (features)."""
    method: str
    """'PCA' or 't-SNE'."""
    views: Mapping[str, NDArray]
    """Scenario of the view -> (B, 2)."""
    separation: float
    caption: str


def collapse(trials: Trials) -> dict[Point, dict[str, float]]:
    """Point -> 'i, search' and so on -> variance inside the view on the last log step, mean over seeds. Views that a
    model does not have (their part is off, so all is 0) are left out.
    """
    found: dict[Point, dict[str, float]] = {}
    for point, by_seed in trials.by_point.items():
        rows = [_last_step(trial_dir(trials.run_dir, trial) / HISTORY_FILE) for trial in by_seed.values()]
        names = [key for key in rows[0] if key.startswith(_VARIANCE)]
        entries = {}
        for name in names:
            values = [float(row[name]) for row in rows if row.get(name) is not None]
            _, kind, scenario = name.split("/", 2)
            if any(values):
                entries[f"{kind[0]}, {scenario.replace('_', ' ')}"] = float(np.mean(values))
        found[point] = entries
    return found


def _last_step(path: Path) -> dict[str, Any]:
    return next((row for row in reversed(read_history(path)) if row.get("kind") == "train"), {})


def pictures(trials: Trials) -> list[Picture]:
    """I and f of each point's first seed by PCA and, where scikit-learn is installed, by t-SNE."""
    found = []
    for point, by_seed in trials.by_point.items():
        trial = by_seed[min(by_seed)]
        config = trials.config(trial)
        for symbol, vectors_BSD in view_vectors(trial_dir(trials.run_dir, trial)).items():
            unit = vectors_BSD / np.maximum(np.linalg.norm(vectors_BSD, axis=2, keepdims=True), 1e-12)
            apart = separation(unit)
            for method, flat, caption in _projections(unit):
                views = dict(
                    zip(config.scenarios, flat.reshape(unit.shape[0], unit.shape[1], 2).swapaxes(0, 1), strict=True)
                )
                words = f"{unit.shape[0]} held-out rows under each view. {caption}"
                found.append(Picture(point_name(trials.study, point), symbol, method, views, apart, words))
    return found


def view_vectors(run_dir: Path, num_rows: int = NUM_ROWS) -> dict[str, NDArray]:
    """'i' and 'f' -> (B, S, D) of the first `num_rows` held-out rows; without a part that is off.

    All views of a row are computed where the model has global heads (GLMT); without them there is nothing to compare.
    """
    run, manifest, worker = load_run(run_dir), load_manifest(run_dir, "eval"), LocalWorker("cpu")
    parts: dict[str, list[NDArray]] = {"i": [], "f": []}
    count = 0
    with evaluation_reader(manifest, worker, run.config) as reader:
        for batch, outputs in score_batches(run.module, run.tables, reader, manifest.spec, worker.device):
            kept = (batch.weights_B > 0).numpy()
            for symbol, vectors in (("i", outputs.interests_BSD), ("f", outputs.features_BSD)):
                if vectors is not None:
                    parts[symbol].append(vectors.float().numpy()[kept])
            count += int(kept.sum())
            if count >= num_rows:
                break
    return {symbol: np.concatenate(found)[:num_rows] for symbol, found in parts.items() if found}


def separation(unit_BSD: NDArray) -> float:
    """Mean silhouette (Rousseeuw 1987) of the views by cosine distance, in [-1, 1]; 0 for one view."""
    num_rows, num_views, _ = unit_BSD.shape
    if num_views < 2 or num_rows < 2:
        return 0.0
    flat_ND = unit_BSD.swapaxes(0, 1).reshape(num_rows * num_views, -1).astype(np.float64)
    distance_NN = 1 - flat_ND @ flat_ND.T
    to_view_NS = distance_NN.reshape(-1, num_views, num_rows).sum(2)
    own_N = np.repeat(np.arange(num_views), num_rows)
    inside = to_view_NS[np.arange(len(own_N)), own_N] / (num_rows - 1)  # a point is at distance 0 from itself
    to_view_NS[np.arange(len(own_N)), own_N] = np.inf
    outside = to_view_NS.min(1) / num_rows
    largest = np.maximum(inside, outside)
    return float(np.where(largest > 1e-12, (outside - inside) / np.maximum(largest, 1e-12), 0.0).mean())


def _projections(unit_BSD: NDArray) -> list[tuple[str, NDArray, str]]:
    flat_ND = unit_BSD.reshape(-1, unit_BSD.shape[2]).astype(np.float64)
    points, shares = principal_components(flat_ND)
    found = [("PCA", points, f"The two components hold {100 * shares.sum():.0f}% of the variance.")]
    try:
        from sklearn.manifold import TSNE  # of the extra [dev]; the picture is left out without it
    except ImportError:
        return found
    perplexity = min(30.0, (len(flat_ND) - 1) / 3)
    mapped = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0).fit_transform(flat_ND)
    return [*found, ("t-SNE", mapped, f"Perplexity {perplexity:g}; distances between groups mean little.")]


def principal_components(rows_ND: NDArray) -> tuple[NDArray, NDArray]:
    """(N, 2) coordinates along the two directions of largest variance, and their shares of it."""
    centred = rows_ND - rows_ND.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    total = float((singular**2).sum()) or 1.0
    return centred @ directions[:2].T, singular[:2] ** 2 / total


def collapse_section(study: Study, spreads: Mapping[Point, Mapping[str, float]]) -> Section:
    """What the report says of `collapse`."""
    names = list(dict.fromkeys(name for entries in spreads.values() for name in entries))
    rows = []
    for point, entries in spreads.items():
        is_low = any(value < 0.05 for value in entries.values())
        shown = [f"{entries[name]:.4f}" if name in entries else DASH for name in names]
        rows.append(Row([point_name(study, point), *shown, "near collapse" if is_low else ""], ["worse"]))
    note = (
        "Variance of the unit vectors of a view inside a group of rows at the end of training, mean over the seeds; 1 "
        "is spread evenly, near 0 every row has the same vector, or, of i, few rows have events: a group without any "
        "counts as 0."
    )
    return Section("Collapse alarm", note, table=Table(["Point", *names, ""], rows))


def picture_section(found: Sequence[Picture]) -> Section:
    """What the report shows of `pictures`."""
    plots = []
    for picture in found:
        names = ("first component", "second component") if picture.method == "PCA" else ("", "")
        title = f"{picture.symbol} by {picture.method}: {picture.point}"
        groups = [(f"view {name}", place, points) for place, (name, points) in enumerate(picture.views.items())]
        plots.append(Plot(title, scatter_plot(groups, label=title, axes_names=names), picture.caption))
    rows = [Row([p.point, p.symbol, f"{p.separation:.4f}"]) for p in found if p.method == "PCA"]
    note = (
        "Unit vectors of one held-out sample of rows under each view, first seed. Separation: mean silhouette of the "
        "views by cosine distance, in all dimensions; 1 is far apart, 0 is mixed."
    )
    return Section("Representations of the views", note, plots, Table(["Point", "Vector", "Separation"], rows, 2))
