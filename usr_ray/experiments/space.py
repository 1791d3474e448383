"""A search's plan and result: dates, drawn values, the best trial, a TOML file. No Ray.

Three spans of dates, none seen twice: trials train on the first days of data.train_dates, its last days choose between
them, and data.eval_dates judges the choice once, after the search.
"""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usr_ray.config import Config, UserError, dotted, load_config, parse_dates
from usr_ray.config.fields import override_key
from usr_ray.config.training import METRICS, SpaceConfig
from usr_ray.experiments.grid import Axis, Comparison, Resources, Study, as_sets, toml_value

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TUNED = (
    "num_epochs",
    "global_batch_size",
    "order",
    "learning_rate",
    "weight_decay",
    "embedding_optimizer",
    "embedding_learning_rate",
    "embedding_weight_decay",
    "warmup_steps",
    "schedule",
    "precision",
    "gradient_clip",
    "average",
)
"""Keys of [train] that change the trained model; the others say where, how fast and on what it is trained."""


class TuneError(UserError):
    """A search that cannot be run."""


@dataclass(frozen=True, slots=True)
class ChoosingDates:
    """Parts of data.train_dates, as 'A:B'."""

    train: str
    choose: str


def choosing_dates(config: Config) -> ChoosingDates:
    """The last tune.choose_days of data.train_dates choose, the days before are trained on.

    Raises:
        TuneError: a span is missing, or no day is left to train on.
    """
    for key in ("train_dates", "eval_dates"):
        if not getattr(config.data, key):
            raise TuneError(f"data.{key} is empty; a search needs days to train on and, apart, days to report on")
    first, last = parse_dates(config.data.train_dates, where="data.train_dates")
    end = last - dt.timedelta(days=config.tune.choose_days)
    if end < first:
        raise TuneError(
            f"tune.choose_days ({config.tune.choose_days}) leaves none of the days of data.train_dates "
            f"({config.data.train_dates}) to train on; lower it"
        )
    return ChoosingDates(f"{first}:{end}", f"{end + dt.timedelta(days=1)}:{last}")


def check_space(config: Config) -> None:
    """Refuse a space of nothing, of unknown keys, or of keys that are not the model's or the training's.

    Raises:
        UserError: as said.
    """
    if not config.tune.space:
        raise TuneError('tune.space is empty; name keys to try, for example [tune.space."train.learning_rate"]')
    known = dotted(config.to_dict())
    for path, space in config.tune.space.items():
        if path not in known:
            raise TuneError(f"tune.space.{path}: no such key of the configuration")
        section, _, key = path.partition(".")
        if section != "model" and (section != "train" or key not in _TUNED):
            raise TuneError(f"tune.space.{path}: cannot be tuned; tune model.* and, of train, {', '.join(_TUNED)}")
        for value in space.values or (_number(space, space.low), _number(space, space.high)):
            with_values(config, {path: value})


def _number(space: SpaceConfig, value: float) -> float | int:
    return int(value) if space.kind == "int" else value


def default_point(config: Config) -> dict[str, Any] | None:
    """The configuration's own values of the space's keys; None where one lies outside the space."""
    known, point = dotted(config.to_dict()), {}
    for path, space in config.tune.space.items():
        value = known[path]
        inside = value in space.values if space.kind == "choice" else space.low <= value <= space.high
        if not inside:
            return None
        point[path] = value
    return point


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with values by dotted path; ConfigError where one does not fit."""
    raw = config.to_dict()
    for text in as_sets(values):
        override_key(raw, text)
    config = Config.from_dict(raw)
    config.check_effect()
    return config


def trial_config(config: Config, values: Mapping[str, Any], *, table_version: int) -> Config:
    """What a trial trains with: its values, the choosing dates, an evaluation after every epoch."""
    dates = choosing_dates(config)
    return with_values(
        config,
        {
            **values,
            "data.train_dates": dates.train,
            "data.eval_dates": dates.choose,
            "data.table_version": table_version,
            "train.evaluate_every_epochs": 1,
            "train.early_stopping": False,
        },
    )


@dataclass(frozen=True, slots=True)
class TriedPoint:
    """A trial of the search."""

    trial_id: str
    values: Mapping[str, Any]
    curve: tuple[float, ...]
    """The metric after each epoch that was trained; NaN where undefined."""
    num_epochs: int
    """Epochs it was to train."""
    error: str = ""

    @property
    def status(self) -> str:
        """'finished', 'stopped' (by ASHA, or cut off) or 'failed'."""
        if self.error:
            return "failed"
        return "finished" if len(self.curve) >= self.num_epochs else "stopped"


@dataclass(frozen=True, slots=True)
class Choice:
    """A trial, and after how many epochs it was best."""

    point: TriedPoint
    value: float
    num_epochs: int

    def overrides(self) -> dict[str, Any]:
        """What makes the given configuration the chosen one."""
        return {**self.point.values, "train.num_epochs": self.num_epochs}


def best_epoch(point: TriedPoint, config: Config) -> Choice | None:
    """The best value of tune.metric that stands for a run, of equals the first; None: there is none.

    Without a schedule of the rates, the weights after epoch e are those of a run of e epochs, so any epoch may be
    chosen, of a stopped trial too. With a schedule only the last epoch of a finished trial stands for a run.
    """
    schedule = point.values.get("train.schedule", config.train.schedule)
    candidates = []
    for epoch, value in enumerate(point.curve, start=1):
        stands = schedule == "none" or (epoch == point.num_epochs and point.status == "finished")
        if stands and math.isfinite(value):
            candidates.append(Choice(point, value, epoch))
    return min(candidates, key=lambda c: badness(c, config), default=None)


def badness(choice: Choice, config: Config) -> float:
    """Its value, or minus that: the least is the best."""
    return choice.value if METRICS[config.tune.metric] == "min" else -choice.value


def choose(points: Sequence[TriedPoint], config: Config) -> Choice:
    """The best of the trials by `best_epoch`; of equals the first.

    Raises:
        TuneError: no trial has a value.
    """
    candidates = [found for point in points if (found := best_epoch(point, config))]
    if not candidates:
        errors = sorted({point.error or "undefined there: a label is missing" for point in points})
        raise TuneError(f"no trial has a {config.tune.metric} on the choosing dates ({'; '.join(errors)})")
    return min(candidates, key=lambda c: badness(c, config))


def importance(scored: Sequence[Choice], space: Mapping[str, SpaceConfig]) -> dict[str, float]:
    """Key -> how strongly its value goes with the trial's best value, in [0, 1]; empty below five trials.

    The root of the share of the ranks' variance that Spearman's line explains, or, for choices, the means of the
    values (correlation ratio). Both shares are adjusted for what chance explains, 1 / (trials - 1) for a line and more
    for each further value: else six values that change nothing would come before a number that does. Association in
    the trials drawn, not a cause.

    Args:
        scored: `best_epoch` of the trials that have one.
    """
    if len(scored) < 5:
        return {}
    import numpy as np  # not above: jobs/tune.py refuses a search before it needs any package
    from scipy.stats import rankdata

    targets = rankdata([choice.value for choice in scored])
    found = {}
    for path, of in space.items():
        values = [choice.point.values[path] for choice in scored]
        if of.kind == "choice":
            share, num_means = _explained_by_means(values, targets)
        else:
            with np.errstate(invalid="ignore"):  # all of one value: no correlation
                share, num_means = float(np.nan_to_num(np.corrcoef(rankdata(values), targets)[0, 1]) ** 2), 2
        rest = len(targets) - num_means
        left = (1 - share) * (len(targets) - 1) / rest if rest else 1.0
        found[path] = math.sqrt(max(0.0, 1 - left))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _explained_by_means(labels: Sequence[Any], targets: NDArray) -> tuple[float, int]:
    """Share of the variance of `targets` that lies between the labels, and how many labels there are."""
    import numpy as np

    _, group_N = np.unique([repr(label) for label in labels], return_inverse=True)
    means = np.bincount(group_N, weights=targets) / np.bincount(group_N)
    return (float(means[group_N].var() / targets.var()) if targets.var() else 0.0), len(means)


def config_toml(config: Config, *, comment: str) -> str:
    """A whole configuration as TOML that `--config` takes; `comment` goes on top, a line for each of its lines."""
    lines = [f"# {line}" for line in comment.splitlines()]
    _write_section(config.to_dict(), "", lines)
    return "\n".join(lines) + "\n"


def _write_section(raw: Mapping[str, Any], path: str, lines: list[str]) -> None:
    plain = {key: value for key, value in raw.items() if not isinstance(value, Mapping)}
    if plain and path:
        lines += ["", f"[{path}]"]
    lines += [f"{_key(key)} = {toml_value(value)}" for key, value in plain.items()]
    for key, value in raw.items():
        if isinstance(value, Mapping):
            _write_section(value, f"{path}.{_key(key)}" if path else _key(key), lines)


def _key(key: str) -> str:
    is_bare = bool(key) and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)
    return key if is_bare else toml_value(key)


def load_search(path: Any, overrides: Sequence[str]) -> Config:
    """The configuration of a search, checked.

    Raises:
        UserError: as load_config, choosing_dates and check_space; the judging dates would choose an epoch; the
            search's package is missing.
    """
    config = load_config(path, overrides)
    if config.train.early_stopping:
        raise TuneError(
            "train.early_stopping would choose the epoch on data.eval_dates, which judge the search's choice; switch "
            "it off: a search chooses the epoch on its choosing dates"
        )
    seeds = config.tune.final_seeds
    if len(set(seeds)) < len(seeds):  # two trainings at once in one directory
        raise TuneError(f"tune.final_seeds has doubles: {list(seeds)}")
    choosing_dates(config)
    check_space(config)
    if config.tune.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise TuneError(
            "tune.search is 'optuna' and that package is not installed; set tune.search='random', or run: "
            "pip install --constraint constraints.txt '.[optuna]'"
        )
    return config


def final_study(config: Config, choice: Choice) -> Study:
    """The study of two points that judges the choice."""
    return Study(
        name="final",
        title="Tuned against given",
        question=f"Has the configuration chosen by {config.tune.metric} the higher AUC than the given one, on dates "
        "that it was not chosen on?",
        seeds=config.tune.final_seeds,
        base={},
        axes=(Axis("configuration", {"given": {}, "tuned": choice.overrides()}),),
        comparisons=(Comparison(axis="configuration", of=("tuned",), against="given"),),
        resources=search_resources(config),
    )


def search_resources(config: Config) -> Resources:
    """What a trial takes, in the words of a study."""
    return Resources(
        num_workers=max(1, config.ray.num_workers),
        cpus_per_worker=config.ray.cpus_per_worker,
        max_concurrent=config.tune.max_concurrent,
    )


def best_toml(config: Config, choice: Choice, record: Mapping[str, Any]) -> str:
    """The chosen configuration as jobs/train.py takes it; `record`: search.json."""
    best = with_values(config, choice.overrides())
    return config_toml(
        best,
        comment=f"Chosen by jobs/tune.py: trial {choice.point.trial_id}, {config.tune.metric} {choice.value:.6f} on "
        f"{choosing_dates(config).choose}.\nTable version {record['table_version']}, train.seed {config.train.seed}.\n"
        f"Found: {json.dumps(choice.overrides())}",
    )
