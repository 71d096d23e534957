"""Published iteration times, each with the shape, layout and software it was measured with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.planner.row import (
    FLM,
    GPT3,
    MEGATRON_2021,
    MEGATRON_2022,
    MEGATRON_DEEPSPEED,
    NEMO,
    Role,
    Row,
    gpt,
    tele_flm,
    workload,
)
from flm_megatron.planner.layout import Recompute, Workload

GPT = {
    "22B": (gpt(48, 6144, 64, 51200), (8, 1, 1, 1), 4, 4),
    "175B": (gpt(96, 12288, 96, 51200), (8, 8, 3, 1), 64, 1),
    "530B": (gpt(105, 20480, 128, 51200), (8, 35, 3, 1), 280, 1),
    "1T": (gpt(128, 25600, 160, 51200), (8, 64, 1, 1), 512, 1),
}
RECOMPUTED_SECONDS = {"22B": (1.42, 1.10), "175B": (18.13, 13.75), "530B": (49.05, 37.83), "1T": (94.42, 71.49)}


def gpt_2022(size: str, full: bool) -> Workload:
    """A row of arXiv 2205.05198: full recomputation, or sequence parallelism with the core attention recomputed."""
    model, layout, batch, micro = GPT[size]
    recompute: Recompute = "full" if full else "attention"
    return workload(model, layout, batch, micro, 2048, MEGATRON_2022, recompute, sequence_parallel=not full)


def _recomputation_rows() -> list[Row]:
    rows = []
    for size, seconds in RECOMPUTED_SECONDS.items():
        for index, name in enumerate(("full recomputation", "sequence parallel + selective")):
            role: Role = "checks" if size == "1T" else "sets"
            work = gpt_2022(size, full=index == 0)
            rows.append(Row(f"{size}, {name}", "a100", work, role, "arXiv 2205.05198", seconds[index]))
    return rows


def _mt_nlg_rows() -> list[Row]:
    model = gpt(105, 20480, 128, 50257)
    rows = []
    for nodes, seconds in ((280, 60.1), (350, 50.2), (420, 44.4)):
        layout = (8, 35, 1, nodes * 8 // 280)
        work = workload(model, layout, 1920, 1, 2048, MEGATRON_DEEPSPEED, "full", sequence_parallel=False)
        name, source = f"MT-NLG 530B, {nodes * 8} GPUs", "arXiv 2201.11990, section 2.4"
        rows.append(Row(name, "a100", work, "checks", source, seconds, assumed="micro-batch 1"))
    return rows


# (tensor, pipeline, chunks, data); layers, batch, micro-batch; seconds.
BIGSCIENCE_STEPS: list[tuple[tuple[int, int, int, int], int, int, int, float]] = [
    ((8, 1, 1, 1), 6, 512, 2, 119.19),
    ((8, 1, 1, 1), 10, 512, 1, 205.52),
    ((8, 12, 1, 4), 72, 2048, 4, 117.07),
    ((4, 12, 1, 8), 72, 2048, 2, 110.48),
    ((2, 24, 1, 8), 72, 2048, 1, 119.53),
]


def _bigscience_rows() -> list[Row]:
    """Steps under DeepSpeed of February 2022 on Jean Zay, whose nodes of eight A100 share four ports of 100 Gb/s.
    Hidden size 14,336, 64 heads, a vocabulary of 250,880; each is the second step of a trial."""
    source, rows = "bigscience-workshop/bigscience, train/tr11-176B-ml/chronicles-prequel.md", []
    for layout, layers, batch, micro, seconds in BIGSCIENCE_STEPS:
        work = workload(
            gpt(layers, 14336, 64, 250880),
            layout,
            batch,
            micro,
            2048,
            MEGATRON_DEEPSPEED,
            "full",
            sequence_parallel=False,
            precision="fp16",
        )
        name = f"DeepSpeed {layers} layers, tensor {layout[0]} x pipeline {layout[1]} x data {layout[3]}"
        row = Row(name, "a100", work, "indicative", source, seconds, assumed="a single step")
        rows.append(replace(row, network_gb_per_s=6.25))
    return rows


def _flm_rows() -> list[Row]:
    """The paper's utilisation is headed HFU: something was recomputed and is counted. Megatron-LM of that spring, which
    its program was adapted from, recomputes the core attention beside sequence parallelism."""
    source, recomputed = "arXiv 2309.03852", "micro-batch 1, stored scores, core attention recomputed and counted (HFU)"
    shapes = {
        # Unpublished shapes are those of this project's presets.
        "FLM 16B": (gpt(40, 5632, 44, 100256), (2, 1, 1, 96), 2304, 162.0, f"shape, {recomputed}"),
        "FLM 51B": (gpt(80, 7168, 56, 100256), (4, 2, 1, 24), 2304, 160.0, f"shape, {recomputed}"),
        "FLM 101B": (gpt(80, 10240, 80, 100256), (4, 4, 1, 12), 2160, 165.0, recomputed),
    }
    rows = []
    for name, (model, layout, batch, tflops, assumed) in shapes.items():
        role: Role = "checks" if name == "FLM 101B" else "indicative"
        software = replace(FLM, flash_attention=False)
        work = workload(replace(model, position="xpos"), layout, batch, 1, 2048, software, "attention")
        rows.append(Row(name, "a800", work, role, source, None, tflops, assumed, counts_recomputed=True))
    flash = replace(rows[-1].work, implementation=FLM, recompute="none")
    assumed = "micro-batch 1, flash attention, no recomputation"
    rows.append(replace(rows[-1], name="FLM 101B, flash attention", work=flash, role="indicative", assumed=assumed))
    return rows


def _tele_flm_rows() -> list[Row]:
    report = "arXiv 2404.16645 (layout); TFLOP/s at second hand"
    second_hand = "layout and TFLOP/s at second hand"
    whole = "micro-batch 1, no recomputation"
    big = tele_flm(140, 20480, 98304)
    one_t = workload(big, (32, 28, 1, 1), 1792, 1, 4096, FLM)
    recomputed = replace(one_t, recompute="full")
    return [
        Row(
            "Tele-FLM 52B",
            "a800",
            workload(tele_flm(64, 8192, 21824), (4, 2, 1, 112), 1344, 1, 4096, FLM),
            "checks",
            report,
            None,
            177.0,
            whole,
        ),
        Row(
            "Tele-FLM 102B",
            "a800",
            workload(tele_flm(80, 10240, 27264), (4, 4, 1, 56), 1344, 1, 4096, FLM),
            "indicative",
            second_hand,
            None,
            178.0,
            f"shape, {whole}",
        ),
        Row("Tele-FLM 1T", "a800", one_t, "indicative", second_hand, None, 130.0, whole),
        Row(
            "Tele-FLM 1T, recomputed",
            "a800",
            recomputed,
            "indicative",
            second_hand,
            None,
            130.0,
            "micro-batch 1, full recomputation",
        ),
    ]


def _nemo_rows() -> list[Row]:
    source = "NVIDIA/dgxc-benchmarking README, BF16"
    squared_relu: dict[str, Any] = {"position": "rope", "bias": False, "num_query_groups": 8}
    small = replace(gpt(32, 6144, 48, 256000), **squared_relu)
    large = replace(gpt(96, 18432, 96, 256000), head_dim=192, **squared_relu)
    rows = []
    for gpus, seconds in ((16, 2.83), (256, 2.88), (2048, 2.96)):
        work = workload(small, (4, 1, 1, gpus // 4), 4 * gpus, 4, 4096, NEMO, overlap=True)
        rows.append(_nemo(f"Nemotron-4 15B, {gpus} GPUs", work, seconds, source, gpus != 256))
    for gpus, seconds in ((128, 8.309), (512, 8.42), (2048, 8.49)):
        work = workload(gpt(96, 12288, 96, 51200), (4, 8, 12, gpus // 32), 2 * gpus, 1, 2048, GPT3, overlap=True)
        rows.append(_nemo(f"GPT-3 175B, {gpus} GPUs", work, seconds, source, gpus != 512))
    for gpus, seconds in ((128, 4.61), (512, 4.70), (2048, 4.84)):
        work = workload(large, (8, 8, 12, gpus // 64), gpus // 4, 1, 4096, NEMO, overlap=True)
        rows.append(_nemo(f"Nemotron-4 340B, {gpus} GPUs", work, seconds, source, False))
    return rows


def _nemo(name: str, work: Workload, seconds: float, source: str, sets: bool) -> Row:
    return Row(name, "h100", work, "sets" if sets else "checks", source, seconds, assumed="no recomputation")


def _readme_rows() -> list[Row]:
    model = gpt(96, 12288, 96, 131072)
    work = [
        workload(model, (8, 6, virtual, data), 1152, 1, 4096, replace(NEMO, rotary=False), overlap=True)
        for virtual, data in ((16, 2), (16, 96))
    ]
    assumed = "layout 8/6, 16 chunks, micro-batch 1"
    source = "Megatron-LM README, strong scaling"
    return [
        Row(f"GPT-3 177B, {w.world_size} GPUs", "h100", w, "indicative", source, None, tflops, assumed)
        for w, tflops in zip(work, (0.47 * 989.4, 0.42 * 989.4), strict=True)
    ]


# Layers, hidden size, heads; (tensor, pipeline, chunks, data); batch, micro-batch; TFLOP/s per GPU.
MEGATRON_2021_STEPS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int, int], int, int, float]] = {
    "1.7B": ((24, 2304, 24), (1, 1, 1, 32), 512, 16, 137),
    "3.6B": ((30, 3072, 32), (2, 1, 1, 32), 512, 16, 138),
    "7.5B": ((36, 4096, 32), (4, 1, 1, 32), 512, 16, 142),
    "18.4B": ((40, 6144, 48), (8, 1, 1, 32), 1024, 8, 135),
    "39.1B": ((48, 8192, 64), (8, 2, 1, 32), 1536, 4, 138),
    "76.1B": ((60, 10240, 80), (8, 4, 3, 32), 1792, 2, 140),
    "145.6B": ((80, 12288, 96), (8, 8, 2, 24), 2304, 2, 148),
    "310.1B": ((96, 16384, 128), (8, 16, 2, 15), 2160, 1, 155),
    "529.6B": ((105, 20480, 128), (8, 35, 3, 9), 2520, 1, 163),
    "1008B": ((128, 25600, 160), (8, 64, 1, 6), 3072, 1, 163),
}


def _megatron_2021_rows() -> list[Row]:
    """Table 1 of arXiv 2104.04473, whose TFLOP/s count what is recomputed. Micro-batch, chunks and data parallelism
    (PyTorch's where there is no pipeline, which overlaps the reduction) are those of its scripts, examples/sc21 of
    NVIDIA/Megatron-LM."""
    rows = []
    for size, ((layers, hidden, heads), layout, batch, micro, tflops) in MEGATRON_2021_STEPS.items():
        work = workload(
            gpt(layers, hidden, heads, 51200),
            layout,
            batch,
            micro,
            2048,
            MEGATRON_2021,
            "full",
            sequence_parallel=False,
            overlap=layout[1] == 1,
            precision="fp16",
            distributed_optimizer=False,
        )
        source = "arXiv 2104.04473, table 1; its scripts"
        row = Row(f"Megatron-LM {size}, {work.world_size} GPUs", "a100", work, "checks", source, None, tflops)
        rows.append(replace(row, counts_recomputed=True))
    return rows


def time_rows() -> list[Row]:
    """All rows of iteration times."""
    return [
        *_recomputation_rows(),
        *_megatron_2021_rows(),
        *_mt_nlg_rows(),
        *_bigscience_rows(),
        *_flm_rows(),
        *_tele_flm_rows(),
        *_nemo_rows(),
        *_readme_rows(),
    ]
