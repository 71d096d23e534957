"""The engine's model on one process against an independent Tele-FLM in plain PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flm_megatron.config.schema import ModelConfig, MupConfig, RopeScaling
from flm_megatron.distributed.world import one_process
from flm_megatron.model.parameters import parameter_specs
from tests.support.filled_model import filled_model, gradients, seeded_batch
from tests.support.reference_model import random_tensors, reference_logits, reference_loss

SHAPE: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 112,
    "num_attention_heads": 4,
    "vocab_size": 201,
}
MODELS = {
    "plain": ModelConfig(**SHAPE),
    "mup": ModelConfig(**SHAPE, input_mult=1.5, output_mult=2.0, mup=MupConfig(enabled=True, base_hidden_size=32)),
    "multipliers without mup": ModelConfig(**SHAPE, input_mult=0.5, output_mult=0.25),
    "grouped queries": ModelConfig(**SHAPE, num_query_groups=2),
    "one key for all queries, wide heads": ModelConfig(**SHAPE, num_query_groups=1, head_dim=32),
    "vocabulary without padding": ModelConfig(**{**SHAPE, "vocab_size": 256}),
    "qwen": ModelConfig(
        **SHAPE, num_query_groups=2, head_dim=32, qkv_bias=True, query_key_norm=True, query_key_norm_epsilon=1e-2
    ),
    "gpt3 block": ModelConfig(**SHAPE, normalization="layernorm", activation="gelu", bias=True),
    "gpt2": ModelConfig(
        **SHAPE,
        head_dim=9,
        normalization="layernorm",
        activation="gelu_tanh",
        bias=True,
        position="learned",
        max_positions=31,
        input_mult=1.5,
        tie_embeddings=True,
    ),
    "gpt3 block with xpos": ModelConfig(
        **SHAPE, normalization="layernorm", activation="gelu", bias=True, position="xpos", xpos_scale_base=8
    ),
    "neox": ModelConfig(
        **SHAPE, normalization="layernorm", activation="gelu", bias=True, parallel_residual=True, rotary_percent=0.3
    ),
    "parallel, norms without biases": ModelConfig(**SHAPE, num_query_groups=2, parallel_residual=True),
    "tied head": ModelConfig(**SHAPE, tie_embeddings=True, input_mult=1.5, output_mult=2.0),
    "sliding window, geglu": ModelConfig(**SHAPE, num_query_groups=2, sliding_window=5, activation="geglu"),
    "other theta and epsilon": ModelConfig(**SHAPE, rope_theta=500.0, norm_epsilon=1e-2),
    "llama 3's rope": ModelConfig(**SHAPE, rope_scaling=RopeScaling("llama3", 4.0, 24), rotary_percent=0.75),
    "yarn": ModelConfig(**SHAPE, rope_theta=50.0, rope_scaling=RopeScaling("yarn", 4.0, 64, beta_fast=8.0)),
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """One process with megatron-core's parallel state."""
    with one_process():
        yield


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_the_reference(name: str) -> None:
    model = MODELS[name]
    tensors = random_tensors(model)
    exact = {key: tensor.double().requires_grad_() for key, tensor in tensors.items()}
    tokens, labels = seeded_batch(model, batch=2, sequence=24)
    chunks = filled_model(model, tensors)

    logits = chunks[0](tokens)
    expected = reference_logits(model, exact, tokens)
    assert model.vocab_size is not None
    assert relative(logits[..., : model.vocab_size], expected) < 1e-5
    assert torch.all(logits[..., model.vocab_size :] == -torch.inf)

    loss = chunks[0](tokens, labels=labels)
    expected_loss = reference_loss(model, exact, tokens, labels)
    assert loss.dtype is torch.float32 and loss.shape == tokens.shape
    assert relative(loss, expected_loss) < 1e-5
    loss.sum().backward()
    expected_loss.sum().backward()
    for key, gradient in gradients(chunks, tensors).items():
        wanted = exact[key].grad
        assert wanted is not None and relative(gradient, wanted) < 1e-5, key


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_exactly_the_logical_table(name: str) -> None:
    model = MODELS[name]
    tensors = random_tensors(model)
    found = gradients_of_ones(model, tensors)
    assert set(found) == set(parameter_specs(model))
    for key, covered in found.items():
        assert torch.all(covered == 1), f"{key} is not covered by the model's parameters"


def gradients_of_ones(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logical tensors that are 1 wherever the model has a parameter."""
    chunks = filled_model(model, tensors)
    for parameter in chunks[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    return gradients(chunks, tensors)


def test_padding_rows_get_no_gradient_and_do_not_matter() -> None:
    model = MODELS["plain"]
    tensors = random_tensors(model)
    tokens, labels = seeded_batch(model, batch=2, sequence=8)
    chunk = filled_model(model, tensors)[0]
    head = chunk.output_layer.weight
    assert head.size(0) == 256
    before = chunk(tokens, labels=labels)
    with torch.no_grad():
        head[201:] = 3.0
    after = chunk(tokens, labels=labels)
    assert torch.equal(before, after)
    after.sum().backward()
    assert torch.all(head.grad[201:] == 0) and torch.any(head.grad[:201] != 0)
    assert torch.all(chunk.embedding.word_embeddings.weight.grad[201:] == 0)


def test_attention_sees_only_the_past() -> None:
    model = MODELS["grouped queries"]
    chunk = filled_model(model, random_tensors(model))[0]
    tokens, _ = seeded_batch(model, batch=1, sequence=16)
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 7) % 201
    one, other = chunk(tokens), chunk(changed)
    assert torch.equal(one[0, :10], other[0, :10])
    assert not torch.equal(one[0, 10:], other[0, 10:])


def test_an_attention_mask_hides_what_lies_before_a_document() -> None:
    model = MODELS["plain"]
    chunk = filled_model(model, random_tensors(model))[0]
    tokens, _ = seeded_batch(model, batch=1, sequence=12)
    hidden = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    hidden[..., 5:, :5] = True
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 3) % 201
    one, other = (chunk(text, attention_mask=hidden)[0, 5:, :201] for text in (tokens, changed))
    assert relative(one, other) < 1e-6
    assert relative(chunk(tokens)[0, 5:, :201], one) > 1e-3


@pytest.mark.parametrize("name", ["plain", "grouped queries", "gpt3 block with xpos", "neox"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit_of_the_loss_and_gradients_by_rounding_only(name: str, mode: str) -> None:
    model = MODELS[name]
    tensors = random_tensors(model)
    tokens, labels = seeded_batch(model, batch=2, sequence=16)
    results = []
    for recompute in ("none", mode):
        chunks = filled_model(model, tensors, recompute=recompute)
        loss = chunks[0](tokens, labels=labels)
        loss.sum().backward()
        results.append((loss.detach(), gradients(chunks, tensors)))
    (loss, expected), (recomputed, got) = results
    assert torch.equal(loss, recomputed)
    assert all(relative(got[key], expected[key]) < 1e-6 for key in expected)


def backward_nodes(loss: torch.Tensor) -> Counter[str]:
    """How often each kind of node is in the graph behind `loss`."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return Counter(type(node).__name__ for node in seen)


@pytest.mark.parametrize(("name", "fused"), [("plain", 3), ("gpt3 block", 0)])
def test_the_residual_sum_of_attention_is_part_of_the_norm_behind_it(name: str, fused: int) -> None:
    """In the layers of RMSNorm without biases; what comes out is compared with the reference above."""
    model = MODELS[name]
    tokens, labels = seeded_batch(model, batch=2, sequence=8)
    nodes = backward_nodes(filled_model(model, random_tensors(model))[0](tokens, labels=labels).sum())
    assert nodes["_AddRMSNormBackward"] == fused
    assert nodes["_RMSNormBackward"] == (4 if fused else 0)


def saved_values(model: ModelConfig, recompute: str) -> int:
    """Values that the forward pass keeps for the backward pass, each storage counted once."""
    chunk = filled_model(model, random_tensors(model), recompute=recompute)[0]
    tokens, labels = seeded_batch(model, batch=2, sequence=64)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = chunk(tokens, labels=labels)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_recomputation_keeps_fewer_activations() -> None:
    none, selective, full = (saved_values(MODELS["plain"], mode) for mode in ("none", "selective", "full"))
    assert full < 0.6 * selective < 0.6 * 0.7 * none


@pytest.mark.parametrize("name", ["plain", "mup", "gpt3 block with xpos"])
def test_bf16_stays_near_the_exact_loss(name: str) -> None:
    model = MODELS[name]
    tensors = random_tensors(model)
    tokens, labels = seeded_batch(model, batch=4, sequence=32)
    chunks = filled_model(model, tensors, precision="bf16")
    assert {parameter.dtype for parameter in chunks[0].parameters()} == {torch.bfloat16}
    loss = chunks[0](tokens, labels=labels)
    assert loss.dtype is torch.float32
    expected = reference_loss(model, {key: x.bfloat16().double() for key, x in tensors.items()}, tokens, labels)
    assert abs(loss.mean().item() / expected.mean().item() - 1) < 1e-3
    loss.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in chunks[0].parameters())
