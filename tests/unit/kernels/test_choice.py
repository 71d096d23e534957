"""Which implementation runs: `auto` by what is there, a name or an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from flm_megatron import kernels
from flm_megatron.config.schema import KernelsConfig
from flm_megatron.errors import RequestError
from flm_megatron.kernels import backends
from flm_megatron.kernels.registry import OPERATIONS

pytestmark = pytest.mark.usefixtures("choice_of_before")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let exactly the given modules seem installed."""

    def install(*modules: str) -> None:
        def find(name: str) -> Any:
            return ModuleSpec(name, None) if name in modules else None

        monkeypatch.setattr(backends, "find_spec", find)

    return install


APEX = ("apex", "amp_C", "fused_layer_norm_cuda")


def test_a_cpu_runs_pytorch_whatever_is_installed(installed: Callable[..., None]) -> None:
    installed("triton", "transformer_engine", *APEX)
    assert set(kernels.choose(device="cpu").names.values()) == {"torch"}


def test_a_gpu_takes_the_best_that_is_there(installed: Callable[..., None]) -> None:
    installed("triton")
    names = kernels.choose(device="cuda").names
    assert {operation for operation, name in names.items() if name == "torch"} == {
        "adamw",
        "grad_clip",
        "weight_gradient",
    }
    assert set(names.values()) == {"triton", "torch"}
    installed("triton", *APEX)
    assert kernels.choose(device="cuda").names["adamw"] == "apex"
    installed("triton", "transformer_engine", *APEX)
    names = kernels.choose(device="cuda").names
    assert names["adamw"] == names["grad_clip"] == "te"
    assert names["rms_norm"] == "apex" and names["swiglu"] == "triton" and names["weight_gradient"] == "torch"
    installed("triton", *APEX, "fused_weight_gradient_mlp_cuda")
    assert kernels.choose(device="cuda").names["weight_gradient"] == "apex"
    installed()
    assert set(kernels.choose(device="cuda").names.values()) == {"torch"}


def test_apex_of_pypi_is_not_apex(installed: Callable[..., None]) -> None:
    installed("apex")
    assert "apex" not in kernels.choose(device="cuda").names.values()


def test_a_name_is_obeyed(installed: Callable[..., None]) -> None:
    installed("triton")
    names = kernels.choose(KernelsConfig(swiglu="torch", adamw="triton"), device="cuda").names
    assert names["swiglu"] == "torch" and names["adamw"] == "triton"


@pytest.mark.parametrize(
    ("config", "device", "words"),
    [
        (KernelsConfig(swiglu="te"), "cuda", "kernels.swiglu: there is no te implementation.*triton, torch"),
        (KernelsConfig(adamw="te"), "cuda", "kernels.adamw: te cannot run here: transformer_engine cannot be imported"),
        (KernelsConfig(rms_norm="apex"), "cuda", "amp_C"),
        (KernelsConfig(weight_gradient="apex"), "cuda", "weight_gradient: apex cannot run here: .*weight_gradient_mlp"),
        (KernelsConfig(rotary="triton"), "cuda", "kernels.rotary: triton cannot run here: triton cannot be imported"),
    ],
)
def test_what_is_asked_for_and_not_there_is_an_error(
    config: KernelsConfig, device: str, words: str, installed: Callable[..., None]
) -> None:
    installed()
    with pytest.raises(RequestError, match=words):
        kernels.choose(config, device)


def test_apex_is_refused_where_the_engine_takes_transformer_engine(installed: Callable[..., None]) -> None:
    installed("transformer_engine", *APEX)
    with pytest.raises(RequestError, match="adamw: apex cannot run here: megatron-core takes Transformer"):
        kernels.choose(KernelsConfig(adamw="apex"), "cuda")


def test_triton_on_a_cpu_is_an_error(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RequestError, match="Triton needs a GPU"):
        kernels.choose(KernelsConfig(rms_norm="triton"), "cpu")


def test_apex_gives_way_under_masks_only_where_it_was_not_asked_for(installed: Callable[..., None]) -> None:
    installed("triton", *APEX)
    x, weight = torch.ones(2, 4, device="meta"), torch.ones(4, device="meta")
    kernels.use(kernels.choose(KernelsConfig(rms_norm="apex"), "cuda"))
    with pytest.raises(RequestError, match="apex takes no mask"):
        kernels.rms_norm(x, weight, 1e-5, mask=weight)
    automatic = kernels.choose(device="cuda")
    assert automatic.beyond_plain == {"rms_norm": "triton"}
    assert "apex (triton under masks): rms_norm" in automatic.describe()


@pytest.fixture
def norms_of_apex(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What an Apex that is put in place was asked to normalise."""
    seen: list[torch.Tensor] = []

    def fused_rms_norm_affine(x: torch.Tensor, weight: torch.Tensor, shape: torch.Size, eps: float) -> torch.Tensor:
        seen.append(x)
        return torch.nn.functional.rms_norm(x, shape, weight, eps)

    module = SimpleNamespace(fused_rms_norm_affine=fused_rms_norm_affine)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", ModuleType("apex.normalization"))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", module)
    return seen


def test_apex_normalises_a_sum_only_where_it_was_asked_for(
    installed: Callable[..., None], norms_of_apex: list[torch.Tensor]
) -> None:
    installed(*APEX)
    x, weight = torch.ones(2, 4, device="meta"), torch.ones(4, device="meta")
    kernels.use(kernels.choose(KernelsConfig(rms_norm="apex"), "cuda"))
    assert kernels.add_rms_norm(x, x, weight, 1e-5)[1] is norms_of_apex[0]
    kernels.use(kernels.choose(device="cuda"))
    kernels.add_rms_norm(x, x, weight, 1e-5)
    assert len(norms_of_apex) == 1
    assert kernels.rms_norm(x, weight, 1e-5).shape == x.shape and norms_of_apex[1] is x


def test_a_run_file_chooses_every_operation() -> None:
    assert set(OPERATIONS) == {field.name for field in fields(KernelsConfig)} - {"head_and_loss"}
    assert {name for operation in OPERATIONS.values() for name in operation.implementations} == set(backends.MODULES)


def test_the_log_line_names_every_operation(installed: Callable[..., None]) -> None:
    installed()
    choice = kernels.choose(KernelsConfig(head_and_loss="fused"), device="cuda")
    assert choice.describe() == f"kernels on cuda: torch: {', '.join(choice.names)}; head and loss: fused"


def test_nothing_needs_triton() -> None:
    """Operations run where importing Triton fails."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from flm_megatron import kernels
x = torch.ones(2, 4, requires_grad=True)
kernels.swiglu(kernels.rms_norm(x, torch.ones(4), 1e-5)).sum().backward()
print(kernels.current().describe())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kernels on c") and "triton" not in done.stdout
