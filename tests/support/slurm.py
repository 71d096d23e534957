"""A Slurm cluster of this machine's own: its controller and two nodes, each with a daemon, on free ports.

Daemons are the real ones (Debian: `apt-get install slurm-wlm`), as root, which `slurmd` has to be. Nodes are
called by their addresses, since ranks look up the name of their first node.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support import REPOSITORY
from tests.support.trackers import free_port

NODES = ("127.0.0.1", "127.0.0.2")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=60
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.[1-2] Port=[{ports[1]},{ports[2]}] CPUs=2
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def obstacle() -> str | None:
    """Why no cluster can be started here; none if one can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"Slurm is not there ({', '.join(missing)}): apt-get install slurm-wlm"
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


@dataclass
class Slurm:
    """A running cluster; jobs get `environment`."""

    folder: Path
    daemons: dict[str, psutil.Popen] = field(default_factory=dict)

    @property
    def configuration(self) -> Path:
        """The file by which its programs find it."""
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Of commands and jobs: where the cluster is, and this program."""
        return {
            **os.environ,
            "SLURM_CONF": str(self.configuration),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """A command's output.

        Raises:
            AssertionError: it failed.
        """
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self, name: str) -> None:
        """Start the controller (`slurmctld`) or a node's daemon."""
        words = ["slurmctld"] if name == "slurmctld" else ["slurmd", "-N", name]
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = psutil.Popen(
                [*words, "-D"], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def lose(self, node: str) -> None:
        """Kill a node's daemon and all that it has started, without warning."""
        tasks = [task for task, knows in _processes(self.configuration) if knows.get("SLURMD_NODENAME") == node]
        steps = [task.parent() for task in tasks]
        _kill([self.daemons.pop(node), *(step for step in steps if step and "slurmstepd" in step.name()), *tasks])

    def log(self, name: str) -> list[str]:
        """What a daemon has printed."""
        return (self.folder / f"{name}.out").read_text().splitlines()

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job; nothing of one that it has forgotten."""
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", number],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_until(self, what: str, true: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait for a condition.

        Raises:
            TimeoutError: it did not come, or a daemon has ended; with the end of the log.
        """
        deadline = time.monotonic() + timeout_s
        while not true():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                log = [line for name in ended or ["slurmctld"] for line in self.log(name)[-15:]]
                raise TimeoutError("\n".join([f"not within {timeout_s} s: {what}", *log]))
            time.sleep(0.2)


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A cluster with two idle nodes; it and its jobs end with the block."""
    for name in ("state", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    ports = sorted(free_port() for _ in range(1 + len(NODES)))
    text = CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=ports)
    cluster = Slurm(folder)
    cluster.configuration.write_text(text)
    try:
        for name in ("slurmctld", *NODES):
            cluster.start(name)
        cluster.wait_until("both nodes idle", lambda: _idle(cluster) == len(NODES), 60)
        yield cluster
    finally:
        _kill(process for process, _ in _processes(cluster.configuration))
        for daemon in cluster.daemons.values():
            daemon.wait(30)


def _idle(cluster: Slurm) -> int:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    return int(shown[0]) if shown else 0


def _processes(configuration: Path) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Daemons, their steps and the processes of jobs, which all are told where the cluster is, with what they know."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            knows = process.environ()
            if knows.get("SLURM_CONF") == str(configuration) and process.pid != os.getpid():
                yield process, knows


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
