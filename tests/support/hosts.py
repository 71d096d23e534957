"""Hosts in network namespaces of this machine: each has its own address, its own network card, and can be cut off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CARD = "eth0"
PORT = 29400
ETC = Path("/etc/netns")


def obstacle() -> str | None:
    """Why network namespaces cannot be made here; none if they can."""
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is not there"
    name = f"flm{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass
class Host:
    """One host: a namespace with the card `eth0`, whose other end hangs on the switch."""

    name: str
    address: str
    cable: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    before: str = ""
    """Shell commands, ending in &&, that run first in every start."""

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
        """Start a command on this host; its output goes to `log`, its collectives use `eth0`."""
        names = {"GLOO_SOCKET_IFNAME": CARD, "NCCL_SOCKET_IFNAME": CARD, "OMP_NUM_THREADS": "1"}
        # A name of its own, as on a real host.
        script = f'hostname "$0" && {self.before}exec "$@"'
        named = ["unshare", "--uts", "sh", "-c", script, self.name]
        with log.open("a") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *named, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **names, **environment},
            )
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Processes on this host."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, pids: list[int] | None = None) -> None:
        """End all processes of this host, or those given, at once and without warning."""
        for pid in self.pids() if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def refuse(self, other: Host) -> None:
        """Send nothing to another host from now on."""
        _ip("-n", self.name, "route", "add", "blackhole", f"{other.address}/32")

    def hide(self, folder: Path) -> None:
        """Lay a folder of this host's own over `folder` in what is started from now on."""
        folder.mkdir(parents=True, exist_ok=True)
        self.before = f"mount -t tmpfs none {folder} && "

    def cut_off(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip("link", "set", self.cable, "down")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts on one switch; their processes end with the block."""
    prefix = f"flm{os.getpid()}"
    switch = f"{prefix}s"
    made: list[Host] = []
    try:
        _ip("link", "add", switch, "type", "bridge")
        _ip("link", "set", switch, "up")
        for number in range(count):
            host = Host(f"{prefix}host{number}", f"10.231.0.{number + 1}", f"{prefix}c{number}")
            _plug_in(host, switch)
            made.append(host)
        _give_names(made)
        yield made
    finally:
        for host in made:
            host.kill()
            for process in host.started:
                process.wait(30)
            _ip("link", "del", host.cable)  # the namespace itself goes when its last process has
            _ip("netns", "del", host.name)
            shutil.rmtree(ETC / host.name, ignore_errors=True)
        _ip("link", "del", switch)


def _give_names(made: list[Host]) -> None:
    """Hosts know each other by name, and no name server: `ip netns exec` puts these files over those in /etc."""
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made)
    for host in made:
        (ETC / host.name).mkdir(parents=True)
        (ETC / host.name / "hosts").write_text(names)
        (ETC / host.name / "resolv.conf").write_text("")


def _plug_in(host: Host, switch: str) -> None:
    _ip("netns", "add", host.name)
    _ip("link", "add", host.cable, "type", "veth", "peer", "name", CARD, "netns", host.name)
    _ip("link", "set", host.cable, "master", switch)
    _ip("link", "set", host.cable, "up")
    for words in (("link", "set", "lo", "up"), ("addr", "add", f"{host.address}/24", "dev", CARD)):
        _ip("-n", host.name, *words)
    _ip("-n", host.name, "link", "set", CARD, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


def start_job(
    machines: list[Host],
    command: list[str],
    folder: Path,
    ranks: int = 1,
    restarts: int = 0,
    nodes: str = "",
    **environment: str,
) -> list[subprocess.Popen[str]]:
    """Start `flm COMMAND` on all hosts by elastic torchrun, `ranks` on each; logs are `folder`/HOST.log.

    `nodes` is torchrun's number of hosts, or its range, if it is not that of `machines`.
    """
    return [start_agent(machines, host, command, folder, ranks, restarts, nodes, **environment) for host in machines]


def start_agent(
    machines: list[Host],
    host: Host,
    command: list[str],
    folder: Path,
    ranks: int = 1,
    restarts: int = 0,
    nodes: str = "",
    **environment: str,
) -> subprocess.Popen[str]:
    """Start one host's part of a job."""
    torchrun = [sys.executable, "-m", "flm_megatron.launch.elastic"]
    torchrun += [
        "--nnodes",
        nodes or str(len(machines)),
        "--nproc-per-node",
        str(ranks),
        "--max-restarts",
        str(restarts),
    ]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machines[0].address}:{PORT}", "--rdzv-id", "job"]
    torchrun += ["--local-addr", host.address, "-m", "flm_megatron.cli.main"]
    return host.start([*torchrun, *command], folder / f"{host.name}.log", **environment)


def wait_all(processes: list[subprocess.Popen[str]], timeout_s: float) -> list[int]:
    """Exit statuses of all processes.

    Raises:
        TimeoutExpired: some is still running after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
