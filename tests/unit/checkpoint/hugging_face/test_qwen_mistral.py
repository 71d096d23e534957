"""Qwen 2 and 3, and Mistral, against `transformers`, both ways, on random weights of odd shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.hugging_face.config import model_from_config
from flm_megatron.checkpoint.hugging_face.families.registry import FAMILIES, require_expressible
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, write_hugging_face
from flm_megatron.errors import RequestError
from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
from flm_megatron.growth.plan import make_plan
from tests.support.checkpoint_cases import Memory
from tests.support.growth_cases import growth
from tests.support.reference_model import IDS, random_tensors, reference_logits
from tests.support.reference_model import ODD as SHAPES

ODD = replace(SHAPES, norm_epsilon=1e-3)
KINDS: dict[str, dict[str, Any]] = {"qwen2": {"qkv_bias": True}, "qwen3": {"query_key_norm": True}, "mistral": {}}


def config_json(kind: str, **fields: Any) -> dict[str, Any]:
    """A `config.json` of the smallest kind."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 75, "num_attention_heads": 6}
    return {"model_type": kind, **sizes, "num_key_value_heads": 2, "vocab_size": 331, **fields}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("qwen2", {"sliding_window": 7, "tie_embeddings": True}),
        ("qwen3", {"query_key_norm_epsilon": 0.02}),
        ("mistral", {"sliding_window": 7}),
    ],
)
def test_transformers_computes_our_logits_from_an_export(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    model = replace(ODD, **KINDS[kind], **fields, input_mult=0.5, output_mult=3.0)
    values = random_tensors(model)
    write_hugging_face(Memory(values), model, tmp_path / "out", ExportOptions(flavour=kind, shard_bytes=100_000))
    expected = reference_logits(model, {name: value.double() for name, value in values.items()}, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out", kind), expected, rtol=1e-5, atol=1e-5)


def transformers_logits(path: Path, kind: str) -> torch.Tensor:
    """Logits in fp32 of `transformers`, whose own class for the family it has to be."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert type(model).__name__ == f"{kind.capitalize()}ForCausalLM"
    with torch.no_grad():
        return model(IDS).logits.double()


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen3", False), ("mistral", True)])
def test_what_transformers_wrote_is_read_and_grown_and_read_by_it_again(tmp_path: Path, kind: str, tied: bool) -> None:
    import transformers

    config = getattr(transformers, f"{kind.capitalize()}Config")(
        hidden_size=108, intermediate_size=75, num_hidden_layers=3, num_attention_heads=18, num_key_value_heads=3,
        head_dim=8, vocab_size=331, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.2, generator=generator)
        expected = model(IDS).logits.double()
    model.save_pretrained(tmp_path)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    window = 4096 if kind == "mistral" else None  # what transformers' configurations have unless told otherwise
    assert checkpoint.config == replace(ODD, **KINDS[kind], sliding_window=window, tie_embeddings=tied)
    values = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    found = reference_logits(checkpoint.config, values, IDS)
    close = {"rtol": 1e-5, "atol": 1e-5 * expected.std().item()}
    torch.testing.assert_close(found, expected, **close)

    larger = replace(checkpoint.config, num_layers=5, hidden_size=216, ffn_hidden_size=100, num_attention_heads=24)
    plan = make_plan(checkpoint.config, larger, growth("clone", clone_noise=0.2), seed=3)
    grown = GrownCheckpoint(checkpoint, plan)
    write_hugging_face(grown, plan.new, tmp_path / "grown", ExportOptions(flavour=kind))
    torch.testing.assert_close(transformers_logits(tmp_path / "grown", kind), expected, **close)


def test_a_window_is_one_of_all_layers_or_of_none() -> None:
    full, sliding = "full_attention", "sliding_attention"
    read: list[tuple[dict[str, Any], int | None]] = [
        ({"use_sliding_window": False, "sliding_window": 9}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": [full] * 3}, None),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": [sliding] * 3}, 9),
    ]
    for fields, window in read:
        assert model_from_config(config_json("qwen2", **fields), "folder").sliding_window == window
    refused: list[tuple[dict[str, Any], str]] = [
        ({"use_sliding_window": True, "max_window_layers": 2}, "sliding window in 1 of 3 layers, of 4096 positions"),
        ({"layer_types": [sliding] * 3}, "sliding window in 3 of 3 layers, of no positions"),
        ({"layer_types": [full] * 2}, "num_hidden_layers 3 and layer_types for 2"),
        ({"layer_types": ["linear_attention"] * 3}, r"layer_types\.0 'linear_attention'"),
    ]
    for fields, message in refused:
        with pytest.raises(RequestError, match=f"^folder: config.json has .*{message}"):
            model_from_config(config_json("qwen3", **fields), "folder")


def test_a_window_of_mistral_counts_as_transformers_counts_it(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=48, intermediate_size=75, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=331, initializer_range=0.3, sliding_window=6,
    )  # fmt: skip
    theirs = MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.config.sliding_window == 6
    values = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    with torch.no_grad():
        expected = theirs(IDS).logits.double()
    tolerance = 1e-5 * expected.std().item()
    torch.testing.assert_close(reference_logits(checkpoint.config, values, IDS), expected, rtol=1e-5, atol=tolerance)
    for other in (5, 7):
        model = replace(checkpoint.config, sliding_window=other)
        assert (reference_logits(model, values, IDS) - expected).abs().max() > 100 * tolerance


def test_what_is_left_out_is_what_transformers_has_for_it() -> None:
    assert model_from_config(config_json("qwen3"), "folder").kv_channels == 128
    assert model_from_config(config_json("qwen2"), "folder").kv_channels == 8
    fields = config_json("qwen2", num_attention_heads=64, hidden_size=128)
    del fields["num_key_value_heads"]
    assert model_from_config(fields, "folder").query_groups == 32


def test_what_a_family_lacks_is_refused() -> None:
    with pytest.raises(RequestError, match="attention_bias True: only False is supported here"):
        model_from_config(config_json("qwen3", attention_bias=True), "folder")
    with pytest.raises(RequestError, match=r"qkv_bias = False \(here: True\): --flavour teleflm can"):
        require_expressible(ODD, FAMILIES["qwen2"])
    normed = replace(ODD, query_key_norm=True)
    with pytest.raises(RequestError, match=r"query_key_norm = True \(here: False\): --flavour qwen3 can"):
        require_expressible(normed, FAMILIES["llama"])
    require_expressible(replace(normed, query_key_norm_epsilon=0.1), FAMILIES["qwen3"])
