"""The address under which other hosts reach this one."""

from __future__ import annotations

import os
import socket

from flm_megatron.errors import RequestError

CARD = "GLOO_SOCKET_IFNAME"


def own_address() -> str:
    """The address of this host that others reach: of the card in GLOO_SOCKET_IFNAME, or towards MASTER_ADDR.

    Raises:
        RequestError: the card has no address, or MASTER_ADDR is not known.
    """
    card = os.environ.get(CARD, "").split(",")[0]
    return _address_of(card) if card else _address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))


def listening(address: str, backlog: int = 128) -> socket.socket:
    """A socket that listens on a free port of an address of this host; `backlog` connections may wait."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=backlog)


def _address_of(card: str) -> str:
    import psutil

    found = psutil.net_if_addrs().get(card, [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in found:
            if entry.family == family:
                return entry.address.split("%")[0]
    raise RequestError(f"{CARD} is {card!r}, which has no address on {socket.gethostname()}")


def _address_towards(master: str) -> str:
    try:
        family, kind, _, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RequestError(f"MASTER_ADDR is {master!r}, which {socket.gethostname()} cannot reach: {error}") from error
