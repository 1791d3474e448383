"""LogWriter and the ingest job: whole logs or none, and one clear line for each mistake."""

from __future__ import annotations

import datetime as dt
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.sources import SOURCES, find_source
from etl.sources import writer as writer_module
from etl.sources.writer import LogWriter, input_files, text_column
from jobs import ingest_logs
from usr_ray.cli import run_job
from usr_ray.config import UserError

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
ORDER = {"order_id": ["o1"], "user_id": ["u1"], "item_id": ["i1"], "event_time": np.array([1_000_001])}


def test_logs_have_the_contract_types_and_microseconds(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "logs") as writer:
        writer.append("orders", ORDER)
        writer.append("users", {"age": [3.0], "user_id": [17]})
        writer.declare("search_clicks")
        counts = writer.commit({"source": "test"})
    assert counts == {"orders": 1, "users": 1, "search_clicks": 0}
    orders = pq.read_table(tmp_path / "logs" / "orders")
    assert orders.schema.field("event_time").type == pa.timestamp("us", tz="UTC")
    assert orders["event_time"][0].as_py() == dt.datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=dt.UTC)
    assert pq.read_table(tmp_path / "logs" / "users").to_pylist() == [{"user_id": "17", "age": 3.0}]
    assert pq.read_table(tmp_path / "logs" / "search_clicks").column_names == [
        "click_id",
        "impression_id",
        "user_id",
        "item_id",
        "event_time",
    ]
    assert json.loads((tmp_path / "logs" / "_ingest.json").read_text())["source"] == "test"


def test_long_logs_are_cut_into_files_and_keep_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "ROWS_PER_FILE", 4)
    with LogWriter(tmp_path / "logs") as writer:
        for n in range(10):
            writer.append("users", {"user_id": [f"u{n}"]})
        writer.commit({})
    assert len(list((tmp_path / "logs" / "users").iterdir())) == 3
    assert pq.read_table(tmp_path / "logs" / "users")["user_id"].to_pylist() == [f"u{n}" for n in range(10)]


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        with LogWriter(tmp_path / "logs") as writer:
            for _ in range(3):
                writer.append("orders", ORDER)
            raise RuntimeError("stop")

    monkeypatch.setattr(writer_module, "ROWS_PER_FILE", 2)  # some rows are on disk already
    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_logs(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "logs") as writer:
        writer.append("orders", ORDER)
        writer.commit({})
    with pytest.raises(RuntimeError, match="stop"), LogWriter(tmp_path / "logs", overwrite=True):
        raise RuntimeError("stop")
    assert pq.read_table(tmp_path / "logs" / "orders").num_rows == 1
    with LogWriter(tmp_path / "logs", overwrite=True) as writer:
        writer.append("users", {"user_id": ["u1"]})
        writer.commit({})
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["_ingest.json", "users"]
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty; name a new folder or add --overwrite"):
        LogWriter(tmp_path)
    with pytest.raises(UserError, match=r"replaces only folders written by ingest_logs and this one has no _ingest"):
        LogWriter(tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"mine.txt: is a file; name a folder"):
        LogWriter(tmp_path / "mine.txt")
    with pytest.raises(UserError, match=r"cannot be written .*; name another folder"):
        LogWriter(tmp_path / "mine.txt" / "logs")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_wrong_columns_are_a_bug_of_the_source(tmp_path: Path) -> None:
    with LogWriter(tmp_path / "logs") as writer:
        with pytest.raises(ValueError, match="orders: no column item_id, event_time"):
            writer.append("orders", {"order_id": ["o"], "user_id": ["u"]})
        writer.append("users", {"user_id": ["u"]})
        with pytest.raises(ValueError, match="differ from the columns before"):
            writer.append("users", {"user_id": ["u"], "age": [1]})
        with pytest.raises(KeyError, match="carts"):
            writer.append("carts", ORDER)


def test_text_columns_join_and_keep_nulls() -> None:
    column = text_column("u", pa.array([1, None, 3]), "-", np.array([7, 8, 9]))
    assert column.to_pylist() == ["u1-7", None, "u3-9"]


def test_input_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--input .*nowhere: no such folder; name the folder with the data set's files"
    ):
        input_files(tmp_path / "nowhere", ("*.csv",), what="log")
    with pytest.raises(UserError, match=r"no log \(a\*.csv or b.csv\); put the data set's files there"):
        input_files(tmp_path, ("a*.csv", "b.csv"), what="log")


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="--source 'otto' is not known; choose from: simulated, kuairand"):
        find_source("otto")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_source_has_a_configuration_it_accepts(name: str) -> None:
    from usr_ray.config import load_config

    assert load_config(ROOT / "jobs" / "configs" / f"{name}.toml").data.train_dates


def ingest(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "jobs" / "ingest_logs.py", *words]
    return subprocess.run([str(w) for w in command], capture_output=True, text=True, check=False, cwd="/", timeout=60)


def test_the_job_runs_from_anywhere_and_prints_the_logs(tmp_path: Path) -> None:
    config = ROOT / "jobs" / "configs" / "smoke.toml"
    done = ingest("--source", "simulated", "--logs", tmp_path / "logs", "--config", config)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[1:-1]}
    assert lines["truth"] == "5,000"
    assert set(lines) == {
        "users",
        "items",
        "search_impressions",
        "search_clicks",
        "recommendation_impressions",
        "recommendation_clicks",
        "orders",
        "truth",
    }
    assert "day 4 of 4" in done.stderr


def test_the_job_ends_with_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_job(ingest_logs.main, ["--source", "kuairand", "--logs", str(tmp_path / "logs")]) == 2
    assert capsys.readouterr().err == (
        "error: --source kuairand: --input is missing; name the folder with the data set's files\n"
    )
    assert not (tmp_path / "logs").exists()
