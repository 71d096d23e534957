"""The lease of a run: as long as it lasts, nobody else trains into its output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flm_megatron.checkpoint.files.destination import write_errors
from flm_megatron.checkpoint.lease.lease import lease
from flm_megatron.config.schema import RunConfig
from flm_megatron.distributed.error_file import write_error_file
from flm_megatron.distributed.processes import Processes
from flm_megatron.durable import make_folders

LEASE = ".lease"
ADVICE = "wait until it has ended or stop it, or choose another `output`"


@contextmanager
def run_lease(run: RunConfig) -> Iterator[None]:
    """All processes of the run enter, before anything is written to `run.output`; it is made if it is not there.

    A job that was queued again, or whose ranks were started again, waits up to `distributed.timeout_s` for its own
    earlier ranks, which may be saving still.

    Raises:
        RequestError: another run has this output and is alive, or it cannot be written.
    """
    output, processes = Path(run.output), Processes()
    processes.on_first(write_errors(output)(lambda: make_folders(output)))
    patience_s = float(run.distributed.timeout_s)
    with lease(output / LEASE, f"output {output}", ADVICE, processes, patience_s, partial(write_error_file, status=1)):
        yield
