"""Time of one micro-batch's forward and backward pass through a layer, the head and the embedding."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flm_megatron.device.hardware import Precision
from flm_megatron.planner.cost.activations import (
    casts_input,
    feed_forward_values,
    fuses_head,
    head_tokens,
    logits,
    residual_bytes,
    stream_bytes,
)
from flm_megatron.planner.cost.communication import tensor_time
from flm_megatron.planner.cost.matmul import attention_time, matmul_time, memory_time
from flm_megatron.planner.cost.traffic import PassExchanges, embedding_exchanges, head_exchanges, pair_exchanges
from flm_megatron.planner.layout import Workload
from flm_megatron.planner.machine import Machine
from flm_megatron.training.metrics.flops import seen_keys

# Bytes per logit that the loss reads and writes in fp32, forward and backward, as a row of plain kernels.
LOSS_BYTES = 38, 14
FLASH_BACKWARD = 2.5  # five products instead of two


@dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on; `tensor` is tensor-parallel communication that nothing hides."""

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    tensor: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all four, one after the other."""
        return self.matmul + self.attention + self.memory_bound + self.tensor

    def __add__(self, other: Seconds) -> Seconds:
        """Sum by kind."""
        return Seconds(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, factor: float) -> Seconds:
        """`factor` times as long."""
        return Seconds(*(getattr(self, field.name) * factor for field in fields(self)))


@dataclass(frozen=True)
class Passes:
    """Forward and backward pass of a layer, head or embedding; the backward pass includes recomputation."""

    forward: Seconds
    backward: Seconds

    @property
    def total(self) -> Seconds:
        """Forward and backward pass together."""
        return self.forward + self.backward


def layer_passes(work: Workload, machine: Machine) -> Passes:
    """One layer, recomputation counted as backward."""
    attention, mlp = _attention_passes(work, machine), _feed_forward_passes(work, machine)
    forward, backward = attention.forward + mlp.forward, attention.backward + mlp.backward
    again = Seconds()
    if work.recompute == "full":
        again = forward
    elif work.recompute == "selective":
        again = mlp.forward + Seconds(memory_bound=memory_time(machine, 2 * residual_bytes(work)))
    elif work.recompute == "attention":
        again = _core_attention(work, machine).forward
    return Passes(forward, backward + again)


def head_passes(work: Workload, machine: Machine) -> Passes:
    """Final norm, head and loss. Where the latter two are one operation, forward also stands for their gradients."""
    tokens = head_tokens(work)
    products = _linear(work, machine, work.vocab_shard, work.model.hidden_size, tokens=tokens)
    each = (work.bytes, 2 * work.bytes) if work.implementation.fused_loss or fuses_head(work) else LOSS_BYTES
    loss = [Seconds(memory_bound=memory_time(machine, size * logits(work))) for size in each]
    chunks = work.tokens / tokens
    forward, backward = (products.forward + loss[0]) * chunks, (products.backward + loss[1]) * chunks
    if fuses_head(work):
        forward, backward = forward + backward, Seconds()
    norm = residual_bytes(work)
    hidden = backward.matmul * (1.0 if work.parallel.sequence else 0.5)
    exposed = _exposed(work, machine, head_exchanges(work), hidden)
    forward += Seconds(memory_bound=memory_time(machine, 2 * norm)) + exposed.forward
    return Passes(forward, backward + Seconds(memory_bound=memory_time(machine, 3 * norm)) + exposed.backward)


def embedding_passes(work: Workload, machine: Machine) -> Passes:
    """Rows are copied forward; backward their dense gradient is made and added to the fp32 buffer."""
    stream = stream_bytes(work)
    exposed = _exposed(work, machine, embedding_exchanges(work))
    gradient = work.embedding_parameters * (2 * work.bytes + 8)
    forward = Seconds(memory_bound=memory_time(machine, 2 * stream)) + exposed.forward
    return Passes(forward, Seconds(memory_bound=memory_time(machine, stream + gradient)) + exposed.backward)


def _attention_passes(work: Workload, machine: Machine) -> Passes:
    model, tensor = work.model, work.parallel.tensor
    heads, groups, channels = model.num_attention_heads, model.query_groups, model.kv_channels
    qkv = _linear(work, machine, (heads + 2 * groups) * channels / tensor, model.hidden_size, "qkv")
    projection = _linear(work, machine, model.hidden_size, heads * channels / tensor, "projection")
    core = _core_attention(work, machine)
    rotated = (heads + groups) * channels * work.tokens / tensor * work.bytes if work.implementation.rotary else 0.0
    rotation = memory_time(machine, rotated * (2 if work.implementation.fused_rotary else 12))
    rotation += memory_time(machine, rotated * 6 if model.position == "xpos" else 0.0)
    # Queries and keys are brought together, normalised and put back: each read and written three times.
    rotation += memory_time(machine, rotated * 6 if model.query_key_norm else 0.0)
    around = _around(work, machine, qkv)
    return Passes(
        qkv.forward + core.forward + projection.forward + around.forward + Seconds(memory_bound=rotation),
        qkv.backward + core.backward + projection.backward + around.backward + Seconds(memory_bound=rotation),
    )


def _feed_forward_passes(work: Workload, machine: Machine) -> Passes:
    model, values = work.model, feed_forward_values(work) * work.bytes
    width = model.ffn_hidden_size / work.parallel.tensor
    first = _linear(work, machine, width * (2 if model.gated else 1), model.hidden_size, "fc1")
    second = _linear(work, machine, model.hidden_size, width, "fc2")
    forward, backward = (3, 5) if model.gated else (2, 3)  # halves read and written
    if not work.implementation.fused_activation:
        forward, backward = 2 * forward + 1, 2 * backward
    around = _around(work, machine, first)
    return Passes(
        first.forward + second.forward + around.forward + Seconds(memory_bound=memory_time(machine, forward * values)),
        first.backward
        + second.backward
        + around.backward
        + Seconds(memory_bound=memory_time(machine, backward * values)),
    )


def _around(work: Workload, machine: Machine, column: Passes) -> Passes:
    """What surrounds a pair of matrices, the first split by columns: norm, residual sum and exchanges."""
    stream = residual_bytes(work)
    mask = stream / work.bytes if work.implementation.dropout else 0.0
    # A fused sum spares the norm one stream to read, and backward two; of a layer's two pairs one is fused.
    fuses = work.implementation.fused_residual and not work.model.parallel_residual
    spared = 0.5 if fuses and work.recompute != "selective" else 0.0
    forward = memory_time(machine, 2 * stream) + memory_time(machine, (3 - spared) * stream + mask)
    backward = memory_time(machine, 3 * stream) + memory_time(machine, (3 - 2 * spared) * stream + mask)
    # Beside the weight gradient of the first matrix, with sequence parallelism beside the gradient of its input too.
    hidden = column.backward.matmul * (1.0 if work.parallel.sequence else 0.5)
    exposed = _exposed(work, machine, pair_exchanges(work), hidden)
    return Passes(Seconds(memory_bound=forward) + exposed.forward, Seconds(memory_bound=backward) + exposed.backward)


def _exposed(work: Workload, machine: Machine, exchanges: PassExchanges, hidden: float = 0.0) -> Passes:
    """Exchanges of the residual stream over the tensor group, less what `hidden` seconds of products hide."""
    ring = tensor_time(work, machine, stream_bytes(work))
    if not work.implementation.overlaps_input_gradient:
        hidden = 0.0
    backward = exchanges.alone.rings * ring + max(0.0, exchanges.beside.rings * ring - hidden)
    return Passes(Seconds(tensor=exchanges.forward.rings * ring), Seconds(tensor=backward))


def _linear(
    work: Workload, machine: Machine, columns: float, inner: float, layer: str = "", tokens: int | None = None
) -> Passes:
    """A weight [columns, inner] on this rank: its product, and the gradients of input and weight; the latter is added
    to the fp32 buffer by the product itself, or by a kernel of its own. In FP8, that is where it is a `layer` of those
    that have it, operands are cast before each product, weights once a step, and what is added is read out of caches;
    efficiencies are those of other products, for nothing was measured. `tokens` are a micro-batch's unless given."""
    tokens = tokens or work.tokens
    fp8 = bool(layer) and work.fp8 != "none"
    precision: Precision = "fp8" if fp8 else work.precision
    forward = matmul_time(machine, precision, tokens, columns, inner)
    backward = matmul_time(machine, precision, tokens, inner, columns)
    backward += matmul_time(machine, precision, columns, inner, tokens)
    held = 2 * work.implementation.gradient_bytes
    added = columns * inner * (held + (-2 if work.implementation.fused_weight_gradient else work.bytes))
    cast = [0.0, 0.0]
    if fp8:
        each = 2 * work.bytes + 1  # read for the largest value, read again, written
        operands = (tokens + columns / work.micro_batches) * inner
        forward_bytes = each * operands - _spared_bytes(work, layer, each)
        cast = [memory_time(machine, size) for size in (forward_bytes, each * (operands + 2 * tokens * columns))]
    return Passes(
        Seconds(matmul=forward, memory_bound=cast[0]),
        Seconds(matmul=backward, memory_bound=memory_time(machine, added) + cast[1]),
    )


def _spared_bytes(work: Workload, layer: str, each: int) -> float:
    """What a layer's forward pass in FP8 does not move: a shard of a sequence is cast before it is gathered, and a norm
    or activation that is cast as it is computed is neither written nor, a norm, read for its largest value. (SwiGLU is
    computed twice, from twice as many values.)"""
    spared = 0.0
    if layer in ("qkv", "fc1"):
        spared += each * (stream_bytes(work) - residual_bytes(work)) / work.bytes
    if casts_input(work, layer):
        spared += feed_forward_values(work) * work.bytes if layer == "fc2" else 2 * residual_bytes(work)
    return spared


def _core_attention(work: Workload, machine: Machine) -> Passes:
    model, sequence = work.model, work.sequence_length
    heads, channels = model.num_attention_heads / work.parallel.tensor, model.kv_channels
    if work.implementation.flash_attention:
        flops = 4.0 * work.tokens * seen_keys(model, sequence) * heads * channels  # two products
        forward = attention_time(machine, work.precision, flops)
        return Passes(Seconds(attention=forward), Seconds(attention=FLASH_BACKWARD * forward))
    batch = work.micro_batch * heads
    product = matmul_time(machine, work.precision, sequence, sequence, channels, batch)
    product += matmul_time(machine, work.precision, sequence, channels, sequence, batch)
    scores = batch * sequence**2
    dropout = 2 * work.bytes + 1 if work.implementation.dropout else 0
    softmax = memory_time(machine, scores * (2 * work.bytes + dropout))
    gradient = memory_time(machine, scores * (3 * work.bytes + dropout))
    return Passes(Seconds(attention=product + softmax), Seconds(attention=2 * product + gradient))
