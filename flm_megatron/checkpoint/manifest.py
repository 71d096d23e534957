"""What a checkpoint says of itself: the typed record behind `manifest.json`, read and written here alone.

Keys that are not known, of later additions to the same version, are kept when a manifest is copied. Sections that
another module owns (the run file, a growth, a layout) are kept as they were saved, whatever version saved them; what
tools need of them is typed.
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
"""Keys of a position, in the order in which a manifest has them."""
UNRECORDED_LENGTH = 4096
"""Tokens of a sample where a checkpoint does not say."""
UNRECORDED_PRECISION = "fp32"
Count = Annotated[int, Field(strict=True, ge=0, lt=2**62)]
Size = Annotated[int, Field(ge=1, lt=2**62)]
S = TypeVar("S", bound="Section")


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**62 else None


class Record(BaseModel):
    """Known fields have their types; others are kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Section(BaseModel):
    """A part of which the fields are what is read here; the whole is `saved`."""

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
    """How far a run is: `step` of the stage, samples and tokens of all stages, Adam's step, the stage's name; none is
    what is not known."""

    step: Count | None = None
    samples: Count | None = None
    tokens: Count | None = None
    optimizer_step: Count | None = None
    stage: str | None = None

    @classmethod
    def of_others(cls, step: object, samples: object, optimizer_step: object = None) -> StagePosition:
        """The position that another program's checkpoint names; what is no count is not known."""
        return cls(_count(step), _count(samples), optimizer_step=_count(optimizer_step))

    def to_json(self) -> dict[str, object]:
        """The entries of a manifest, without those that are not known."""
        return {key: value for key in POSITION if (value := getattr(self, key)) is not None}


class RecordedStage(Section):
    """A stage: `model` are the fields of a model configuration, `precision` is what it is trained in."""

    name: str
    model: dict[str, object]
    precision: str | None = None


class RecordedSource(Section):
    """A dataset: the path of its files."""

    path: str


class RecordedData(Section):
    """What a run is trained on; `chat` is how conversations are laid out, none for text."""

    sequence_length: Count | None = None
    train: list[RecordedSource] = []
    chat: dict[str, object] | None = None


class RecordedRun(Section):
    """A run file, resolved. `tokenizer` is the path of its file. A run that goes on compares `saved` field by field
    (`training.resume`); run files of other versions may have other fields."""

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
    """The plan of a growth: the name of the stage that grew, and the fields of the model that it trains."""

    stage: str | None = None
    new: dict[str, object] | None = None


class RecordedGrowth(Section):
    """A growth; `growth.record.GrowthRecord` reads and writes the whole."""

    plan: RecordedPlan | None = None


class RecordedLayout(Section):
    """Sizes of the layout that saved the checkpoint; `world` is the number of its processes."""

    tensor: Size = 1
    pipeline: Size = 1
    world: Count | None = None

    @property
    def data_size(self) -> int | None:
        """The data-parallel size; none where it was not recorded."""
        return None if self.world is None else self.world // (self.tensor * self.pipeline)


class SpikeState(Record):
    """What the spike guard remembers (`training.spikes.SpikeWatch`): losses and gradient norms of the last applied
    steps; why steps in a row were refused, and their values (none where these were not finite; no list as an earlier
    version saved it); steps since each new level, with its loss if it has one; how many steps were refused."""

    loss: list[float] = []
    grad_norm: list[float] = []
    in_a_row: list[str] = []
    refused: list[dict[str, float] | None] | None = None
    levels: list[Annotated[tuple[int, float | None], Field(strict=False)]] = []
    skipped: Count = 0


class FileEntry(Record):
    """Size in bytes of a file, and its CRC-32 as 8 hex digits."""

    size: Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]


class Manifest(Record):
    """A manifest of any version up to ours. What it does not say is none, or empty."""

    run: RecordedRun = RecordedRun()
    position: StagePosition = StagePosition()
    growth: RecordedGrowth | None = None
    """The growth that the checkpoint's stage began with."""
    tokenizer_sha256: str | None = None
    history: list[dict[str, object]] | None = None
    """How the run came here; `config.history` reads and writes it."""
    validation_sha256: dict[str, str] = {}
    """Hash of the dataset of each validation set, by its name."""
    earlier_growth: RecordedGrowth | None = None
    """The last growth behind the checkpoint that the run started from."""
    stability: SpikeState | None = None
    layout: RecordedLayout | None = None
    optimizer: str | None = None
    """`logical`, or `none` where there is no state of it."""
    files: dict[str, FileEntry] = {}
    """All files but `manifest.json`, by name."""
    tensors: dict[str, str] = {}
    """Hash of each tensor."""
    weights_hash: str = ""
    logical_hash: str = ""
    certificate: dict[str, object] | None = None
    """Of the growth, where an earlier version wrote it beside it."""

    @classmethod
    def from_json(cls, data: Mapping[str, object], where: str = "manifest.json") -> Manifest:
        """The manifest that `to_json` gave; `where` names it in errors. Null is as if the key were not there.

        Raises:
            DamagedError: a field is of another type, or a file lies outside of the folder. The checksum in a manifest
                shows that it was not changed by accident, not that this program wrote it.
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
        """Plain data, with the version of the format; what is not known is left out."""
        known: dict[str, object] = {}
        for key, value in self.model_dump(exclude_unset=True).items():
            if key == "position":
                known |= self.position.to_json()
            elif value is not None:
                known[key] = value
        return {**known, "version": VERSION}

    def __or__(self, other: Manifest) -> Manifest:
        """This manifest with what `other` says, which has the last word."""
        said = {key: value for key, value in other if key in other.model_fields_set and value is not None}
        return self.model_copy(update=said)
