# syntax=docker/dockerfile:1
# Ray's side, for CPU and GPU nodes alike (PyPI's torch is the CUDA build and runs on a CPU too); no JVM, no Spark.
#   docker build --file cluster/images/ray.Dockerfile --tag usr-ray-train:0.1.0 .
FROM python:3.11-slim-bookworm

# procps, openssh-client, rsync: what Ray's cluster launcher (`ray up`) calls in the container. wget: what KubeRay's probes
# call there; without it no pod of Ray's gets ready.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client procps rsync tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --gid users --create-home ray

WORKDIR /opt/usr-ray
COPY constraints.txt setup.cfg pyproject.toml README.md LICENSE ./
COPY usr_ray/__init__.py usr_ray/__init__.py
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[train,serve,redis]'
COPY usr_ray usr_ray
COPY jobs jobs
COPY cluster cluster

# Before ray is imported anywhere: usr_ray/launch/environment.py says what each is for; a test holds the two together.
ENV RAY_TRAIN_ENABLE_STATE_TRACKING=1 \
    RAY_TRAIN_ENABLE_PRINT_PATCH=0 \
    RAY_USAGE_STATS_ENABLED=0 \
    MIMALLOC_PURGE_DELAY=-1 \
    RAY_JOB_STOP_WAIT_TIME_S=60 \
    RAY_AUTH_MODE=token \
    PYTHONDONTWRITEBYTECODE=1
USER ray
ENTRYPOINT ["tini", "-s", "--"]
CMD ["bash"]
