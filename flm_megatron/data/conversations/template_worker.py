"""A process that renders one Jinja template for its parent, within limits of the kernel: `python -m` this module.

A chat template is a program that somebody else wrote. The sandbox keeps it from the rest of Python, not from running
for ever or filling the memory: loops in loops, `"x" * 10**9`, widths of a billion in any of forty filters and string
methods, calls that call themselves twice. A list of what to forbid would miss one, and a signal does not interrupt a
computation in C; a limit of processor time and memory on a process of its own holds for all of them.

One request is one line of JSON, and so is its answer. The first has the template's text and is answered without
texts. The others have messages and what to render of them: pairs of how many messages, and the content that takes the
place of the last one's (none: its own) with whether an answer is to be opened.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from flm_megatron.json_text import JsonObject

SECONDS = 1.0
"""Processor time of one rendering; that of a conversation takes a millisecond."""
MEMORY_BYTES = 2**30
LONGEST_OUTPUT = 2**25  # characters
Request = tuple[int, bool, str | None]
"""The number of messages, whether to open an answer, and what replaces the last one's content."""


class Template(Protocol):
    """The methods of Jinja's Template that are used."""

    def render(self, **variables: object) -> str:
        """The template's text for these variables."""


def make_template(text: str) -> Template:
    """The template in the sandbox. Raises jinja2.TemplateSyntaxError."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(text)


def render(
    template: Template, messages: Sequence[dict[str, str]], requests: Sequence[Request], marks: dict[str, str]
) -> list[str]:
    """The text of each request, with `marks` as further variables. Raises what the template raises."""
    return [_render_one(template, messages, request, marks) for request in requests]


def _render_one(template: Template, messages: Sequence[dict[str, str]], request: Request, marks: dict[str, str]) -> str:
    count, prompt, content = request
    shown = list(messages[:count])
    if content is not None:
        shown[-1] = {**shown[-1], "content": content}
    return template.render(messages=shown, add_generation_prompt=prompt, **marks)


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def serve() -> None:
    """Answer requests until the parent closes its end."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template: Template
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "template" in message:
                _limit_time()
                template = make_template(message["template"])
                answer: dict[str, object] = {"texts": []}
            else:
                answer = {"texts": [_checked(template, message, request) for request in message["requests"]]}
        except Exception as error:  # a template may raise anything
            answer = _failure(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _checked(template: Template, message: JsonObject, request: Request) -> str:
    _limit_time()
    text = _render_one(template, message["messages"], request, message["marks"])
    if len(text) > LONGEST_OUTPUT:
        raise ValueError(f"it writes {len(text):,} characters, more than {LONGEST_OUTPUT:,}")
    text.encode()  # half a surrogate pair is no text
    return text


def _limit_time() -> None:
    """Have the kernel end this process after SECONDS of its processor time from now on."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _failure(error: Exception) -> dict[str, object]:
    if isinstance(error, MemoryError):
        return {"error": f"it needs more than {MEMORY_BYTES / 2**30:.0f} GiB of memory", "line": None}
    if isinstance(error, RecursionError):
        return {"error": "it calls itself, or nests, too deeply", "line": None}
    return {"error": str(error)[:300] or type(error).__name__, "line": getattr(error, "lineno", None)}


if __name__ == "__main__":
    serve()
