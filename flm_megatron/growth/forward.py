"""Running a view's model over some text under a layout, for certificates and layer distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from flm_megatron.checkpoint.engine import load_state
from flm_megatron.checkpoint.layout import check_layout
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.pipeline import divisors
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.errors import RequestError

Layout = Callable[[ParallelConfig], AbstractContextManager[None]]
"""Makes megatron-core's groups for a layout over all processes of the world, and takes them down again."""


def fitting_layout(model: ModelConfig, parallel: ParallelConfig, world: int) -> ParallelConfig:
    """`parallel` if `model` and the `world` processes fit it, else a smaller one; the rest is data parallel.

    A stage's layout fits its own model, but the smaller model it grows from may have too few heads or layers for it,
    and a tool may run on fewer processes than training. Virtual pipelines, which only hide waiting, are left out.
    """
    if parallel.virtual_pipeline > 1:
        parallel = replace(parallel, virtual_pipeline=1, pipeline_layers=None)
    if _fits(model, parallel, world):
        return replace(parallel, data=None)
    smaller = [
        ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=parallel.sequence and tensor > 1)
        for tensor in divisors(parallel.tensor)
        for pipeline in divisors(parallel.pipeline)
    ]
    return max((p for p in smaller if _fits(model, p, world)), key=lambda p: (p.model_size, p.tensor))


def _fits(model: ModelConfig, parallel: ParallelConfig, world: int) -> bool:
    try:
        check_layout(model, parallel)
    except RequestError:
        return False
    return world % parallel.model_size == 0


@contextmanager
def loaded_model(
    view: LogicalCheckpoint, model: ModelConfig, stage: StageConfig, layout: Layout
) -> Iterator[list[Any]]:
    """Chunks of `model` with a view's weights, ready to evaluate, under the stage's layout or one that fits.

    fp32 weights come from the view's masters where it has them. Products are not in FP8: its noise would hide what
    is measured, and the sizes of the model that grows may not fit it.
    """
    from flm_megatron.model.build import build_model

    parallel = fitting_layout(model, stage.parallel, dist.get_world_size())
    stage = replace(stage, model=model, parallel=parallel, micro_batch=1, recompute="none", fp8="none")
    with layout(stage.parallel), torch.no_grad():
        chunks = [chunk.to(current().torch_device).eval() for chunk in build_model(model, stage)]
        load_state(view, chunks)
        yield chunks


@torch.no_grad()
def forward(chunks: list[Any], tokens: torch.Tensor, on_logits: Callable[[int, torch.Tensor], None]) -> None:
    """Run `tokens` [samples, sequence] through the pipeline, one sample at a time, on every data-parallel rank.

    On the last pipeline part `on_logits(sample, logits)` is called, with logits [sequence, padded vocabulary] gathered
    over tensor-parallel ranks.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(data: Iterator[int], model: Any) -> tuple[torch.Tensor, Any]:
        """megatron-core's forward step for one sample."""
        sample = next(data)
        batch = tokens[sample : sample + 1].to(current().torch_device)
        output = model(batch, None, None, runtime_gather_output=True)

        def finish(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
            """Hand over the logits; the schedule's loss is not used."""
            on_logits(sample, logits[0])
            return logits.new_zeros(()), torch.ones((), dtype=torch.int, device=logits.device), sample

        return output, finish

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(range(len(tokens))),
        model=chunks[0],
        num_microbatches=len(tokens),
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
    )
