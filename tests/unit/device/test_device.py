"""The device seam: the CPU answers what the engine asks of CUDA."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from flm_megatron.device import current

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the adapter is for machines without CUDA")


def test_current_is_cached_and_names_a_backend() -> None:
    device = current()
    assert current() is device
    assert (device.name, device.backend) in {("cpu", "gloo"), ("cuda", "nccl")}
    assert device.torch_device.type == device.name


@on_cpu
def test_requests_for_cuda_are_answered_by_the_cpu() -> None:
    current().prepare()
    current().prepare()
    made = [torch.zeros(2, device="cuda"), torch.tensor([1.0], device=torch.device("cuda", 0)), torch.ones(1).cuda()]
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.zeros(1, device="meta").device.type == "meta"
    assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(2).type(torch.int64).dtype is torch.int64


@on_cpu
def test_answers_hold_inside_backward() -> None:
    current().prepare()

    class Doubled(torch.autograd.Function):
        """Asks for CUDA in its backward, as a recomputed layer does."""

        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value * 2

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.full((1,), 2.0, device="cuda")

    value = torch.ones(3, requires_grad=True)
    Doubled.apply(value).sum().backward()
    assert value.grad is not None and value.grad.tolist() == [2.0] * 3


@on_cpu
def test_cuda_random_state_is_the_cpu_generators() -> None:
    current().prepare()
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


@on_cpu
def test_streams_and_events_of_cuda_have_nothing_to_wait_for() -> None:
    current().prepare()
    side = torch.cuda.Stream(device=torch.cuda.current_device())
    with torch.cuda.stream(side):
        value = torch.ones(3, device="cuda") + 1
    side.wait_stream(torch.cuda.current_stream())
    event = side.record_event()
    torch.cuda.default_stream().wait_event(event)
    event.synchronize()
    assert event.query() and side.query() and value.tolist() == [2.0] * 3


@on_cpu
def test_a_device_context_still_reaches_the_factories() -> None:
    """Libraries that build models under `with torch.device("meta")` go on doing so beside the adapter."""
    code = """
        import torch
        from flm_megatron.device import current
        current().prepare()
        with torch.device("meta"):
            print(torch.arange(3).device, torch.empty(2).device, torch.zeros(2, device="cuda").device)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["meta", "meta", "cpu"]


def test_importing_the_package_imports_no_torch() -> None:
    program = "import flm_megatron.device, flm_megatron.device.hardware, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


@on_cpu
def test_peak_memory_follows_the_process_and_can_be_reset() -> None:
    device = current()
    device.reset_peak_memory()
    before = device.peak_memory_gib()
    block = torch.ones(2**27)
    assert device.peak_memory_gib() >= before + 0.3
    del block
    device.reset_peak_memory()
    assert device.peak_memory_gib() <= before + 0.2
    assert device.hardware_name()
