"""Put Hadoop's connectors of object stores next to Spark's jars: python cluster/spark/install_store_jars.py s3 gcs.

Needs the network (Maven Central), so it belongs in an image or a machine's set-up. The connectors' version is that of
the Hadoop client that Spark ships; another one would not load.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from install_delta_jars import put, resolve

from usr_ray.cli import JobParser, run_job
from usr_ray.config import UserError

CONNECTORS = {"s3": "hadoop-aws", "gcs": "hadoop-gcp", "abfs": "hadoop-azure"}
_OTHERWISE_THERE = {"commons-logging"}
"""Spark has the same classes in jcl-over-slf4j."""


def artifact(jar: str) -> str:
    """Name of a jar without group and version: org.apache.hadoop_hadoop-aws-3.5.0.jar -> hadoop-aws."""
    return re.sub(r"-\d.*$", "", jar.partition("_")[2] or jar)


def hadoop_version(jars: Path) -> str:
    """Version of the Hadoop client among Spark's jars; UserError where there is none."""
    for jar in jars.glob("hadoop-client-api-*.jar"):
        return jar.stem.removeprefix("hadoop-client-api-")
    raise UserError(f"{jars}: holds no hadoop-client-api jar; install pyspark from PyPI, which brings it")


def missing(found: list[Path], jars: Path) -> list[Path]:
    """The resolved jars that Spark lacks: a second version of one that it has would clash."""
    present = {re.sub(r"-\d.*$", "", path.name) for path in jars.glob("*.jar")} | _OTHERWISE_THERE
    return [path for path in found if artifact(path.name) not in present and path.name not in present]


def install(stores: list[str], jars: Path, cache: Path) -> list[str]:
    """Names of the jars that were put into `jars`; UserError where Maven Central does not give them."""
    version, added = hadoop_version(jars), list[str]()
    for store in stores:
        package = f"org.apache.hadoop:{CONNECTORS[store]}:{version}"
        print(f"jars: {package}", flush=True)
        done = resolve(cache / store, package)
        found = sorted((cache / store).glob("jars/*.jar"))
        if done.returncode != 0 or not any(CONNECTORS[store] in path.name for path in found):
            print(done.stderr[-2000:], file=sys.stderr)
            raise UserError(f"{package}: not to be had from Maven Central; check the network or proxy and run again")
        lacking = missing(found, jars)
        put(lacking, jars)
        added += [path.name for path in lacking]
    return added


def main(argv: list[str]) -> None:
    parser = JobParser(__doc__)
    parser.add_argument("stores", nargs="+", choices=tuple(CONNECTORS), help="which object stores")
    arguments = parser.parse_args(argv)
    import pyspark

    jars = Path(pyspark.__file__).parent / "jars"
    for name in install(arguments.stores, jars, ROOT / ".cache" / "ivy-stores"):
        print(f"  {name}")


if __name__ == "__main__":
    sys.exit(run_job(main))
