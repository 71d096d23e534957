"""megatron-core's GPT model from its local layer spec, with the optimizer and clipping that its wheel brings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from flm_megatron.benchmarking.steps import Step, draw_weights
from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.training.step import Batch, TrainState, wrap_chunks

PATCHED = {
    "megatron.core.optimizer": ("Adam", "USING_PYTORCH_OPTIMIZER"),
    "megatron.core.optimizer.distrib_optimizer": (
        "Adam",
        "HAVE_APEX_OR_TE",
        "USING_APEX_OPTIMIZER",
        "USING_TE_OPTIMIZER",
    ),
    "megatron.core.optimizer.clip_grads": ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl"),
    "megatron.core.tensor_parallel.layers": ("fused_weight_gradient_mlp_cuda",),
}
"""Names that `optim` and `model.gradient_accumulation` give another meaning in megatron-core, by module; one that is
not there counts as none."""


def bare_megatron_step(stage: StageConfig, sequence_length: int) -> Step:
    """Its training step; called before our own optimizer is built in this process."""
    shipped = _names()
    state = BareTrainState(stage, sequence_length)

    def step(batches: list[Batch]) -> float:
        """A step with megatron-core as it is shipped."""
        with _put(shipped):
            return state.train_step(batches).loss

    return step


class BareTrainState(TrainState):
    """The training step over megatron-core's own model, one chunk on one process."""

    def __init__(self, stage: StageConfig, sequence_length: int) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import get_megatron_optimizer

        from flm_megatron.optim.build import engine_config

        self.stage, self.sequence_length = stage, sequence_length
        self.chunks = wrap_chunks([bare_model(stage, sequence_length)], stage)
        draw_weights(self.chunks[0])
        self.optimizer = get_megatron_optimizer(engine_config(stage), self.chunks, use_gloo_process_groups=False)
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss


def bare_model(stage: StageConfig, sequence_length: int) -> Any:
    """megatron-core's GPTModel of the stage's shape with local modules."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import layers
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from flm_megatron.model.engine_config import transformer_config
    from flm_megatron.model.parameters.axis import padded_vocab_size

    class SummingGPT(GPTModel):
        """The training step wants the sum of the losses of unmasked tokens."""

        def forward(self, *args: Any, loss_mask: Tensor, **kwargs: Any) -> Tensor:
            """Sum over tokens (0-dim) of mask times loss."""
            return (super().forward(*args, **kwargs) * loss_mask).sum()

    current().prepare()
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    config = transformer_config(stage)
    # The engine's own way with weight gradients: fused where Apex's extension is.
    config.gradient_accumulation_fusion = bool(layers._grad_accum_fusion_available)
    return SummingGPT(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size(stage.model.vocab_size or 0, 1),
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
        rotary_base=stage.model.rope_theta,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=False,
    )


def _names() -> dict[tuple[Any, str], Any]:
    from importlib import import_module

    modules = {name: import_module(name) for name in PATCHED}
    return {
        (modules[name], attribute): getattr(modules[name], attribute, None)
        for name in PATCHED
        for attribute in PATCHED[name]
    }


@contextmanager
def _put(values: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Give names in modules these values while the block runs."""
    before = {(module, name): getattr(module, name, None) for module, name in values}
    try:
        for (module, name), value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
