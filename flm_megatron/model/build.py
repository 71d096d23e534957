"""The model of a stage on this process."""

from __future__ import annotations

from dataclasses import replace

import torch

from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.engine import parallel_state
from flm_megatron.engine.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    mark_split,
    model_parallel_cuda_manual_seed,
)
from flm_megatron.errors import RequestError
from flm_megatron.model.engine_config import transformer_config
from flm_megatron.model.gradient_accumulation import install_weight_gradient
from flm_megatron.model.lora import train_adapters_only
from flm_megatron.model.parameters.axis import padded_vocab_size
from flm_megatron.model.teleflm import TeleFLM


def build_model(model: ModelConfig, stage: StageConfig) -> list[TeleFLM]:
    """Model chunks of this pipeline rank in the order of execution: one for each virtual pipeline stage.

    megatron-core's `parallel_state` must be initialised with the sizes of `stage.parallel`. `model` is the stage's own,
    with its vocabulary size. All parameters but norm weights are zero: load a checkpoint into them.

    Raises:
        RequestError: the vocabulary size is not known, or the layers do not split over the pipeline as asked.
    """
    if not model.vocab_size:
        raise RequestError("model.vocab_size is not set: give it, or give a tokenizer to take it from")
    config = transformer_config(replace(stage, model=model))
    if config.gradient_accumulation_fusion:
        install_weight_gradient()
    # No weight and no dropout is drawn, but the engine wants its generator states to exist.
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    virtual = config.virtual_pipeline_model_parallel_size
    vocab = padded_vocab_size(model.vocab_size, stage.parallel.tensor)
    chunks = [
        TeleFLM(
            model,
            config,
            vocab,
            pre_process=parallel_state.is_pipeline_first_stage(vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(vp_stage),
            vp_stage=vp_stage,
        )
        for vp_stage in (range(virtual) if virtual else [None])
    ]
    for chunk in chunks:
        _prepare_parameters(chunk)
        if model.lora is not None:
            train_adapters_only(chunk, chunk.specs)
    return chunks


@torch.no_grad()
def _prepare_parameters(chunk: TeleFLM) -> None:
    """Zero what the engine left uninitialised, and mark parameters that are split over tensor-parallel ranks.

    The engine sets the marks only together with initial weights; without them the gradient norm would count split
    matrices on one rank only. Rows of padding ids must be finite: their logits are discarded, but 0 times their weight
    still enters the gradient of the hidden state.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            axis = 1 if isinstance(module, RowParallelLinear) else 0
            if module.weight is not None:  # a tied head has none of its own on a rank that has the embedding
                mark_split(module.weight, axis)
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, torch.nn.Embedding)):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
