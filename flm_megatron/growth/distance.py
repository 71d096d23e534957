"""How close each layer is to the identity: the distance between its input and output on given text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from flm_megatron.checkpoint.logical import LogicalCheckpoint
from flm_megatron.config.schema import ModelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.engine.types import ModelChunk
from flm_megatron.errors import RequestError
from flm_megatron.growth.certificate.forward import Layout, forward_samples, on_one_replica, patient_processes
from flm_megatron.json_text import parse_json

TOKENS = 512
"""Positions whose distances are computed at a time: in float64 they take as much memory as a layer's activations."""


@dataclass(frozen=True)
class LayerDistance:
    """Means over tokens: 1 - cos(input, output), and |output - input| / |input|."""

    cosine: float
    l2: float


def layer_distances(
    checkpoint: LogicalCheckpoint, model: ModelConfig, stage: StageConfig, tokens: torch.Tensor, layout: Layout
) -> list[LayerDistance]:
    """Distance of each layer of `model`, first to last, on `tokens` [samples, sequence]; the same on every rank.

    Runs on all processes of the world, on one replica under the stage's layout and in its precision.
    """
    found = on_one_replica(checkpoint, model, stage, layout, partial(_distances, model.num_layers, tokens))
    return patient_processes().on_first(lambda: found) or []


def _distances(num_layers: int, tokens: torch.Tensor, chunks: Sequence[ModelChunk]) -> list[LayerDistance]:
    """The distances, on every rank of one replica."""
    sums = torch.zeros(num_layers, 3, dtype=torch.float64, device=current().torch_device)
    handles = watch_layers(chunks, sums)
    forward_samples(chunks, tokens, lambda sample, logits: None)
    for handle in handles:
        handle.remove()
    # A token that several ranks hold is counted by each of them, in the sum and in the count.
    dist.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    means = sums[:, :2] / sums[:, 2:]
    return [LayerDistance(cosine, l2) for cosine, l2 in means.tolist()]


def distances_of(found: list[LayerDistance], metric: Literal["cosine", "l2"]) -> list[float]:
    """One number per layer, of the configured `growth.distance_metric`."""
    return [getattr(layer, metric) for layer in found]


def distance_table(found: list[LayerDistance]) -> str:
    """The distances as text, ranked by closeness to the identity."""
    order = sorted(range(len(found)), key=lambda i: found[i].cosine)
    rows = [f"{i:5d}  {layer.cosine:10.3e}  {layer.l2:10.3e}  {order.index(i) + 1:5d}" for i, layer in enumerate(found)]
    return "\n".join(["layer      cosine  relative L2   rank", *rows])


def write_distances(found: list[LayerDistance], path: str) -> None:
    """Write the distances as JSON: a list of {cosine, l2}, one per layer."""
    Path(path).write_text(json.dumps([asdict(layer) for layer in found], indent=1) + "\n", encoding="utf-8")


def read_distances(path: str, metric: Literal["cosine", "l2"]) -> list[float]:
    """Distances of one metric from a file of `write_distances`.

    Raises:
        RequestError: the file is missing or holds something else.
    """
    try:
        layers = [LayerDistance(**layer) for layer in parse_json(Path(path).read_bytes(), "it")]
        return [float(value) for value in distances_of(layers, metric)]
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"{path} holds no layer distances ({error}): write them with `flm distance --out`"
        ) from error


def plot_distances(found: list[LayerDistance], path: str) -> None:
    """Plot both distances of every layer; writes a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5), layout="constrained")
    for axis, metric, label in (
        (axes[0], "cosine", "1 - cos(input, output)"),
        (axes[1], "l2", "|output - input| / |input|"),
    ):
        axis.bar(range(len(found)), [getattr(layer, metric) for layer in found])
        axis.set_ylabel(label)
    axes[1].set_xlabel("layer")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def watch_layers(chunks: Sequence[nn.Module], sums: torch.Tensor) -> list[RemovableHandle]:
    """Hooks that add each layer's distances over its tokens to its row of `sums` [layers, 3] float64: the sum of
    1 - cos, that of relative L2 distances, and the number of tokens."""
    from flm_megatron.engine.transformer import TransformerLayer

    def hook(
        layer: TransformerLayer,
        args: tuple[torch.Tensor, ...],
        kwargs: dict[str, torch.Tensor],
        output: tuple[torch.Tensor, ...],
    ) -> None:
        """Add one layer's distances over its tokens."""
        inputs = args[0] if args else kwargs["hidden_states"]
        for before, after in zip(inputs.detach().split(TOKENS), output[0].detach().split(TOKENS), strict=True):
            sums[layer.layer_number - 1] += _summed(before.double(), after.double())

    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)]
    return [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]


def _summed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The row of `sums` that some tokens add."""
    cosine = 1 - F.cosine_similarity(before, after, dim=-1)
    l2 = (after - before).norm(dim=-1) / before.norm(dim=-1)
    return torch.stack([cosine.sum(), l2.sum(), torch.full_like(l2.sum(), cosine.numel())])
