"""What is planned: one stage's model under one layout, and how the software that runs it works."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from flm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import FC2, PROJECTION, parameter_specs
from flm_megatron.model.split import padded_vocab_size, pipeline_split

Recompute = Literal["none", "selective", "attention", "full"]
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Implementation:
    """What kernels keep and move. The defaults are this project's engine on CUDA."""

    flash_attention: bool = True
    """Attention that never stores the matrix of scores."""
    fused_activation: bool = True
    """SwiGLU, or bias and GELU, in one kernel."""
    fused_norm: bool = True
    """A norm keeps its input only, not the normalised values besides."""
    fused_weight_gradient: bool = False
    """Weight gradients are added to the fp32 buffer by the multiplication itself (Apex's extension)."""
    rotary: bool = True
    """Queries and keys are rotated (false: learned positions)."""
    fused_rotary: bool = False
    """They are rotated in one kernel."""
    dropout: bool = False
    """Dropout after attention, its output and the feed-forward layer."""
    tied_embeddings: bool = False
    """The head is the embedding."""
    frees_pipeline_outputs: bool = True
    """What was sent to the next pipeline rank is freed."""
    scatters_transfers: bool = False
    """Tensor ranks share a transfer between pipeline ranks even without sequence parallelism (Megatron-LM until
    2022)."""
    copies_gradients_to_reduce: bool = False
    """Reducing gradients needs a second buffer of their size (gloo)."""


CUDA = Implementation()
CPU = Implementation(
    fused_activation=False, fused_norm=False, frees_pipeline_outputs=False, copies_gradients_to_reduce=True
)


@dataclass(frozen=True)
class Workload:
    """A model trained under a layout. Sizes per rank follow from it.

    `recompute` adds `attention` to the run file's modes: the core attention only (Megatron-LM's selective mode of
    arXiv 2205.05198), which flash attention does by itself.
    """

    model: ModelConfig
    sequence_length: int
    global_batch: int
    micro_batch: int
    parallel: ParallelConfig
    data: int
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Recompute = "none"
    implementation: Implementation = CUDA

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.parallel.tensor * self.parallel.pipeline * self.data

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each data-parallel rank in a step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.micro_batch * self.sequence_length

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
    def parts(self) -> list[int]:
        """Layers of each pipeline part, in the order of execution."""
        return pipeline_split(self.model.num_layers, self.parallel)

    def chunks(self, rank: int) -> list[int]:
        """Layers of each model chunk of pipeline rank `rank`."""
        return self.parts[rank :: self.parallel.pipeline]

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one layer on one tensor rank."""
        count = 0
        for spec in parameter_specs(self.model).values():
            if spec.stacked:
                whole = spec.kind == "norm" or "layer_norm" in spec.name or spec.name in WHOLE_BIASES
                count += spec.numel // self.model.num_layers // (1 if whole else self.parallel.tensor)
        return count

    @cached_property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, or of the head, on one tensor rank."""
        return self.padded_vocab * self.model.hidden_size // self.parallel.tensor

    @cached_property
    def final_norm_parameters(self) -> int:
        """Parameters of the final norm."""
        return self.model.hidden_size * (2 if self.model.normalization == "layernorm" else 1)

    def rank_parameters(self, rank: int) -> int:
        """Parameters on each tensor rank of pipeline rank `rank`."""
        count = sum(self.chunks(rank)) * self.layer_parameters
        last = rank == self.parallel.pipeline - 1
        if rank == 0:
            count += self.embedding_parameters
        if last:
            tied = self.implementation.tied_embeddings and rank == 0
            count += self.final_norm_parameters + (0 if tied else self.embedding_parameters)
        return count


# Added after the reduction over tensor ranks, so every rank has all of them.
WHOLE_BIASES = (f"{PROJECTION}.bias", f"{FC2}.bias")


def stage_workload(run: RunConfig, stage: StageConfig, world_size: int | None = None) -> Workload:
    """Workload of a stage on `world_size` processes (none: those its layout names).

    Raises:
        RequestError: the processes do not fit the layout.
    """
    parallel = stage.parallel
    world = world_size or parallel.model_size * (parallel.data or 1)
    problem = layout_problem(
        stage.model, run.data.sequence_length, parallel, world, stage.global_batch, stage.micro_batch
    )
    if problem:
        raise RequestError(f"stage {stage.name!r}: {problem}")
    return Workload(
        model=stage.model,
        sequence_length=run.data.sequence_length,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        parallel=parallel,
        data=world // parallel.model_size,
        precision=stage.precision,
        recompute=stage.recompute,
    )


def layout_problem(
    model: ModelConfig, sequence: int, parallel: ParallelConfig, world: int, global_batch: int, micro_batch: int
) -> str | None:
    """Why a layout cannot run at all, memory aside; none if it can."""
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    if world % parallel.model_size:
        return f"{world} GPUs are no multiple of tensor {tensor} x pipeline {pipeline}"
    data = world // parallel.model_size
    for name, size in (("heads", model.num_attention_heads), ("query groups", model.query_groups)):
        if size % tensor:
            return f"{size} {name} do not split over tensor {tensor}"
    if model.ffn_hidden_size % tensor:
        return f"the feed-forward size {model.ffn_hidden_size} does not split over tensor {tensor}"
    if parallel.sequence and sequence % tensor:
        return f"the sequence length {sequence} does not split over tensor {tensor}"
    if model.num_layers < pipeline * virtual:
        return f"{model.num_layers} layers are fewer than pipeline {pipeline} x virtual_pipeline {virtual} parts"
    if virtual > 1 and pipeline == 1:
        return "virtual_pipeline needs a pipeline of at least 2"
    if global_batch % (micro_batch * data):
        return f"the global batch of {global_batch} is no multiple of micro_batch {micro_batch} x data {data}"
    if virtual > 1 and (global_batch // (micro_batch * data)) % pipeline:
        return f"{global_batch // (micro_batch * data)} micro-batches are no multiple of pipeline {pipeline}"
    return None
