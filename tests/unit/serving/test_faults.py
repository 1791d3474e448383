"""The faults of the service that `make chaos` injects, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos import faults_serving
from tests.chaos.bench import Bench, Fault
from tests.chaos.observe import Seen
from tests.chaos.serving_bench import Judge, requests, write_version
from usr_ray.serving.openapi import EXPLAIN_ANSWER, RANK_ANSWER
from usr_ray.serving.service import Service, Settings
from usr_ray.serving.versions import move_pointer

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("fault", faults_serving.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_leads_to_no_wrong_score(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults_serving, "NUM_FLIPS", 16)  # 100 in make chaos
    seen = fault.observe(Bench(tmp_path, tmp_path, (), {}))
    assert seen.is_right, seen.words


def test_answers_have_the_fields_of_the_openapi_document(tmp_path: Path) -> None:
    write_version(tmp_path, "one", 1.0)
    move_pointer(tmp_path, "one")
    service = Service(Settings(tmp_path, poll_s=3600.0, store_deadline_s=30.0))
    body = json.dumps(requests()[1]).encode()
    answers = service.submit(body, ranked=True).result(60), service.submit_explained(body).result(60)
    service.close()
    for (status, answer), schema in zip(answers, (RANK_ANSWER, EXPLAIN_ANSWER), strict=True):
        assert (status, set(answer)) == (200, set(schema["properties"]))
        for name in ("items", "history"):
            if name in answer:
                assert set(answer[name][0]) == set(schema["properties"][name]["items"]["properties"])
        assert set(answer["unknown"]) == set(schema["properties"]["unknown"]["properties"])


def test_the_judge_sees_a_wrong_score_and_a_fault_without_a_name(tmp_path: Path) -> None:
    folder, other = (write_version(tmp_path / place, "one", weight) for place, weight in (("a", 1.0), ("b", 0.9)))
    move_pointer(tmp_path / "b", "one")
    service = Service(Settings(tmp_path / "b", poll_s=3600.0, store_deadline_s=30.0))
    judge = Judge([folder])
    whole, without = (judge._right["one", is_degraded] for is_degraded in (False, True))
    assert [a != b for a, b in zip(whole, without, strict=True)] == [False] + [True] * 11  # one user is unknown
    judge.ask(service, 0)
    service.ranker._program._session = None
    judge.ask(service, 1)
    service.close()
    assert other != folder
    assert dict(judge.counts) == {"wrong": 1, "500": 1}
    assert not judge.note(Seen(), "wrong", "500").is_right
