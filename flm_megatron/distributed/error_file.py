"""How a rank tells torchrun how it ended: in the file and format of torchrun's own error handler."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The variable in which torchrun names the file, a different one for each rank."""


def write_error_file(text: str, status: int) -> None:
    """Tell the launcher how this rank ends: one line and the exit status. Does nothing without torchrun."""
    path = os.environ.get(ERROR_FILE)
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        word = {"message": {"message": text, "errorCode": status, "extraInfo": extra}}
        Path(path).write_text(json.dumps(word), encoding="utf-8")


def read_status(path: Path) -> int:
    """The exit status in a rank's error file; 1 if torchrun wrote it, which records none."""
    message = json.loads(path.read_text(encoding="utf-8"))["message"]
    return int(message["errorCode"]) if isinstance(message, dict) and "errorCode" in message else 1
