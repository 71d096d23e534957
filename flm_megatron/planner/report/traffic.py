"""Transfers of a rank, planned or rehearsed, as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Mapping

from flm_megatron.planner.cost.memory import GIB
from flm_megatron.planner.report.text import table

Traffic = Mapping[tuple[str, int], tuple[int, int]]
"""Count and bytes of transfers by kind and number of ranks."""


def traffic_table(traffic: Traffic) -> str:
    """A line for each kind of transfer and number of ranks."""
    rows = [["", "ranks", "count", "GiB"]]
    for (kind, ranks), (count, nbytes) in traffic.items():
        rows.append([kind, str(ranks), f"{count:,}", f"{nbytes / GIB:,.2f}"])
    return table(rows)


def traffic_data(traffic: Traffic) -> list[dict[str, object]]:
    """The same as plain data."""
    return [
        {"kind": kind, "ranks": ranks, "count": count, "bytes": nbytes}
        for (kind, ranks), (count, nbytes) in traffic.items()
    ]
