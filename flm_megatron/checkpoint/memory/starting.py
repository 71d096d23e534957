"""Starts the agent of this host, or finds it running."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from contextlib import ExitStack

from flm_megatron.checkpoint.memory.agent import IDLE_S
from flm_megatron.distributed.addresses import listening
from flm_megatron.errors import FlmError


def obstacle() -> str | None:
    """Why there can be no host agent on this system; none if there can."""
    missing = [name for name in ("memfd_create", "pidfd_open") if not hasattr(os, name)]
    if missing:
        return f"it needs Linux 5.3 or newer, this system has no {missing[0]}"
    return None


def agent_name(launcher: int) -> str:
    """Name of the socket of the agent that serves the ranks of `launcher`, a process id, on this host."""
    return f"flm-copies-{os.getuid()}-{launcher}"


def start_agent(launcher: int, address: str, idle_s: float = IDLE_S) -> None:
    """Start the agent for the ranks of the process `launcher`, unless it runs already.

    It listens on `address` and ends after that process. Both sockets are made here, so it can be connected to at once.

    Raises:
        FlmError: the address cannot be listened on, or the launcher is gone.
    """
    with ExitStack() as stack:
        local = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            local.bind(f"\0{agent_name(launcher)}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return
            raise FlmError(f"the host agent's socket cannot be made: {error.strerror}") from error
        local.listen()
        try:
            network = stack.enter_context(listening(address))
            process = os.pidfd_open(launcher)
        except OSError as error:
            raise FlmError(f"the host agent cannot start on {address}: {error.strerror or error}") from error
        stack.callback(os.close, process)
        descriptors = (local.fileno(), network.fileno(), process)
        subprocess.Popen(
            [sys.executable, "-m", "flm_megatron.checkpoint.memory.agent", *map(str, descriptors), str(idle_s)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that it outlives the ranks, whose group the launcher ends
        )
