"""The typed record behind `manifest.json`; no other module reads or writes its keys.

Unknown keys, which later additions to the same version may bring, are kept when a manifest is copied. Sections that
another module owns (the run file, a growth, a layout) are kept as they were saved, by whatever version; the fields that
tools read of them are typed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from flm_megatron.errors import DamagedError
from flm_megatron.paths import is_file_name

VERSION = 1
POSITION = ("stage", "step", "samples", "tokens", "optimizer_step")
"""Keys of a position, in their order in a manifest."""
UNRECORDED_LENGTH = 4096
"""Tokens of a sample if a checkpoint does not record them."""
UNRECORDED_PRECISION = "fp32"
Count = Annotated[int, Field(strict=True, ge=0, lt=2**62)]
Size = Annotated[int, Field(ge=1, lt=2**62)]
S = TypeVar("S", bound="Section")


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**62 else None


class Record(BaseModel):
    """Known fields are type-checked; others are kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Section(BaseModel):
    """A section that is kept whole in `saved`; its fields are those that tools read."""

    model_config = ConfigDict(strict=True, frozen=True)
    _saved: dict[str, object] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls: type[S], data: object, handler: ModelWrapValidatorHandler[S]) -> S:
        found = handler(data)
        if isinstance(data, dict):
            found._saved = data
        return found

    @property
    def saved(self) -> dict[str, object]:
        """All of it, as it was saved."""
        return self._saved

    @model_serializer
    def _written(self) -> dict[str, object]:
        return self._saved


@dataclass(frozen=True, config=ConfigDict(strict=False))
class StagePosition:
    """How far a run is.

    `step` of the stage, samples and tokens of all stages, Adam's step, and the stage's name; none if not known.
    """

    step: Count | None = None
    samples: Count | None = None
    tokens: Count | None = None
    optimizer_step: Count | None = None
    stage: str | None = None

    @classmethod
    def of_others(cls, step: object, samples: object, optimizer_step: object = None) -> StagePosition:
        """The position that another program's checkpoint records; a value that is no count is not known."""
        return cls(_count(step), _count(samples), optimizer_step=_count(optimizer_step))

    def to_json(self) -> dict[str, object]:
        """The entries of a manifest, without unknown ones."""
        return {key: value for key in POSITION if (value := getattr(self, key)) is not None}


class RecordedStage(Section):
    """A stage: `model` are the fields of its model configuration, `precision` is its training precision."""

    name: str
    model: dict[str, object]
    precision: str | None = None


class RecordedSource(Section):
    """A dataset of the training data."""

    path: str


class RecordedData(Section):
    """The data of a run; `chat` has the options of conversations, none if the data are text."""

    sequence_length: Count | None = None
    train: list[RecordedSource] = []
    chat: dict[str, object] | None = None


class RecordedRun(Section):
    """A resolved run file; `tokenizer` is a path.

    Run files of other versions may have other fields, so it is not read as a run file here. A run that resumes compares
    `saved` field by field (`training.resume`).
    """

    tokenizer: str | None = None
    seed: int | None = None
    data: RecordedData | None = None
    stages: list[RecordedStage] = []

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample."""
        return (self.data and self.data.sequence_length) or UNRECORDED_LENGTH

    @property
    def train(self) -> tuple[str, ...]:
        """Paths of the training data."""
        return tuple(source.path for source in self.data.train) if self.data else ()

    def stage(self, name: str | None) -> RecordedStage | None:
        """The stage of a name; none if there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)


class RecordedPlan(Section):
    """The plan of a growth or shrinking: the name of the stage that began with it, and the fields of the model that it
    trains."""

    stage: str | None = None
    new: dict[str, object] | None = None


class RecordedGrowth(Section):
    """A growth or shrinking; `growth.record.ChangeRecord` reads and writes the whole."""

    plan: RecordedPlan | None = None


class RecordedLayout(Section):
    """Sizes of the layout that saved the checkpoint; `world` is its number of processes."""

    tensor: Size = 1
    pipeline: Size = 1
    world: Count | None = None

    @property
    def data_size(self) -> int | None:
        """The data-parallel size; none if not recorded."""
        return None if self.world is None else self.world // (self.tensor * self.pipeline)


class RecordedTeacher(Record):
    """The teacher that a stage learnt from: its checkpoint's path and logical hash, and where that stood in its run."""

    path: str
    logical_hash: str
    stage: str | None = None
    step: int | None = None


class SpikeState(Record):
    """The state of the spike guard (`training.spikes.SpikeWatch`).

    Losses and gradient norms of the last applied steps; reasons and values of the last steps in a row that were refused
    (none for values that are not finite, and no list at all in manifests of an earlier version); steps since each new
    level, with the level of the loss if it has one; the number of refused steps.
    """

    loss: list[float] = []
    grad_norm: list[float] = []
    in_a_row: list[str] = []
    refused: list[dict[str, float] | None] | None = None
    levels: list[Annotated[tuple[int, float | None], Field(strict=False)]] = []
    skipped: Count = 0


class FileEntry(Record):
    """A file's size in bytes, and its CRC-32 as 8 hex digits."""

    size: Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]


class Manifest(Record):
    """A manifest of any version up to this one. What is not known is none, or empty."""

    run: RecordedRun = RecordedRun()
    position: StagePosition = StagePosition()
    growth: RecordedGrowth | None = None
    """The growth at the start of the checkpoint's stage."""
    shrink: RecordedGrowth | None = None
    """The shrinking at its start, if it began with one."""
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    """Hash of the text of the template by which a fine-tuning's conversations were written."""
    history: list[dict[str, object]] | None = None
    """Segments of the run so far; `config.history` reads and writes them."""
    validation_sha256: dict[str, str] = {}
    """Hash of the dataset of each validation set, by its name."""
    earlier_growth: RecordedGrowth | None = None
    """The last growth or shrinking before the checkpoint that the run started from."""
    stability: SpikeState | None = None
    teacher: RecordedTeacher | None = None
    """The teacher of the checkpoint's stage."""
    layout: RecordedLayout | None = None
    optimizer: str | None = None
    """`logical`, or `none` without optimizer state."""
    files: dict[str, FileEntry] = {}
    """All files but `manifest.json`, by name."""
    tensors: dict[str, str] = {}
    """Hash of each tensor."""
    weights_hash: str = ""
    logical_hash: str = ""
    certificate: dict[str, object] | None = None
    """The certificate of `growth`, in manifests of an earlier version."""

    @classmethod
    def from_json(cls, data: Mapping[str, object], where: str = "manifest.json") -> Manifest:
        """The manifest of plain data; `where` names it in errors. A null value counts as a missing key.

        Raises:
            DamagedError: a field has the wrong type, or a file lies outside of the folder. (The checksum in the file
                shows that it was not changed by accident, not that this program wrote it.)
        """
        known = {key: value for key, value in data.items() if value is not None and key not in ("version", "crc32")}
        position = {key: known.pop(key) for key in POSITION if key in known}
        try:
            found = cls.model_validate({**known, "position": position})
        except ValidationError as error:
            mistake = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(map(str, mistake["loc"])).removeprefix("position.")
            raise DamagedError(f"{where}: is not a manifest: {name:.200}: {mistake['msg']:.200}") from None
        for name in found.files:
            if not is_file_name(name):
                raise DamagedError(f"{where}: names the file {name!r:.200}, which is not in its folder")
        return found

    def to_json(self) -> dict[str, object]:
        """Plain data with the version of the format, without unknown values."""
        known: dict[str, object] = {}
        for key, value in self.model_dump(exclude_unset=True).items():
            if key == "position":
                known |= self.position.to_json()
            elif value is not None:
                known[key] = value
        return {**known, "version": VERSION}

    def __or__(self, other: Manifest) -> Manifest:
        """This manifest, updated with all that `other` has set and that is not none."""
        said = {key: value for key, value in other if key in other.model_fields_set and value is not None}
        return self.model_copy(update=said)
