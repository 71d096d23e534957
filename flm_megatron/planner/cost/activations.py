"""Bytes of activations of one micro-batch on one tensor-parallel rank, kept from forward to backward or made again.

After arXiv 2205.05198, with the tensors that this program's layers keep (a test counts them).
"""

from __future__ import annotations

from dataclasses import dataclass

from flm_megatron.planner.layout import Workload


@dataclass(frozen=True)
class LayerActivations:
    """One layer: bytes `kept` until its backward pass, and bytes `remade` while that runs."""

    kept: float
    remade: float


def residual_bytes(work: Workload) -> float:
    """A tensor of the residual stream, [sequence / sequence-parallel ranks, micro_batch, hidden]."""
    return stream_bytes(work) / work.sequence_parallel


def stream_bytes(work: Workload) -> int:
    """The residual stream of a micro-batch, gathered over sequence-parallel ranks."""
    return work.tokens * work.model.hidden_size * work.bytes


def layer_activations(work: Workload) -> LayerActivations:
    """What a layer keeps and makes again under the workload's recomputation."""
    stream = residual_bytes(work)
    inputs = 1 if work.model.parallel_residual else 2  # of the norms
    scores, attention, mlp = _scores(work), _attention(work), _feed_forward(work)
    # Norms' outputs where they are written, and what they keep besides their inputs.
    norms = [_norm_extra(work) + (0 if casts_input(work, reader) else stream) for reader in ("qkv", "fc1")]
    masks = 2 * stream / work.bytes if work.implementation.dropout else 0.0  # one byte per value
    whole = inputs * stream + sum(norms) + attention + scores + mlp + masks + _adapters(work)
    if work.recompute == "full":
        return LayerActivations(stream, whole - stream)
    if work.recompute == "attention":
        return LayerActivations(whole - scores, scores)
    if work.recompute == "selective":
        return LayerActivations(whole - sum(norms) - mlp, norms[1] + mlp)
    return LayerActivations(whole, 0.0)


def head_activations(work: Workload) -> float:
    """Kept by the final norm, the head and the loss: their inputs, and the logits or in place of them the softmax in
    fp32. Where head and loss are one operation it also has the gradient of its gathered input."""
    each = work.bytes if work.implementation.fused_loss or fuses_head(work) else 4
    kept = 2 * residual_bytes(work) + _norm_extra(work) + each * logits(work)
    if fuses_head(work):
        kept += stream_bytes(work) * (1 if work.sequence_parallel == 1 else 2)
    return kept


def logits(work: Workload) -> float:
    """Number of logits on one tensor rank at a time."""
    return head_tokens(work) * work.vocab_shard


def fuses_head(work: Workload) -> bool:
    """Whether head and loss are one operation, as `kernels.fuses_head_and_loss` decides."""
    return work.tokens * work.vocab_shard * work.bytes >= work.implementation.fused_head_from_mib * 2**20


def head_tokens(work: Workload) -> int:
    """Tokens whose logits are there at a time: a micro-batch's, or a chunk's of `kernels.linear_cross_entropy`."""
    if not fuses_head(work):
        return work.tokens
    chunk = work.tokens * work.model.hidden_size // work.vocab_shard
    return min(work.tokens, max(chunk, work.implementation.head_chunk))


def feed_forward_values(work: Workload) -> float:
    """Values of the feed-forward layer's hidden state on one tensor rank."""
    return work.tokens * work.model.ffn_hidden_size / work.parallel.tensor


def casts_input(work: Workload, reader: str) -> bool:
    """Whether the norm or the activation before a linear layer (`qkv`, `fc1`, `fc2`) is not written: FP8 products read
    its cast alone, and cast it again for the backward pass."""
    lora, model = work.model.lora, work.model
    written = model.activation != "swiglu" if reader == "fc2" else model.normalization != "rmsnorm"
    return work.fp8 != "none" and reader != "projection" and not written and not (lora and reader in lora.targets)


def _norm_extra(work: Workload) -> float:
    fused = work.implementation.fused_norm or work.model.normalization == "layernorm"
    if fused:
        return 0.0
    values = residual_bytes(work) / work.bytes
    return values * (4 if work.precision == "fp32" else 8)  # normalised values, and the input if it was widened


def _attention(work: Workload) -> float:
    """Query-key-value, rotated queries and keys with their tables, what norms of them read with 1 / rms of each, and
    the output that the projection reads."""
    model, tensor = work.model, work.parallel.tensor
    heads, groups, channels = model.num_attention_heads, model.query_groups, model.kv_channels
    values = (heads + 2 * groups) + heads
    tables = 0.0
    xpos = model.position == "xpos"
    if xpos:
        tables = 4.0 * work.sequence_length * channels
    if work.implementation.rotary and not work.implementation.fused_rotary:
        tables += 4.0 * work.sequence_length * model.rotary_channels * work.bytes
    if work.implementation.rotary and (xpos or not work.implementation.fused_rotary):
        values += heads + groups
    if model.query_key_norm:
        values += heads + groups
        tables += 4.0 * work.tokens * (heads + groups) / tensor
    return work.tokens * values * channels * work.bytes / tensor + tables


def _scores(work: Workload) -> float:
    """What attention keeps between the products: the log-sum-exp, or softmax, mask and masked softmax."""
    rows = work.tokens * work.model.num_attention_heads / work.parallel.tensor
    if work.implementation.flash_attention:
        return 4 * rows
    each = 2 * work.bytes + 1 if work.implementation.dropout else work.bytes
    return rows * work.sequence_length * each


def _adapters(work: Workload) -> float:
    """What the second factor of every adapter reads."""
    lora = work.model.lora
    return float(work.tokens * lora.rank * len(lora.targets) * work.bytes) if lora else 0.0


def _feed_forward(work: Workload) -> float:
    """Multiples of the hidden state: the first matrix's output, and what the second reads; unfused SwiGLU also keeps
    the activated gate and a copy of the other half."""
    copies = 2
    if work.model.gated:
        copies = 3 if work.implementation.fused_activation else 5
        copies -= casts_input(work, "fc2")
    return copies * feed_forward_values(work) * work.bytes
