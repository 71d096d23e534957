"""The ways to grow that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WIDTH = "hidden", "ffn", "heads"


@dataclass(frozen=True)
class Arm:
    """Out of which size of SHAPES a run grows, and the `growth` of its run file."""

    small: str
    growth: dict[str, object]
    mask_share: float = 0.2
    """Share of the large stage, of the smallest budget, over which masks open."""
    optimizer: dict[str, object] = field(default_factory=dict)


def _all(operator: str, *dimensions: str) -> dict[str, object]:
    return dict.fromkeys(dimensions, operator)


REJUVENATED = math.sqrt(0.5)
ARMS = {
    "width: mask": Arm("thin", _all("mask", *WIDTH)),
    "width: zero, rejuvenated": Arm("thin", _all("zero", *WIDTH) | {"rejuvenate": REJUVENATED}),
    "width: shrink 0.4": Arm("thin", {"shrink": 0.4}),
    "width: clone, noise 0.1": Arm("thin", _all("clone", *WIDTH) | {"clone_noise": 0.1}),
    "width: clone, noise 1": Arm("thin", _all("clone", *WIDTH) | {"clone_noise": 1.0}),
    "width: ffn and heads, mask": Arm("slim", _all("mask", *WIDTH)),
    "depth: copy": Arm("shallow", {"layers": "copy", "layer_selection": "stack"}),
    "depth: mask beside its source": Arm("shallow", {"layers": "mask", "layer_selection": "interleave"}),
    "depth: mask, stacked": Arm("shallow", {"layers": "mask", "layer_selection": "stack"}),
    "depth: copy, shrink 0.4": Arm("shallow", {"layers": "copy", "layer_selection": "stack", "shrink": 0.4}),
    "depth: copies of one layer": Arm("one", {"layers": "copy", "layer_selection": "stack"}),
    "depth: copy, moments kept": Arm(
        "shallow", {"layers": "copy", "layer_selection": "stack", "optimizer_state": "keep"}
    ),
    "depth: copy beside its source": Arm("shallow", {"layers": "copy", "layer_selection": "interleave"}),
    "depth: copy, rejuvenated": Arm("shallow", {"layers": "copy", "layer_selection": "stack", "rejuvenate": 0.5}),
    "width: mask, rejuvenated": Arm("thin", _all("mask", *WIDTH) | {"rejuvenate": 0.5}),
    "width: mask, new at the scale of the trained": Arm("thin", _all("mask", *WIDTH) | {"new_scale": "trained"}),
    "width: shrink 0.2": Arm("thin", {"shrink": 0.2}),
    "width: shrink 0.6": Arm("thin", {"shrink": 0.6}),
    "both: shrink 0.4": Arm("small", {"shrink": 0.4, "layers": "copy", "layer_selection": "stack"}),
    "both: mask": Arm("small", _all("mask", *WIDTH, "layers") | {"layer_selection": "interleave"}),
}
