"""The process that holds a lease, written so that others can name it and, on the same host, tell whether it runs."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

LONGEST_COMMAND = 200
LONGEST_INTERVAL_S = 60.0


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease. `token` is random; `since` is by the holder's clock, for people only."""

    token: str
    host: str
    boot: str
    pid_namespace: str
    pid: int
    start_ticks: int
    """When the process was started, in clock ticks since boot: process numbers are reused."""
    job: str
    attempt: str
    """Which start of the job this is: a job that is queued again, or whose ranks are restarted, keeps its name."""
    command: str
    since: str
    renew_s: float
    """Seconds between two renewals of the lease."""

    def to_bytes(self) -> bytes:
        """One line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def from_bytes(line: bytes) -> Holder | None:
        """The holder that `to_bytes` wrote; none for any other line."""
        try:
            values = json.loads(line)
            holder = Holder(**{field.name: values[field.name] for field in fields(Holder)})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        typed = all(type(getattr(holder, field.name)).__name__ == field.type for field in fields(Holder))
        return holder if typed and holder.pid > 0 and 0 < holder.renew_s <= LONGEST_INTERVAL_S else None

    def has_ended(self) -> bool | None:
        """Whether the process is gone; none if this host cannot know (it is of another host or container)."""
        place = (self.host, self.boot, self.pid_namespace)
        if not self.boot or not self.pid_namespace or place != _place():
            return None
        ticks = start_ticks(self.pid) if _is_listed(self.pid) else 0
        # Not to be seen: it is another user's, where these are hidden, or was about to go.
        return not _is_listed(self.pid) if ticks is None else ticks != self.start_ticks

    def precedes(self, other: Holder) -> bool:
        """Whether this is an earlier start of the same job as `other`, about to end or lost."""
        return bool(self.job) and self.job == other.job and self.attempt != other.attempt

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        text = f"process {self.pid} on host {self.host}{job}, `{self.command}`, since {self.since}"
        return "".join(letter if letter.isprintable() else "?" for letter in text)


def this_process(renew_s: float) -> Holder:
    """This process as the holder of a new lease that is renewed every `renew_s` seconds."""
    host, boot, namespace = _place()
    job, attempt = job_of(os.environ)
    return Holder(
        token=os.urandom(16).hex(),
        host=host,
        boot=boot,
        pid_namespace=namespace,
        pid=os.getpid(),
        start_ticks=start_ticks(os.getpid()) or 0,
        job=job,
        attempt=attempt,
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:LONGEST_COMMAND],
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        renew_s=float(renew_s),
    )


def start_ticks(pid: int) -> int | None:
    """When a process was started, in clock ticks since boot.

    0 for one that has ended but is still listed, none if that cannot be seen.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    after_name = text.rpartition(")")[2].split()  # the name may hold blanks and brackets
    state, threads, ticks = after_name[0], int(after_name[17]), int(after_name[19])
    # The first thread is listed as ended while another of the process still finishes what it was writing.
    return 0 if state in "ZX" and threads <= 1 else ticks


def _is_listed(pid: int) -> bool:
    """Whether there is a process of this number, running or ended."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def job_of(environment: Mapping[str, str]) -> tuple[str, str]:
    """The job as schedulers and launchers name it, and which start of it this is; both empty without one."""
    names = {"SLURM_JOB_ID": "Slurm job", "PBS_JOBID": "PBS job", "LSB_JOBID": "LSF job", "TORCHELASTIC_RUN_ID": "run"}
    jobs = [f"{name} {environment[key]}" for key, name in names.items() if environment.get(key, "none") != "none"]
    starts = [environment.get(key, "0") for key in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    return ", ".join(jobs), ".".join(starts) if jobs else ""


def _place() -> tuple[str, str, str]:
    """Host, boot, and process-id namespace; empty if the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), "", ""
