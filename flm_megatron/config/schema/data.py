"""The training and validation data."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from flm_megatron.config.numbers import dataclass
from flm_megatron.config.schema.settings import SETTINGS


@dataclass(config=SETTINGS)
class SourceConfig:
    """One indexed dataset."""

    path: str
    """Path prefix of the dataset (without .bin and .idx)."""
    name: str | None = None
    """Name in logs; none means the last part of the path."""
    weight: float | None = None
    """Share of the blend; give a weight to every source or to none."""
    epochs: float | None = None
    """Passes over the source in one run of the whole blend; give epochs to every source or to none."""

    @property
    def display_name(self) -> str:
        """What logs call it: its name, or the last part of its path."""
        return self.name or Path(self.path).name


@dataclass(config=SETTINGS)
class MixConfig:
    """How often a stage of fine-tuning takes a source."""

    stage: str
    """Name of the stage."""
    source: str
    """Name of the source."""
    passes: float
    """Passes over the source in one epoch of the stage: 1 takes all of it, 0.1 another tenth in every epoch, 0 none."""


@dataclass(config=SETTINGS)
class ChatConfig:
    """Fine-tuning: the sources of `data` are JSON lines of conversations, and a stage lasts for `epochs`."""

    template: str = "tele-flm"
    """`tele-flm` (<_system>, <_user>, <_bot>), `tokenizer` (the template beside it), or a file of a Jinja template."""
    packing: bool = True
    """Put several conversations into one sample, hidden from each other; else each gets a padded sample of its own."""
    epochs: int = 4
    """Epochs of each stage, in place of its `tokens`."""
    mix: list[MixConfig] = field(default_factory=list)
    """Passes by stage and source. A stage that is not named takes every source once per epoch; in a named one, sources
    that are not named are left out."""


@dataclass(config=SETTINGS)
class DataConfig:
    """Data of a run: one stream of samples for all stages."""

    sequence_length: int = 128
    """Tokens in a sample of every stage. It may change when a run resumes: the rest of the data is then cut anew."""
    train: list[SourceConfig] = field(default_factory=list)
    """Training sources, blended."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Validation sources, each reported by name, the same text in every stage."""
    cache: str | None = None
    """Folder for sample indices; none keeps them beside the datasets."""
    chat: ChatConfig | None = None
    """Fine-tuning on conversations (`flm sft`); none trains on text."""
