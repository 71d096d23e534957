"""What is measured: the request, a stage or a stack of its layers, and its layouts on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flm_megatron.config.rules.layout import LAYOUT_RULES
from flm_megatron.config.rules.pipeline import divisors
from flm_megatron.config.schema import KernelsConfig, ParallelConfig, StageConfig
from flm_megatron.errors import RequestError

STACK_VOCABULARY = 128
"""Vocabulary of a stack of layers: the smallest that is not padded, so that embedding and head weigh nothing."""


@dataclass(frozen=True)
class Request:
    """A stage, its vocabulary known, to be measured over `steps` steps after `warmup` that do not count.

    `profiled` steps more are divided into parts, none at 0.
    """

    stage: StageConfig
    sequence_length: int
    kernels: KernelsConfig
    steps: int = 20
    warmup: int = 3
    profiled: int = 3
    timeout_s: int = 600


def layer_stack(stage: StageConfig, layers: int) -> StageConfig:
    """`layers` layers of the stage's shape between an embedding and a head of 128 tokens."""
    model = replace(stage.model, num_layers=layers, vocab_size=STACK_VOCABULARY)
    return replace(stage, model=model, parallel=replace(stage.parallel, pipeline_layers=None))


def local_layouts(stage: StageConfig, sequence_length: int, size: int) -> tuple[list[StageConfig], list[str]]:
    """The stage under every layout of `size` processes, and one line on each layout that breaks a rule.

    Layouts differ in tensor, sequence, pipeline, virtual pipeline (1 or 2) and data parallelism.

    Raises:
        RequestError: no layout of that many processes fits; the message has the first reason.
    """
    fitting, rejected = [], []
    for parallel in _layouts(stage.parallel, size):
        trial = replace(stage, parallel=parallel)
        broken = next(filter(None, (rule(trial, sequence_length, size) for rule in LAYOUT_RULES)), None)
        if broken:
            rejected.append(f"{describe(parallel)}: {broken}")
        else:
            fitting.append(trial)
    if not fitting:
        raise RequestError(f"no layout of {size} processes fits stage {stage.name!r}, such as {rejected[0]}")
    return fitting, rejected


def _layouts(base: ParallelConfig, size: int) -> Iterator[ParallelConfig]:
    for tensor in divisors(size):
        for pipeline in divisors(size // tensor):
            for sequence in (False, True) if tensor > 1 else (False,):
                for virtual in (1, 2) if pipeline > 1 else (1,):
                    yield replace(
                        base,
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        data=size // tensor // pipeline,
                        sequence=sequence,
                        pipeline_layers=None,
                    )


def describe(parallel: ParallelConfig) -> str:
    """A layout as text."""
    chunks = f" ({parallel.virtual_pipeline} chunks)" if parallel.virtual_pipeline > 1 else ""
    sequence = " + sequence" if parallel.sequence else ""
    return f"tensor {parallel.tensor}{sequence} x pipeline {parallel.pipeline}{chunks} x data {parallel.data or 1}"
