"""Describes a checkpoint as plain data and as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from flm_megatron.checkpoint.described import model_of
from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.distributed.processes import Processes

CHUNK_VALUES = 2 * 2**20
SHOWN = ("stage", "step", "tokens", "samples", "optimizer_step", "layout", "teacher", "logical_hash", "weights_hash")


@dataclass(frozen=True)
class Statistics:
    """Of a tensor's values; `largest` is a magnitude. Unless all are finite the numbers are NaN."""

    norm: float
    mean: float
    std: float
    largest: float
    finite: bool


@dataclass
class TensorReport:
    """One tensor; its statistics if they were asked for."""

    shape: list[int]
    dtype: str
    bytes: int
    statistics: Statistics | None = None

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        statistics = asdict(self.statistics) if self.statistics else {}
        return {"shape": self.shape, "dtype": self.dtype, "bytes": self.bytes, **statistics}


@dataclass
class Report:
    """A checkpoint's contents. `recorded` is its position in its run, its layout and its hashes, as far as known."""

    recorded: dict[str, object]
    model: dict[str, object] | None
    parameters: int
    optimizer: bool
    bytes: int
    tensors: dict[str, TensorReport]

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return {
            **self.recorded,
            "model": self.model,
            "parameters": self.parameters,
            "optimizer": self.optimizer,
            "bytes": self.bytes,
            "tensors": {name: tensor.to_json() for name, tensor in self.tensors.items()},
        }

    def as_text(self) -> str:
        """As lines for a terminal: what it is, then one line for each tensor."""
        lines = [f"{key}: {self.recorded[key]}" for key in SHOWN if key in self.recorded]
        if self.model:
            lines.append("model: " + ", ".join(f"{key} {value}" for key, value in self.model.items()))
        lines.append(f"parameters: {self.parameters:,}")
        lines.append(f"optimizer state: {'yes' if self.optimizer else 'no'}")
        lines.append(f"bytes: {self.bytes:,} in {len(self.tensors)} tensors")
        width = max((len(name) for name in self.tensors), default=0)
        return "\n".join([*lines, *(_tensor_line(name, tensor, width) for name, tensor in self.tensors.items())])


def describe(checkpoint: LogicalCheckpoint, vocab_size: int | None = None) -> Report:
    """A checkpoint's contents, without statistics."""
    tensors = {
        name: TensorReport(
            shape=list(info.shape),
            dtype=str(info.dtype).removeprefix("torch."),
            bytes=math.prod(info.shape) * info.dtype.itemsize,
        )
        for name, info in checkpoint.tensors.items()
    }
    manifest = checkpoint.manifest
    recorded = {
        **manifest.position.to_json(),
        "layout": manifest.layout.saved if manifest.layout else None,
        "teacher": manifest.teacher.path if manifest.teacher else None,
        "logical_hash": manifest.logical_hash or None,
        "weights_hash": manifest.weights_hash or None,
    }
    weights = [name for name in tensors if not name.startswith(STATE_PREFIXES)]
    model = model_of(checkpoint, vocab_size)
    return Report(
        recorded={key: value for key, value in recorded.items() if value is not None},
        model=_plain(model) if model else None,
        parameters=sum(math.prod(checkpoint.tensors[name].shape) for name in weights),
        optimizer=len(weights) < len(tensors),
        bytes=sum(tensor.bytes for tensor in tensors.values()),
        tensors=tensors,
    )


def add_statistics(
    report: Report, checkpoint: LogicalCheckpoint, processes: Processes, moved: Callable[[int], None]
) -> None:
    """Add statistics to every tensor of a report, on rank 0.

    Tensors are shared over the processes and read in chunks; sums are in float64.
    """
    names = list(checkpoint.tensors)[processes.rank :: processes.size]
    for part in processes.together(lambda: {name: _statistics(checkpoint, name, moved) for name in names}):
        for name, values in part.items():
            report.tensors[name].statistics = values


def _tensor_line(name: str, tensor: TensorReport, width: int) -> str:
    shape = " x ".join(map(str, tensor.shape)) or "scalar"
    line = f"{name:{width}}  {tensor.dtype:9} {shape:24} {tensor.bytes:>16,}"
    if of := tensor.statistics:
        line += f"  norm {of.norm:.6g} mean {of.mean:.6g} std {of.std:.6g} largest {of.largest:.6g}"
        line += "" if of.finite else " NOT FINITE"
    return line


def _statistics(checkpoint: LogicalCheckpoint, name: str, moved: Callable[[int], None]) -> Statistics:
    info = checkpoint.tensors[name]
    count, mean, deviations, squares, largest, finite = 0, 0.0, 0.0, 0.0, 0.0, True
    for region in split_region(Region.whole(info.shape), CHUNK_VALUES):
        values = checkpoint.read(name, region)
        moved(values.nbytes)
        values = values.double()
        finite = finite and bool(torch.isfinite(values).all())
        if not finite or not values.numel():
            continue
        # Mean and sum of squared deviations of two parts from those of each (Chan, Golub, LeVeque 1979).
        part_mean = values.mean().item()
        step, total = part_mean - mean, count + values.numel()
        deviations += (values - part_mean).square().sum().item() + step * step * count * values.numel() / total
        mean += step * values.numel() / total
        count = total
        squares += values.square().sum().item()
        largest = max(largest, values.abs().max().item())
    if not finite:
        return Statistics(math.nan, math.nan, math.nan, math.nan, finite=False)
    std = math.sqrt(deviations / max(count, 1))
    return Statistics(math.sqrt(squares), mean, std, largest, finite=True)


def _plain(model: ModelConfig) -> dict[str, object]:
    left_out = ("mup", "from_checkpoint")
    plain = {key: value for key, value in vars(model).items() if key not in left_out and not key.startswith("_")}
    return {**plain, "mup": model.mup.enabled, "base_hidden_size": model.mup.base_hidden_size}
