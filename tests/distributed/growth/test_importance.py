"""Importance of units: what hooks on a `transformers` model measure, and the same under every layout."""

from __future__ import annotations

from itertools import product
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
LAYERS, CHANNELS = 3, 12
LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj", "model.norm")
NEOX = ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm")
"""Where `transformers` has the layers, in them what reads heads and feed-forward channels, and the final norm."""
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """A random Llama, and a GPT-NeoX with LayerNorms, biases and parallel residual, as `transformers` saves them."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=108, intermediate_size=78, num_hidden_layers=LAYERS, num_attention_heads=18, num_key_value_heads=6,
        head_dim=CHANNELS, vocab_size=331, rms_norm_eps=1e-5, initializer_range=0.1, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    neox = GPTNeoXConfig(
        hidden_size=72, intermediate_size=78, num_hidden_layers=LAYERS, num_attention_heads=6, vocab_size=331,
        initializer_range=0.1, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    paths: dict[tuple[str, ...], Path] = {}
    for names, model in ((LLAMA, LlamaForCausalLM(llama)), (NEOX, GPTNeoXForCausalLM(neox))):
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        paths[names] = tmp_path_factory.mktemp(names[0])
        model.save_pretrained(paths[names])
    return paths


def oracle(folder: Path, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importance by activations and by gradients from forward hooks on `transformers`' model, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layers, heads, ffn, final = names
    norms = [*(f"{layers}.{i}.{kind}" for i in range(LAYERS) for kind in NORMS), final]
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor | tuple[Tensor, ...]) -> None:
        """Keep an activation, and its gradient with it."""
        seen[name] = value if isinstance(value, Tensor) else value[0]
        seen[name].retain_grad()

    for name, module in model.named_modules():
        if name in norms or name.removeprefix(f"{layers}.").isdigit():
            module.register_forward_hook(lambda _, args, out, name=name: keep(name, out))
        if name in norms or name.endswith((heads, ffn)):
            module.register_forward_pre_hook(lambda _, args, name=name: keep(f"{name} in", args[0]))
    logits = model(TOKENS[:, :-1]).logits.transpose(1, 2)
    torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:], reduction="sum").backward()

    def mean(value: Tensor, of: str, size: int = 1) -> Tensor:
        """[units] means over tokens, of units of `size` channels."""
        assert value.grad is not None
        units = (value if of == "activation" else value * value.grad).unflatten(-1, (-1, size))
        per_unit = units.square().sum(-1).sqrt() if of == "activation" else units.sum(-1).abs()
        return per_unit.detach().flatten(0, 1).mean(0)

    def energy(value: Tensor) -> Tensor:
        """[hidden] mean squares of what a norm scales."""
        value = value.detach()
        return (value - value.mean(-1, keepdim=True) * (names == NEOX)).square().flatten(0, 1).mean(0)

    def layer(index: int, of: str) -> Tensor:
        """Of one layer: block influence, or the first-order loss."""
        before, after = seen[f"{norms[2 * index]} in"], seen[f"{layers}.{index}"]
        assert after.grad is not None
        if of == "activation":
            return (1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).mean().detach()
        return ((after - before) * after.grad).sum(-1).abs().mean().detach()

    found = [
        {
            "hidden": torch.stack([mean(seen[name], of) for name in norms]).mean(0),
            "ffn": torch.stack([mean(seen[f"{layers}.{i}.{ffn} in"], of) for i in range(LAYERS)]),
            "heads": torch.stack([mean(seen[f"{layers}.{i}.{heads} in"], of, CHANNELS) for i in range(LAYERS)]),
            "layers": torch.stack([layer(i, of) for i in range(LAYERS)]),
            "energy": torch.stack([energy(seen[f"{name} in"]) for name in norms]),
        }
        for of in ("activation", "gradient")
    ]
    return found[0], found[1]


def measured(folders: list[Path], *parallel: ParallelConfig) -> list[Importance]:
    """By activations and by gradients of each model under each layout, as this rank has them."""
    from flm_megatron.distributed.world import Layouts
    from flm_megatron.engine.prepare import prepare
    from flm_megatron.growth.shrink.measure import measure_importance

    prepare()
    found = []
    with Layouts(timeout_s=120) as under:
        for layout, folder, criteria in product(parallel, folders, (FORWARD, FIRST_ORDER)):
            checkpoint, stage = HuggingFaceCheckpoint(folder), StageConfig(parallel=layout)
            found.append(measure_importance(checkpoint, checkpoint.config, stage, TOKENS, under, criteria))
    return found


def close(found: Importance, expected: dict[str, Tensor], rtol: float) -> None:
    """Check every number against another's."""
    for name, values in found.tensors.items():
        assert values.dtype == torch.float64 and values.device.type == "cpu"
        torch.testing.assert_close(values, expected[name], rtol=rtol, atol=0, msg=f"{name}: {values}, {expected[name]}")


@pytest.fixture(scope="module")
def alone(pool: Pool, folders: dict[tuple[str, ...], Path]) -> list[Importance]:
    """As one process measures it."""
    return pool.run(1, measured, list(folders.values()), ParallelConfig())[0]


def test_one_process_measures_what_hooks_on_transformers_do(
    folders: dict[tuple[str, ...], Path], alone: list[Importance]
) -> None:
    expected = [values for names, folder in folders.items() for values in oracle(folder, names)]
    for found, values in zip(alone, expected, strict=True):
        assert (found.samples, found.tokens) == (3, 78)
        close(found, values, 1e-5)


def test_layouts_agree(pool: Pool, folders: dict[tuple[str, ...], Path], alone: list[Importance]) -> None:
    split = ParallelConfig(tensor=2, pipeline=2, sequence=True, pipeline_layers=[2, 1])
    two_replicas = ParallelConfig(tensor=2)
    ranks = pool.run(4, measured, [folders[LLAMA]], split, two_replicas)
    for rank in ranks:
        for found, first, expected in zip(rank, ranks[0], alone[:2] * 2, strict=True):
            close(found, first.tensors, 0)
            close(found, expected.tensors, 1e-6)
            assert found.criteria == expected.criteria
