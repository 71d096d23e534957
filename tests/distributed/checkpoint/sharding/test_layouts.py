"""One checkpoint, loaded and saved again under every kind of layout: the same bits, and training goes on the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.logical import EXP_AVG, EXP_AVG_SQ, MASTER
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import load_state, save_state
from flm_megatron.checkpoint.torch_dist.logical_hash import logical_hash, tensor_hashes
from flm_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from flm_megatron.config.schema.stage import Precision
from flm_megatron.errors import RequestError
from flm_megatron.model.parameters import parameter_specs
from tests.support.layouts import STAGE, name, relative_difference, take_steps, train_state_under
from tests.support.pool import Pool

# Odd on purpose: each tensor size pads the vocabulary differently, and heads share keys and values.
MODEL = ModelConfig(
    num_layers=4, hidden_size=48, ffn_hidden_size=70, num_attention_heads=6, num_query_groups=2, vocab_size=301
)
WRITER = ParallelConfig(tensor=2, pipeline=2, data=2)
READERS = [
    ParallelConfig(data=1),
    ParallelConfig(data=2),
    ParallelConfig(pipeline=2, virtual_pipeline=2, data=1),
    ParallelConfig(tensor=2, data=2, distributed_optimizer=False),
]
MORE_READERS = [
    ParallelConfig(tensor=2, pipeline=2, data=1),
    ParallelConfig(data=1, distributed_optimizer=False),
    ParallelConfig(tensor=2, sequence=True, data=1),
    ParallelConfig(pipeline=4, data=1),
    ParallelConfig(tensor=2, pipeline=2, data=2),
    ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True, data=2, distributed_optimizer=False),
    ParallelConfig(pipeline=2, data=4),
    ParallelConfig(data=8),
]


def stage_of(precision: Precision) -> StageConfig:
    return replace(STAGE, model=MODEL, precision=precision)


def world_of(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * (parallel.data or 1)


def train_and_save(path: str, parallel: ParallelConfig, precision: Precision) -> list[tuple[float, float]]:
    """Two steps, a checkpoint, and the loss and gradient norm of two more steps."""
    with train_state_under(parallel, stage_of(precision)) as state:
        take_steps(state, range(2))
        save_state(path, state.chunks, state.optimizer, Manifest(position=StagePosition(2, optimizer_step=2))).wait()
        return take_steps(state, range(2, 4))


def load_and_save(path: str, out: str, parallel: ParallelConfig, precision: Precision) -> Any:
    """Steps of the optimizer's groups after loading, loss and gradient norm of two more steps; saved before these."""
    with train_state_under(parallel, stage_of(precision), seed=99) as state:
        load_state(open_checkpoint(path), state.chunks, state.optimizer)
        steps = {group["step"] for group in state.optimizer.param_groups}
        save_state(out, state.chunks, state.optimizer, Manifest(position=StagePosition(2, optimizer_step=2))).wait()
        return steps, take_steps(state, range(2, 4))


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def canonical(request: pytest.FixtureRequest, pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("canonical") / request.param
    losses = pool.run(world_of(WRITER), train_and_save, str(path), WRITER, request.param)[0]
    return path, request.param, losses


@pytest.mark.parametrize(
    "parallel",
    [*READERS, *(pytest.param(parallel, marks=pytest.mark.slow) for parallel in MORE_READERS)],
    ids=name,
)
def test_loaded_and_saved_again_under_another_layout(
    canonical: Any, parallel: ParallelConfig, pool: Pool, tmp_path: Path
) -> None:
    path, precision, losses = canonical
    results = pool.run(world_of(parallel), load_and_save, str(path), str(tmp_path / "again"), parallel, precision)
    first, again = open_checkpoint(path), open_checkpoint(tmp_path / "again")
    assert tensor_hashes(first) == tensor_hashes(again)
    assert again.manifest.tensors == tensor_hashes(again)
    assert again.manifest.logical_hash == first.manifest.logical_hash == logical_hash(first)
    assert all(steps == {2} for steps, _ in results)
    assert relative_difference(losses, results[0][1]) < (1e-5 if precision == "fp32" else 2e-2)


def test_checkpoint_holds_the_logical_tensors(canonical: Any) -> None:
    path, precision, _ = canonical
    checkpoint = open_checkpoint(path)
    specs = parameter_specs(MODEL)
    wanted = {prefix + n: s.shape for n, s in specs.items() for prefix in ("", MASTER, EXP_AVG, EXP_AVG_SQ)}
    assert {n: info.shape for n, info in checkpoint.tensors.items()} == wanted
    for weight in specs:
        assert checkpoint.tensors[weight].dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(
            checkpoint.read(weight), checkpoint.read(MASTER + weight).to(checkpoint.tensors[weight].dtype)
        )
        assert checkpoint.read(EXP_AVG + weight).any() and (checkpoint.read(EXP_AVG_SQ + weight) >= 0).all()
    if precision == "bf16":
        assert not torch.equal(
            checkpoint.read("output_layer.weight").float(), checkpoint.read(MASTER + "output_layer.weight")
        )


def weights_to_masters(path: str) -> None:
    with train_state_under(ParallelConfig(tensor=2, data=2), stage_of("bf16"), seed=1) as state:
        take_steps(state, range(1))
        load_state(InitialCheckpoint(MODEL, seed=5), state.chunks, state.optimizer)
        assert all(group["step"] == 0 for group in state.optimizer.param_groups)
        save_state(path, state.chunks, state.optimizer, Manifest()).wait()
        with pytest.raises(RequestError, match="does not say after how many steps"):
            load_state(open_checkpoint(path), state.chunks, state.optimizer)
        wrong = InitialCheckpoint(replace(MODEL, ffn_hidden_size=72), seed=5)
        with pytest.raises(RequestError, match=r"linear_fc1.weight has shape \(4, 144, 48\) .* \(4, 140, 48\)"):
            load_state(wrong, state.chunks, state.optimizer)


def test_masters_start_from_weights_in_their_own_precision(pool: Pool, tmp_path: Path) -> None:
    pool.run(4, weights_to_masters, str(tmp_path / "saved"))
    checkpoint, source = open_checkpoint(tmp_path / "saved"), InitialCheckpoint(MODEL, seed=5)
    for weight in source.tensors:
        assert torch.equal(checkpoint.read(MASTER + weight), source.read(weight))
        assert torch.equal(checkpoint.read(weight), source.read(weight).bfloat16())
        assert not checkpoint.read(EXP_AVG + weight).any() and not checkpoint.read(EXP_AVG_SQ + weight).any()


def fp32_from_masters(source: str, path: str) -> None:
    with train_state_under(ParallelConfig(data=2), stage_of("fp32"), seed=1) as state:
        load_state(open_checkpoint(source), state.chunks, state.optimizer)
        weights = [p.detach().clone() for chunk in state.chunks for p in chunk.parameters()]
        save_state(path, state.chunks, None, Manifest()).wait()
        gathered: list[Any] = [None] * 2
        torch.distributed.all_gather_object(gathered, weights)
        assert all(torch.equal(a, b) for a, b in zip(*gathered, strict=True))


def test_fp32_training_goes_on_from_the_masters_of_bf16(canonical: Any, pool: Pool, tmp_path: Path) -> None:
    path = canonical[0]
    pool.run(2, fp32_from_masters, str(path), str(tmp_path / "saved"))
    checkpoint, source = open_checkpoint(tmp_path / "saved"), open_checkpoint(path)
    assert not checkpoint.has_optimizer() and checkpoint.manifest.optimizer == "none"
    for weight in checkpoint.tensors:
        assert torch.equal(checkpoint.read(weight), source.read(MASTER + weight))


def padding_is_zero(path: str) -> bool:
    with train_state_under(ParallelConfig(tensor=2, data=1), stage_of("fp32"), seed=1) as state:
        for chunk in state.chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(7.0)
        load_state(open_checkpoint(path), state.chunks, state.optimizer)
        model: Any = state.chunks[-1].module
        weight = model.output_layer.weight
        start = torch.distributed.get_rank() * weight.shape[0]
        return bool(weight[max(0, MODEL.vocab_size - start) :].count_nonzero() == 0) and bool(weight.any() or start)


def test_padding_rows_are_zero_after_loading(canonical: Any, pool: Pool) -> None:
    assert all(pool.run(2, padding_is_zero, str(canonical[0])))


def test_weights_that_are_gathered_late_are_saved_whole(pool: Pool, tmp_path: Path) -> None:
    overlapped = ParallelConfig(data=2, overlap_grad_reduce=True, overlap_param_gather=True)
    losses = pool.run(2, train_and_save, str(tmp_path / "late"), overlapped, "bf16")[0]
    assert losses == pool.run(2, train_and_save, str(tmp_path / "plain"), ParallelConfig(data=2), "bf16")[0]
    late, plain = open_checkpoint(tmp_path / "late"), open_checkpoint(tmp_path / "plain")
    assert tensor_hashes(late) == tensor_hashes(plain)
