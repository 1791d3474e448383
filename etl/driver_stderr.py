"""Where a Spark driver's error line goes: to the stderr that the user of spark-submit sees."""

from __future__ import annotations

import os
import sys


def print_error(line: str) -> None:
    """Write one line to the job's standard error, under spark-submit and without.

    spark-submit runs the Python driver with its stderr joined to stdout, so a line written there would come out on the
    wrong stream; the JVM's own stderr is the user's.
    """
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        from py4j.protocol import Py4JError
        from pyspark import SparkContext
        from pyspark.java_gateway import launch_gateway

        try:
            gateway = SparkContext._gateway or launch_gateway()  # connects to the JVM that started this driver
            gateway.jvm.System.err.println(line)
        except (Py4JError, OSError):
            pass  # the JVM has gone: this process's own stream is all there is
        else:
            return
    print(line, file=sys.stderr, flush=True)
