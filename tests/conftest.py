"""What every test runs under: one thread a process where there are few cores, Spark's quiet local configuration."""

from __future__ import annotations

import atexit
import gc
import os

from usr_ray.launch.spark import spark_environment

_SPARK = ("SPARK_CONF_DIR", "SPARK_LOCAL_IP", "SPARK_SUBMIT_OPTS", "SPARK_DRIVER_MEMORY")
os.environ.update({name: value for name, value in spark_environment().items() if name in _SPARK})
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads it once, when it is first imported; tests/ray sets it too late for a process in which a unit test was first.
os.environ.setdefault("RAY_AUTH_MODE", "token")


# While everything is imported, the garbage collector walks through torch again and again: a fifth of that time.
gc.disable()
# At the end pytest collects garbage ten times: what was frozen below is left out until the process ends, and given back
# then, or extension modules would call it leaked.
atexit.register(gc.unfreeze)


def pytest_collection_finish() -> None:
    """What has been imported stays."""
    gc.freeze()
    gc.enable()
