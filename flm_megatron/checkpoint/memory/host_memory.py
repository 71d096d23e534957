"""How much memory this host, or the container that the process runs in, has left."""

from __future__ import annotations

from pathlib import Path

GROUP = Path("/sys/fs/cgroup")


def available_bytes(group: Path = GROUP) -> int:
    """What can be had without swapping: the system's estimate, or what the control group leaves if that is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
