"""Tries a tracker of the user in a process of its own: `python -m flm_megatron.training.trackers.trial CLASS`.

Its module may do anything when it is imported, and nothing of that is to reach a process that trains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

from flm_megatron.errors import RequestError
from flm_megatron.training.trackers.streams import private_streams
from flm_megatron.training.trackers.tracker import Tracker
from flm_megatron.training.user_class import user_class

FIELD = "logging.trackers"
LIMIT_S = 120
GOOD = "it can be used"


def require_own(name: str) -> None:
    """Check that the user's class can be imported and made.

    Raises:
        RequestError: it cannot, is no tracker, or its module ends the process or takes too long.
    """
    module = trial_module()
    process = subprocess.Popen(
        [sys.executable, "-m", module, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RequestError(f"{FIELD}: {name} was not imported within {LIMIT_S} s: see what its module does") from None
    finally:
        with suppress(ProcessLookupError):  # also what it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    word = said.decode("utf-8", "replace").strip()
    if word != GOOD:
        raise RequestError(word or f"{FIELD}: {name} ends the process that imports it, status {process.returncode}")


def trial_module() -> str:
    """Name of this module, whoever runs it."""
    return f"{__package__}.trial"


def main(name: str) -> None:
    """Say whether the class can be used, or why not."""
    _, lines = private_streams()
    try:
        user_class(name, Tracker, FIELD)
        word = GOOD
    except RequestError as error:
        word = str(error)
    print(word, file=lines, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # threads that the module left do not hold it
