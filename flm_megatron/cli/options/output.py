"""`--json`: what a command found as one JSON document on standard output, for programs.

Nothing else is printed there; what a command says while it works goes to standard error.
"""

from __future__ import annotations

import argparse


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def print_json(data: object) -> None:
    """Print a document, as `json_document` makes it."""
    from flm_megatron.json_text import json_document

    print(json_document(data))
