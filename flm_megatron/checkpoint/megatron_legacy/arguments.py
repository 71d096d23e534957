"""The arguments in Megatron-LM's checkpoints, to the model's configuration and back."""

from __future__ import annotations

import argparse
import reprlib
from typing import Any

from flm_megatron.checkpoint.files.pickle.records import SCALARS
from flm_megatron.config.schema import ModelConfig, MupConfig, ParallelConfig
from flm_megatron.errors import RequestError
from flm_megatron.model.limits import check_limits
from flm_megatron.model.parameters.axis import VOCABULARY_MULTIPLE, padded_vocab_size

Arguments = dict[str, Any]
"""Arguments by name: numbers and text as a pickle has them, which gives them no type."""


def model_from_arguments(arguments: object, where: str, vocab_size: int | None = None) -> ModelConfig:
    """The model that a checkpoint's arguments describe; `where` names it in errors.

    `vocab_size` is the true vocabulary, needed where the arguments hold only the padded one.
    Raises RequestError for arguments that are missing or that ask for a block this program does not have.
    """
    given = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    # What is neither a number nor text is shown, in short, and equal to nothing that is supported.
    known: Arguments = {name: value if type(value) in SCALARS else reprlib.repr(value) for name, value in given.items()}
    if "num_layers" not in known:
        raise RequestError(f"{where}: it does not hold the arguments of its run, so its model is not known")
    _refuse(known, where)
    true_vocab = _recorded_vocabulary(known) or vocab_size
    if not true_vocab:
        raise RequestError(
            f"{where}: its true vocabulary is not recorded, only the padded {known.get('padded_vocab_size')}: give"
            " --vocab-size"
        )
    try:
        return check_limits(_model(known, int(true_vocab)), where)
    except RequestError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(repr(error).split())
        raise RequestError(f"{where}: its arguments do not describe a decoder: {reason:.200}") from error


def _recorded_vocabulary(known: Arguments) -> int | None:
    """The true vocabulary; Megatron-LM's NullTokenizer has one id more than its argument says, for the document end."""
    recorded = known.get("vocab_size")
    return recorded + 1 if recorded and known.get("tokenizer_type") == "NullTokenizer" else recorded


def arguments_of(
    model: ModelConfig, parallel: ParallelConfig, sequence_length: int, samples: int
) -> argparse.Namespace:
    """Arguments under which Megatron-LM's core GPT model has the shape of `model`.

    Raises RequestError for what Megatron-LM's checkpoints do not have.
    """
    for name in ("sliding_window", "tie_embeddings", "parallel_residual"):
        if value := getattr(model, name):
            raise RequestError(
                f"the model has {name} = {value}, which is not written into Megatron-LM's checkpoints: use "
                "`flm checkpoint reshard`"
            )
    if model.activation not in ("swiglu", "gelu"):
        raise RequestError(
            f"the model has activation = {model.activation}, which is not written into Megatron-LM's "
            "checkpoints: use `flm checkpoint reshard`"
        )
    if model.position != "rope":
        raise RequestError(f"the model has position = {model.position}, which Megatron-LM's checkpoints cannot express")
    if model.rope_scaling is not None:
        raise RequestError("the model has rope_scaling, whose constants Megatron-LM's checkpoints do not hold")
    if model.query_key_norm and (model.normalization, model.query_key_epsilon) != ("rmsnorm", model.norm_epsilon):
        raise RequestError(
            f"the model has query_key_norm with epsilon {model.query_key_epsilon} beside {model.normalization} with "
            f"{model.norm_epsilon}: Megatron-LM's checkpoints have one kind of norm and one epsilon"
        )
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.query_groups != model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.kv_channels,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocab_size(int(model.vocab_size or 0), parallel.tensor),
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        norm_epsilon=model.norm_epsilon,
        swiglu=model.gated,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.query_key_norm,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta,
        rotary_percent=model.rotary_percent,
        untie_embeddings_and_output_weights=True,
        apply_layernorm_1p=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        max_position_embeddings=sequence_length,
        seq_length=sequence_length,
        consumed_train_samples=samples,
        use_mcore_models=True,
        input_mult=model.input_mult,
        output_mult=model.output_mult,
        mup_scale_factor=model.width_factor,
    )


PLAIN: dict[str, tuple[object, ...]] = {
    "position_embedding_type": ("rope",),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "use_rope_scaling": (False,),
    "no_rope_freq": (None,),
    "window_size": (None,),
    "softmax_type": ("vanilla",),
    "untie_embeddings_and_output_weights": (True,),
    "apply_layernorm_1p": (False,),
    "num_experts": (None, 0),
    "qk_l2_norm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "openai_gelu": (False,),
    "multi_latent_attention": (False,),
}
"""Arguments that change the function or the tensors, with the values that the models here have."""


def _refuse(known: Arguments, where: str) -> None:
    for name, accepted in PLAIN.items():
        found = known.get(name, accepted[0])
        if found not in accepted:
            raise RequestError(f"{where}: the checkpoint has {name} = {found!s:.60}; only {accepted[0]} is supported")
    if known.get("qk_layernorm") and known.get("normalization") != "RMSNorm":
        raise RequestError(f"{where}: the checkpoint has qk_layernorm with LayerNorm; only RMSNorm is supported there")


def _model(known: Arguments, vocab_size: int) -> ModelConfig:
    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    biased = bool(known.get("add_bias_linear", True))
    factor = float(known.get("mup_scale_factor", 1.0))
    channels = known.get("kv_channels") or hidden // heads
    epsilon = "norm_epsilon" if "norm_epsilon" in known else "layernorm_epsilon"
    return ModelConfig(
        num_layers=known["num_layers"],
        hidden_size=hidden,
        ffn_hidden_size=known.get("ffn_hidden_size") or 4 * hidden,
        num_attention_heads=heads,
        num_query_groups=known.get("num_query_groups") if known.get("group_query_attention") else None,
        head_dim=None if channels == hidden // heads else channels,
        vocab_size=vocab_size,
        normalization="rmsnorm" if known.get("normalization") == "RMSNorm" else "layernorm",
        activation="swiglu" if known.get("swiglu") else "gelu",
        bias=biased,
        query_key_norm=bool(known.get("qk_layernorm")),
        qkv_bias=not biased and bool(known.get("add_qkv_bias")),
        norm_epsilon=known.get(epsilon, 1e-5),
        rope_theta=float(known.get("rotary_base") or 10000.0),
        rotary_percent=float(known.get("rotary_percent", 1.0)),
        input_mult=float(known.get("input_mult", 1.0)),
        output_mult=float(known.get("output_mult", 1.0)),
        mup=MupConfig(enabled=True, base_hidden_size=max(1, round(hidden / factor))) if factor != 1 else MupConfig(),
    )
