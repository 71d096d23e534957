"""Processes that `flm train` starts itself: the first error is shown with its rank, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from flm_megatron.distributed.local_processes import run_processes
from flm_megatron.errors import FlmError, Mistakes, RequestError


def add_ranks(folder: str) -> int:
    """All ranks meet; rank 0's status is the sum."""
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    (Path(folder) / str(dist.get_rank())).write_text(str(os.getpid()))
    return int(total)


def fail_on_one(kind: str) -> int:
    """Rank 1 fails in some way while the others wait for it in a collective."""
    if dist.get_rank() == 1:
        time.sleep(0.2)
        if kind == "request":
            raise RequestError("the batch of 7 is odd: make it even")
        if kind == "mistakes":
            raise Mistakes(["the batch is odd", "the width is even"], "run.yaml")
        if kind == "crash":
            raise ZeroDivisionError("planted")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return 0


def test_processes_share_a_world_and_end(tmp_path: Path) -> None:
    assert run_processes(3, add_ranks, (str(tmp_path),)) == 6
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(set(pids)) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("request", RequestError, "the batch of 7 is odd"),
        ("mistakes", Mistakes, "^run.yaml: 2 mistakes\n  the batch is odd\n  the width is even$"),
        ("crash", FlmError, "rank 1: Traceback.*ZeroDivisionError: planted"),
        ("kill", FlmError, "rank 1 was killed by SIGKILL"),
    ],
)
def test_the_first_error_is_what_the_user_sees(kind: str, error: type[FlmError], words: str) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=f"(?s){words}") as caught:
        run_processes(3, fail_on_one, (kind,))
    assert caught.value.status == error.status
    assert time.monotonic() - began < 30
