"""What no input may do: change an attribute of a module or class, open or run anything, take long, take much memory."""

from __future__ import annotations

import argparse
import collections
import pathlib
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint.filesystem
import torch.distributed.checkpoint.metadata
import torch.distributed.checkpoint.planner

from flm_megatron.checkpoint.files.pickle import reader as unpickle
from flm_megatron.checkpoint.files.pickle import records as pickle_records

MOST_SECONDS = 2.0
MOST_MEMORY = 2**30  # bytes above what the program had
QUIET = ("import", "open", "exec", "compile", "os.", "subprocess.", "socket.", "pickle.", "shutil.", "ctypes.", "code.")
"""Beginnings of the audit events that reading an input may not cause."""
ALLOWED = ("os.listdir", "os.scandir")

_checkpoint = torch.distributed.checkpoint
CLASSES: tuple[Any, ...] = (
    argparse.Namespace,
    collections.OrderedDict,
    pathlib.PurePath,
    pathlib.PurePosixPath,
    pathlib.PosixPath,
    pathlib.Path,
    torch.Size,
    torch.Tensor,
    torch.device,
    torch.dtype,
    *(value for module in (_checkpoint.metadata, _checkpoint.planner) for value in vars(module).values()),
    _checkpoint.filesystem._StorageInfo,
    unpickle.Foreign,
    unpickle.StoredTensor,
    pickle_records.Name,
    pickle_records.Record,
)
RUNNERS = ("hypothesis", "_pytest")
"""Packages that keep accounts of their own while tests run: hypothesis counts garbage collections."""
_events: list[str] = []
_watching: list[str] = []  # prefix of the paths that may be opened, while an input is read


class Violation(AssertionError):
    """An input did what none may do."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event in ALLOWED or not event.startswith(QUIET):
        return
    if event == "open" and _watching[0] and str(arguments[0]).startswith(_watching[0]):
        return
    _events.append(f"{event} {arguments!r:.200}")


def snapshot() -> dict[str, dict[str, int]]:
    """Identity of every attribute of every module and of every class that any of them has, but for RUNNERS."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in RUNNERS:
            continue
        attributes = dict(getattr(module, "__dict__", {}))
        found[name] = {key: id(value) for key, value in attributes.items()}
        for value in attributes.values():
            if issubclass(type(value), type):  # asks the value nothing, which may be a proxy
                found[f"class {value.__module__}.{value.__qualname__} {id(value)}"] = {
                    key: id(part) for key, part in type.__getattribute__(value, "__dict__").items()
                }
    return found


def differences(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[str]:
    """Attributes that were there before and are others now, or that are new in what was there before."""
    return [
        f"{place}.{key}"
        for place, attributes in before.items()
        for key in attributes.keys() | after.get(place, {}).keys()
        if attributes.get(key) != after.get(place, {}).get(key)
    ]


class Watch:
    """Watches inputs one after the other."""

    def __init__(self) -> None:
        sys.addaudithook(_hook)
        self.classes = [(kind, dict(vars(kind))) for kind in CLASSES if isinstance(kind, type)]
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.slowest = 0.0

    @contextmanager
    def input(self, folder: str = "") -> Iterator[None]:
        """While an input is read; files may be opened in `folder` alone. Raises Violation."""
        _events.clear()
        _watching.append(folder)
        began = time.process_time()
        try:
            yield
        finally:
            seconds = time.process_time() - began
            _watching.clear()
        self.slowest = max(self.slowest, seconds)
        self._check(seconds)

    def _check(self, seconds: float) -> None:
        if _events:
            raise Violation(f"caused {_events[0]}")
        if seconds > MOST_SECONDS:
            raise Violation(f"took {seconds:.1f} s")
        for kind, attributes in self.classes:
            if dict(vars(kind)) != attributes:
                raise Violation(f"changed {kind}")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if memory - self.memory > MOST_MEMORY:
            grown, self.memory = memory - self.memory, memory
            raise Violation(f"took {grown / 2**20:.0f} MiB")
