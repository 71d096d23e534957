"""The door: a run with `output_url` begins with what is there, and leaves there what it makes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flm_megatron.config.schema import RunConfig
from flm_megatron.durable import make_folders, write_file
from flm_megatron.errors import RequestError
from flm_megatron.launch.mirror.bring import bring, stored
from flm_megatron.launch.mirror.lease import UrlLease
from flm_megatron.launch.mirror.upload import Uploads
from flm_megatron.storage import store
from flm_megatron.storage.store import require_url
from flm_megatron.url import join, shown

SESSIONS = ".sessions"


@contextmanager
def mirrored(run: RunConfig) -> Iterator[None]:
    """Bring the run's folder here if another machine has trained it since, and keep the URL up to date in the block.

    Nothing for a run without `output_url`.
    Raises:
        RequestError: another run uses the URL, the store fails, or the process is a launcher's rank.
    """
    if run.output_url is None:
        yield
        return
    require_url(run.output_url, "output_url")
    if "RANK" in os.environ:
        raise RequestError(
            f"output at {shown(run.output_url)} is for runs whose processes `flm train` starts itself, on one machine: "
            "under a launcher give a folder that all machines share"
        )
    folder, lease = Path(run.output), UrlLease(run.output_url)
    lease.take()
    try:
        there = stored(run.output_url)
        begin(run.output_url, folder, there, [stage.name for stage in run.stages])
        uploads = Uploads(folder, run.output_url, lease, there, run.output_url_interval_s)
    except BaseException:
        lease.give_up()
        raise
    uploads.start()
    try:
        yield
    finally:
        uploads.finish()


def begin(url: str, folder: Path, there: dict[str, store.ObjectInfo], stages: list[str]) -> None:
    """Have in `folder` what the URL has, if the last session there was none of this folder; note a new session.

    A folder that another machine has overtaken is kept under another name. Sessions, not sizes, say which is newer.
    """
    ours, last = _sessions(folder), _last_session(url)
    if last is not None and last not in ours:
        if folder.exists() and any(folder.iterdir()):
            number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.before-{n}").exists())
            aside = folder.rename(folder.with_name(f"{folder.name}.before-{number}"))
            print(f"{shown(url)} was trained further elsewhere: what was here is kept in {aside}", flush=True)
        found = bring(there, folder, stages)
        print(f"brought from {shown(url)}: {', '.join(found) or 'no checkpoint'}", flush=True)
    session = uuid.uuid4().hex
    make_folders(folder)
    write_file(folder / SESSIONS, "".join(f"{each}\n" for each in (*_sessions(folder), session)).encode())
    store.write(join(url, SESSIONS), session.encode())


def _sessions(folder: Path) -> list[str]:
    try:
        return (folder / SESSIONS).read_text(encoding="utf-8").split()
    except OSError:
        return []


def _last_session(url: str) -> str | None:
    try:
        return store.read(join(url, SESSIONS)).decode(errors="replace")
    except FileNotFoundError:
        return None
