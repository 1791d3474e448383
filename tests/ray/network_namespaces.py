"""Machines out of one: network namespaces on a bridge, each with a loopback and a /tmp/ray of its own. Linux, root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SUBNET = "10.83.47"


class Machines:
    """`num` namespaces; machine n has the address SUBNET.(n+1) on the device eth0, and reaches the others only."""

    def __init__(self, num: int, folder: Path) -> None:
        self.names = [f"usr-ray-{os.getpid()}-{n}" for n in range(num)]
        self.folder = folder

    def address(self, number: int) -> str:
        return f"{SUBNET}.{number + 1}"

    def up(self) -> str:
        """Make them; '' or why this machine does not allow it."""
        if shutil.which("ip") is None or shutil.which("unshare") is None:
            return "no `ip` (iproute2) or no `unshare` (util-linux) here"
        try:
            for name in self.names:
                _call("ip", "netns", "add", name)
                _call("ip", "-n", name, "link", "set", "lo", "up")
            hub = self.names[0]  # the bridge is in the first one: nothing is changed outside
            _call("ip", "-n", hub, "link", "add", "br0", "type", "bridge")
            _call("ip", "-n", hub, "link", "set", "br0", "up")
            for number, name in enumerate(self.names):
                port = f"port{number}"
                _call("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
                _call("ip", "-n", hub, "link", "set", port, "master", "br0", "up")
                _call("ip", "-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
                _call("ip", "-n", name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            self.down()
            return f"network namespaces are refused here: {error.stderr.strip()}"
        return ""

    def down(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def command(self, number: int, words: Sequence[object]) -> list[str]:
        """`words` as they are run on machine `number`: /tmp/ray is its own, other folders are shared, as by NFS."""
        own = self.folder / f"ray-{number}"
        own.mkdir(exist_ok=True)
        script = 'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && exec "$@"'
        return [
            "ip",
            "netns",
            "exec",
            self.names[number],
            "unshare",
            "--mount",
            "bash",
            "-c",
            script,
            str(own),
            *map(str, words),
        ]


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
