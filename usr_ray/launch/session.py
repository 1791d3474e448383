"""The Ray that a run uses: an existing one, or its own for as long as it trains."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from typing import Any

import ray

from usr_ray.cli import own_threads_apart, usable_cores
from usr_ray.config import RayConfig, UserError
from usr_ray.launch.alone import refuse_missing_gpus
from usr_ray.launch.environment import (
    ADDRESS,
    API_SERVER,
    DASHBOARD_PORT,
    LOOPBACK,
    OWN,
    ROOT,
    SUBMITTED,
)

_OBJECT_STORE_BYTES = 200_000_000
"""Only a run's configuration goes through Ray's object store."""
START_ATTEMPTS = 10
"""Times that Ray may wait a minute for the workers' CPUs or GPUs before the run gives up."""


@contextlib.contextmanager
def ray_session(config: RayConfig, *, cluster: str) -> Iterator[None]:
    """A connection to Ray for the length of the block; an existing one is used and left open.

    Raises:
        UserError: ray.use_gpu on a machine with fewer GPUs than workers, or the cluster of RAY_ADDRESS is not there.
    """
    if ray.is_initialized():
        yield
        return
    if cluster == OWN:
        refuse_missing_gpus(config)
    try:
        with own_threads_apart(os.environ):
            context = ray.init(**_init_arguments(config, cluster))
    except ConnectionError as error:
        raise UserError(
            f"RAY_ADDRESS: no Ray answers there ({str(error).splitlines()[0]}); start it or unset"
        ) from error
    try:
        if config.dashboard or cluster != OWN:
            print(f"Ray dashboard: http://{context.dashboard_url}", flush=True)
        _note_missing_resources(config)
        yield
    finally:
        if cluster == OWN:
            _end_monitor()
        ray.shutdown()


def _end_monitor() -> None:
    """End the autoscaler's monitor: it does not heed Ray's SIGTERM, and Ray's shutdown waits a second for it.

    Private: where Ray renames it, the second is lost again, and nothing else.
    """
    with contextlib.suppress(Exception):
        ray._private.worker._global_node.kill_monitor(check_alive=False)  # type: ignore[attr-defined]


def _init_arguments(config: RayConfig, cluster: str) -> dict[str, Any]:
    if cluster == SUBMITTED:
        return {}
    if cluster == ADDRESS:  # workers elsewhere have no usr_ray unless this job brings it
        return {"runtime_env": {"py_modules": [str(ROOT / "usr_ray")]}}
    return {
        "address": "local",
        # More workers share the processors.
        "num_cpus": max(usable_cores(), math.ceil(config.num_workers * config.cpus_per_worker)),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": config.dashboard,
        "dashboard_host": LOOPBACK,
        "dashboard_port": int(os.environ.get(API_SERVER, f":{DASHBOARD_PORT}").rpartition(":")[2]),
        "_node_ip_address": LOOPBACK,
        "logging_level": logging.WARNING,
    }


def _note_missing_resources(config: RayConfig) -> None:
    """Say why nothing happens yet; an autoscaler may still add machines."""
    present = ray.cluster_resources()
    needed = {"CPU": config.num_workers * config.cpus_per_worker}
    if config.use_gpu:
        needed["GPU"] = float(config.num_workers)
    for name, count in needed.items():
        if present.get(name, 0) < count:
            text = f"waiting: the workers need {count:g} {name}, the cluster has {present.get(name, 0):g}; gives up"
            print(f"{text} in {START_ATTEMPTS} minutes unless machines are added (ray.num_workers)", flush=True)
