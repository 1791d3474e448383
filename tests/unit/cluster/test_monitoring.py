"""Dashboard, scrape configuration and alerts: every metric is one that the code, or Ray, publishes; promtool checks."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from usr_ray.launch.monitor import (
    ATTEMPT_COUNTER,
    CHECKPOINT_AGE_GAUGE,
    CHECKPOINT_COUNTER,
    EVALUATION_GAUGES,
    RANK_GAUGES,
    RUN_GAUGES,
    TERM_GAUGE,
)
from usr_ray.serving.metrics import ServiceMetrics

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "cluster" / "monitoring"
GAUGES = [name for gauges in (RANK_GAUGES, RUN_GAUGES, EVALUATION_GAUGES) for name, _ in gauges.values()]
PUBLISHED = {f"ray_{name}" for name in [*GAUGES, TERM_GAUGE, CHECKPOINT_AGE_GAUGE]}
PUBLISHED |= {f"ray_{name}_total" for name in (CHECKPOINT_COUNTER, ATTEMPT_COUNTER)}
LABELS = {"run", "rank", "term", "scenario", "task", "outcome", "job", "instance", "GpuIndex"}
LABELS |= {"path", "status", "stage", "what", "replica", "le"}
"""Tags of launch/monitor.py and of serving/metrics.py, and what Ray and Prometheus add."""


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def metrics(text: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_[a-z_]+|up)\b(?=[{\s)\[]|$)", text)) - {"ray_gpu", "up_"}


def serving_metrics() -> set[str]:
    """As Prometheus stores them."""
    published = ServiceMetrics(lambda: 0, lambda: 0.0, lambda: False)
    types = {metric.name: metric.type for metric in published.collect()}
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket",)}
    return {name + ending for name, kind in types.items() for ending in endings[kind]}


def dashboard(name: str = "usr_ray") -> dict[str, Any]:
    return json.loads((FOLDER / "grafana" / "dashboards" / f"{name}.json").read_text(encoding="utf-8"))


def panel_expressions(name: str = "usr_ray") -> list[str]:
    return [target["expr"] for panel in dashboard(name)["panels"] for target in panel.get("targets", ())]


def rules() -> list[dict[str, Any]]:
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def test_every_metric_of_ours_is_on_the_dashboard_and_none_that_is_not() -> None:
    shown = {name for expression in panel_expressions() for name in metrics(expression)}
    ours = {name for name in shown if name.startswith("ray_usr_ray_")}
    assert ours == PUBLISHED
    documented = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert {name for name in PUBLISHED if name not in documented} == set()
    assert set(re.findall(r"\bray_usr_ray_[a-z_]+", documented)) <= PUBLISHED


def test_every_metric_of_the_service_is_on_its_dashboard_and_none_that_is_not() -> None:
    shown = {name for text in panel_expressions("usr_ray_serving") for name in re.findall(r"usr_ray_serving_\w+", text)}
    assert shown == serving_metrics()
    documented = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert {name for name in shown if name.removesuffix("_bucket") not in documented} == set()
    in_alerts = {name for rule in rules() for name in re.findall(r"usr_ray_serving_\w+", rule["expr"])}
    assert in_alerts < shown


def test_every_metric_and_label_of_an_alert_is_published() -> None:
    texts = [rule["expr"] for rule in rules()]
    used = {name for text in texts for name in metrics(text)}
    assert {name for name in used if name.startswith("ray_usr_ray_")} <= PUBLISHED
    for text in [*texts, *panel_expressions(), *panel_expressions("usr_ray_serving")]:
        assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", text)) <= LABELS, text
    for rule in rules():
        for note in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", note)) <= LABELS


def test_every_metric_of_rays_is_one_that_ray_names() -> None:
    package = Path(str(importlib.metadata.distribution("ray").locate_file("ray/dashboard/modules/reporter")))
    source = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    everywhere = [*panel_expressions(), *(rule["expr"] for rule in rules())]
    rays = {name for text in everywhere for name in metrics(text)} - PUBLISHED - {"up"}
    assert rays, "machines are watched too"
    assert {name for name in rays if f'"{name.removeprefix("ray_")}"' not in source} == set()


def test_every_alert_says_what_to_do_and_has_a_test_of_its_own() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert set(rule["annotations"]) == {"summary", "action"}
    cases = [case for test in read("alerts_test.yml")["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    assert fires == set(names)
    described = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert [name for name in names if name not in described] == []


def test_scraping_asks_the_ports_and_files_that_the_clusters_open() -> None:
    job, service = read("prometheus.yml")["scrape_configs"]
    assert (job["job_name"], service["job_name"]) == ("ray", "serving"), "the alerts and the dashboard select them"
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert service["file_sd_configs"][0]["files"] == ["serving.json"]
    ray, serving, spark = read("prometheus-kubernetes.yml")["scrape_configs"]
    assert (ray["job_name"], serving["job_name"], spark["job_name"]) == ("ray", "serving", "spark")
    manifests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cluster" / "kubernetes").glob("*.yaml"))
    parts = set(re.findall(r"app\.kubernetes\.io/component: (\S+)", manifests))
    keep = re.compile(ray["relabel_configs"][0]["regex"])
    assert {part for part in parts if keep.fullmatch(part)} == {
        "ray-head",
        "ray-cpu",
        "ray-gpu",
        "ray-serve",
    }
    assert "{name: metrics, containerPort: 8080}" in manifests
    part, port = serving["relabel_configs"][0]["regex"].split(";")
    assert part in parts
    assert f"{{name: {port}, containerPort: 8000}}" in manifests
    assert spark["relabel_configs"][0]["regex"].split(";")[0] in parts
    for name in ("prometheus.yml", "prometheus-kubernetes.yml"):
        assert read(name)["rule_files"] == ["alerts.yml"]


def test_grafana_finds_the_dashboard_and_its_source() -> None:
    provisioned = read("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    assert provisioned["type"] == "prometheus"
    assert "127.0.0.1" in provisioned["url"]
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"] == "label_values(ray_usr_ray_step, run)"
    for name in ("usr_ray", "usr_ray_serving"):
        ids = [panel["id"] for panel in dashboard(name)["panels"]]
        assert len(set(ids)) == len(ids)
        for panel in dashboard(name)["panels"]:
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
            assert panel["type"] == "row" or panel["description"]
    assert dashboard()["uid"] != dashboard("usr_ray_serving")["uid"]


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (of Prometheus) is not on PATH")
def test_promtool_accepts_the_configuration_and_the_alerts_fire_when_they_must() -> None:
    for arguments in (
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ):
        done = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
