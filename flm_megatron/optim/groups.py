"""Parameter groups: which parameters share a learning rate and a weight decay.

There are three, in every stage and on every rank: `matrix` (learning rate of matrices, decay), `vocabulary`
(embedding and head: learning rate of vectors, decay) and `vector` (norms and biases: learning rate of vectors,
no decay). A parameter's group follows from its kind in the table of logical parameters. Parameters that are not to
learn make a fourth group, `frozen`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from flm_megatron.model.parameters import Kind, ParameterSpec
from flm_megatron.model.parameters.names import logical_name

Group = Literal["matrix", "vocabulary", "vector", "frozen"]

GROUP_OF_KIND: dict[Kind, Group] = {
    "matrix": "matrix",
    "embedding": "vocabulary",
    "head": "vocabulary",
    "norm": "vector",
    "bias": "vector",
}
DECAYED: frozenset[Group] = frozenset({"matrix", "vocabulary"})


def parameter_group(module_name: str, specs: Mapping[str, ParameterSpec]) -> Group:
    """Group of the parameter of that name in the module tree; `specs` is the table of logical parameters.

    Raises:
        KeyError: the table has no such parameter, so nothing says how it should learn.
    """
    name = logical_name(module_name, specs)
    if name not in specs:
        raise KeyError(f"parameter {module_name!r} is not in the table of logical parameters (as {name!r})")
    return GROUP_OF_KIND[specs[name].kind]


def learning_rate_scales(specs: Mapping[str, ParameterSpec]) -> dict[Group, float]:
    """Factor on the learning rate of each group (muP: 1/m for matrices), from the table of logical parameters."""
    scales: dict[Group, float] = {}
    for spec in specs.values():
        group = GROUP_OF_KIND[spec.kind]
        assert scales.setdefault(group, spec.lr_scale) == spec.lr_scale, f"group {group} has two scales"
    return scales
