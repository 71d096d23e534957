"""torchrun with the exit status of its ranks: `python -m flm_megatron.launch.elastic TORCHRUN ARGUMENTS`.

torchrun itself ends with 1 whenever it was stopped by a signal, although its ranks saved and ended with 3, which a
scheduler should see to queue the job again. And with the elastic rendezvous it keeps one store for all restarts of the
ranks, so a restarted rank may find the addresses of its predecessors and hang (seen with torch 2.13 and gloo): here
every start has a store of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flm_megatron.distributed.error_file import read_status
from flm_megatron.distributed.signals import STOPPED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SPOKEN = (1, 2, STOPPED)
"""Exit statuses of ranks that have reported why they end."""


def main(arguments: list[str]) -> int:
    """Run torchrun with `arguments` until its ranks end; returns their status (3: stopped after saving)."""
    import tempfile

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _quiet_torchrun()
    args = torchrun.parse_args(arguments)
    if args.rdzv_backend != "static":
        os.environ.setdefault(OWN_STORE, "1")
    with tempfile.TemporaryDirectory(prefix="flm-") as folder:
        args.log_dir = args.log_dir or folder
        try:
            torchrun.run(args)
        except ChildFailedError as error:
            rank, failure = first_to_fail(error.failures)
            if failure.exitcode not in SPOKEN:
                print(how_it_ended(rank, failure.exitcode), file=sys.stderr)
            return status_of({failure.exitcode})
        except SignalException:
            return status_of(_last_words(Path(args.log_dir)))
    return 0


def first_to_fail(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how: torchrun ends the others, each in its own way.

    A rank that had left word and was ended while it waited to speak (`cli.main.say_last`) comes after all others, for
    its file may be older than that of the rank that spoke.
    """

    def order(rank: int) -> tuple[bool, int]:
        """Whether it waited to speak, and when it failed, in seconds."""
        failure = failures[rank]
        waited = failure.exitcode == -signal.SIGTERM and Path(failure.error_file).exists()
        return waited, failure.timestamp

    rank = min(failures, key=order)
    return rank, failures[rank]


def how_it_ended(rank: int, exit_code: int) -> str:
    """One line on a rank that reported nothing."""
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with status {exit_code}"
    return f"flm: rank {rank} on host {socket.gethostname()} {how}"


def _quiet_torchrun() -> None:
    """Silence torchrun's log of failed ranks: the ranks themselves, or `main`, report in one line."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # its own default, of which it warns
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)


def status_of(statuses: set[int]) -> int:
    """One status for all ranks: 3 or 2 if all that failed agree on it, else 1."""
    return statuses.pop() if statuses in ({STOPPED}, {2}) else 1


def _last_words(folder: Path) -> set[int]:
    """Exit statuses that the ranks of the last start left in torchrun's log folder."""
    words = list(folder.glob("*/attempt_*/*/error.json"))
    last = max((int(word.parts[-3].removeprefix("attempt_")) for word in words), default=0)
    return {read_status(word) for word in words if word.parts[-3] == f"attempt_{last}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
