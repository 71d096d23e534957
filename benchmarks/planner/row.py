"""One published step: its shape, layout and software, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from flm_megatron.config.schema import ModelConfig, ParallelConfig
from flm_megatron.planner.layout import NEVER, Implementation, Precision, Recompute, Workload
from flm_megatron.planner.machine import Machine, find_machine
from flm_megatron.training.metrics.flops import training_flops_per_token

Role = Literal["sets", "checks", "indicative"]


@dataclass(frozen=True)
class Row:
    """One published step. `seconds` is given or follows from `tflops`, which its owners count with the whole square
    of attention, and with what is recomputed if `counts_recomputed`. `assumed` names what the source does not say,
    `network_gb_per_s` the network per accelerator and direction, where it is not its usual one."""

    name: str
    gpu: str
    work: Workload
    role: Role
    source: str
    seconds: float | None = None
    tflops: float | None = None
    assumed: str = ""
    counts_recomputed: bool = False
    network_gb_per_s: float | None = None

    @property
    def machine(self) -> Machine:
        """What it ran on."""
        machine = find_machine(self.gpu)
        return replace(machine, inter_gb_per_s=self.network_gb_per_s or machine.inter_gb_per_s)


OTHERS = Implementation(fused_loss=False, fused_head_from_mib=NEVER, fused_residual=False, gradient_placeholder=False)
# Of arXiv 2205.05198: no transfer between pipeline ranks runs beside a pass (the option came in May 2023).
MEGATRON_2022 = replace(
    OTHERS,
    flash_attention=False,
    rotary=False,
    dropout=True,
    scatters_transfers=True,
    overlaps_transfers=False,
)
# Of arXiv 2104.04473, as it was in August 2021: fp16 gradients in a kernel of their own (fused from February 2022 on),
# and an all-reduce of the input's gradient that nothing hides (asynchronous from October 2021 on).
MEGATRON_2021 = replace(MEGATRON_2022, fused_weight_gradient=False, overlaps_input_gradient=False, gradient_bytes=2)
# Its layers under DeepSpeed's pipeline of October 2021, which shares out transfers and waits for them as well.
MEGATRON_DEEPSPEED = MEGATRON_2021
# Of arXiv 1909.08053: no pipeline, no fused kernels but LayerNorm, gradients in fp16.
MEGATRON_2019 = replace(MEGATRON_2021, fused_activation=False)
# NVIDIA's benchmarks reduce gradients in bf16 (NeMo, scripts/performance: grad_reduce_in_fp32 = False).
NEMO = replace(OTHERS, gradient_bytes=2)
GPT3 = replace(NEMO, rotary=False)
FLM = replace(OTHERS, fused_rotary=False)
TIED = (MEGATRON_2022, MEGATRON_2021, MEGATRON_2019, GPT3)
"""Those whose head is the embedding."""


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
    precision: Precision = "bf16",
    distributed_optimizer: bool = True,
) -> Workload:
    """`layout` is (tensor, pipeline, chunks per rank, data)."""
    tensor, pipeline, virtual, data = layout
    model = replace(model, tie_embeddings=implementation in TIED)
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        data=data,
        sequence=sequence_parallel and tensor > 1,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        distributed_optimizer=distributed_optimizer,
    )
    return Workload(model, sequence, batch, micro, parallel, data, precision, recompute, implementation)


def published_seconds(row: Row) -> float:
    """Seconds per step: as published, or from the published TFLOP/s.

    FLOPs as Megatron-LM counted them until 2025: 6 per weight of every matrix and of the head, and 12 x sequence x
    hidden per layer for the whole square of attention; recomputed are a third of what a layer takes (`full`), or of its
    attention.
    """
    if row.seconds is not None:
        return row.seconds
    assert row.tflops is not None
    return flops_per_token(row) * row.work.step_tokens / (row.tflops * 1e12 * row.work.world_size)


def flops_per_token(row: Row) -> float:
    """FLOPs of a token by the owners' count."""
    model, work = row.work.model, row.work
    attention = 12.0 * work.sequence_length * model.num_attention_heads * model.kv_channels * model.num_layers
    whole = training_flops_per_token(model, work.sequence_length) + attention / 2
    if not row.counts_recomputed or work.recompute == "none":
        return whole
    head = 6.0 * model.hidden_size * (model.vocab_size or 0)
    return whole + (whole - head if work.recompute == "full" else attention) / 3
