"""Print predicted against published as Markdown tables.

Usage: python -m benchmarks.planner.compare
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.planner.memory import MemoryRow, memory_rows
from benchmarks.planner.row import Role, Row, published_seconds
from benchmarks.planner.rows import time_rows
from benchmarks.planner.scaling import frontier_rows, megatron_2019_rows, relations
from flm_megatron.planner.cost.memory import GIB, all_rank_memory
from flm_megatron.planner.cost.throughput import step_time

FLM_DAYS = {"FLM 16B": (245.37e9, 9.63), "FLM 51B": (39.64e9, 5.37), "FLM 101B": (26.54e9, 6.54)}
FLM_DAYS_FROM_SCRATCH = 76.74
TITLES: dict[Role, str] = {
    "sets": "Rows that set constants",
    "checks": "Rows that only check",
    "indicative": "Indicative rows (shape, layout or figure not sourced)",
}


def predicted_seconds(row: Row) -> float:
    """Seconds of a step as planned."""
    return step_time(row.work, row.machine).total


def time_error(row: Row) -> float:
    """Relative error of the predicted time."""
    return predicted_seconds(row) / published_seconds(row) - 1


def memory_error(row: MemoryRow) -> float:
    """Relative error of the predicted memory."""
    return row.predicted / row.published - 1


def percent(error: float) -> str:
    """Signed per cent."""
    return f"{100 * error:+.1f} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rows_of(role: Role) -> list[Row]:
    """The rows of one role."""
    return [row for row in (*time_rows(), *megatron_2019_rows(), *frontier_rows()) if row.role == role]


def time_table(role: Role) -> str:
    """Iteration times of the rows of one role."""
    rows = []
    for row in rows_of(role):
        machine = row.machine
        peak = max(memory.total for memory in all_rank_memory(row.work, machine.context_gib, machine.fragmentation))
        seconds = f"{published_seconds(row):.2f}" + (f" (from {row.tflops:.0f} TFLOP/s)" if row.tflops else "")
        values = [seconds, f"{predicted_seconds(row):.2f}", percent(time_error(row)), f"{peak / GIB:.0f}"]
        rows.append([row.name, row.gpu, *values, row.source, row.assumed or "-"])
    header = ["step", "GPU", "published, s", "predicted, s", "error", "planned GiB", "source", "assumed"]
    return table(header, rows)


def days_table() -> str:
    """FLM-101B's stages in days, and all of its tokens at the last size from scratch."""
    rows, seconds = [], 0.0
    by_name = {row.name: row for row in time_rows()}
    for name, (tokens, days) in FLM_DAYS.items():
        row = by_name[name]
        predicted = tokens / row.work.step_tokens * predicted_seconds(row) / 86400
        seconds += predicted
        rows.append([name, f"{days:.2f}", f"{predicted:.2f}", percent(predicted / days - 1), row.role])
    published = sum(days for _, days in FLM_DAYS.values())
    rows.append(["all stages", f"{published:.2f}", f"{seconds:.2f}", percent(seconds / published - 1), "indicative"])
    last = by_name["FLM 101B"]
    tokens = sum(tokens for tokens, _ in FLM_DAYS.values())
    scratch = tokens / last.work.step_tokens * predicted_seconds(last) / 86400
    error = percent(scratch / FLM_DAYS_FROM_SCRATCH - 1)
    rows.append(["101B from scratch", f"{FLM_DAYS_FROM_SCRATCH}", f"{scratch:.2f}", error, "checks"])
    return table(["FLM-101B on 192 A800", "published, days", "predicted, days", "error", "role"], rows)


def scaling_table() -> str:
    """Throughput of steps relative to others."""
    rows = []
    for each in relations():
        values = [f"{each.published:.3f}", f"{each.predicted:.3f}", percent(each.predicted / each.published - 1)]
        rows.append([each.name, *values, each.row.source, each.assumed])
    return table(["throughput per GPU", "published", "predicted", "error", "source", "assumed"], rows)


def memory_table() -> str:
    """Memory rows."""
    rows = [
        [row.name, f"{row.published:g} {row.unit}", f"{row.predicted:.2f} {row.unit}", percent(memory_error(row))]
        for row in memory_rows()
    ]
    return table(["arXiv 2205.05198", "published", "predicted", "error"], rows)


def main() -> None:
    """Print all tables and the medians."""
    for role, title in TITLES.items():
        print(f"## {title}\n\n{time_table(role)}\n")
        errors = [abs(time_error(row)) for row in rows_of(role)]
        print(f"Median of the absolute errors: {100 * median(errors):.1f} %, largest {100 * max(errors):.1f} %.\n")
    print(f"## Throughput relative to another step\n\n{scaling_table()}\n")
    print(f"## Days of a staged run\n\n{days_table()}\n")
    print(f"## Memory\n\n{memory_table()}\n")
    errors = [abs(memory_error(row)) for row in memory_rows()]
    print(f"Median of the absolute errors: {100 * median(errors):.1f} %, largest {100 * max(errors):.1f} %.")


if __name__ == "__main__":
    main()
