"""Each kernel against its formula in float64, forward and backward: how far off it is, relative to the largest value.

Run with any implementation on any device: in Triton's interpreter, in PyTorch, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flm_megatron import kernels
from flm_megatron.kernels.choice import Choice, implementation
from flm_megatron.kernels.fp8 import FP8_CAST
from flm_megatron.kernels.registry import OPERATIONS
from flm_megatron.kernels.unwritten import operand_of
from tests.support.fp8_oracle import FORMATS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# One rounding of bf16 is up to 2^-9 of a value; Triton's interpreter cuts off instead, which is up to 2^-8.
TOLERANCE = {"fp32": 3e-6, "bf16": 1.6e-2, "fp64": 1e-13}

Errors = dict[str, float]


def use(name: str, device: str) -> None:
    """Let every operation run as `name`, or in PyTorch where it is not offered as that."""
    names = {key: name if name in operation.implementations else "torch" for key, operation in OPERATIONS.items()}
    kernels.use(Choice(device, names, {}))


def draw(*shape: int, dtype: str, device: str, seed: int) -> Tensor:
    """Normal values that `dtype` can hold, the same on every device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DTYPES[dtype]).to(device)


def growth_mask(size: int, device: str) -> Tensor:
    """1 on the first two thirds, 0.3 on the rest."""
    mask = torch.ones(size)
    mask[size * 2 // 3 :] = 0.3
    return mask.to(device)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def compare(
    operation: Callable[..., Any], formula: Callable[..., Any], inputs: dict[str, Tensor], seed: int = 90
) -> Errors:
    """Errors of the outputs of `operation(**inputs)` and of the gradients of `inputs` against `formula` in float64."""
    found = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
    # Multiplied by one, so that an operation in place does not meet a leaf.
    outputs = _tuple(operation(**{name: value * 1 for name, value in found.items()}))
    expected = _tuple(formula(**exact))
    errors: Errors = {}
    total = exact_total = torch.zeros((), dtype=torch.float64)
    for index, (got, want) in enumerate(zip(outputs, expected, strict=True)):
        errors[f"output {index}"] = error(got, want)
        upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed + index)).to(got.device)
        upstream = upstream.to(got.dtype)
        total = total + (got * upstream).double().sum()
        exact_total = exact_total + (want * upstream.double()).sum()
    total.backward()
    exact_total.backward()
    for name in inputs:
        gradient, wanted = found[name].grad, exact[name].grad
        assert gradient is not None and wanted is not None, name
        errors[f"gradient of {name}"] = error(gradient, wanted)
    return errors


def rms_norm(
    name: str, device: str, dtype: str, rows: int, hidden: int, masked: bool = False, scale: float = 1.0
) -> Errors:
    """RMSNorm with a large epsilon, so that its place in the formula matters."""
    use(name, device)
    mask = growth_mask(hidden, device) if masked else None
    inputs = {
        "x": draw(rows, 2, hidden, dtype=dtype, device=device, seed=1),
        "weight": draw(hidden, dtype=dtype, device=device, seed=2),
    }
    return compare(
        lambda x, weight: kernels.rms_norm(x, weight, 0.1, mask, scale),
        lambda x, weight: rms_norm_formula(x, weight, 0.1, mask, scale),
        inputs,
    )


def add_rms_norm(name: str, device: str, dtype: str, rows: int, hidden: int, masked: bool = False) -> Errors:
    """RMSNorm of a sum, and the sum."""
    use(name, device)
    mask = growth_mask(hidden, device) if masked else None
    inputs = {
        "x": draw(rows, hidden, dtype=dtype, device=device, seed=1),
        "residual": draw(rows, hidden, dtype=dtype, device=device, seed=2),
        "weight": draw(hidden, dtype=dtype, device=device, seed=3),
    }
    return compare(
        lambda x, residual, weight: kernels.add_rms_norm(x, residual, weight, 1e-3, mask, 0.5),
        lambda x, residual, weight: (rms_norm_formula(x + residual, weight, 1e-3, mask, 0.5), x + residual),
        inputs,
    )


def rms_norm_formula(x: Tensor, weight: Tensor, eps: float, mask: Tensor | None, scale: float) -> Tensor:
    """x rsqrt(sum(m x^2) / sum(m) + eps) w m scale."""
    m = torch.ones_like(weight) if mask is None else mask.double()
    mean_square = (x.square() * m).sum(-1, keepdim=True) / m.sum()
    return x * torch.rsqrt(mean_square + eps) * weight * m * scale


def swiglu(name: str, device: str, dtype: str, rows: int, ffn: int) -> Errors:
    """silu(gate) up."""
    use(name, device)
    return compare(
        kernels.swiglu,
        lambda x: F.silu(x[..., :ffn]) * x[..., ffn:],
        {"x": draw(rows, 2, 2 * ffn, dtype=dtype, device=device, seed=1)},
    )


def geglu(name: str, device: str, dtype: str, rows: int, ffn: int) -> Errors:
    """gelu(gate) up, in the tanh form."""
    use(name, device)
    return compare(
        kernels.geglu,
        lambda x: F.gelu(x[..., :ffn], approximate="tanh") * x[..., ffn:],
        {"x": draw(rows, 2, 2 * ffn, dtype=dtype, device=device, seed=1)},
    )


def rotary(
    name: str, device: str, dtype: str, sequence: int, batch: int, groups: int, queries: int, channels: int,
    turned: int | None = None,
) -> Errors:  # fmt: skip
    """Queries, keys and values out of the packed projection, through scaled dot-product attention's layout."""
    use(name, device)
    pairs = (turned or channels) // 2
    angles = torch.outer(torch.arange(sequence), 100.0 ** -torch.linspace(0, 1, pairs)).double().to(device)
    cos, sin = angles.cos(), angles.sin()
    precise = dtype == "fp64"
    tables = (cos, sin) if precise else (cos.float(), sin.float())
    width = groups * (queries + 2) * channels
    return compare(
        lambda packed: kernels.rotary_qkv(packed, *tables, queries, turned and channels),
        lambda packed: _rotary_formula(packed, tables[0].double(), tables[1].double(), groups, queries),
        {"packed": draw(sequence, batch, width, dtype=dtype, device=device, seed=1)},
    )


def _rotary_formula(
    packed: Tensor, cos: Tensor, sin: Tensor, groups: int, queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    sequence, batch, _ = packed.shape
    heads = packed.reshape(sequence, batch * groups, queries + 2, -1)
    turn = torch.complex(cos, sin)[:, None, None, :]
    half = cos.size(-1)
    turned = torch.complex(heads[..., :half], heads[..., half : 2 * half]) * turn
    rotated = torch.cat([turned.real, turned.imag, heads[..., 2 * half :]], dim=-1)
    return rotated[:, :, :queries], rotated[:, :, queries : queries + 1], heads[:, :, queries + 1 :]


def cross_entropy(
    name: str, device: str, dtype: str, rows: int, width: int, vocab_size: int | None = None, overwrite: bool = False
) -> Errors:
    """Losses of padded logits whose padding is large."""
    use(name, device)
    labels = torch.arange(rows * 2).reshape(rows, 2).mul_(7).remainder_(vocab_size or width).to(device)
    logits = draw(rows, 2, width, dtype=dtype, device=device, seed=1) * 4
    logits[..., vocab_size or width :] = 50.0
    return compare(
        lambda logits: kernels.cross_entropy(logits, labels, vocab_size, overwrite=overwrite),
        lambda logits: F.cross_entropy(
            logits[..., :vocab_size].flatten(0, 1), labels.flatten(), reduction="none"
        ).view_as(labels),
        {"logits": logits},
    )


def linear_cross_entropy(
    name: str, device: str, dtype: str, rows: int, channels: int, width: int, vocab_size: int, chunk_tokens: int
) -> Errors:
    """Weighted losses of the head's product, some tokens left out by their weight."""
    use(name, device)
    labels = torch.arange(rows).mul_(5).remainder_(vocab_size).to(device)
    token_weights = torch.arange(rows, device=device).remainder(3).float()

    def formula(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy((hidden @ weight.t())[:, :vocab_size], labels, reduction="none")
        return torch.dot(losses, token_weights.double()), losses.detach()

    inputs = {
        "hidden": draw(rows, channels, dtype=dtype, device=device, seed=1),
        "weight": draw(width, channels, dtype=dtype, device=device, seed=2),
    }
    return compare(
        lambda hidden, weight: kernels.linear_cross_entropy(
            hidden, weight, labels, token_weights, vocab_size, chunk_tokens=chunk_tokens
        ),
        formula,
        inputs,
    )


def adamw(
    name: str,
    device: str,
    dtype: str,
    sizes: Sequence[int],
    steps: int = 3,
    factor: float | None = None,
    eps: float = 1e-6,
    size: float = 1.0,
) -> Errors:
    """Parameters after some steps against torch.optim.AdamW in float64; gradients are about `size`."""
    use(name, device)
    params = [draw(values, dtype=dtype, device=device, seed=values) for values in sizes]
    exact = [torch.nn.Parameter(param.double()) for param in params]
    optimizer = torch.optim.AdamW(exact, lr=3e-2, betas=(0.9, 0.95), eps=eps, weight_decay=0.1)
    moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    options: dict[str, Any] = {"lr": 3e-2, "beta1": 0.9, "beta2": 0.95, "eps": eps, "weight_decay": 0.1}
    multiplier = None if factor is None else torch.tensor(factor, device=device)
    for step in range(1, steps + 1):
        grads = [size * draw(values, dtype=dtype, device=device, seed=1000 * step + values) for values in sizes]
        kept = [grad.clone() for grad in grads]
        kernels.adamw_(params, grads, *moments, step=step, grad_factor=multiplier, **options)
        for grad, copy in zip(grads, kept, strict=True):
            assert torch.equal(grad, copy if factor is None else copy * factor)
        for param, grad in zip(exact, grads, strict=True):
            param.grad = grad.double()
        optimizer.step()
    states = [optimizer.state[param] for param in exact]
    pairs = {
        "parameters": (params, exact),
        "first moments": (moments[0], [state["exp_avg"] for state in states]),
        "second moments": (moments[1], [state["exp_avg_sq"] for state in states]),
    }
    return {what: max(error(got, want) for got, want in zip(*both, strict=True)) for what, both in pairs.items()}


def clip(name: str, device: str, dtype: str, sizes: Sequence[int], max_norm: float) -> Errors:
    """Norm of a list of gradients, and the gradients clipped to `max_norm`."""
    use(name, device)
    grads = [draw(size, dtype=dtype, device=device, seed=size) for size in sizes]
    norm = torch.cat([grad.double() for grad in grads]).norm()
    expected = [grad.double() * min(1.0, max_norm / norm.item()) for grad in grads]
    got = kernels.clip_grad_norm_(grads, max_norm)
    assert got.shape == () and got.dtype is torch.float32
    return {
        "norm": error(got, norm),
        "gradients": max(error(grad, want) for grad, want in zip(grads, expected, strict=True)),
    }


def weight_gradient(name: str, device: str, dtype: str, tokens: int, inputs: int, outputs: int) -> Errors:
    """A product added to an fp32 buffer (float64 for float64), whose error is fp32's whatever the operands are."""
    use(name, device)
    rows = draw(tokens, inputs, dtype=dtype, device=device, seed=1)
    grad = draw(tokens, outputs, dtype=dtype, device=device, seed=2)
    total = draw(outputs, inputs, dtype="fp64" if dtype == "fp64" else "fp32", device=device, seed=3)
    expected = total.double() + grad.double().t() @ rows.double()
    kernels.add_weight_gradient_(total, rows, grad)
    found = error(total, expected)
    assert found < TOLERANCE["fp32"]
    return {"buffer": found}


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


CASES: dict[str, tuple[Callable[..., Errors], dict[str, Any]]] = {
    "rms_norm": (rms_norm, {"rows": 5, "hidden": 37}),
    "rms_norm, scaled": (rms_norm, {"rows": 3, "hidden": 64, "scale": 0.125}),
    "rms_norm, masked": (rms_norm, {"rows": 4, "hidden": 50, "masked": True, "scale": 2.0}),
    "rms_norm, more rows than partial sums": (rms_norm, {"rows": 150, "hidden": 3}),
    "rms_norm, a head and a tail": (rms_norm, {"rows": 2, "hidden": 10240, "masked": True}),
    "rms_norm, rows shared by two programs": (rms_norm, {"rows": 2, "hidden": 20500, "masked": True}),
    "add_rms_norm": (add_rms_norm, {"rows": 7, "hidden": 33}),
    "add_rms_norm, masked": (add_rms_norm, {"rows": 7, "hidden": 33, "masked": True}),
    "add_rms_norm, two passes": (add_rms_norm, {"rows": 3, "hidden": 20480}),
    "swiglu": (swiglu, {"rows": 3, "ffn": 37}),
    "swiglu, two blocks": (swiglu, {"rows": 1, "ffn": 1100}),
    "geglu": (geglu, {"rows": 3, "ffn": 37}),
    "rotary, one query a group": (
        rotary,
        {"sequence": 5, "batch": 3, "groups": 3, "queries": 1, "channels": 8},
    ),
    "rotary, grouped queries": (
        rotary,
        {"sequence": 4, "batch": 2, "groups": 3, "queries": 4, "channels": 10},
    ),
    "rotary, a part of each head": (
        rotary,
        {"sequence": 4, "batch": 2, "groups": 3, "queries": 2, "channels": 22, "turned": 6},
    ),
    "rotary, wide heads": (rotary, {"sequence": 2, "batch": 1, "groups": 5, "queries": 7, "channels": 128}),
    "cross_entropy": (cross_entropy, {"rows": 5, "width": 97}),
    "cross_entropy, overwritten": (cross_entropy, {"rows": 5, "width": 97, "overwrite": True}),
    "cross_entropy, padded": (cross_entropy, {"rows": 3, "width": 128, "vocab_size": 101}),
    "cross_entropy, three blocks": (cross_entropy, {"rows": 2, "width": 9000, "vocab_size": 8999}),
    "linear_cross_entropy": (
        linear_cross_entropy,
        {"rows": 13, "channels": 24, "width": 64, "vocab_size": 51, "chunk_tokens": 5},
    ),
    "adamw": (adamw, {"sizes": (7, 1, 1500, 33000)}),
    "adamw, 1e12 parameters": (adamw, {"sizes": (130,), "size": 2e-7, "eps": 2e-10}),
    "adamw, gradients scaled": (adamw, {"sizes": (7, 130), "factor": 0.25}),
    "clip": (clip, {"sizes": (5, 1, 1030, 33000), "max_norm": 0.5}),
    "clip, nothing to do": (clip, {"sizes": (5, 130), "max_norm": 1e6}),
    "weight_gradient": (weight_gradient, {"tokens": 331, "inputs": 24, "outputs": 40}),
}


def run_case(case: str, name: str, device: str, dtype: str, **sizes: Any) -> Errors:
    """Errors of one case under implementation `name`; `sizes` replace those of the case."""
    function, arguments = CASES[case]
    return function(name, device, dtype, **{**arguments, **sizes})


def cast_errors(name: str, device: str, dtype: str, by_row: bool, transpose: bool, exact: bool = False) -> Errors:
    """Largest error of the cast to e4m3 and to e5m2, in units of the last bit of the mantissa (or of the smallest
    number of the format), of normal numbers, of smaller ones, and of NaN: infinite if that does not stay NaN.

    With `exact` all values are numbers of both formats, and none has to be rounded.
    """
    use(name, device)
    x = draw(70, 100, dtype=dtype, device=device, seed=1) * 100
    if exact:
        x = torch.copysign(torch.exp2(x.abs().clamp(1, 200).log2().floor()) * 1.25, x)
    x[2, 3], x[3, 4], x[5, 5] = float("nan"), 0.0, 1e9
    x[7] *= 1 if exact else 1e-5
    matrix = x.t() if transpose else x
    exponents = torch.randint(-2, 2, (matrix.size(0), 1), generator=torch.Generator().manual_seed(2)).to(device)
    factor = torch.exp2(exponents.float()) * (1.0 if exact else 1.3)
    factor = factor if by_row else factor[0, 0]
    errors: Errors = {}
    for fp8, (bits, lowest, limit) in FORMATS.items():
        found = implementation(FP8_CAST, x).cast(x, factor, fp8, transpose)
        assert found.shape == matrix.shape and found.is_contiguous() and found.dtype is fp8
        expected = (matrix.float() * factor).double().clamp(-limit, limit)
        exponent = torch.frexp(expected)[1] - 1
        steps = ((found.double() - expected) / torch.exp2(exponent.clamp(min=lowest) - bits)).abs()
        steps = torch.where(found.isnan() & expected.isnan(), 0.0, steps).nan_to_num(torch.inf)
        nan, small = expected.isnan(), expected.abs() < 2.0**lowest
        parts = {"normal": ~small & ~nan, "small": small, "nan": nan}
        errors |= {f"{fp8} {part}": steps[where].max().item() for part, where in parts.items()}
    return errors


OPERANDS = ("swiglu", "norm", "norm of a sum", "norm, masked")


def operand_errors(name: str, device: str, dtype: str, kind: str) -> Errors:
    """Of a norm or activation that is not written: error of its values, relative to the largest, against float64; and
    in how many numbers its casts and largest values differ from those of the values, were they written."""
    use(name, device)
    operation, formula = _unwritten(kind, dtype, device)
    result = operation()
    operand, run = operand_of(result), implementation(FP8_CAST, result)
    assert not isinstance(operand, Tensor)
    values = run.written(operand)
    errors: Errors = {"values": error(values, formula().flatten(0, -2))}
    for axis in (None, 0, 1):
        wrong = run.largest(operand, axis) != torch.linalg.vector_norm(values, torch.inf, axis).float()
        errors[f"largest along {axis}"] = float(wrong.sum())
    exponents = torch.arange(max(values.shape), device=device).remainder(5).float().sub(2).exp2().unsqueeze(-1)
    for fp8, turned, by_row in product(FORMATS, (False, True), (False, True)):
        factor = exponents[: values.size(1 if turned else 0)] if by_row else exponents[1, 0]
        found, wanted = (run.cast(x, factor, fp8, turned) for x in (operand, values))
        differing = (found.view(torch.uint8) != wanted.view(torch.uint8)).sum()
        errors[f"{fp8} {turned} {by_row}"] = float(differing)
    return errors


def _unwritten(kind: str, dtype: str, device: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The operation, and its formula in float64."""
    x, residual = (draw(35, 2, 112, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    weight = draw(112, dtype=dtype, device=device, seed=3)
    if kind == "swiglu":
        gate, up = x.double().chunk(2, dim=-1)
        return lambda: kernels.unwritten_swiglu(x), lambda: F.silu(gate) * up
    also = residual if kind == "norm of a sum" else None
    mask = growth_mask(112, device) if kind == "norm, masked" else None
    total = x if also is None else x + also
    return (
        lambda: kernels.unwritten_rms_norm(x, also, weight, 1e-3, mask)[0],
        lambda: rms_norm_formula(total.double(), weight.double(), 1e-3, mask, 1.0),
    )
