"""A run at a URL for tools that read runs: its logs on this machine, as they are there now, without checkpoints."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.launch.mirror.bring import bring, stored
from flm_megatron.paths import FilePath
from flm_megatron.storage.cache.place import cache_root
from flm_megatron.url import is_url, name_of, shown


def run_at_hand(run: FilePath) -> Path:
    """The folder of a run: `run` itself, or for a URL a folder of the cache with its logs as they are now.

    Raises:
        RequestError: there is nothing at the URL, or the store fails.
    """
    if not is_url(run):
        return Path(run)
    url = str(run).rstrip("/")
    objects = stored(url)
    if not objects:
        raise RequestError(f"{shown(url)}: no run is there: give the `output` of its run file")
    folder = cache_root() / "read" / hashlib.sha256(url.encode()).hexdigest()[:16] / name_of(url)
    bring(objects, folder, stages=())
    return folder
