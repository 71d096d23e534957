"""Checks between hosts, by ranks that a launcher started: they report to rank 0 through the launcher's store.

The store needs only a connection to the first host, so a host that others cannot reach is named instead of waited for.
Collectives come last, when every rank was found reachable.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import torch
import torch.distributed as dist

from flm_megatron.config.schema import RunConfig
from flm_megatron.device import current
from flm_megatron.distributed.addresses import own_address
from flm_megatron.json_text import Json, JsonObject
from flm_megatron.launch.doctor.findings import Finding, Level, status_of
from flm_megatron.launch.doctor.machine import machine_facts

CONNECT_S = 5.0
WORKERS = 32
LARGEST_SKEW_S = 1.0
PIECE_VALUES = 2**20
"""fp32 values of the trial all-reduce: 4 MiB."""


class Report(TypedDict):
    """What a rank says of itself: the address at which it listens, and, for its host, facts and findings.

    `machine` has facts in which hosts should not differ, but may.
    """

    host: str
    address: tuple[str, int]
    facts: dict[str, str]
    machine: dict[str, str]
    findings: list[JsonObject]


class Meeting:
    """The ranks' meeting at the store: rank 0 collects the values of the others, within `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        """Join the store of `env://`, which the launcher or rank 0 holds."""
        from torch.distributed.rendezvous import rendezvous

        self.timeout_s = timeout_s
        store, self.rank, self.size = next(iter(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
        # Ranks that are started again find the old answers under another prefix.
        self.store = dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.host = socket.gethostname()

    def gather(self, topic: str, value: object) -> tuple[dict[int, Json], list[int]]:
        """Publish `value`; returns, on rank 0, the values by rank and the ranks that gave none in time."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        values: dict[int, Json] = {}
        deadline = time.monotonic() + self.timeout_s
        for rank in range(self.size) if self.rank == 0 else ():
            text = self.take(f"{topic}/{rank}", deadline)
            if text is not None:
                values[rank] = json.loads(text)
        return values, [rank for rank in range(self.size) if rank not in values] if self.rank == 0 else []

    def take(self, key: str, deadline: float) -> str | None:
        """A value; none if it does not arrive by `deadline` (on the monotonic clock)."""
        try:
            self.store.wait([key], timedelta(seconds=max(0.05, deadline - time.monotonic())))
            return self.store.get(key).decode()
        except RuntimeError:
            return None

    def tell(self, key: str, value: object = None) -> Json:
        """Give rank 0's `value` to all ranks; none where it does not arrive in time."""
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        # Rank 0 itself may wait that long for others.
        text = self.take(key, time.monotonic() + 2 * self.timeout_s)
        return None if text is None else json.loads(text)


def examine_together(
    run: RunConfig, own: list[Finding], facts: dict[str, str], timeout_s: float
) -> tuple[list[Finding], int]:
    """All ranks' findings on rank 0 (the others get none), and the exit status on all ranks.

    `own` are this host's findings, `facts` what must be equal everywhere. Waits for no rank longer than `timeout_s`
    seconds at each of three meetings.
    """
    meeting = Meeting(timeout_s)
    with Listener() as listener:
        leader = os.environ.get("LOCAL_RANK", "0") == "0"
        report = {
            "host": meeting.host,
            "address": [listener.address, listener.port],
            "facts": facts if leader else {},
            "machine": machine_facts() if leader else {},
            "findings": [asdict(finding) for finding in own] if leader else [],
        }
        reports, missing = meeting.gather("report", report)
        findings = _reported(reports, missing)
        addresses = meeting.tell("addresses", {str(rank): reports[rank]["address"] for rank in reports})
        if addresses is None:
            return [], 2
        refused, lost = meeting.gather("refused", _unreachable(addresses, meeting.rank))
        findings += _connections(reports, refused, lost)
    findings += clocks({rank: report["host"] for rank, report in reports.items()}, _offsets(meeting, reports))
    findings += _shared_output(meeting, Path(run.output), reports)
    whole = meeting.tell("whole", not missing and not lost and status_of(findings) == 0)
    if whole:
        findings.append(_all_reduce(meeting))
    status = meeting.tell("status", status_of(findings))
    meeting.gather("end", True)  # rank 0 may hold the store
    return findings if meeting.rank == 0 else [], 2 if status is None else int(status)


class Listener:
    """Accepts connections on a free port of the address under which other hosts know this one."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("", 0))
        self.port = self.socket.getsockname()[1]
        self.address = own_address()

    def __enter__(self) -> Listener:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def _accept(self) -> None:
        while True:
            try:
                self.socket.accept()[0].close()
            except OSError:
                return


def _unreachable(addresses: dict[str, tuple[str, int]], own: int) -> list[int]:
    """Ranks that this rank cannot connect to."""

    def refused(item: tuple[str, tuple[str, int]]) -> int | None:
        """The rank, if it does not answer."""
        rank, (address, port) = item
        try:
            socket.create_connection((address, port), timeout=CONNECT_S).close()
        except OSError:
            return int(rank)
        return None

    others = [item for item in addresses.items() if int(item[0]) != own]
    with ThreadPoolExecutor(WORKERS) as workers:
        return sorted(rank for rank in workers.map(refused, others) if rank is not None)


def _reported(reports: dict[int, Report], missing: list[int]) -> list[Finding]:
    """The hosts' own findings, ranks that did not report, and facts that differ."""
    findings = [
        Finding(**(entry | {"host": report["host"]})) for report in reports.values() for entry in report["findings"]
    ]
    hosts = len({report["host"] for report in reports.values()})
    if missing:
        findings.append(Finding("stop", "ranks", f"{_ranks(missing)} did not report: see that host's log"))
    elif reports:
        findings.append(Finding("ok", "ranks", f"all {len(reports)} ranks on {hosts} host(s) reported"))
    findings += different_facts([(r["host"], r["facts"]) for r in reports.values() if r["facts"]])
    leaders = [reports[rank] for rank in sorted(_leaders(reports))]
    return findings + different_facts([(r["host"], r["machine"]) for r in leaders], "warn", "drivers and devices")


def different_facts(
    by_host: list[tuple[str, dict[str, str]]], level: Level = "stop", equal: str = "versions, tokenizer and data"
) -> list[Finding]:
    """One finding of `level` for each fact that differs between the first host and another.

    `equal` names the facts where none does.
    """
    findings = []
    first_host, first = by_host[0] if by_host else ("", {})
    for name in dict.fromkeys(key for _, facts in by_host for key in facts):
        for host, facts in by_host[1:]:
            if facts.get(name) != first.get(name):
                values = f"{_short(first.get(name))} on {first_host} and {_short(facts.get(name))} on {host}"
                findings.append(Finding(level, "same on all hosts", f"{name} is {values}"))
                break
    if len(by_host) > 1 and not findings:
        findings.append(Finding("ok", "same on all hosts", equal))
    return findings


def _short(value: str | None) -> str:
    """A value, or enough of a fingerprint."""
    return "missing" if value is None else value if len(value) < 40 else value[:12]


def _connections(reports: dict[int, Report], refused: dict[int, list[int]], lost: list[int]) -> list[Finding]:
    """Which ranks cannot reach which, by host."""
    findings = []
    pairs: dict[tuple[str, str], list[int]] = {}
    for rank, peers in refused.items():
        for peer in peers:
            pairs.setdefault((reports[rank]["host"], reports[peer]["host"]), []).append(peer)
    for (here, there), peers in pairs.items():
        address = reports[peers[0]]["address"][0]
        text = f"host {here} cannot reach {_ranks(sorted(set(peers)))} on host {there} ({address}): firewall or route"
        findings.append(Finding("stop", "peers", text))
    if lost:
        findings.append(Finding("stop", "peers", f"{_ranks(lost)} fell silent while connecting to the others"))
    if not findings and reports:
        findings.append(Finding("ok", "peers", "every rank reaches every other"))
    return findings


def _leaders(reports: dict[int, Report]) -> list[int]:
    """The first rank of every host."""
    return list({report["host"]: rank for rank, report in sorted(reports.items(), reverse=True)}.values())


def _offsets(meeting: Meeting, reports: dict[int, Report]) -> dict[int, float]:
    """On rank 0: the seconds by which each host's clock is ahead, measured by a question and its answer."""
    leaders = meeting.tell("leaders", _leaders(reports)) or []
    if meeting.rank != 0:
        if meeting.rank in leaders and meeting.take(f"ask/{meeting.rank}", time.monotonic() + meeting.timeout_s):
            meeting.store.set(f"time/{meeting.rank}", repr(time.time()))
        return {}
    offsets = {}
    for rank in leaders:
        if rank:
            asked = time.time()
            meeting.store.set(f"ask/{rank}", "1")
            answer = meeting.take(f"time/{rank}", time.monotonic() + CONNECT_S)
            if answer is not None:
                offsets[rank] = float(answer) - (asked + time.time()) / 2
    return offsets


def clocks(hosts: dict[int, str], offsets: dict[int, float]) -> list[Finding]:
    """Warn of clocks that are far apart: they confuse file times and logs, but stop no run."""
    wrong = {rank: value for rank, value in offsets.items() if abs(value) > LARGEST_SKEW_S}
    findings = [
        Finding("warn", "clocks", f"{value:+.1f} s from rank 0's host: start a time service", hosts[rank])
        for rank, value in wrong.items()
    ]
    if offsets and not wrong:
        findings.append(Finding("ok", "clocks", f"at most {max(map(abs, offsets.values())):.3f} s apart"))
    return findings


def _shared_output(meeting: Meeting, output: Path, reports: dict[int, Report]) -> list[Finding]:
    """Check that every host sees a file that rank 0 writes to the output folder, where all read and write
    checkpoints."""
    folder = output.absolute()
    mark = folder / f".doctor-{os.getpid()}"
    try:
        if meeting.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        name = meeting.tell("mark", str(mark))
        seen, _ = meeting.gather("seen", name is not None and _appears(Path(name)))
    except OSError:
        seen, _ = meeting.gather("seen", False)
    finally:
        if meeting.rank == 0:
            mark.unlink(missing_ok=True)
    blind = list(dict.fromkeys(reports[rank]["host"] for rank in reports if not seen.get(rank)))
    text = f"does not see what rank 0 writes to {folder}: `output` has to be on a file system shared by all hosts"
    if blind:
        return [Finding("stop", "output", text, host) for host in blind]
    return [Finding("ok", "output", f"{folder} is shared")] if reports else []


def _appears(path: Path) -> bool:
    """Whether a file is there, or appears within a few seconds (network file systems lag)."""
    deadline = time.monotonic() + CONNECT_S
    while not path.exists() and time.monotonic() < deadline:
        os.listdir(path.parent) if path.parent.is_dir() else None
        time.sleep(0.1)
    return path.exists()


def _all_reduce(meeting: Meeting) -> Finding:
    """A collective over all ranks, on the backend that training uses."""
    device = current()
    backend = f"{device.backend} all-reduce over {meeting.size} ranks"
    try:
        device.prepare()
        limit = timedelta(seconds=meeting.timeout_s)
        store = dist.PrefixStore("world", meeting.store)
        dist.init_process_group(device.backend, store=store, rank=meeting.rank, world_size=meeting.size, timeout=limit)
        values = torch.ones(PIECE_VALUES, device=device.torch_device)
        dist.all_reduce(values)
        device.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values)
        device.synchronize()
        seconds = time.perf_counter() - began
        dist.destroy_process_group()
    except RuntimeError as error:
        return Finding("stop", "collective", f"{backend} failed: {' '.join(str(error).split())[:200]}")
    rate = 2 * (meeting.size - 1) / meeting.size * values.nbytes / seconds / 1e9
    text = f"{backend}: {values.nbytes / 2**20:.0f} MiB in {1e3 * seconds:.1f} ms, {rate:.2f} GB/s a rank"
    return Finding("ok", "collective", text)


def _ranks(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return f"rank {shown}" if len(listed) == 1 else f"ranks {shown}"
