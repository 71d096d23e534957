"""FP8 products on a GPU: at the sizes of the 52B layer against the formats in float64, training beside bf16, speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flm_megatron.benchmarking.measure import measure_training_step, on_ranks
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.benchmarking.workload import Request, layer_stack
from flm_megatron.config.schema import KernelsConfig, ModelConfig, OptimizerConfig, ParallelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.distributed.world import one_process
from flm_megatron.kernels import fp8
from flm_megatron.optim.learning_rate import set_learning_rates
from flm_megatron.training.step import Batch, TrainState
from tests.support.fp8_oracle import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(current().name != "cuda", reason="needs a CUDA device"),
    pytest.mark.skipif(current().fp8_obstacle() is not None, reason=current().fp8_obstacle() or ""),
]

SCALINGS: list[fp8.Scaling] = ["tensorwise", "rowwise"]
MODEL = ModelConfig(num_layers=4, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=8, vocab_size=1000)
STAGE = StageConfig(model=MODEL, precision="bf16", optimizer=OptimizerConfig(lr=1e-3))
LARGE = StageConfig(
    name="52b",
    model=ModelConfig(hidden_size=8192, ffn_hidden_size=21824, num_attention_heads=64, vocab_size=80000),
    precision="bf16",
    global_batch=8,
)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("outputs", "inputs"), [(24576, 8192), (8192, 8192), (43648, 8192), (8192, 21824)])
def test_products_of_the_52b_layer(outputs: int, inputs: int, scaling: fp8.Scaling) -> None:
    device = current().torch_device
    draw = torch.Generator(device).manual_seed(1)
    x, weight, grad = (
        torch.randn(*shape, generator=draw, device=device, dtype=torch.bfloat16)
        for shape in ((512, inputs), (outputs, inputs), (512, outputs))
    )

    def cast(matrix: torch.Tensor, dtype: torch.dtype, transpose: bool) -> fp8.Quantized:
        return fp8.quantize(matrix, dtype, fp8.largest(matrix) if scaling == "tensorwise" else None, transpose)

    other, fast = fp8.GRADIENT_DTYPE[scaling], scaling == "rowwise"
    found = (
        fp8.product(cast(x, fp8.E4M3, False), cast(weight, fp8.E4M3, False), torch.bfloat16, True),
        fp8.product(cast(grad, other, False), cast(weight, fp8.E4M3, True), torch.bfloat16, fast),
        fp8.product(cast(grad, other, True), cast(x, fp8.E4M3, True), torch.bfloat16, fast),
    )
    for got, want in zip(found, linear(x, weight, grad, scaling), strict=True):
        assert (got.double() - want).norm() < 5e-3 * want.norm()


@pytest.fixture
def world() -> Iterator[None]:
    """One process with megatron-core's parallel state."""
    with one_process():
        yield


def curve(stage: StageConfig, steps: int) -> torch.Tensor:
    """Losses of training on the same two batches again and again."""
    from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
    from flm_megatron.checkpoint.sharding.model_state import load_state

    state = TrainState(stage, 512)
    load_state(InitialCheckpoint(stage.model, 7), state.chunks, state.optimizer)
    set_learning_rates(state.optimizer, stage, stage.optimizer.lr)
    return torch.tensor([state.train_step([batch(step % 2)] * 2).loss for step in range(steps)])


def batch(seed: int) -> Batch:
    """One random sample."""
    text = torch.randint(0, 1000, (1, 513), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(512)[None]
    return {"tokens": text[:, :-1], "labels": text[:, 1:], "position_ids": positions, "loss_mask": torch.ones(1, 512)}


@pytest.mark.usefixtures("world")
def test_loss_curves_are_those_of_bf16() -> None:
    plain = curve(replace(STAGE, global_batch=2), 60)
    assert plain[-1] < 0.5 * plain[0]
    for scaling in SCALINGS:
        found = curve(replace(STAGE, global_batch=2, fp8=scaling), 60)
        assert 0 < (found - plain).abs().max() < 0.02 * plain[0], scaling
        assert torch.equal(found, curve(replace(STAGE, global_batch=2, fp8=scaling), 60))


@pytest.mark.slow
def test_a_step_of_the_52b_shape_is_faster() -> None:
    stage = layer_stack(LARGE, 4)
    plain, *others = (step_time_s(timed) for timed in (stage, *(replace(stage, fp8=scaling) for scaling in SCALINGS)))
    assert all(plain > 1.2 * time for time in others), (plain, others)


def step_time_s(stage: StageConfig) -> float:
    """Median seconds of a step on one GPU."""
    request = Request(stage, 4096, KernelsConfig(), steps=10, profiled=0)
    return Measurement(**on_ranks(ParallelConfig(), 600, measure_training_step, request)).step_time_s
