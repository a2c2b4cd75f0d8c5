"""Hosts of our own on one machine: each has its network, processes, host name, home and Ray folder to itself.

Linux namespaces on a bridge, the bridge in a namespace as well: nothing inside sees or disturbs a Ray outside, not even
`ray stop`, which ends every Ray process it can see. The file system, and with it this environment, is shared.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
LAUNCHER = f"{NETWORK}.1"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

# Process 1 of a namespace has to wait for whatever is orphaned in it.
INIT = "while :; do sleep 60 & wait $!; done"
SSHD_OPTIONS = {
    "AuthorizedKeysFile": "%h/.ssh/authorized_keys",
    "PermitRootLogin": "prohibit-password",
    "StrictModes": "no",
    "UseDNS": "no",
    "UsePAM": "no",
    "PidFile": "none",
}


def missing(*tools: str) -> str:
    """Why hosts cannot be had here; empty where they can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    path = f"{os.environ['PATH']}:{SBIN}"
    lacking = [
        tool for tool in ("ip", "unshare", "nsenter", "setpriv", *tools) if shutil.which(tool, path=path) is None
    ]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: iproute2, util-linux, openssh-server, rsync)"
    tried = subprocess.run(
        [
            "unshare",
            "--mount",
            "--uts",
            "--net",
            "--pid",
            "--fork",
            "--mount-proc",
            "mount",
            "-t",
            "tmpfs",
            "x",
            "/mnt",
        ],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(frozen=True, slots=True)
class Host:
    """A set of namespaces. ``pid`` is its process 1, seen from outside; ``home`` is its users' home folder."""

    name: str
    address: str
    pid: int
    home: Path

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "--mount", "--uts", "--net", "--pid", *words]

    def run(self, *words: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """Run to the end; the output, both streams in one, is in ``stdout``."""
        return subprocess.run(
            self.command(*words),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
        )

    def check(self, *words: str, timeout_s: float = 240.0) -> str:
        done = self.run(*words, timeout_s=timeout_s)
        assert done.returncode == 0, f"{self.name}: {' '.join(words)}\n{done.stdout}"
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}:{SBIN}",
            "PYTHONPATH": str(ROOT),
            "PACELINE_CACHE": os.environ.get("PACELINE_CACHE") or str(Path.home() / ".cache" / "paceline"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_raylet_start_wait_time_s": "240",  # whatever else the machine does
            "OMP_NUM_THREADS": "1",
            "USER": "root",
        }

    def processes(self) -> list[str]:
        """Command lines of everything that runs on the host."""
        return self.check("ps", "-eo", "args", "--no-headers").splitlines()


@contextlib.contextmanager
def hosts(folder: Path, *names: str) -> Iterator[list[Host]]:
    """The first is the launcher, which holds the bridge; the others are wired to it. All end with everything in them.

    ``folder`` has to be short, as Ray puts sockets into it.
    """
    with contextlib.ExitStack() as stack:
        launcher, *others = (
            stack.enter_context(_host(folder / name, name, f"{NETWORK}.{number}"))
            for number, name in enumerate(names, start=1)
        )
        launcher.check("ip", "link", "add", "bridge", "type", "bridge")
        launcher.check("ip", "address", "add", f"{LAUNCHER}/24", "dev", "bridge")
        for device in ("lo", "bridge"):
            launcher.check("ip", "link", "set", device, "up")
        # Ray asks the routing table for the host's own address; the route leads nowhere.
        launcher.check("ip", "route", "add", "default", "dev", "bridge")
        for host in others:
            _wire(launcher, host)
        yield [launcher, *others]


def serve_ssh(host: Host, public_key: Path) -> None:
    """Answer on port 22, for this key only. The login shell finds what ``Host.environment`` names."""
    ssh = host.home / ".ssh"
    ssh.mkdir(exist_ok=True)
    shutil.copy(public_key, ssh / "authorized_keys")
    key = host.home / "host_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    exports = [f"export {name}='{value}'" for name, value in host.environment.items() if name not in ("HOME", "PATH")]
    (host.home / ".bashrc").write_text("\n".join(exports) + "\n")
    options = [word for name, value in SSHD_OPTIONS.items() for word in ("-o", f"{name}={value}")]
    host.check("mkdir", "-p", "/run/sshd")
    host.check(shutil.which("sshd", path=SBIN) or "sshd", "-f", "/dev/null", "-h", str(key), *options)


def waits_for(what: str, within_s: float, condition: Callable[[], bool], poll_s: float = 2.0) -> None:
    """Returns once the condition holds, and says after how long; fails where it did not hold in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within_s, f"not within {within_s:.0f} s: {what}"
        time.sleep(poll_s)
    say(f"  {what}: {time.monotonic() - start:.1f} s later")


def say(text: str) -> None:
    """For the log of a run (`pytest -s`)."""
    print(text, flush=True)


@contextlib.contextmanager
def _host(folder: Path, name: str, address: str) -> Iterator[Host]:
    home, ray, users = folder / "home", folder / "ray", folder / "passwd"
    home.mkdir(parents=True)
    ray.mkdir()
    users.write_text(Path("/etc/passwd").read_text().replace("root:x:0:0:root:/root:", f"root:x:0:0:root:{home}:"))
    Path("/tmp/ray").mkdir(exist_ok=True)  # somewhere to mount the host's own
    setup = [
        f"hostname {name}",
        f"mount --bind {users} /etc/passwd",
        f"mount --bind {ray} /tmp/ray",
        "mount -t tmpfs tmpfs /dev/shm",
        "mount -t tmpfs tmpfs /run",
        "echo ready",
        INIT,
    ]
    namespaces = ["--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen(
        # The namespaces end with this process, however it ends.
        ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "bash", "-c", "set -e; " + "; ".join(setup)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"the namespaces of {name} were not set up"
        (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Host(name, address, int(pid), home)
    finally:
        process.kill()
        process.wait()


def _wire(launcher: Host, host: Host) -> None:
    port = f"to-{host.name}"
    ends: Sequence[str] = ("eth0", "netns", str(host.pid), "type", "veth", "peer", "name", port)
    subprocess.run(["ip", "link", "add", *ends, "netns", str(launcher.pid)], check=True)
    launcher.check("ip", "link", "set", port, "master", "bridge", "up")
    host.check("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        host.check("ip", "link", "set", device, "up")
    host.check("ip", "route", "add", "default", "via", LAUNCHER)
