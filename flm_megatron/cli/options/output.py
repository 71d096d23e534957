"""`--json`: what a command found as one JSON document on standard output, for programs.

Nothing else is printed there; what a command says while it works goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def print_json(data: object) -> None:
    """Print a document. Numbers that JSON does not have, infinite ones and NaN, become null; paths become text."""
    print(json.dumps(_plain(data), indent=1, default=str, allow_nan=False))


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
