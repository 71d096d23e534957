"""Checks every file and tensor of a checkpoint against what was recorded when it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.checkpoint.described import check_structure, model_of, without_padding
from flm_megatron.checkpoint.files.manifest import file_checksum, listed_sizes, read_manifest, size_problem
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.logical_hash import tensor_hashes
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.distributed.processes import Processes
from flm_megatron.errors import DamagedError, FlmError

CHUNK_VALUES = 2 * 2**20


@dataclass(frozen=True)
class Verification:
    """What is wrong (nothing, if all is well), and how thoroughly it was checked."""

    problems: list[str]
    looked_at: str


def verify_checkpoint(
    path: Path, quick: bool, processes: Processes, moved: Callable[[int], None], vocab_size: int | None = None
) -> Verification:
    """Check sizes, checksums (unless `quick`) and the structure of a checkpoint of any format.

    Formats without a manifest (Hugging Face, Megatron-LM's) are read through instead, which finds missing, truncated
    and unreadable data, and changed bytes only where a record has a checksum of its own; the result says so.
    """
    manifest = read_manifest(path)
    if manifest is None:
        problems = []
    else:
        problems = _gather(processes, lambda: _file_problems(path, manifest, quick, processes, moved))
    if problems:
        return Verification(problems, "sizes" if quick else "sizes and checksums")
    checkpoint = open_checkpoint(path, vocab_size)
    model = model_of(checkpoint, vocab_size)
    if model is not None:
        checkpoint = without_padding(checkpoint, model)
        check_structure(checkpoint.tensors, model, str(path))
    structure = "structure" if model is not None else "no structure, for it does not say what model it is of"
    if manifest:
        return Verification(
            [], f"{'sizes' if quick else 'sizes and checksums'} of {len(manifest.files)} files, {structure}"
        )
    if not quick:
        problems = _gather(processes, lambda: _unreadable(checkpoint, processes, moved))
    return Verification(problems, f"{structure}; {'' if quick else 'every tensor read; '}it has no checksums")


def _gather(processes: Processes, problems: Callable[[], Iterator[str]]) -> list[str]:
    parts = processes.together(lambda: list(problems()))
    return processes.on_first(lambda: [line for part in parts for line in part])


def _file_problems(
    path: Path, manifest: Manifest, quick: bool, processes: Processes, moved: Callable[[int], None]
) -> Iterator[str]:
    """One line for each bad file in this process's shard."""
    sizes = listed_sizes(path)
    for name in list(manifest.files)[processes.rank :: processes.size]:
        wanted, file = manifest.files[name], path / name
        if sizes.get(name) != wanted.size and (problem := size_problem(file, wanted)):
            yield problem
        elif not quick and file_checksum(file, moved) != wanted.crc32:
            yield f"{file}: its bytes have changed ({_changed_tensors(path, name, manifest)})"


def _changed_tensors(path: Path, file: str, manifest: Manifest) -> str:
    """Names of the tensors in a file whose values have changed since they were written.

    A block may hold bytes of several small tensors, a record those of one: so records are checked here.
    """
    try:
        checkpoint = TorchDistCheckpoint(path, blocks=False)
        names = [name for name, chunks in checkpoint.chunks.items() if any(chunk.file == file for chunk in chunks)]
        changed = [name for name in names if _changed(checkpoint, name, manifest.tensors[name])]
    except FlmError as error:
        return f"and the checkpoint cannot be opened: {error}"
    return ", ".join(changed) if changed else "no tensor's values are touched"


def _changed(checkpoint: LogicalCheckpoint, name: str, recorded: str) -> bool:
    try:
        return tensor_hashes(checkpoint, [name])[name] != recorded
    except DamagedError:
        return True


def _unreadable(checkpoint: LogicalCheckpoint, processes: Processes, moved: Callable[[int], None]) -> Iterator[str]:
    """One line for each tensor in this process's shard that cannot be read."""
    for name in list(checkpoint.tensors)[processes.rank :: processes.size]:
        try:
            for region in split_region(Region.whole(checkpoint.tensors[name].shape), CHUNK_VALUES):
                moved(checkpoint.read(name, region).nbytes)
        except DamagedError as error:
            yield f"{name}: {error}"
