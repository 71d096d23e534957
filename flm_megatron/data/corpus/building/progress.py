"""How far a build is, on disk: the same command goes on there after a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flm_megatron.data.corpus.building.writer import Written
from flm_megatron.durable import replace_file
from flm_megatron.json_text import parse_json

NAME = "progress.json"
VERSION = 1


@dataclass(frozen=True)
class Progress:
    """What a build has written: of `read` documents those in `written`, for each dataset; the others were copies or
    near ones. `whole` when nothing is left but to give the files their names."""

    identity: str
    read: int = 0
    copies: int = 0
    near: int = 0
    written: Sequence[Written] = ()
    whole: bool = False
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Save it; what it counts has to be on disk already."""
        replace_file(folder / NAME, json.dumps(asdict(self)).encode())


def read_progress(folder: Path, identity: str) -> Progress | None:
    """The progress of a build of this identity in `folder`; none if there is none, or it was of something else."""
    try:
        fields = parse_json((folder / NAME).read_bytes(), NAME)
        assert isinstance(fields, dict)
        written = [Written(*each) for each in fields.pop("written")]
        found = Progress(**fields, written=written)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return None
    return found if (found.identity, found.version) == (identity, VERSION) else None
