"""A declared study: a TOML file with axes, seeds and comparisons, and the trials that it expands into. No Ray.

[[axes]]                       every combination of the axes' values is a point, every point runs with every seed
name = "backbone"                         (docs/studies.md has the whole format)
values = { mmoe = { "model.backbone" = "mmoe" }, ple = { "model.backbone" = "ple" } }
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from usr_ray.config.fields import ConfigError, UserError, build, override_key, require

SCALES = ("small", "full")
SIMULATED = "simulated"
OTHERS = "*"  # in a comparison: each value of the axis but the one compared against
_SET_BY = {
    "train.seed": "seeds",
    "ray.num_workers": "resources.num_workers",
    "ray.cpus_per_worker": "resources.cpus_per_worker",
    "data.table_version": "--set, for all trials alike",
}
"""Keys that every trial gets from elsewhere."""
_TRAINED_WITH = (
    "data.train_dates",
    "data.mature_only",
    "data.final_labels",
    "data.only_scenario",
    "features.crosses",
    "counters.warmup_days",
)
"""Keys outside [model] and [train] that a training reads, so that trials on one table may differ by them. The others
are of the table, of the held-out rows, or of other jobs: the trials would be the same."""


class StudyError(UserError):
    """A study that cannot be read or run."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the grid."""

    name: str
    values: Mapping[str, Mapping[str, Any]]
    """Label of a value -> its overrides by dotted path."""
    is_world: bool = False
    """Its overrides change the table: each combination of world axes has a lake of its own."""

    @property
    def keys(self) -> set[str]:
        """Dotted paths that one of its values overrides."""
        return {key for overrides in self.values.values() for key in overrides}

    @property
    def numbers(self) -> list[float] | None:
        """The labels as numbers, for a plot's axis; None where one is no number."""
        try:
            return [float(label) for label in self.values]
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Which values of an axis are compared, at equal values of the other axes."""

    axis: str
    of: tuple[str, ...] = (OTHERS,)
    """Labels; '*': all but `against`."""
    against: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one trial needs, and how many run at once."""

    num_workers: int = 1
    """Workers of each trial. 1: the loop runs in the trial's own process; more: Ray Train's worker group."""
    cpus_per_worker: float = 1.0
    max_concurrent: int = 0
    """Trials at once; 0: as many as the cluster's CPUs (or GPUs) hold."""

    def __post_init__(self) -> None:
        require(self.num_workers > 0, f"resources.num_workers must be positive, got {self.num_workers}")
        require(self.cpus_per_worker > 0, f"resources.cpus_per_worker must be positive, got {self.cpus_per_worker}")
        require(self.max_concurrent >= 0, f"resources.max_concurrent must not be negative, got {self.max_concurrent}")


@dataclass(frozen=True, slots=True)
class Study:
    """A study at one scale."""

    name: str
    title: str
    question: str
    seeds: tuple[int, ...]
    base: Mapping[str, Any]
    """Overrides of every trial."""
    axes: tuple[Axis, ...]
    comparisons: tuple[Comparison, ...]
    resources: Resources = field(default_factory=Resources)
    world: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of every world; of use with a world axis only."""
    source: str = SIMULATED
    """Data set that worlds are ingested from (etl/sources); all but the simulated one need its files."""
    slices: bool = False
    """Measure by length of the history, and by whether user and item were in the training rows."""
    representations: bool = False
    """Keep the models, and draw i_k and f_k of held-out rows."""

    @property
    def has_worlds(self) -> bool:
        """The study makes its own lakes."""
        return any(axis.is_world for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Trial:
    """One training: a point of the grid and a seed."""

    trial_id: str
    """Readable, and ending in a digest of world, overrides and seed: the same trial has the same id in any grid."""
    point: Mapping[str, str]
    """Axis -> label of its value."""
    overrides: Mapping[str, Any]
    """Dotted path -> value, the seed among them."""
    seed: int
    world: str
    """Id of its world; '' for a lake that was given."""
    world_overrides: Mapping[str, Any]


def as_sets(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides by dotted path as `a.b=c`, c in TOML."""
    return [f"{key}={toml_value(value)}" for key, value in overrides.items()]


def toml_value(value: Any) -> str:
    """A value as TOML writes it; strings, numbers, booleans and lists of them."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def load_study(
    source: str, *, scale: str, folder: Path, seeds: Sequence[int] | None = None, sets: Sequence[str] = ()
) -> Study:
    """The study of a TOML file, or of `<folder>/<source>.toml` for a name; `seeds` take the place of the file's.

    What `sets` (`a.b=c`) name is left out of its base and world: the trials have it from the command line.

    Raises:
        StudyError: no such study, no TOML, an unknown key, an axis without values, a comparison of nothing; `sets` name
            what an axis, the seeds or the resources set.
    """
    path = Path(source) if source.endswith(".toml") else folder / f"{source}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise StudyError(f"--study {source}: no such study; choose from: {known}; or name a TOML file")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"--study {path}: not TOML ({error})") from error
    try:
        study = _without(parse_study(raw, name=path.stem, scale=scale), sets)
        return replace(study, seeds=_seeds(list(seeds), "--seeds")) if seeds else study
    except ConfigError as error:
        raise StudyError(f"--study {path}: {error}") from error


def _without(study: Study, sets: Sequence[str]) -> Study:
    nested: dict[str, Any] = {}
    for text in sets:
        override_key(nested, text)
    given = _flat(nested, "--set")
    require("train.seed" not in given, "--set train.seed: is set by seeds; leave it out")
    for axis in study.axes:
        both = sorted(given.keys() & axis.keys)
        require(not both, f"--set {''.join(both[:1])}: axis {axis.name} sets it for each trial; leave it out")
    for name, own in (
        ("num_workers", study.resources.num_workers),
        ("cpus_per_worker", study.resources.cpus_per_worker),
    ):
        found = given.get(f"ray.{name}", own)
        is_here = name == "num_workers" and found == 0
        require(found == own or is_here, f"--set ray.{name}={found}: trials take resources.{name}, {own}; leave it out")
    base, world = ({k: v for k, v in of.items() if k not in given} for of in (study.base, study.world))
    return replace(study, base=base, world=world)


_KEYS = (*(key.name for key in fields(Study) if key.name != "name"), "small")
_SMALL_KEYS = ("seeds", "base", "world", "axes")


def parse_study(raw: Mapping[str, Any], *, name: str, scale: str) -> Study:
    """A study from the dictionaries of its TOML; with scale 'small' the section [small] replaces seeds, adds to base
    and world, and keeps only the values it names of an axis.

    Raises:
        ConfigError: as load_study.
    """
    _only(raw, _KEYS, "the study")
    small = raw.get("small", {}) if scale == "small" else {}
    _only(small, _SMALL_KEYS, "small")
    axes = [_axis(a) for a in _list(raw, "axes")]
    require(bool(axes), "axes is empty; give at least one [[axes]] with a name and values")
    names = [axis.name for axis in axes]
    require(len(set(names)) == len(names), f"axes: {', '.join(names)} has doubles")
    kept = small.get("axes", {})
    require(isinstance(kept, Mapping), f"small.axes must be a table of axis -> labels, got {kept!r}")
    for axis_name, labels in kept.items():
        require(axis_name in names, f"small.axes.{axis_name}: no such axis; the study has: {', '.join(names)}")
        axes = [replace(a, values=_kept(a, labels)) if a.name == axis_name else a for a in axes]
    for one, other in itertools.combinations(axes, 2):
        both = sorted(one.keys & other.keys)
        require(not both, f"axes: {one.name} and {other.name} both set {''.join(both[:1])}; leave it to one of them")
    comparisons = [build(Comparison, c, path=f"comparisons[{n}]") for n, c in enumerate(_list(raw, "comparisons"))]
    study = Study(
        name=name,
        title=str(raw.get("title", name)),
        question=str(raw.get("question", "")),
        seeds=_seeds(small.get("seeds", raw.get("seeds", [])), "seeds"),
        base={**_overrides(raw.get("base", {}), "base"), **_overrides(small.get("base", {}), "small.base")},
        axes=tuple(axes),
        comparisons=tuple(comparisons),
        resources=build(Resources, raw.get("resources", {}), path="resources"),
        world={**_overrides(raw.get("world", {}), "world"), **_overrides(small.get("world", {}), "small.world")},
        source=str(raw.get("source", SIMULATED)),
        representations=_switch(raw, "representations", "representations"),
        slices=_switch(raw, "slices", "slices"),
    )
    _check_comparisons(study)
    _check_keys(study)
    is_spare = not study.has_worlds and (study.world or study.source != SIMULATED)
    require(not is_spare, "world or source is set, but no axis has world = true")
    return study


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    found = raw.get(key, [])
    require(isinstance(found, list), f"{key} must be a list, each begun with [[{key}]], got {found!r}")
    return found


def _switch(raw: Mapping[str, Any], key: str, where: str) -> bool:
    found = raw.get(key, False)
    require(isinstance(found, bool), f"{where} must be true or false, got {found!r}")
    return found


def _seeds(seeds: Any, where: str) -> tuple[int, ...]:
    fits = isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)
    require(bool(fits), f"{where} must be a list of whole numbers, for example [0, 1, 2, 3, 4], got {seeds!r}")
    require(len(set(seeds)) == len(seeds), f"{where} has doubles: {seeds}")
    return tuple(seeds)


def _axis(raw: Any) -> Axis:
    require(isinstance(raw, Mapping) and isinstance(raw.get("name"), str), f"axes: each needs a name, got {raw!r}")
    where = f"axes.{raw['name']}"
    _only(raw, ("name", "path", "values", "world"), where)
    values, path = raw.get("values"), raw.get("path")
    if isinstance(path, str) and isinstance(values, list):
        labelled = {str(v): _overrides({path: v}, where) for v in values}
        require(len(labelled) == len(values), f"{where}.values has doubles: {values}")
    else:
        require(
            isinstance(values, Mapping) and path is None,
            f"{where}: give a path and a list of values, or a table of values: label -> overrides",
        )
        labelled = {label: _overrides(overrides, f"{where}.values.{label}") for label, overrides in values.items()}
    require(bool(labelled), f"{where}.values is empty")
    for one, other in itertools.combinations(labelled, 2):
        require(labelled[one] != labelled[other], f"{where}.values: {one} and {other} are the same")
    return Axis(raw["name"], labelled, is_world=_switch(raw, "world", f"{where}.world"))


def _kept(axis: Axis, labels: Any) -> dict[str, Mapping[str, Any]]:
    wanted = [str(label) for label in labels] if isinstance(labels, list) else []
    strays = [label for label in wanted if label not in axis.values]
    found = ", ".join(strays) or repr(labels)
    require(bool(wanted) and not strays, f"small.axes.{axis.name}: {found} is not among {', '.join(axis.values)}")
    return {label: axis.values[label] for label in wanted}


def _check_comparisons(study: Study) -> None:
    axes = {axis.name: axis for axis in study.axes}
    seen: set[tuple[str, frozenset[str]]] = set()
    for n, comparison in enumerate(study.comparisons):
        where = f"comparisons[{n}]"
        names = ", ".join(axes)
        require(comparison.axis in axes, f"{where}.axis {comparison.axis!r} is no axis; the study has: {names}")
        require(
            not axes[comparison.axis].is_world,
            f"{where}.axis {comparison.axis!r} changes the rows: compare at equal worlds",
        )
        labels = axes[comparison.axis].values
        for label in (comparison.against, *(o for o in comparison.of if o != OTHERS)):
            known = ", ".join(labels)
            require(label in labels, f"{where}: {label!r} is not among the values of {comparison.axis}: {known}")
        pairs = compared_labels(study, comparison)
        require(bool(pairs), f"{where} compares nothing: name in `of` another value than {comparison.against!r}")
        for label, against in pairs:  # a test that is made twice makes Holm's p-values of all larger
            pair = (comparison.axis, frozenset((label, against)))
            require(pair not in seen, f"{where}: {label} and {against} are compared already; leave it out")
            seen.add(pair)


def _only(raw: Any, keys: Sequence[str], where: str) -> None:
    require(isinstance(raw, Mapping), f"{where} must be a section, got {raw!r}")
    unknown = sorted(set(raw) - set(keys))
    require(not unknown, f"unknown key '{''.join(unknown[:1])}' in {where}; it has: {', '.join(keys)}")


def _flat(raw: Any, where: str) -> dict[str, Any]:
    """Overrides by dotted path; nested sections are allowed too."""
    require(isinstance(raw, Mapping), f"{where} must be a table of overrides, got {raw!r}")
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": v for inner, v in _flat(value, f"{where}.{key}").items()}
        else:
            flat[key] = value
    return flat


def _overrides(raw: Any, where: str) -> dict[str, Any]:
    """`_flat` of what trials may be given."""
    flat = _flat(raw, where)
    for key, by in _SET_BY.items():
        require(key not in flat, f"{where}: {key} is set by {by}; leave it out")
    return flat


def _check_keys(study: Study) -> None:
    def is_trained_with(key: str) -> bool:
        return key.startswith(("model.", "train.")) or key in _TRAINED_WITH

    for axis in study.axes:
        strays = [] if axis.is_world else sorted(key for key in axis.keys if not is_trained_with(key))
        require(
            not strays,
            f"axes.{axis.name}: {''.join(strays[:1])} makes no difference between trainings on one table: these are "
            f"model.*, train.*, {', '.join(_TRAINED_WITH)}; for a key of the table set world = true",
        )
    of_table = sorted(k for k in study.base if not is_trained_with(k) and not k.startswith(("data.", "ray.")))
    require(
        not (study.has_worlds and of_table),
        f"base: {''.join(of_table[:1])} does not reach the worlds, which are built with [world]; move it there",
    )


def expand(study: Study) -> list[Trial]:
    """Every trial of the grid: all points with the first seed, then with the next, so that an early look compares."""
    trials = []
    for seed in study.seeds:
        for labels in itertools.product(*(axis.values for axis in study.axes)):
            point = {axis.name: label for axis, label in zip(study.axes, labels, strict=True)}
            trials.append(_trial(study, point, seed))
    return trials


def _trial(study: Study, point: Mapping[str, str], seed: int) -> Trial:
    overrides, of_world, world_labels = dict(study.base), dict(study.world), []
    for axis in study.axes:
        chosen = axis.values[point[axis.name]]
        overrides |= chosen
        if axis.is_world:
            of_world |= chosen
            world_labels.append(f"{axis.name}-{point[axis.name]}")
    world = f"{_slug('-'.join(world_labels))}-{_digest(of_world)}" if study.has_worlds else ""
    # The table was built with these; the trial's configuration names the same scenarios.
    overrides = {**of_world, **overrides, "train.seed": seed}
    digest = _digest({"world": world, "overrides": overrides})
    name = _slug("-".join(point.values()))
    return Trial(f"{name}-s{seed}-{digest}", dict(point), overrides, seed, world, of_world)


def compared_labels(study: Study, comparison: Comparison) -> list[tuple[str, str]]:
    """(label, label it is set against) of each pair of a comparison."""
    axis = next(a for a in study.axes if a.name == comparison.axis)
    chosen = list(axis.values) if OTHERS in comparison.of else list(comparison.of)
    return [(label, comparison.against) for label in chosen if label != comparison.against]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:80]


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
