"""A checkpoint under evaluation: its weights, its model, its tokenizer and where it stands in its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.manifest import UNRECORDED_PRECISION, Manifest
from flm_megatron.checkpoint.opening import open_with_model
from flm_megatron.checkpoint.own_tokenizer import check_tokenizer, tokenizer_files
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.paths import FilePath
from flm_megatron.storage.path import location


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """A checkpoint with its model and tokenizer. `precision` is that of its training, `context` its sequence length."""

    path: Path
    checkpoint: LogicalCheckpoint
    model: ModelConfig
    tokenizer: Tokenizer
    precision: str
    context: int

    @property
    def name(self) -> str:
        """Stage and step, or the folder's name where the checkpoint does not say."""
        at = self.checkpoint.manifest.position
        return self.path.name if at.stage is None else f"{at.stage} {at.step}"

    def window(self, asked: int | None = None) -> int:
        """Tokens of a window: those that are `asked` for, else the sequence length, as far as learned positions reach.

        Raises:
            RequestError: more are asked for than there are learned positions.
        """
        most = self.model.max_positions
        if asked is not None and most is not None and asked > most:
            raise RequestError(
                f"windows of {asked} tokens: {self.path} has {most} learned positions, give at most these"
            )
        return asked or min(self.context, most or self.context)


def open_evaluated(
    path: str | Path, tokenizer: str | Path | None = None, vocab_size: int | None = None
) -> EvaluatedCheckpoint:
    """Open the checkpoint of any format at `path`, with `tokenizer` or the one that its run or its folder names.

    `vocab_size` is the true vocabulary, where the checkpoint is padded and does not record it.

    Raises:
        RequestError: no checkpoint, no model description, no tokenizer, or one that is not the checkpoint's.
        DamagedError: the checkpoint or the tokenizer cannot be read.
    """
    path = location(path)
    checkpoint, model = open_with_model(path, vocab_size)
    run = checkpoint.manifest.run
    stage = run.stage(checkpoint.manifest.position.stage)
    found = open_tokenizer(tokenizer or _own_tokenizer(path, checkpoint.manifest))
    check_tokenizer(found, model, str(path), checkpoint.manifest, path)
    precision = (stage and stage.precision) or UNRECORDED_PRECISION
    return EvaluatedCheckpoint(path, checkpoint, model, found, precision, run.sequence_length)


def _own_tokenizer(path: Path, manifest: Manifest) -> FilePath:
    candidates = tokenizer_files(path, manifest)
    if not candidates:
        named = manifest.run.tokenizer
        raise RequestError(
            f"{path}: {f'its tokenizer {named} is not there' if named else 'it names no tokenizer'}: "
            "give one with --tokenizer"
        )
    return candidates[0]
