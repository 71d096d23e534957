"""The model that a checkpoint records, and whether its tensors are that model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region, TensorInfo, split_name
from flm_megatron.checkpoint.megatron_legacy.arguments import model_from_arguments
from flm_megatron.checkpoint.own_tokenizer import tokenizer_files
from flm_megatron.checkpoint.stage_manifest import manifest_model
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.config.schema import ModelConfig
from flm_megatron.data.tokenizer import open_tokenizer
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import EMBEDDING, parameter_specs


def recorded_model(checkpoint: LogicalCheckpoint, vocab_size: int | None = None) -> ModelConfig | None:
    """The model that a checkpoint records; none if it records none.

    Ours record it in the manifest, Hugging Face folders in `config.json`, Megatron-LM's in their arguments.
    `vocab_size` is the true vocabulary if that is not recorded.
    """
    if (recorded := manifest_model(checkpoint.manifest)) is not None:
        return recorded
    if isinstance(config := getattr(checkpoint, "config", None), ModelConfig):
        return config
    if isinstance(checkpoint, TorchDistCheckpoint):
        arguments = (checkpoint.common_state() or {}).get("args")
        return None if arguments is None else model_from_arguments(arguments, str(checkpoint.path), vocab_size)
    return None


def model_of(checkpoint: LogicalCheckpoint, vocab_size: int | None = None) -> ModelConfig | None:
    """`recorded_model`, with `vocab_size` as given on the command line.

    Raises:
        RequestError: the checkpoint records another vocabulary than the one asked for, or its tokenizer has more ids.
    """
    model = recorded_model(checkpoint, vocab_size)
    if model is None or vocab_size is None:
        return model
    folder = getattr(checkpoint, "path", None)
    if model.vocab_size != vocab_size:
        raise RequestError(
            f"--vocab-size is {vocab_size}, but {folder} records a vocabulary of {model.vocab_size}: leave the option "
            "out, it is for checkpoints that are padded and do not record their vocabulary"
        )
    for file in tokenizer_files(folder, checkpoint.manifest):
        if (ids := open_tokenizer(file).vocab_size) > vocab_size:
            raise RequestError(f"--vocab-size is {vocab_size}, but the checkpoint's tokenizer {file} has {ids} ids")
    return model


def required_model(checkpoint: LogicalCheckpoint, where: str, vocab_size: int | None = None) -> ModelConfig:
    """The model that a checkpoint records. Raises RequestError, naming `where` it is, if it records none."""
    model = model_of(checkpoint, vocab_size)
    if model is None:
        raise RequestError(f"{where} does not say what model it is of, which this needs")
    return model


def check_structure(tensors: Mapping[str, TensorInfo], model: ModelConfig, where: str) -> None:
    """Raise RequestError, naming the tensor, unless `tensors` are exactly the model's, with or without optimizer."""
    specs = parameter_specs(model)
    prefixes = ["", *(prefix for prefix in STATE_PREFIXES if any(name.startswith(prefix) for name in tensors))]
    wanted = {
        prefix + name: spec.shape for prefix in prefixes for name, spec in specs.items() if spec.trained or not prefix
    }
    for name, shape in wanted.items():
        if name not in tensors:
            raise RequestError(f"{where}: the configured model has a tensor {name}, the checkpoint has not")
        if tuple(tensors[name].shape) != tuple(shape):
            raise RequestError(f"{where}: {name} has shape {tensors[name].shape}, the configuration asks for {shape}")
    for name in tensors:
        if name not in wanted:
            raise RequestError(f"{where}: {name} is not a tensor of the configured model")


class TrueVocabulary(LogicalCheckpoint):
    """`source`, of `model`, without the padding rows of its embedding and head (and their optimizer state)."""

    def __init__(self, source: LogicalCheckpoint, model: ModelConfig) -> None:
        self.source, self.vocab_size = source, int(model.vocab_size or 0)
        self._padded = {name for name, spec in parameter_specs(model).items() if spec.padded}
        self.manifest = source.manifest
        self.tensors = {name: self._info(name) for name in source.tensors}

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of `region` of shape `region.sizes`; see `LogicalCheckpoint.read`."""
        if name not in self.tensors:
            return self.source.read(name, region)
        return self.source.read(name, region or Region.whole(self.tensors[name].shape))

    def has_optimizer(self) -> bool:
        """Whether masters and moments are there; raises whatever the source raises."""
        return self.source.has_optimizer()

    def _info(self, name: str) -> TensorInfo:
        info = self.source.tensors[name]
        if split_name(name)[1] not in self._padded:
            return info
        if info.shape[0] < self.vocab_size:
            raise RequestError(f"{name} has {info.shape[0]} rows, fewer than the vocabulary of {self.vocab_size}")
        return TensorInfo((self.vocab_size, *info.shape[1:]), info.dtype)


def without_padding(checkpoint: LogicalCheckpoint, model: ModelConfig) -> LogicalCheckpoint:
    """`checkpoint` without vocabulary padding of `model`; `checkpoint` itself if it has none."""
    rows = checkpoint.tensors[EMBEDDING].shape[0] if EMBEDDING in checkpoint.tensors else model.vocab_size
    return checkpoint if rows == model.vocab_size else TrueVocabulary(checkpoint, model)
