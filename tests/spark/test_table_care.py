"""OPTIMIZE and VACUUM around the runs that are pinned to a version, sizes on the disk, guards against drift."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import deltalake
import pyarrow.parquet as pq
import pytest
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from etl.checks import DataCheckError
from etl.features.vocabulary import feature_spec
from etl.lake.maintain import MaintainRequest, maintain
from etl.lake.tables import (
    Lake,
    check_tables,
    label_constraints,
    prepare_samples,
    replace_dates,
    samples_schema,
    write_rejects,
)
from etl.session import ROW_GROUP_ROWS
from jobs import maintain_tables
from usr_ray.cli import run_job
from usr_ray.config import DAY_US, Config, load_config, parse_dates
from usr_ray.data.manifest import build_manifest
from usr_ray.data.pins import pin_name, write_pin
from usr_ray.schema import ALL_LABELS, REJECTS, SAMPLES

pytestmark = pytest.mark.spark

CONFIG = load_config(None, ('features.user_numbers=["age"]',))
DAYS = ("2026-01-01", "2026-01-02")


def rows(spark: SparkSession, day: str, count: int, parts: int) -> DataFrame:
    """Rows of one date as the build writes them, every label 0."""
    schema = samples_schema(feature_spec(CONFIG))
    made = {
        "array<bigint>": "array(id % 7)",
        "array<float>": "array(cast(id as float))",
        "float": "0.0",
        "boolean": "true",
        "timestamp": f"timestamp'{day} 00:00:00'",
        "date": f"date'{day}'",
    }
    kinds = {field.name: field.dataType.simpleString() for field in schema}
    return spark.range(0, count, 1, parts).selectExpr(
        *(f"cast({made.get(kind, 'id')} as {kind}) as {name}" for name, kind in kinds.items())
    )


def write_day(spark: SparkSession, lake: Path, day: str, count: int = 40, parts: int = 4) -> None:
    replace_dates(rows(spark, day, count, parts), f"{lake}/{SAMPLES}", f"impression_date = DATE'{day}'")


@pytest.fixture(scope="module")
def template(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dates of four files each, and a rejects table: versions 0 to 2 of the samples."""
    lake = tmp_path_factory.mktemp("care") / "lake"
    prepare_samples(spark, Lake(str(lake)), feature_spec(CONFIG), CONFIG, {})
    for day in DAYS:
        write_day(spark, lake, day)
    rejected = spark.sql("SELECT 'orders' log, 'no_click' reason, '{}' row, DATE'2026-01-01' date")
    write_rejects(spark, Lake(str(lake)), rejected, "date = DATE'2026-01-01'")
    return lake


@pytest.fixture
def lake(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "lake {a,b}"))  # signs of a glob, which stand for themselves


@pytest.fixture
def samples_alone(lake: Path) -> Path:
    """Every VACUUM goes through all tables of a lake; tests/spark/test_item_features.py has two."""
    shutil.rmtree(lake / REJECTS)
    return lake


@pytest.fixture(scope="module")
def of_rules(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For writes that are refused: they leave nothing but files of no version."""
    return Path(shutil.copytree(template, tmp_path_factory.mktemp("rules") / "lake"))


def care(spark: SparkSession, lake: Path, **more: object) -> list[str]:
    lines: list[str] = []
    maintain(spark, MaintainRequest(lake=Lake(str(lake)), **more), lines.append)  # type: ignore[arg-type]
    return lines


def files_on_disk(lake: Path) -> set[str]:
    return {path.name for path in (lake / SAMPLES).rglob("*.parquet") if "_delta_log" not in path.parts}


def start_run(lake: Path, run_dir: Path, last: str = DAYS[1], status: str = "running") -> None:
    """A run directory as jobs/train.py leaves it."""
    run_dir.mkdir(parents=True)
    build_manifest(lake, dates=parse_dates(f"{DAYS[0]}:{last}", where="")).save(run_dir / "manifest-train.json")
    (run_dir / "config.json").write_text(json.dumps({"status": status}))


def is_whole(run_dir: Path) -> bool:
    """Every file that the run reads is there."""
    manifest = json.loads((run_dir / "manifest-train.json").read_text())
    return all((Path(manifest["table_uri"]) / file["path"]).exists() for file in manifest["files"])


def test_optimize_merges_small_files_and_keeps_every_row(spark: SparkSession, lake: Path) -> None:
    before = deltalake.DeltaTable(str(lake / SAMPLES))
    assert len(before.file_uris()) == 8
    said = care(spark, lake, optimize=True, dry_run=True)
    assert "samples: OPTIMIZE merges 8 small files of 2 partitions" in said
    assert deltalake.DeltaTable(str(lake / SAMPLES)).version() == before.version()
    lines = care(spark, lake, optimize=True)
    assert "samples: OPTIMIZE made 2 files of 8" in lines
    assert any(re.match(r"samples +3 +2 +0.0 +0.0\d +40 +8 ", line) for line in lines), lines
    after = deltalake.DeltaTable(str(lake / SAMPLES))
    assert len(after.file_uris()) == 2
    keys = ["impression_date", "impression_id"]
    assert after.to_pyarrow_table().sort_by([(k, "ascending") for k in keys]) == before.to_pyarrow_table().sort_by(
        [(k, "ascending") for k in keys]
    )
    # Nothing left to do: no further version.
    care(spark, lake, optimize=True)
    assert deltalake.DeltaTable(str(lake / SAMPLES)).version() == after.version()


def test_row_groups_have_the_size_that_trainers_read_well(spark: SparkSession, tmp_path: Path) -> None:
    """Of a table of one column, for which the session's options are the same as for all."""
    path = f"{tmp_path}/{REJECTS}"
    spark.range(0, 300_000, 1, 2).write.format("delta").save(path)
    for optimize, expected in ((False, [131_072, 18_928] * 2), (True, [131_072, 131_072, 37_856])):
        if optimize:
            care(spark, tmp_path, optimize=True)
        sizes = [pq.ParquetFile(unquote(file)).metadata for file in deltalake.DeltaTable(path).file_uris()]
        groups = [m.row_group(n).num_rows for m in sizes for n in range(m.num_row_groups)]
        assert groups == expected
    assert 64_000 <= ROW_GROUP_ROWS <= 256_000


def test_vacuum_refuses_to_delete_what_a_run_is_pinned_to(
    spark: SparkSession,
    samples_alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lake = samples_alone
    run = tmp_path / "runs" / "tuesday" / "usr"
    start_run(lake, run, status="finished")
    write_day(spark, lake, DAYS[1])
    there = files_on_disk(lake)
    request = {"runs": [str(tmp_path / "runs")], "vacuum": True, "keep_us": 0}
    message = (
        rf"{lake}/samples: VACUUM would delete 4 files of version 2, to which the run {run} \(finished\) is pinned; "
        "give a longer --keep, or --keep-pinned .*, or leave it out of --runs"
    )
    with monkeypatch.context() as patch:
        patch.setattr(SparkSession, "stop", lambda self: None)  # the other tests' session
        words = ["--lake", str(lake), "--runs", str(tmp_path / "runs"), "--vacuum", "--keep", "0 s", "--dry-run"]
        assert run_job(maintain_tables.main, words) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert "rows a row group" in printed.out
    assert files_on_disk(lake) == there

    # Young files stay anyway, and a run whose dates did not change needs nothing old.
    assert any("VACUUM deletes 0 files" in line for line in care(spark, lake, **request | {"keep_us": DAY_US}))
    other = tmp_path / "other"
    start_run(lake, other / "run")
    lines = care(spark, lake, runs=[str(other)], vacuum=True, keep_us=0)
    assert any("VACUUM deleted 4 files" in line for line in lines)
    assert is_whole(other / "run")
    assert not is_whole(run)


def test_vacuum_can_delete_around_a_run_and_says_who_keeps_what(
    spark: SparkSession, samples_alone: Path, tmp_path: Path
) -> None:
    lake = samples_alone
    for _ in range(2):  # the files in between belong to no run
        start = tmp_path / "runs" / "usr"
        if not start.exists():
            start_run(lake, start)
        write_day(spark, lake, DAYS[1])
    lines = care(spark, lake, runs=[str(tmp_path / "runs")], vacuum=True, keep_us=0, keep_pinned=True, optimize=True)
    assert f"version 2: run {start} (running) reads 8 files, 4 of them old" in lines
    assert "samples: VACUUM deleted 4 files older than 0 days; 4 stay for the runs pinned to them" in lines
    assert is_whole(start)
    # What OPTIMIZE has put aside stays until the next VACUUM.
    assert len(files_on_disk(lake)) == 4 + 8 + 2
    lines = care(spark, lake, vacuum=True, keep_us=0)
    assert any(line.startswith("no run is known to be pinned") for line in lines)
    assert len(files_on_disk(lake)) == 2


def test_a_pin_in_the_lake_holds_files_without_the_run_s_folder(
    spark: SparkSession, samples_alone: Path, tmp_path: Path
) -> None:
    lake = samples_alone
    run = tmp_path / "elsewhere" / "\u00dcber-uns"
    assert pin_name(run).startswith("_ber-uns-"), "a name that Spark's readers take for hidden"
    write_pin([build_manifest(lake, dates=parse_dates(":".join(DAYS), where=""))], run)
    write_day(spark, lake, DAYS[1])
    there = files_on_disk(lake)
    with pytest.raises(DataCheckError, match=rf"version 2, to which the run {run} .*--unpin {pin_name(run)} once"):
        care(spark, lake, vacuum=True, keep_us=0)
    assert files_on_disk(lake) == there
    with pytest.raises(DataCheckError, match=rf"--unpin gone: {lake} has no such pin; it has: {pin_name(run)}"):
        care(spark, lake, unpin=["gone"])
    care(spark, lake, unpin=[pin_name(run)], vacuum=True, keep_us=0, dry_run=True)
    assert (lake / "pins" / f"{pin_name(run)}.json").exists()
    care(spark, lake, unpin=[pin_name(run)], vacuum=True, keep_us=0)
    assert len(files_on_disk(lake)) == 8


def test_what_maintenance_refuses_is_one_line(spark: SparkSession, lake: Path, tmp_path: Path) -> None:
    with pytest.raises(DataCheckError, match=r"--lake .*nowhere: holds no tables; run jobs/build_samples.py"):
        care(spark, tmp_path / "nowhere", vacuum=True)
    with pytest.raises(DataCheckError, match=r"--runs .*nowhere: there is no such folder"):
        care(spark, lake, runs=[str(tmp_path / "nowhere")])
    with pytest.raises(DataCheckError, match=r"--keep 90 days: .* remembers for 60 days .*'interval 90 days'"):
        care(spark, lake, vacuum=True, keep_us=90 * DAY_US)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "manifest-eval.json").write_text("{")
    with pytest.raises(DataCheckError, match=r"manifest-eval.json: cannot be read .*, so the files its run needs are"):
        care(spark, lake, runs=[str(tmp_path / "runs")], vacuum=True)


@pytest.mark.parametrize("name", label_constraints())
def test_delta_refuses_rows_that_break_a_label_rule_whoever_writes_them(
    spark: SparkSession, of_rules: Path, name: str
) -> None:
    """Plain Spark, none of our code: each row breaks one rule, and the others as little as can be."""
    # In the order is_click, is_order, is_click_global, is_order_global.
    bad = {
        "is_click_is_0_or_1": (0.5, 0, 1, 0),
        "is_order_is_0_or_1": (1, 0.5, 1, 1),
        "is_click_global_is_0_or_1": (1, 0, 2, 0),
        "is_order_global_is_0_or_1": (1, 0, 1, 0.5),
        "is_order_le_is_click": (0, 1, 1, 1),
        "is_click_le_is_click_global": (1, 0, 0, 0),
        "is_order_le_is_order_global": (1, 1, 1, 0),
        "is_order_global_le_is_click_global": (0, 0, 0, 1),
    }[name]
    values = dict(zip(("is_click", "is_order", "is_click_global", "is_order_global"), bad, strict=True))
    assert set(values) == set(ALL_LABELS)
    frame = rows(spark, DAYS[0], 1, 1).withColumns({k: F.lit(v).cast("float") for k, v in values.items()})
    with pytest.raises(Py4JJavaError, match=rf"CHECK constraint {name} "):
        frame.write.format("delta").mode("append").save(f"{of_rules}/{SAMPLES}")
    assert deltalake.DeltaTable(str(of_rules / SAMPLES)).version() == 2


def alter(clause: str, table: str = SAMPLES) -> Callable[[SparkSession, Path], None]:
    return lambda spark, lake: spark.sql(f"ALTER TABLE delta.`{lake}/{table}` {clause}") and None


def foreign(spark: SparkSession, lake: Path) -> None:
    shutil.rmtree(lake / SAMPLES)
    spark.sparkContext._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
    spark.range(3).write.format("delta").save(f"{lake}/{SAMPLES}")


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (
            alter("SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')"),
            (),
            r"/samples: deletion vectors have been switched on, .*'false'\) and REORG TABLE .* APPLY \(PURGE\)",
        ),
        (
            alter("SET TBLPROPERTIES ('delta.enableDeletionVectors' = 'true')", REJECTS),
            (),
            r"/rejects: deletion vectors have been switched on",
        ),
        (
            alter("SET TBLPROPERTIES ('delta.columnMapping.mode' = 'name')"),
            (),
            r"delta.columnMapping.mode has been set to 'name', .*; RESTORE the table to the version before, or build",
        ),
        (
            alter("DROP CONSTRAINT is_order_le_is_click"),
            (),
            r"the CHECK constraint is_order_le_is_click is missing, needed is_order <= is_click; run ALTER TABLE delta",
        ),
        (
            alter("ADD COLUMN note STRING"),
            (),
            r"column 'note' is string, this version of the ETL writes no such column; go on with the version that",
        ),
        (
            alter("ALTER COLUMN request_key DROP NOT NULL"),
            (),
            r"column 'request_key' is bigint, this version of the ETL writes bigint not null",
        ),
        (foreign, (), r"/samples: was not made by jobs/build_samples.py .*; move that table away, or build into a new"),
        (
            None,
            ('features.user_numbers=["age", "income"]',),
            r'built with features.user_numbers = \["age"\], the configuration has \["age", "income"\]; .* a new --lake',
        ),
    ],
)
def test_drift_is_one_line_with_its_way_out(
    spark: SparkSession,
    lake: Path,
    change: Callable[[SparkSession, Path], None] | None,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    config: Config = load_config(None, overrides) if overrides else CONFIG
    if change is not None:
        change(spark, lake)
    with pytest.raises(DataCheckError, match=message):
        check_tables(spark, Lake(str(lake)), config, feature_spec(config))


def test_a_table_of_another_version_of_the_code_is_refused(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this version had a column more, and another rule."""
    import etl.lake.tables as tables

    check_tables(spark, Lake(str(lake)), CONFIG, feature_spec(CONFIG))
    monkeypatch.setattr(tables, "samples_schema", lambda spec: samples_schema(spec).add("is_ad", "boolean", False))
    with pytest.raises(DataCheckError, match="column 'is_ad' is missing, this version of the ETL writes boolean not n"):
        check_tables(spark, Lake(str(lake)), CONFIG, feature_spec(CONFIG))
    monkeypatch.setattr(tables, "samples_schema", samples_schema)
    rules = {"is_order_le_is_click": "is_order < 2 * is_click"}
    monkeypatch.setattr(tables, "label_constraints", lambda: rules)
    with pytest.raises(
        DataCheckError, match=r"run ALTER TABLE .* DROP CONSTRAINT .* and ALTER TABLE .* ADD CONSTRAINT"
    ):
        check_tables(spark, Lake(str(lake)), CONFIG, feature_spec(CONFIG))
