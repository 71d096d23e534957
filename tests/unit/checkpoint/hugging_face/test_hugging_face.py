"""Hugging Face folders against `transformers`: what it computes from our exports, what we compute from its."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_megatron.checkpoint.hugging_face.families.registry import FAMILIES
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.writer import ExportOptions, folding_note, write_hugging_face
from flm_megatron.checkpoint.logical import Region
from flm_megatron.config.schema import ModelConfig, MupConfig
from flm_megatron.errors import DamagedError, RequestError
from tests.support.checkpoint_cases import Memory
from tests.support.reference_model import IDS, ODD, random_tensors, reference_logits

MUP = ModelConfig(**(vars(ODD) | {"input_mult": 0.7, "output_mult": 1.3, "mup": MupConfig(True, 36)}))
POWERS = ModelConfig(**(vars(ODD) | {"input_mult": 2.0, "output_mult": 0.5, "mup": MupConfig(True, 27)}))


@pytest.fixture(autouse=True, scope="module")
def own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code of exported folders is cached by transformers; keep that out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


def transformers_logits(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of `transformers`, with the folder's own code where it has any."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(ids).logits


def export(model: ModelConfig, path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Random weights of `model`, written to `path`."""
    values = random_tensors(model)
    write_hugging_face(Memory(values), model, path, ExportOptions(**options))
    return values


@pytest.mark.parametrize("flavour", ["teleflm", "llama"])
@pytest.mark.parametrize("model", [ODD, MUP, replace(MUP, tie_embeddings=True)], ids=["plain", "mup", "tied"])
def test_transformers_computes_our_logits_from_an_export(tmp_path: Path, model: ModelConfig, flavour: str) -> None:
    values = export(model, tmp_path / "out", flavour=flavour, shard_bytes=100_000)
    expected = reference_logits(model, {name: value.double() for name, value in values.items()}, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out").double(), expected, rtol=1e-5, atol=1e-5)


def test_biases_reach_transformers(tmp_path: Path) -> None:
    model = ModelConfig(**(vars(ODD) | {"bias": True}))
    values = export(model, tmp_path / "out", flavour="llama")
    expected = reference_logits(model, {name: value.double() for name, value in values.items()}, IDS)
    torch.testing.assert_close(transformers_logits(tmp_path / "out").double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pickled", "tied"), [(False, True), (True, False)], ids=["safetensors", "bin"])
def test_our_logits_from_a_folder_that_transformers_wrote(tmp_path: Path, pickled: bool, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=108, intermediate_size=75, num_hidden_layers=3, num_attention_heads=18, num_key_value_heads=3,
        head_dim=8, vocab_size=331, rms_norm_eps=1e-5, initializer_range=0.1, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="150KB")
    if pickled:
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    values = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    torch.testing.assert_close(
        expected.double(), reference_logits(checkpoint.config, values, IDS), rtol=1e-5, atol=1e-5
    )


SCALINGS: dict[str, dict[str, float]] = {
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 3.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotary_positions_go_both_ways(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=108, intermediate_size=75, num_hidden_layers=2, num_attention_heads=9, num_key_value_heads=3,
        head_dim=12, vocab_size=331, rms_norm_eps=1e-5, initializer_range=0.1, tie_word_embeddings=False,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **SCALINGS[kind]},
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = HuggingFaceCheckpoint(tmp_path / "theirs")
    model = checkpoint.config
    values = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    with torch.no_grad():
        expected = theirs(IDS).logits.double()
    torch.testing.assert_close(reference_logits(model, values, IDS), expected, rtol=1e-5, atol=1e-5)
    assert (reference_logits(replace(model, rope_scaling=None), values, IDS) - expected).abs().max() > 1e-3
    write_hugging_face(checkpoint, model, tmp_path / "ours", ExportOptions("llama"))
    torch.testing.assert_close(transformers_logits(tmp_path / "ours").double(), expected, rtol=1e-5, atol=1e-5)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["rope_scaling"] == {"rope_type": kind, **SCALINGS[kind]}, "as transformers 4 reads it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teleflm_round_trip_keeps_every_bit_and_the_configuration(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {name: value.to(dtype) for name, value in random_tensors(MUP).items()}
    write_hugging_face(Memory(values), MUP, tmp_path / "out", ExportOptions(shard_bytes=50_000, pad_vocab_to=64))
    checkpoint = HuggingFaceCheckpoint(tmp_path / "out")
    assert checkpoint.config == MUP
    assert checkpoint.tensors == Memory(values).tensors
    for name, value in values.items():
        assert torch.equal(checkpoint.read(name), value), name


def test_llama_flavour_is_bit_exact_with_powers_of_two(tmp_path: Path) -> None:
    export(POWERS, tmp_path / "llama", flavour="llama")
    values = export(POWERS, tmp_path / "teleflm", flavour="teleflm")
    expected = reference_logits(POWERS, {name: value.double() for name, value in values.items()}, IDS)
    folded, multiplied = transformers_logits(tmp_path / "llama"), transformers_logits(tmp_path / "teleflm")
    torch.testing.assert_close(multiplied.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(folded, multiplied)
    assert "bit-exact" in folding_note(POWERS, FAMILIES["llama"])
    assert "rounded" in folding_note(MUP, FAMILIES["llama"])


def test_padding_ids_are_never_predicted(tmp_path: Path) -> None:
    export(MUP, tmp_path / "padded", pad_vocab_to=64)
    export(MUP, tmp_path / "plain")
    logits = transformers_logits(tmp_path / "padded")
    assert logits.shape[-1] == 384
    assert torch.isneginf(logits[..., 331:]).all()
    assert torch.equal(logits[..., :331].argmax(-1), transformers_logits(tmp_path / "plain").argmax(-1))


def test_the_true_vocabulary_of_a_padded_folder_can_be_given(tmp_path: Path) -> None:
    values = export(MUP, tmp_path / "out")
    edit_config(tmp_path / "out", true_vocab_size=None)
    checkpoint = HuggingFaceCheckpoint(tmp_path / "out", vocab_size=300)
    assert checkpoint.config.vocab_size == 300
    assert torch.equal(checkpoint.read("output_layer.weight"), values["output_layer.weight"][:300])
    with pytest.raises(RequestError, match="332 asked for, 331 stored"):
        HuggingFaceCheckpoint(tmp_path / "out", vocab_size=332)


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    export(ODD, tmp_path / "out", shard_bytes=200_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert all(file.stat().st_size < 205_000 for file in files)


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[HuggingFaceCheckpoint, dict[str, torch.Tensor]]:
    """An export on odd shapes, opened, and what it holds."""
    path = tmp_path_factory.mktemp("odd") / "out"
    values = export(ODD, path, shard_bytes=120_000)
    return HuggingFaceCheckpoint(path), values


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_region_is_that_part_of_the_whole(
    odd_folder: tuple[HuggingFaceCheckpoint, dict[str, torch.Tensor]], data: st.DataObject
) -> None:
    checkpoint, values = odd_folder
    name = data.draw(st.sampled_from(sorted(values)))
    offsets, sizes = [], []
    for length in values[name].shape:
        offsets.append(data.draw(st.integers(0, length - 1)))
        sizes.append(data.draw(st.integers(1, length - offsets[-1])))
    region = Region(tuple(offsets), tuple(sizes))
    assert torch.equal(checkpoint.read(name, region), values[name][region.slices])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "layernorm"}, r"teleflm cannot express the model's normalization = layernorm \(here: rms"),
        (
            {"activation": "gelu", "bias": True},
            r"the model's activation = gelu \(here: swiglu\): no family known here can",
        ),
        ({"position": "xpos"}, "position = xpos"),
        ({"qkv_bias": True}, "qkv_bias = True"),
        ({"query_key_norm": True}, "query_key_norm = True"),
    ],
)
def test_other_blocks_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = ModelConfig(**(vars(ODD) | change))
    with pytest.raises(RequestError, match=message):
        write_hugging_face(Memory(random_tensors(model)), model, tmp_path / "out", ExportOptions())
    assert list(tmp_path.iterdir()) == []


def edit_config(path: Path, **change: object) -> None:
    """Change fields of a folder's configuration."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba", "mup_scale_factor": None}, "does not describe a decoder|not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"intermediate_size": 76}, r"gate_proj.weight has shape \(75, 108\), config.json asks for \(76, 108\)"),
        ({"num_hidden_layers": 2}, "model.layers.2.* is not one of the configured model"),
        ({"mup_scale_factor": 7.0}, "mup_scale_factor 7.0"),
        ({"hidden_size": "wide"}, "hidden_size 'wide': it should be a valid integer"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    export(MUP, tmp_path / "out")
    if change.get("model_type") == "mamba":
        config = json.loads((tmp_path / "out/config.json").read_text())
        del config["mup_scale_factor"]
        (tmp_path / "out/config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    else:
        edit_config(tmp_path / "out", **change)
    with pytest.raises(RequestError, match=message):
        HuggingFaceCheckpoint(tmp_path / "out")


def test_missing_layers_and_shards_are_damage(tmp_path: Path) -> None:
    export(ODD, tmp_path / "out", shard_bytes=120_000)
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    with pytest.raises(DamagedError, match=r"shard model-00002-\S+ is missing"):
        HuggingFaceCheckpoint(tmp_path / "out")
    export(ODD, tmp_path / "deeper")
    edit_config(tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(DamagedError, match=r"tensor model.layers.3.* is missing"):
        HuggingFaceCheckpoint(tmp_path / "deeper")


@pytest.mark.parametrize("keep", [5, 2000, -1])
def test_truncated_shards_are_damage(tmp_path: Path, keep: int) -> None:
    export(ODD, tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(keep if keep > 0 else file.stat().st_size + keep)
    with pytest.raises(DamagedError, match=r"model.safetensors"):
        HuggingFaceCheckpoint(tmp_path / "out")


class RunsCode:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_a_pickled_shard_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    export(ODD, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    shard = tmp_path / "out/pytorch_model.bin"
    torch.save({"model.norm.weight": torch.ones(108), "extra": RunsCode(tmp_path / "ran")}, shard)
    with pytest.raises(DamagedError, match=r"pytorch_model\.bin"):
        HuggingFaceCheckpoint(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.load(shard, weights_only=False)
    assert (tmp_path / "ran").exists(), "the pickle does run code where it is let"


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    export(ODD, tmp_path / "out")
    shutil.move(tmp_path / "out/model.safetensors", tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "out/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RequestError, match="outside the folder"):
        HuggingFaceCheckpoint(tmp_path / "out")


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("kept")
    with pytest.raises(RequestError, match="exists"):
        export(ODD, tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    class Failing(Memory):
        def read(self, name: str, region: Region | None = None) -> torch.Tensor:
            """Fails on the head."""
            if name == "output_layer.weight":
                raise DamagedError("unreadable head")
            return super().read(name, region)

    with pytest.raises(DamagedError, match="unreadable head"):
        write_hugging_face(Failing(random_tensors(ODD)), ODD, tmp_path / "out", ExportOptions())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/leftover").write_text("of a killed run")
    export(ODD, tmp_path / "out")
    assert not (tmp_path / "out/leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
