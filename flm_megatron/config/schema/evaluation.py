"""Evaluation on the ranks that train, between steps."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.settings import SETTINGS


@dataclass(config=SETTINGS)
class TextConfig:
    """A text whose bits per byte are measured."""

    path: str
    """A file, a `.jsonl` file or a source tree, as for `flm eval bpb`."""
    name: str | None = None
    """Name in logs; none means the last part of the path."""

    @property
    def display_name(self) -> str:
        """What logs call it: its name, or the last part of its path."""
        return self.name or Path(self.path).name


@dataclass(config=SETTINGS)
class EvaluationConfig:
    """What the training ranks measure of the model beside validation loss, at an interval and at the end of each
    stage. Nothing is measured unless texts, tasks or prompts are named."""

    interval_steps: int = 0
    """Steps of a stage between evaluations; 0 evaluates only at the end of each stage."""
    texts: list[TextConfig] = field(default_factory=list)
    """Bits per byte of these texts."""
    stride: int | None = None
    """Tokens by which the windows over a text, of the sequence length, move; none means half of it."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, as for `flm eval harness`."""
    tasks_folder: str | None = None
    """Folder of task files of your own; relative paths in them start there."""
    network: bool = False
    """Allow tasks to fetch their data."""
    limit: int | None = None
    """Questions of each task, from its beginning; none means all."""
    fewshot: int | None = None
    """Examples before each question; none means what the task says."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model goes on with, greedily; each completion is recorded beside its prompt."""
    max_new_tokens: int = 64
    """Longest completion of a prompt, in tokens."""
    batch: int = 8
    """Windows, questions or prompts in one forward pass."""

    @property
    def asked(self) -> bool:
        """Whether anything is to be measured."""
        return bool(self.texts or self.tasks or self.prompts)
