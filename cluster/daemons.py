"""Background processes of this machine's clusters: started in a session of their own, found again, ended. Linux."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from usr_ray.cli import number_in
from usr_ray.config import UserError
from usr_ray.files import write_whole

PORT, COUNT = number_in("[1, 65535]", int), number_in("[0, 100000]", int)
OBJECT_STORE_GB = number_in("[0.08, 100000]")
"""Types of arguments; Ray refuses a smaller object store."""
STOP_TIMEOUT_S = 15.0
_LOG_LINES = 15


def session_processes(leader: int) -> list[int]:
    """Processes of the session that a daemon leads. Ray's workers leave the process group, but never the session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def end_session(leader: int) -> None:
    """End a session: SIGTERM, then SIGKILL; detached actors outlive Ray's own end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGTERM)
    end = time.monotonic() + STOP_TIMEOUT_S
    while session_processes(leader) and time.monotonic() < end:
        time.sleep(0.2)
    for pid in session_processes(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Daemon:
    """One process: `<state>/<name>.json` records its pid and other facts, `<name>.log` is its output."""

    def __init__(self, state: Path, name: str) -> None:
        self.name = name
        self.note_file, self.log_file = state / f"{name}.json", state / f"{name}.log"

    def running(self) -> dict[str, Any] | None:
        """What `start` recorded, while the process lives; a reused pid does not count."""
        try:
            note = json.loads(self.note_file.read_text(encoding="utf-8"))
            fields = Path(f"/proc/{note['pid']}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged note
            return None
        return note if int(fields[19]) == note.get("started") and fields[0] != "Z" else None

    def start(self, command: Sequence[str], environment: Mapping[str, str], **note: Any) -> subprocess.Popen[bytes]:
        """Start it; UserError when it runs already. Secrets go into files or `environment`, never into `command`."""
        if self.running():
            raise UserError(f"{self.name}: runs already ({self.note_file}); stop it first")
        self.note_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=dict(environment), start_new_session=True
            )
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        write_whole(self.note_file, json.dumps({"pid": process.pid, "started": int(stat[19]), **note}) + "\n")
        return process

    def wait(self, process: subprocess.Popen[bytes], is_up: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until `is_up`; on a time-out end the process and show the end of its log (RuntimeError)."""
        end = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < end:
            if is_up():
                return
            time.sleep(0.3)
        tail = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        self.stop()
        raise RuntimeError(f"{self.name} did not come up; the end of its log:\n" + "\n".join(tail))

    def stop(self) -> bool:
        """End it with everything it started; False when it did not run."""
        note = self.running()
        if note is not None:
            end_session(note["pid"])
        self.note_file.unlink(missing_ok=True)
        return note is not None


def check_private(host: str) -> None:
    """UserError unless --host is the loopback or in a private network: neither Ray nor Spark has TLS here."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise UserError(f"--host {host}: not an IP address; give the machine's in its private network") from error
    if not address.is_private or address.is_unspecified:
        raise UserError(
            f"--host {host}: is not an address of a private network; whoever reaches these ports with the secret runs "
            "code here, and nothing is encrypted: use an address such as 10.0.0.5, or a tunnel"
        )
