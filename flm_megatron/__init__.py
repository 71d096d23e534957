"""Train very large language models in stages: train, grow, train on, under tensor, pipeline and data parallelism.

`import flm_megatron as flm` gives the names in `__all__`, each imported when it is first used; docs/api.md shows them
at work. What is not among them is private. megatron-core is the parallel engine; docs/architecture.md shows the rooms
of the source and their order.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # as in `typing`, which this does not wait for
if TYPE_CHECKING:
    from flm_megatron.api.budget.advise import GrowthAdvice, advise
    from flm_megatron.api.budget.plan_budget import BudgetPlan, plan_budget
    from flm_megatron.api.checkpoint import open_checkpoint
    from flm_megatron.api.compare import compare
    from flm_megatron.api.hugging_face import HuggingFaceExport, export_hf, import_hf
    from flm_megatron.api.plan import Plan, plan, search_layouts
    from flm_megatron.api.refit import Refitted, refit
    from flm_megatron.api.rehearse import Rehearsal, rehearse
    from flm_megatron.api.reshard import CheckpointCopy, reshard
    from flm_megatron.api.run_file import load_run
    from flm_megatron.api.shape.distance import layer_distances
    from flm_megatron.api.shape.grow import Growth, grow
    from flm_megatron.api.shape.importance import measure_importance
    from flm_megatron.api.shape.shrink import Shrinking, shrink
    from flm_megatron.api.train import fine_tune, train
    from flm_megatron.api.verify import verify
    from flm_megatron.checkpoint.exchange.refit import Refit, rank_shards
    from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
    from flm_megatron.checkpoint.sharding.model_state import held_state
    from flm_megatron.checkpoint.tools.compare import Comparison
    from flm_megatron.checkpoint.tools.verify import Verification
    from flm_megatron.config.schema import (
        ChatConfig,
        CheckpointConfig,
        DataConfig,
        DistillConfig,
        DistributedConfig,
        EvaluationConfig,
        GrowthConfig,
        KernelsConfig,
        LoggingConfig,
        LoraConfig,
        MemoryConfig,
        MixConfig,
        ModelConfig,
        MupConfig,
        OpenTelemetryConfig,
        OptimizerConfig,
        ParallelConfig,
        PrometheusConfig,
        RopeScaling,
        RunConfig,
        ScheduleConfig,
        ShrinkConfig,
        SourceConfig,
        StabilityConfig,
        StageConfig,
        TextConfig,
        TrackerConfig,
        ValidationConfig,
    )
    from flm_megatron.errors import DamagedError, FlmError, Mistakes, RequestError
    from flm_megatron.growth.distance import LayerDistance
    from flm_megatron.growth.plan import GrowthPlan
    from flm_megatron.growth.record import Certificate
    from flm_megatron.growth.shrink.importance import Importance
    from flm_megatron.growth.shrink.plan import ShrinkPlan
    from flm_megatron.planner.plan import Cost, StagePlan
    from flm_megatron.planner.search import SearchResult
    from flm_megatron.training.hooks import Hook

__all__ = [
    "BudgetPlan",
    "Certificate",
    "ChatConfig",
    "CheckpointConfig",
    "CheckpointCopy",
    "Comparison",
    "Cost",
    "DamagedError",
    "DataConfig",
    "DistillConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "FlmError",
    "Growth",
    "GrowthAdvice",
    "GrowthConfig",
    "GrowthPlan",
    "Hook",
    "HuggingFaceExport",
    "Importance",
    "KernelsConfig",
    "LayerDistance",
    "LoggingConfig",
    "LogicalCheckpoint",
    "LoraConfig",
    "MemoryConfig",
    "Mistakes",
    "MixConfig",
    "ModelConfig",
    "MupConfig",
    "OpenTelemetryConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Plan",
    "PrometheusConfig",
    "Refit",
    "Refitted",
    "Region",
    "Rehearsal",
    "RequestError",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "SearchResult",
    "ShrinkConfig",
    "ShrinkPlan",
    "Shrinking",
    "SourceConfig",
    "StabilityConfig",
    "StageConfig",
    "StagePlan",
    "TensorInfo",
    "TextConfig",
    "TrackerConfig",
    "ValidationConfig",
    "Verification",
    "__version__",
    "advise",
    "compare",
    "export_hf",
    "fine_tune",
    "grow",
    "held_state",
    "import_hf",
    "layer_distances",
    "load_run",
    "measure_importance",
    "open_checkpoint",
    "plan",
    "plan_budget",
    "rank_shards",
    "refit",
    "rehearse",
    "reshard",
    "search_layouts",
    "shrink",
    "train",
    "verify",
]

_MODULES = {
    "api.budget.advise": ("GrowthAdvice", "advise"),
    "api.budget.plan_budget": ("BudgetPlan", "plan_budget"),
    "api.checkpoint": ("open_checkpoint",),
    "api.compare": ("compare",),
    "api.hugging_face": ("HuggingFaceExport", "export_hf", "import_hf"),
    "api.plan": ("Plan", "plan", "search_layouts"),
    "api.refit": ("Refitted", "refit"),
    "api.rehearse": ("Rehearsal", "rehearse"),
    "api.reshard": ("CheckpointCopy", "reshard"),
    "api.run_file": ("load_run",),
    "api.shape.distance": ("layer_distances",),
    "api.shape.grow": ("Growth", "grow"),
    "api.shape.importance": ("measure_importance",),
    "api.shape.shrink": ("Shrinking", "shrink"),
    "api.train": ("fine_tune", "train"),
    "api.verify": ("verify",),
    "checkpoint.exchange.refit": ("Refit", "rank_shards"),
    "checkpoint.logical": ("LogicalCheckpoint", "Region", "TensorInfo"),
    "checkpoint.sharding.model_state": ("held_state",),
    "checkpoint.tools.compare": ("Comparison",),
    "checkpoint.tools.verify": ("Verification",),
    "config.schema": ("RopeScaling",),
    "errors": ("DamagedError", "FlmError", "Mistakes", "RequestError"),
    "growth.distance": ("LayerDistance",),
    "growth.plan": ("GrowthPlan",),
    "growth.record": ("Certificate",),
    "growth.shrink.importance": ("Importance",),
    "growth.shrink.plan": ("ShrinkPlan",),
    "planner.plan": ("Cost", "StagePlan"),
    "planner.search": ("SearchResult",),
    "training.hooks": ("Hook",),
}
"""Public names by the module that they are in; those that are left are the sections of the run file."""
_MODULE_OF = dict.fromkeys((name for name in __all__ if name.endswith("Config")), "config.schema") | {
    name: module for module, names in _MODULES.items() for name in names
}

if not TYPE_CHECKING:  # for type checkers a name that is not there stays an error

    def __getattr__(name: str) -> object:
        """A public name, imported now and kept."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, and those that every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
