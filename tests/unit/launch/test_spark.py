"""How one job starts another under Spark: its environment, with and without an archive of the JVM's classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from usr_ray.launch import spark


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Spark with an archive, for jobs that find nothing else set."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / spark.CLASSES).touch()
    for name in ("SPARK_CONF_DIR", "SPARK_SUBMIT_OPTS", "SPARK_DRIVER_MEMORY", "SPARK_LOCAL_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    return tmp_path


def test_with_an_archive_the_settings_go_by_a_jar_and_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_SUBMIT_OPTS", "-Dmine=1")
    environment = spark.spark_environment()
    assert environment["SPARK_CONF_DIR"] == str(home / "conf" / "usr-ray-logging.jar")
    assert environment["SPARK_DRIVER_MEMORY"] == "2g"
    options = environment["SPARK_SUBMIT_OPTS"].split()
    assert options[0] == "-Dmine=1"
    assert {"-XX:TieredStopAtLevel=1", f"-XX:SharedArchiveFile={home / 'conf' / 'usr-ray-classes.jsa'}"} <= set(options)


def test_what_was_set_and_what_the_variables_cannot_carry_is_left_to_spark(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARK_CONF_DIR", "/etc/spark")
    assert spark.spark_environment()["SPARK_CONF_DIR"] == "/etc/spark"
    assert "SPARK_SUBMIT_OPTS" not in spark.spark_environment()

    monkeypatch.delenv("SPARK_CONF_DIR")
    own = tmp_path / "own"
    own.mkdir()
    (own / "spark-defaults.conf").write_text("spark.driver.memory  4g\nspark.sql.shuffle.partitions  8\n")
    monkeypatch.setattr(spark, "CONF_DIR", own)
    assert spark.spark_environment()["SPARK_CONF_DIR"] == str(own), "the partitions would be lost"

    (own / "spark-defaults.conf").write_text("spark.driver.memory  4g\n")
    assert spark.spark_environment()["SPARK_DRIVER_MEMORY"] == "4g"
    (home / "conf" / spark.CLASSES).unlink()
    assert spark.spark_environment()["SPARK_CONF_DIR"] == str(own)
    assert "SPARK_DRIVER_MEMORY" not in spark.spark_environment()
