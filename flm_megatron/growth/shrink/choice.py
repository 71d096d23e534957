"""Chooses the units that a smaller model keeps, by their importance."""

from __future__ import annotations

import math

import numpy as np
import torch

from flm_megatron.config.schema import ModelConfig, ShrinkConfig
from flm_megatron.errors import RequestError
from flm_megatron.growth.shrink.importance import Criterion, Dimension, Importance, tensor_shapes
from flm_megatron.growth.shrink.plan import Kept, ShrinkPlan, shrunk_model
from flm_megatron.growth.shrink.rules import check_shrinking, smaller_dimensions
from flm_megatron.json_text import JsonObject

GOLDEN = (math.sqrt(5) - 1) / 2


def make_shrink_plan(
    old: ModelConfig, new: ModelConfig, shrink: ShrinkConfig, importance: Importance, stage: str
) -> ShrinkPlan:
    """The plan that cuts the configured `new` out of `old`, the model as it was trained, whose `importance` it is.

    Raises:
        RequestError: `new` cannot be cut out of `old`, or the importance was measured by other criteria.
    """
    check_shrinking(old, new)
    check_criteria(old, new, shrink, importance)
    layers = largest(importance.layers.numpy()[None], new.num_layers)
    hidden = largest(importance.hidden.numpy()[None], new.hidden_size)
    scales = _norm_scales(importance, hidden[0], layers[0], new) if shrink.rescale_norms else ()
    return ShrinkPlan(
        stage=stage,
        old=old,
        new=shrunk_model(old, new, scales),
        hidden=Kept.of(hidden),
        ffn=Kept.of(largest(importance.ffn.numpy()[layers[0]], new.ffn_hidden_size)),
        heads=Kept.of(_heads(importance.heads.numpy()[layers[0]], old, new)),
        layers=Kept.of(layers),
        criteria=wanted_criteria(shrink),
        rescale_norms=shrink.rescale_norms,
        norm_scales=scales,
        importance_of=importance.source_hash,
    )


def wanted_criteria(shrink: ShrinkConfig) -> dict[Dimension, Criterion]:
    """The criterion of each dimension."""
    return {"hidden": shrink.hidden, "ffn": shrink.ffn, "heads": shrink.heads, "layers": shrink.layers}


def check_criteria(old: ModelConfig, new: ModelConfig, shrink: ShrinkConfig, importance: Importance) -> None:
    """Check that what is dropped was measured by the criterion that the run file asks for. Raises RequestError."""
    wanted = wanted_criteria(shrink)
    for name in smaller_dimensions(old, new):
        if (found := importance.criteria.get(name)) != wanted[name]:
            raise RequestError(
                f"shrink.{name} is `{wanted[name]}`, but the importance of {name} was measured by `{found}`: measure "
                "it anew, or ask for the other"
            )


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Which entries of each row [rows, n] are among its `count` largest; of equal ones those of lower index."""
    kept = np.zeros(scores.shape, dtype=bool)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    np.put_along_axis(kept, order, True, axis=1)
    return kept


def _heads(scores: np.ndarray, old: ModelConfig, new: ModelConfig) -> np.ndarray:
    """Which query heads [layers, heads] are kept: those of the best groups, and within each its best ones."""
    per_group = old.num_attention_heads // old.query_groups
    by_group = scores.reshape(len(scores), old.query_groups, per_group)
    groups = largest(by_group.sum(axis=2), new.query_groups)
    heads = largest(by_group.reshape(-1, per_group), new.num_attention_heads // new.query_groups)
    return (heads.reshape(by_group.shape) & groups[:, :, None]).reshape(scores.shape)


def _norm_scales(importance: Importance, hidden: np.ndarray, layers: np.ndarray, new: ModelConfig) -> tuple[float, ...]:
    """Factors on the norms' weights, with which the mean square of the kept channels is taken for that of all.

    A norm divides by the root of the mean square over channels: of sums E_kept and E, over d_new and d_old channels.
    """
    norms = [2 * layer + place for layer in np.flatnonzero(layers) for place in (0, 1)]
    norms.append(2 * len(layers))
    energy = importance.energy.numpy()
    wider = energy.shape[1] / new.hidden_size
    return tuple(_norm_scale(energy[norm], hidden, wider) for norm in norms)


def _norm_scale(energy: np.ndarray, hidden: np.ndarray, wider: float) -> float:
    """Sums are exact: on every machine the same bits. A norm that reads nothing stays as it is."""
    kept, total = math.fsum(energy[hidden].tolist()), math.fsum(energy.tolist())
    return math.sqrt(kept / total * wider) if kept > 0 else 1.0


def unmeasured_importance(model: ModelConfig, shrink: ShrinkConfig) -> Importance:
    """Stands for a measured importance where nothing is read: what it keeps is spread evenly over the units."""
    spread: JsonObject = {  # numbers in [0, 1) of which any few neighbours are far apart
        name: (torch.arange(math.prod(shape), dtype=torch.float64) * GOLDEN).frac().view(shape)
        for name, shape in tensor_shapes(model).items()
    }
    return Importance(model, **spread, criteria=wanted_criteria(shrink), samples=0, tokens=0)
