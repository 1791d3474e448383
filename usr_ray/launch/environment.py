"""What must be in the environment before `ray` is imported: loopback, token, states of Train runs.

Standard library only. Jobs call it; no module of the library changes the environment on its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import pwd
import secrets
import socket
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from usr_ray.cli import check_output
from usr_ray.config import UserError

LOOPBACK = "127.0.0.1"
OWN, SUBMITTED, ADDRESS = "own", "submitted", "address"
ROOT = Path(__file__).resolve().parents[2]

API_SERVER = "RAY_API_SERVER_ADDRESS"
"""Where Ray's own actors ask for states.

Left to itself, Ray asks the cluster that `ray start` named last on this machine: a dead one causes a traceback, another
live one reports that our run is gone, and the run's placement group is removed.
"""
DASHBOARD_PORT = 8265
MAX_SESSIONS_BYTES = 107 - len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Longest path of the folder of Ray's sessions: the path of a Unix socket has at most 107 bytes."""

RAY_ENVIRONMENT = {
    # Read where the TorchTrainer is built; without it the dashboard's /api/train/v2/runs/v1 lists no run.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # Ray logs each printed line once more.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # `ray job stop` kills what has not ended by then; a step, its checkpoint and Ray's shutdown take more than 3 s,
    # the default.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # Arrow's allocator gives each freed block back to the kernel at once, and a third of the reader's time then goes
    # into page faults. Read when pyarrow is loaded.
    "MIMALLOC_PURGE_DELAY": "-1",
}
"""Variables for any cluster."""

LOCAL_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # Ray replaces a node address of 127.0.0.1 by the machine's outward one, and then GCS, raylet and workers listen on
    # every interface. Only this switch, meant for laptops with an interactive firewall, keeps the loopback address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Otherwise a stop waits 30 s for running jobs to notice.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Ray Train asks its workers every two seconds whether they have ended: a local run's end waits for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Processes for tasks without an environment of their own, which no training has: each loads Ray, and is ended idle.
    "RAY_prestart_worker_first_driver": "0",
    # Watches for nodes that a cloud reclaims; there is one node, and it is local.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray uses a deprecated option of its own and warns of it: nothing that a user of ours can act on.
    "PYTHONWARNINGS": "ignore:`ExecutionOptions.exclude_resources`",
}
"""Variables for a Ray on this machine alone."""


_MALLOC = {-3: 32 << 20, -1: -1, -2: 64 << 20}
"""Of mallopt, from malloc.h: M_MMAP_THRESHOLD at its largest, M_TRIM_THRESHOLD never, M_TOP_PAD."""


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees: it would hand the pages back, and the next step would pay for each again.

    It changes the whole process, so a training's own process calls it and no constructor does. Does nothing on
    other C libraries.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in _MALLOC.items():
            libc.mallopt(option, value)


def prepare_environment(environment: MutableMapping[str, str] | None = None, *, dashboard: bool = True) -> str:
    """Set what is missing, and ensure that there are a token and Ray's folders. Call it before `ray` is imported.

    Args:
        environment: None: this process's.
        dashboard: whether a Ray of our own will have one (config ray.dashboard).

    Returns:
        OWN: the job is to start a Ray of its own; SUBMITTED: it runs inside a cluster that has its working directory
        (`ray job submit --working-dir`); ADDRESS: it is to connect to RAY_ADDRESS and bring usr_ray along.

    Raises:
        UserError: Ray cannot have the folders that it needs.
    """
    environment = os.environ if environment is None else environment
    own = not environment.get("RAY_ADDRESS")
    check_ray_folders(environment, own=own)
    wanted = RAY_ENVIRONMENT | (LOCAL_ENVIRONMENT if own else {})
    if not sys.stdout.isatty():  # Ray colours the names of its workers in a file, too
        wanted = wanted | {"RAY_COLOR_PREFIX": "0"}
    if own and sys.platform == "linux":
        wanted = wanted | {"GLOO_SOCKET_IFNAME": "lo"}
    if own and dashboard and API_SERVER not in environment:
        wanted = {**wanted, API_SERVER: f"http://{LOOPBACK}:{reserve_port(DASHBOARD_PORT)}"}
    if own and not dashboard:  # the state actor asks the dashboard, and logs errors endlessly
        wanted = {**wanted, "RAY_TRAIN_ENABLE_STATE_TRACKING": "0"}
    if own:
        # Workers import usr_ray from where this job does, installed or not; a submitted job has its working directory.
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            ensure_token(environment)
        except UserError:  # no home to keep it in: a Ray that ends with this job needs none afterwards
            environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in wanted.items():
        environment.setdefault(name, value)
    if own:
        return OWN
    job = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return SUBMITTED if job.get("runtime_env", {}).get("working_dir") else ADDRESS


def check_ray_folders(environment: MutableMapping[str, str], *, own: bool) -> None:
    """Refuse what makes Ray end in a stack trace: no home, or no folder for its sessions.

    Args:
        environment: an empty HOME is taken away, so that the user's own counts.
        own: whether Ray is started here, and so needs a folder for its sessions.

    Raises:
        UserError: nobody knows this user's home; $RAY_TMPDIR, else $TMPDIR, cannot be written or is too long for the
            paths of sockets below it.
    """
    if not environment.get("HOME"):
        environment.pop("HOME", None)
        try:
            pwd.getpwuid(os.geteuid())
        except KeyError as error:
            raise UserError(
                f"HOME: is not set, and the user of number {os.geteuid()} has no home here, which Ray asks for; set "
                "HOME to a folder that you may write"
            ) from error
    if own:
        name = "RAY_TMPDIR" if environment.get("RAY_TMPDIR") else "TMPDIR"
        folder = environment.get(name) or "/tmp"
        if len(os.fsencode(folder)) > MAX_SESSIONS_BYTES:
            raise UserError(
                f"{name} {folder}: has {len(os.fsencode(folder))} bytes, and for Ray's sockets below it "
                f"{MAX_SESSIONS_BYTES} are the most; set RAY_TMPDIR to a shorter folder, such as /tmp"
            )
        check_output(folder, flag=name)


def free_port(first: int) -> int:
    """The first port from `first` on that nothing on the loopback listens at."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                return port
    return first


_reservations: list[int] = []
"""Descriptors of locked files; the locks end with the process."""


def reserve_port(first: int) -> int:
    """Like `free_port`, but no other process of ours gets the port while this one lives.

    Ray's dashboard listens seconds after its port was chosen, and two trainings begun at once would choose the same.
    """
    for port in range(first, first + 100):
        if free_port(port) != port:
            continue
        with contextlib.suppress(OSError):  # another's lock, or another user's file
            path = Path(tempfile.gettempdir()) / f"usr-ray-port-{port}.lock"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
            _reservations.append(descriptor)
            return port
    return free_port(first)


def token_file(environment: MutableMapping[str, str] | None = None) -> Path:
    """Where Ray looks for the token: $RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    environment = os.environ if environment is None else environment
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ensure_token(environment: MutableMapping[str, str] | None = None) -> str:
    """The token in use; made when there is none, readable by its owner only (Ray's own generator leaves it to all).

    Raises:
        UserError: it cannot be read, or kept where Ray looks for it.
    """
    environment = os.environ if environment is None else environment
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"]
    try:
        return private_file(token_file(environment))
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows this user's home
        raise UserError(
            f"Ray's token: cannot be read or written ({error}); set HOME to your folder, or RAY_AUTH_TOKEN_PATH to "
            "a file that you may write"
        ) from error


def private_file(path: Path, text: str | None = None) -> str:
    """The content of a file that only its owner may read; made of `text`, or of a new secret, unless it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32) if text is None else text)
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return path.read_text(encoding="utf-8").strip()
