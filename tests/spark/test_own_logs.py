"""The worked example of docs/own-logs.md, from the shop's files to the samples table; and mappings that cannot work."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
import math
import signal
import statistics
import zoneinfo
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.build.account import Account, unique_features
from etl.build.reject_limits import _of_clock
from etl.build.samples import BuildRequest, Progress, build_samples
from etl.checks import DataCheckError, LogCount
from etl.kernel.events import KIND_CLICK, KIND_IMPRESSION
from etl.lake.tables import Lake
from etl.logs.events import REASON, EventLog, read_features
from etl.logs.files import LogFolder
from etl.logs.mapping import as_written, map_columns
from jobs import score
from tests.spark.conftest import EXAMPLE
from usr_ray.cli import run_job
from usr_ray.config import Config, LogConfig, load_config
from usr_ray.launch.alone import run_alone

pytestmark = pytest.mark.spark

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
UTC = dt.UTC


@pytest.fixture
def lake(example_lake: Path) -> Path:
    return example_lake


def shop_events() -> list[dict[str, str]]:
    """Every line of the shop's events, times as UTC."""
    rows = []
    for path in sorted((EXAMPLE / "events").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows += list(csv.DictReader(file, delimiter=";"))
    for row in rows:
        local = dt.datetime.strptime(row["time"], "%d.%m.%Y %H:%M:%S").replace(tzinfo=BERLIN)
        row["utc"] = local.astimezone(UTC)
    return rows


def samples_of(spark: SparkSession, lake: Path) -> dict[str, Any]:
    return {row["impression_id"]: row for row in spark.read.format("delta").load(str(lake / "samples")).collect()}


def test_every_view_of_the_shop_is_a_sample_with_its_own_values(spark: SparkSession, lake: Path) -> None:
    found = samples_of(spark, lake)
    views = [row for row in shop_events() if row["action"] == "view"]
    assert len(found) == len(views)
    for view in views:
        row = found[view["event"]]
        assert row["event_time"].replace(tzinfo=UTC) == view["utc"]  # summer time begins on the second day
        assert (row["scenario"], row["user_id"], row["item_id"]) == (view["surface"], view["customer"], view["sku"])
        assert (row["request_id"], row["position"]) == (f"{view['visit']}|{view['page']}", int(view["place"]))
        assert row["query"] == (view["phrase"] or None)


def test_clicks_and_payments_of_the_shop_are_the_labels(spark: SparkSession, lake: Path) -> None:
    """Every click of the example belongs to a view and every payment to a click: worked out here line by line."""
    found, rows = samples_of(spark, lake), shop_events()
    clicked: dict[str, dict[str, Any]] = {}
    for click in (row for row in rows if row["action"] == "click"):
        same = [v for v in rows if all(v[key] == click[key] for key in ("surface", "customer", "sku"))]
        views = [v for v in same if v["action"] == "view" and v["utc"] <= click["utc"]]
        view = max(views, key=lambda v: (v["utc"], v["event"]))
        assert click["clicked_view"] in ("", view["event"])
        clicked[view["event"]] = click
    payments = [json.loads(line) for line in (EXAMPLE / "payments.jsonl").read_text().splitlines()]
    ordered = set()
    for payment in payments:
        paid_at = dt.datetime.fromtimestamp(payment["paid_at"] / 1000, UTC)
        bought = (payment["customer"], payment["lines_sku"])
        clicks = [(c["utc"], view) for view, c in clicked.items() if (c["customer"], c["sku"]) == bought]
        ordered.add(max(pair for pair in clicks if pair[0] <= paid_at)[1])
    assert {name for name, row in found.items() if row["is_click"] == 1} == set(clicked)
    assert {name for name, row in found.items() if row["is_order"] == 1} == ordered
    assert len(clicked) > 20
    assert len(ordered) > 5
    assert spark.read.format("delta").load(str(lake / "rejects")).count() == 0


def test_features_of_the_shop_are_encoded(spark: SparkSession, lake: Path) -> None:
    rows = samples_of(spark, lake).values()
    assert {row["category_index"] for row in rows} == {2, 3, 4}  # three product groups
    assert {row["device_index"] for row in rows} == {2, 3}
    catalogue = {row["sku"]: row for row in csv.DictReader((EXAMPLE / "catalogue.csv").open(encoding="utf-8"))}
    assert {sku: row["labels"].split("|") for sku, row in catalogue.items() if row["labels"]} == {
        sku: names for sku, names in tags_of(spark, lake, rows).items() if names
    }
    prices = {row["item_id"]: float(catalogue[row["item_id"]]["price"]) for row in rows}
    trained = [prices[row["item_id"]] for row in rows if row["impression_date"] < dt.date(2026, 3, 30)]
    mean, deviation = statistics.fmean(trained), statistics.pstdev(trained)
    for row in rows:
        assert row["price_scaled"] == pytest.approx((prices[row["item_id"]] - mean) / deviation, abs=1e-5)


def tags_of(spark: SparkSession, lake: Path, rows: Any) -> dict[str, list[str]]:
    """Item -> its tags, decoded by the vocabulary."""
    entries = spark.read.format("delta").load(str(lake / "vocabularies")).filter("feature = 'tags'").collect()
    names = {row["id"]: row["value"] for row in entries}
    return {row["item_id"]: [names[number] for number in row["tags_indices"]] for row in rows}


def test_words_of_the_query_meet_those_of_the_title(spark: SparkSession, lake: Path) -> None:
    rows = samples_of(spark, lake).values()
    entries = spark.read.format("delta").load(str(lake / "vocabularies")).filter("feature = 'term'").collect()
    names = {row["id"]: row["value"] for row in entries}
    asked = {row["query"]: [names[n] for n in row["query_terms_indices"]] for row in rows}
    assert asked["red shoes"] == ["red", "shoes"]
    assert asked[None] == []
    titled = {row["item_id"]: [names[n] for n in row["item_terms_indices"]] for row in rows}
    assert titled["K-004"] == ["running", "shoes", "red"]
    assert titled["K-008"] == ["red", "leather", "bag"]


def test_an_item_s_views_and_clicks_of_the_days_before_are_counted(spark: SparkSession, lake: Path) -> None:
    events, found = shop_events(), samples_of(spark, lake)
    for view in (row for row in events if row["action"] == "view"):
        row, day = found[view["event"]], view["utc"].date()
        before = [e for e in events if e["sku"] == view["sku"] and e["utc"].date() < day]
        for window, first in (("1d", day - dt.timedelta(days=1)), ("all", dt.date.min)):
            near = [e["action"] for e in before if e["utc"].date() >= first]
            for action, name in (("view", "impressions"), ("click", "clicks")):
                wanted = math.log1p(near.count(action))
                assert row[f"counter_item_{window}_{name}"] == pytest.approx(wanted, abs=1e-6)


def test_the_shop_s_lake_is_trained_on_and_scored(lake: Path, tmp_path: Path) -> None:
    """With the title, the tags, the scaled price and the counters, as examples/own_logs/README.md does it."""
    config = load_config(EXAMPLE / "own_logs.toml", ["ray.num_workers=0", "train.reader_threads=1"])
    before = signal.getsignal(signal.SIGTERM)
    run_alone(config, str(lake), tmp_path / "run")
    signal.signal(signal.SIGTERM, before)
    words = ["--run-dir", tmp_path / "run", "--lake", lake, "--dates", "2026-03-30", "--output", tmp_path / "scores"]
    assert run_job(score.main, [str(word) for word in words]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = DeltaTable(tmp_path / "scores").to_pyarrow_table(columns=["impression_id", "p_ctr", "p_ctcvr"])
    assert metrics["eval"]["all"]["ctr"]["num_samples"] == scores.num_rows > 30
    assert len(set(scores["p_ctr"].to_pylist())) > 10


def test_values_that_stand_for_none_are_null_in_columns_of_any_type(spark: SparkSession) -> None:
    kinds = "item_id string, shop int, big bigint, price double, tags array<string>, more string, day date, "
    kinds += "cost decimal(10,2)"
    day = dt.date(2026, 1, 1)
    rows = [
        ("a", -1, -1, -1.0, ["-1", "x", "NULL"], "x | NULL |-1", day, Decimal("-1.00")),
        ("NULL", 1, 2**53 + 1, -1.5, None, None, None, None),
        ("-10", None, None, float("nan"), [], "NULL", dt.date(1900, 1, 1), Decimal("-10.00")),
    ]
    nulls = LogConfig(null_values=("NULL", "-1", "9007199254740992", "1900-01-01"), split={"more": "|"})
    found = map_columns(spark.createDataFrame(rows, kinds), "items", nulls)
    names = [name.partition(" ")[0] for name in kinds.split(", ")]
    a, null, ten = (tuple(row[name] for name in names) for row in found.collect())
    assert a == ("a", None, None, None, ["x"], ["x "], day, None)
    assert null == (None, 1, 2**53 + 1, -1.5, None, None, None, None)
    assert (*ten[:3], *ten[4:]) == ("-10", None, None, [], None, None, Decimal("-10.00"))
    assert math.isnan(ten[3])
    texts = [('["a", "b|c"]',), ("a|[b]",), ("[no list|x",), ("[]",), (None,)]
    split = map_columns(spark.createDataFrame(texts, "tags string"), "items", LogConfig(split={"tags": "|"}))
    assert [row[0] for row in split.collect()] == [["a", "b|c"], ["a", "[b]"], ["[no list", "x"], [], None]


def test_of_several_rows_of_an_item_the_fullest_stays(spark: SparkSession) -> None:
    rows = [("a", None, 9.0), ("a", "b", 5.0), ("a", "a", None), ("b", "z", None), ("b", "y", None)]
    rows += [("c", None, None), ("c", None, None), ("d", "1", None), ("d", None, 1.0), ("e", "e", 1.0)]
    table = spark.createDataFrame(rows, "item_id string, brand string, price double")
    account = Account()
    found = unique_features(table.withColumn(REASON, F.lit(None).cast("string")), "items", "item_id", account)
    # Of d both have a null, and a null is smaller than a text.
    kept = [("a", "b", 5.0), ("b", "y", None), ("c", None, None), ("d", None, 1.0), ("e", "e", 1.0)]
    assert sorted(map(tuple, found.collect())) == kept
    assert account.total("items") == LogCount(rows_in=10, duplicates=5, used=5)
    unlike, _ = account.duplicate_notes({"items": "item_id"})
    assert unlike == (  # a, b and d: the rows of c are copies
        "log items: 3 values of item_id have several rows that differ; of each the row with the fewest nulls stays, of "
        "those the smallest, not the newest; write one row a key"
    )


def test_clicks_of_impressions_under_another_id_name_that_column(spark: SparkSession) -> None:
    """Users and items fit, the id does not: 7.0, as pandas writes a 7 beside a missing value."""
    clicks = EventLog(name="search_clicks", kind=KIND_CLICK, scenario=0, key="click_id", required=())
    time = dt.datetime(2026, 3, 27, 10)
    columns = "id string, impression_id string, user_id string, item_id string, event_time timestamp"
    shown = spark.createDataFrame([("7", None, "u", "a", time)], columns)
    shown = shown.withColumns({"kind": F.lit(KIND_IMPRESSION), "reason": F.lit(None).cast("string")})
    mine = spark.createDataFrame([("c", "7.0", "u", "a", time)], columns)
    assert _of_clock(clicks, mine, shown, Config()) == (
        "no impression has their impression_id, such as '7.0', where those of their user and item have ids such as "
        "'7': look at impression_id in logs.search_clicks.columns; "
    )
    others = mine.withColumn("user_id", F.lit("another"))
    told = _of_clock(clicks, others, shown, Config())
    assert told == "no impression is of their user and item: look at the ids that both logs are given; "


def frame(spark: SparkSession, kind: str, *values: Any) -> DataFrame:
    return spark.createDataFrame([(value,) for value in values], f"t {kind}")


def times(rows: DataFrame, **keys: str) -> list[dt.datetime | None]:
    mapped = map_columns(rows, "orders", LogConfig(columns={"event_time": "t"}, **keys))
    return [row[0] and row[0].replace(tzinfo=UTC) for row in mapped.select("event_time").collect()]


def utc(*parts: int) -> dt.datetime:
    return dt.datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


def test_iso_times_without_a_zone_are_local_and_others_are_not(spark: SparkSession) -> None:
    rows = frame(
        spark,
        "string",
        "2026-07-01 10:00:00",
        "2026-07-01T10:00:00Z",
        "2026-07-01T10:00:00.5+0530",
        "2026-07-01",
        "2026-07-01 10:00:00-05",
        "soon",
        None,
    )
    assert times(rows, time_zone="Europe/Berlin") == [
        utc(2026, 7, 1, 8),
        utc(2026, 7, 1, 10),
        utc(2026, 7, 1, 4, 30, 0, 500_000),
        utc(2026, 6, 30, 22),
        utc(2026, 7, 1, 15),
        None,
        None,
    ]


def test_a_clock_hour_that_is_skipped_or_shown_twice(spark: SparkSession) -> None:
    rows = frame(spark, "string", "2026-03-29 02:30:00", "2026-10-25 02:30:00")
    assert times(rows, time_zone="Europe/Berlin") == [utc(2026, 3, 29, 1, 30), utc(2026, 10, 25, 0, 30)]


@pytest.mark.parametrize(
    ("unit", "kind", "value", "microseconds"),
    [
        ("s", "bigint", 1_767_225_600, 0),
        ("s", "string", "1767225600.123456", 123_456),
        ("s", "double", 1_767_225_600.25, 250_000),
        ("ms", "bigint", 1_767_225_600_123, 123_000),
        ("us", "string", "1767225600123456", 123_456),
        ("ns", "bigint", 1_767_225_600_123_456_789, 123_456),
    ],
)
def test_numbers_are_times_in_their_unit(
    spark: SparkSession, unit: str, kind: str, value: Any, microseconds: int
) -> None:
    assert times(frame(spark, kind, value), time_format=unit) == [utc(2026, 1, 1, 0, 0, 0, microseconds)]


def test_a_wrong_unit_is_no_time(spark: SparkSession) -> None:
    assert times(frame(spark, "bigint", 1_767_225_600_000), time_format="s") == [None]
    assert times(frame(spark, "string", "99999999999999999999999999999999", "x"), time_format="ms") == [None, None]


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("%d.%m.%Y %H:%M:%S", "1.2.2026 3:04:05", (2026, 2, 1, 3, 4, 5)),
        ("%Y%m%dT%H%M%S", "20260201T030405", (2026, 2, 1, 3, 4, 5)),
        ("%Y-%m-%d %H:%M:%S.%f %z", "2026-02-01 03:04:05.25 +0100", (2026, 2, 1, 2, 4, 5, 250_000)),
        ("%b %d %Y at %I:%M %p", "Feb 1 2026 at 03:04 PM", (2026, 2, 1, 15, 4)),
    ],
)
def test_patterns_are_those_of_strptime(
    spark: SparkSession, pattern: str, text: str, expected: tuple[int, ...]
) -> None:
    assert times(frame(spark, "string", text, "?"), time_format=pattern) == [utc(*expected), None]


def test_a_parquet_time_without_a_zone_is_local_and_an_instant_stays(spark: SparkSession) -> None:
    noon = dt.datetime(2026, 7, 1, 12)
    assert times(frame(spark, "timestamp_ntz", noon), time_zone="Europe/Berlin") == [utc(2026, 7, 1, 10)]
    instant = spark.sql("SELECT TIMESTAMP '2026-07-01T12:00:00Z' AS t")
    assert times(instant, time_zone="Europe/Berlin") == [utc(2026, 7, 1, 12)]


def test_columns_are_renamed_joined_filled_and_hide_their_namesakes(spark: SparkSession) -> None:
    raw = spark.createDataFrame(
        [("a", "b", 1), (None, "b", 2), ("", "c", 2), ("d", "e", 3)], "Item_Id string, `v.w` string, n int"
    )
    mapping = LogConfig(
        columns={"click_id": ("Item_Id", "v.w"), "item_id": "v.w"},
        constants={"impression_id": ""},
        where={"n": ("1", "2")},
    )
    rows = map_columns(raw, "search_clicks", mapping)
    assert rows.columns == ["v.w", "n", "click_id", "item_id", "impression_id"]
    assert [tuple(row)[2:] for row in rows.collect()] == [("a|b", "b", ""), (None, "b", ""), (None, "c", "")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"path": "evnts/*.csv"},
            r"log search_clicks: logs.search_clicks.path matches no file, looked for \S+/evnts/\*.csv",
        ),
        (
            {"path": "*"},
            r"log search_clicks: \S+ holds csv, json, README.md, own_logs.toml; needed one of Parquet, Delta, CSV",
        ),
        (
            {"columns": {"user_id": "client"}},
            r"log search_clicks: logs.search_clicks.columns.user_id names the column 'client', which is not there; "
            r"there are: time, event, visit, .*; name one of those",
        ),
        ({"where": {"kind": "click"}}, r"logs.search_clicks.where names the column 'kind', which is not there"),
        (
            {"where": {"action": "Click"}},
            r"logs.search_clicks.where \(action = Click\) meets no row; column 'action' holds 'click', 'view'; correct",
        ),
        (
            {"separator": ","},
            r"logs.search_clicks.where names the column 'action', which is not there; there are: time;event;visit",
        ),
    ],
)
def test_a_mapping_that_does_not_fit_is_one_line(spark: SparkSession, change: dict[str, Any], message: str) -> None:
    mapping = replace(load_config(EXAMPLE / "own_logs.toml").logs["search_clicks"], **change)
    with pytest.raises(DataCheckError, match=message) as error:
        LogFolder(spark, str(EXAMPLE), {"search_clicks": mapping}).read("search_clicks")
    assert "\n" not in str(error.value)


def test_csv_files_whose_columns_stand_in_another_order_are_read_by_name(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,sku,event_time\nu1,i1,2026-01-01\n")
    (tmp_path / "b.csv").write_text("sku,extra,user,event_time\ni2,x,u2,2026-01-01\n")
    mapping = LogConfig(path="*.csv", columns={"user_id": "user", "item_id": "sku"})
    folder = LogFolder(spark, str(tmp_path), {"orders": mapping})
    rows = folder.read("orders", ["user_id", "item_id"])[0].orderBy("user_id").collect()
    assert [(row["user_id"], row["item_id"], row["extra"]) for row in rows] == [("u1", "i1", None), ("u2", "i2", "x")]


def test_a_number_under_a_text_format_names_the_way_out(spark: SparkSession) -> None:
    with pytest.raises(
        DataCheckError,
        match=r"log orders: column 't' is bigint, needed text or a timestamp; set "
        "logs.orders.time_format to 's', 'ms', 'us' or 'ns'",
    ):
        times(frame(spark, "bigint", 1))


def test_a_column_of_the_contract_that_nothing_gives_names_the_section(spark: SparkSession) -> None:
    config = load_config(EXAMPLE / "own_logs.toml")
    feed = replace(config.logs["feed_clicks"], constants={})
    broken = replace(config, logs={**config.logs, "feed_clicks": feed})
    request = BuildRequest(
        logs=str(EXAMPLE), lake=Lake("unused"), first=dt.date(2026, 3, 28), last=dt.date(2026, 3, 30)
    )
    with pytest.raises(
        DataCheckError, match=r"log feed_clicks: column 'impression_id' is missing; .* under \[logs.feed_clicks\]"
    ):
        build_samples(spark, broken, request, Progress(write=lambda line: None))


CLOCKS = {"instant": dt.datetime(2026, 7, 1, 10, 0, 0, 123_456, tzinfo=UTC), "local": dt.datetime(2026, 7, 1, 12)}


@pytest.mark.parametrize("unit", ["ns", "us", "ms", "int96"])
def test_parquet_times_of_every_unit_are_read(spark: SparkSession, tmp_path: Path, unit: str) -> None:
    """As pandas (ns), Spark (int96, us) and databases (ms) write them; a local one is on the clock of time_zone."""
    resolution = "ns" if unit == "int96" else unit
    for name, moment in CLOCKS.items():
        zone = "UTC" if name == "instant" and unit != "int96" else None
        times = pa.array([moment, None], pa.timestamp("us", tz=zone)).cast(
            pa.timestamp(resolution, tz=zone), safe=False
        )
        numbers = {
            "user_id": pa.array([2**63 + 5, 1], pa.uint64()),
            "item_id": pa.array([4_000_000_000, 2], pa.uint32()),
        }
        rows = pa.table({"order_id": pa.array([7, 8], pa.uint8()), "paid at": times, **numbers, "n": pa.array([1, 2])})
        pq.write_table(rows, tmp_path / f"{name}.parquet", use_deprecated_int96_timestamps=unit == "int96")
    for name, moment in CLOCKS.items():
        mapping = LogConfig(path=f"{name}.parquet", columns={"event_time": "paid at"}, time_zone="Europe/Berlin")
        raw, _ = LogFolder(spark, str(tmp_path), {"orders": mapping}).read("orders")
        found = raw.orderBy("order_id").collect()
        whole = moment.replace(microsecond=123_000 if unit == "ms" and moment.microsecond else moment.microsecond)
        # int96 has no zone of its own: Spark, which writes it, means an instant.
        expected = whole if name == "instant" or unit == "int96" else whole - dt.timedelta(hours=2)
        assert found[0]["event_time"].replace(tzinfo=UTC) == expected.replace(tzinfo=UTC), name
        assert found[1]["event_time"] is None
        assert (found[0]["n"], found[1]["n"]) == (1, 2), "a bigint that is no time stays one"


def test_one_events_file_of_a_german_shop(spark: SparkSession, tmp_path: Path) -> None:
    """Gzip, windows-1252, semicolons, epoch milliseconds, a decimal comma; views, clicks and orders in one file.

    Two lines without a time that can be read are rejected, as they were written.
    """
    lines = ["typ;zeit;vorgang;ansicht;kunde;artikel;ort;suchwort"]
    start = 1_774_736_000_000  # 2026-03-28T22:13:20Z
    for n in range(40):
        at, who = start + n * 60_000, f"k{n % 4};a{n % 5}"
        lines.append(f"gesehen;{at};v{n};;{who};{'suche' if n % 2 else 'start'};{'Schuhgröße' if n % 2 else ''}")
        if n % 4 < 2:
            lines.append(f"geklickt;{at + 1000};c{n};v{n};{who};{'suche' if n % 2 else 'start'};")
        if n % 8 == 1:
            lines.append(f"gekauft;{at + 2000};o{n};;{who};;")
    lines += ["gesehen;gestern, 10:00;v98;;k1;a1;start;", "gesehen;;v99;;k1;a1;start;"]
    (tmp_path / "ereignisse-1.csv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode("windows-1252")))
    prices = ["12,50", "1.234,50", "7", "", "1\u00a0999,99"]
    catalogue = ["artikel;preis", *(f"a{n};{price}" for n, price in enumerate(prices))]
    with pa.CompressedOutputStream(str(tmp_path / "katalog.csv.zst"), "zstd") as file:
        file.write(("\n".join(catalogue) + "\n").encode("windows-1252"))
    common = 'separator = ";"\nencoding = "windows-1252"\n'
    text = 'scenarios = ["suche", "start"]\nquery_scenarios = ["suche"]\n[vocabulary]\nmin_count = 1\n'
    text += '[features]\nitem_numbers = ["price"]\n'
    columns = 'user_id = "kunde", item_id = "artikel", event_time = "zeit"'
    for scenario in ("suche", "start"):
        for kind, word, more in (
            ("impressions", "gesehen", 'impression_id = "vorgang", request_id = "vorgang", query = "suchwort"'),
            ("clicks", "geklickt", 'click_id = "vorgang", impression_id = "ansicht"'),
        ):
            text += f'[logs.{scenario}_{kind}]\npath = "ereignisse-*.csv.gz"\ntime_format = "ms"\n{common}'
            text += f'where = {{ typ = "{word}", ort = "{scenario}" }}\ncolumns = {{ {columns}, {more} }}\n'
    text += f'[logs.orders]\npath = "ereignisse-*.csv.gz"\ntime_format = "ms"\n{common}where = {{ typ = "gekauft" }}\n'
    text += f'columns = {{ {columns}, order_id = "vorgang" }}\n'
    text += f'[logs.items]\npath = "katalog.csv.zst"\n{common}columns = {{ item_id = "artikel", price = "preis" }}\n'
    (tmp_path / "german.toml").write_text(text + 'decimal_comma = ["price"]\n', encoding="utf-8")
    config = load_config(tmp_path / "german.toml")
    request = BuildRequest(
        logs=str(tmp_path), lake=Lake(str(tmp_path / "lake")), first=dt.date(2026, 3, 28), last=dt.date(2026, 3, 28)
    )
    build_samples(spark, config, request, Progress(write=lambda line: None))
    found = samples_of(spark, tmp_path / "lake")
    assert found.keys() == {f"v{n}" for n in range(40)}
    rejects = spark.read.format("delta").load(str(tmp_path / "lake" / "rejects")).collect()
    told = {row["reason"]: json.loads(row["row"]) for row in rejects}
    assert set(told) == {"unparsable_event_time", "null_event_time"}
    assert told["unparsable_event_time"][as_written("event_time")] == "gestern, 10:00"
    assert [told[reason]["impression_id"] for reason in sorted(told)] == ["v99", "v98"]
    for n in range(40):
        row = found[f"v{n}"]
        assert row["event_time"].replace(tzinfo=UTC) == dt.datetime.fromtimestamp(start / 1000 + 60 * n, UTC)
        assert (row["is_click"], row["is_order"]) == (float(n % 4 < 2), float(n % 8 == 1))
        assert row["query"] == ("Schuhgröße" if n % 2 else None)
        price = (12.5, 1234.5, 7.0, 0.0, 1999.99)[n % 5]
        assert row["price_scaled"] == pytest.approx(math.log1p(price), rel=1e-6)

    items = replace(config.logs["items"], decimal_comma=())
    folder = LogFolder(spark, str(tmp_path), {"items": items})
    message = (
        r"log items: column 'price' is no number in 3 of 4 rows, such as '1.234,50'; write 1234.50, or name it in logs"
    )
    with pytest.raises(DataCheckError, match=message):
        read_features(folder, "items", "item_id", [], ["price"])
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "items.csv").write_text('item_id,price\na,1\nb,"2,50"\nc,3\n', encoding="utf-8")
    folder = LogFolder(spark, str(tmp_path / "some"))
    prices = read_features(folder, "items", "item_id", [], ["price"]).orderBy("item_id").collect()
    assert [row["price"] for row in prices] == [1.0, None, 3.0]
    assert folder.notes() == [
        "log items: column 'price' is no number in 1 of 3 rows, such as '2,50', and null there; write 1234.50, or name "
        "it in logs.items.decimal_comma"
    ]
    (tmp_path / "some" / "items.csv").write_text(
        "item_id;price\na;1.234,50\nb;12.50\nc;1.2.3,4\nd;1 234,5\ne;-3,25\nf;1.234\ng;\nh;NaN\ni;0.500\n",
        encoding="utf-8",
    )
    comma = {"items": LogConfig(path="items.csv", separator=";", decimal_comma=("price",))}
    folder = LogFolder(spark, str(tmp_path / "some"), comma)
    prices = read_features(folder, "items", "item_id", [], ["price"]).orderBy("item_id").collect()
    assert [row["price"] for row in prices] == [1234.5, None, None, 1234.5, -3.25, 1234.0, None, None, None]
    assert "is no number in 3 of 7 rows, such as 'no decimal comma: " in folder.notes()[0]
    pq.write_table(pa.table({"item_id": ["a"], "price": [12.5], "tags": [["x", "y"]]}), tmp_path / "some.parquet")
    for key, value, kind in (("decimal_comma", ("price",), "double"), ("split", {"tags": "|"}, "array<string>")):
        folder = LogFolder(spark, str(tmp_path), {"items": LogConfig(path="some.parquet", **{key: value})})
        with pytest.raises(DataCheckError, match=rf"logs.items.{key} names '\w+', which is no text but {kind}"):
            folder.read("items")
    items = replace(config.logs["items"], decimal_comma=("weight",))
    with pytest.raises(
        DataCheckError, match=r"logs.items.decimal_comma names 'weight', which is not there; there are: "
    ):
        LogFolder(spark, str(tmp_path), {"items": items}).read("items")


def test_a_csv_with_a_byte_order_mark_is_read(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_bytes(b"\xef\xbb\xbforder_id,user_id,item_id,event_time\no1,u,i,2026-01-01\n")
    raw, _ = LogFolder(spark, str(tmp_path)).read("orders")
    assert raw.columns[0] == "order_id"
