"""The types of the fields in a `manifest.json`, so that its readers can rely on them.

The checksum in a manifest shows that it was not changed by accident. It does not show that this program wrote it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flm_megatron.errors import DamagedError
from flm_megatron.paths import is_file_name

Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Fields(BaseModel):
    """Known fields have their types; others, of later additions, are let through."""

    model_config = ConfigDict(strict=True, extra="allow")


class FileFields(_Fields):
    """Size and checksum of a file."""

    size: Count
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]


class StageFields(_Fields):
    """A stage of the run."""

    name: str
    model: dict[str, Any]
    precision: str | None = None


class SourceFields(_Fields):
    """A dataset of the run."""

    path: str


class DataFields(_Fields):
    """What the run is trained on."""

    sequence_length: Count | None = None
    train: list[SourceFields] = []


class RunFields(_Fields):
    """The run file, resolved."""

    tokenizer: str | None = None
    data: DataFields | None = None
    stages: list[StageFields] = []


class GrowthFields(_Fields):
    """How the stage grew."""

    plan: dict[str, Any] | None = None


class ManifestFields(_Fields):
    """A manifest of any version up to ours."""

    run: RunFields | None = None
    stage: str | None = None
    step: Count | None = None
    tokens: Count | None = None
    samples: Count | None = None
    optimizer_step: Count | None = None
    growth: GrowthFields | None = None
    stability: dict[str, Any] | None = None
    files: dict[str, FileFields] = {}
    tensors: dict[str, str] = {}
    logical_hash: str | None = None


def check_manifest(manifest: dict[str, Any], where: str) -> None:
    """Raise DamagedError, naming `where`, if a field is of another type, or a file lies outside of the folder."""
    try:
        fields = ManifestFields.model_validate(manifest)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, mistake["loc"]))
        raise DamagedError(f"{where}: is not a manifest: {name:.200}: {mistake['msg']:.200}") from None
    for name in fields.files:
        if not is_file_name(name):
            raise DamagedError(f"{where}: names the file {name!r:.200}, which is not in its folder")
