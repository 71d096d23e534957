"""Importance of units: what hooks on a `transformers` model measure, and the same under every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.config.schema import ParallelConfig, StageConfig
from flm_megatron.growth.shrink.importance import Criterion, Dimension, Importance
from tests.support.pool import Pool

TOKENS = torch.randint(0, 331, (3, 27), generator=torch.Generator().manual_seed(5))
FORWARD: dict[Dimension, Criterion] = {
    "hidden": "activation",
    "ffn": "activation",
    "heads": "activation",
    "layers": "influence",
}
FIRST_ORDER: dict[Dimension, Criterion] = dict.fromkeys(FORWARD, "gradient")
HEADS, CHANNELS = 18, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as `transformers` saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=108, intermediate_size=78, num_hidden_layers=3, num_attention_heads=HEADS, num_key_value_heads=6,
        head_dim=CHANNELS, vocab_size=331, rms_norm_eps=1e-5, initializer_range=0.1, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(config)
    for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    model.save_pretrained(path)
    return path


def oracle(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importance by activations and by gradients from forward hooks on `transformers`' model, in float64."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        """Keep an activation, and its gradient with it."""
        value.retain_grad()
        seen[name] = value

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda _, args, out, name=name: keep(name, out))
            module.register_forward_pre_hook(lambda _, args, name=name: keep(f"{name} in", args[0]))
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        if name.split(".")[-1].isdigit():
            module.register_forward_hook(lambda _, args, out, name=name: keep(f"{name} out", out))
    losses = model(TOKENS[:, :-1]).logits.transpose(1, 2)
    torch.nn.functional.cross_entropy(losses, TOKENS[:, 1:], reduction="sum").backward()

    def per_layer(name: str, of: str = "activation", size: int = 1) -> Tensor:
        """[layers, units] means over tokens of what a module reads, in units of `size` channels."""
        return torch.stack([mean(seen[f"model.layers.{i}.{name}"], of, size) for i in range(3)])

    def mean(value: Tensor, of: str, size: int = 1) -> Tensor:
        """[units] means over tokens."""
        assert value.grad is not None
        units = (value if of == "activation" else value * value.grad).unflatten(-1, (-1, size))
        per_unit = units.square().sum(-1).sqrt() if of == "activation" else units.sum(-1).abs()
        return per_unit.detach().flatten(0, 1).mean(0)

    norms = [f"model.layers.{i}.{kind}_layernorm" for i in range(3) for kind in ("input", "post_attention")]
    norms.append("model.norm")
    found = [
        {
            "hidden": torch.stack([mean(seen[name], of) for name in norms]).mean(0),
            "ffn": per_layer("mlp.down_proj", of),
            "heads": per_layer("self_attn.o_proj", of, CHANNELS),
            "energy": torch.stack([seen[f"{name} in"].detach().square().flatten(0, 1).mean(0) for name in norms]),
        }
        for of in ("activation", "gradient")
    ]
    for i in range(3):
        before, after = seen[f"{norms[2 * i]} in"], seen[f"model.layers.{i} out"]
        assert after.grad is not None
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        found[0].setdefault("layers", torch.zeros(3, dtype=torch.float64))[i] = (1 - cosine).mean().detach()
        lost = ((after - before) * after.grad).sum(-1).abs().mean().detach()
        found[1].setdefault("layers", torch.zeros(3, dtype=torch.float64))[i] = lost
    return found[0], found[1]


def measured(folder: Path, *parallel: ParallelConfig) -> list[Importance]:
    """By activations and by gradients under each layout, as this rank has them."""
    from flm_megatron.distributed.world import Layouts
    from flm_megatron.engine.prepare import prepare
    from flm_megatron.growth.shrink.measure import measure_importance

    prepare()
    checkpoint, found = HuggingFaceCheckpoint(folder), []
    with Layouts(timeout_s=120) as under:
        for stage in (StageConfig(parallel=layout) for layout in parallel):
            for criteria in (FORWARD, FIRST_ORDER):
                found.append(measure_importance(checkpoint, checkpoint.config, stage, TOKENS, under, criteria))
    return found


def close(found: Importance, expected: dict[str, Tensor], rtol: float) -> None:
    """Check every number against another's."""
    for name, values in found.tensors.items():
        assert values.dtype == torch.float64 and values.device.type == "cpu"
        torch.testing.assert_close(values, expected[name], rtol=rtol, atol=0, msg=f"{name}: {values}, {expected[name]}")


@pytest.fixture(scope="module")
def alone(pool: Pool, folder: Path) -> list[Importance]:
    """As one process measures it."""
    return pool.run(1, measured, folder, ParallelConfig())[0]


def test_one_process_measures_what_hooks_on_transformers_do(folder: Path, alone: list[Importance]) -> None:
    for found, expected in zip(alone, oracle(folder), strict=True):
        assert (found.samples, found.tokens) == (3, 78)
        close(found, expected, 1e-5)


def test_layouts_agree(pool: Pool, folder: Path, alone: list[Importance]) -> None:
    split = ParallelConfig(tensor=2, pipeline=2, sequence=True, pipeline_layers=[2, 1])
    two_replicas = ParallelConfig(tensor=2)
    ranks = pool.run(4, measured, folder, split, two_replicas)
    for rank in ranks:
        for found, first, expected in zip(rank, ranks[0], [*alone, *alone], strict=True):
            close(found, first.tensors, 0)
            close(found, expected.tensors, 1e-6)
            assert found.criteria == expected.criteria
