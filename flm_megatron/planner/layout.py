"""What is planned: one stage's model under one layout, and how the software that runs it works."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from flm_megatron.config.rules.pipeline import pipeline_split
from flm_megatron.config.schema import KernelsConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.device.chunks import CHUNK_VALUES, LARGE_LOGITS_BYTES, SMALLEST_HEAD_CHUNK
from flm_megatron.model.parameters import (
    ATTENTION_NORM,
    FC1,
    FC2,
    KEY_NORM,
    MLP_NORM,
    PROJECTION,
    QKV,
    QUERY_NORM,
    ParameterSpec,
    Unit,
    parameter_specs,
)
from flm_megatron.model.parameters.axis import padded_vocab_size
from flm_megatron.model.parameters.spec import Place

Recompute = Literal["none", "selective", "attention", "full"]
Scaling = Literal["none", "tensorwise", "rowwise"]
Precision = Literal["fp32", "bf16", "fp16"]
"""fp16 is planned, not trained: no run file has it."""
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
MODULES = (ATTENTION_NORM, PROJECTION, QKV, QUERY_NORM, KEY_NORM, MLP_NORM, FC1, FC2)
"""Modules of a layer in the order of its module tree."""


@dataclass(frozen=True)
class Implementation:
    """What kernels store and move. The defaults are this program's on CUDA."""

    flash_attention: bool = True
    """Attention that never stores the matrix of scores."""
    fused_activation: bool = True
    """SwiGLU, or bias and GELU, in one kernel."""
    fused_norm: bool = True
    """A norm stores only its input, not the normalised values too."""
    fused_loss: bool = True
    """The loss stores the logits unchanged and writes their gradient over them, in two kernels; else it stores their
    softmax in fp32."""
    loss_values: int = 0
    """Logits that the loss holds in fp32 at a time (plain PyTorch)."""
    fused_head_from_mib: int = LARGE_LOGITS_BYTES >> 20
    """From this many MiB of logits per micro-batch on, head and loss are one operation, which holds the logits of one
    chunk of tokens at a time and computes gradients in the forward pass."""
    head_chunk: int = SMALLEST_HEAD_CHUNK["cuda"]
    """Smallest number of tokens in such a chunk."""
    fused_residual: bool = True
    """The sum after attention is fused into the norm that follows it."""
    fused_weight_gradient: bool = True
    """Weight gradients are added to the fp32 buffer by the multiplication itself."""
    gradient_placeholder: bool = True
    """An unwritten tensor is made in their place (megatron-core without Transformer Engine)."""
    rotary: bool = True
    """Queries and keys are rotated (false: learned positions)."""
    fused_rotary: bool = True
    """They are rotated in place by one kernel."""
    dropout: bool = False
    """Dropout after attention, its output and the feed-forward layer."""
    frees_pipeline_outputs: bool = True
    """Outputs are freed once they were sent to the next pipeline rank."""
    scatters_transfers: bool = False
    """Tensor ranks share a transfer between pipeline ranks even without sequence parallelism, and gather it after it
    (Megatron-LM until 2022)."""
    overlaps_transfers: bool = True
    """Transfers of the interleaved schedule run beside its steady passes (Megatron-LM from June 2023 on)."""
    overlaps_input_gradient: bool = True
    """The tensor group's exchange of a matrix's input gradient runs beside its weight gradient (Megatron-LM from
    October 2021 on)."""
    gradient_bytes: int = 4
    """Bytes of a gradient as it is added up and reduced over data ranks (2: Megatron-LM in fp16, NeMo's benchmarks in
    bf16); the memory model takes 4."""
    copies_gradients_to_reduce: bool = False
    """Reducing gradients needs a second buffer of their size (gloo)."""


NEVER = 2**30
CUDA = Implementation()
CPU = Implementation(
    head_chunk=SMALLEST_HEAD_CHUNK["cpu"],
    loss_values=CHUNK_VALUES["cpu"],
    frees_pipeline_outputs=False,
    copies_gradients_to_reduce=True,
)


def as_chosen(implementation: Implementation, kernels: KernelsConfig) -> Implementation:
    """`implementation` with what a run file chooses for head and loss."""
    first = {"auto": implementation.fused_head_from_mib, "fused": 0, "separate": NEVER}[kernels.head_and_loss]
    return replace(implementation, fused_head_from_mib=first)


@dataclass(frozen=True)
class Workload:
    """A model trained under a layout. Sizes per rank follow from it.

    `recompute` adds `attention` to the run file's modes: only the core attention (Megatron-LM's selective mode of arXiv
    2205.05198), which flash attention recomputes anyway. `fp8` runs the products of the layers' matrices in
    FP8, with scales of this kind.
    """

    model: ModelConfig
    sequence_length: int
    global_batch: int
    micro_batch: int
    parallel: ParallelConfig
    data: int
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    implementation: Implementation = CUDA
    fp8: Scaling = "none"

    @property
    def world_size(self) -> int:
        """Processes of the whole layout: tensor x pipeline x data."""
        return self.parallel.tensor * self.parallel.pipeline * self.data

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each data-parallel rank in a step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.micro_batch * self.sequence_length

    def forward_passes(self, feed_forward: bool) -> int:
        """How often a layer's matrix runs forward for every micro-batch: again where it is recomputed, as those of the
        feed-forward part are more often."""
        return 1 + (self.recompute == "full" or (self.recompute == "selective" and feed_forward))

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.global_batch * self.sequence_length

    @property
    def bytes(self) -> int:
        """Bytes of a weight or activation."""
        return BYTES[self.precision]

    @property
    def sequence_parallel(self) -> int:
        """Ranks over which norms and residuals are split."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @cached_property
    def padded_vocab(self) -> int:
        """Vocabulary with padding."""
        return padded_vocab_size(self.model.vocab_size or 0, self.parallel.tensor)

    @cached_property
    def chunk_layers(self) -> list[int]:
        """Layers of each model chunk, in the order of execution."""
        return pipeline_split(self.model.num_layers, self.parallel)

    def chunks(self, rank: int) -> list[int]:
        """Layers of each model chunk of pipeline rank `rank`."""
        return self.chunk_layers[rank :: self.parallel.pipeline]

    @cached_property
    def specs(self) -> list[ParameterSpec]:
        """The model's parameters."""
        return list(parameter_specs(self.model).values())

    @property
    def trains_weights(self) -> bool:
        """Whether the weights themselves are trained, not adapters beside them."""
        return self.model.lora is None

    @cached_property
    def vocab_shard(self) -> int:
        """Rows of the embedding, or of the head, on one tensor rank."""
        return self.padded_vocab // self.parallel.tensor

    @cached_property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, or of the head, on one tensor rank."""
        return self.vocab_shard * self.model.hidden_size

    def rank_parameters(self, rank: int, trained: bool = False) -> int:
        """Parameters on each tensor rank of pipeline rank `rank`; if `trained`, those that have gradients alone."""
        return self._on_rank(rank, [spec for spec in self.specs if spec.trained or not trained])

    def summed_parameters(self, rank: int) -> int:
        """Those that learn, that every tensor rank of pipeline rank `rank` has whole, and of whose gradient it has a
        part: that of its heads, and under sequence parallelism that of its part of the sequence. (Learned positions are
        added before the sequence is split.)"""
        whole = [spec for spec in self.specs if spec.trained and not spec.cut and spec.kind != "embedding"]
        return self._on_rank(rank, [s for s in whole if self.parallel.sequence or s.counts(Unit.HEAD_DIM)])

    def _on_rank(self, rank: int, specs: Sequence[ParameterSpec]) -> int:
        stacked = (spec for spec in specs if spec.place == "layers")
        count = sum(self.chunks(rank)) * (self._shard_numel(stacked) // max(1, self.model.num_layers))
        here = {"first"} if rank == 0 else set()
        here |= {"last"} if rank == self.parallel.pipeline - 1 else set()
        return count + self._shard_numel(spec for spec in specs if here & set(spec.places))

    @cached_property
    def trained_shards(self) -> dict[Place, list[int]]:
        """Values on one tensor rank of every parameter that learns, by where it is (those of one layer for `layers`),
        in the order in which the backward pass finishes them: that of the module tree backwards."""
        trained = [spec for spec in self.specs if spec.trained]
        trained.sort(key=lambda spec: MODULES.index(spec.module) if spec.place == "layers" else 0)
        found: dict[Place, list[int]] = {"first": [], "layers": [], "last": []}
        for spec in reversed(trained):
            layers = self.model.num_layers if spec.place == "layers" else 1
            found[spec.place].append(spec.shard_numel(self.parallel.tensor) // layers)
        if self.copied_embedding:
            found["last"].insert(0, self.embedding_parameters)
        return found

    @property
    def copied_embedding(self) -> bool:
        """Whether the last pipeline rank has a copy of the embedding, its head, whose gradient is part of the other's
        and whose bucket is its own under the distributed optimizer."""
        return self.model.tie_embeddings and self.trains_weights and self.parallel.pipeline > 1

    def layer_matrices(self, rank: int) -> int:
        """Values of the weights of the layers' linear maps on each tensor rank of pipeline rank `rank`."""
        matrices = [spec for spec in self.specs if spec.place == "layers" and spec.value == "weight"]
        matrices = [spec for spec in matrices if len(spec.axes) > 2]
        return sum(self.chunks(rank)) * (self._shard_numel(matrices) // max(1, self.model.num_layers))

    def _shard_numel(self, specs: Iterable[ParameterSpec]) -> int:
        """Values of parameters on one tensor rank."""
        return sum(spec.shard_numel(self.parallel.tensor) for spec in specs)


def stage_workload(
    stage: StageConfig, sequence_length: int, world_size: int, implementation: Implementation = CUDA
) -> Workload:
    """Workload of a stage on `world_size` processes, which fit its layout; the vocabulary size is known."""
    if not stage.model.rotates:
        implementation = replace(implementation, rotary=False)
    if stage.stability.z_loss or stage.distill:  # they need the logits
        implementation = replace(implementation, fused_head_from_mib=NEVER)
    return Workload(
        model=stage.model,
        sequence_length=sequence_length,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        parallel=stage.parallel,
        data=world_size // stage.parallel.model_size,
        precision=stage.precision,
        recompute=stage.recompute,
        implementation=implementation,
        fp8=stage.fp8,
    )
