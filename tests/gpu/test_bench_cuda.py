"""A benchmark on one GPU: the parts make up the step, memory is what was planned, and utilisation is given."""

from __future__ import annotations

from typing import Any

import pytest

from flm_megatron.benchmarking.measure import measure_training_step, on_ranks
from flm_megatron.benchmarking.result import Measurement
from flm_megatron.benchmarking.workload import Request
from flm_megatron.config.schema import KernelsConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.device.hardware import find_hardware

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(current().name != "cuda", reason="needs a CUDA device")]

MODEL = ModelConfig(num_layers=4, hidden_size=2048, ffn_hidden_size=5504, num_attention_heads=16, vocab_size=32000)
STAGE = StageConfig(name="small", model=MODEL, micro_batch=2, global_batch=4, precision="bf16")


@pytest.fixture(scope="module")
def measured() -> Measurement:
    """One measurement of the stage."""
    values: dict[str, Any] = on_ranks(
        ParallelConfig(), 600, measure_training_step, Request(STAGE, 2048, KernelsConfig(), steps=10)
    )
    return Measurement(**values)


def test_the_parts_make_up_the_step(measured: Measurement) -> None:
    parts = measured.parts_s
    assert sum(parts.values()) == pytest.approx(measured.step_time_s, rel=0.3)  # profiling slows a step
    assert parts["MLP"] > parts["norms"] > 0
    for part in ("attention", "head and loss", "optimizer", "gradient sums"):
        assert parts[part] > 0
    assert parts["communication"] < 0.1 * sum(parts.values())


def test_memory_is_what_was_planned(measured: Measurement) -> None:
    assert measured.memory_gib == pytest.approx(measured.planned_gib, rel=0.1)


def test_a_known_device_has_utilisation(measured: Measurement) -> None:
    if find_hardware(current().hardware_name()) is None:
        pytest.skip(f"{current().hardware_name()} is not in the table")
    assert measured.mfu is not None
    assert 0.05 < measured.mfu < 1
