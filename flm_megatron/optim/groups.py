"""Parameter groups: which parameters share a learning rate and a weight decay.

There are three, in every stage and on every rank: `matrix` (learning rate of matrices, decay), `vocabulary`
(embedding and head: learning rate of vectors, decay) and `vector` (norms and biases: learning rate of vectors,
no decay). A parameter's group follows from its kind in the table of logical parameters. Parameters that are not to
learn make a fourth group, `frozen`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from flm_megatron.model.parameters import Kind, ParameterSpec

Group = Literal["matrix", "vocabulary", "vector", "frozen"]

GROUP_OF_KIND: dict[Kind, Group] = {
    "matrix": "matrix",
    "embedding": "vocabulary",
    "head": "vocabulary",
    "norm": "vector",
    "bias": "vector",
}
DECAYED: frozenset[Group] = frozenset({"matrix", "vocabulary"})

_WRAPPERS = re.compile(r"^.*?(?=\b(?:embedding|decoder|output_layer)\.)")
_LAYER_NUMBER = re.compile(r"^decoder\.layers\.\d+\.")


def logical_name(engine_name: str) -> str:
    """Logical name of a parameter from its name in the engine's module tree.

    Wrappers' prefixes (`module.`) and the layer's number go; the norms before attention and feed-forward carry
    the names they have inside the linear layers that Transformer Engine fuses them with.
    """
    name = _LAYER_NUMBER.sub("decoder.layers.", _WRAPPERS.sub("", engine_name))
    name = name.replace("layers.input_layernorm.", "layers.self_attention.linear_qkv.layer_norm_")
    return name.replace("layers.pre_mlp_layernorm.", "layers.mlp.linear_fc1.layer_norm_")


def parameter_group(engine_name: str, specs: Mapping[str, ParameterSpec]) -> Group:
    """Group of the parameter that the engine calls `engine_name`; `specs` is the table of logical parameters.

    Raises:
        KeyError: the table has no such parameter, so nothing says how it should learn.
    """
    name = logical_name(engine_name)
    if name not in specs:
        raise KeyError(f"parameter {engine_name!r} is not in the table of logical parameters (as {name!r})")
    return GROUP_OF_KIND[specs[name].kind]


def learning_rate_scales(specs: Mapping[str, ParameterSpec]) -> dict[Group, float]:
    """Factor on the learning rate of each group (muP: 1/m for matrices), from the table of logical parameters."""
    scales: dict[Group, float] = {}
    for spec in specs.values():
        group = GROUP_OF_KIND[spec.kind]
        assert scales.setdefault(group, spec.lr_scale) == spec.lr_scale, f"group {group} has two scales"
    return scales
