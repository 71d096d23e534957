"""Whole numbers of the run file that are out of range."""

from __future__ import annotations

from collections.abc import Mapping

LARGEST_WORLD = 2**20
"""Processes: more accelerators than any cluster has."""
LARGEST_MODEL = {
    "num_layers": 100_000,
    "hidden_size": 2**20,
    "ffn_hidden_size": 2**24,
    "num_attention_heads": 2**16,
    "num_query_groups": 2**16,
    "head_dim": 2**16,
    "sliding_window": 2**27,
    "max_positions": 2**27,
    "vocab_size": 2**24,
}
"""Far above any model, so that a typing error is not planned or computed for hours."""
LARGEST_COUNT = 10**9
"""Steps, samples in a batch, and similar counts."""
LARGEST_SEQUENCE = 2**27
"""Tokens of a sequence."""
LARGEST_TOKENS = 10**18
"""Token budgets: far above any, and positions in the stream fit into 64 bits."""


def out_of_range(values: Mapping[str, tuple[int | None, int, int]]) -> list[str]:
    """A line for each field whose value is below its least or above its largest; `values` are (value, least, largest)
    by path, a value of none being none of these."""
    lines = []
    for path, (value, least, largest) in values.items():
        if value is not None and value < least:
            lines.append(f"{path} is {value}, give at least {least}")
        elif value is not None and value > largest:
            lines.append(f"{path} is {shown(value)}, give at most {largest}")
    return lines


def shown(number: int) -> str:
    """A number, or its number of digits if that is what is wrong with it."""
    text = str(number)
    return text if len(text) <= 40 else f"{text[:12]}... ({len(text)} digits)"
