"""The circumstances of a result: hardware, commit, versions, command, date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = (
    *("torch", "megatron-core", "triton", "transformer-engine", "apex", "flash-attn"),
    *("transformers", "torchtitan", "numpy"),
)
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")


def environment(command: list[str]) -> dict[str, str]:
    """The machine, the code and the command, by name."""
    import torch

    from flm_megatron.device import current

    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    set_here = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    return {
        "hardware": current().hardware_name(),
        "host": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}",
        "threads of a process": str(torch.get_num_threads()),
        "load at the start (1/5/15 min)": load,
        "commit": commit(),
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "command": shlex.join([*set_here, *command]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def command_line() -> list[str]:
    """The command as a user would type it again."""
    return [Path(sys.argv[0]).name if not sys.argv[0].endswith("main.py") else "flm", *sys.argv[1:]]


def commit() -> str:
    """Commit of the code that runs, and whether it was changed since; `unknown` outside a repository."""
    folder = Path(__file__).parents[1]
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", "."],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found} with changes" if changed else found


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
