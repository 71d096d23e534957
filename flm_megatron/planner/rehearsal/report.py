"""A rehearsal as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from flm_megatron.planner.cost.memory import GIB
from flm_megatron.planner.rehearsal.ledger import USES
from flm_megatron.planner.rehearsal.life.report import life_data, life_text
from flm_megatron.planner.rehearsal.rank import RankReport
from flm_megatron.planner.rehearsal.roles import Role
from flm_megatron.planner.rehearsal.stage import StageRehearsal
from flm_megatron.planner.rehearsal.timing.stage_timing import timing_data, timing_text
from flm_megatron.planner.report.text import table
from flm_megatron.planner.report.traffic import traffic_data, traffic_table


def rehearsal_text(found: StageRehearsal) -> str:
    """Memory, transfers, arithmetic and storage of every rank that was rehearsed."""
    pairs = list(zip(found.roles, found.reports, strict=True))
    texts = [
        f"stage {found.stage} on {found.world:,} processes: {len(pairs)} rank(s) through one step",
        f"GiB at the peak of building and of the step\n{_memory(pairs)}",
        *(f"a step of rank {report.rank} ({role.name})\n{_step(report)}" for role, report in pairs),
        *(f"rank {report.rank} ({role.name}) beside its steps\n{life_text(report.life)}" for role, report in pairs),
    ]
    if found.timing is not None:
        texts.append(timing_text(found.timing, found.roles))
    if found.met:
        texts.append(f"ranks {', '.join(map(str, found.met))} meet in every collective and transfer")
    return "\n\n".join(texts)


def rehearsal_data(found: StageRehearsal) -> dict[str, object]:
    """The same as plain data: bytes, operations, counts."""
    return {
        "stage": found.stage,
        "world": found.world,
        "compared_ranks": list(found.met),
        "timing": None if found.timing is None else timing_data(found.timing),
        "ranks": [
            {
                "rank": report.rank,
                "role": role.name,
                "stands_for_pipeline_ranks": list(role.pipeline_ranks),
                "layers": list(report.layers),
                "parameters": report.parameters,
                "micro_batches": report.micro_batches,
                "micro_batches_run": report.ran,
                "building_peak": asdict(report.building),
                "steady_bytes": report.steady,
                "peak": asdict(report.peak),
                "flops": report.flops,
                "transfers": traffic_data(report.traffic()),
                **life_data(report.life),
            }
            for role, report in zip(found.roles, found.reports, strict=True)
        ],
    }


def _memory(pairs: Sequence[tuple[Role, RankReport]]) -> str:
    rows = [["rank", "role", "pipeline ranks", "layers", "building", *USES, "peak", "when"]]
    for role, report in pairs:
        held = [f"{report.peak.by_use.get(use, 0) / GIB:.2f}" for use in USES]
        layers = "+".join(map(str, report.layers))
        peak = f"{report.peak.nbytes / GIB:.2f}"
        first = [str(report.rank), role.name, _span(role.pipeline_ranks), layers]
        rows.append([*first, f"{report.building.nbytes / GIB:.2f}", *held, peak, report.peak.moment])
    return table(rows)


def _step(report: RankReport) -> str:
    arithmetic = ", ".join(f"{count / 1e12:,.1f} TFLOP of {_named(name)}" for name, count in report.flops.items())
    work = f"{report.micro_batches:,} micro-batches ({report.ran} run): {arithmetic}"
    return f"{traffic_table(report.traffic())}\n{work}"


def _named(operation: str) -> str:
    return "attention over all keys, half of which causality leaves" if operation == "attention" else operation


def _span(ranks: Sequence[int]) -> str:
    """`1-26`, or the ranks one by one where they are not in a row."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))
