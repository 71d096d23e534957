"""Rules on the precision of a stage: each says in one line what does not fit, or gives None.

They take the sequence length of the run and the number of processes, as the rules on the layout do.
"""

from __future__ import annotations

from flm_megatron.config.schema import StageConfig

FP8_MULTIPLE = 16


def fp8_needs_bf16(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Products in FP8 have operands and results in bf16."""
    if stage.fp8 != "none" and stage.precision != "bf16":
        return f"fp8 is {stage.fp8} with precision {stage.precision}: set precision to bf16, or fp8 to none"
    return None


def fp8_is_not_transformer_engines(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """Transformer Engine's layers have products of their own."""
    if stage.fp8 != "none" and stage.transformer_engine:
        return (
            f"fp8 is {stage.fp8} with transformer_engine: its layers run in bf16 only, set one of the two to "
            "none or false"
        )
    return None


def fp8_sizes_are_multiples(stage: StageConfig, sequence_length: int, world_size: int | None) -> str | None:
    """torch._scaled_mm takes matrices whose sides are multiples of 16: tokens of a micro-batch, and what a
    tensor-parallel rank holds of the width of queries, keys and values, and of the feed-forward layer."""
    if stage.fp8 == "none":
        return None
    model, tensor = stage.model, stage.parallel.tensor
    heads, dim = model.num_attention_heads, model.kv_channels
    tokens = stage.micro_batch * sequence_length
    sizes = {
        "model.hidden_size": (model.hidden_size, 1),
        "the width of all queries, keys and values": ((heads + 2 * model.query_groups) * dim, tensor),
        "the width of all heads": (heads * dim, tensor),
        "model.ffn_hidden_size": (model.ffn_hidden_size, tensor),
        f"micro_batch {stage.micro_batch} x data.sequence_length": (tokens, 1),
    }
    wrong = [
        f"{name} {size}" + (f" / parallel.tensor {parts}" if parts > 1 else "")
        for name, (size, parts) in sizes.items()
        if size % (parts * FP8_MULTIPLE)
    ]
    if not wrong:
        return None
    what = "is not a multiple" if len(wrong) == 1 else "are not multiples"
    return f"fp8 is {stage.fp8}, but {' and '.join(wrong)} {what} of {FP8_MULTIPLE}: change it, or set fp8 to none"


PRECISION_RULES = (fp8_needs_bf16, fp8_is_not_transformer_engines, fp8_sizes_are_multiples)
