"""A checkpoint to evaluate: its weights, its model, its tokenizer and where it stands in its run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_megatron.checkpoint.described import check_structure, required_model, without_padding
from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.description import read_description
from flm_megatron.data.tokenizer import Tokenizer
from flm_megatron.errors import FlmError, RequestError

TOKENIZER_FILE = "tokenizer.model"
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Subject:
    """What is evaluated. `precision` is that of its training, `context` the tokens it was trained on at a time."""

    path: Path
    view: LogicalCheckpoint
    model: ModelConfig
    tokenizer: Tokenizer
    precision: str
    context: int

    @property
    def name(self) -> str:
        """Stage and step, or the folder's name where the checkpoint does not say."""
        manifest = self.view.manifest
        return f"{manifest['stage']} {manifest['step']}" if "stage" in manifest else self.path.name


def open_subject(path: str | Path, tokenizer: str | Path | None = None, vocab_size: int | None = None) -> Subject:
    """The checkpoint of any format at `path`, with `tokenizer` or the one that its run or its folder names.

    `vocab_size` is the true vocabulary, where the checkpoint is padded and does not record it.

    Raises:
        RequestError: no checkpoint, no model description, no tokenizer, or one that is not the checkpoint's.
        DamagedError: the checkpoint or the tokenizer cannot be read.
    """
    path = Path(path)
    view = open_checkpoint(path, vocab_size)
    model = required_model(view, str(path), vocab_size)
    view = without_padding(view, model)
    check_structure(view.tensors, model, str(path))
    run = view.manifest.get("run") or {}
    stage: dict[str, Any] = next((s for s in run.get("stages", []) if s["name"] == view.manifest.get("stage")), {})
    found = Tokenizer(tokenizer or _own_tokenizer(path, run))
    _check_tokenizer(found, model, path, run)
    context = run.get("data", {}).get("sequence_length", DEFAULT_CONTEXT)
    return Subject(path, view, model, found, stage.get("precision", "fp32"), context)


def _own_tokenizer(path: Path, run: dict[str, Any]) -> Path:
    candidates = _tokenizer_files(path, run)
    if not candidates:
        named = run.get("tokenizer")
        raise RequestError(
            f"{path}: {f'its tokenizer {named} is not there' if named else 'it names no tokenizer'}: "
            "give a SentencePiece model with --tokenizer"
        )
    return candidates[0]


def _tokenizer_files(path: Path, run: dict[str, Any]) -> list[Path]:
    """Files that are this checkpoint's tokenizer, as far as they are still there."""
    named = [Path(run["tokenizer"])] if run.get("tokenizer") else []
    return [file for file in [*named, path / TOKENIZER_FILE] if file.is_file()]


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig, path: Path, run: dict[str, Any]) -> None:
    """Hold the tokenizer against all that is known of the one the checkpoint was trained with."""
    if tokenizer.vocab_size != model.vocab_size:
        raise RequestError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model of {path} has {model.vocab_size}: "
            "give the tokenizer that the checkpoint was trained with"
        )
    for owner, fingerprint in _known_fingerprints(path, run):
        if fingerprint != tokenizer.fingerprint:
            raise RequestError(
                f"tokenizer {tokenizer.path} (fingerprint {tokenizer.fingerprint[:12]}) is not the checkpoint's: "
                f"{owner} has fingerprint {fingerprint[:12]}; give that one, or none"
            )


def _known_fingerprints(path: Path, run: dict[str, Any]) -> list[tuple[str, str]]:
    """Fingerprints of the checkpoint's tokenizer: of its file and of the data it was trained on."""
    known = [(str(file), Tokenizer(file).fingerprint) for file in _tokenizer_files(path, run)]
    for source in run.get("data", {}).get("train", []):
        try:
            known.append((f"dataset {source['path']}", read_description(source["path"]).tokenizer))
        except FlmError:  # the data is not on this machine
            continue
    return known
