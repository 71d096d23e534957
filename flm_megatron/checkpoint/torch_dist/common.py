"""What a Megatron-LM checkpoint holds beside tensors: arguments, the iteration, settings of the optimizer."""

from __future__ import annotations

from pathlib import Path

import torch

from flm_megatron.checkpoint.files.manifest import MANIFEST
from flm_megatron.checkpoint.files.pickle.reader import Foreign
from flm_megatron.checkpoint.files.torch_file import load_torch_file
from flm_megatron.checkpoint.manifest import StagePosition
from flm_megatron.checkpoint.torch_dist.metadata import StoredMetadata
from flm_megatron.checkpoint.torch_dist.tensor_record import load_object
from flm_megatron.errors import DamagedError, RequestError

COMMON = "common.pt"
RECORD = "common_state/shard_0_1"
"""Its record among the tensors, from megatron-core 0.19 on, which writes no COMMON."""
OURS = "flm_megatron"  # key in common.pt that tells our folders from Megatron-LM's


def read_common(path: Path, metadata: StoredMetadata) -> dict[str, object] | None:
    """The common state of a folder; none if it has none.

    Raises:
        DamagedError: it is damaged, or names what could run code.
        RequestError: the disk does not answer.
    """
    found: object = None
    if (path / COMMON).exists():
        found = load_torch_file(path / COMMON)
    elif RECORD in metadata.of_bytes:
        place = metadata.of_bytes[RECORD]
        if place.transformed:
            raise RequestError(f"{path}: {RECORD} is stored compressed or transformed, which cannot be read")
        found = load_object(path / place.relative_path, place.offset, place.length)
        found = found[0] if isinstance(found, list) and found else found
    return found if isinstance(found, dict) else None


def foreign_position(path: Path, common: dict[str, object] | None) -> StagePosition:
    """The position that Megatron-LM's own checkpoint records: step, samples, and Adam's step if known.

    Raises DamagedError for one of ours, which always has a manifest.
    """
    if common is None:
        return StagePosition()
    if OURS in common or common.keys() == {"checkpoint_version", "iteration"}:
        raise DamagedError(f"{path}: has no {MANIFEST}, which is written last: it is incomplete or was changed")
    arguments, samples = common.get("args"), None
    if arguments is not None and not isinstance(arguments, Foreign):
        samples = getattr(arguments, "consumed_train_samples", None)
    return StagePosition.of_others(common.get("iteration"), samples, _optimizer_step(common.get("optimizer")))


def _optimizer_step(optimizer: object) -> int | None:
    """The one Adam step among the parameter groups, however they are nested; none if there is none."""
    waiting, seen = [optimizer], set()
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict | list) or id(part) in seen:
            continue  # a part that stands in several places is looked at once: there may be very many of these
        seen.add(id(part))
        groups = part.get("param_groups") if isinstance(part, dict) else None
        steps = [_step(group) for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
        if known := [step for step in steps if step is not None]:
            return max(known)
        waiting += reversed(list(part.values()) if isinstance(part, dict) else part)
    return None


def _step(group: dict[str, object]) -> int | None:
    step = group.get("step")
    if isinstance(step, torch.Tensor) and step.numel() == 1:
        step = step.item()
    return int(step) if isinstance(step, int | float) and abs(step) < 2**62 else None
