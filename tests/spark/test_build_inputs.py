"""What the build accepts and refuses: formats, ids as integers, hashing, training dates, and every user's error."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from etl.build.inputs import Inputs
from etl.build.report import count_samples, mark_new
from etl.build.samples import BuildRequest, Progress, _dates_there, build_samples
from etl.build.silence import Hour
from etl.checks import DataCheckError
from etl.lake.tables import Lake
from tests.etl_oracle import xxh64
from tests.spark.shop import CONFIG, Shop, logs_of, write_logs
from tests.spark.test_build_samples import DATES, WATERMARK, rows_of
from usr_ray.config import UserError, load_config
from usr_ray.data.manifest import open_samples

pytestmark = pytest.mark.spark

SMALL = "vocabulary.min_count=2"


def build(
    spark: SparkSession,
    logs: Path,
    lake: Path,
    *overrides: str,
    first: int = 0,
    last: int = 3,
    watermark: dt.datetime = WATERMARK,
) -> list[str]:
    lines: list[str] = []
    request = BuildRequest(
        logs=str(logs), lake=Lake(str(lake)), first=DATES[first], last=DATES[last], watermark=watermark
    )
    build_samples(spark, load_config(None, (*CONFIG, SMALL, *overrides)), request, Progress(write=lines.append))
    return lines


def content(lake: Path) -> list[tuple]:
    return sorted(tuple(str(v) for v in row.values()) for row in rows_of(lake / "samples"))


@pytest.fixture(scope="module")
def shop(wide_shop: Shop) -> Shop:
    return wide_shop


@pytest.fixture(scope="module")
def logs(wide_logs: Path) -> Path:
    return wide_logs


@pytest.fixture(scope="module")
def lake(wide_lake: Path) -> Path:
    return wide_lake


def test_csv_json_lines_delta_and_integer_ids_give_the_same_table_and_unreadable_times_are_rejected(
    spark: SparkSession, shop: Shop, logs: Path, lake: Path, tmp_path: Path
) -> None:
    """A scenario a format, orders and features in two: every kind of log is once in text."""
    everything = logs_of(shop)
    csv = {log: rows for log, rows in everything.items() if log.startswith("search") or log == "users"}
    lines = {log: rows for log, rows in everything.items() if log.startswith("feed")}
    mixed = write_logs(csv, tmp_path / "mixed", "csv")
    for path in write_logs(lines, tmp_path / "lines", "json").iterdir():
        path.rename(mixed / path.name)
    with (mixed / "search_clicks.csv").open("a") as file:
        file.write('"x9","","u1","3","the day before yesterday","2026-01-01T00:00:00"\n')
        file.write('"x8","","u1","3","2026-01-01T00:00:00","soon"\n')
    left = [folder for folder in logs.iterdir() if folder.name not in {**csv, **lines}]
    assert {"related_impressions", "related_clicks", "orders", "items"} <= {folder.name for folder in left}
    for folder in left:
        whole = pq.read_table(folder)
        place = whole.schema.get_field_index("item_id")
        whole = whole.set_column(place, "item_id", whole["item_id"].cast(pa.int32()))
        (tmp_path / folder.name).mkdir()
        pq.write_table(whole, tmp_path / folder.name / "a.parquet")
        frame = spark.read.parquet(str(tmp_path / folder.name))
        frame.write.format("parquet" if folder.name == "items" else "delta").save(str(mixed / folder.name))
    build(spark, mixed, tmp_path / "lake")
    assert content(tmp_path / "lake") == content(lake)
    rejects = {row["reason"]: row for row in rows_of(tmp_path / "lake" / "rejects") if row["log"] == "search_clicks"}
    assert '"event_time":"the day before yesterday"' in rejects["unparsable_event_time"]["row"]
    assert rejects["unparsable_event_time"]["date"] is None
    assert rejects["unparsable_ingest_time"]["date"] == dt.date(2026, 1, 1)


def test_sums_by_hour_are_those_of_the_rows(spark: SparkSession, lake: Path) -> None:
    """What hours without a click are found by (etl/build/silence.py)."""
    table = spark.read.format("delta").load(str(lake / "samples"))
    spec = open_samples(str(lake)).spec
    config = load_config(None, CONFIG)
    found = count_samples(mark_new(table, table, config, DATES), spec, hashed=False).hours
    expected: dict[tuple[dt.datetime, str], list[int]] = {}
    for row in rows_of(lake / "samples"):
        hour = row["event_time"].astimezone(dt.UTC).replace(minute=0, second=0, microsecond=0)
        mature = int(row["is_mature"])
        sums = expected.setdefault((hour, row["scenario"]), [0, 0, 0, 0])
        for place, value in enumerate((1, row["is_click"], mature, mature * row["is_order"])):
            sums[place] += int(value)
    assert found == {key: Hour(*sums) for key, sums in expected.items()}
    assert (
        0
        < sum(sums.mature_orders for sums in found.values())
        < sum(row["is_order"] for row in rows_of(lake / "samples"))
    )


def test_hashed_ids_need_no_vocabulary_and_spread_over_the_buckets(shop: Shop, hashed_lake: Path, lake: Path) -> None:
    """Items that share an id: item_features has the smallest raw id's row."""
    assert not (hashed_lake / "vocabularies").exists()
    hashed = {row["impression_id"]: row for row in rows_of(hashed_lake / "samples")}
    report = json.loads((hashed_lake / "reports" / f"{DATES[3]}.json").read_text())["cold_start"]["search"]
    assert (report["unknown_item"], report["share"]["unknown_user"]) == (None, None), "a hashed id is never unknown"
    assert report["no_history"] is not None
    by_value: dict[str, set[int]] = {}
    for key, row in {row["impression_id"]: row for row in rows_of(lake / "samples")}.items():
        mine = hashed[key]
        assert mine["is_click_global"] == row["is_click_global"]
        for feature in ("user_id", "item_id", "query", "device"):
            value = mine.get(feature, row["device_index"])  # device has no raw column; its fitted id stands for it
            by_value.setdefault(f"{feature} {value}", set()).add(mine[f"{feature}_index"])
            assert (mine[f"{feature}_index"] == 0) == (value in (None, 0))
    assert all(len(found) == 1 for found in by_value.values())
    assert {n for found in by_value.values() for n in found} == {0, *range(2, 9)}
    items = {row["item_id"]: row["item_id_index"] for row in hashed.values()}
    for row in hashed.values():
        for scenario in ("search", "feed", "related"):
            assert set(row[f"{scenario}_history_item_ids"]) <= set(items.values())
    assert items == {item: 2 + xxh64(item.encode(), seed=42) % 7 for item in items}

    texts = sorted({*shop.items, "a", "b"})
    ids = {text: 2 + xxh64(text.encode(), seed=42) % 7 for text in texts}
    wanted: dict[int, int] = {}
    for item in sorted(shop.items):
        brand = shop.items[item]["brand"]
        wanted.setdefault(ids[item], 0 if brand is None else ids[brand])
    found = {row["item_id_index"]: row["brand_index"] for row in rows_of(hashed_lake / "item_features")}
    assert found == wanted
    assert len(wanted) < len(shop.items)


def test_vocabularies_are_fitted_on_the_training_dates_and_a_giant_user_s_day_is_taken_out_and_listed(
    spark: SparkSession, shop: Shop, logs: Path, tmp_path: Path
) -> None:
    limit = "limits.max_user_events_per_day=8"
    build(spark, logs, tmp_path / "lake", f"data.train_dates='{DATES[0]}:{DATES[1]}'", limit)
    rows = rows_of(tmp_path / "lake" / "samples")
    shown: dict[str, int] = {}
    for row in rows:
        if row["impression_date"] in DATES[:2]:
            shown[row["item_id"]] = shown.get(row["item_id"], 0) + 1
    found = {r["value"]: r["count"] for r in rows_of(tmp_path / "lake" / "vocabularies") if r["feature"] == "item_id"}
    assert found == {item: count for item, count in shown.items() if count >= 2}
    assert {r["item_id_index"] == 1 for r in rows if r["item_id"] not in found} == {True}
    assert json.loads(open_samples(tmp_path / "lake").fitted) == {
        "dates": f"{DATES[0]}:{DATES[1]}",
        "min_count": 2,
    }
    users = {row["user_id"] for row in rows if row["impression_date"] in DATES[:2]}
    reports = [json.loads((tmp_path / "lake" / "reports" / f"{date}.json").read_text()) for date in DATES]
    for place, (date, report) in enumerate(zip(DATES, reports, strict=True)):
        cells = report["cold_start"].values()
        mine = [row for row in rows if row["impression_date"] == date]
        new = [row for row in mine if row["item_id"] not in shown]
        assert sum(cell["new_item"] for cell in cells) == len(new)
        assert sum(cell["new_user"] for cell in cells) == sum(row["user_id"] not in users for row in mine)
        assert bool(new) == (place >= 2)

    capped = [row for row in rows_of(tmp_path / "lake" / "rejects") if row["reason"] == "over_user_limit"]
    days = {(json.loads(row["row"])["user_id"], row["date"]) for row in capped}
    assert 0 < len(days) < 40
    assert not days & {(row["user_id"], row["impression_date"]) for row in rows}
    lost = sum(json.loads(row["row"])["rows"] for row in capped if row["log"].endswith("impressions"))
    assert len(rows) + lost == len({i["id"] for i in shop.world.impressions})
    counted = sum(of_log.get("over_user_limit", 0) for report in reports for of_log in report["rejects"].values())
    assert counted == sum(json.loads(row["row"])["rows"] for row in capped if row["date"] in DATES)


def change(folder: Path, log: str, edit: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(folder / log)
    shutil.rmtree(folder / log)
    (folder / log).mkdir()
    pq.write_table(edit(table), folder / log / "a.parquet")


def edit_file(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Change one file of a log, as a collector does between two days."""
    pq.write_table(edit(pq.ParquetFile(path).read()), path)


def retyped(column: str, values: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.schema.get_field_index(column), column, pa.array([values] * t.num_rows))


def spoil(what: str, folder: Path) -> None:
    """Break one thing of a folder of logs."""
    if what == "no folder":
        shutil.rmtree(folder)
    elif what == "missing log":
        shutil.rmtree(folder / "feed_clicks")
    elif what == "no orders at all":
        for path in folder.glob("*orders"):
            shutil.rmtree(path)
    elif what == "missing users":
        shutil.rmtree(folder / "users")
    elif what == "missing column":
        change(folder, "orders", lambda t: t.drop_columns(["item_id"]))
    elif what == "missing feature":
        change(folder, "items", lambda t: t.drop_columns(["price"]))
    elif what == "missing context":
        for log in ("search", "feed", "related"):
            change(folder, f"{log}_impressions", lambda t: t.drop_columns(["device"]))
    elif what == "time as number":
        change(folder, "search_impressions", retyped("event_time", 1.5))
    elif what == "id as number":
        change(folder, "search_clicks", retyped("user_id", 1.5))
    elif what == "position as text":
        change(folder, "feed_impressions", retyped("position", True))
    elif what == "feature as list":
        change(folder, "users", retyped("city", ["a"]))
    elif what == "two formats":
        (folder / "feed_clicks" / "b.csv").write_text("click_id\n")
    elif what == "unknown format":
        shutil.rmtree(folder / "feed_clicks")
        (folder / "feed_clicks").mkdir()
        (folder / "feed_clicks" / "a.xlsx").write_text("")
    elif what == "twice":
        (folder / "orders.csv").write_text("order_id\n")
    elif what == "not parquet":
        (folder / "users" / "a.parquet").write_text("no parquet")
        (folder / "users" / "b.parquet").unlink()
    elif what == "type that changes":
        edit_file(folder / "feed_impressions" / "b.parquet", retyped("depth", "3"))
    elif what == "keyless users":
        change(folder, "users", retyped("user_id", None))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no folder", "--logs .*: there is no such folder; run jobs/ingest_logs.py"),
        ("missing log", "log feed_clicks: is missing in .*, which holds: .*feed_impressions.*; add a folder or file"),
        ("no orders at all", "log orders: is missing"),
        ("missing users", "log users: is missing"),
        ("missing column", "log orders: column 'item_id' is missing; it has: order_id, user_id, .*; add it"),
        ("missing feature", "log items: column 'price' is missing; it has: item_id, brand; add it"),
        ("missing context", "features: the context feature 'device' is in no impressions log; they have: .*depth"),
        (
            "time as number",
            "log search_impressions: column 'event_time' is double, needed timestamp .*; cast it .*time_format",
        ),
        ("id as number", "log search_clicks: column 'user_id' is double, needed string or integer; cast it"),
        ("position as text", "log feed_impressions: column 'position' is boolean, needed integer; cast it"),
        ("feature as list", "log users: column 'city' is array<string>, needed a single value .*; cast it"),
        ("two formats", "log feed_clicks: .* holds csv, parquet; needed one of Parquet, Delta, CSV"),
        ("unknown format", "log feed_clicks: .* holds a.xlsx; needed one of Parquet, Delta, CSV"),
        ("twice", "log orders: .* has orders and orders.csv; keep one of them"),
        ("not parquet", "log users: cannot be read as it stands: .*not a Parquet file"),
        (
            "type that changes",
            "log feed_impressions: column 'depth' is (string|double) in .* and (string|double) in .*; write",
        ),
        ("keyless users", "log users: column 'user_id' is null on all 10 rows; needed one row per key"),
    ],
)
def test_a_user_s_error_is_one_line_and_leaves_nothing(
    spark: SparkSession, logs: Path, tmp_path: Path, what: str, message: str
) -> None:
    copy = Path(shutil.copytree(logs, tmp_path / "logs"))
    spoil(what, copy)
    with pytest.raises(DataCheckError, match=message):
        build(spark, copy, tmp_path / "lake")
    assert not (tmp_path / "lake").exists()


def test_dates_without_impressions_are_refused(logs: Path) -> None:
    """What a pass over the logs has found stands for it; the test below has a whole build that is refused."""
    found = {str(date): 40 for date in DATES}
    account = SimpleNamespace(impression_dates=set(found), reasons={})
    inputs = SimpleNamespace(account=account, num_impressions=lambda dates: {date: found[date] for date in dates})
    lake, first = Lake("unused"), dt.date(2031, 1, 1)
    request = BuildRequest(logs=str(logs), lake=lake, first=first, last=dt.date(2031, 1, 2))
    with pytest.raises(
        DataCheckError, match=f"--dates 2031-01-01:2031-01-02: .* no impression .* on {DATES[0]}:{DATES[3]}"
    ):
        _dates_there(request, cast(Inputs, inputs), load_config(None, CONFIG), Progress())


def test_dates_of_which_some_hold_no_impression_are_refused_unless_that_is_allowed(
    spark: SparkSession, shop: Shop, tmp_path: Path
) -> None:
    """Days 1 and 3 are missing, the last one among them: the state must not claim to know it."""
    gone = {str(DATES[1]), str(DATES[3])}
    kept = {
        log: [r for r in rows if "impressions" not in log or not gone & {str(r["event_time"])[:10]}]
        for log, rows in logs_of(shop).items()
    }
    logs, lake = write_logs(kept, tmp_path / "logs"), tmp_path / "lake"
    limits = ("limits.max_reject_share=1",)  # clicks of the missing days belong to no impression
    with pytest.raises(UserError) as error:
        build(spark, logs, lake, *limits, first=1)
    assert str(error.value) == (
        f"--dates {DATES[1]}:{DATES[3]}: 2 of these 3 dates have no rows: {DATES[1]}, {DATES[3]}; the logs hold "
        f"impressions on {DATES[0]}, {DATES[2]}; name dates of those, or take the ones that are there with "
        "--allow-missing-dates"
    )
    assert not lake.exists()
    # After the training dates, in a lake that never saw them.
    words = (*limits, "data.allow_missing_dates=true", f"data.train_dates='{DATES[0]}'")
    lines = build(spark, logs, lake, *words, first=1)
    warning = f"--dates {DATES[1]}:{DATES[3]}: without {DATES[1]}, {DATES[3]}, of which there are no rows"
    assert f"warning: {warning}" in lines
    assert any(" rows of 1 dates, table version" in line for line in lines)
    assert {row["impression_date"] for row in rows_of(lake / "samples")} == {DATES[2]}
    (report,) = (lake / "reports").iterdir()
    assert report.stem == f"{DATES[2]}"
    marks = [json.loads(commit.get("userMetadata") or "{}") for commit in DeltaTable(str(lake / "state")).history()]
    assert marks[0]["complete_until"] == f"{DATES[2]}"
    cells = json.loads(report.read_text())["cold_start"].values()
    assert {cell[name] for cell in cells for name in ("new_user", "new_item")} == {None}, "nobody can say what is new"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("labels.click_window='10 minutes'", 'built with labels.click_window = "1800 s", .* has "600 s"'),
        ("histories.length=9", "built with histories.length = 4, the configuration has 9"),
        ("features.user_numbers=[]", r'built with features.user_numbers = \["age"\]'),
        ("vocabulary.kind='hash'", 'built with vocabulary.kind = "fit"'),
    ],
)
def test_a_table_of_another_configuration_is_not_mixed_into(
    spark: SparkSession, logs: Path, lake: Path, override: str, message: str
) -> None:
    before = content(lake)
    with pytest.raises(DataCheckError, match=message + ".*take the old value or build into a new --lake"):
        build(spark, logs, lake, override)
    assert content(lake) == before
