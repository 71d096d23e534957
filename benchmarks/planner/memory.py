"""Published memory beside the planner's, which has no constant to set."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.planner.row import MEGATRON_2022, workload
from benchmarks.planner.rows import GPT
from flm_megatron.planner.cost.activations import layer_activations
from flm_megatron.planner.cost.memory import GIB, rank_memory
from flm_megatron.planner.layout import Recompute


@dataclass(frozen=True)
class MemoryRow:
    """A published amount of memory: GiB, or per cent of the tensor-parallel baseline's activations."""

    name: str
    published: float
    predicted: float
    unit: str


# Per cent of the baseline: sequence parallelism, core attention recomputed, both, all recomputed.
PERCENT = {
    "22B": (66.84, 49.42, 16.18, 7.64),
    "175B": (62.04, 56.53, 18.49, 8.71),
    "530B": (58.31, 62.04, 20.27, 9.42),
    "1T": (58.31, 62.04, 20.27, 9.42),
}
# GiB per GPU, read off a figure: weights and optimizer, activations with neither and with both.
FIGURE = {
    "22B": (45.6, 59.3, 9.6),
    "175B": (45.6, 66.8, 12.4),
    "530B": (31.6, 114.0, 23.1),
    "1T": (33.0, 131.3, 26.6),
}
MODES: tuple[tuple[str, Recompute, bool], ...] = (
    ("sequence parallel", "none", True),
    ("selective", "attention", False),
    ("both", "attention", True),
    ("full recomputation", "full", False),
)


def memory_rows() -> list[MemoryRow]:
    """Memory of arXiv 2205.05198, all of which only checks: the memory model has no constant to set."""
    rows = []
    for size, (model, layout, batch, micro) in GPT.items():
        works = {
            name: workload(model, layout, batch, micro, 2048, MEGATRON_2022, recompute, sequence_parallel)
            for name, recompute, sequence_parallel in (("neither", "none", False), *MODES)
        }
        baseline = layer_activations(works["neither"]).kept
        for (name, *_), published in zip(MODES, PERCENT[size], strict=True):
            predicted = 100 * layer_activations(works[name]).kept / baseline
            rows.append(MemoryRow(f"{size}, {name}", published, predicted, "%"))
        memory = {name: rank_memory(works[name], 0) for name in ("neither", "both")}
        static = memory["both"].weights + memory["both"].gradients + memory["both"].optimizer
        values = (static, memory["neither"].activations, memory["both"].activations)
        names = ("weights and optimizer", "activations, neither", "activations, both")
        for name, published, value in zip(names, FIGURE[size], values, strict=True):
            rows.append(MemoryRow(f"{size}, {name}", published, value / GIB, "GiB"))
    return rows
