"""From a trained run to answers, on the demo's smoke run: publish, replay, serve."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient

from jobs import replay
from usr_ray.cli import run_job
from usr_ray.launch.environment import free_port
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
    smoke: Path, registry: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--run-dir", smoke / "run", "--lake", smoke / "lake", "--registry", registry, "--dates", "2026-01-04"]
    assert run_job(replay.main, [str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "impressions: every input equal, probabilities within 1e-6" in printed
    named = {line.split()[0] for line in printed.splitlines() if " 0 " in line}
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


def test_the_page_shows_history_ranking_and_signals_in_a_browser(registry: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium or google-chrome on PATH to open the page with")
    service, port = Service(Settings(registry, page=True, log_dir=tmp_path / "log")), free_port(18_600)
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        case = next(
            c for c in json.loads((stable_folder(registry) / "golden.json").read_text()) if "query" in c["request"]
        )
        explained = TestClient(make_app(service)).post("/v1/explain", json=case["request"]).json()
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}"]
        words += ["--virtual-time-budget=20000", "--dump-dom"]
        where = f"http://127.0.0.1:{port}/?scenario=search&user={case['request']['user_id']}"
        done = subprocess.run([chromium, *words, where], capture_output=True, text=True, timeout=120, check=True)
    finally:
        server.should_exit = True
        thread.join()
        service.close()
    ranked = sorted(explained["items"], key=lambda item: -item["p_ctr"])
    shown = re.findall(r'<tr data-id="([^"]+)">(.*?)</tr>', done.stdout)
    assert [name for name, _ in shown] == [item["id"] for item in ranked]
    for (_, row), item in zip(shown, ranked, strict=True):
        assert f">{100 * item['p_ctr']:.2f} %<" in row
        name, effect = max(item["signals"].items(), key=lambda pair: abs(pair[1]))
        assert name.replace("_", " ") in row, effect
    assert done.stdout.count(" ago</td>") == len(explained["history"])
    assert {item["id"]: item["p_ctr"] for item in explained["items"]} == {i["id"]: i["p_ctr"] for i in case["items"]}
