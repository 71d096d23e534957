"""A folder of objects that exists once its marker does: `destination`, where nothing can be renamed.

Before anything else the object `.writing` is made, only if it is not there: one writer for a URL. Objects get their
final names at once, and the marker (a checkpoint's manifest) is written last, only if it is not there. What has no
marker is half: no reader takes it for a checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from flm_megatron.checkpoint.lease.fence import check_fences
from flm_megatron.errors import RequestError
from flm_megatron.storage import store
from flm_megatron.storage.path import ObjectPath

CLAIM = ".writing"


def refuse_existing_url(path: ObjectPath) -> None:
    """Raise RequestError if anything lies at or below `path`."""
    if path.is_file():
        raise RequestError(f"{path} is an object: choose another destination or remove it")
    found = path.objects()
    if CLAIM in found:
        raise RequestError(
            f"{path} is being written, or a writer left it half ({_writer(path)}): wait until it has ended, or remove "
            "all below it if it is gone"
        )
    if found:
        raise RequestError(f"{path} exists already: choose another destination or remove it")


def begin_at_url(path: ObjectPath) -> ObjectPath:
    """Claim `path` and return it. Raises RequestError if something is there, or another claims it."""
    refuse_existing_url(path)
    claim = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "token": os.urandom(8).hex(),
    }
    if not store.create(str(path / CLAIM), json.dumps(claim).encode()):
        raise RequestError(f"{path} is being written ({_writer(path)}): wait until it has ended")
    return path


def publish_at_url(path: ObjectPath, last: Mapping[str, bytes]) -> None:
    """Write the objects `last`, the marker first; then take the claim away. Raises RequestError if the marker is
    there."""
    check_fences()
    for name, data in last.items():
        if not store.create(str(path / name), data):
            raise RequestError(f"{path / name} has appeared meanwhile: choose another destination or remove it")
    with suppress(RequestError):  # the folder is whole, whatever else lies in it
        store.remove(str(path / CLAIM))


def discard_at_url(path: ObjectPath) -> None:
    """Remove what a failed writer wrote, its claim last; what cannot be removed stays half. The marker goes first, if
    an answer was lost after it had been written."""
    with suppress(RequestError, OSError):
        check_fences()
        remove_at_url(path)


def remove_at_url(path: ObjectPath, marker: str = "manifest.json") -> None:
    """Remove all below `path`: the marker first, so that half of it is no checkpoint; the claim last. Raises
    RequestError."""
    names = sorted(path.objects(), key=lambda name: (name == CLAIM, name != marker))
    for name in names:
        store.remove(str(path / name))


def _writer(path: ObjectPath) -> str:
    try:
        found = json.loads((path / CLAIM).read_bytes())
        return f"process {found['process']} on host {found['host']}, since {found['since']}"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "by whom is not known"
