"""Files of others that are wrong on purpose: safetensors, Hugging Face indices and configurations, manifests."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flm_megatron.checkpoint.files.manifest import MANIFEST, read_manifest
from flm_megatron.checkpoint.hugging_face.config import model_from_config
from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.hugging_face.safetensors import arrays_in
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.megatron_legacy.reader import MegatronLegacyCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.stage_manifest import manifest_model
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.config.schema import RopeScaling
from flm_megatron.errors import DamagedError, FlmError, RequestError
from tests.support.checkpoint_cases import flm_checkpoint, write_small
from tests.unit.cli.checkpoint.test_bad_input import edit_manifest


def tensor(start: int, end: int, shape: tuple[Any, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    """An entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_safetensors(path: Path, header: dict[str, Any] | str, nbytes: int, length: int | None = None) -> None:
    """A file with that header, or its text, and so many bytes of values."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(nbytes))


TWICE = f'{{"a": {json.dumps(tensor(0, 8))}, "a": {json.dumps(tensor(0, 8))}}}'
HEADERS: dict[str, tuple[dict[str, Any] | str, int]] = {
    "overlap": ({"a": tensor(0, 8), "b": tensor(4, 12)}, 12),
    "the same bytes": ({"a": tensor(0, 8), "b": tensor(0, 8)}, 8),
    "hole": ({"a": tensor(0, 8), "b": tensor(12, 20)}, 20),
    "hole at the beginning": ({"a": tensor(4, 12)}, 12),
    "bytes behind the last": ({"a": tensor(0, 8)}, 9),
    "negative offset, into the header": ({"a": tensor(-8, 0)}, 8),
    "end before its beginning": ({"a": tensor(8, 0)}, 8),
    "shape of more values": ({"a": tensor(0, 8, (3,))}, 8),
    "shape of fewer values": ({"a": tensor(0, 8, (1,))}, 8),
    "negative shape": ({"a": tensor(0, 8, (-2, -1))}, 8),
    "shape of floats": ({"a": tensor(0, 8, (2.0,))}, 8),
    "shape of booleans": ({"a": tensor(0, 4, (True,))}, 4),
    "shape that overflows": ({"a": tensor(0, 0, (2**62, 2**62))}, 0),
    "unknown dtype": ({"a": tensor(0, 8, dtype="F37")}, 8),
    "dtype that is not read here": ({"a": tensor(0, 4, dtype="U16")}, 4),
    "key twice": (TWICE, 8),
    "no object": ("[]", 0),
    "deep": ("[" * 100_000, 0),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_wrong_safetensors_header_is_damage(case: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", *HEADERS[case])
    with pytest.raises(DamagedError, match=r"x\.safetensors"):
        arrays_in(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_wrong_header_length_is_damage(length: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"a": tensor(0, 8)}, 8, length)
    with pytest.raises(DamagedError, match=r"x\.safetensors"):
        arrays_in(tmp_path / "x.safetensors")


def test_a_header_above_the_limit_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": tensor(0, 8)}, 8, 100_000_001)
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    with pytest.raises(DamagedError, match=r"HeaderTooLarge|header too large"):
        arrays_in(path)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    values = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "e": torch.empty(0, 4)}
    save_file(values, tmp_path / "x.safetensors")
    found = arrays_in(tmp_path / "x.safetensors")
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name].read(), value) for name, value in values.items())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours and its Hugging Face export in shards."""
    path = tmp_path_factory.mktemp("exported")
    write_small(path / "ours")
    assert flm_checkpoint("export-hf", path / "ours", path / "hf", "--shard-size", "100KB") == 0
    return path


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({NORM: "../x.safetensors"}), "outside the folder"),
        (lambda i: i["weight_map"].update({NORM: "/etc/passwd"}), "outside the folder"),
        (lambda i: i["weight_map"].update({NORM: ".."}), "outside the folder"),
        (lambda i: i["weight_map"].update({NORM: None}), "outside the folder"),
        (lambda i: i["weight_map"].update({NORM: "x" * 5000}), "outside the folder"),
        (lambda i: i["weight_map"].update({NORM: "a\0b"}), "outside the folder"),
        (lambda i: i["weight_map"].update({NORM: "none.safetensors"}), "shard none.safetensors is missing"),
        (lambda i: i["weight_map"].update({NORM: i["weight_map"]["lm_head.weight"]}), f"tensor {NORM} is missing"),
        (lambda i: i["weight_map"].pop(NORM), f"says that tensor {NORM} lies in None"),
        (lambda i: i["weight_map"].update({"more": i["weight_map"][NORM]}), "tensor more is missing"),
        (lambda i: i["metadata"].update(total_size=5), "its tensors have 5 bytes, they have 302724"),
        (lambda i: i["metadata"].update(total_size="much"), "its tensors have 'much' bytes"),
        (lambda i: i.update(weight_map=[]), "has no weight_map"),
    ],
)
def test_a_wrong_index_is_refused(exported: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(exported / "hf", tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    change(index)
    (tmp_path / "hf" / INDEX).write_text(json.dumps(index))
    with pytest.raises(FlmError, match=message):
        HuggingFaceCheckpoint(tmp_path / "hf")


def test_an_index_that_names_a_tensor_twice_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "hf", tmp_path / "hf")
    text = (tmp_path / "hf" / INDEX).read_text()
    (tmp_path / "hf" / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x",', 1))
    with pytest.raises(DamagedError, match=f"the key '{NORM}' is given twice"):
        HuggingFaceCheckpoint(tmp_path / "hf")


def test_a_tied_model_with_another_head_is_refused(exported: Path, tmp_path: Path) -> None:
    """transformers 4 computes such files with the embedding, transformers 5 with the head."""
    shutil.copytree(exported / "hf", tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(RequestError, match=r"an lm_head\.weight is stored that is not the embedding"):
        HuggingFaceCheckpoint(tmp_path / "hf")


def test_a_tied_model_may_store_its_head_once_more(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tie_word_embeddings": True}))
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.config.tie_embeddings and "output_layer.weight" not in checkpoint.tensors
    assert torch.equal(checkpoint.read("embedding.word_embeddings.weight"), model.model.embed_tokens.weight)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 300,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000: it should be less than or equal to 10000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1: it should be greater than or equal to 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers True: it should be a valid integer"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers 2.0: it should be a valid integer"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers of over 40 digits"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": -6}, "num_attention_heads -6"),
        ({"num_attention_heads": 7}, "hidden_size 96 does not give each head"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, by which num_attention_heads 6"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"head_dim": 15}, "head_dim 15: it should be a multiple of 2"),
        ({"hidden_size": "96"}, "hidden_size '96': it should be a valid integer"),
        ({"hidden_size": [96]}, r"hidden_size \[96\]"),
        ({"hidden_size": None}, "hidden_size None"),
        ({"intermediate_size": 2**40}, "intermediate_size 1099511627776"),
        ({"vocab_size": 10**10}, "vocab_size 10000000000"),
        ({"true_vocab_size": -1}, "true_vocab_size -1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps -1: it should be greater than 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6'"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_theta": float("inf")}, "rope_theta inf"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type 'dynamic': only 'default'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling: factor is 0.5, give a number from 1"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: no factor, which type 'llama3' needs"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor 2.0: type 'default' does not have it"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 9}}, "beta_fast 9.0: type 'linear' does not"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 1.0}}, "rope_parameters.mscale 1.0: no field"),
        ({"rope_parameters": {"type": "linear", "factor": 2}, "rope_scaling": {"type": "default"}}, "that disagree"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor 0.5"),
        (
            {
                "rope_theta": 1.0,
                "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64},
            },
            "rope_theta 1.0, with which type 'yarn' cannot compute",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor of over 40 digits"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "rope_scaling.factor '8'"),
        ({"rope_scaling": "dynamic"}, "rope_scaling 'dynamic'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\}, which is not supported"),
        ({"sliding_window": 4096}, "sliding_window 4096, which is not supported"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25; only 1.0 is supported"),
        ({"is_causal": False}, "is_causal False; only True is supported"),
        ({"attention_bias": True}, "attention_bias True and mlp_bias False: biases in all linear layers or in none"),
        ({"mlp_bias": True}, "attention_bias False and mlp_bias True"),
        ({"attention_bias": "no"}, "attention_bias 'no'"),
        ({"attention_bias": 1}, "attention_bias 1: it should be a valid boolean"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu' is supported"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        ({"model_type": "lama4"}, "model_type 'lama4' is not supported: did you mean 'llama'?"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"use_mup": True, "mup_scale_factor": 0}, "mup_scale_factor 0"),
        ({"use_mup": True, "mup_scale_factor": -2.0}, "mup_scale_factor -2.0"),
        ({"use_mup": True, "mup_scale_factor": 2.0, "input_mult": float("nan")}, "input_mult nan"),
        ({"hidden_size": "x" * 10**6}, r"hidden_size 'xxx.{1,100}: it should be"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name_at_once(change: dict[str, Any], message: str) -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match=message) as refused:
        model_from_config(LLAMA | change, "folder")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("name", sorted(LLAMA.keys() - {"model_type"}))
def test_a_missing_field_is_named(name: str) -> None:
    config = {key: value for key, value in LLAMA.items() if key != name}
    with pytest.raises(RequestError, match=f"has no {name}"):
        model_from_config(config, "folder")


def test_fields_that_say_what_llama_does_are_taken() -> None:
    neutral = {
        "sliding_window": None,
        "use_sliding_window": False,
        "quantization_config": None,
        "partial_rotary_factor": 1.0,
        "rope_scaling": None,
        "attention_dropout": 0.1,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "eos_token_id": [1, 2],
        "mlp_bias": None,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1,
    }
    neutral["rms_norm_eps"] = 1e-5
    model = model_from_config(LLAMA | neutral, "folder")
    assert (model.query_groups, model.kv_channels, model.norm_epsilon, model.rope_theta) == (2, 16, 1e-5, 10000.0)
    old = model_from_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, "folder")
    new = model_from_config(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "folder")
    assert old.rope_theta == new.rope_theta == 5e5
    assert old.rope_scaling is new.rope_scaling is None
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled = model_from_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}, "folder")
    assert (scaled.rope_theta, scaled.rope_scaling) == (5e5, RopeScaling("llama3", 32.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../outside": {"size": 5, "crc32": "00000000"}}}, "names the file '../outside'"),
        ({"files": {"/etc/passwd": {"size": 5, "crc32": "00000000"}}}, "names the file '/etc/passwd'"),
        ({"files": {"..": {"size": 5, "crc32": "00000000"}}}, "names the file '..'"),
        ({"files": {"a": {"size": -5, "crc32": "00000000"}}}, "files.a.size"),
        ({"files": {"a": {"size": True, "crc32": "00000000"}}}, "files.a.size"),
        ({"files": {"a": {"size": 5, "crc32": "zz"}}}, "files.a.crc32"),
        ({"files": ["a"]}, "files"),
        ({"step": "7"}, "step"),
        ({"step": -7}, "step"),
        ({"step": True}, "step"),
        ({"run": []}, "run"),
        ({"run": {"stages": [5]}}, "run.stages.0"),
        ({"run": {"stages": [{"name": "small"}]}}, "run.stages.0.model"),
        ({"growth": {"plan": []}}, "growth.plan"),
        ({"run": {"data": {"train": [{}]}}}, "run.data.train.0.path"),
        ({"run": {"data": {"sequence_length": "x"}}}, "run.data.sequence_length"),
        ({"tensors": {"a": 5}}, "tensors.a"),
        ({"stage": 5}, "stage"),
    ],
)
def test_a_manifest_of_other_fields_is_damage(exported: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copy(exported / "ours" / MANIFEST, tmp_path / MANIFEST)
    edit_manifest(tmp_path, **change)
    with pytest.raises(DamagedError, match=f"{MANIFEST}.*{message}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5_000, "5", "nul", "\ufeff{}", '{"version": ' + "9" * 5000 + "}"]
)
def test_a_manifest_that_is_no_such_thing_is_damage(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DamagedError, match=MANIFEST):
        read_manifest(tmp_path)


def test_the_model_of_a_manifest_has_limits(exported: Path) -> None:
    manifest = json.loads((exported / "ours" / MANIFEST).read_text())
    model = manifest["run"]["stages"][0]["model"]
    for changes, words in (
        ({"num_layers": 10**12}, "num_layers is 1,000,000,000,000: it has to lie between 0 and 10,000"),
        ({"num_attention_heads": 0, "num_query_groups": None, "head_dim": None}, "num_attention_heads is 0: it has to"),
        ({"mup": {"enabled": True, "base_hidden_size": 0}}, "mup.base_hidden_size is 0: it has to lie between 1"),
    ):
        manifest["run"]["stages"][0]["model"] = {**model, **changes}
        with pytest.raises(RequestError, match=words):
            manifest_model(Manifest.from_json(manifest))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"sharded_backend": "torch_dist", "sharded_backend": "x"}', "{"],
    ids=["deep", "twice", "cut"],
)
def test_a_format_file_that_is_no_such_thing_is_damage(exported: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(exported / "ours", tmp_path / "a")
    for name in (MANIFEST, "common.pt"):
        (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / "metadata.json").write_text(text)
    with pytest.raises(DamagedError, match=r"metadata\.json"):
        TorchDistCheckpoint(tmp_path / "a")


def classic(exported: Path, tmp_path: Path, **change: Any) -> Path:
    """A checkpoint in Megatron-LM's legacy layout, with other fields in the file of its rank."""
    command = ("reshard", exported / "ours", tmp_path / "classic", "--format", "classic", "--tensor", 1)
    assert flm_checkpoint(*command) == 0
    file = next((tmp_path / "classic").rglob("*.pt"))
    saved = torch.load(file, weights_only=False)
    for name, value in change.pop("args", {}).items():
        setattr(saved["args"], name, value)
    torch.save(saved | change, file)
    return tmp_path / "classic"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": []}, "model is not a table of tensors by name"),
        ({"model": {5: torch.ones(1)}}, "model is not a table of tensors by name"),
        (
            {"model": {"embedding.word_embeddings.weight": torch.tensor(1.0)}},
            "embedding.word_embeddings.weight is missing",
        ),
        ({"args": {"num_layers": 10**12}}, "num_layers is 1,000,000,000,000: it has to lie between 0 and 10,000"),
        ({"args": {"num_attention_heads": 0}}, "do not describe a decoder|num_attention_heads is 0"),
        ({"args": {"num_layers": [1]}}, "do not describe a decoder"),
        ({"args": {"num_layers": True}}, "do not describe a decoder"),
        ({"args": {"norm_epsilon": -1.0}}, "norm_epsilon is -1.0"),
        ({"args": {"window_size": (128, 0)}}, r"window_size = \(128, 0\)"),
        ({"args": {"no_rope_freq": [0, 1, 1]}}, r"no_rope_freq = \[0, 1, 1\]"),
    ],
)
def test_a_rank_file_of_other_fields_is_refused(exported: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = classic(exported, tmp_path, **change)
    began = time.monotonic()
    with pytest.raises(FlmError, match=message):
        MegatronLegacyCheckpoint(path)
    assert time.monotonic() - began < 5


def test_an_argument_of_shared_parts_is_shown_in_short(exported: Path, tmp_path: Path) -> None:
    """2^60 elements, which neither comparing nor writing the message may visit."""
    deep: Any = []
    for _ in range(60):
        deep = [deep, deep]
    path = classic(exported, tmp_path, args={"no_rope_freq": deep})
    with pytest.raises(RequestError, match="no_rope_freq = ") as refused:
        MegatronLegacyCheckpoint(path)
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("latest", ["²", "9" * 5000, "release", "\udc80"])
def test_a_strange_latest_iteration_is_refused(latest: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(latest, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(RequestError, match="has no mp_rank folders"):
        open_checkpoint(tmp_path)
