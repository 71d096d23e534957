"""Describes a checkpoint as plain data and as text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flm_megatron.checkpoint.described import model_of
from flm_megatron.checkpoint.logical import STATE_PREFIXES, LogicalCheckpoint, Region
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.config.schema import ModelConfig
from flm_megatron.distributed.processes import Processes

CHUNK_VALUES = 2 * 2**20
SHOWN = ("stage", "step", "tokens", "samples", "optimizer_step", "layout", "logical_hash", "weights_hash")


def describe(checkpoint: LogicalCheckpoint, vocab_size: int | None = None) -> dict[str, Any]:
    """A checkpoint's contents: its position in its run, its model, and every tensor's shape, dtype and bytes."""
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "bytes": math.prod(info.shape) * info.dtype.itemsize,
        }
        for name, info in checkpoint.tensors.items()
    }
    manifest = checkpoint.manifest
    recorded = {
        **manifest.position.to_json(),
        "layout": manifest.layout.saved if manifest.layout else None,
        "logical_hash": manifest.logical_hash or None,
        "weights_hash": manifest.weights_hash or None,
    }
    weights = [name for name in tensors if not name.startswith(STATE_PREFIXES)]
    model = model_of(checkpoint, vocab_size)
    return {
        **{key: value for key, value in recorded.items() if value is not None},
        "model": _plain(model) if model else None,
        "parameters": sum(math.prod(checkpoint.tensors[name].shape) for name in weights),
        "optimizer": len(weights) < len(tensors),
        "bytes": sum(tensor["bytes"] for tensor in tensors.values()),
        "tensors": tensors,
    }


def add_statistics(
    report: dict[str, Any], checkpoint: LogicalCheckpoint, processes: Processes, moved: Callable[[int], None]
) -> None:
    """Add `norm`, `mean`, `std`, `largest` (magnitude) and `finite` to every tensor of a report, on rank 0.

    Tensors are shared over the processes and read in chunks; sums are in float64.
    """
    names = list(checkpoint.tensors)[processes.rank :: processes.size]
    for part in processes.together(lambda: {name: _statistics(checkpoint, name, moved) for name in names}):
        for name, values in part.items():
            report["tensors"][name] |= values


def as_text(report: dict[str, Any]) -> str:
    """A report as lines for a terminal: what it is, then one line for each tensor."""
    lines = [f"{key}: {report[key]}" for key in SHOWN if key in report]
    if report["model"]:
        lines.append("model: " + ", ".join(f"{key} {value}" for key, value in report["model"].items()))
    lines.append(f"parameters: {report['parameters']:,}")
    lines.append(f"optimizer state: {'yes' if report['optimizer'] else 'no'}")
    lines.append(f"bytes: {report['bytes']:,} in {len(report['tensors'])} tensors")
    width = max((len(name) for name in report["tensors"]), default=0)
    for name, tensor in report["tensors"].items():
        statistics = " ".join(f"{key} {tensor[key]:.6g}" for key in ("norm", "mean", "std", "largest") if key in tensor)
        finite = "" if tensor.get("finite", True) else "NOT FINITE"
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        line = f"{name:{width}}  {tensor['dtype']:9} {shape:24} {tensor['bytes']:>16,}  {statistics} {finite}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _statistics(checkpoint: LogicalCheckpoint, name: str, moved: Callable[[int], None]) -> dict[str, Any]:
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
        return dict.fromkeys(("norm", "mean", "std", "largest"), math.nan) | {"finite": False}
    std = math.sqrt(deviations / max(count, 1))
    return {"norm": math.sqrt(squares), "mean": mean, "std": std, "largest": largest, "finite": True}


def _plain(model: ModelConfig) -> dict[str, Any]:
    left_out = ("mup", "from_checkpoint")
    plain = {key: value for key, value in vars(model).items() if key not in left_out and not key.startswith("_")}
    return {**plain, "mup": model.mup.enabled, "base_hidden_size": model.mup.base_hidden_size}
