"""Whether torch can add products of bf16 matrices to fp32 ones is found out, and done without where it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flm_megatron import kernels
from flm_megatron.device.cpu import CpuDevice
from flm_megatron.kernels import weight_gradient
from flm_megatron.kernels.weight_gradient import reference

HOST, META = torch.device("cpu"), torch.device("meta")


def recent(total: Tensor, first: Tensor, second: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """What torch 2.10 does on a GPU."""
    return out.copy_(total + first.to(out_dtype) @ second.to(out_dtype))


def without_the_argument(*arguments: Tensor, out: Tensor) -> Tensor:
    """What torch 2.7 has."""
    raise AssertionError("never called: the argument comes first")


def strict(total: Tensor, first: Tensor, second: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """What torch 2.8 says."""
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16\nand more")


def forgetful(total: Tensor, first: Tensor, second: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """A product that overwrites the sum."""
    return out.copy_(first.to(out_dtype) @ second.to(out_dtype))


def rounding(total: Tensor, first: Tensor, second: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """A sum in bf16."""
    return out.copy_(torch.addmm_of_torch(total.bfloat16(), first, second))  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def probed_anew() -> None:
    reference.obstacle.cache_clear()


@pytest.mark.parametrize(
    ("addmm", "said"),
    [
        (recent, None),
        (without_the_argument, "TypeError: "),
        (strict, "RuntimeError: self and mat2 must have the same dtype, but got Float and BFloat16"),
        (forgetful, "wrong values"),
        (rounding, "wrong values"),
    ],
)
def test_torch_is_tried_once(addmm: Callable[..., Tensor], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "addmm_of_torch", torch.addmm, raising=False)
    monkeypatch.setattr(torch, "addmm", addmm)
    found = reference.obstacle(HOST, torch.bfloat16)
    assert found is None if said is None else said in str(found) and "\n" not in str(found)
    monkeypatch.setattr(torch, "addmm", recent if said else strict)
    assert reference.obstacle(HOST, torch.bfloat16) == found


class Operations(TorchDispatchMode):
    """Names of the operations that write to a buffer or multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("reason", "expected"), [(None, ["addmm.dtype_out"]), ("old", ["mm.default", "add_.Tensor"])])
def test_without_it_the_product_is_added_in_a_second_pass(
    reason: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "obstacle", lambda device, dtype: reason)
    total = torch.empty(6, 4, device=META)
    rows, grad = (torch.empty(5, width, device=META, dtype=torch.bfloat16) for width in (4, 6))
    with Operations() as operations:
        reference.add_(total, rows, grad)
    assert [name.removeprefix("aten.") for name in operations.names if not name.startswith("aten.t.")] == expected


class Elsewhere(CpuDevice):
    """A device other than the CPU, as far as the probe is asked."""

    @property
    def torch_device(self) -> torch.device:
        return META


@pytest.mark.parametrize("reason", [None, "TypeError: no out_dtype"])
def test_the_log_says_so_in_one_line(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.weight_gradient_notice() is None
    monkeypatch.setattr(weight_gradient, "current_device", Elsewhere)
    monkeypatch.setattr(reference, "obstacle", lambda device, dtype: reason)
    notice = kernels.weight_gradient_notice()
    assert notice is None if reason is None else f"torch {torch.__version__}" in notice and reason in notice  # type: ignore[operator]
