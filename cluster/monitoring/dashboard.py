"""The Grafana dashboard of training, written as JSON: python cluster/monitoring/dashboard.py (then commit the file)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from usr_ray.files import write_whole

FILE = Path(__file__).resolve().parent / "grafana" / "dashboards" / "usr_ray.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_RUN, _MAIN = 'run=~"$run"', 'run=~"$run", rank="0"'
WIDTH, HEIGHT = 24, 8

Panel = tuple[str, str, str, str, list[tuple[str, str]]]
"""(title, kind 'stat' or 'timeseries', Grafana's unit, description, [(expression, legend)])."""

ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Runs",
        [
            (
                "Step",
                "stat",
                "none",
                "Steps done of the whole run: with the epoch, the cursor that a resume goes on from.",
                [(f"ray_usr_ray_step{{{_MAIN}}}", "{{run}}")],
            ),
            (
                "Time left",
                "stat",
                "s",
                "Estimated time to the end of training.",
                [(f"ray_usr_ray_seconds_left{{{_MAIN}}}", "{{run}}")],
            ),
            (
                "A crash would cost",
                "stat",
                "s",
                "Age of the newest checkpoint.",
                [(f"ray_usr_ray_checkpoint_age_s{{{_RUN}}}", "{{run}}")],
            ),
            (
                "Starts in the last hour",
                "stat",
                "none",
                "Processes that rank 0 has had; 1 is a run without a failure.",
                [(f"count by (run) (max_over_time(ray_usr_ray_attempts_total{{{_MAIN}}}[1h]))", "{{run}}")],
            ),
            (
                "Checkpoints by outcome",
                "stat",
                "none",
                "Of the present attempt.",
                [(f"ray_usr_ray_checkpoints_total{{{_RUN}}}", "{{run}} {{outcome}}")],
            ),
            ("Epoch", "stat", "none", "From 0.", [(f"ray_usr_ray_epoch{{{_RUN}}}", "{{run}}")]),
        ],
    ),
    (
        "Speed",
        [
            (
                "Samples a second, all ranks",
                "timeseries",
                "short",
                "Rows that count: padding and immature rows do not.",
                [(f"ray_usr_ray_samples_per_s{{{_MAIN}}}", "{{run}}")],
            ),
            (
                "Seconds a step",
                "timeseries",
                "s",
                "A rank far above the others holds all of them up.",
                [(f"ray_usr_ray_step_seconds{{{_RUN}}}", "{{run}} rank {{rank}}")],
            ),
            (
                "Waiting for batches",
                "timeseries",
                "percentunit",
                "Share of a rank's time; above 0.1 the reader is slow.",
                [(f"ray_usr_ray_data_stall_fraction{{{_RUN}}}", "{{run}} rank {{rank}}")],
            ),
            (
                "Exchanged ids and row gradients",
                "timeseries",
                "bytes",
                "What a rank receives a step of the others' rows.",
                [(f"ray_usr_ray_exchange_bytes_per_step{{{_RUN}}}", "{{run}} rank {{rank}}")],
            ),
        ],
    ),
    (
        "Learning",
        [
            (
                "Loss",
                "timeseries",
                "short",
                "Mean of the steps since the last log step.",
                [(f"ray_usr_ray_loss{{{_RUN}}}", "{{run}}")],
            ),
            (
                "Terms of the loss",
                "timeseries",
                "short",
                "By cell, the contrastive ones, and the watched variances.",
                [(f"ray_usr_ray_loss_term{{{_RUN}}}", "{{run}} {{term}}")],
            ),
            (
                "Norm of the dense gradients",
                "timeseries",
                "short",
                "Largest since the last log step, before clipping.",
                [(f"ray_usr_ray_gradient_norm{{{_RUN}}}", "{{run}}")],
            ),
        ],
    ),
    (
        "Held-out rows",
        [
            (
                "AUC",
                "timeseries",
                "percentunit",
                "Of the newest evaluation, by scenario and task.",
                [(f"ray_usr_ray_auc{{{_RUN}}}", "{{run}} {{scenario}} {{task}}")],
            ),
            (
                "Log loss",
                "timeseries",
                "short",
                "Likewise.",
                [(f"ray_usr_ray_log_loss{{{_RUN}}}", "{{run}} {{scenario}} {{task}}")],
            ),
            (
                "Calibration",
                "timeseries",
                "short",
                "Sum of predictions over sum of positives; 1 is calibrated.",
                [(f"ray_usr_ray_pcoc{{{_RUN}}}", "{{run}} {{scenario}} {{task}}")],
            ),
        ],
    ),
    (
        "Machines",
        [
            ("Processor", "timeseries", "percent", "Of each Ray node.", [("ray_node_cpu_utilization", "{{instance}}")]),
            (
                "Memory",
                "timeseries",
                "percentunit",
                "Ray ends a worker above 0.95.",
                [("ray_node_mem_used / ray_node_mem_total", "{{instance}}")],
            ),
            (
                "GPU",
                "timeseries",
                "percent",
                "Use of each GPU.",
                [("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}")],
            ),
            ("GPU memory", "timeseries", "decmbytes", "Used.", [("ray_node_gram_used", "{{instance}} {{GpuIndex}}")]),
            (
                "Network in",
                "timeseries",
                "Bps",
                "Received by each node.",
                [("ray_node_network_receive_speed", "{{instance}}")],
            ),
            (
                "Disk free",
                "timeseries",
                "bytes",
                "Of the disk that holds Ray's session folder.",
                [("ray_node_disk_free", "{{instance}}")],
            ),
        ],
    ),
]


def panel(number: int, described: Panel, *, x: int, y: int, width: int) -> dict[str, Any]:
    """One panel of Grafana's JSON."""
    title, kind, unit, description, queries = described
    letters = "ABCDEF"
    return {
        "id": number,
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT if kind == "timeseries" else 4},
        "fieldConfig": {"defaults": {"unit": unit, "noValue": "-"}, "overrides": []},
        "options": (
            {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
            if kind == "timeseries"
            else {"textMode": "value_and_name", "reduceOptions": {"calcs": ["lastNotNull"]}}
        ),
        "targets": [
            {"refId": letters[n], "expr": expression, "legendFormat": legend, "datasource": DATASOURCE}
            for n, (expression, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard: variables for the data source and the runs, a row of panels for each question."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, described in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
            }
        )
        y += 1
        columns = min(len(described), 6 if described[0][1] == "stat" else 3)
        width = WIDTH // columns
        for position, one in enumerate(described):
            made = panel(len(panels) + 1, one, x=position % columns * width, y=y, width=width)
            panels.append(made)
            if position % columns == columns - 1 or position == len(described) - 1:
                y += made["gridPos"]["h"]
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"},
        {
            "name": "run",
            "type": "query",
            "label": "Run",
            "datasource": DATASOURCE,
            "refresh": 2,
            "sort": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
            "query": {"query": "label_values(ray_usr_ray_step, run)", "refId": "run"},
        },
    ]
    return {
        "uid": "usr-ray-training",
        "title": "usr-ray training",
        "tags": ["usr-ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "utc",
        "templating": {"list": variables},
        "annotations": {"list": []},
        "panels": panels,
    }


def text() -> str:
    """The content of the committed file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    write_whole(FILE, text())
