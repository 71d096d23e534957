"""What a benchmark is asked to do, sent to every process."""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.config.schema import KernelsConfig, StageConfig


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
