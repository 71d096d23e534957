"""Casts to FP8, their products and the layers made of them, against the formats written out in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flm_megatron.config.schema import LoraConfig, ModelConfig, RunConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.device.cuda import CudaDevice
from flm_megatron.distributed.world import one_process
from flm_megatron.errors import RequestError
from flm_megatron.growth.plan import make_plan
from flm_megatron.growth.schedule import mask_plan
from flm_megatron.kernels import fp8
from flm_megatron.launch.preflight import require_installed
from flm_megatron.model.fp8_linear import weights_cast_once
from flm_megatron.model.masks import GrowthMasks
from tests.support.filled_model import filled_model, gradients, seeded_batch
from tests.support.fp8_oracle import FORMATS, dequantized, linear, rounded
from tests.support.growth_cases import grown_weights, growth, trained, weights
from tests.support.reference_model import random_tensors

SCALINGS = ["tensorwise", "rowwise"]
MODEL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, vocab_size=100)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """One process with megatron-core's parallel state."""
    with one_process():
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Values over five orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(3 * torch.randn(*shape, generator=generator))
    return (torch.randn(*shape, generator=generator) * magnitude).to(dtype)


def quantized(x: Tensor, dtype: torch.dtype, scaling: str, transpose: bool = False) -> fp8.Quantized:
    """`fp8.quantize` with one of the two kinds of scales."""
    return fp8.quantize(x, dtype, fp8.largest(x) if scaling == "tensorwise" else None, transpose)


def value(q: fp8.Quantized) -> Tensor:
    """The numbers that are meant, in float64."""
    return q.values.double() * q.scale.double()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_casts_round_to_the_nearest(source: torch.dtype, dtype: torch.dtype, transpose: bool, scaling: str) -> None:
    x = draw(37, 53, dtype=source)
    found = quantized(x, dtype, scaling, transpose)
    matrix = x.t() if transpose else x
    assert found.values.dtype is dtype and found.values.shape == matrix.shape and found.values.is_contiguous()
    expected = dequantized(matrix, dtype, scaling)
    torch.testing.assert_close(value(found), expected, rtol=1e-6, atol=0)
    # Half of the last bit of the mantissa, or of the smallest number of the format.
    bits, lowest, _ = FORMATS[dtype]
    bound = torch.maximum(matrix.double().abs() * 2.0 ** -(bits + 1), found.scale.double() * 2.0 ** (lowest - bits - 1))
    assert bool(((value(found) - matrix.double()).abs() <= bound * (1 + 1e-6)).all())


def test_row_scales_are_powers_of_two_that_use_the_range() -> None:
    found = quantized(draw(40, 30), fp8.E4M3, "rowwise")
    mantissa, _ = torch.frexp(found.scale)
    assert bool((mantissa == 0.5).all())
    top = found.values.float().abs().amax(1)
    assert bool(((top > 448 / 2 - 16) & (top <= 448)).all())


def test_larger_values_are_cut_off() -> None:
    x = torch.tensor([[1.0, -3.0, 100.0, -1e30]])
    found = fp8.quantize(x, fp8.E4M3, torch.tensor(2.0))
    torch.testing.assert_close(value(found), torch.tensor([[1.0, -2.0, 2.0, -2.0]]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros_stay_zeros(scaling: str) -> None:
    zeros, ones = torch.zeros(16, 32), torch.ones(48, 32)
    for dtype in FORMATS:
        found = fp8.product(quantized(zeros, dtype, scaling), quantized(ones, fp8.E4M3, scaling), torch.float32, True)
        assert torch.equal(found, torch.zeros(16, 48))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_not_finite_is_not_hidden(scaling: str, bad: float) -> None:
    x = draw(16, 32)
    x[3, 5] = bad
    found = fp8.product(quantized(x, fp8.E4M3, scaling), quantized(draw(48, 32), fp8.E4M3, scaling), x.dtype, True)
    assert not bool(found[3].isfinite().any())
    others = found[[i for i in range(16) if i != 3]]
    assert bool(others.isfinite().all()) == (scaling == "rowwise")


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("result", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_products_are_those_of_the_rounded_values(
    result: torch.dtype, tolerance: float, dtype: torch.dtype, scaling: str
) -> None:
    a, b = quantized(draw(48, 96), dtype, scaling), quantized(draw(32, 96, seed=1), fp8.E4M3, scaling)
    expected = value(a) @ value(b).t()
    found = fp8.product(a, b, result, fast_accumulation=False)
    assert found.dtype is result
    # Sums cancel, so errors are held against what is added up.
    assert bool(((found - expected).abs() <= tolerance * (value(a).abs() @ value(b).abs().t())).all())


@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_are_added_slab_by_slab(scaling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "FP8_SLAB_VALUES", 16 * 32)
    a, b = quantized(draw(48, 96), fp8.E4M3, scaling), quantized(draw(32, 96, seed=1), fp8.E4M3, scaling)
    before = draw(48, 32, seed=2, dtype=torch.float32)
    total = before.clone()
    fp8.add_product_(total, a, b, torch.float32, fast_accumulation=False)
    added = (total.double() - before - value(a) @ value(b).t()).abs()
    assert bool((added <= 1e-5 * (before.abs() + value(a).abs() @ value(b).abs().t())).all())


def test_casts_of_weights_are_kept_for_one_step() -> None:
    chunks = filled_model(MODEL, random_tensors(MODEL), precision="bf16", fp8="tensorwise")
    layer = chunks[0].decoder.layers[0].mlp.linear_fc1
    x = draw(16, 1, 64).requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        """What the layer gives for `x`, and the gradient of `x`."""
        output = layer(x)[0]
        return output, torch.autograd.grad(output.sum(), x)[0]

    with weights_cast_once(chunks, micro_batches=2):
        first, again = run(), run()
        assert all(map(torch.equal, first, again))
        with torch.no_grad():
            layer.weight.mul_(1.5)
        assert all(map(torch.equal, first, run()))
    assert not any(map(torch.equal, first, run()))
    with pytest.raises(ZeroDivisionError), weights_cast_once(chunks, micro_batches=2):
        raise ZeroDivisionError
    assert layer.weight_casts is None
    with weights_cast_once(chunks, micro_batches=1):
        assert layer.weight_casts is None


@pytest.mark.parametrize("target", ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_linear_layers_equal_products_of_rounded_operands(scaling: str, target: str) -> None:
    chunk = filled_model(MODEL, random_tensors(MODEL), precision="fp32", fp8=scaling)[0]
    layer = chunk.decoder.layers[1].get_submodule(target)
    x = draw(24, 2, 64, dtype=torch.float32).requires_grad_()
    output, _ = layer(x)
    grad = draw(*output.shape, seed=2, dtype=torch.float32)
    output.backward(grad)
    assert x.grad is not None
    found = output.flatten(0, 1), x.grad.flatten(0, 1), layer.weight.grad
    expected = linear(x.detach().flatten(0, 1), layer.weight.detach(), grad.flatten(0, 1), scaling)
    for got, want in zip(found, expected, strict=True):
        assert (got.double() - want).norm() < 1e-6 * want.norm()


def losses_and_gradients(model: ModelConfig, **stage: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of every token of a batch, and the gradients of their sum."""
    tensors = random_tensors(model)
    chunks = filled_model(model, tensors, **stage)
    tokens, labels = seeded_batch(model, batch=2, sequence=32)
    loss = chunks[0](tokens, labels=labels)
    loss.sum().backward()
    return loss.detach().float(), gradients(chunks, tensors)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_matrices_of_the_layers_and_no_others_are_rounded(scaling: str) -> None:
    chunk = filled_model(MODEL, random_tensors(MODEL), precision="bf16", fp8=scaling)[0]
    found = {name for name, module in chunk.named_modules() if type(module).__name__.startswith("Fp8")}
    parts = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert found == {f"decoder.layers.{i}.{part}" for i in range(2) for part in parts}


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_recomputed_layers_give_the_same(scaling: str, recompute: str) -> None:
    # In fp32 but for the products: under bf16 a residual that is summed elsewhere is rounded elsewhere.
    loss, grads = losses_and_gradients(MODEL, precision="fp32", fp8=scaling)
    again, grads_again = losses_and_gradients(MODEL, precision="fp32", fp8=scaling, recompute=recompute)
    torch.testing.assert_close(loss, again, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert (grads_again[name] - grad).norm() < 1e-4 * grad.norm(), name


@pytest.mark.parametrize("scaling", SCALINGS)
def test_noise_is_that_of_the_format(scaling: str) -> None:
    loss, grads = losses_and_gradients(MODEL, precision="bf16", fp8="none")
    noisy, noisy_grads = losses_and_gradients(MODEL, precision="bf16", fp8=scaling)
    assert 0 < (noisy.mean() - loss.mean()).abs() < 5e-3 * loss.mean()
    for name, grad in grads.items():
        assert (noisy_grads[name] - grad).norm() < 0.25 * grad.norm(), name


@pytest.mark.parametrize("scaling", SCALINGS)
def test_biases_are_added(scaling: str) -> None:
    model = replace(MODEL, bias=True, normalization="layernorm", activation="gelu")
    loss, grads = losses_and_gradients(model, precision="bf16", fp8="none")
    noisy, noisy_grads = losses_and_gradients(model, precision="bf16", fp8=scaling)
    assert (noisy.mean() - loss.mean()).abs() < 5e-3 * loss.mean()
    biases = [name for name in grads if name.endswith("linear_qkv.bias")]
    assert biases
    for name in biases:
        assert (noisy_grads[name] - grads[name]).norm() < 0.25 * grads[name].norm()


def test_frozen_weights_under_adapters_get_no_gradient() -> None:
    model = replace(MODEL, lora=LoraConfig(rank=4))
    adapted = filled_model(model, random_tensors(model), fp8="rowwise", precision="bf16")[0]
    tokens, labels = seeded_batch(MODEL, batch=1, sequence=16)
    adapted(tokens, labels=labels).sum().backward()
    learnt = {name.rpartition(".")[2] for name, p in adapted.named_parameters() if p.grad is not None}
    assert learnt == {"lora_a", "lora_b"}
    assert type(adapted.decoder.layers[0].mlp.linear_fc1).__name__ == "Fp8AdaptedColumnParallelLinear_fc1"


def test_checkpoints_have_the_same_tensors() -> None:
    def shards(**stage: Any) -> dict[str, Any]:
        found = filled_model(MODEL, random_tensors(MODEL), precision="bf16", **stage)[0].sharded_state_dict()
        return {name: (type(entry), getattr(entry, "key", None)) for name, entry in found.items()}

    assert shards(fp8="rowwise") == shards()


def test_devices_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    monkeypatch.setattr(fp8, "current", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(RequestError, match=r"stage 'x': fp8 rowwise cannot run here: NVIDIA A100.* capability 8\.0"):
        fp8.require(StageConfig(name="x", fp8="rowwise"))
    fp8.require(StageConfig(name="x"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    fp8.require(StageConfig(name="x", fp8="rowwise"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(RequestError, match="only NVIDIA's FP8 formats"):
        fp8.require(StageConfig(name="x", fp8="rowwise"))


def test_they_are_refused_before_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice()
    monkeypatch.setattr(fp8, "current", lambda: device)
    monkeypatch.setattr(device, "fp8_obstacle", lambda: "it is old")
    stages = [StageConfig(tokens=1024), StageConfig(name="x", tokens=1024, precision="bf16", fp8="tensorwise")]
    with pytest.raises(RequestError, match=r"^stage 'x': fp8 tensorwise cannot run here: it is old; set fp8 to none$"):
        require_installed(RunConfig(stages=stages))


def test_the_log_says_where_there_is_no_gain() -> None:
    assert fp8.describe("rowwise", "cpu").endswith("no FP8 units: no speed-up")
    assert "speed-up" not in fp8.describe("rowwise", "cuda")
    assert current().name == "cuda" or current().fp8_obstacle() is None


def test_the_oracle_knows_every_number() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in FORMATS:
        numbers = every.view(dtype).double()
        numbers = numbers[numbers.isfinite()]
        assert torch.equal(rounded(numbers, dtype), numbers)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_closed_growth_masks_hide_new_units(scaling: str) -> None:
    new = replace(MODEL, hidden_size=80, ffn_hidden_size=192, num_attention_heads=5, head_dim=16)
    plan = make_plan(replace(MODEL, head_dim=16), new, growth("mask"), seed=5)
    tensors = {name: tensor.float() for name, tensor in grown_weights(plan, trained(plan.old)).items()}
    chunks = filled_model(new, tensors, precision="bf16", fp8=scaling)
    GrowthMasks(chunks, new, mask_plan(plan))
    tokens, labels = seeded_batch(MODEL, batch=2, sequence=32)
    loss = chunks[0](tokens, labels=labels)
    loss.sum().backward()
    small = {name: tensor.float() for name, tensor in weights(trained(plan.old), plan.old).items()}
    before = filled_model(plan.old, small, precision="bf16", fp8=scaling)[0](tokens, labels=labels)
    # New numbers may change the scales of old ones, so the function is kept to within the noise of FP8.
    assert (loss.mean() - before.mean()).abs() < 5e-3 * before.mean()
    fc1 = gradients(chunks, tensors)["decoder.layers.mlp.linear_fc1.weight"]
    old, width = MODEL.ffn_hidden_size, MODEL.hidden_size
    gate = fc1[:, : new.ffn_hidden_size]
    assert gate[:, :old, :width].abs().sum() > 0
    assert not gate[:, old:].any() and not gate[:, :, width:].any()
