"""Requests to a store that are tried again, with longer and longer pauses, and end in one line."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from flm_megatron.errors import RequestError, one_line
from flm_megatron.url import redacted, shown

T = TypeVar("T")
ATTEMPTS = 6
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
REQUEST_TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 10.0
SLOWEST_BYTES_PER_S = 2**20
"""A request may take REQUEST_TIMEOUT_S and what its bytes take at this speed: a store that hangs costs at most
ATTEMPTS times that."""
FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, NotImplementedError)
"""Answers of a store that another request would not change, for the caller."""


class Incomplete(OSError):
    """A store sent fewer bytes than were asked for."""


def retrying(action: Callable[[], T], url: str, what: str) -> T:
    """`action()`, tried up to ATTEMPTS times while the store answers 5xx, is silent, or breaks off.

    `what` says in an error what could not be done ("read").

    Raises:
        FileNotFoundError, FileExistsError: the store says so.
        RequestError: it allows no access, or failed to the end; names the URL without secrets.
    """
    began = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FINAL:
            raise
        except Exception as error:
            if _refused(error):
                raise RequestError(_said(error, url, what) + ": give this process the right to") from None
            if attempt == ATTEMPTS:
                tried = f" ({ATTEMPTS} tries in {time.monotonic() - began:.0f} s)"
                raise RequestError(_said(error, url, what) + tried + ": see to the store, then try again") from None
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _refused(error: Exception) -> bool:
    """Whether it is of keys that are missing or wrong, whatever library says so."""
    return isinstance(error, PermissionError) or type(error).__name__ in (
        "NoCredentialsError",
        "DefaultCredentialsError",
    )


def _said(error: Exception, url: str, what: str) -> str:
    reason = one_line(redacted(str(error).strip().partition("\n")[0]))[:300]
    reason = reason or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)
    return f"{shown(url)} cannot be {what}: {reason}"
