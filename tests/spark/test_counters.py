"""Counters of a random shop against the slow oracle: day by day on the sums of earlier days, and restated."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from etl.build.report import read_reports
from etl.build.restate import RestateRequest, restate_samples
from etl.build.samples import Progress
from etl.build.state import State, find_state
from etl.features.counters import counter_fingerprints, counter_rows
from etl.kernel.counters import Sums, count_rows
from etl.lake.tables import Lake
from tests.etl_oracle import DAY, Row, World, counted, counters, unique
from tests.spark.conftest import build_wide
from tests.spark.shop import CONFIG, DAYS, SCENARIOS, START, WINDOWS, Shop, logs_of, moment, random_shop, write_logs
from tests.spark.test_build_samples import DATES, WATERMARK, rows_of
from usr_ray.config import day_number, load_config
from usr_ray.daily_sums import key_parts, key_parts_joined
from usr_ray.data.events import read_events
from usr_ray.data.manifest import build_manifest
from usr_ray.serving.counters import Counters, lake_counters
from usr_ray.serving.encode import Encoder, ValueIndex
from usr_ray.serving.stores import ItemTable, UserStore, write_items, write_users

pytestmark = pytest.mark.spark

EVERY = ("impressions", "clicks", "orders", "ctr", "cvr")
WANTED = (
    ("item", ("item_id",), False, ("1d", "2d", "all"), EVERY),
    ("user_brand", ("user_id", "brand"), True, ("2d", "all"), EVERY),
    ("typed", ("query",), True, ("all", "1d"), ("clicks", "impressions", "ctr")),
    ("mixed", ("device", "brand", "city"), False, ("all",), ("impressions", "orders")),
    ("brand", ("brand",), True, ("1d",), ("cvr",)),
    ("device", ("device",), True, ("1d",), ("clicks",)),
    ("query_item", ("query", "item_id"), False, ("all",), ("clicks",)),
)
"""Name, keys, per_scenario, windows, columns."""


def _listed(names: tuple[str, ...]) -> str:
    return json.dumps(names)


def _events(whats: tuple[str, ...]) -> tuple[str, ...]:
    """The counts, which have their rates besides; the rates where there are no counts."""
    return tuple(what for what in whats if what not in ("ctr", "cvr")) or whats


COUNTERS = (
    "counters.prior=5",
    *(f"counters.{name}.keys={_listed(keys)}" for name, keys, *_ in WANTED),
    *(f"counters.{name}.per_scenario={str(per_scenario).lower()}" for name, _, per_scenario, *_ in WANTED),
    *(f"counters.{name}.windows={_listed(windows)}" for name, _, _, windows, _ in WANTED),
    *(f"counters.{name}.events={_listed(_events(whats))}" for name, _, _, _, whats in WANTED),
)
Found = dict[str, dict[str, float]]


def found_in(lake: Path) -> Found:
    """impression_id -> the counters' columns."""
    rows = rows_of(lake / "samples")
    return {row["impression_id"]: {c: v for c, v in row.items() if c.startswith("counter_")} for row in rows}


def known_of(shop: Shop, world: World) -> dict[str, Row]:
    """impression_id -> the values of everything that counters count by."""
    return {
        i["id"]: {
            "user_id": i["user"],
            "item_id": i["item"],
            "query": i["query"],
            "device": i["device"],
            "brand": shop.items.get(i["item"], {}).get("brand"),
            "city": shop.users.get(i["user"], {}).get("city"),
        }
        for i in unique(world.impressions, ("id",))
    }


def wanted_of(shop: Shop, world: World) -> Found:
    known = known_of(shop, world)
    past = [event | known[event["id"]] for event in counted(world, WINDOWS)]
    found: Found = {}
    for i in unique(world.impressions, ("id",)):
        columns = found[i["id"]] = {}
        for name, keys, per_scenario, windows, whats in WANTED:
            own = {key: known[i["id"]][key] for key in keys}
            for window in windows:
                days = None if window == "all" else int(window[:-1])
                of_row = counters(past, own, i["scenario"] if per_scenario else None, i["time"] // DAY, days, 5.0)
                columns |= {f"counter_{name}_{window}_{what}": of_row[what] for what in whats}
    return found


def sums_of(shop: Shop, world: World) -> dict[tuple, list[int]]:
    """Rows of the table, without those of whole scenarios: of the days that are built, whenever they were known."""
    known = known_of(shop, world)
    sums: dict[tuple, list[int]] = {}
    for event in counted(world, WINDOWS):
        # The last two tell the service what a user or an item is.
        for keys in {keys for _, keys, *_ in WANTED} | {("user_id", "city"), ("item_id", "brand")}:
            values = [known[event["id"]][key] for key in keys]
            if None not in values and event["event_day"] < DAYS:
                place = ":".join(keys), "|".join(values), event["day"], event["event_day"], SCENARIOS[event["scenario"]]
                sums.setdefault(place, [0, 0, 0])[event["what"]] += 1
    return sums


def table_of(lake: Path) -> dict[tuple, list[int]]:
    def day_of(date: dt.date) -> int:
        return (date - START.date()).days

    rows = [row for row in rows_of(lake / "counters") if row["name"] != "*"]
    found = {
        (r["name"], r["key"], day_of(r["date"]), day_of(r["event_date"]), r["scenario"]): [
            r["impressions"],
            r["clicks"],
            r["orders"],
        ]
        for r in rows
    }
    assert len(found) == len(rows)
    return found


def assert_equal(found: Found, wanted: Found) -> None:
    assert found.keys() == wanted.keys()
    for key, columns in wanted.items():
        assert found[key].keys() == columns.keys()
        assert found[key] == pytest.approx(columns, abs=1e-5), key


@pytest.fixture(scope="module")
def shop() -> Shop:
    """More than half of all impressions are of one item."""
    shop = random_shop(41, num_impressions=240)
    for row in shop.world.orders:  # lines of one order stay two lines
        row["id"] += f"-{row['item']}"
    for row in (*shop.world.impressions, *shop.world.clicks, *shop.world.orders):
        row["item"] = "4" if row["item"] in ("0", "1", "2", "3", "5", "6") else row["item"]
    shown = unique(shop.world.impressions, ("id",))
    assert sum(row["item"] == "4" for row in shown) > len(shown) / 2
    return shop


@pytest.fixture(scope="module")
def fewer(shop: Shop) -> World:
    """A tenth of the first day's impressions and clicks is missing."""
    rng = np.random.default_rng(0)

    def early(rows: list[Row]) -> list[Row]:
        late = {row["id"] for row in rows if row["time"] < DAY and rng.random() < 0.1}
        assert late
        return [row for row in rows if row["id"] not in late]

    return World(early(shop.world.impressions), early(shop.world.clicks), shop.world.orders)


@pytest.fixture(scope="module")
def daily(spark: SparkSession, shop: Shop, fewer: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days 0 and 1, then 2 and 3 on the state and the sums of the days before, in other partitions."""
    folder = tmp_path_factory.mktemp("counters")
    lake, logs = folder / "lake", write_logs(logs_of(replace(shop, world=fewer)), folder / "logs")
    build_wide(spark, logs, lake, "vocabulary.min_count=9", *COUNTERS, first=0, last=1)
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", "5")
    lines = build_wide(spark, logs, lake, "vocabulary.min_count=9", *COUNTERS, first=2, last=3)
    assert f"events before {DATES[2]} are known" in " ".join(lines)
    spark.conf.set("spark.sql.shuffle.partitions", str(before))
    return lake


def test_days_that_are_built_on_the_sums_of_earlier_ones_equal_the_oracle(
    daily: Path, shop: Shop, fewer: World
) -> None:
    wanted = wanted_of(shop, fewer)
    assert_equal(found_in(daily), wanted)
    values = [value for columns in wanted.values() for value in columns.values()]
    assert len(set(values)) > 100, "the world is not trivial"
    first = {i["id"] for i in fewer.impressions if i["time"] < DAY} & wanted.keys()
    assert all(not any(wanted[key].values()) for key in first), "nothing lies before the first day"
    spec = build_manifest(daily, dates=(DATES[0], DATES[3])).spec
    owners = {f.name: f.owner for f in spec.dense if f.name.startswith("counter_")}
    assert len(owners) == 15 + 10 + 6 + 2 + 1 + 1 + 1
    assert (owners["counter_item_2d_ctr"], owners["counter_typed_1d_clicks"]) == ("item", "query")


def test_the_table_holds_the_sums_of_each_day(daily: Path, shop: Shop, fewer: World) -> None:
    found = table_of(daily)
    assert found == sums_of(shop, fewer)
    assert any(place[2] > place[3] for place in found), "some were known later"


@pytest.mark.parametrize("first", [None, 2])
def test_a_request_has_the_counters_of_its_row_bit_for_bit(
    daily: Path, shop: Shop, fewer: World, tmp_path: Path, first: int | None
) -> None:
    """Of a store for a replay, and of one that was published at the beginning of the third day."""
    manifest = build_manifest(daily, dates=(DATES[0], DATES[3]))
    as_of_us = None if first is None else int(moment(first * DAY).timestamp()) * 1_000_000
    counted, _ = lake_counters(tmp_path, daily, manifest.spec, manifest.built_with, as_of_us=as_of_us)
    store = Counters(tmp_path)
    for name in ("city", "brand"):
        values = [row for row in rows_of(daily / "vocabularies") if row["feature"] == name]
        ValueIndex.write(tmp_path / name, [row["value"] for row in values], np.array([row["id"] for row in values]))
    vocabularies = {name: ValueIndex(tmp_path / name) for name in ("city", "brand")}
    encoder = Encoder(manifest.spec, vocabularies, None, store.indexes)
    write_items(tmp_path, manifest, encoder, counted)
    write_users(tmp_path, manifest, read_events(daily)[0], encoder, as_of_us=None, counted=counted)
    items, users, known = ItemTable(tmp_path), UserStore(tmp_path, encoder), known_of(shop, fewer)
    num_compared = 0
    for row in rows_of(daily / "samples"):
        if row["event_time"] < moment((first or 0) * DAY).replace(tzinfo=row["event_time"].tzinfo):
            continue
        raw = known[row["impression_id"]]
        profiles = {
            "user": users.get(row["user_id"])[1],
            "context": encoder.profile("context", {"device": raw["device"]}),
            "item": items.find([row["item_id"]], encoder)[1],
        }
        time_us = int(row["event_time"].timestamp() * 1e6)
        found = store.values(encoder, SCENARIOS.index(row["scenario"]), time_us, row["query"], profiles)
        for name, values in found.items():
            assert values.tolist() == [row[name]], (row["impression_id"], name)
            num_compared += row[name] != 0
    assert num_compared > 500


def test_vocabularies_hold_nothing_of_the_counters(daily: Path) -> None:
    assert {row["feature"] for row in rows_of(daily / "vocabularies")} <= {
        *("user_id", "item_id", "query", "city", "brand", "device")
    }


def test_late_rows_restate_the_days_that_count_them(
    spark: SparkSession, shop: Shop, daily: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(daily, lake)
    logs = write_logs(logs_of(shop), tmp_path / "logs")
    request = RestateRequest(logs=str(logs), lake=Lake(str(lake)), watermark=WATERMARK)
    settings = load_config(None, (*CONFIG, "vocabulary.min_count=9", *COUNTERS))
    touched = restate_samples(spark, settings, request, Progress(write=[].append))
    assert_equal(found_in(lake), wanted_of(shop, shop.world))
    assert table_of(lake) == sums_of(shop, shop.world)
    assert "counters" not in touched[DATES[0].isoformat()], "nothing is counted before the first day"
    assert all("counters" in touched[DATES[day].isoformat()] for day in (1, 2, 3)), '"all" sees every earlier day'
    # What the reports say now is what another restate would find.
    table = spark.read.format("delta").load(str(lake / "counters"))
    seen = counter_fingerprints(table, settings, [day_number(date) for date in DATES])
    reports = read_reports(spark, Lake(str(lake)))
    assert {date: report["fingerprint"]["counters"] for date, report in reports.items()} == seen


def test_sums_that_somebody_changed_or_lost_are_not_trusted(spark: SparkSession, daily: Path, tmp_path: Path) -> None:
    shutil.copytree(daily, tmp_path / "lake")
    lake, settings = Lake(str(tmp_path / "lake")), load_config(None, (*CONFIG, *COUNTERS))
    assert find_state(spark, settings, lake, DATES[3]).since == DATES[3]
    spark.sql(f"OPTIMIZE delta.`{lake.root}/counters`")
    assert find_state(spark, settings, lake, DATES[3]).since == DATES[3]
    spark.sql(f"DELETE FROM delta.`{lake.root}/counters` WHERE name = 'query'")
    assert find_state(spark, settings, lake, DATES[3]) == State()
    shutil.rmtree(tmp_path / "lake" / "counters")
    assert find_state(spark, settings, lake, DATES[3]) == State()


def test_what_the_sums_tell_of_an_item_is_joined_as_values_are(spark: SparkSession) -> None:
    """Nothing counts by the item alone: its sums are there with its brand only, once a scenario and day."""
    brands = {"a": "x", "a|b": "x|y", "a\\": "\\|", "|": "\\\\", "none": None, "gone": "x"}
    items = [*brands][:-1]
    code, day = np.repeat(np.arange(len(items)), 2), np.tile([1, 2], len(items))
    sums = Sums(code=code, scenario=code % 2, event_day=day, day=day, counts=np.column_stack([code, day, day]))
    counted = pa.Table.from_batches(count_rows({"item_id": sums}, {"item_id": pa.array(items)}))
    tables = {"item": spark.createDataFrame([*brands.items()], "item_id string, brand string")}
    config = load_config(None, (*CONFIG, "counters.b.keys=['brand']"))
    frame = spark.createDataFrame(counted.select(["feature", "table"]))
    rows = counter_rows(config, frame, tables).collect()
    assert {row["name"] for row in rows} == {"item_id:brand"}
    shown = [item for item in items if brands[item]]
    wanted = key_parts_joined([pa.array(shown), pa.array([brands[item] for item in shown])])
    assert [part.to_pylist() for part in key_parts(wanted, 2)] == [shown, [brands[item] for item in shown]]
    epoch = dt.date(1970, 1, 1)
    assert sorted((row["key"], row["date"], row["event_date"], row["scenario"], *row[5:]) for row in rows) == sorted(
        (key, date, date, SCENARIOS[items.index(item) % 2], items.index(item), n, n)
        for key, item in zip(wanted.to_pylist(), shown, strict=True)
        for n, date in ((n, epoch + dt.timedelta(days=n)) for n in (1, 2))
    )
