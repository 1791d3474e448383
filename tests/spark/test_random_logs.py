"""Random names, values, formats and faults from logs to scores: the oracle's rows, or one line; never a stack trace.

Seeds are fixed, so that a failure can be repeated; `USR_RAY_RANDOM_LOGS=50` tries so many worlds instead.
"""

from __future__ import annotations

import csv
import datetime as dt
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from etl.build.samples import BuildRequest, Progress, build_samples
from etl.lake.tables import Lake
from jobs import score
from tests.etl_oracle import expected, tags, terms
from tests.spark.shop import SCENARIOS, WINDOWS, Shop, logs_of, micros, moment, random_shop
from tests.spark.test_build_samples import DATES, WATERMARK, rows_of
from tests.unit.export_runs import PLAIN, run_config
from tests.unit.test_odd_names import scores_of, train_run
from usr_ray.cli import run_job
from usr_ray.config import UserError, load_config

pytestmark = pytest.mark.spark

NUM_WORLDS = int(os.environ.get("USR_RAY_RANDOM_LOGS", "3"))
ODD = (
    *(
        " x",
        "x ",
        "NULL",
        "ü",
        "e\u0301",
        "日本語",
        "🙂",
        "a,b",
        'q"q',
        '"',
        "two\nlines",
        "\t",
        "%20",
        "#",
        "\\N",
        "\\",
        "'",
    ),
    *("`", "${x}", "{}", "[1]", "é" * 300, "\u200b", "-", "a;b", "=1+1", "|", "0", "\r", "/", "..", "العربية"),
)
NAMES = (
    "count",
    "reason",
    "kind",
    "log",
    "user_key",
    "row_json",
    "größe",
    "类目",
    "value",
    "feature",
    "id",
    "rows",
    "🙂",
)
CONFIG = (
    'scenarios=["search","feed","related"]',
    'query_scenarios=["search"]',
    'labels.click_window="30 minutes"',
    'labels.order_window="300 minutes"',
    'labels.global_window="60 minutes"',
    "histories.length=4",
    "limits.max_reject_share=1",
    "vocabulary.min_count=3",
)
OWNERS = {
    "city": "user_categories",
    "age": "user_numbers",
    "brand": "item_categories",
    "price": "item_numbers",
    "device": "context_categories",
    "depth": "context_numbers",
    "labels": "item_tags",
}
LABELS = ("new", " red ", "new", "", "日本語", "größe", "two\nlines", "🙂", "0")
TITLES = (
    "Red SHOES",
    "红茶tea",
    "カフェ 東京",
    "l'eau e\u0301t\u00e9",
    "x\u00adtra\u200b large",
    "[20, 34, 20]",
    "7\x18 9\x187",
    "🙂",
    "العربية tea",
)


def odd_world(shop: Shop, rng: random.Random) -> Shop:
    """The shop with other texts for its users, items, impressions and queries, told apart as before."""
    names: dict[str, str] = {}

    def other(text: str | None) -> Any:
        if text is not None and text not in names:
            odd = rng.choice(ODD)
            names[text] = rng.choice((f"{text}{odd}", f"{odd}{text}", f"{text}{odd}{text}"))
        return text if text is None else names[text]

    world = shop.world
    for rows in (world.impressions, world.clicks, world.orders):
        for row in rows:
            row.update(
                {key: other(row[key]) for key in ("id", "user", "item", "names", "query", "request") if key in row}
            )
    shop.users = {other(user): row for user, row in shop.users.items()}
    shop.items = {other(item): row for item, row in shop.items.items()}
    for row in shop.items.values():
        labels = "|".join(rng.choices(LABELS, k=rng.randrange(20)))
        row |= {"labels": rng.choice((None, labels)), "title": rng.choice((None, rng.choice(TITLES)))}
        row["title"] = row["title"] and rng.choice((row["title"], f"{row['title']} {rng.choice(TITLES[:5])}"))
    return shop


def written(rows: list[dict[str, Any]], names: dict[str, str], folder: Path, log: str, rng: random.Random) -> None:
    """The rows of a log in some format, as files at several depths, under names of the contract in any case."""
    kind = rng.choice(("csv", "jsonl", "parquet"))
    columns = [names.get(name, name) for name in rows[0]]
    # In capitals where that can be undone: those of "ß" are "SS".
    cases = {name: [n for n in (name, name.upper(), name.title()) if n.lower() == name.lower()] for name in columns}
    cases[names["labels"]] = []  # what `split` names is found as it is written
    shown = [rng.choice((*cases[name], f" {name} ")) if cases[name] else name for name in columns]
    for part in range(num_parts := rng.choice((1, 2, 3))):
        path = folder / log / "/".join(rng.choice(("a", "b [1]", "ü", "d%20")) for _ in range(rng.choice((0, 0, 1, 2))))
        path.mkdir(parents=True, exist_ok=True)
        lines = [list(row.values()) for row in rows[part::num_parts]]
        texts = [[value.isoformat() if isinstance(value, dt.datetime) else value for value in line] for line in lines]
        file = path / f"{rng.choice(('p', 'q 1', 'r[0-9]'))}{part}.{kind}"
        if kind == "parquet":
            times = pa.timestamp(rng.choice(("us", "ns")), tz="UTC")
            # Of all rows: a file may have none.
            types = [times if name.endswith("_time") else _type([row[name] for row in rows]) for name in rows[0]]
            data = [[line[place] for line in lines] for place in range(len(shown))]
            pq.write_table(pa.table(data, schema=pa.schema(list(zip(shown, types, strict=True)))), file)
        elif kind == "jsonl":
            objects = [{k: v for k, v in zip(shown, line, strict=True) if v is not None} for line in texts]
            file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects), encoding="utf-8")
        else:
            with file.open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows([shown, *texts])


def _type(values: list[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    return pa.string() if kinds <= {str} else pa.int64() if kinds == {int} else pa.float64()


def write_world(shop: Shop, folder: Path, rng: random.Random) -> list[str]:
    """Its logs; the configuration of the features, which have other names too."""
    fresh = dict(zip(OWNERS, rng.sample(NAMES, len(OWNERS)), strict=True))
    for log, rows in logs_of(shop).items():
        if rows:
            written(rows, fresh, folder, log, rng)
    features = [f"features.{OWNERS[name]}={json.dumps([fresh[name]], ensure_ascii=False)}" for name in OWNERS]
    split = json.dumps(fresh["labels"], ensure_ascii=False)
    return [
        *features,
        "features.query_terms=true",
        'features.item_terms=["title"]',
        f'logs.items.split={{{split}="|"}}',
    ]


def check_lists(lake: Path, shop: Shop, samples: dict[str, Any], labels: str) -> None:
    """Tags and terms of every row, and which of them have ids, against the slow oracle."""
    ids = {(row["feature"], row["value"]): row["id"] for row in rows_of(lake / "vocabularies")}
    counts: Counter[tuple[str, str]] = Counter()
    wanted = {}
    for key, row in samples.items():
        item = shop.items.get(row["item_id"], {})
        of_row = wanted[key] = {
            labels: tags(item.get("labels"), "|")[:16],
            "query_terms": terms(row["query"])[:32],
            "item_terms": terms(item.get("title"))[:32],
        }
        for name, values in of_row.items():
            counts.update(("term" if name.endswith("_terms") else name, value) for value in values)
    for key, row in samples.items():
        for name, values in wanted[key].items():
            table = "term" if name.endswith("_terms") else name
            assert row[f"{name}_indices"] == [ids.get((table, value), 1) for value in values], (key, name)
    admitted = {pair for pair, count in counts.items() if count >= 3}
    assert {pair for pair in ids if pair[0] in ("term", labels)} == admitted
    assert len(admitted) > 10


def check_scores(lake: Path, root: Path, samples: dict[str, Any], *overrides: str) -> None:
    """Train a few steps on the lake and score all of it: each sample once, as the run's own evaluation has it."""
    config = load_config(None, (*CONFIG, *overrides)).to_dict()
    small = run_config(**PLAIN).to_dict()
    run_dir, output = root / "für dich [1] 🙂", root / "{scores} ü% #"
    train_run({**config, **{name: small[name] for name in ("data", "model", "train")}}, list(SCENARIOS), lake, run_dir)
    words = ["--run-dir", str(run_dir), "--lake", str(lake), "--dates", f"{DATES[0]}:{DATES[-1]}"]
    assert run_job(score.main, [*words, "--output", str(output)]) == 0
    found = scores_of(lake, run_dir, output)
    assert found.keys() == samples.keys()
    assert all(0 < probability < 1 for probability in found.values())


def build(spark: SparkSession, logs: Path, lake: Path, *overrides: str) -> None:
    request = BuildRequest(logs=str(logs), lake=Lake(str(lake)), first=DATES[0], last=DATES[-1], watermark=WATERMARK)
    build_samples(spark, load_config(None, (*CONFIG, *overrides)), request, Progress(write=lambda line: None))


# One world in `make test`, the others of the default in `make test-all`.
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if 0 < seed < 3 else []) for seed in range(NUM_WORLDS)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_logs_become_the_oracle_s_samples_and_their_scores(
    spark: SparkSession, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    shop = odd_world(random_shop(100 + seed, num_impressions=60), rng)
    features = write_world(shop, tmp_path / "logs [1] ü%20#", rng)
    build(spark, tmp_path / "logs [1] ü%20#", tmp_path / "lake {a,b} 🙂", *features)
    wanted = expected(shop.world, WINDOWS, num_scenarios=3, length=4, watermark=micros(WATERMARK))
    found = {row["impression_id"]: row for row in rows_of(tmp_path / "lake {a,b} 🙂" / "samples")}
    assert found.keys() == wanted.samples.keys()
    for key, want in wanted.samples.items():
        row = found[key]
        for name in ("is_click", "is_order", "is_click_global", "is_order_global", "is_mature"):
            assert row[name] == want[name], (key, name)
        for name in ("click_time", "order_time"):
            assert row[name] == (None if want[name] is None else moment(want[name])), (key, name)
        for scenario, events in zip(SCENARIOS, want["histories"], strict=True):
            assert row[f"{scenario}_history_actions"] == [event[2] for event in events], (key, scenario)
    shown: dict[str, set[tuple]] = {}
    for i in shop.world.impressions:
        shown.setdefault(i["id"], set()).add((i["user"], i["item"], i["query"], i["request"]))
    for key, row in found.items():
        assert tuple(row[n] for n in ("user_id", "item_id", "query", "request_id")) in shown[key]
    (labels,) = load_config(None, features).features.item_tags
    check_lists(tmp_path / "lake {a,b} 🙂", shop, found, labels)
    check_scores(tmp_path / "lake {a,b} 🙂", tmp_path, found, *features)


def _late_clicks(logs: Path) -> None:
    table = pq.read_table(logs / "feed_clicks" / "x.parquet")
    late = [time + dt.timedelta(hours=3) for time in table["event_time"].to_pylist()]
    place = table.schema.get_field_index("event_time")
    pq.write_table(table.set_column(place, "event_time", pa.array(late)), logs / "feed_clicks" / "x.parquet")


FAULTS: dict[str, Callable[[Path], Any]] = {
    "stray file": lambda logs: (logs / "items" / "readme.md").write_text("x"),
    "hidden file": lambda logs: (logs / "items" / "_x.parquet").write_text("x"),
    "broken parquet": lambda logs: (logs / "users" / "y.parquet").write_bytes(b"PAR1 no"),
    "empty parquet": lambda logs: (logs / "users" / "y.parquet").write_bytes(b""),
    "other type": lambda logs: pq.write_table(pa.table({"item_id": [[1]]}), logs / "items" / "y.parquet"),
    "doubled name": lambda logs: pq.write_table(
        pa.table({"item_id": ["a"], "ITEM_ID": ["b"]}), logs / "items" / "y.parquet"
    ),
    "key folders": lambda logs: (
        (logs / "items" / "d=1").mkdir(),
        pq.write_table(pa.table({"item_id": ["a"]}), logs / "items" / "d=1" / "y.parquet"),
    ),
    "two formats": lambda logs: (logs / "orders.jsonl").write_text("{}\n"),
    "name with a colon": lambda logs: (logs / "items" / "10:15.parquet").write_bytes(b"x"),
    "other clock": _late_clicks,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_nothing_is_written(spark: SparkSession, tmp_path: Path, fault: str) -> None:
    logs = tmp_path / "logs"
    for log, rows in logs_of(random_shop(5, num_impressions=40)).items():
        (logs / log).mkdir(parents=True)
        names = rows[0].keys() if rows else ("order_id", "user_id", "item_id", "event_time")
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
        pq.write_table(table, logs / log / "x.parquet")
    FAULTS[fault](logs)
    features = [f"features.{owner}={json.dumps([name])}" for name, owner in OWNERS.items() if name != "labels"]
    with pytest.raises(UserError) as error:
        build(spark, logs, tmp_path / "lake", *features, "limits.max_reject_share=0.9")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert not (tmp_path / "lake").exists()
