"""The engine's configuration of a stage, and the requests it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flm_megatron.config.schema import ModelConfig, MupConfig, ParallelConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.engine.prepare import prepare
from flm_megatron.errors import RequestError
from flm_megatron.kernels import backends
from flm_megatron.model.build import build_model
from flm_megatron.model.engine_config import transformer_config

prepare()


def test_shape_and_precision_reach_the_engine() -> None:
    model = ModelConfig(num_layers=6, num_query_groups=2, head_dim=64, norm_epsilon=1e-6)
    config = transformer_config(StageConfig(model=model, precision="bf16"))
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (6, 128, 352)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 64)
    assert (config.normalization, config.layernorm_epsilon) == ("RMSNorm", 1e-6)
    assert config.gated_linear_unit and not config.add_bias_linear
    assert config.bf16 and config.params_dtype is config.pipeline_dtype is torch.bfloat16
    assert config.calculate_per_token_loss
    assert config.hidden_dropout == config.attention_dropout == 0


def test_interleaving_overlaps_its_transfers() -> None:
    plain = transformer_config(StageConfig(parallel=ParallelConfig(pipeline=2)))
    assert plain.batch_p2p_comm and not plain.overlap_p2p_comm
    interleaved = transformer_config(StageConfig(parallel=ParallelConfig(pipeline=2, virtual_pipeline=2)))
    assert interleaved.overlap_p2p_comm and not interleaved.batch_p2p_comm
    assert interleaved.virtual_pipeline_model_parallel_size == 2


@pytest.mark.skipif(current().name != "cpu", reason="what gloo needs")
def test_pipeline_outputs_are_kept_on_a_cpu() -> None:
    assert not transformer_config(StageConfig()).deallocate_pipeline_outputs


def test_transformer_engine_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="stage 'one' asks for transformer_engine, which is not installed"):
        transformer_config(StageConfig(name="one", transformer_engine=True))


def test_transformer_engine_is_refused_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    with pytest.raises(RequestError, match="no xpos positions"):
        transformer_config(StageConfig(model=ModelConfig(position="xpos"), transformer_engine=True))
    with pytest.raises(RequestError, match="no parallel_residual"):
        transformer_config(StageConfig(model=ModelConfig(parallel_residual=True), transformer_engine=True))


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="vocab_size is not set"):
        build_model(ModelConfig(), StageConfig())


def test_multipliers_follow_the_width_under_mup_only() -> None:
    wide = ModelConfig(hidden_size=1024, output_mult=2.0)
    assert replace(wide, mup=MupConfig(enabled=True, base_hidden_size=256)).logit_multiplier == 0.5
    assert wide.logit_multiplier == 2.0
