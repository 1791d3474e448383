"""Put Delta Lake's jars and our settings next to Spark's own, so that a later `spark-submit` needs no network or flag.

Spark's own resolver (Ivy) fetches the jars from Maven Central into a cache inside the project. On a cluster the same
jars come with `--packages` or with the image instead, and so do settings; see docs/cluster.md.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "etl" / "spark_conf"
SCALA = "2.13"


def coordinates() -> str:
    """Maven coordinates of Delta for the installed pyspark and delta-spark."""
    spark = ".".join(importlib.metadata.version("pyspark").split(".")[:2])
    return f"io.delta:delta-spark_{spark}_{SCALA}:{importlib.metadata.version('delta-spark')}"


def resolve(cache: Path, package: str) -> subprocess.CompletedProcess[str]:
    """Let Spark's resolver download `package` and what it needs into `cache`."""
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "nothing.py"
        script.write_text("", encoding="utf-8")
        command = [
            str(Path(sys.executable).with_name("spark-submit")),
            "--master",
            "local[1]",
            "--packages",
            package,
            "--conf",
            f"spark.jars.ivy={cache}",
            # Ivy looks into ~/.m2 first, and a half-filled one (poms without jars) breaks the resolution.
            "--driver-java-options",
            f"-Duser.home={scratch}",
            str(script),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def set_defaults(spark: Path, environment: Path) -> None:
    """Make `environment`/bin/spark-submit right by itself: quiet, with our JVM's options, activated or not.

    Without SPARK_CONF_DIR Spark reads `spark`/conf. And where the `python3` on PATH has no pyspark, PyPI's spark-submit
    looks for a Spark in spark-distribution beside itself, and would run the job with that `python3`.

    Args:
        spark: pyspark's folder, which is a whole Spark.
        environment: the virtual environment's folder.
    """
    shutil.copytree(CONF, spark / "conf", dirs_exist_ok=True)
    with (spark / "conf" / "spark-defaults.conf").open("a", encoding="utf-8") as file:
        file.write(f"spark.pyspark.driver.python  {environment / 'bin' / 'python'}\n")
    link = environment / "bin" / "spark-distribution"
    link.unlink(missing_ok=True)
    link.symlink_to(spark)


def main() -> int:
    import pyspark

    spark = Path(pyspark.__file__).parent
    if sys.prefix != sys.base_prefix:  # a virtual environment, thus not an image, whose cluster has its own settings
        set_defaults(spark, Path(sys.prefix))
    jars = spark / "jars"
    package = coordinates()
    version = package.rsplit(":", 1)[1]
    if any(jars.glob(f"io.delta_delta-spark_*-{version}.jar")):
        return 0
    print(f"setup: Delta jars ({package})", flush=True)
    cache = ROOT / ".cache" / "ivy"
    done = resolve(cache, package)
    # Spark ships the rest (Hadoop, Jackson, Parquet ...) in its own versions; a second copy would clash.
    found = [*cache.glob("jars/io.delta_*.jar"), *cache.glob("jars/io.unitycatalog_*.jar")]
    if done.returncode != 0 or not any(version in jar.name for jar in found):
        print(done.stderr[-2000:], file=sys.stderr)
        print(
            f"error: {package} could not be fetched from Maven Central; check the network or proxy and run again",
            file=sys.stderr,
        )
        return 2
    for jar in found:
        partial = jars / f".{jar.name}.partial"
        shutil.copyfile(jar, partial)
        partial.rename(jars / jar.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
