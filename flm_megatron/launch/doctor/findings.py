"""Results of the checks and their report: one line per trouble, whatever the number of hosts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "stop"]
NAMED_HOSTS = 3
NUMBERS = re.compile(r"[+-]?\d[\d.,]*(?:, \d+)*")


@dataclass(frozen=True)
class Finding:
    """One result: `ok`, `warn` (the run goes, but look at it) or `stop` (it would fail)."""

    level: Level
    topic: str
    text: str
    host: str = ""


def status_of(findings: Iterable[Finding]) -> int:
    """Exit status: 2 if something would stop the run."""
    return 2 if any(finding.level == "stop" for finding in findings) else 0


def render(findings: list[Finding]) -> str:
    """All findings as text, topics in the order of their first finding, each line with its hosts.

    Findings that differ in numbers alone share a line, which shows those of the first.
    """
    hosts = {finding.host for finding in findings if finding.host}
    width = max(len(finding.topic) for finding in findings)
    topics = list(dict.fromkeys(finding.topic for finding in findings))
    lines = []
    for topic in topics:
        for level in ("stop", "warn", "ok"):
            troubles: dict[str, list[Finding]] = {}
            for finding in findings:
                if (finding.topic, finding.level) == (topic, level):
                    troubles.setdefault("" if level == "ok" else NUMBERS.sub("", finding.text), []).append(finding)
            lines += [f"{level:4}  {topic:{width}}  {each[0].text}{_where(each, hosts)}" for each in troubles.values()]
    return "\n".join([*lines, _verdict(findings)])


def _where(alike: list[Finding], hosts: set[str]) -> str:
    """The hosts of findings that share a line; empty if these are all. The first one's text is shown."""
    names = list(dict.fromkeys(finding.host for finding in alike if finding.host))
    if not names or set(names) == hosts:
        return ""
    more = f" and {len(names) - NAMED_HOSTS} more" if len(names) > NAMED_HOSTS else ""
    return f" [{', '.join(names[:NAMED_HOSTS])}{more}]"


def _verdict(findings: list[Finding]) -> str:
    stops = sum(finding.level == "stop" for finding in findings)
    warnings = sum(finding.level == "warn" for finding in findings)
    if stops:
        return f"The run would fail: {stops} finding(s) to fix first, {warnings} warning(s)."
    return f"Nothing would stop the run; {warnings} warning(s)."
