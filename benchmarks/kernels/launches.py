"""Every launch of every Triton kernel at the shapes that the kernels are for, recorded without a GPU.

The kernels' own functions are called on tensors without memory (torch's `meta` device), and what they would launch is
written down as Triton would compile it: dtypes, blocks, warps, and which sizes are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from flm_megatron.kernels.adam import Hyperparameters, TensorLists
from flm_megatron.kernels.adam import triton_kernels as adam
from flm_megatron.kernels.clip import triton_kernels as clip
from flm_megatron.kernels.fp8 import triton_kernels as fp8
from flm_megatron.kernels.glu import triton_kernels as glu
from flm_megatron.kernels.loss import triton_kernels as loss
from flm_megatron.kernels.norm import Affine
from flm_megatron.kernels.norm import triton_kernels as norm
from flm_megatron.kernels.rotary import triton_kernels as rotary
from flm_megatron.kernels.unwritten import Gated, Normed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}
ROWS = 2048
# Hidden sizes of the 52B, 102B and 1T models.
HIDDEN = (8192, 10240, 20480)
# Their feed-forward sizes, whole and as tensor-parallel ranks have them: over 4 and 8, over 4, 8 and 16, over 8 and 32.
FFN = (21824, 5456, 2728, 27264, 6816, 3408, 1704, 98304, 12288, 3072)
# Gemma 7B's.
GEGLU_FFN = 24576
# Those that are multiples of 16, as FP8 asks for.
FP8_FFN = (5456, 6816, 98304, 12288, 3072)
# Ids of a rank and how many of them are no padding: the vocabulary whole, over 4 (the last rank), 8 and 32.
VOCABULARY = ((80384, 80000), (20096, 19712), (10048, 10048), (2560, 640))
HEADS = (64, 160, 20)
CHANNELS = 128
# Channels that turn of Pythia's heads.
TURNED = 32


class Variant(NamedTuple):
    """One use of an operation: its size (hidden, ffn, ids or heads), the dtype of its values, what else it is given."""

    operation: str
    size: int
    dtype: str
    options: str


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled for one launch: types by argument, constants, what is known of arguments, options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Operation and name of the kernel."""
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__}"

    @property
    def key(self) -> str:
        """The same for launches that are compiled to the same code."""
        return f"{self.name} {self.signature} {self.constants} {self.attributes} {self.options}"


def record(call: Callable[[], object]) -> list[Launch]:
    """What `call` launches, which is not run."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(_launch(self, args, options))

    with patch.object(JITFunction, "run", run):
        call()
    return launches


def _launch(kernel: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Launch:
    """As Triton specialises: addresses and multiples of 16 are known as such, and 1 is a constant."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **given}
    for index, parameter in enumerate(kernel.params):
        value, name = values.pop(parameter.name), parameter.name
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    return Launch(kernel, signature, constants, attributes, values)


@lru_cache(maxsize=1)
def variants() -> dict[Variant, Callable[[], object]]:
    """The call of each variant."""
    return dict((*_norm(), *_glu(), *_rotary(), *_loss(), *_lists(), *_fp8(), *_fp8_of_unwritten()))


def launches(variant: Variant) -> list[Launch]:
    """What `variant` launches."""
    return record(variants()[variant])


Calls = Iterator[tuple[Variant, Callable[[], object]]]


def _tensor(*shape: int, dtype: str = "fp32") -> Tensor:
    return torch.empty(*shape, dtype=DTYPES[dtype], device="meta")


def _norm() -> Calls:
    for hidden, dtype, residual, masked in product(HIDDEN, DTYPES, (False, True), (False, True)):
        x, weight = _tensor(ROWS, hidden, dtype=dtype), _tensor(hidden, dtype=dtype)
        affine = Affine(weight, _tensor(hidden) if masked else None, 1.0)
        also = x if residual else None
        options = _words(residual=residual, mask=masked)
        forward = partial(norm.forward, x, also, affine, 1e-5)
        yield Variant("norm forward", hidden, dtype, options), forward
        if dtype == "bf16":  # for FP8
            statistics = partial(norm.statistics, x, also, affine, 1e-5)
            yield (
                Variant("norm forward", hidden, dtype, _words(unwritten=True, residual=residual, mask=masked)),
                statistics,
            )
        backward = partial(norm.backward, x, also, x, affine, _tensor(ROWS))
        yield Variant("norm backward", hidden, dtype, options), backward


def _glu() -> Calls:
    for ffn, dtype in product(FFN, DTYPES):
        x, out = _tensor(ROWS, 2 * ffn, dtype=dtype), _tensor(ROWS, ffn, dtype=dtype)
        yield Variant("glu forward", ffn, dtype, _words()), partial(glu.forward, x, "silu")
        yield Variant("glu backward", ffn, dtype, _words()), partial(glu.backward, out, x, "silu")
    x, out = _tensor(ROWS, 2 * GEGLU_FFN, dtype="bf16"), _tensor(ROWS, GEGLU_FFN, dtype="bf16")
    yield Variant("glu forward", GEGLU_FFN, "bf16", "gelu"), partial(glu.forward, x, "gelu")
    yield Variant("glu backward", GEGLU_FFN, "bf16", "gelu"), partial(glu.backward, out, x, "gelu")


def _rotary() -> Calls:
    shapes = [*product(HEADS, DTYPES, (1, 2), (1, 4), (CHANNELS,)), *product(HEADS[:1], DTYPES, (1,), (1,), (TURNED,))]
    for heads, dtype, batch, queries, turned in shapes:
        shape = (ROWS, batch, heads // queries)
        packed = _tensor(*shape, queries + 2, CHANNELS, dtype=dtype)
        query, key = (_tensor(*shape, count, CHANNELS, dtype=dtype) for count in (queries, 1))
        table = _tensor(ROWS, turned // 2)
        options = _words(batches=batch > 1, groups=queries > 1, partial=turned < CHANNELS)
        yield Variant("rotary forward", heads, dtype, options), partial(rotary.rotate_, packed, table, table)
        backward = partial(rotary.packed_gradient, query, key, key, table, table)
        yield Variant("rotary backward", heads, dtype, options), backward


def _loss() -> Calls:
    labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
    for (width, valid), dtype in product(VOCABULARY, DTYPES):
        logits = _tensor(ROWS, width, dtype=dtype)
        yield Variant("loss forward", width, dtype, ""), partial(loss.statistics, logits, labels, valid)
        backward = partial(loss.gradient, logits, labels, valid, _tensor(ROWS), _tensor(ROWS), logits)
        yield Variant("loss backward", width, dtype, ""), backward


def _lists() -> Calls:
    """AdamW and clipping; their code does not depend on sizes."""
    size = HIDDEN[-1] * 1024
    hyper = Hyperparameters(1e-4, 0.9, 0.95, 1e-8, 0.1, 1)
    for dtype in DTYPES:
        grads = [_tensor(size, dtype=dtype)] * 3
        whole = [_tensor(size)] * 3
        for factor in (None, _tensor(1)):
            lists = TensorLists(whole, grads, whole, whole)
            yield (
                Variant("adam", size, dtype, _words(factor=factor is not None)),
                partial(adam.update_, lists, hyper, factor),
            )
        yield Variant("clip norm", size, dtype, ""), partial(clip.squared_norm, grads)
        yield Variant("clip scale", size, dtype, ""), partial(clip.scale_, grads, _tensor(1))


def _fp8() -> Calls:
    formats = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    sizes = ((8192, 5456), (20480, 3072))
    for (rows, columns), dtype, name, by_row, turned in product(sizes, DTYPES, formats, (False, True), (False, True)):
        x = _tensor(rows, columns, dtype=dtype)
        factor = _tensor(columns if turned else rows, 1) if by_row else torch.empty((), device="meta")
        options = f"{name} {_words(rows=by_row, transposed=turned)}".strip()
        yield Variant("fp8", rows, dtype, options), partial(fp8.cast, x, factor, formats[name], turned)


def _fp8_of_unwritten() -> Calls:
    """Casts of norms and activations as they are computed, and their largest values; FP8 is for bf16 alone."""
    sizes = [("gated", ffn, False) for ffn in FP8_FFN]
    sizes += [("normed", hidden, masked) for hidden, masked in product(HIDDEN, (False, True))]
    for kind, columns, masked in sizes:
        x = _operand(kind, columns, masked)
        kinds = _words(**{kind: True, "mask": masked})
        for by_row, turned in product((False, True), (False, True)):
            factor = _tensor(columns if turned else ROWS, 1) if by_row else torch.empty((), device="meta")
            call = partial(fp8.cast, x, factor, torch.float8_e4m3fn, turned)
            options = f"{kinds} {_words(rows=by_row, transposed=turned)}".strip()
            yield Variant("fp8 computed", columns, "bf16", options), call
        for axis in (0, 1):
            options = f"{kinds} {_words(columns=axis == 0, rows=axis == 1)}"
            yield Variant("fp8 largest", columns, "bf16", options), partial(fp8.largest, x, axis)
        if kind == "normed":  # for the exchange of sequence parallelism
            yield Variant("fp8 computed", columns, "bf16", f"{kinds} written"), partial(fp8.written, x)


def _operand(kind: str, columns: int, masked: bool) -> Gated | Normed:
    if kind == "gated":
        return Gated(_tensor(ROWS, 2 * columns, dtype="bf16"))
    mask = _tensor(columns) if masked else None
    weight = _tensor(columns, dtype="bf16")
    return Normed(_tensor(ROWS, columns, dtype="bf16"), _tensor(ROWS), _tensor(ROWS), weight, mask)


def _words(**chosen: bool) -> str:
    return " ".join(name for name, is_chosen in chosen.items() if is_chosen)
