"""The lease of a run: while it lasts, no other process trains into its output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flm_megatron.checkpoint.files.destination import write_errors
from flm_megatron.checkpoint.lease.file import LEASE
from flm_megatron.checkpoint.lease.lease import lease
from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.error_file import write_error_file
from flm_megatron.distributed.processes import Processes
from flm_megatron.durable import make_folders

ADVICE = "wait until it has ended or stop it, or choose another `output`"


@contextmanager
def run_lease(run: RunConfig) -> Iterator[None]:
    """All processes of the run enter, before anything is written to `run.output`, which is created if missing.

    A job that was queued again, or whose ranks were restarted, waits up to `distributed.timeout_s` for its own earlier
    ranks, which may still be saving.

    Raises:
        RequestError: another run has this output and is alive, or it cannot be written.
    """
    output, processes = Path(run.output), Processes()
    processes.on_first(write_errors(output)(lambda: make_folders(output)))
    patience_s = float(run.distributed.timeout_s)
    with lease(output / LEASE, f"output {output}", ADVICE, processes, patience_s, partial(write_error_file, status=1)):
        yield
