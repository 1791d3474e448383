"""The build on a random shop, row by row against the oracle; reruns, other partitions, other formats."""

from __future__ import annotations

import collections
import datetime as dt
import json
import math
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pyarrow.compute as pc
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.features.vocabulary import hash_index
from etl.jvm import table_version
from etl.lake.tables import Lake
from tests.etl_oracle import Expected, expected, xxh64
from tests.spark.shop import (
    CONFIG,
    DAYS,
    MINUTE,
    SCENARIOS,
    START,
    WINDOWS,
    Shop,
    logs_of,
    micros,
    moment,
    random_shop,
    write_logs,
)
from usr_ray.config import Config, load_config
from usr_ray.data.by_id import read_cold, read_vectors
from usr_ray.data.events import read_events
from usr_ray.data.manifest import build_manifest, read_vocabularies
from usr_ray.schema import FEATURE_SPEC_PROPERTY, FeatureSpec
from usr_ray.serving.encode import Encoder, ValueIndex
from usr_ray.serving.stores import ItemTable, UserStore, write_items, write_users

pytestmark = pytest.mark.spark

DATES = [(START + dt.timedelta(days=n)).date() for n in range(DAYS)]
WATERMARK = START + dt.timedelta(days=3, hours=12)
MIN_COUNT = 12
LATER = 2
START_US = int(START.timestamp()) * 1_000_000


LISTS = (
    'features.user_tags=["hobbies"]',
    'features.item_tags=["tags"]',
    'features.context_tags=["moods"]',
    "features.max_tags=2",
    "features.query_terms=true",
    'features.item_terms=["title"]',
    "features.max_terms=3",
)
NUMBERS = (
    'features.user_numbers=["age", "spent"]',
    'features.item_numbers=["price", "stock"]',
    'features.context_numbers=["depth", "wait", "load"]',
    'features.scale={price = "none", spent = "standard", load = "standard", stock = "buckets", wait = "buckets"}',
    "features.scale_buckets=4",
)
VECTORS = ("features.user_vectors={face = 2}", "features.item_vectors={look = 3}")
SPENT, STOCK = (12.5, None, 1e6, -3.0, 0.1), (0.0, 0.0, None, 7.0, 20.0, 20.5)
HOBBIES = (["chess"], None, ["golf", "chess", "golf"])
TAGS = (["new", "red"], [], None, ["red", " new ", "", "sale"], ["old"])
TITLES = ("Red SHOES", "Tea-Tasse", None, "红茶 tea", "[20, 34]", "\uff34\uff25\uff21 größe xl red", "")
MOODS = (["calm"], ["glad", "calm", "busy"], None)
TERMS = {
    "red shoes": ["red", "shoes"],
    "tea": ["tea"],
    'größe, "xl"': ["größe", "xl"],
    "Red SHOES": ["red", "shoes"],
    "Tea-Tasse": ["tea", "tasse"],
    "红茶 tea": ["红", "红茶", "茶"],
    "[20, 34]": ["20", "34"],
    "\uff34\uff25\uff21 größe xl red": ["tea", "größe", "xl"],
}
"""Text -> its first three terms, by hand."""


def config(*overrides: str) -> Config:
    return load_config(None, (*CONFIG, *LISTS, *NUMBERS, *VECTORS, f"vocabulary.min_count={MIN_COUNT}", *overrides))


def moods_of(impression_id: str) -> list[str] | None:
    return MOODS[int(impression_id[1:]) % len(MOODS)]


def numbers_of(impression_id: str) -> dict[str, float | None]:
    number = int(impression_id[1:])
    return {"wait": None if number % 5 == 0 else number % 7 / 3, "load": None if number % 4 == 0 else number / 1000}


def lists_of(shop: Shop, impression: dict[str, Any]) -> dict[str, list[str]]:
    """Tags (two at most, each once) and terms of an impression."""

    def tags(values: list[str] | None) -> list[str]:
        return list(dict.fromkeys(v.strip() for v in values or () if v.strip()))[:2]

    user, item = shop.users.get(impression["user"], {}), shop.items.get(impression["item"], {})
    return {
        "hobbies": tags(user.get("hobbies")),
        "tags": tags(item.get("tags")),
        "moods": tags(None if impression["scenario"] == 2 else moods_of(impression["id"])),
        "query_terms": TERMS.get(impression["query"] or "", []),
        "item_terms": TERMS.get(item.get("title") or "", []),
    }


def build(
    spark: SparkSession, logs: Path, lake: Path, first: int = 0, last: int = DAYS - 1, settings: Config | None = None
) -> list[str]:
    """Run the build on days first..last; what it printed."""
    lines: list[str] = []
    request = BuildRequest(
        logs=str(logs), lake=Lake(str(lake)), first=DATES[first], last=DATES[last], watermark=WATERMARK
    )
    build_samples(spark, settings or config(), request, Progress(write=lines.append))
    return lines


def rows_of(path: Path) -> list[dict[str, Any]]:
    """All rows of a Delta table as a trainer reads them, not through Spark."""
    return deltalake.DeltaTable(str(path)).to_pyarrow_table().to_pylist()


@pytest.fixture(scope="module")
def shop() -> Shop:
    shop = random_shop(7)
    for n, row in enumerate(shop.users.values()):
        row |= {"hobbies": HOBBIES[n % len(HOBBIES)], "spent": SPENT[n % len(SPENT)]}
        row["face"] = [n / 7, -1.0] if n % 4 else None
    shop.items["never shown"] = {"brand": "a", "price": 1.0}
    for n, row in enumerate(shop.items.values()):
        row |= {"tags": TAGS[n % len(TAGS)], "title": TITLES[n % len(TITLES)], "stock": STOCK[n % len(STOCK)]}
        row["look"] = None if n % 5 == 4 else [n / 3, 0.1, -float(n)]
    return shop


@pytest.fixture(scope="module")
def logs(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = logs_of(shop)
    for log in ("search_impressions", "feed_impressions"):
        for row in rows[log]:
            name = row["impression_id"] or "i0"
            row.update(moods=moods_of(name), **numbers_of(name))
    return write_logs(rows, tmp_path_factory.mktemp("shop") / "logs")


@pytest.fixture(scope="module")
def wanted(shop: Shop) -> Expected:
    return expected(shop.world, WINDOWS, num_scenarios=3, length=4, watermark=micros(WATERMARK))


@pytest.fixture(scope="module")
def lake(spark: SparkSession, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lake") / "lake"
    build(spark, logs, path)
    return path


@pytest.fixture(scope="module")
def later(spark: SparkSession, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last two dates alone: dates must not lean on one another's builds."""
    path = tmp_path_factory.mktemp("later") / "lake"
    build(spark, logs, path, LATER, 3)
    return path


@pytest.fixture(scope="module")
def samples(lake: Path) -> dict[str, dict[str, Any]]:
    rows = rows_of(lake / "samples")
    found = {row["impression_id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def ids(lake: Path) -> dict[str, dict[str, int]]:
    """feature -> value -> id."""
    found: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for row in rows_of(lake / "vocabularies"):
        found[row["feature"]][row["value"]] = row["id"]
    return found


def code(ids: dict[str, dict[str, int]], feature: str, value: str | None) -> int:
    return 0 if value is None else ids[feature].get(value, 1)


def test_every_impression_is_one_sample(samples: dict, wanted: Expected) -> None:
    assert samples.keys() == wanted.samples.keys()


def test_labels_times_and_maturity_equal_the_oracle(samples: dict, wanted: Expected) -> None:
    positives = collections.Counter()
    for key, want in wanted.samples.items():
        row = samples[key]
        for name in ("is_click", "is_order", "is_click_global", "is_order_global", "is_mature"):
            assert row[name] == want[name], (key, name)
            positives[name] += bool(want[name])
        for name in ("click_time", "order_time"):
            assert row[name] == (None if want[name] is None else moment(want[name])), (key, name)
    assert all(10 < positives[name] < len(samples) - 10 for name in positives), positives


def test_histories_equal_the_oracle(samples: dict, wanted: Expected, ids: dict) -> None:
    lengths = collections.Counter()
    for key, want in wanted.samples.items():
        row = samples[key]
        for scenario, events in zip(SCENARIOS, want["histories"], strict=True):
            prefix = f"{scenario}_history"
            lengths[len(events)] += 1
            assert row[f"{prefix}_item_ids"] == [code(ids, "item_id", e[0]) for e in events], (key, scenario)
            assert row[f"{prefix}_actions"] == [e[2] for e in events]
            assert row[f"{prefix}_ages_s"] == [float(np.float32(e[3] / 1e6)) for e in events]
            if scenario == "search":
                assert row[f"{prefix}_query_ids"] == [code(ids, "query", e[1]) for e in events]
            else:
                assert f"{prefix}_query_ids" not in row
    assert lengths[4] > 50
    assert lengths[0] > 50


def test_raw_and_encoded_columns(samples: dict, shop: Shop, ids: dict) -> None:
    first = {i["id"]: i for i in sorted(shop.world.impressions, key=lambda i: (i["time"], i["known"]), reverse=True)}
    for key, row in samples.items():
        i = first[key]
        time = moment(i["time"])
        user, item = shop.users.get(i["user"], {}), shop.items.get(i["item"], {})
        depth = None if i["scenario"] == 2 else i["depth"]
        assert row["event_time"] == time
        assert str(row["impression_date"]) == str(time.date())
        assert row["scenario"] == SCENARIOS[i["scenario"]]
        assert row["scenario_index"] == i["scenario"]
        for column, name in (
            ("request_id", "request"),
            ("user_id", "user"),
            ("item_id", "item"),
            ("query", "query"),
            ("position", "position"),
        ):
            assert row[column] == i[name], (key, column)
        categories = {
            "user_id": i["user"],
            "item_id": i["item"],
            "query": i["query"],
            "device": i["device"],
            "city": user.get("city"),
            "brand": item.get("brand"),
        }
        for name, value in categories.items():
            assert row[f"{name}_index"] == code(ids, name, value), (key, name, value)
        assert row["event_hour_index"] == time.hour + 2
        for name, value in {"age": user.get("age"), "price": item.get("price"), "depth": depth}.items():
            scaled = 0.0 if value is None else math.copysign(math.log1p(abs(value)), value)
            scaled = value or 0.0 if name == "price" else scaled  # features.scale
            assert row[f"{name}_scaled"] == pytest.approx(scaled, rel=1e-6)


def test_keys_group_users_and_requests(samples: dict) -> None:
    rows = list(samples.values())
    assert len({r["user_key"] for r in rows}) == len({r["user_id"] for r in rows})
    requests = {r["request_id"] or r["impression_id"] for r in rows}
    assert len({r["request_key"] for r in rows}) == len(requests)


def is_later(row: dict[str, Any]) -> bool:
    return row["impression_date"] >= DATES[LATER]


def test_dates_do_not_lean_on_one_another_s_builds(samples: dict, later: Path) -> None:
    rows = {row["impression_id"]: row for row in rows_of(later / "samples")}
    assert rows.keys() == {key for key, row in samples.items() if is_later(row)}
    for key, row in rows.items():
        # Vocabularies and scales are those of the dates that were built first.
        other = ("_index", "_indices", "_item_ids", "_query_ids", "spent_scaled", "load_scaled")
        same = [name for name in row if not name.endswith(other)]
        assert {name: row[name] for name in same} == {name: samples[key][name] for name in same}


def having_vectors(shop: Shop, feature: str) -> set[str]:
    """Values that have an id for their vector, at least."""
    rows, name = {"user_id": (shop.users, "face"), "item_id": (shop.items, "look")}.get(feature, ({}, ""))
    return {raw for raw, row in rows.items() if row[name] is not None}


def cold_of(shop: Shop, samples: dict, ids: dict, key: str) -> set[int]:
    """Ids of those that have one for their vector alone, where all dates are fitted on."""
    counts = collections.Counter(row[key] for row in samples.values())
    return {ids[key][raw] for raw in having_vectors(shop, key) if counts[raw] < MIN_COUNT}


def test_vocabularies_hold_what_is_common(later: Path, samples: dict, shop: Shop) -> None:
    """How they grow: tests/spark/test_many_scenarios.py, and with vectors test_item_features.py."""
    table = rows_of(later / "vocabularies")
    counts: dict[tuple[str, str], int] = collections.Counter()
    for row in filter(is_later, samples.values()):
        for feature in ("user_id", "item_id", "query"):
            if row[feature] is not None:
                counts[feature, row[feature]] += 1
    for feature in ("user_id", "item_id", "query"):
        always = having_vectors(shop, feature)
        mine = {value: counts[feature, value] for value in {v for f, v in counts if f == feature} | always}
        common = sorted((-count, value) for value, count in mine.items() if count >= MIN_COUNT)
        for_vectors = sorted((-count, value) for value, count in mine.items() if count < MIN_COUNT and value in always)
        wanted = [(value, -count) for count, value in (*common, *for_vectors)]
        found = sorted((r["id"], r["value"], r["count"]) for r in table if r["feature"] == feature)
        assert found == [(n + 2, value, count) for n, (value, count) in enumerate(wanted)]
    assert any(count < MIN_COUNT and value in having_vectors(shop, f) for (f, value), count in counts.items())
    assert any(count < MIN_COUNT and value not in having_vectors(shop, f) for (f, value), count in counts.items())
    assert counts["item_id", "never shown"] == 0


def test_tags_and_terms_equal_plain_python(samples: dict, shop: Shop, ids: dict) -> None:
    first = {i["id"]: i for i in sorted(shop.world.impressions, key=lambda i: (i["time"], i["known"]), reverse=True)}
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    lengths = collections.Counter()
    for key, row in samples.items():
        for name, values in lists_of(shop, first[key]).items():
            vocabulary = "term" if name.endswith("_terms") else name
            assert row[f"{name}_indices"] == [code(ids, vocabulary, value) for value in values], (key, name)
            counts[name].update(values)
            lengths[name, len(values)] += 1
    assert {name for name, n in lengths if n == 0} == {name for name, n in lengths if n > 1} == set(counts)
    counts["term"] = counts.pop("query_terms") + counts.pop("item_terms")
    for vocabulary, values in counts.items():
        # Each term of an impression counts once for the query and once for the item.
        wanted = sorted((-count, value) for value, count in values.items() if count >= MIN_COUNT)
        assert list(ids[vocabulary].items()) == [(value, n + 2) for n, (_, value) in enumerate(wanted)], vocabulary


def raw_numbers(shop: Shop, impression: dict[str, Any]) -> dict[str, float]:
    """Values of the fitted numbers of an impression, NaN where it has none."""
    user, item = shop.users.get(impression["user"], {}), shop.items.get(impression["item"], {})
    context = {} if impression["scenario"] == 2 else numbers_of(impression["id"])
    found = {"spent": user.get("spent"), "stock": item.get("stock"), "wait": None, "load": None} | context
    return {name: math.nan if value is None else value for name, value in found.items()}


@pytest.mark.parametrize("first_day", [0, LATER])
def test_fitted_scales_are_those_of_the_first_build_s_impressions(
    lake: Path, later: Path, shop: Shop, samples: dict, first_day: int
) -> None:
    """Against numpy on the raw values."""
    path = later if first_day else lake
    shown = {i["id"]: i for i in sorted(shop.world.impressions, key=lambda i: (i["time"], i["known"]), reverse=True)}
    late = [key for key, row in samples.items() if row["event_time"] >= moment(first_day * 24 * 60 * MINUTE)]
    values = {
        n: np.array([raw_numbers(shop, shown[key])[n] for key in late]) for n in ("spent", "stock", "wait", "load")
    }
    there = {name: found[~np.isnan(found)] for name, found in values.items()}
    spec = build_manifest(path, dates=None).spec
    dense = {f.name: f for f in spec.dense}
    rows = {row["impression_id"]: row for row in rows_of(path / "samples")}
    for name in ("spent", "load"):
        of = dense[name]
        assert (of.scale, of.mean, of.deviation) == (
            "standard",
            pytest.approx(there[name].mean(), rel=1e-8),
            pytest.approx(there[name].std(), rel=1e-8),
        )
    for name in ("stock", "wait"):
        quantiles = np.quantile(there[name], [0, 0.25, 0.5, 0.75])
        feature = spec.sparse_feature(name)
        assert feature.edges == pytest.approx(sorted({*quantiles} - {quantiles[0]}))
        assert feature.num_embeddings == 3 + len(feature.edges)
    for key, row in rows.items():
        for name, value in raw_numbers(shop, shown[key]).items():
            if name in dense:
                scaled = 0.0 if math.isnan(value) else (value - dense[name].mean) / dense[name].deviation
                assert row[f"{name}_scaled"] == float(np.float32(scaled)), (key, name)
            else:
                edges = spec.sparse_feature(name).edges
                number = 1 if math.isnan(value) else 2 + sum(edge <= np.float32(value) for edge in edges)
                assert row[f"{name}_index"] == number, (key, name)


def test_vectors_lie_once_by_encoded_id(lake: Path, shop: Shop, ids: dict, samples: dict) -> None:
    """Divided by the root mean square of the shop's, rounded to float16; whoever has one has an id."""
    manifest = build_manifest(lake, dates=None)
    found = read_vectors(manifest)
    for name, key, rows in (("face", "user_id", shop.users), ("look", "item_id", shop.items)):
        vectors = {raw: np.array(row[name], np.float32) for raw, row in rows.items() if row[name] is not None}
        scale = float(np.sqrt(np.mean(np.concatenate(list(vectors.values())).astype(np.float64) ** 2)))
        (of_spec,) = (v.scale for v in manifest.spec.vectors if v.name == name)
        assert of_spec == pytest.approx(scale, rel=1e-8)
        expected = np.zeros((manifest.spec.sparse_feature(key).num_embeddings, len(next(iter(vectors.values()))) + 1))
        expected[:, -1] = 1
        for raw, vector in vectors.items():
            expected[ids[key][raw]] = [*(vector.astype(np.float64) / of_spec).astype(np.float16), 0]
        assert found[name].tolist() == expected.tolist()
        assert {0.0, 1.0} == set(found[name][2:, -1].tolist())
        assert set(np.flatnonzero(read_cold(manifest)[key])) == cold_of(shop, samples, ids, key)
    cold = cold_of(shop, samples, ids, "item_id")
    assert ids["item_id"]["never shown"] in cold
    assert sum(row["item_id_index"] in cold for row in samples.values()) > 5
    assert sum(bool(cold & {*row[f"{s}_history_item_ids"]}) for row in samples.values() for s in SCENARIOS) > 5


def test_the_feature_spec_fits_the_table(lake: Path, samples: dict, ids: dict) -> None:
    properties = deltalake.DeltaTable(lake / "samples").metadata().configuration
    spec = FeatureSpec.from_json(properties[FEATURE_SPEC_PROPERTY])
    names = ["user_id", "item_id", "query", "event_hour", "city", "brand", "device", "stock", "wait"]
    assert [f.name for f in spec.sparse] == names
    for feature in spec.sparse[:-2]:
        largest = max(ids[feature.name].values()) if feature.name != "event_hour" else 25
        assert feature.num_embeddings == largest + 1
        assert max(row[feature.column] for row in samples.values()) < feature.num_embeddings
    assert spec.label_delay_us == 360 * MINUTE
    assert (spec.scenarios, spec.query_scenarios, spec.history_length) == (SCENARIOS, ("search",), 4)


def test_rejects_are_the_oracle_s_and_the_broken_rows(lake: Path, wanted: Expected) -> None:
    rows = rows_of(lake / "rejects")
    found = collections.Counter()
    for row in rows:
        raw = json.loads(row["row"])
        kind = "click" if row["log"].endswith("clicks") else "order"
        key = (kind, raw.get(f"{kind}_id"), raw.get("item_id"))
        if key in wanted.rejects:
            assert row["reason"] == wanted.rejects[key], key
            found["attribution"] += 1
        else:
            found[row["log"], row["reason"], str(row["date"])] += 1
    assert found.pop("attribution") == len(wanted.rejects) > 50
    day = str(DATES[0])
    assert found == {
        ("search_impressions", "null_impression_id", day): 1,
        ("search_impressions", "null_user_id", "None"): 1,
        ("feed_clicks", "null_item_id", day): 1,
        ("orders", "null_event_time", "None"): 1,
    }
    assert len(set(wanted.rejects.values())) == 8  # every reason there is


def test_reports_add_up(lake: Path, shop: Shop, wanted: Expected, samples: dict, ids: dict) -> None:
    reports = [json.loads((lake / "reports" / f"{date}.json").read_text()) for date in DATES]
    logs = logs_of(shop)
    for log, rows in logs.items():
        if not rows:
            continue
        totals = collections.Counter()
        for counts in [r["rows"].get(log, {}) for r in reports] + [reports[0]["undated"]["rows"].get(log, {})]:
            totals.update(counts)
        if log not in ("users", "items"):  # clicks and orders may fall behind the last built day
            late = sum(1 for r in rows if r["event_time"] is not None and r["event_time"].date() not in DATES)
            assert totals["rows_in"] == len(rows) - late
        assert totals["rows_in"] == totals["used"] + totals["duplicates"] + totals["rejects"]
    duplicates = sum(
        c.get("duplicates", 0) for r in reports for log, c in r["rows"].items() if log.endswith("impressions")
    )
    assert duplicates == wanted.duplicates["impressions"] > 20
    not_seen = {of: {1} | cold_of(shop, samples, ids, f"{of}_id") for of in ("item", "user")}
    for report in reports:
        rows = [s for s in samples.values() if str(s["impression_date"]) == report["date"]]
        assert report["samples"] == len(rows)
        covered = sum(r["item_id_index"] not in not_seen["item"] for r in rows) / len(rows)
        assert report["vocabulary_coverage"]["item_id"] == covered
        for scenario in SCENARIOS:
            mine = [r for r in rows if r["scenario"] == scenario]
            clicks, union = sum(r["is_click"] for r in mine), sum(r["is_click_global"] for r in mine)
            found = report["scenarios"][scenario]
            assert found["impressions"] == len(mine)
            assert found["click_rate"] == clicks / len(mine)
            assert found["p_click_given_click_global"] == clicks / union
            cold = report["cold_start"][scenario]
            for of in ("item", "user"):
                assert cold[f"unknown_{of}"] == sum(r[f"{of}_id_index"] in not_seen[of] for r in mine), of
            events = [sum(len(r[f"{s}_history_actions"]) for s in SCENARIOS) for r in mine]
            assert cold["no_history"] == events.count(0)
            asked = [r["query_index"] for r in mine if r["query"] is not None]
            assert (cold["unknown_query"], cold["with_query"]) == (asked.count(1), len(asked))
            assert cold["share"]["unknown_query"] == (asked.count(1) / len(asked) if asked else None)
            assert (cold["new_user"], cold["new_item"]) == (0, 0), "every date is fitted on"
    unknown = sum(r["cold_start"][s]["unknown_item"] for r in reports for s in SCENARIOS)
    assert unknown > 20


def stores_of(lake: Path, folder: Path) -> tuple[Encoder, ItemTable, UserStore]:
    """What a service would read, of a lake without a model."""
    manifest = build_manifest(lake, dates=(DATES[0], DATES[-1]))
    entries, indexes = read_vocabularies(lake), {}
    for number, name in enumerate(manifest.spec.vocabularies):
        part = entries.filter(pc.equal(entries["feature"], name))
        if part.num_rows:
            ValueIndex.write(folder / f"{number}.arrow", part["value"].to_pylist(), part["id"].to_numpy())
            indexes[name] = ValueIndex(folder / f"{number}.arrow")
    encoder = Encoder(manifest.spec, indexes, None)
    write_items(folder, manifest, encoder)
    write_users(folder, manifest, read_events(lake)[0], encoder, as_of_us=None)
    return encoder, ItemTable(folder), UserStore(folder, encoder)


def columns_of(inputs: dict, spec: FeatureSpec) -> dict[str, Any]:
    """Inputs of one candidate by the columns of the samples; histories without their padding."""
    found = {}
    for kind, features in (("sparse", spec.sparse), ("dense", spec.dense)):
        for owner in ("item", "request"):
            mine = [f.column for f in features if (f.owner == "item") == (owner == "item")]
            found |= dict(zip(mine, inputs[f"{owner}_{kind}"][0].tolist(), strict=True))
    for feature in spec.lists:
        ids = inputs[feature.column][0].tolist()
        num_values = sum(number > 0 for number in ids)
        assert not any(ids[num_values:])
        found[feature.column] = ids[:num_values]
    for history in spec.histories:
        num_events = int((inputs[history.actions] > 0).sum())
        for name in (history.item_ids, history.actions, history.ages_s, history.query_ids):
            if name is not None:
                values = inputs[name][0].tolist()
                assert not any(values[: len(values) - num_events])
                found[name] = values[len(values) - num_events :]
    return found


def test_a_request_of_raw_values_is_encoded_as_its_sample(
    lake: Path, samples: dict, shop: Shop, ids: dict, tmp_path: Path
) -> None:
    """The service's encoder and stores against the build, on the logs' own values: bit for bit."""
    encoder, items, users = stores_of(lake, tmp_path)
    raw = {(i["id"], moment(i["time"])): i for i in shop.world.impressions}
    num_events = 0
    for key, row in samples.items():
        shown = raw[key, row["event_time"]]
        found = users.get(shown["user"])
        assert found is not None
        rows = shop.users.get(shown["user"], {}), shop.items.get(shown["item"], {})
        # Vectors are no values of a request: the program has them by id.
        given = [{n: value for n, value in of.items() if n not in ("face", "look")} for of in rows]
        user, item = encoder.profile("user", given[0]), encoder.profile("item", given[1])
        item_ids, of_items, is_new = items.find([shown["item"]], encoder)
        assert (found[1].ids.tolist(), found[1].numbers.tolist()) == (user.ids.tolist(), user.numbers.tolist())
        assert (of_items.ids[0].tolist(), of_items.numbers[0].tolist()) == (item.ids.tolist(), item.numbers.tolist())
        assert not is_new[0]
        context = {"device": shown["device"], "depth": None if shown["scenario"] == 2 else shown["depth"]}
        if shown["scenario"] != 2:
            context |= {"moods": moods_of(shown["id"]), **numbers_of(shown["id"])}
        inputs = encoder.inputs(
            scenario=shown["scenario"],
            time_us=START_US + micros(row["event_time"]),
            user_id=shown["user"],
            query=shown["query"],
            user=user,
            context=encoder.profile("context", context),
            events=found[0],
            items=(item_ids, of_items),
        )
        for name, value in columns_of(inputs, encoder.spec).items():
            assert value == row[name], (key, name)
        num_events += sum(len(row[f"{s}_history_actions"]) for s in SCENARIOS)
    assert num_events > 500
    assert users.get("nobody") is None
    item_ids, _, is_new = items.find(["never shown", "nothing"], encoder)
    assert item_ids.tolist() == [ids["item_id"]["never shown"], 1], "it has an id, and so its vector"
    assert is_new.tolist() == [True, True]


def test_hashed_ids_are_spark_s(spark: SparkSession, lake: Path) -> None:
    """And those of xxHash64's specification."""
    values = ["a", "größe", "日本語", "🙂", "x" * 20_000, "0", " ", "tea", "ß🛒 \u202e\u0643\u062a \U0001d4d0"]
    settings = config('vocabulary.kind="hash"', "vocabulary.num_buckets=1000").vocabulary
    rows = spark.createDataFrame([(n, v) for n, v in enumerate(values)], "n int, value string")
    wanted = [r["id"] for r in rows.select("n", hash_index(F.col("value"), settings).alias("id")).sort("n").collect()]
    spec = build_manifest(lake, dates=(DATES[0], DATES[-1])).spec
    assert Encoder(spec, {}, 1000).ids("query", [*values, None]).tolist() == [*wanted, 0]
    assert xxh64(b"", seed=0) == 0xEF46DB3751D8E999 - (1 << 64)
    assert wanted == [2 + xxh64(value.encode(), seed=42) % (1000 - 2) for value in values]


def test_a_rerun_on_the_state_gives_the_same_tables_in_other_partitions_too(
    spark: SparkSession, lake: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And replaces the files of its dates alone."""

    def content() -> dict[str, list[str]]:
        tables = ("samples", "rejects", "vocabularies", "state", "item_features", "user_vectors", "item_vectors")
        found = {table: sorted(map(str, rows_of(lake / table))) for table in tables}
        reports = [json.loads((lake / "reports" / f"{date}.json").read_text()) for date in DATES]
        return found | {"reports": [str({**report, "table_version": None}) for report in reports]}

    def files() -> set[str]:
        return set(deltalake.DeltaTable(lake / "samples").file_uris())

    before, version, old = content(), table_version(spark, str(lake / "samples")), files()
    by_id = [table_version(spark, str(lake / name)) for name in ("item_features", "user_vectors", "item_vectors")]
    monkeypatch.setattr("etl.build.inputs.MAX_ROWS_PER_TASK", 90)  # more than ten tasks instead of two
    spark.conf.set("spark.sql.shuffle.partitions", "5")
    spark.conf.set("spark.sql.autoBroadcastJoinThreshold", "-1")
    try:
        lines = build(spark, logs, lake, 1, 2)
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", "2")
        spark.conf.set("spark.sql.autoBroadcastJoinThreshold", str(32 << 20))
    assert any(f"events before {DATES[1]} are known" in line for line in lines)
    assert table_version(spark, str(lake / "samples")) == version + 1
    assert content() == before
    assert by_id == [
        table_version(spark, str(lake / name)) for name in ("item_features", "user_vectors", "item_vectors")
    ], "nothing has changed, nothing is written"
    assert {Path(path).parent.name for path in old ^ files()} == {f"impression_date={date}" for date in DATES[1:3]}
    assert all(Path(path).exists() for path in old), "for those who read the version before"
