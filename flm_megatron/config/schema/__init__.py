"""The run file as typed dataclasses: every field has a type, a default and a docstring, which is its help text.

One file per topic: `model`, `data`, `optimizer`, `hardware` (layout, processes, kernels), `stage`, `reporting`
(trackers and their like), and `run`, which holds them all. `config.loader` reads YAML into these, `config.rules`
checks what types cannot say. Sizes are counts, budgets are tokens, times are seconds. Nothing here imports torch.
"""

from flm_megatron.config.schema.data import ChatConfig, DataConfig, MixConfig, SourceConfig
from flm_megatron.config.schema.evaluation import EvaluationConfig, TextConfig
from flm_megatron.config.schema.hardware import DistributedConfig, KernelsConfig, ParallelConfig
from flm_megatron.config.schema.model import LoraConfig, ModelConfig, MupConfig, RopeScaling
from flm_megatron.config.schema.optimizer import OptimizerConfig, ScheduleConfig
from flm_megatron.config.schema.reporting import OpenTelemetryConfig, PrometheusConfig, TrackerConfig
from flm_megatron.config.schema.run import CheckpointConfig, LoggingConfig, MemoryConfig, RunConfig
from flm_megatron.config.schema.stage import (
    DistillConfig,
    GrowthConfig,
    ShrinkConfig,
    StabilityConfig,
    StageConfig,
    ValidationConfig,
)

__all__ = [
    "ChatConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "GrowthConfig",
    "KernelsConfig",
    "LoggingConfig",
    "LoraConfig",
    "MemoryConfig",
    "MixConfig",
    "ModelConfig",
    "MupConfig",
    "OpenTelemetryConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrometheusConfig",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "ShrinkConfig",
    "SourceConfig",
    "StabilityConfig",
    "StageConfig",
    "TextConfig",
    "TrackerConfig",
    "ValidationConfig",
]
