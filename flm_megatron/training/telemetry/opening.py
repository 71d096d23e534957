"""Makes the observers that a run asks for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from flm_megatron.config.schema import PrometheusConfig, RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.training.telemetry.observers import Observer, Observers, warn

EXTRA = "pip install 'flm_megatron[trackers]'"


@contextmanager
def telemetry(run: RunConfig, rank: int, size: int, memory_gib: Callable[[], float]) -> Iterator[Observers]:
    """The observers of this rank of `size` ranks; `memory_gib` gives its peak memory when it is asked for."""
    asked, found = run.logging, list[Observer]()
    if asked.prometheus and (rank == 0 or asked.prometheus.per_rank):
        from flm_megatron.training.telemetry.prometheus import Exporter

        port = local_port(asked.prometheus, rank)
        try:
            found.append(Exporter(run, rank, size, port, memory_gib))
        except OSError as error:
            warn(f"logging.prometheus: rank {rank} cannot listen at port {port} ({error}), the run goes on without it")
    if asked.opentelemetry and rank == 0:
        from flm_megatron.training.telemetry.spans import Spans, exporter

        found.append(Spans(run, asked.opentelemetry.step_interval, exporter(asked.opentelemetry.endpoint)))
    observers = Observers(found)
    try:
        yield observers
    finally:
        observers.close()


def local_port(prometheus: PrometheusConfig, rank: int) -> int:
    """The port of a rank: those of one machine have one each."""
    return prometheus.port + (int(os.environ.get("LOCAL_RANK", rank)) if prometheus.per_rank else 0)


def require_telemetry(run: RunConfig) -> None:
    """Check that the libraries are there. Raises RequestError if they are not."""
    wanted = {"prometheus": "prometheus_client", "opentelemetry": "opentelemetry.exporter.otlp.proto.http"}
    for field, library in wanted.items():
        if getattr(run.logging, field) and not _is_there(library):
            raise RequestError(f"logging.{field}: {library.partition('.')[0]} is not installed: {EXTRA}")


def require_ports(prometheus: PrometheusConfig, processes: int) -> None:
    """Check that the ports of this many ranks on this machine are free.

    Raises:
        RequestError: one is taken, is no port, or the address is not one of this machine.
    """
    for port in range(prometheus.port, prometheus.port + (processes if prometheus.per_rank else 1)):
        try:
            family, kind, *_, address = socket.getaddrinfo(prometheus.address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
        except (OSError, OverflowError) as error:
            raise RequestError(
                f"logging.prometheus: cannot listen at {prometheus.address} port {port} ({error}): choose another port"
            ) from None


def _is_there(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
