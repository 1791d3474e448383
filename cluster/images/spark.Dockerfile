# syntax=docker/dockerfile:1
# Spark's side: JVM, Delta, object-store connectors; no torch, no Ray.   From the project's root:
#   docker build --file cluster/images/spark.Dockerfile --tag usr-ray-spark:0.1.0 .
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends openjdk-17-jre-headless procps tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 185 spark && useradd --uid 185 --gid 185 --create-home spark
ENV JAVA_HOME=/usr/lib/jvm/default-java
RUN ln -sfn "$(dirname "$(dirname "$(readlink -f "$(command -v java)")")")" "$JAVA_HOME"

WORKDIR /opt/usr-ray
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY usr_ray/__init__.py usr_ray/__init__.py
# The versions of constraints.txt, and of its packages only those that [etl] needs. PyPI's pyspark is a whole Spark.
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[etl]'
ENV SPARK_HOME=/opt/spark
RUN ln -s "$(python -c 'import pyspark; print(pyspark.__path__[0])')" "$SPARK_HOME"

COPY cluster/spark cluster/spark
COPY usr_ray usr_ray
RUN python cluster/spark/install_delta_jars.py \
    && python cluster/spark/install_store_jars.py s3 gcs abfs \
    && rm -rf .cache /root/.ivy2*
COPY etl etl
COPY jobs jobs
COPY --chmod=755 cluster/images/spark-entrypoint.sh /opt/entrypoint.sh

# The Python of the image in driver and executors alike: a worker of another version refuses its driver's code.
ENV PYSPARK_PYTHON=/usr/local/bin/python PYSPARK_DRIVER_PYTHON=/usr/local/bin/python PYTHONDONTWRITEBYTECODE=1
USER 185
ENTRYPOINT ["/opt/entrypoint.sh"]
