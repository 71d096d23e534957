"""Checks of one host: programs, devices, memory, disk, network names, data."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig
from flm_megatron.device import current
from flm_megatron.device.hardware import find_hardware
from flm_megatron.engine.version import require_engine
from flm_megatron.errors import FlmError
from flm_megatron.launch.doctor.findings import Finding, Level
from flm_megatron.launch.doctor.machine import examine_machine
from flm_megatron.launch.doctor.rehearsal import rehearsed
from flm_megatron.url import is_url

GIB = 2**30
SHARED_MEMORY_PER_RANK = 32 * 2**20
"""NCCL's buffers between two processes of a host, rounded up."""
AMPLE_SHARED_MEMORY = GIB
OPEN_FILES = 4096


def facts(run: RunConfig) -> dict[str, str]:
    """What must be equal on all hosts: versions, and the fingerprints of tokenizer and data."""
    from flm_megatron.data.corpus.description import read_description
    from flm_megatron.data.tokenizer import open_tokenizer

    found = {name: _version(name) for name in ("flm_megatron", "torch", "megatron-core", "transformer-engine")}
    found["python"] = platform.python_version()
    try:
        if run.tokenizer:
            found[f"tokenizer {run.tokenizer}"] = open_tokenizer(run.tokenizer).fingerprint
        for source in (*run.data.train, *run.data.validation):
            found[f"dataset {source.path}"] = read_description(source.path).sha256
    except FlmError:
        pass  # `data` reports it
    return found


@dataclass(frozen=True)
class Place:
    """This host's part in the run.

    `ranks_here` processes of `world` (none if not launched), the port to check (none if the launcher holds it), and the
    size of the largest checkpoint in bytes, if known.
    """

    ranks_here: int
    world: int | None
    port: int | None
    checkpoint_bytes: int | None


def examine_host(run: RunConfig, place: Place, rehearse: bool = False) -> list[Finding]:
    """All findings on this host; with `rehearse` also what ranks run into in one step at their true size."""
    ranks_here, world = place.ranks_here, place.world
    several_hosts = world is not None and world > ranks_here
    return [
        versions(),
        layout(run, world),
        devices(ranks_here),
        *implementations(run),
        shared_memory(ranks_here),
        limits(world or ranks_here),
        network_name(several_hosts),
        *examine_machine(run, ranks_here, several_hosts),
        *([] if place.port is None else [port_is_free(place.port)]),
        data(run),
        disk(run, place.checkpoint_bytes),
        *(rehearsed(run, world) if rehearse else []),
    ]


def versions() -> Finding:
    """Installed versions; megatron-core's must be one that this program supports."""
    import torch

    parts = [f"{name} {_version(name)}" for name in ("flm_megatron", "torch", "megatron-core")]
    parts.append(f"Python {platform.python_version()}")
    if torch.version.cuda:
        parts.append(f"CUDA {torch.version.cuda}")
    try:
        require_engine()
    except FlmError as error:
        return Finding("stop", "versions", str(error))
    return Finding("ok", "versions", ", ".join(parts))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def layout(run: RunConfig, world: int | None) -> Finding:
    """The rules of the run file, for the available processes."""
    try:
        check(run, world)
    except FlmError as error:
        return Finding("stop", "run file", str(error))
    processes = f" on {world} processes" if world else ""
    return Finding("ok", "run file", f"{len(run.stages)} stage(s), all rules kept{processes}")


def devices(ranks_here: int) -> Finding:
    """A GPU for every process, or a CPU."""
    import torch

    device = current()
    if device.name == "cpu":
        cores = len(os.sched_getaffinity(0))
        level: Level = "ok" if cores >= ranks_here else "warn"
        text = f"no GPU; {device.hardware_name()}, {cores} cores for {ranks_here} process(es)"
        return Finding(level, "devices", text)
    count, name = torch.accelerator.device_count(), device.hardware_name()
    if count < ranks_here:
        return Finding("stop", "devices", f"{count} x {name} for {ranks_here} processes: start {count} on this host")
    unknown = "" if find_hardware(name) else " (not in the table of peaks: MFU is shown as n/a)"
    return Finding("warn" if unknown else "ok", "devices", f"{count} x {name}{unknown}")


def implementations(run: RunConfig) -> Iterator[Finding]:
    """Whether Transformer Engine, Apex and Triton can be imported, or why not; and what the run file asks for."""
    from flm_megatron.kernels import choose
    from flm_megatron.kernels.backends import missing, obstacle

    device = current().name
    found, broken = [], []
    for name, package in (("te", "transformer_engine.pytorch"), ("apex", "apex"), ("triton", "triton")):
        reason = obstacle(name, device)
        if reason is None:
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken build fails in any way
                broken.append(f"{name} is installed but does not import: {' '.join(str(error).split())[:120]}")
                continue
        found.append(f"{name} {'found' if reason is None else 'not found' if missing(name) else 'not usable'}")
    try:
        chosen = choose(run.kernels)
    except FlmError as error:
        yield Finding("stop", "kernels", str(error))
        return
    for text in broken:
        yield Finding("stop", "kernels", f"{text}; fix it, or remove it")
    if not broken:
        yield Finding("ok", "kernels", f"{chosen.describe().removeprefix('kernels ')} ({'; '.join(found)})")


def shared_memory(ranks_here: int, folder: str = "/dev/shm") -> Finding:
    """Size of /dev/shm, over which NCCL joins the processes of a host; containers start with 64 MiB."""
    if not Path(folder).is_dir():
        return Finding("warn", "shared memory", f"there is no {folder}")
    size = shutil.disk_usage(folder).total
    text = f"{folder} has {size / GIB:.3g} GiB"
    fix = ": start the container with --ipc=host or --shm-size, or mount memory there"
    if current().name != "cpu" and ranks_here > 1 and size < SHARED_MEMORY_PER_RANK * ranks_here:
        return Finding("stop", "shared memory", f"{text}, too little for {ranks_here} processes{fix}")
    if current().name != "cpu" and size < AMPLE_SHARED_MEMORY:
        return Finding("warn", "shared memory", text + fix)
    return Finding("ok", "shared memory", text)


def limits(world: int) -> Finding:
    """Open files (each connection between ranks is one), and locked memory, which RDMA needs."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if files != resource.RLIM_INFINITY and files < max(1024, 2 * world):
        return Finding("warn", "limits", f"{files} open files for {world} ranks: raise it with ulimit -n {OPEN_FILES}")
    if current().name != "cpu" and locked != resource.RLIM_INFINITY:
        return Finding("warn", "limits", f"{locked} bytes of locked memory: RDMA wants `ulimit -l unlimited`")
    return Finding("ok", "limits", f"{files} open files")


def network_name(several_hosts: bool) -> Finding:
    """This host's name, as torchrun and gloo look it up."""
    name, card = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME")
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        text = f"the name {name} of this host has no address ({error.strerror}): put it into /etc/hosts"
        return Finding("stop" if several_hosts and not card else "warn", "network", text)
    cards = [card for _, card in socket.if_nameindex()]
    if card and card not in cards:
        return Finding("stop", "network", f"GLOO_SOCKET_IFNAME is {card}, but the cards are {', '.join(cards)}")
    if several_hosts and address.startswith("127.") and not card:
        text = f"{name} is {address}, which other hosts cannot reach: set GLOO_SOCKET_IFNAME to this host's card"
        return Finding("stop", "network", text)
    return Finding("ok", "network", f"gloo uses {card}" if card else f"{name} is {address}")


def port_is_free(port: int) -> Finding:
    """Whether the launcher's port can be bound on this host."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            text = f"port {port} cannot be used ({error.strerror}): give torchrun another one"
            return Finding("stop", "port", text)
    return Finding("ok", "port", f"{port} is free")


def data(run: RunConfig) -> Finding:
    """Tokenizer, datasets and initial checkpoint: present, readable, and fitting each other."""
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.data.corpus.description import file_of, read_description
    from flm_megatron.launch.preflight import resolve

    sources = [*run.data.train, *run.data.validation]
    try:
        resolve(run)
        for source in sources:
            if not is_url(source.path):
                with file_of(source.path, "bin").open("rb") as file:
                    file.read(1)
        if run.checkpoint.initial:
            open_checkpoint(run.checkpoint.initial)
    except (FlmError, OSError) as error:
        return Finding("stop", "data", str(error))
    tokens = sum(read_description(source.path).tokens for source in run.data.train)
    return Finding("ok", "data", f"{len(sources)} dataset(s), {tokens:,} training tokens, readable")


def disk(run: RunConfig, checkpoint_bytes: int | None) -> Finding:
    """Whether the output folder can be written and has room for as many of the largest checkpoint as are kept."""
    folder = Path(run.output).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("stop", "disk", f"{folder} cannot be written ({error.strerror}): change `output` or its rights")
    free, kept = shutil.disk_usage(folder).free, run.checkpoint.keep_last + 1
    text = f"{_gib(free)} free in {folder}"
    if checkpoint_bytes is None:
        return Finding("warn", "disk", f"{text}; the size of a checkpoint is not known without a vocabulary")
    text += f", the largest checkpoint takes {_gib(checkpoint_bytes)}"
    if free < checkpoint_bytes:
        return Finding("stop", "disk", f"{text}: make room, or change `output`")
    if free < checkpoint_bytes * kept:
        return Finding("warn", "disk", f"{text}, and {kept} at a time are kept or being written")
    return Finding("ok", "disk", f"{text}, {kept} at a time")


def _gib(size: float) -> str:
    return f"{size / GIB:,.3g} GiB" if size < 1000 * GIB else f"{size / GIB:,.0f} GiB"
