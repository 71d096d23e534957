"""The whole run: its stages and settings for all of them."""

from __future__ import annotations

from dataclasses import field

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.data import DataConfig
from flm_megatron.config.schema.evaluation import EvaluationConfig
from flm_megatron.config.schema.hardware import DistributedConfig, KernelsConfig
from flm_megatron.config.schema.reporting import OpenTelemetry, Prometheus, Tracker
from flm_megatron.config.schema.settings import SETTINGS
from flm_megatron.config.schema.stage import StageConfig


@dataclass(config=SETTINGS)
class MemoryConfig:
    """Copies of the state in the hosts' memory, under a launcher that restarts ranks."""

    interval_steps: int = 10
    """Steps between copies: at most this many are repeated after the loss of a host."""
    budget_gib: float | None = None
    """Host memory for all copies on one host; none means nine tenths of what is free."""


@dataclass(config=SETTINGS)
class CheckpointConfig:
    """Which checkpoints are saved and kept, and what the run starts from."""

    interval_steps: int = 0
    """Steps between checkpoints; 0 saves only at the end of a stage."""
    keep_last: int = 2
    """Newest checkpoints of a stage to keep; the last one of a finished stage is always kept."""
    keep_every_steps: int = 0
    """Also keep checkpoints at multiples of this step; 0 keeps none."""
    asynchronous: bool = False
    """Write in the background from a copy, while training goes on."""
    memory: MemoryConfig | None = None
    """Also keep each rank's state in its host's memory and a neighbour's, to resume from when a host or rank is
    lost."""
    live_boundaries: bool = False
    """Under torchrun, load a stage's beginning from the memory of the ranks that trained the stage before, in place of
    its last checkpoint on the disk, which is saved all the same."""
    initial: str | None = None
    """Checkpoint (ours or a Hugging Face folder) whose weights the first stage starts from."""
    branch_of: str | None = None
    """Checkpoint of another run with the same stages up to there, from which this run goes on as if it were its own:
    set by `flm train --branch`."""


@dataclass(config=SETTINGS)
class LoggingConfig:
    """Which metrics are reported, and how often."""

    interval_steps: int = 1
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    layer_norms: bool = False
    """Also log the norms of weights and gradients of each layer."""
    layer_statistics: int = 0
    """Steps between measurements of each layer: root mean square and largest magnitude of its weights and of its
    output; 0 never measures."""
    growth_health: int = 0
    """Steps between measurements of a grown stage's old and new entries in every layer: norms, updates, effective
    ranks, distance from the identity; also after its first step; 0 never measures."""
    trackers: list[Tracker] = field(default_factory=list)
    """Experiment trackers that get metrics, run file, growths and saves, such as [wandb, mlflow] (docs/trackers.md)."""
    prometheus: Prometheus = None
    """An endpoint with the newest metrics; true for one at its default port."""
    opentelemetry: OpenTelemetry = None
    """Spans to an OpenTelemetry collector; true for the one that the OTEL_* variables name."""


@dataclass(config=SETTINGS)
class RunConfig:
    """A whole run."""

    name: str = "run"
    """Name of the run, in logs and plots."""
    output: str = "runs/run"
    """Folder for checkpoints, metrics and plots. A URL (s3://…) stands for a folder in the cache of this machine, and
    the URL for `output_url`."""
    output_url: str | None = None
    """URL that `output` is kept at too: sent in the background, brought back where another machine goes on."""
    output_url_interval_s: float = 30.0
    """Seconds between looks at what changed in `output` and is to be sent to `output_url`."""
    seed: int = 1234
    """Seed of initial weights, of new weights at growth and of the order of samples."""
    tokenizer: str | None = None
    """SentencePiece model, `tokenizer.json` or tiktoken file, or a folder that holds one; a path or a URL."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation data."""
    stages: list[StageConfig] = field(default_factory=list)
    """Stages in order."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and starting checkpoints."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Metrics and logs."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation on the ranks that train, between steps."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Processes and timeouts."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Implementation of each fused operation."""
    hooks: list[str] = field(default_factory=list)
    """Your own code, called at certain moments of training: PACKAGE.MODULE.CLASS of subclasses of
    `flm_megatron.training.hooks.Hook` (docs/hooks.md)."""
