"""megatron-core's GPT model from its local layer spec, with the optimizer and clipping that its wheel brings."""

from __future__ import annotations

from torch import Tensor

from flm_megatron.benchmarking.steps import Step, draw_weights
from flm_megatron.config.schema import StageConfig
from flm_megatron.device import current
from flm_megatron.engine.data_parallel import connect, replicate
from flm_megatron.engine.optimizer import get_megatron_optimizer
from flm_megatron.engine.replaced import as_shipped
from flm_megatron.engine.tensor_parallel import model_parallel_cuda_manual_seed, weight_gradient_is_fused
from flm_megatron.engine.transformer import GPTModel, get_gpt_layer_local_spec
from flm_megatron.model.engine_config import transformer_config
from flm_megatron.model.parameters.axis import padded_vocab_size
from flm_megatron.training.step import Batch, TrainState


def bare_megatron_step(stage: StageConfig, sequence_length: int) -> Step:
    """Its training step."""
    with as_shipped():
        state = BareTrainState(stage, sequence_length)

    def step(batches: list[Batch]) -> float:
        """A step with megatron-core as it is shipped."""
        with as_shipped():
            return state.train_step(batches).loss

    return step


class BareTrainState(TrainState):
    """The training step over megatron-core's own model, one chunk on one process."""

    def __init__(self, stage: StageConfig, sequence_length: int) -> None:
        self.stage, self.sequence_length = stage, sequence_length
        model = bare_model(stage, sequence_length).to(current().torch_device)
        draw_weights(model)
        self.chunks = replicate([model], stage.parallel)
        self.optimizer = get_megatron_optimizer(stage, self.chunks)
        connect(self.chunks, self.optimizer, stage.parallel)


class SummingGPT(GPTModel):
    """megatron-core's model; the training step wants the sum of the losses of unmasked tokens."""

    def forward(self, *args: object, loss_mask: Tensor, **kwargs: object) -> Tensor:
        """Sum over tokens (0-dim) of mask times loss."""
        return (super().forward(*args, **kwargs) * loss_mask).sum()


def bare_model(stage: StageConfig, sequence_length: int) -> SummingGPT:
    """megatron-core's GPTModel of the stage's shape with local modules."""
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    config = transformer_config(stage)
    # The engine's own way with weight gradients: fused where Apex's extension is.
    config.gradient_accumulation_fusion = weight_gradient_is_fused()
    return SummingGPT(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size(stage.model.vocab_size or 0, 1),
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
        rotary_base=stage.model.rope_theta,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=False,
    )
