"""Which implementation each operation runs: Transformer Engine's, Apex's, a Triton kernel or plain PyTorch.

The run file names one for each operation or leaves it to `auto`, which takes the first of the operation's rows that
can run. Plain PyTorch is the reference of all others, runs everywhere, and is what `auto` takes on a CPU. What was
asked for by name and cannot run is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

from flm_megatron.config.schema import KernelsConfig, StageConfig
from flm_megatron.device import current as current_device
from flm_megatron.errors import RequestError
from flm_megatron.kernels.backends import interpreted, missing
from flm_megatron.kernels.registry import OPERATIONS, Operation

if TYPE_CHECKING:
    from torch import Tensor

Functions = TypeVar("Functions")


@dataclass(frozen=True)
class Choice:
    """The implementation of each operation on one kind of device.

    `beyond_plain` names, for the operations whose implementation was chosen by `auto` and computes the bare operation
    alone, what runs where a call asks for more (a mask, a factor, a sum). `head_and_loss` says whether the head's
    product and the loss are one.
    """

    device: str
    names: dict[str, str]
    beyond_plain: dict[str, str]
    head_and_loss: str = "auto"

    def engine_calls(self, operation: str) -> bool:
        """Whether megatron-core calls the implementation of `operation` by itself: a library's."""
        return OPERATIONS[operation].implementations[self.names[operation]].load is None

    def describe(self) -> str:
        """One line for the log."""
        groups: dict[str, list[str]] = {}
        for operation, name in self.names.items():
            other = self.beyond_plain.get(operation)
            groups.setdefault(f"{name} ({other} under masks)" if other else name, []).append(operation)
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
    names, beyond_plain = {}, {}
    # In the order of the run file's fields.
    for operation in (OPERATIONS[field.name] for field in fields(KernelsConfig) if field.name != "head_and_loss"):
        asked, rows = getattr(config, operation.name), operation.implementations
        if asked != "auto":
            _check(operation, asked, device)
            names[operation.name] = asked
            continue
        runnable = [name for name in rows if not operation.obstacle(name, device)]
        names[operation.name] = best = runnable[0] if device != "cpu" else "torch"
        if rows[best].plain_only:
            beyond_plain[operation.name] = next(name for name in runnable if not rows[name].plain_only)
    return Choice(device, names, beyond_plain, config.head_and_loss)


def use(choice: Choice) -> None:
    """Let all operations of this process run as `choice` says, from now on."""
    global _current
    _current = choice


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Let all operations run as `choice` says while the block does, and then as before."""
    global _current
    before, _current = _current, choice
    try:
        yield
    finally:
        _current = before


def current() -> Choice:
    """The choice of this process; all `auto` until `use` was called."""
    global _current
    if _current is None:
        _current = choose()
    return _current


_current: Choice | None = None


def implementation(operation: Operation[Functions], tensor: Tensor, plain: bool = True) -> Functions:
    """What runs `operation` on `tensor`; `plain` says that the call asks for the bare operation alone.

    Kernels are for the device's own tensors of at most 32 bits: what is checked in float64, or on the host of a
    GPU, runs in PyTorch.
    """
    choice = current()
    name = choice.names[operation.name]
    if not plain:
        name = choice.beyond_plain.get(operation.name, name)
    for_host = interpreted() or (name == "compile" and choice.device == "cpu") or choice.device == "rehearsed"
    if tensor.element_size() > 4 or (tensor.device.type == "cpu" and not for_host):
        name = "torch"
    return operation.load(name)


def _check(operation: Operation[Functions], asked: str, device: str) -> None:
    offered = operation.implementations
    if asked not in offered:
        raise RequestError(
            f"kernels.{operation.name}: there is no {asked} implementation; give auto or one of {', '.join(offered)}"
        )
    reason = operation.obstacle(asked, device)
    if not reason and asked == "apex" and "te" in offered and not operation.obstacle("te", device):
        reason = "megatron-core takes Transformer Engine's where both are installed"
    if reason:
        raise RequestError(f"kernels.{operation.name}: {asked} cannot run here: {reason}; give auto or torch")


def require_transformer_engine(stage: StageConfig) -> None:
    """Check that the stage's layers can be built from Transformer Engine's modules, if they are to be.

    Raises:
        RequestError: it is not installed, or has no such positions or residual.
    """
    if not stage.transformer_engine:
        return
    if missing("te"):
        raise RequestError(
            f"stage {stage.name!r} asks for transformer_engine, which is not installed; "
            "install flm_megatron[te] or set transformer_engine to false"
        )
    if stage.model.position == "xpos":
        raise RequestError(
            f"stage {stage.name!r}: transformer_engine has no xpos positions; set transformer_engine to false"
        )
    if stage.model.parallel_residual:
        raise RequestError(
            f"stage {stage.name!r}: transformer_engine has no parallel_residual; set transformer_engine to false"
        )
