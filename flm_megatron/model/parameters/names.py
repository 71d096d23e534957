"""Names of logical parameters in module trees, where each layer has its own parameters and norms may be own modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from flm_megatron.model.parameters.spec import ParameterSpec

LAYERS = "decoder.layers."
"""Prefix of the names of all parameters in layers; in a module tree the layer's number follows."""

_WRAPPERS = re.compile(r"^.*?(?=\b(?:embedding|decoder|output_layer)\.)")
_LAYER_NUMBER = re.compile(rf"^{re.escape(LAYERS)}(\d+)\.")


def module_names(spec: ParameterSpec, layer: int | None = None) -> tuple[str, ...]:
    """The names that `spec` may have in a module tree, in `layer` if it is stacked: its own name first."""
    names = (spec.name,) if spec.module_name is None else (spec.name, spec.module_name)
    return tuple(name if layer is None else name.replace(LAYERS, f"{LAYERS}{layer}.", 1) for name in names)


def layer_number(module_name: str) -> int | None:
    """The number of the layer that a module or parameter of a module tree lies in; none outside the layers."""
    match = _LAYER_NUMBER.match(_WRAPPERS.sub("", module_name))
    return int(match[1]) if match else None


def logical_name(module_name: str, specs: Mapping[str, ParameterSpec]) -> str:
    """Logical name of a parameter from its name in a module tree; `specs` is the table.

    Wrappers' prefixes (`module.`) and the layer's number go; norms that are modules of their own get the names that
    they have inside the linear layers that Transformer Engine fuses them with.
    """
    name = _LAYER_NUMBER.sub(LAYERS, _WRAPPERS.sub("", module_name))
    return next((spec.name for spec in specs.values() if spec.module_name == name), name)
