"""Published throughput of one step relative to another on the same machine, whose efficiencies nobody calibrated.

Megatron-LM of 2019 on V100 (fp16, arXiv 1909.08053): its layouts are published. Frontier's MI250X (arXiv 2312.12705):
its layouts are not in a source to hand; the layout that `search` ranks first stands for each, as do this program's
layers, and batches are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.planner.row import MEGATRON_2019, Row, flops_per_token, gpt, workload
from flm_megatron.planner.cost.throughput import step_time
from flm_megatron.planner.layout import CUDA, Workload

FRONTIER = "arXiv 2312.12705"
FRONTIER_PEAK = 191.5
LAYOUT = "layout (the search's best), batch"
SAMPLES = 320
"""Of a replica in a step, assumed."""
MODELS = {
    "22B": (gpt(48, 6144, 48, 51200), (2, 4, 12, 1), 38.38),
    "175B": (gpt(96, 12288, 96, 51200), (4, 8, 12, 32), 36.14),
    "1T": (gpt(128, 25600, 160, 51200), (8, 32, 4, 12), 31.96),
}


@dataclass(frozen=True)
class Relation:
    """Throughput per accelerator of a step, `published` relative to that of another one."""

    name: str
    row: Row
    base: Row
    published: float
    assumed: str

    @property
    def predicted(self) -> float:
        """As planned."""
        return planned_tflops(self.row) / planned_tflops(self.base)


def planned_tflops(row: Row) -> float:
    """TFLOP/s per accelerator by the owners' count."""
    work = row.work
    seconds = step_time(work, row.machine).total
    return flops_per_token(row) * work.step_tokens / seconds / work.world_size / 1e12


def frontier_rows() -> list[Row]:
    """Frontier's three sizes on 8, 1,024 and 3,072 devices."""
    return [
        Row(
            f"Frontier {size}",
            "mi250x",
            _frontier(size, layout[3]),
            "indicative",
            FRONTIER,
            None,
            share / 100 * FRONTIER_PEAK,
            f"{LAYOUT}, GPUs of 22B, no recomputation",
        )
        for size, (_, layout, share) in MODELS.items()
    ]


def megatron_2019_rows() -> list[Row]:
    """A 1.2B model on one V100, and 8.3B on 8 and 512, with activations recomputed."""
    small, large = gpt(40, 1536, 16, 51200), gpt(72, 3072, 32, 51200)
    steps = {
        "1.2B, 1 GPU": (small, (1, 1, 1, 1), 39.0),
        "8.3B, 8 GPUs": (large, (8, 1, 1, 1), 0.77 * 39.0),
        "8.3B, 512 GPUs": (large, (8, 1, 1, 64), 15100 / 512),
    }
    rows = []
    for name, (model, layout, tflops) in steps.items():
        work = workload(
            model,
            layout,
            8 * layout[3],
            8,
            1024,
            MEGATRON_2019,
            "full",
            sequence_parallel=False,
            overlap=True,
            precision="fp16",
            distributed_optimizer=False,
        )
        assumed = "what its TFLOP/s count; the reduction overlapped, which its program could"
        rows.append(
            Row(f"Megatron-LM 2019 {name}", "v100", work, "indicative", "arXiv 1909.08053", None, tflops, assumed)
        )
    return [replace(row, counts_recomputed=True) for row in rows]


def relations() -> list[Relation]:
    """All of them."""
    one, eight, many = megatron_2019_rows()
    sizes = dict(zip(MODELS, frontier_rows(), strict=True))
    return [
        Relation("V100, weak, 8.3B on 8 to 1.2B on 1", eight, one, 0.77, "-"),
        Relation("V100, weak, 8.3B on 512 to 1.2B on 1", many, one, 0.76, "overlapped reduction"),
        Relation("MI250X, 175B to 22B", sizes["175B"], sizes["22B"], 36.14 / 38.38, LAYOUT),
        Relation("MI250X, 1T to 22B", sizes["1T"], sizes["22B"], 31.96 / 38.38, LAYOUT),
        Relation("MI250X, weak, 175B on 1,024", sizes["175B"], _at("175B", 1), 1.0, f"{LAYOUT}, from one replica"),
        Relation("MI250X, weak, 1T on 3,072", sizes["1T"], _at("1T", 1), 1.0, f"{LAYOUT}, from one replica"),
        Relation("MI250X, strong, 175B on 1,024", *_strong("175B", 8), 0.89, f"{LAYOUT}, from an eighth"),
        Relation("MI250X, strong, 1T on 3,072", *_strong("1T", 6), 0.87, f"{LAYOUT}, from a sixth"),
    ]


def _frontier(size: str, data: int, batch: int | None = None) -> Workload:
    model, (tensor, pipeline, chunks, _), _ = MODELS[size]
    return workload(model, (tensor, pipeline, chunks, data), batch or SAMPLES * data, 1, 2048, CUDA, precision="fp16")


def _at(size: str, data: int, batch: int | None = None) -> Row:
    row = dict(zip(MODELS, frontier_rows(), strict=True))[size]
    return replace(row, work=_frontier(size, data, batch))


def _strong(size: str, times: int) -> tuple[Row, Row]:
    """A batch on all devices, and on so many times fewer."""
    data, samples = MODELS[size][1][3], 7680
    return _at(size, data, samples), _at(size, data // times, samples)
