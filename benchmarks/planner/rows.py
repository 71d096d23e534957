"""Published iteration times and memory, each with the shape, layout and software it was measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.planner.cost.activations import layer_activations
from flm_megatron.planner.cost.memory import GIB, rank_memory
from flm_megatron.planner.layout import NEVER, Implementation, Recompute, Workload
from flm_megatron.training.metrics.flops import training_flops_per_token

Role = Literal["sets", "checks", "indicative"]


@dataclass(frozen=True)
class Row:
    """One published step. `seconds` is given or follows from `tflops`, which its owners count with the whole square
    of attention and without recomputation. `assumed` names what the source does not say."""

    name: str
    gpu: str
    work: Workload
    role: Role
    source: str
    seconds: float | None = None
    tflops: float | None = None
    assumed: str = ""


OTHERS = Implementation(fused_loss=False, fused_head_from_mib=NEVER, fused_residual=False, gradient_placeholder=False)
MEGATRON_2022 = replace(
    OTHERS,
    flash_attention=False,
    rotary=False,
    dropout=True,
    tied_embeddings=True,
    scatters_transfers=True,
)
MEGATRON_DEEPSPEED = replace(MEGATRON_2022, fused_weight_gradient=False, scatters_transfers=False)
GPT3 = replace(OTHERS, rotary=False, tied_embeddings=True)
FLM = replace(OTHERS, fused_rotary=False)


def gpt(layers: int, hidden: int, heads: int, vocab: int) -> ModelConfig:
    """A GPT-3-style block: LayerNorm, GELU, biases, feed-forward size 4 x hidden."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        vocab_size=vocab,
        normalization="layernorm",
        activation="gelu",
        bias=True,
    )


def tele_flm(layers: int, hidden: int, ffn: int) -> ModelConfig:
    """Tele-FLM's block at head dim 128."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 128,
        vocab_size=80000,
    )


def workload(
    model: ModelConfig,
    layout: tuple[int, int, int, int],
    batch: int,
    micro: int,
    sequence: int,
    implementation: Implementation,
    recompute: Recompute = "none",
    sequence_parallel: bool = True,
    overlap: bool = False,
) -> Workload:
    """`layout` is (tensor, pipeline, chunks per rank, data)."""
    tensor, pipeline, virtual, data = layout
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        data=data,
        sequence=sequence_parallel and tensor > 1,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    return Workload(model, sequence, batch, micro, parallel, data, "bf16", recompute, implementation)


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
            role: Role = "sets" if size in ("22B", "175B") else "checks"
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


def _flm_rows() -> list[Row]:
    flm = "arXiv 2309.03852"
    shapes = {
        # Unpublished shapes are those of this project's presets.
        "FLM 16B": (gpt(40, 5632, 44, 100256), (2, 1, 1, 96), 2304, 162.0, "shape, micro-batch 1, no recomputation"),
        "FLM 51B": (gpt(80, 7168, 56, 100256), (4, 2, 1, 24), 2304, 160.0, "shape, micro-batch 1, no recomputation"),
        "FLM 101B": (gpt(80, 10240, 80, 100256), (4, 4, 1, 12), 2160, 165.0, "micro-batch 1, no recomputation"),
    }
    rows = []
    for name, (model, layout, batch, tflops, assumed) in shapes.items():
        role: Role = "checks" if name == "FLM 101B" else "indicative"
        model = replace(model, position="xpos")
        rows.append(Row(name, "a800", workload(model, layout, batch, 1, 2048, FLM), role, flm, None, tflops, assumed))
    last = rows[-1]
    stored = replace(last.work, implementation=replace(FLM, flash_attention=False), recompute="attention")
    assumed = "micro-batch 1, attention that stores its scores, recomputed"
    rows.append(replace(last, name="FLM 101B, scores stored", work=stored, role="indicative", assumed=assumed))
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
        work = workload(small, (4, 1, 1, gpus // 4), 4 * gpus, 4, 4096, OTHERS, overlap=True)
        rows.append(_nemo(f"Nemotron-4 15B, {gpus} GPUs", work, seconds, source, gpus == 16))
    for gpus, seconds in ((128, 8.309), (512, 8.42), (2048, 8.49)):
        work = workload(gpt(96, 12288, 96, 51200), (4, 8, 12, gpus // 32), 2 * gpus, 1, 2048, GPT3, overlap=True)
        rows.append(_nemo(f"GPT-3 175B, {gpus} GPUs", work, seconds, source, gpus == 128))
    for gpus, seconds in ((128, 4.61), (512, 4.70), (2048, 4.84)):
        work = workload(large, (8, 8, 12, gpus // 64), gpus // 4, 1, 4096, OTHERS, overlap=True)
        rows.append(_nemo(f"Nemotron-4 340B, {gpus} GPUs", work, seconds, source, False))
    return rows


def _nemo(name: str, work: Workload, seconds: float, source: str, sets: bool) -> Row:
    return Row(name, "h100", work, "sets" if sets else "checks", source, seconds, assumed="no recomputation")


def _readme_rows() -> list[Row]:
    model = gpt(96, 12288, 96, 131072)
    work = [
        workload(model, (8, 6, virtual, data), 1152, 1, 4096, replace(OTHERS, rotary=False), overlap=True)
        for virtual, data in ((16, 2), (16, 96))
    ]
    assumed = "layout 8/6, 16 chunks, micro-batch 1"
    source = "Megatron-LM README, strong scaling"
    return [
        Row(f"GPT-3 177B, {w.world_size} GPUs", "h100", w, "indicative", source, None, tflops, assumed)
        for w, tflops in zip(work, (0.47 * 989.4, 0.42 * 989.4), strict=True)
    ]


def time_rows() -> list[Row]:
    """All rows of iteration times."""
    return _recomputation_rows() + _mt_nlg_rows() + _flm_rows() + _tele_flm_rows() + _nemo_rows() + _readme_rows()


def published_seconds(row: Row) -> float:
    """Seconds per step: as published, or from the published TFLOP/s.

    FLOPs as Megatron-LM counted them until 2025: 6 per weight of every matrix and of the head, and 12 x sequence x
    hidden per layer for the whole square of attention.
    """
    if row.seconds is not None:
        return row.seconds
    model, work = row.work.model, row.work
    half = 6.0 * work.sequence_length * model.num_attention_heads * model.kv_channels * model.num_layers
    flops = (training_flops_per_token(model, work.sequence_length) + half) * work.step_tokens
    assert row.tflops is not None
    return flops / (row.tflops * 1e12 * work.world_size)


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
