"""The rivals of benchmarks/build_samples.py: the same samples by plain Spark SQL and by DuckDB. Not a benchmark itself.

Both run a file of SQL beside this one, for the columns of jobs/configs/simulated.toml, and take the vocabularies as a
ready table; they write neither rejects, reports nor an account of the rows. DuckDB has counters too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from build_samples_counters import counter_statements

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from usr_ray.config import Config

FOLDER = Path(__file__).resolve().parent
EVENT_LOGS = ("search_impressions", "recommendation_impressions", "search_clicks", "recommendation_clicks", "orders")
TABLES = ("users", "items")


@dataclass(frozen=True)
class Query:
    """What to build from where."""

    logs: Path
    vocabularies: Path
    """Parquet files of (feature, value, id)."""
    output: Path
    first: str
    last: str
    watermark: str

    def statements(self, file: str, config: Config) -> list[str]:
        """The SQL of a file, the configuration's values put in."""
        labels = config.labels
        delay_us = labels.global_window_us + labels.order_window_us
        lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not line.startswith("--"))
        values = {
            "click_window_s": labels.click_window_us // 1_000_000,
            "order_window_s": labels.order_window_us // 1_000_000,
            "global_window_s": labels.global_window_us // 1_000_000,
            "label_delay_s": delay_us // 1_000_000,
            "history_length": config.histories.length,
            "first": self.first,
            "last": self.last,
            "watermark": self.watermark,
        }
        for name, value in values.items():
            text = text.replace("{" + name + "}", str(value))
        return [statement for statement in text.split(";") if statement.strip()]


def export_vocabularies(lake: Path, target: Path) -> None:
    """The vocabularies that our build fitted, as one Parquet file: what the other two start from."""
    import pyarrow.parquet as pq
    from deltalake import DeltaTable

    target.mkdir(parents=True, exist_ok=True)
    pq.write_table(DeltaTable(str(lake / "vocabularies")).to_pyarrow_table(), target / "vocabularies.parquet")


def run_spark_sql(spark: SparkSession, query: Query, config: Config) -> None:
    """Write the samples as a Delta table partitioned by date."""
    from pyspark.sql import functions as F

    for log in EVENT_LOGS:
        frame = spark.read.parquet(str(query.logs / log))
        known = F.coalesce("ingest_time", "event_time") if "ingest_time" in frame.columns else F.col("event_time")
        frame.withColumn("known_time", known).createOrReplaceTempView(log)
    for table in TABLES:
        spark.read.parquet(str(query.logs / table)).createOrReplaceTempView(table)
    spark.read.parquet(str(query.vocabularies)).createOrReplaceTempView("vocabularies")
    for statement in query.statements("build_samples_spark.sql", config):
        spark.sql(statement)
    spark.table("samples").write.format("delta").partitionBy("impression_date").save(str(query.output))


def run_duckdb(query: Query, config: Config, *, threads: int, memory: str) -> None:
    """Write the samples as Parquet files partitioned by date."""
    import duckdb

    settings: dict[str, str | bool | int | float | list[str]] = {
        "threads": threads,
        "memory_limit": memory,
        "temp_directory": f"{query.output}.spill",
    }
    with duckdb.connect(config=settings) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET preserve_insertion_order = false")
        for log in EVENT_LOGS:
            files = f"read_parquet('{query.logs / log}/*.parquet')"
            names = [row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {files}").fetchall()]
            known = "coalesce(ingest_time, event_time)" if "ingest_time" in names else "event_time"
            connection.execute(f"CREATE VIEW {log} AS SELECT *, {known} AS known_time FROM {files}")
        for table in TABLES:
            connection.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet('{query.logs / table}/*.parquet')")
        connection.execute(
            f"CREATE VIEW vocabularies AS SELECT * FROM read_parquet('{query.vocabularies}/**/*.parquet')"
        )
        counters = counter_statements(config)
        for statement in (*query.statements("build_samples_duckdb.sql", config), *counters):
            connection.execute(statement)
        made = "counted_samples" if counters else "samples"
        connection.execute(
            f"COPY (SELECT * FROM {made}) TO '{query.output}' (FORMAT parquet, COMPRESSION zstd, "
            "ROW_GROUP_SIZE 131072, PARTITION_BY (impression_date))"
        )
