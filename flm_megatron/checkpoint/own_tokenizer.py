"""The tokenizer of a checkpoint: where it is, and whether a given one matches."""

from __future__ import annotations

from pathlib import Path

from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.corpus.description import read_description
from flm_megatron.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_exists, tokenizer_fingerprint, tokenizer_in
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.paths import FilePath


def tokenizer_files(folder: Path | None, manifest: Manifest) -> list[FilePath]:
    """The tokenizers of a checkpoint that exist: named by its run, or in its `folder`. A URL is taken to exist."""
    named = manifest.run.tokenizer
    found: list[FilePath] = [named] if named and tokenizer_exists(named) else []
    own = tokenizer_in(folder) if folder else None
    return [*found, *([str(own)] if own else [])]


def check_tokenizer(
    tokenizer: Tokenizer, model: ModelConfig, where: str, manifest: Manifest, folder: Path | None = None
) -> None:
    """Check `tokenizer` against what is known of the one that a checkpoint of `model` was trained with.

    `where` names the checkpoint in errors, `folder` is its folder.

    Raises:
        RequestError: it has another number of ids, or is another file. Fewer ids are right where more than its path
            says that it is the tokenizer of the model, whose embedding was rounded up.
    """
    known, most = _known_fingerprints(folder, manifest), model.vocab_size or 0
    sure = [found for owner, found in known if owner != manifest.run.tokenizer or Path(owner).parent == folder]
    if tokenizer.vocab_size > most or (tokenizer.vocab_size < most and tokenizer.fingerprint not in sure):
        raise RequestError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model of {where} has {model.vocab_size}: "
            "give the tokenizer that the checkpoint was trained with"
        )
    for owner, fingerprint in known:
        if fingerprint != tokenizer.fingerprint:
            raise RequestError(
                f"tokenizer {tokenizer.path} (fingerprint {tokenizer.fingerprint[:12]}) is not the one that {where} "
                f"was trained with: {owner} has fingerprint {fingerprint[:12]}"
            )


def tokenizer_to_export(
    given: FilePath | None, model: ModelConfig, folder: Path, manifest: Manifest
) -> tuple[FilePath | None, str]:
    """The tokenizer to write beside the weights of the checkpoint in `folder`; if there is none, why not.

    It is the `given` one, or else the first of the checkpoint's own files that still matches.

    Raises:
        RequestError: the one given is not the checkpoint's.
    """
    if given is not None:
        check_tokenizer(open_tokenizer(given), model, str(folder), manifest, folder)
        return given, ""
    reasons = []
    for file in tokenizer_files(folder, manifest):
        try:
            check_tokenizer(open_tokenizer(file), model, str(folder), manifest, folder)
            return file, ""
        except FlmError as error:
            reasons.append(str(error))
    return None, "; ".join(reasons) or "the checkpoint names none: give --tokenizer"


def _known_fingerprints(folder: Path | None, manifest: Manifest) -> list[tuple[str, str]]:
    """Known fingerprints and their sources: the manifest, or else files and training data, which may have changed."""
    if recorded := manifest.tokenizer_sha256:
        return [("its manifest", recorded)]
    files = [(str(file), tokenizer_fingerprint(file)) for file in tokenizer_files(folder, manifest)]
    known = [(name, fingerprint) for name, fingerprint in files if fingerprint]
    for path in manifest.run.train:
        try:
            known.append((f"dataset {path}", read_description(path).tokenizer))
        except FlmError:  # the data is not on this machine
            continue
    return known
