"""How one job starts another under Spark: which spark-submit, and what must stand in its environment.

Standard library only. pyspark of PyPI is a whole Spark, but its scripts look for it with whichever `python3` is first
on PATH; named by SPARK_HOME it is found without an activated environment.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from usr_ray.cli import check_user_name
from usr_ray.config import UserError
from usr_ray.launch.environment import LOOPBACK, ROOT

CONF_DIR = ROOT / "etl" / "spark_conf"
"""log4j2.properties and spark-defaults.conf of a job on one machine."""
CLASSES, LOGGING = "usr-ray-classes.jsa", "usr-ray-logging.jar"
"""Files that `make setup` puts in Spark's conf folder: an archive of the JVM's classes, log4j2.properties as a jar."""


def spark_home(environment: Mapping[str, str] | None = None) -> Path | None:
    """$SPARK_HOME, else the pyspark of this Python; None where neither is there."""
    environment = os.environ if environment is None else environment
    if environment.get("SPARK_HOME"):
        return Path(environment["SPARK_HOME"])
    spec = importlib.util.find_spec("pyspark")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def spark_submit() -> str:
    """Path of spark-submit: of `spark_home`, else the one on PATH.

    Raises:
        UserError: there is none, or this process's user has no name.
    """
    check_user_name()
    home = spark_home()
    found = shutil.which(home / "bin" / "spark-submit") if home else shutil.which("spark-submit")
    if found is None:
        raise UserError(
            f"spark-submit: is not there{f' in SPARK_HOME {home}' if home else ''}; install pyspark for "
            f"{sys.executable} (`make setup`, or pip install 'usr-ray[etl]'), or set SPARK_HOME to a Spark of your own"
        )
    return str(found)


def spark_environment() -> dict[str, str]:
    """The environment of this process with what a job of Spark needs, where it is not set."""
    environment = dict(os.environ)
    home = spark_home()
    wanted = {
        "SPARK_LOCAL_IP": LOOPBACK,
        "SPARK_CONF_DIR": str(CONF_DIR),
        "PYSPARK_PYTHON": sys.executable,
        # Of the JVM that prints the command of the real one.
        "SPARK_LAUNCHER_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        **({"SPARK_HOME": str(home)} if home else {}),
    }
    for name, value in wanted.items():
        environment.setdefault(name, value)
    conf = home / "conf" if home else None
    if conf and (conf / CLASSES).is_file() and Path(environment["SPARK_CONF_DIR"]).resolve() == CONF_DIR:
        environment |= archived_classes(conf, environment.get("SPARK_SUBMIT_OPTS", ""))
    return environment


def archived_classes(conf: Path, options: str = "", use: str = "SharedArchiveFile") -> dict[str, str]:
    """Variables with which Spark's JVM maps its classes from an archive: a quarter of a cold JVM's processor time.

    A JVM takes an archive only where all of its class path is jars, and SPARK_CONF_DIR comes first there: so it is a
    jar with log4j2.properties then, and what spark-defaults.conf says of the JVM goes by variables. The JVM ignores an
    archive of other jars or of another Java.

    Args:
        conf: folder of the archive and of the jar.
        options: other options of the JVM.
        use: name of the JVM's option that takes the archive.

    Returns:
        Variables of the environment; none where spark-defaults.conf says more than these can carry.
    """
    lines = (CONF_DIR / "spark-defaults.conf").read_text(encoding="utf-8").splitlines()
    said = dict(line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#"))
    java, memory = said.pop("spark.driver.extraJavaOptions", ""), said.pop("spark.driver.memory", "")
    if said or not memory:
        return {}
    return {
        "SPARK_CONF_DIR": str(conf / LOGGING),
        "SPARK_SUBMIT_OPTS": f"{options} {java} -XX:{use}={conf / CLASSES} -Xlog:cds=off -Xlog:cds+dynamic=off".strip(),
        "SPARK_DRIVER_MEMORY": memory,
    }
