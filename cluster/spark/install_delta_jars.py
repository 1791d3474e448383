"""Put Delta Lake's jars and our settings next to Spark's own, so that a later `spark-submit` needs no network or flag.

Then an archive of the JVM's classes is made (class-data sharing), which later jobs start from.

Spark's own resolver (Ivy) fetches the jars from Maven Central into a cache inside the project. On a cluster the same
jars come with `--packages` or with the image instead, and so do settings; see docs/cluster.md.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from py_compile import PycInvalidationMode

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "etl" / "spark_conf"
SCALA = "2.13"
SELDOM_USED = re.compile(r"/(?:pyspark/(?:pandas|ml|mllib|streaming|testing)|connect|tests)/")
"""Parts of pyspark that no worker of ours loads."""


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


def add_byte_code(archive: Path) -> None:
    """Put byte code beside the sources of an archive of Python modules; other versions of Python take the sources.

    Spark's workers import pyspark from one, and Python keeps no byte code of what it finds in archives: the parent of a
    machine's workers took 0.8 processor seconds to compile it each time, and takes 0.2 with it.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with zipfile.ZipFile(archive) as bundle:
            if any(name.endswith(".pyc") for name in bundle.namelist()):
                return
            for name in bundle.namelist():
                bundle.extract(name, scratch)
        # By a hash that is not checked: an archive keeps no times that are exact enough.
        mode = PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(
            scratch, legacy=True, quiet=2, rx=SELDOM_USED, invalidation_mode=mode, stripdir=folder, prependdir=archive
        )
        partial = archive.with_name(f".{archive.name}.partial")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as bundle:
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                bundle.write(path, path.relative_to(scratch).as_posix())
        partial.rename(archive)


def archive_classes(spark: Path) -> str:
    """Make the archive of `usr_ray.launch.spark.archived_classes` in `spark`/conf, from a build of examples/own_logs.

    Returns:
        Why there is none, or ''. Jobs run without it too.
    """
    from usr_ray.launch.spark import CLASSES, LOGGING, archived_classes, spark_environment

    conf, example = spark / "conf", ROOT / "examples" / "own_logs"
    (conf / CLASSES).unlink(missing_ok=True)
    with zipfile.ZipFile(conf / LOGGING, "w") as jar:
        jar.write(CONF / "log4j2.properties", "log4j2.properties")
    variables = archived_classes(conf, use="ArchiveClassesAtExit")
    if " " in f"{conf}" or not variables:
        return "the environment's path has a blank in it" if variables else "spark-defaults.conf has keys of its own"
    command = [str(spark / "bin" / "spark-submit"), "jobs/build_samples.py", "--logs", str(example)]
    command += ["--config", str(example / "own_logs.toml"), "--dates", "2026-03-28:2026-03-30", "--lake"]
    with tempfile.TemporaryDirectory() as scratch:
        environment = spark_environment() | variables
        done = subprocess.run(
            [*command, f"{scratch}/lake"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode != 0 or not (conf / CLASSES).is_file():
        (conf / CLASSES).unlink(missing_ok=True)
        return f"the build ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}"
    return ""


def main() -> int:
    import pyspark

    spark = Path(pyspark.__file__).parent
    # A virtual environment, thus not an image, whose cluster has its own settings.
    is_ours = sys.prefix != sys.base_prefix
    if is_ours:
        set_defaults(spark, Path(sys.prefix))
    for archive in (spark / "python" / "lib").glob("*.zip"):
        add_byte_code(archive)
    code = install_jars(spark / "jars")
    if code == 0 and is_ours:
        print("setup: an archive of the JVM's classes; jobs of Spark start sooner (a minute or two)", flush=True)
        failure = archive_classes(spark)
        if failure:
            print(f"warning: no archive of classes ({failure}); jobs of Spark start slower without it", file=sys.stderr)
    return code


def install_jars(jars: Path) -> int:
    """Fetch Delta's jars into a folder, where they are not there yet; the exit code."""
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
    put(found, jars)
    return 0


def put(found: Iterable[Path], jars: Path) -> None:
    """Copy jars into a folder, each whole or not at all."""
    for jar in found:
        partial = jars / f".{jar.name}.partial"
        shutil.copyfile(jar, partial)
        partial.rename(jars / jar.name)


if __name__ == "__main__":
    sys.exit(main())
