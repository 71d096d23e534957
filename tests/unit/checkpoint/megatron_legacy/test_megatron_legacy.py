"""Megatron-LM's legacy layout, held against tensors cut by hand as Megatron-LM cuts them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flm_megatron.checkpoint.manifest import StagePosition
from flm_megatron.checkpoint.megatron_legacy.arguments import arguments_of, model_from_arguments
from flm_megatron.checkpoint.megatron_legacy.reader import MegatronLegacyCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.config.same_model import differences
from flm_megatron.config.schema import LoraConfig, ModelConfig, MupConfig, ParallelConfig, RopeScaling
from flm_megatron.errors import DamagedError, RequestError
from tests.support.checkpoint_cases import MODEL, Memory, flm_checkpoint, manifest_of, write_small
from tests.support.reference_model import random_tensors

BIASED = ModelConfig(
    num_layers=4, hidden_size=24, ffn_hidden_size=36, num_attention_heads=6, num_query_groups=3, vocab_size=77,
    normalization="layernorm", activation="gelu", bias=True,
)  # fmt: skip
GATED = ModelConfig(
    num_layers=4, hidden_size=24, ffn_hidden_size=36, num_attention_heads=6, vocab_size=77, query_key_norm=True
)
LAYER = "decoder.layers."


def cut(name: str, value: torch.Tensor, model: ModelConfig, tensor: int, rank: int) -> torch.Tensor:
    """One tensor rank's part of a parameter of one layer, written from Megatron-LM's parallel layers."""
    if "layer_norm" in name or name.endswith("norm.weight") or name.endswith("norm.bias"):
        return value
    if "linear_fc1" in name and model.gated:
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(tensor)[rank], up.chunk(tensor)[rank]])
    if "linear_qkv" in name or "linear_fc1" in name:
        return value.chunk(tensor)[rank]
    if name.endswith("weight") and ("linear_proj" in name or "linear_fc2" in name):
        return value.chunk(tensor, 1)[rank]
    return value


def by_hand(
    values: dict[str, torch.Tensor], model: ModelConfig, tensor: int, rank: int, layers: range, multiple: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """State dict of one rank: layers numbered from 0, vocabulary padded to `multiple` x tensor size."""
    for name, value in values.items():
        if name.startswith(LAYER):
            for local, layer in enumerate(layers):
                yield name.replace(LAYER, f"{LAYER}{local}."), cut(name, value[layer], model, tensor, rank).contiguous()
        elif name.startswith(("embedding", "output_layer")):
            if layers.start == 0 if name.startswith("embedding") else layers.stop == model.num_layers:
                yield name, vocabulary_shard(value, tensor, rank, multiple)
        elif name.startswith("decoder.final") and layers.stop == model.num_layers:
            yield name, value


def vocabulary_shard(value: torch.Tensor, tensor: int, rank: int, multiple: int) -> torch.Tensor:
    """Rows of one rank, with rows of nine where there is padding."""
    padded = -(-len(value) // (multiple * tensor)) * multiple * tensor
    padding = torch.full((padded - len(value), value.shape[1]), 9.0, dtype=value.dtype)
    return torch.cat([value, padding]).chunk(tensor)[rank]


def arguments(model: ModelConfig, **fields: Any) -> argparse.Namespace:
    """Arguments as Megatron-LM stores them, and others that a reader has to step over."""
    known = vars(argparse.Namespace(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, group_query_attention=model.num_query_groups is not None,
        num_query_groups=model.num_query_groups or 1, kv_channels=model.kv_channels, vocab_size=model.vocab_size,
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm", swiglu=model.gated,
        add_bias_linear=model.bias, qk_layernorm=model.query_key_norm, norm_epsilon=1e-5,
        position_embedding_type="rope", rotary_base=10000,
        untie_embeddings_and_output_weights=True, params_dtype=torch.float32, consumed_train_samples=5,
    ))  # fmt: skip
    return argparse.Namespace(**(known | fields))


@pytest.mark.parametrize("model", [BIASED, GATED], ids=["gpt", "gated"])
def test_reads_what_megatron_cut(tmp_path: Path, model: ModelConfig) -> None:
    values = random_tensors(model)
    for rank in range(3):
        for pipeline_rank, layers in enumerate((range(0, 1), range(1, 4))):
            folder = tmp_path / f"iter_0000012/mp_rank_{rank:02d}_{pipeline_rank:03d}"
            folder.mkdir(parents=True)
            state = dict(by_hand(values, model, 3, rank, layers, multiple=8))
            saved = {"args": arguments(model), "iteration": 12, "model": state, "rng_state": [torch.get_rng_state()]}
            torch.save(saved, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, MegatronLegacyCheckpoint)
    assert checkpoint.config == model
    assert checkpoint.manifest.position == StagePosition(12, 5)
    assert sorted(checkpoint.tensors) == sorted(values)
    for name, value in values.items():
        assert torch.equal(checkpoint.read(name), value), name


def test_reads_virtual_pipeline_chunks_and_norms_that_are_modules(tmp_path: Path) -> None:
    values = random_tensors(GATED)
    separate = {"linear_qkv.layer_norm_": "input_layernorm.", "linear_fc1.layer_norm_": "pre_mlp_layernorm."}
    for pipeline_rank in range(2):
        saved: dict[str, Any] = {"args": arguments(GATED)}
        for chunk in range(2):
            part = 2 * chunk + pipeline_rank
            state = dict(by_hand(values, GATED, 1, 0, range(part, part + 1), multiple=128))
            for fused, module in separate.items():
                state = {
                    name.replace(f"self_attention.{fused}", module).replace(f"mlp.{fused}", module): value
                    for name, value in state.items()
                }
            saved[f"model{chunk}"] = state
        (tmp_path / f"mp_rank_00_{pipeline_rank:03d}").mkdir()
        torch.save(saved, tmp_path / f"mp_rank_00_{pipeline_rank:03d}/model_optim_rng.pt")
    checkpoint = MegatronLegacyCheckpoint(tmp_path)
    for name, value in values.items():
        assert torch.equal(checkpoint.read(name), value), name


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (2, 2), (6, 5)], ids=str)
def test_writes_what_megatron_would_cut(
    tmp_path: Path, sizes: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_small(tmp_path / "source")
    tensor, pipeline = sizes
    target = ["--format", "classic", "--tensor", tensor, "--pipeline", pipeline]
    assert flm_checkpoint("reshard", tmp_path / "source", tmp_path / "out", *target) == 0
    before, after = (line.split()[-1] for line in capsys.readouterr().out.splitlines())
    assert before == after == open_checkpoint(tmp_path / "source").manifest.weights_hash
    values = {name: written.read(name) for name in written.tensors if not name.startswith("optimizer")}
    first = 0
    for pipeline_rank in range(pipeline):
        count = 5 // pipeline + (pipeline_rank < 5 % pipeline)
        for rank in range(tensor):
            folder = f"mp_rank_{rank:02d}" + (f"_{pipeline_rank:03d}" if pipeline > 1 else "")
            saved = torch.load(
                tmp_path / "out/iter_0000007" / folder / "model_optim_rng.pt", weights_only=False, mmap=True
            )
            expected = dict(by_hand(values, MODEL, tensor, rank, range(first, first + count), multiple=128))
            assert sorted(saved["model"]) == sorted(expected)
            for name, value in expected.items():
                padding = torch.zeros_like(value) if value.eq(9).all(-1).any() else value
                clean = torch.where(value.eq(9).all(-1, keepdim=True), padding, value) if value.dim() > 1 else value
                assert torch.equal(saved["model"][name], clean), name
            assert saved["iteration"] == 7
            assert saved["args"].padded_vocab_size == -(-331 // (128 * tensor)) * 128 * tensor
        first += count
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "7"
    written = open_checkpoint(tmp_path / "out")
    assert isinstance(written, MegatronLegacyCheckpoint) and written.config == MODEL


def save_one(folder: Path, **content: Any) -> Path:
    """A legacy checkpoint of one rank with this content."""
    (folder / "mp_rank_00").mkdir(parents=True)
    torch.save(content, folder / "mp_rank_00/model_optim_rng.pt")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = learned_absolute"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"use_rope_scaling": True}, "use_rope_scaling = True; only False"),
        ({"rotary_seq_len_interpolation_factor": 2}, "rotary_seq_len_interpolation_factor = 2"),
        ({"rotary_percent": 0.3}, r"rotary_percent is 0\.3, give a share .* of a head's 4 channels"),
        ({"window_size": (128, 0)}, r"window_size = \(128, 0\)"),
        ({"vocab_size": None, "padded_vocab_size": 128}, "padded 128: give --vocab-size"),
        ({"normalization": "LayerNorm"}, "qk_layernorm with LayerNorm; only RMSNorm"),
        ({"vocab_size": 129}, "vocabulary 129 asked for, 128 rows stored"),
        ({"hidden_size": "wide"}, "do not describe a decoder"),
        ({"ffn_hidden_size": 40}, r"linear_fc1.weight has shape \(72, 24\), the arguments ask for \(80, 24\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = dict(by_hand(random_tensors(GATED), GATED, 1, 0, range(4), multiple=128))
    path = save_one(tmp_path / "a", args=arguments(GATED, **change), model=state)
    with pytest.raises(RequestError, match=message):
        MegatronLegacyCheckpoint(path)


def test_a_tensor_of_another_kind_of_block_is_not_left_out(tmp_path: Path) -> None:
    state = dict(by_hand(random_tensors(GATED), GATED, 1, 0, range(4), multiple=128))
    extra = {"decoder.layers.0.self_attention.linear_qkv._extra_state": torch.ones(3, dtype=torch.uint8)}
    MegatronLegacyCheckpoint(save_one(tmp_path / "a", args=arguments(GATED), model=state | extra))
    bias = {"decoder.layers.0.self_attention.linear_qkv.bias": torch.ones(72)}
    path = save_one(tmp_path / "b", args=arguments(GATED), model=state | bias)
    with pytest.raises(RequestError, match=r"linear_qkv\.bias is not one of the model that the arguments describe"):
        MegatronLegacyCheckpoint(path)


BIASES: list[dict[str, Any]] = [{}, {"bias": True}, {"qkv_bias": True}]


def test_norms_of_queries_with_an_epsilon_of_their_own_are_refused() -> None:
    model = replace(GATED, query_key_norm_epsilon=1e-3)
    with pytest.raises(RequestError, match=r"query_key_norm with epsilon 0\.001 beside rmsnorm with 1e-05"):
        arguments_of(model, ParallelConfig(), 32, 0)
    read = model_from_arguments(arguments_of(GATED, ParallelConfig(), 32, 0), "here")
    assert read.query_key_norm and differences(read, GATED) == []


@given(
    theta=st.floats(100, 1e6), epsilon=st.floats(1e-9, 1e-2), multipliers=st.tuples(*[st.floats(0.1, 10)] * 2),
    base=st.integers(1, 99), heads=st.sampled_from([(1, 1), (2, 1), (6, 3), (6, 6)]), channels=st.sampled_from([2, 6]),
    kinds=st.tuples(st.sampled_from(["rmsnorm", "layernorm"]), st.sampled_from(["swiglu", "gelu"])),
    biases=st.sampled_from(BIASES),
)  # fmt: skip
def test_the_arguments_describe_the_same_model(
    theta: float, epsilon: float, multipliers: tuple[float, float], base: int, heads: tuple[int, int], channels: int,
    kinds: tuple[Any, Any], biases: dict[str, Any],
) -> None:  # fmt: skip
    model = ModelConfig(
        hidden_size=24, num_attention_heads=heads[0], num_query_groups=heads[1], head_dim=channels, vocab_size=77,
        rope_theta=theta, norm_epsilon=epsilon, input_mult=multipliers[0], output_mult=multipliers[1],
        normalization=kinds[0], activation=kinds[1], **biases, mup=MupConfig(True, base),
        rotary_percent=0.7 if channels == 6 else 1.0,
    )  # fmt: skip
    assert differences(model_from_arguments(arguments_of(model, ParallelConfig(), 32, 0), "here"), model) == []


@pytest.mark.parametrize(
    "change",
    [
        *({"rope_scaling": RopeScaling()}, {"position": "xpos"}, {"parallel_residual": True}),
        *({"activation": "geglu"}, {"position": "learned", "max_positions": 64}),
    ],
)
def test_what_the_arguments_cannot_say_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"the model has {next(iter(change))}"):
        arguments_of(replace(BIASED, **change), ParallelConfig(), 32, 0)


def test_adapters_are_merged(tmp_path: Path) -> None:
    adapted = replace(GATED, lora=LoraConfig(rank=2, targets=["qkv"]))
    values = random_tensors(adapted)
    copy_checkpoint(Memory(values), tmp_path / "adapted", manifest_of(adapted))
    assert flm_checkpoint("reshard", tmp_path / "adapted", tmp_path / "out", "--format", "classic") == 0
    checkpoint, qkv = MegatronLegacyCheckpoint(tmp_path / "out"), "decoder.layers.self_attention.linear_qkv"
    delta = torch.einsum("lor,lri->loi", values[f"{qkv}.lora_b"], values[f"{qkv}.lora_a"]) * 16 / 2
    torch.testing.assert_close(checkpoint.read(f"{qkv}.weight"), values[f"{qkv}.weight"] + delta)


def test_older_layouts_and_missing_ranks_are_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="before megatron-core"):
        MegatronLegacyCheckpoint(save_one(tmp_path / "old", args=arguments(GATED), model={"language_model": {}}))
    with pytest.raises(RequestError, match="does not hold the arguments"):
        model = {"embedding.word_embeddings.weight": torch.ones(2, 2)}
        MegatronLegacyCheckpoint(save_one(tmp_path / "bare", model=model))
    path = save_one(tmp_path / "a", args=arguments(GATED), model={})
    (path / "mp_rank_02").mkdir()
    with pytest.raises(DamagedError, match="tensor rank 1, pipeline rank 0 is missing"):
        MegatronLegacyCheckpoint(path)
