"""Which implementation each operation runs: Transformer Engine's, Apex's, a Triton kernel or plain PyTorch.

The run file names one for each operation or leaves it to `auto`, which takes the first of `OFFERED` that is there.
Plain PyTorch is the reference of all others, runs everywhere, and is what `auto` takes on a CPU. What was asked for
by name and cannot run is an error.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from flm_megatron.config.schema import KernelsConfig, StageConfig
from flm_megatron.device import current as current_device
from flm_megatron.errors import RequestError
from flm_megatron.kernels.compiled import compiler_obstacle

if TYPE_CHECKING:
    from torch import Tensor

# What there is for each operation, best first. The optimizers and norms of gradients of Transformer Engine and Apex
# are called by megatron-core, which finds them itself. PyTorch's own update and norms of lists of tensors are single
# kernels too, so the Triton ones run when they are asked for.
OFFERED = {
    "rms_norm": ("apex", "triton", "torch", "compile"),
    "swiglu": ("triton", "torch", "compile"),
    "rotary": ("triton", "torch", "compile"),
    "cross_entropy": ("triton", "torch"),
    "adamw": ("te", "apex", "torch", "triton"),
    "grad_clip": ("te", "apex", "torch", "triton"),
    "fp8_cast": ("triton", "torch"),
    "weight_gradient": ("apex", "torch"),
}
FOLDERS = {
    "rms_norm": "norm",
    "swiglu": "glu",
    "rotary": "rotary",
    "cross_entropy": "loss",
    "adamw": "adam",
    "grad_clip": "clip",
    "fp8_cast": "fp8",
    "weight_gradient": "weight_gradient",
}
FILES = {"torch": "reference", "triton": "triton_kernels", "compile": "compiled", "apex": "apex"}
# The compiled parts are looked for: the package of that name on PyPI is not NVIDIA's Apex.
NEEDS = {
    "te": ("transformer_engine",),
    "apex": ("apex", "amp_C", "fused_layer_norm_cuda"),
    "triton": ("triton",),
    "torch": (),
    "compile": (),
}
# Extensions of Apex that are built apart from the others.
ALSO_NEEDS = {("weight_gradient", "apex"): ("fused_weight_gradient_mlp_cuda",)}
ENGINE_OWNED = ("te", "apex")


@dataclass(frozen=True)
class Choice:
    """The implementation of each operation on one kind of device.

    `plain_only` names the operations whose implementation was chosen by `auto`, knows no mask and no factor, and is
    replaced by that name where one is given. `head_and_loss` says whether the head's product and the loss are one.
    """

    device: str
    names: dict[str, str]
    plain_only: dict[str, str]
    head_and_loss: str = "auto"

    def describe(self) -> str:
        """One line for the log."""
        groups: dict[str, list[str]] = {}
        for operation, name in self.names.items():
            masked = self.plain_only.get(operation)
            groups.setdefault(f"{name} ({masked} under masks)" if masked else name, []).append(operation)
        listed = "; ".join(f"{name}: {', '.join(operations)}" for name, operations in groups.items())
        return f"kernels on {self.device}: {listed}; head and loss: {self.head_and_loss}"


def choose(config: KernelsConfig | None = None, device: str | None = None) -> Choice:
    """Resolve `config` (all `auto` by default) for `device`, `cpu` or `cuda` (by default this process's).

    Raises:
        RequestError: an implementation asked for by name does not exist for its operation, is not installed, or
            does not run on the device.
    """
    device = device or current_device().name
    config = config or KernelsConfig()
    names, plain_only = {}, {}
    for operation in OFFERED:
        asked = getattr(config, operation)
        there = [name for name in OFFERED[operation] if not obstacle(name, device, operation)]
        if asked == "auto":
            names[operation] = there[0] if device != "cpu" else "torch"
        else:
            _check(operation, asked, device)
            names[operation] = asked
        if operation == "rms_norm" and names[operation] == "apex" and asked == "auto":
            plain_only[operation] = next(name for name in there if name != "apex")
    return Choice(device, names, plain_only, config.head_and_loss)


def missing(name: str, operation: str = "") -> list[str]:
    """Modules that implementation `name` (of `operation`) needs and that are not installed."""
    needed = (*NEEDS[name], *ALSO_NEEDS.get((operation, name), ()))
    return [module for module in needed if find_spec(module) is None]


def obstacle(name: str, device: str, operation: str = "") -> str | None:
    """Why implementation `name` (of `operation`) cannot run on `device`; none if it can."""
    if absent := missing(name, operation):
        return f"{' and '.join(absent)} cannot be imported"
    if name == "triton" and device == "cpu" and not interpreted():
        return "Triton needs a GPU (on a CPU only its interpreter runs, with TRITON_INTERPRET=1 set at the start)"
    if name in ENGINE_OWNED and device == "cpu":
        return "it needs a GPU"
    if name == "compile":
        return compiler_obstacle() if device == "cpu" else obstacle("triton", device)
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use(choice: Choice) -> None:
    """Let all operations of this process run as `choice` says, from now on."""
    global _current
    _current = choice


def current() -> Choice:
    """The choice of this process; all `auto` until `use` was called."""
    global _current
    if _current is None:
        _current = choose()
    return _current


_current: Choice | None = None


def implementation(operation: str, tensor: Tensor, masked: bool = False) -> ModuleType:
    """Module that runs `operation` on `tensor`; `masked` says that a mask or a factor is given with it.

    Kernels are for the device's own tensors of at most 32 bits: what is checked in float64, or on the host of a
    GPU, runs in PyTorch.

    Raises:
        RequestError: the implementation asked for by name takes no mask.
    """
    choice = current()
    name = choice.names[operation]
    for_host = interpreted() or (name == "compile" and choice.device == "cpu")
    if name == "torch" or tensor.element_size() > 4 or (tensor.device.type == "cpu" and not for_host):
        return _module(operation, "torch")
    if masked and name == "apex":
        if operation not in choice.plain_only:
            raise RequestError(f"kernels.{operation}: apex takes no mask or factor; give auto, triton or torch")
        name = choice.plain_only[operation]
    return _module(operation, name)


@cache
def _module(operation: str, name: str) -> ModuleType:
    return import_module(f"flm_megatron.kernels.{FOLDERS[operation]}.{FILES[name]}")


def _check(operation: str, asked: str, device: str) -> None:
    if asked not in OFFERED[operation]:
        raise RequestError(
            f"kernels.{operation}: there is no {asked} implementation; give auto or one of "
            f"{', '.join(OFFERED[operation])}"
        )
    reason = obstacle(asked, device, operation)
    if not reason and asked == "apex" and "te" in OFFERED[operation] and not obstacle("te", device):
        reason = "megatron-core takes Transformer Engine's where both are installed"
    if reason:
        raise RequestError(f"kernels.{operation}: {asked} cannot run here: {reason}; give auto or torch")


def require_transformer_engine(stage: StageConfig) -> None:
    """Check that the stage's layers can be built from Transformer Engine's modules, if they are to be.

    Raises:
        RequestError: it is not installed, or has no such positions.
    """
    if not stage.transformer_engine:
        return
    if find_spec("transformer_engine") is None:
        raise RequestError(
            f"stage {stage.name!r} asks for transformer_engine, which is not installed; "
            "install flm_megatron[te] or set transformer_engine to false"
        )
    if stage.model.position == "xpos":
        raise RequestError(
            f"stage {stage.name!r}: transformer_engine has no xpos positions; set transformer_engine to false"
        )
