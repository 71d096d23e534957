"""The optimizer of a stage over a model of megatron-core's, on one real gloo process."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from flm_megatron.config.schema import ModelConfig, MupConfig, OptimizerConfig, ParallelConfig, StageConfig
from flm_megatron.model.parameters import parameter_specs
from flm_megatron.model.parameters.names import logical_name
from flm_megatron.optim.groups import parameter_group
from flm_megatron.optim.learning_rate import group_learning_rates, set_learning_rates
from tests.support.pool import Pool

BLOCKS: dict[str, dict[str, Any]] = {
    "tele-flm": {},
    "flm-101b": {"normalization": "layernorm", "activation": "gelu", "bias": True},
}


def _stage(block: str = "tele-flm", **options: Any) -> StageConfig:
    mup = MupConfig(enabled=True, base_hidden_size=16)
    model = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=128, mup=mup, **BLOCKS[block])
    optimizer = OptimizerConfig(lr=1e-3, matrix_lr=6e-3, weight_decay=0.1, clip_grad=0.5)
    return StageConfig(model=model, optimizer=optimizer, **options)


def _engine_model(stage: StageConfig) -> Any:
    """megatron-core's own GPT in the shape of the stage, wrapped for data parallelism: the engine's names."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from flm_megatron.device import current
    from flm_megatron.engine import parallel_state

    parallel_state.initialize_model_parallel(ParallelConfig())
    model_parallel_cuda_manual_seed(1)
    model, bf16 = stage.model, stage.precision == "bf16"
    norm = "RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=model.gated,
        add_bias_linear=model.bias,
        normalization=norm,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        **current().engine_options(),
    )
    spec = get_gpt_layer_local_spec(normalization=norm)
    gpt = GPTModel(
        config, spec, model.vocab_size, 16, share_embeddings_and_output_weights=False, position_embedding_type="rope"
    )
    sharded = stage.parallel.distributed_optimizer
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded, grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp, gpt.bfloat16() if bf16 else gpt)


def _built(stage: StageConfig) -> tuple[Any, Any]:
    from flm_megatron.optim.build import build_optimizer

    chunk = _engine_model(stage)
    return chunk, build_optimizer(stage, [chunk])


def _groups_by_parameter(stage: StageConfig) -> dict[str, dict[str, Any]]:
    """Every parameter's group after learning rates were set, by the engine's name."""
    chunk, optimizer = _built(stage)
    set_learning_rates(optimizer, stage, stage.optimizer.lr)
    values = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    kept = ("lr", "weight_decay", "group")
    return {name: {k: values[id(p)][k] for k in kept} for name, p in chunk.named_parameters()}


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_every_parameter_learns_as_its_specification_says(pool: Pool, block: str) -> None:
    stage = _stage(block, parallel=ParallelConfig(distributed_optimizer=False))
    specs = parameter_specs(stage.model)
    (groups,) = pool.run(1, _groups_by_parameter, stage)
    assert {logical_name(name, specs) for name in groups} == set(specs)
    for name, group in groups.items():
        spec = specs[logical_name(name, specs)]
        peak = 6e-3 if spec.kind == "matrix" else 1e-3
        assert group["lr"] == pytest.approx(peak * spec.lr_scale), name
        assert group["weight_decay"] == (0.1 if spec.kind in {"matrix", "embedding", "head"} else 0.0), name


def _resumed(stage: StageConfig) -> tuple[list[float], list[float], list[int], list[int]]:
    """Learning rates and steps of the groups before a save and after a load into a fresh optimizer."""
    chunk, first = _built(stage)
    _one_step(chunk, first, stage)
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    from flm_megatron.engine.version import since
    from flm_megatron.optim.build import build_optimizer

    second: Any = build_optimizer(stage, [chunk])
    for group, fresh in zip(saved["optimizer"]["param_groups"], second.param_groups, strict=True):
        # From 0.19 on the engine tells groups apart by their largest learning rate too.
        group["lr"], group["max_lr"] = 77.0, fresh["max_lr"] if since(0, 19) else 77.0
    second.load_state_dict(saved)
    set_learning_rates(second, stage, stage.optimizer.lr)
    pick = lambda key, optimizer: [group[key] for group in optimizer.param_groups]  # noqa: E731
    return pick("lr", first), pick("lr", second), pick("step", first), pick("step", second)


def _one_step(chunk: Any, optimizer: Any, stage: StageConfig) -> float:
    chunk.zero_grad_buffer()
    for param in chunk.parameters():
        param.main_grad.fill_(1.0)
    set_learning_rates(optimizer, stage, stage.optimizer.lr)
    done, grad_norm, _ = optimizer.step()
    assert done
    return float(grad_norm)


@pytest.mark.parametrize(("precision", "sharded"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_groups_are_the_same_before_a_save_and_after_a_load(pool: Pool, precision: str, sharded: bool) -> None:
    stage = _stage(precision=precision, parallel=ParallelConfig(distributed_optimizer=sharded))
    ((before, after, step_before, step_after),) = pool.run(1, _resumed, stage)
    expected = group_learning_rates(stage.optimizer.lr, stage)
    assert before == after == [expected[group] for group in ("matrix", "vector", "vocabulary")]
    assert step_before == step_after == [1, 1, 1]


def _state_before_the_first_step(stage: StageConfig) -> list[int]:
    _, optimizer = _built(stage)
    return [group["step"] for group in optimizer.state_dict()["optimizer"]["param_groups"]]


def test_state_can_be_saved_before_the_first_step(pool: Pool) -> None:
    assert pool.run(1, _state_before_the_first_step, _stage()) == [[0, 0, 0]]


def _norm_and_updates(stage: StageConfig) -> tuple[float, dict[str, float]]:
    chunk, optimizer = _built(stage)
    before = {name: param.detach().clone() for name, param in chunk.named_parameters()}
    norm = _one_step(chunk, optimizer, stage)
    return norm, {name: (param - before[name]).abs().max().item() for name, param in chunk.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_step_clips_to_the_global_norm_and_updates_every_group(pool: Pool, world_size: int) -> None:
    stage = _stage()
    stage.optimizer.weight_decay = 0.0
    count = sum(spec.numel for spec in parameter_specs(stage.model).values())
    norm, updates = pool.run(world_size, _norm_and_updates, stage)[-1]
    assert norm == pytest.approx(count**0.5, rel=1e-5)
    rates = group_learning_rates(stage.optimizer.lr, stage)
    specs = parameter_specs(stage.model)
    for name, update in updates.items():  # Adam's first update is lr where the gradient is the same everywhere
        assert update == pytest.approx(rates[parameter_group(name, specs)], rel=1e-2), name


def test_names_of_the_engine_with_fused_norms_and_wrappers() -> None:
    table = {
        "module.module.decoder.layers.11.self_attention.linear_qkv.layer_norm_weight": (
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
        ),
        "module.decoder.layers.0.input_layernorm.bias": "decoder.layers.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.3.pre_mlp_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        "module.embedding.word_embeddings.weight": "embedding.word_embeddings.weight",
        "module.output_layer.weight": "output_layer.weight",
        "decoder.final_layernorm.bias": "decoder.final_layernorm.bias",
    }
    specs = parameter_specs(_stage("flm-101b").model)
    assert {name: logical_name(name, specs) for name in table} == table


def test_parameter_that_the_table_does_not_know_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"mlp\.router\.weight"):
        parameter_group("module.decoder.layers.0.mlp.router.weight", parameter_specs(_stage().model))
