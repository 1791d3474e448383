"""A small samples table in Delta, written by delta-rs as ETL's would be, with labels that a model can learn."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from operator import xor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable, WriterProperties, write_deltalake
from numpy.typing import NDArray

from usr_ray.data.manifest import Manifest, build_manifest
from usr_ray.schema import (
    CONFIG_PROPERTY,
    FEATURE_SPEC_PROPERTY,
    FIRST_ID,
    ITEM_FEATURES,
    ITEM_FEATURES_PROPERTY,
    SAMPLES,
    VECTOR_TABLES,
    VECTORS_PROPERTIES,
    VOCABULARIES,
    DenseFeature,
    FeatureSpec,
    ListFeature,
    SparseFeature,
    VectorFeature,
    cold_column,
    index_column,
    scaled_column,
)

FIRST_DATE = dt.date(2026, 1, 1)
HOUR_US = 3_600_000_000


def samples_spec(
    *,
    scenarios: Sequence[str] = ("search", "recommendation"),
    query_scenarios: Sequence[str] = ("search",),
    num_users: int = 30,
    num_items: int = 40,
    num_queries: int = 20,
    history_length: int = 5,
    label_delay_us: int = 25 * HOUR_US,
    sides: Sequence[str] = (),
    lists: tuple[ListFeature, ...] = (),
    vectors: tuple[VectorFeature, ...] = (),
) -> FeatureSpec:
    """Spec of the table: the fixed features, one item category and two numbers; tags, terms and vectors as asked."""
    sizes = {"user_id": (num_users, "user"), "item_id": (num_items, "item"), "query": (num_queries, "query")}
    sizes |= {"event_hour": (24, "context"), "brand": (6, "item")}
    return FeatureSpec(
        scenarios=tuple(scenarios),
        query_scenarios=tuple(query_scenarios),
        sparse=tuple(
            SparseFeature(name=name, column=index_column(name), num_embeddings=FIRST_ID + count, owner=owner)
            for name, (count, owner) in sizes.items()
        ),
        dense=(
            DenseFeature(name="price", column=scaled_column("price"), owner="item"),
            DenseFeature(name="age", column=scaled_column("age"), owner="user"),
        ),
        history_length=history_length,
        label_delay_us=label_delay_us,
        history_item_features=tuple(sides),
        lists=lists,
        vectors=vectors,
    )


def samples_arrow(spec: FeatureSpec, *, num_rows: int, num_days: int, seed: int = 0) -> pa.Table:
    """Rows in event_time order over `num_days` days from FIRST_DATE; the watermark is half a day after the last one."""
    rng = np.random.default_rng(seed)
    counts = {feature.name: feature.num_embeddings for feature in spec.sparse}
    day_us = 24 * HOUR_US
    start_us = int(dt.datetime(*FIRST_DATE.timetuple()[:3], tzinfo=dt.UTC).timestamp()) * 1_000_000
    time_N = np.sort(rng.integers(0, num_days * day_us, num_rows)) + start_us
    scenario_N = rng.integers(0, len(spec.scenarios), num_rows)
    has_query_N = np.isin(scenario_N, [spec.scenarios.index(s) for s in spec.query_scenarios])
    user_N, item_N = (rng.integers(1, counts[name], num_rows) for name in ("user_id", "item_id"))
    query_N = np.where(has_query_N, rng.integers(1, counts["query"], num_rows), 0)
    taste = rng.normal(size=(counts["user_id"], 3)) @ rng.normal(size=(3, counts["item_id"]))
    quality = rng.normal(size=(len(spec.scenarios), counts["item_id"]))
    logit_N = taste[user_N, item_N] + quality[scenario_N, item_N] - 1
    prob_N = 1 / (1 + np.exp(-logit_N))
    click_N = rng.random(num_rows) < prob_N
    order_N = click_N & (rng.random(num_rows) < prob_N)
    click_global_N = click_N | (rng.random(num_rows) < 0.1)
    order_global_N = order_N | (click_global_N & (rng.random(num_rows) < 0.05))
    columns: dict[str, Any] = {
        "impression_id": [f"i{n}" for n in range(num_rows)],
        "request_id": [f"r{n // 4}" for n in range(num_rows)],
        "user_id": [f"u{u}" for u in user_N],
        "item_id": [f"v{v}" for v in item_N],
        "scenario": [spec.scenarios[s] for s in scenario_N],
        "event_time": pa.array(time_N, pa.timestamp("us", tz="UTC")),
        "impression_date": pa.array([_date(t) for t in time_N], pa.date32()),
        "is_click": click_N.astype(np.float32),
        "is_order": order_N.astype(np.float32),
        "is_click_global": click_global_N.astype(np.float32),
        "is_order_global": order_global_N.astype(np.float32),
        "is_mature": time_N + spec.label_delay_us <= start_us + num_days * day_us + day_us // 2,
        "scenario_index": scenario_N,
        "user_key": user_N * 7919,
        "request_key": np.arange(num_rows) // 4,
    }
    own = {"user_id": user_N, "item_id": item_N, "query": query_N, "brand": item_N % (counts["brand"] - 1) + 1}
    own["event_hour"] = time_N // HOUR_US % 24 + FIRST_ID
    columns |= {feature.column: own[feature.name] for feature in spec.sparse}
    columns |= {feature.column: rng.normal(size=num_rows).astype(np.float32) for feature in spec.dense}
    for of_list in spec.lists:
        lengths_N = rng.integers(0, of_list.length + 1, num_rows)
        columns[of_list.column] = _lists(rng.integers(1, of_list.num_embeddings, int(lengths_N.sum())), lengths_N)
    for history in spec.histories:
        lengths_N = rng.integers(0, spec.history_length + 1, num_rows)
        total = int(lengths_N.sum())
        columns[history.item_ids] = _lists(rng.integers(1, counts["item_id"], total), lengths_N)
        columns[history.actions] = _lists(rng.integers(1, 3, total), lengths_N)
        ages = np.sort(rng.random(total).astype(np.float32))[::-1] * 1e5 + 1
        columns[history.ages_s] = _lists(ages.astype(np.float32), lengths_N)
        if history.query_ids:
            columns[history.query_ids] = _lists(rng.integers(1, counts["query"], total), lengths_N)
    return pa.table(columns)


def write_samples(
    lake: Path,
    spec: FeatureSpec,
    *,
    num_rows: int = 600,
    num_days: int = 4,
    seed: int = 0,
    row_group_rows: int = 64,
    built_with: str = "",
) -> None:
    """Write `<lake>/samples`, partitioned by date, with the feature spec (and the meaning of rows) as properties."""
    write_deltalake(
        str(lake / SAMPLES),
        samples_arrow(spec, num_rows=num_rows, num_days=num_days, seed=seed),
        partition_by=["impression_date"],
        mode="overwrite",
        writer_properties=WriterProperties(max_row_group_size=row_group_rows, write_batch_size=row_group_rows),
    )
    # Not as `configuration` of the write: delta-rs takes its own keys only there.
    properties = {FEATURE_SPEC_PROPERTY: spec.to_json()} | ({CONFIG_PROPERTY: built_with} if built_with else {})
    if spec.history_item_features:
        properties[ITEM_FEATURES_PROPERTY] = "0"
        items_N = np.arange(FIRST_ID, spec.sparse_feature("item_id").num_embeddings)
        num_brands = spec.sparse_feature("brand").num_embeddings
        brands_N = items_N % (num_brands - 1) + 1  # as in the rows
        write_deltalake(str(lake / ITEM_FEATURES), pa.table({"item_id_index": items_N, "brand_index": brands_N}))
    for owner in dict.fromkeys(vector.owner for vector in spec.vectors):
        properties[VECTORS_PROPERTIES[owner]] = "0"
        write_deltalake(str(lake / VECTOR_TABLES[owner]), vectors_arrow(spec, owner, seed))
    DeltaTable(lake / SAMPLES).alter.set_table_properties(properties, raise_if_not_exists=False)


def vectors_arrow(spec: FeatureSpec, owner: str, seed: int = 0) -> pa.Table:
    """Vectors by encoded id, as bytes of float16; every fifth user or item has no row, every third no vector in it.

    Every fourth has its id for its vector alone.
    """
    rng = np.random.default_rng(seed + 1)
    ids_N = np.arange(FIRST_ID, spec.sparse_feature(f"{owner}_id").num_embeddings)
    ids_N = ids_N[ids_N % 5 != 0]
    columns: dict[str, Any] = {index_column(f"{owner}_id"): ids_N}
    for vector in spec.vectors:
        if vector.owner == owner:
            values = rng.normal(size=(len(ids_N), vector.length)).astype("<f2")
            bytes_of = [None if n % 3 == 0 else v.tobytes() for n, v in zip(ids_N, values, strict=True)]
            columns[vector.name] = pa.array(bytes_of, pa.binary())
    columns[cold_column(f"{owner}_id")] = pa.array([True if n % 4 == 3 else None for n in ids_N.tolist()], pa.bool_())
    return pa.table(columns)


def named(spec: FeatureSpec, prefix: str, *before: FeatureSpec) -> FeatureSpec:
    """The spec with a fingerprint of values called <prefix><id>, behind those of specs of earlier builds."""

    def fingerprinted(feature: SparseFeature) -> SparseFeature:
        found = [fingerprint for earlier in before for fingerprint in earlier.sparse_feature(feature.name).fingerprints]
        values = [f"{number}:{prefix}{number}" for number in range(FIRST_ID, feature.num_embeddings)]
        digests = [hashlib.md5(value.encode()).hexdigest() for value in values]
        halves = (functools.reduce(xor, [int(d[a:b], 16) for d in digests], 0) for a, b in ((0, 15), (15, 30)))
        now = (feature.num_embeddings, "".join(f"{half:015x}" for half in halves))
        return replace(feature, fingerprints=tuple(dict.fromkeys((*found, now))))

    sparse = (f if f.name == "event_hour" else fingerprinted(f) for f in spec.sparse)
    return replace(spec, sparse=tuple(sparse))


def write_vocabularies(lake: Path, spec: FeatureSpec, prefix: str) -> None:
    """Write `<lake>/vocabularies` with the values that `named` has made fingerprints of."""
    rows = [
        (feature.name, f"{prefix}{number}", number)
        for feature in spec.sparse
        if feature.name != "event_hour"
        for number in range(FIRST_ID, feature.num_embeddings)
    ]
    table = pa.table(dict(zip(("feature", "value", "id"), map(list, zip(*rows, strict=True)), strict=True)))
    write_deltalake(str(lake / VOCABULARIES), table, partition_by=["feature"], mode="overwrite")


def read_manifests(lake: Path) -> tuple[Manifest, Manifest]:
    """Of a table of four days: the first three, which are trained on, and the last."""
    days = [FIRST_DATE + dt.timedelta(days=n) for n in range(4)]
    return build_manifest(lake, dates=(days[0], days[2])), build_manifest(lake, dates=(days[3], days[3]))


def _lists(values: NDArray[Any], lengths_N: NDArray[np.int64]) -> pa.Array:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_N)]), pa.int32())
    array = pa.array(values)
    kind = pa.list_(pa.field("element", array.type, nullable=False))
    return pa.ListArray.from_arrays(offsets, array, type=kind)


def _date(time_us: int) -> dt.date:
    return dt.datetime.fromtimestamp(time_us / 1e6, tz=dt.UTC).date()
