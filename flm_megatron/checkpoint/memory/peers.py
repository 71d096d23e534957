"""The agents of all hosts of a world: started, known to every rank, and searched for copies."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from flm_megatron.checkpoint.memory.blobs import NONE, Generation
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent, RemoteAgent
from flm_megatron.checkpoint.memory.generations import Found, found, neighbour, required
from flm_megatron.checkpoint.memory.reader import Held, MemoryCheckpoint
from flm_megatron.checkpoint.memory.starting import agent_name, start_agent
from flm_megatron.distributed.addresses import own_address
from flm_megatron.distributed.channels import broadcast, gathered
from flm_megatron.distributed.processes import describe
from flm_megatron.errors import ERRORS, DamagedError, FlmError, RequestError
from flm_megatron.json_text import JsonObject

GIB = 2**30
FREE = 0.1
"""Fraction of a host's free memory that is left alone if the run file gives no budget."""
ASKED_AT_ONCE = 32
START_S = 10.0
CONTROL_GROUP = Path("/sys/fs/cgroup")

T = TypeVar("T")


@dataclass(frozen=True)
class Search:
    """The result of a search: a complete generation and its blobs by rank, or none, and a line that says why."""

    newest: Generation
    generation: Generation | None
    blobs: dict[int, Held]
    line: str


class Peers:
    """The world's hosts as this rank sees them. All ranks make one together, and call its methods together.

    Raises:
        FlmError: (on all ranks) the agent of a host cannot be started or reached.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        places = gathered((socket.gethostname(), os.getppid()))
        names = list(dict.fromkeys(name for name, _ in places))
        self.hosts = [names.index(name) for name, _ in places]
        self.host = self.hosts[self.rank]
        self.leads = self.hosts.index(self.host) == self.rank
        """Whether this rank acts for its host."""
        launcher = places[self.hosts.index(self.host)][1]
        endpoints = _together(lambda: _lead(launcher) if self.leads else None)
        self.endpoints: list[Endpoint] = [endpoint for endpoint in endpoints if endpoint is not None]
        connected: list[LocalAgent] = []
        _together(lambda: connected.append(LocalAgent(agent_name(launcher))))
        self.local = connected[0]

    @property
    def neighbour(self) -> Endpoint | None:
        """The host that receives this host's copies; none for a single host."""
        if len(self.endpoints) == 1:
            return None
        return self.endpoints[neighbour(self.host, len(self.endpoints))]

    def search(self, wanted: Callable[[str, int], bool]) -> tuple[Search, MemoryCheckpoint | None]:
        """The newest complete generation whose stage and step satisfy `wanted`; all its blobs are checked.

        Only rank 0's `wanted` counts.
        """
        result = broadcast(self._search(wanted) if self.rank == 0 else None)
        assert result is not None
        if result.generation is None:
            return result, None
        return result, MemoryCheckpoint(result.generation, result.blobs, self.endpoints, self.local, self.host)

    def reserve(self, nbytes: int, budget_gib: float | None) -> None:
        """Allocate memory on every host for two blobs of each of its ranks, `nbytes` of this one, and of its
        neighbour's.

        Raises:
            RequestError: (on all ranks) that is beyond the budget, or beyond what a host has free.
        """
        held = self.local.ask("list")["held"] if self.leads else 0
        offers = gathered((nbytes, available_bytes() + held if self.leads else 0))
        kept = required([size for size, _ in offers], self.hosts)
        for host, sizes in enumerate(kept):
            free = offers[self.hosts.index(host)][1]
            _check_budget(self.endpoints[host].host, sum(sizes), free, budget_gib)
        budget = budget_gib * GIB if budget_gib else (1 - FREE) * offers[self.hosts.index(self.host)][1]
        _together(lambda: self.local.reserve(kept[self.host], int(budget)) if self.leads else None)

    def stop(self) -> None:
        """Stop all agents; one that is gone has stopped already."""
        dist.barrier()
        with suppress(FlmError, OSError), self.local:
            if self.leads:
                self.local.stop()

    def _search(self, wanted: Callable[[str, int], bool]) -> Search:
        answers = self._ask_all("list")
        newest = max((Generation(*answer["newest"]) for answer in answers if answer), default=NONE)
        offered = [entry for entry in _found(answers) if wanted(entry.stage, entry.step)]
        if not offered:
            return Search(newest, None, {}, "")
        checked = {entry.generation: entry for entry in _found(self._ask_all("list", check=True))}
        reasons: list[str] = []
        for entry in offered:
            right = checked.get(entry.generation)
            if right is None or right.missing:
                reasons.append(_lost(entry, right))
                continue
            result = self._described(newest, right)
            if result.generation is not None:
                return result
            reasons.append(result.line)
        return Search(newest, None, {}, reasons[0])

    def _described(self, newest: Generation, entry: Found) -> Search:
        """The search's result for a complete generation; none, and why, if its description makes no sense."""
        headers: dict[int, JsonObject] = {}
        for answer in self._ask_all("describe", generation=entry.generation):
            headers.update((answer or {}).get("headers", []))
        if len(headers) < entry.world:
            return Search(newest, None, {}, _lost(entry, None))
        blobs = {rank: Held(headers[rank], tuple(entry.holders[rank])) for rank in range(entry.world)}
        try:
            MemoryCheckpoint(entry.generation, blobs, self.endpoints, self.local, self.host)
        except DamagedError as error:
            return Search(newest, None, {}, str(error))
        names = sorted({self.endpoints[host].host for holders in entry.holders.values() for host in holders})
        line = f"{entry.stage} goes on from step {entry.step}, kept in the memory of {', '.join(names)}"
        return Search(newest, entry.generation, blobs, line)

    def _ask_all(self, do: str, **values: object) -> list[JsonObject | None]:
        """Every host's answer; none from a host that does not answer, which counts as holding nothing."""

        def ask(endpoint: Endpoint) -> JsonObject | None:
            """One host's answer."""
            try:
                with RemoteAgent(endpoint) as agent:
                    return agent.ask(do, **values)
            except (FlmError, OSError):
                return None

        with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
            return list(executor.map(ask, self.endpoints))


def _lead(launcher: int) -> Endpoint:
    """Start this host's agent if it does not run; returns its endpoint."""
    address, deadline = own_address(), time.monotonic() + START_S
    while True:
        start_agent(launcher, address)
        try:
            with LocalAgent(agent_name(launcher)) as agent:
                return agent.endpoint()
        except OSError:  # one that was just about to end
            if time.monotonic() > deadline:
                raise
        time.sleep(START_S / 100)


def _found(answers: list[JsonObject | None]) -> list[Found]:
    return found(answer["blobs"] if answer else [] for answer in answers)


def _lost(offered: Found, checked: Found | None) -> str:
    missing = list(range(offered.world)) if checked is None else checked.missing
    some = f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
    return (
        f"step {offered.step} of {offered.stage} was kept in memory, but of {len(missing)} of {offered.world} ranks "
        f"({some}) no copy is left or right"
    )


def _check_budget(host: str, needed: int, free: int, budget_gib: float | None) -> None:
    values = f"two copies of the state of each rank, and of the neighbour's, are {needed / GIB:.3g} GiB on host {host}"
    if budget_gib and needed > budget_gib * GIB:
        raise RequestError(f"{values}, but checkpoint.memory.budget_gib is {budget_gib:g}: raise it, or leave it out")
    if needed > (1 - FREE) * free:
        raise RequestError(f"{values}, which has {free / GIB:.3g} GiB free: leave checkpoint.memory out")


def _together(work: Callable[[], T]) -> list[T]:
    """The results of `work` on all ranks. If it fails on any it fails on all, with the same kind of error."""
    try:
        outcome: tuple[list[T], tuple[str, str] | None] = ([work()], None)
    except (FlmError, OSError) as error:
        outcome = ([], describe(error))
    outcomes = gathered((socket.gethostname(), *outcome))
    for host, _, failure in outcomes:
        if failure is not None:
            kind, message = failure
            raise ERRORS.get(kind, FlmError)(f"checkpoint.memory: host {host}: {message}")
    return [value for _, values, _ in outcomes for value in values]


def available_bytes(group: Path = CONTROL_GROUP) -> int:
    """Memory of this host available without swapping: the system's estimate, or what its control group leaves."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
