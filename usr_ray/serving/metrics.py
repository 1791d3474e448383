"""What a service counts of itself, as Prometheus reads it (docs/monitoring.md)."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class ServiceMetrics:
    """Counters of one replica.

    Each series has the label `replica`: behind Ray Serve's proxy a scrape reaches one of several processes, another
    each time, and their counts under one name would be a series that falls and rises.

    Args:
        queue: gives the number of requests that are computed or wait.
        as_of: gives the time that the oldest served version was published for, in seconds since 1970.
        is_short: whether a version that the pointer names is not served.
    """

    def __init__(self, queue: Callable[[], int], as_of: Callable[[], float], is_short: Callable[[], bool]) -> None:
        self.registry = registry = CollectorRegistry()
        self.replica = f"{platform.node()}-{os.getpid()}"
        self.requests = Counter(
            "usr_ray_serving_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "usr_ray_serving_seconds",
            "Seconds from a request's arrival to its answer.",
            ["path", "status"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "usr_ray_serving_stage_seconds",
            "Seconds of a scored request by stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.candidates = Counter("usr_ray_serving_candidates", "Candidates scored.", registry=registry)
        self.events = Counter("usr_ray_serving_events", "Events taken.", registry=registry)
        self.shadows = Counter(
            "usr_ray_serving_shadows", "Requests by what became of the shadow's.", ["outcome"], registry=registry
        )
        self.degraded = Counter("usr_ray_serving_degraded", "Answers without history.", registry=registry)
        self.unknown = Counter(
            "usr_ray_serving_unknown", "Users and candidates that the lake has not seen.", ["what"], registry=registry
        )
        self.failed_swaps = Counter("usr_ray_serving_failed_swaps", "Versions not opened.", registry=registry)
        Gauge("usr_ray_serving_queue", "Requests that are computed or wait.", registry=registry).set_function(queue)
        unopened = Gauge(
            "usr_ray_serving_unopened", "1 while a version that the pointer names is not served.", registry=registry
        )
        unopened.set_function(lambda: float(is_short()))
        age = Gauge(
            "usr_ray_serving_age_seconds", "Seconds since the oldest served version's as_of.", registry=registry
        )
        age.set_function(lambda: time.time() - as_of())

    def spent(self, stage: str, seconds: float) -> None:
        """Note what a stage of a request took."""
        self.stages.labels(stage).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The registry's metrics with the replica's name in every sample."""
        for metric in self.registry.collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "replica": self.replica}) for sample in metric.samples
            ]
            yield metric

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self)  # type: ignore[arg-type]  # it asks for `collect` alone
