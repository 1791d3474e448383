"""Prove that serving equals training: every impression of some dates as a request at its time.

Its encoded inputs must equal the samples table's columns bit for bit, and its probabilities the training model's. What
the lake keeps raw (ids, queries, events) is encoded anew; context features, of which it keeps the encoded value only,
are turned back into values where a vocabulary has them.
"""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from usr_ray.config.logs import MAX_NUMBER
from usr_ray.data.events import read_events
from usr_ray.data.manifest import DataError, build_manifest
from usr_ray.data.rows import micros, read_rows
from usr_ray.schema import FIRST_ID, LOG1P, STANDARD, UNKNOWN_ID, DenseFeature, ListFeature
from usr_ray.serving.counters import Counters, lake_counters
from usr_ray.serving.encode import Encoder, Profile, UserEvents
from usr_ray.serving.library import Run
from usr_ray.serving.runtime import ExportedModel
from usr_ray.serving.stores import ItemTable, UserStore, write_items, write_users
from usr_ray.serving.versions import MODEL, model_spec, open_counters, open_encoder, stable_folder, verified_version
from usr_ray.training.evaluate import check_table, load_whole_run

TOLERANCE = 1e-6
_EXAMPLES = 3
_REPORT_EVERY_S = 10.0
_RAW = ("impression_id", "user_id", "item_id", "query")


@dataclass(slots=True)
class Difference:
    """One input, or the probabilities, over all impressions."""

    name: str
    num_different: int = 0
    largest: float = 0.0
    examples: list[str] = field(default_factory=list)
    """impression_id of the first ones."""

    def add(self, impression: str, found: Any, expected: Any, tolerance: float = 0.0) -> None:
        """Compare one impression's."""
        found, expected = np.atleast_1d(found), np.atleast_1d(expected)
        if found.shape == expected.shape and np.array_equal(found, expected):
            return
        gap = np.inf if found.shape != expected.shape else float(np.abs(found.astype(float) - expected).max())
        self.largest = max(self.largest, gap)
        if not gap <= tolerance:
            self.num_different += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(impression)


@dataclass(frozen=True, slots=True)
class Replay:
    """What was compared."""

    num_impressions: int
    differences: tuple[Difference, ...]
    """One an input feature and history column, and one a probability; those that are equal everywhere included."""

    @property
    def is_equal(self) -> bool:
        """No input differs, and no probability by more than TOLERANCE."""
        return not any(d.num_different for d in self.differences)

    def lines(self) -> Iterator[str]:
        """A table of all that was compared, what differs first."""
        yield f"{'input':<34} {'differ':>9} {'largest':>10}  for example"
        for d in sorted(self.differences, key=lambda d: (-d.num_different, d.name)):
            yield f"{d.name:<34} {d.num_different:>9,} {d.largest:>10.3g}  {', '.join(d.examples)}"


def replay(
    run_dir: Path,
    lake: Path | str,
    registry: Path,
    dates: tuple[dt.date, dt.date],
    *,
    allow_missing: bool = False,
    report: Callable[[str], None] = print,
) -> Replay:
    """Replay the impressions of first..last (both included) against the stable version of a registry.

    The version's program, vocabularies and code are those of the service; items and users are read from the lake into
    stores of the same form, with all events, so that each request sees what was visible at its own time.

    Args:
        allow_missing: where some of the dates have no rows, take the others.

    Raises:
        UserError: there is no such run, lake or registry, or the version is of another run.
    """
    folder = stable_folder(registry)
    version = verified_version(folder, "model_id", "version")
    trained = load_whole_run(run_dir)
    if trained.checkpoint.model_id != version["model_id"]:
        raise DataError(
            f"--run-dir {run_dir}: its model is {trained.checkpoint.model_id}, the registry's stable version "
            f"{version['version']} is of another; name the run that was published"
        )
    manifest = build_manifest(lake, dates=dates, allow_missing=allow_missing)
    check_table(trained, manifest)
    program = ExportedModel(folder / MODEL, per_request=True)
    with tempfile.TemporaryDirectory(prefix="usr-ray-replay-") as name:
        stores = Path(name)
        whole = build_manifest(lake, dates=None, version=manifest.version)
        counted, _ = lake_counters(stores, lake, model_spec(folder), whole.built_with, as_of_us=None)
        counters = open_counters(stores)
        encoder = open_encoder(folder, counters)
        write_items(stores, whole, encoder, counted)
        write_users(stores, whole, read_events(lake)[0], encoder, as_of_us=None, counted=counted)
        report(f"items and users of samples version {manifest.version} read")
        users = UserStore(stores, encoder)
        replayed = _Replayer(encoder, program, (ItemTable(stores), users, counters), Run(run_dir, trained))
        told = time.monotonic()
        for _, rows in read_rows(manifest):
            replayed.add(rows)
            if time.monotonic() - told >= _REPORT_EVERY_S:
                told = time.monotonic()
                report(f"{replayed.num_impressions:,} of {manifest.num_rows:,} impressions")
    return Replay(replayed.num_impressions, tuple(replayed.differences.values()))


def _unscaled(scaled: float, feature: DenseFeature) -> float:
    """A value that becomes `scaled`; the largest of all is not exceeded by rounding."""
    if feature.scale == LOG1P:
        return float(np.sign(scaled) * min(np.expm1(abs(scaled)), MAX_NUMBER))
    return scaled * feature.deviation + feature.mean if feature.scale == STANDARD else scaled


class _Replayer:
    def __init__(
        self, encoder: Encoder, program: ExportedModel, stores: tuple[ItemTable, UserStore, Counters | None], run: Run
    ) -> None:
        self._encoder, self._program, self._run = encoder, program, run
        self._items, self._users, self._counters = stores
        self._limits = {name: f.num_embeddings for name, f in encoder.spec.vocabularies.items()}
        self._values = {name: encoder.values(name) for name in encoder.categories["context"]}
        self.num_impressions = 0
        self.differences: dict[str, Difference] = {}

    def add(self, rows: pa.Table) -> None:
        """Compare every row of a part of the table."""
        spec, encoder = self._encoder.spec, self._encoder
        scores = self._run.score(rows)
        raw = {name: rows[name].to_pylist() for name in _RAW}
        time_us_N = micros(rows["event_time"])
        columns = {f.name: rows[f.column].to_numpy() for f in spec.sparse}
        columns |= {f.name: rows[f.column].to_numpy() for f in spec.dense}
        history_names = [n for h in spec.histories for n in (h.item_ids, h.actions, h.ages_s, h.query_ids)]
        lists = {name: rows[name].combine_chunks() for name in history_names if name is not None}
        bags = {f.name: rows[f.column].combine_chunks() for f in spec.lists}
        scenario_N = rows["scenario_index"].to_numpy()
        for n in range(rows.num_rows):
            impression = raw["impression_id"][n]
            found = self._users.get(raw["user_id"][n])
            events, user = (UserEvents.none(), encoder.nothing("user")) if found is None else found
            item_ids, of_items, _ = self._items.find([raw["item_id"][n]], encoder)
            context, nameless = self._context(columns, bags, n)
            scenario, time_us, query = int(scenario_N[n]), int(time_us_N[n]), raw["query"][n]
            counters = None
            if self._counters is not None:
                profiles = {"user": user, "context": context, "item": of_items}
                counters = self._counters.values(encoder, scenario, time_us, query, profiles)
                counters |= {name: columns[name][n : n + 1] for name in self._counters.columns_by(nameless)}
            inputs = encoder.inputs(
                scenario=scenario,
                time_us=time_us,
                user_id=raw["user_id"][n],
                query=query,
                user=user,
                context=context,
                events=events,
                items=(item_ids, of_items),
                counters=counters,
            )
            self._compare(impression, inputs, columns, lists, n)
            for feature in spec.lists:
                expected = self._padded(feature, bags[feature.name], n)
                self._difference(feature.name).add(impression, inputs[feature.column][0], expected)
            for name, value in self._program.predict(inputs).items():
                self._difference(name).add(impression, value[0], scores[name][n].as_py(), TOLERANCE)
        self.num_impressions += rows.num_rows

    def _padded(self, feature: ListFeature, column: pa.ListArray, n: int) -> NDArray[np.int64]:
        """Tags or terms of a row as the model takes them."""
        ids = column[n].values.to_numpy(zero_copy_only=False)
        padded = np.zeros(feature.length, dtype=np.int64)
        padded[: len(ids)] = self._known(feature.vocabulary, ids)
        return padded

    def _context(
        self, columns: dict[str, NDArray[Any]], bags: dict[str, pa.ListArray], n: int
    ) -> tuple[Profile, list[str]]:
        """The impression's context, from values where there are such again, and what has a value that is not known."""
        encoder = self._encoder
        values: dict[str, Any] = {}
        encoded: dict[str, int] = {}
        for name in encoder.categories["context"]:
            number = int(columns[name][n])
            in_bucket = name in encoder.edges
            values[name] = self._in_bucket(name, number) if in_bucket else self._values[name].get(number)
            if values[name] is None:
                encoded[name] = number
        for name in encoder.numbers["context"]:
            values[name] = _unscaled(float(columns[name][n]), encoder.dense[name])
        profile = encoder.profile("context", values)
        for name, number in encoded.items():  # a hash, or a value without an id
            profile.ids[encoder.categories["context"].index(name)] = number
        places = encoder.list_places("context")
        for feature in encoder.lists["context"]:  # the lake keeps no text of theirs
            profile.ids[places[feature.name]] = self._padded(feature, bags[feature.name], n)
        return profile, [name for name, number in encoded.items() if number]

    def _in_bucket(self, name: str, number: int) -> float | None:
        """A value of a number's bucket; None: it is the one of nulls."""
        edges = self._encoder.edges[name]
        if number < FIRST_ID:
            return None
        if not edges:
            return 0.0
        if number == FIRST_ID:  # below all edges, in float32 too, which buckets go by (encode.bucket_id)
            return float(np.nextafter(np.float32(edges[0]), np.float32(-np.inf)))
        return edges[number - FIRST_ID - 1]

    def _compare(
        self, impression: str, inputs: dict[str, NDArray[Any]], columns: dict[str, NDArray[Any]], lists: Any, n: int
    ) -> None:
        spec = self._encoder.spec
        places: Counter[str] = Counter()
        for kind, features in (("sparse", spec.sparse), ("dense", spec.dense)):
            for feature in features:
                part = f"{'item' if feature.owner == 'item' else 'request'}_{kind}"
                expected = self._known(feature.name, columns[feature.name][n])
                self._difference(feature.name).add(impression, inputs[part][0][places[part]], expected)
                places[part] += 1
        for name, column in lists.items():
            values = column[n].values.to_numpy(zero_copy_only=False)
            found = inputs[name][0]
            of = name.rpartition("_history_")[2].removesuffix("_ids").replace("item", "item_id")
            padded = np.zeros_like(found)
            padded[len(found) - len(values) :] = self._known(of, values)
            self._difference(name).add(impression, found, padded)

    def _known(self, feature: str, ids: Any) -> Any:
        """Ids as the model knows them: values that have come since its training are unknown."""
        limit = self._limits.get(feature)
        return ids if limit is None else np.where(ids < limit, ids, UNKNOWN_ID)

    def _difference(self, name: str) -> Difference:
        return self.differences.setdefault(name, Difference(name))
