"""Whose files VACUUM must keep: every run below --runs is found, or nothing is deleted. No JVM is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from etl.checks import DataCheckError
from etl.lake.maintain import holds_of_runs

pytestmark = pytest.mark.unit


def make_run(folder: Path, file: str) -> Path:
    folder.mkdir(parents=True)
    manifest = {"version": 3, "files": [{"path": f"impression_date=2026-01-01/{file}"}]}
    (folder / "manifest-train.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_runs_are_found_at_any_depth_and_behind_links_once_each(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "a" / "b", "1.parquet")
    make_run(tmp_path / "disk" / "usr", "2.parquet")
    (runs / "linked").symlink_to(tmp_path / "disk")
    (runs / "a" / "loop").symlink_to(runs)
    found = {hold.run: hold.files for hold in holds_of_runs([str(runs)])}
    assert found == {f"{runs}/a/b": {"1.parquet"}, f"{runs}/linked/usr": {"2.parquet"}}


def test_a_folder_without_runs_or_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nothing is mounted: VACUUM would take every old file for unneeded."""
    make_run(tmp_path / "runs" / "closed", "1.parquet")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(DataCheckError, match=r"--runs \S+empty: holds no run of jobs/train.py at any depth; name the"):
        holds_of_runs([str(tmp_path / "runs"), str(tmp_path / "empty")])
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        DataCheckError, match=r"runs/closed: cannot be read \(Permission denied\), so the files its run"
    ):
        holds_of_runs([str(tmp_path / "runs")])
