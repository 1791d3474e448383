"""Random names and values from samples to scores: right results, or one line and exit code 2; never a stack trace.

tests/spark/test_random_logs.py has the way from logs to samples. Seeds are fixed, so that a failure can be repeated;
`USR_RAY_ODD_NAMES=20` tries so many worlds instead.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import evaluate, export, report, score
from tests.unit.export_runs import PLAIN, run_config
from tests.unit.samples_table import samples_arrow, samples_spec, write_samples
from usr_ray.cli import run_job
from usr_ray.config import Config, FeaturesConfig, UserError, dotted, load_config, parse_dates
from usr_ray.evaluation.files import read_predictions
from usr_ray.launch.monitor import RayMonitor
from usr_ray.runs.plan import load_manifest, mark_finished, plan_run, write_plan, write_result
from usr_ray.schema import FEATURE_SPEC_PROPERTY, FIRST_ID, VOCABULARIES, FeatureSpec, index_column, scaled_column
from usr_ray.training.loop import train
from usr_ray.training.worker import LocalWorker

pytestmark = pytest.mark.integration

NUM_WORLDS = int(os.environ.get("USR_RAY_ODD_NAMES", "1"))
NUM_ROWS = 160
FEATURES = (
    *(
        "größe",
        "类目",
        "🙂",
        "العربية",
        "e\u0301",
        "a-b",
        "a/b",
        "%s",
        "%41",
        "<b>",
        "&amp;",
        "#",
        "[1]",
        "*",
        "?",
        "~",
    ),
    *("forward", "training", "keys", "items", "pop", "type", "weight", "class", "def", "None", "nan", "0", "-1", "|"),
    *("rows", "input", "scenario_index_", "labels", "user_key_", "tables", "model", "step", "x" * 150, "@", "+", "!"),
)
FOLDERS = (
    *("a b", "für-dich", "北京", "🙂", "50%", "100%s", "#1", "it's", '"x"', "a?b", "a&b=c", "{a,b}", "*", "x" * 190),
    *("e\u0301", "العربية", "-", "~x", "a;b", "(1)", "$HOME", "!", "+", "a:b", "%%", ".hidden", "0", "@"),
)
VALUES = ("", " ", "NULL", "🙂", "日本語", 'q"q', "it's", "two\nlines", "%20", "\\N", "\x00", "é" * 300, "<b>", "${x}")


@dataclass(frozen=True)
class World:
    """A lake and a run of random names."""

    lake: Path
    run_dir: Path
    table: pa.Table
    output: Path


def renamed(spec: FeatureSpec, rng: random.Random) -> tuple[FeatureSpec, dict[str, str]]:
    """The spec with other names of its own features; old column -> new column."""
    names = rng.sample(FEATURES, 3)
    FeaturesConfig(user_categories=tuple(names))  # a configuration may have them
    columns = {"brand_index": index_column(names[0])}
    columns |= {f.column: scaled_column(name) for f, name in zip(spec.dense, names[1:], strict=True)}
    sparse = [replace(f, name=names[0], column=columns[f.column]) if f.name == "brand" else f for f in spec.sparse]
    dense = [replace(f, name=name, column=columns[f.column]) for f, name in zip(spec.dense, names[1:], strict=True)]
    return replace(spec, sparse=tuple(sparse), dense=tuple(dense)), columns


def make_world(root: Path, rng: random.Random) -> World:
    """A table with odd texts, its vocabularies, and a run of two steps trained on it as jobs/train.py does."""
    scenarios = rng.sample(("search", "feed", "a1", "count", "type", "eval"), 2)
    plain = samples_spec(scenarios=scenarios, query_scenarios=scenarios[:1])
    spec, columns = renamed(plain, rng)
    table = samples_arrow(plain, num_rows=NUM_ROWS, num_days=4, seed=rng.randrange(1000))
    for name in ("impression_id", "user_id", "item_id"):
        odd = [f"{text}{rng.choice(VALUES)}" for text in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(odd))
    table = table.rename_columns([columns.get(name, name) for name in table.column_names])
    lake, run_dir, output = (root / "/".join(rng.sample(FOLDERS, 2)) / kind for kind in ("lake", "run", "out"))
    run_dir = run_dir.with_name(rng.choice(FOLDERS) + ".")
    write_deltalake(str(lake / "samples"), table, partition_by=["impression_date"])
    properties = {FEATURE_SPEC_PROPERTY: spec.to_json()}
    DeltaTable(str(lake / "samples")).alter.set_table_properties(properties, raise_if_not_exists=False)
    ids = [(f.name, n) for f in spec.sparse if f.name != "event_hour" for n in range(FIRST_ID, f.num_embeddings)]
    texts = [f"{rng.choice(VALUES)}{number}" for _, number in ids]
    words = {"feature": [name for name, _ in ids], "value": texts, "id": [n for _, n in ids], "count": [1] * len(ids)}
    write_deltalake(str(lake / VOCABULARIES), pa.table(words))
    train_run(run_config(**PLAIN).to_dict(), scenarios, lake, run_dir)
    return World(lake, run_dir, table, output)


def train_run(raw: dict[str, Any], scenarios: list[str], lake: Path, run_dir: Path) -> None:
    raw |= {"scenarios": scenarios, "query_scenarios": scenarios[:1]}
    raw["data"] |= {"train_dates": "2026-01-01:2026-01-02"}
    raw["train"] |= {"num_epochs": 1, "log_every_steps": 1}
    plan = plan_run(Config.from_dict(raw), str(lake), str(run_dir), command=["jobs/train.py"])
    write_plan(plan)
    monitor = RayMonitor(run_dir, run_name=run_dir.name, rank=0, factory=_Metric)
    held_out, worker = load_manifest(run_dir, "eval"), LocalWorker("cpu")
    manifests = {"train_manifest": plan.train_manifest, "eval_manifest": held_out}
    result = train(plan.config, worker, **manifests, run_dir=run_dir, monitor=monitor)  # type: ignore[arg-type]
    monitor.close()
    write_result(run_dir, result, held_out)
    mark_finished(plan, outcome="finished", step=result.state.step)
    assert result.state.step >= 1


def scores_of(lake: Path, run_dir: Path, output: Path) -> dict[str, float]:
    """Impression -> probability of a click of a table of scores, which are those that the run's evaluation gave."""
    scores = DeltaTable(str(output)).to_pyarrow_table()
    of_id = dict(zip(scores["impression_id"].to_pylist(), scores["p_ctr"].to_pylist(), strict=True))
    assert len(of_id) == scores.num_rows
    record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    predictions, _, _ = read_predictions(run_dir / "predictions.parquet", record["config"]["scenarios"])
    held_out = load_manifest(run_dir, "eval")
    tables = [pq.read_table(lake / "samples" / file.path, partitioning=None) for file in held_out.files]
    ids = [impression for table in tables for impression in table["impression_id"].to_pylist()]
    found = [of_id[ids[number]] for number in predictions.row_number_N]
    assert found
    assert found == pytest.approx(predictions.probs_NT[:, 0].tolist(), rel=1e-5)
    return of_id


class _Metric:
    """What Ray asks of a metric: names and tags of ASCII."""

    def __init__(self, kind: str, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert all(text.isascii() and text.isidentifier() for text in (name, *tag_keys))

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert all(0 < len(tag) < 256 and tag.isascii() and tag.isprintable() for tag in tags.values()), tags

    inc = set


# An export is the dear one: tests/e2e/test_export.py has it of a run and into a folder with odd names, and
# tests/unit/serving/test_export_model.py has which vocabularies go along.
@pytest.mark.parametrize(
    ("seed", "is_exported"),
    [*((n, False) for n in range(NUM_WORLDS)), *(pytest.param(n, n == 0, marks=pytest.mark.slow) for n in (0, 1))],
)
def test_names_of_any_kind_go_the_whole_way(
    seed: int, is_exported: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path, random.Random(seed))
    run, lake = ["--run-dir", str(world.run_dir)], ["--lake", str(world.lake)]
    dates = ["--dates", "2026-01-03:2026-01-04"]
    for job, words in (
        (evaluate, [*run, *lake, *dates, "--output", str(world.output / "evaluation.json")]),
        (score, [*run, *lake, *dates, "--output", str(world.output / "scores")]),
        (export, [*run, *lake, "--output", str(world.output / "export")]),
        (report, [*run, *lake, "--output", str(world.output / "report.html")]),
    ):
        if job is not export or is_exported:
            assert run_job(job.main, words) == 0, capsys.readouterr().err[-3000:]
    days = [date.isoformat() for date in world.table["impression_date"].to_pylist()]
    asked = [i for i, day in zip(world.table["impression_id"].to_pylist(), days, strict=True) if day > "2026-01-02"]
    assert sorted(scores_of(world.lake, world.run_dir, world.output / "scores")) == sorted(asked)
    if is_exported:  # it held its programs to the training model; its vocabularies are the lake's
        columns, key = ["feature", "value", "id"], [("feature", "ascending"), ("id", "ascending")]
        exported = pq.read_table(world.output / "export" / "vocabularies.parquet").select(columns)
        kept = DeltaTable(str(world.lake / VOCABULARIES)).to_pyarrow_table().select(columns)
        assert exported.sort_by(key).to_pylist() == kept.sort_by(key).to_pylist()
    events = EventAccumulator(str(world.run_dir / "tensorboard"))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]
    html = (world.output / "report.html").read_text(encoding="utf-8")
    assert world.run_dir.name.replace("&", "&amp;").replace("'", "&#39;").replace('"', "&#34;") in html


DATES = (
    *("", " ", ":", "2026-01-01:", "2026-01-02:2026-01-01", "2026-13-01", "01.01.2026", "2026-W01-1", "20260101"),
    *("9999-12-31", "0001-01-01:9999-12-31", "🙂", "today", "2026-01-01T00:00", "2026-01-03:2026-01-04 "),
    "\u0662\u0660\u0662\u0666-\u0660\u0661-\u0660\u0661",  # in Arabic digits
)
WORDS = (
    "nan",
    "inf",
    "-1",
    "0",
    "1",
    "3",
    "0.5",
    "1e400",
    "9" * 25,
    '""',
    '"🙂"',
    "[1]",
    "['a']",
    "{}",
    "true",
    "'x/y'",
)


def outcome(job: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """0, or 2 with one line."""
    code = run_job(job.main, words)
    error = capsys.readouterr().err
    assert code == 0 or (code == 2 and error.startswith("error: ") and error.count("\n") == 1), (words, error[-3000:])
    return code


def test_dates_of_any_kind_are_right_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path, random.Random(100))
    days = [date.isoformat() for date in world.table["impression_date"].to_pylist()]
    for number, text in enumerate(DATES):
        words = ["--run-dir", str(world.run_dir), "--lake", str(world.lake), f"--dates={text}"]
        output = tmp_path / f"scores{number}"
        if outcome(score, [*words, "--output", str(output)], capsys) == 0:
            first, last = map(str, parse_dates(text, where="--dates"))
            assert DeltaTable(str(output)).to_pyarrow_table().num_rows == sum(first <= day <= last for day in days)
        else:
            assert not output.exists(), text


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_settings_of_any_value_are_taken_or_refused_before_a_run_begins(seed: int, tmp_path: Path) -> None:
    """Keys of each section with values of each kind, together with what a small run needs."""
    rng = random.Random(seed)
    lake = tmp_path / "lake"
    write_samples(lake, samples_spec(), num_rows=80, num_days=4)
    base = [f"{key}={json.dumps(value)}" for key, value in dotted(run_config().to_dict()).items() if value != {}]
    base.append("data.train_dates='2026-01-01:2026-01-02'")
    keys, outcomes = sorted(dotted(Config().to_dict())), []
    for _ in range(120):
        override = f"{rng.choice(keys)}={rng.choice(WORDS)}"
        try:
            plan = plan_run(load_config(None, [*base, override]), str(lake), str(tmp_path / "run"))
        except UserError as error:
            outcomes.append((override, str(error)))
        else:
            outcomes.append((override, ""))
            assert plan.train_manifest.num_rows > 0
    assert not [(override, line) for override, line in outcomes if "\n" in line or len(line) > 600]
    assert 5 < sum(not line for _, line in outcomes) < 100
    assert not (tmp_path / "run").exists()
