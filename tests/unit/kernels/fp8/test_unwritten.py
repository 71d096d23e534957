"""Norms and activations that only FP8 products read: nothing is written but their casts, and no number changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.config.schema import LoraConfig, ModelConfig
from flm_megatron.distributed.world import one_process
from flm_megatron.growth.plan import make_plan
from flm_megatron.growth.schedule import mask_plan
from flm_megatron.kernels import fp8
from flm_megatron.kernels.unwritten import operand_of
from flm_megatron.model.masks import GrowthMasks
from flm_megatron.model.teleflm import TeleFLM
from tests.support.filled_model import filled_model, gradients, seeded_batch
from tests.support.fp8_oracle import FORMATS, dequantized
from tests.support.growth_cases import grown_weights, growth, trained
from tests.support.kernel_cases import OPERANDS, TOLERANCE, draw, operand_errors
from tests.support.reference_model import random_tensors

SCALINGS = ["tensorwise", "rowwise"]
MODEL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=160, num_attention_heads=4, head_dim=16, vocab_size=100
)
WRITTEN = patch("flm_megatron.model.layer.casts_input", lambda layer: False)

pytestmark = pytest.mark.usefixtures("choice_of_before")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """One process with megatron-core's parallel state."""
    with one_process():
        yield


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OPERANDS)
def test_casts_are_those_of_the_written_values(kind: str, dtype: str) -> None:
    errors = operand_errors("torch", "cpu", dtype, kind)
    assert errors.pop("values") < TOLERANCE[dtype]
    assert set(errors.values()) == {0.0}, errors


@pytest.mark.parametrize("scaling", SCALINGS)
def test_casts_agree_with_the_formula_in_float64(scaling: str) -> None:
    x = draw(48, 96, dtype="fp32", device="cpu", seed=1) * 3
    operand = operand_of(kernels.unwritten_swiglu(x))
    exact = torch.nn.functional.silu(x[:, :48].double()) * x[:, 48:].double()
    for dtype, (bits, lowest, _) in FORMATS.items():
        found = fp8.quantize(operand, dtype, fp8.largest(operand) if scaling == "tensorwise" else None)
        values, scale = found.values.double() * found.scale.double(), found.scale.double()
        # Rounded to the nearest number of the format; where two are as near, either.
        bound = torch.maximum(exact.abs() * 2.0 ** -(bits + 1), scale * 2.0 ** (lowest - bits - 1))
        assert bool(((values - exact).abs() <= bound * (1 + 1e-5)).all())
        assert (values - dequantized(exact, dtype, scaling)).norm() < 1e-2 * exact.norm()


def test_a_reader_that_does_not_know_meets_nan() -> None:
    x = draw(4, 2, 32, dtype="bf16", device="cpu", seed=1).requires_grad_()
    normed, _ = kernels.unwritten_rms_norm(x, None, torch.ones(32, dtype=torch.bfloat16), 1e-5)
    assert normed.shape == x.shape and normed.untyped_storage().nbytes() == 2
    assert bool((normed * 2).isnan().all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_not_finite_is_not_hidden(scaling: str, bad: float) -> None:
    x = draw(16, 64, dtype="bf16", device="cpu", seed=1)
    x[3, 5] = bad
    weight = draw(16, 32, dtype="bf16", device="cpu", seed=2)
    by_whole = scaling == "tensorwise"
    for result in (kernels.unwritten_swiglu(x), kernels.unwritten_rms_norm(x[:, :32], None, weight[0], 1e-5)[0]):
        operand = operand_of(result)
        a = fp8.quantize(operand, fp8.E4M3, fp8.largest(operand) if by_whole else None)
        b = fp8.quantize(weight, fp8.E4M3, fp8.largest(weight) if by_whole else None)
        assert not bool(fp8.product(a, b, torch.float32, False)[3].isfinite().any())


def step(model: ModelConfig, written: bool, masked: bool = False, **stage: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of a batch and gradients of their sum, norms and activations being `written` or not."""
    tensors = random_tensors(model)
    plan = make_plan(MODEL, model, growth("mask"), seed=5) if masked else None
    if plan:
        tensors = {name: tensor.float() for name, tensor in grown_weights(plan, trained(plan.old)).items()}
    with WRITTEN if written else nullcontext():
        chunks = filled_model(model, tensors, precision="bf16", **stage)
        if plan:
            GrowthMasks(chunks, model, mask_plan(plan)).set(0.3)
        tokens, labels = seeded_batch(MODEL, batch=2, sequence=32)
        loss = chunks[0](tokens, labels=labels)
        loss.sum().backward()
    return loss.detach(), gradients(chunks, tensors)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"recompute": "selective"},
        {"recompute": "full"},
        {"model": replace(MODEL, hidden_size=80, ffn_hidden_size=192, num_attention_heads=5), "masked": True},
        {"model": replace(MODEL, bias=True)},
    ],
    ids=["plain", "selective", "full", "masks", "biases"],
)
def test_no_number_changes(case: dict[str, Any], scaling: str) -> None:
    case = {"model": MODEL, "fp8": scaling, **case}
    loss, grads = step(written=False, **case)
    written_loss, written_grads = step(written=True, **case)
    assert loss.isfinite().all() and torch.equal(loss, written_loss)
    for name, grad in written_grads.items():
        assert torch.equal(grads[name], grad), name


def kept(**case: Any) -> Counter[tuple[int, ...]]:
    """How many matrices of each shape are kept from the forward to the backward pass, storages counted once."""
    found: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() > 64 * 16 and not isinstance(tensor, torch.nn.Parameter):
            found[tensor.data_ptr()] = (64, tensor.numel() // 64)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(**case)
    return Counter(found.values())


def test_neither_norms_nor_activations_are_kept() -> None:
    before, after = (kept(model=MODEL, fp8="tensorwise", written=written) for written in (True, False))
    gone = before - after
    assert gone == {(64, MODEL.hidden_size): 4, (64, MODEL.ffn_hidden_size): 2}
    assert not after - before


@pytest.mark.parametrize(
    ("targets", "norms", "activation"),
    [(["qkv"], [False, True], True), (["fc1", "fc2"], [True, False], False), (["projection"], [True, True], True)],
)
def test_adapters_read_what_is_written(targets: Any, norms: list[bool], activation: bool) -> None:
    model = replace(MODEL, lora=LoraConfig(rank=4, targets=targets))
    tensors = random_tensors(model)
    tokens, labels = seeded_batch(MODEL, batch=1, sequence=16)

    def run() -> tuple[TeleFLM, Tensor, list[Tensor]]:
        """A model whose adapters alone learn, its losses, and the adapters' gradients."""
        chunk = filled_model(model, tensors, precision="bf16", fp8="rowwise")[0]
        loss = chunk(tokens, labels=labels)
        loss.sum().backward()
        return chunk, loss, [p.grad for p in chunk.parameters() if p.grad is not None]

    with patch.object(kernels, "unwritten_swiglu", wraps=kernels.unwritten_swiglu) as spy:
        chunk, loss, grads = run()
    layer = chunk.decoder.layers[0]
    assert [layer.input_layernorm.unwritten, layer.pre_mlp_layernorm.unwritten] == norms
    assert bool(spy.called) == activation
    with WRITTEN:
        _, written_loss, written_grads = run()
    assert torch.equal(loss, written_loss) and bool(loss.isfinite().all())
    assert len(grads) == 4 * len(targets) and all(map(torch.equal, grads, written_grads))


def test_what_a_library_was_asked_for_is_written() -> None:
    x = torch.ones(2, 8)
    assert kernels.may_leave_unwritten(x)
    with patch("flm_megatron.kernels.norm.implementation", lambda *_, **__: object()):
        assert not kernels.may_leave_unwritten(x)


def test_without_fp8_all_is_written() -> None:
    layer = filled_model(MODEL, random_tensors(MODEL), precision="bf16")[0].decoder.layers[0]
    assert not layer.input_layernorm.unwritten and not layer.pre_mlp_layernorm.unwritten
