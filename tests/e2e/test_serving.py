"""From a trained run to answers, on the demo's smoke run: publish, replay, serve."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.e2e.conftest import Run
from usr_ray.serving.app import make_app
from usr_ray.serving.ranker import Ranker
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.versions import RegistryError, stable_folder

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def registry(smoke: Path) -> Path:
    """The demo's own."""
    return smoke / "registry"


def test_every_impression_of_the_held_out_day_is_served_as_it_was_trained(
    smoke: Path, registry: Path, run: Run
) -> None:
    words = ["--run-dir", smoke / "run", "--lake", smoke / "lake", "--registry", registry, "--dates", "2026-01-04"]
    done = run(sys.executable, "jobs/replay.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "impressions: every input equal, probabilities within 1e-6" in done.stdout
    named = {line.split()[0] for line in done.stdout.splitlines() if " 0 " in line}
    assert {"user_id", "query", "price", "search_history_ages_s", "p_ctr"} <= named


def test_the_service_answers_with_the_version_s_own_probabilities(registry: Path) -> None:
    service = Service(Settings(registry))
    client = TestClient(make_app(service))
    golden = json.loads((stable_folder(registry) / "golden.json").read_text())
    assert {case["request"]["scenario"] for case in golden} == {"search", "recommendation"}
    for case in golden[:4]:
        answer = client.post("/v1/score", json=case["request"])
        assert answer.status_code == 200, answer.text
        for found, expected in zip(answer.json()["items"], case["items"], strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
    request = golden[0]["request"]
    ranked = client.post("/v1/rank", json=request | {"k": 3, "task": "ctcvr"}).json()["items"]
    assert [i["p_ctcvr"] for i in ranked] == sorted((i["p_ctcvr"] for i in golden[0]["items"]), reverse=True)[:3]
    new = client.post("/v1/score", json=request | {"user_id": "nobody", "candidates": ["never seen"]}).json()
    assert new["unknown"] == {"user": True, "candidates": ["never seen"]}
    service.close()


def test_a_version_that_was_tampered_with_or_computes_otherwise_is_not_served(registry: Path, tmp_path: Path) -> None:
    copy = tmp_path / "registry"
    shutil.copytree(registry, copy)
    folder = stable_folder(copy)
    (folder / "items_numbers.npy").write_bytes((folder / "items_numbers.npy").read_bytes()[:-1] + b"\x00")
    with pytest.raises(RegistryError, match=r"items_numbers.npy: missing or changed since it was published"):
        Ranker.load(copy)
    ranker = Ranker.load(registry)
    case = json.loads((stable_folder(registry) / "golden.json").read_text())[0]
    case["items"][0]["p_ctr"] += 1e-4
    with pytest.raises(RegistryError, match=r"p_ctr of a golden request is .*, it was .* when it was published"):
        ranker.check_golden([case])
