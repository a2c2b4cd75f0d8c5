"""A draft host with a network of its own: a namespace on the far end of a virtual cable that can be pulled.

Needs root and iproute2. The head's processes stay in the network they are in; only the drafters' node is behind the
cable.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator

from benchmarks.faults.head import RayHead

PATH = "/usr/local/sbin:/usr/sbin:/sbin"
DRAFT_CPUS = 2


def missing() -> str:
    """Why there can be no such host here; empty where there can."""
    if os.geteuid() != 0:
        return "a network namespace needs root"
    if shutil.which("ip", path=f"{os.environ['PATH']}:{PATH}") is None:
        return "not installed: ip (Debian: iproute2)"
    name = f"plf{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", name)
        _ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


class LinkedHead(RayHead):
    """A head on this end of the cable; ``unplug`` drops every packet between it and the draft host."""

    def __init__(self, name: str, address: str) -> None:
        self._cable = name
        super().__init__(address)

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        _ip("link", "set", self._cable, "down")
        try:
            yield
        finally:
            _ip("link", "set", self._cable, "up")


@contextlib.contextmanager
def draft_host() -> Iterator[LinkedHead]:
    """A head, and a node with the resource ``draft`` behind a cable."""
    name = f"plf{secrets.token_hex(3)}"
    network = f"10.{64 + secrets.randbelow(64)}.{secrets.randbelow(256)}"
    here, there = f"{network}.1", f"{network}.2"
    with contextlib.ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("address", "add", f"{here}/24", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", name, "address", "add", f"{there}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        _ip("-n", name, "route", "add", "default", "via", here)
        head = LinkedHead(name, here)
        stack.callback(head.close)
        options = [f"--address={here}:{head.port}", f"--node-ip-address={there}", '--resources={"draft": 8}']
        head.start_node(options, DRAFT_CPUS, inside=["ip", "netns", "exec", name])
        yield head


def _ip(*words: str) -> None:
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:{PATH}"}
    subprocess.run(["ip", *words], env=environment, check=True, capture_output=True, text=True)
