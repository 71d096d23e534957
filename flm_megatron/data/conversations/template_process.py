"""A Jinja template of a file, rendered in a process of its own (see `template_worker` for why)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import flm_megatron
from flm_megatron.data.conversations.template_worker import MEMORY_BYTES, SECONDS, Request
from flm_megatron.errors import FlmError

STOP_S = 5.0
PACKAGE_ROOT = Path(flm_megatron.__file__).parents[1]


class TemplateFailure(Exception):
    """An error that a template reported; `line` of the template, if known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class TemplateProcess:
    """The template `text` in a process that lives as long as this object and renders a conversation in one exchange.

    A pipe and some JSON cost less than the rendering: 10,000 conversations of three turns take seconds either way.
    """

    def __init__(self, text: str) -> None:
        """Raises TemplateFailure if it is no template."""
        self.text = text
        self._start()

    def render(
        self, messages: Sequence[dict[str, str]], requests: Sequence[Request], marks: dict[str, str]
    ) -> list[str]:
        """The text of each request, see `template_worker`. Raises TemplateFailure."""
        if self._owner != os.getpid() or self._process.poll() is not None:  # a fork has pipes of its parent's
            self._start()
        return self._ask({"messages": list(messages), "requests": list(requests), "marks": marks})

    def _start(self) -> None:
        command = [sys.executable, "-m", "flm_megatron.data.conversations.template_worker"]
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}  # the same code as runs here
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise FlmError(f"a process for rendering the chat template cannot be started: {error}") from error
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _stop, self._process, self._owner)
        self._ask({"template": self.text})

    def _ask(self, message: dict[str, object]) -> list[str]:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self._process.wait()
            raise TemplateFailure(
                f"it takes more than {SECONDS:g} s of computing or {MEMORY_BYTES / 2**30:.0f} GiB of memory"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise TemplateFailure(answer["error"], answer["line"])
        return answer["texts"]


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """End the process, unless it is one of the process that this one was forked from."""
    if owner != os.getpid():
        return
    for pipe in (process.stdin, process.stdout):
        if pipe:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
