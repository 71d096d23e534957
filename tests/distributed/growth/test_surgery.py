"""A model of another program through every change of shape, from the command line alone.

After each of them `transformers` computes from an export what the engine computes from the checkpoint.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flm_megatron.checkpoint.described import required_model
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import chunks_to_evaluate
from flm_megatron.config.schema import StageConfig
from flm_megatron.distributed.world import one_process
from flm_megatron.model.forward import Batch, forward
from tests.support.prose import prose
from tests.support.runs import flm, make_data

ROOT = Path(__file__).parents[3]

TRAINED = """
name: {name}
output: {folder}/{name}
tokenizer: {folder}/tokenizer.model
data: {{sequence_length: 32, train: [{{path: {folder}/train}}], validation: [{{path: {folder}/validation}}]}}
checkpoint: {{initial: {initial}}}
stages:
- name: {name}
  model: from_checkpoint
  parallel: {layout}
  global_batch: 4
  tokens: {tokens}
  optimizer: {{lr: 1.0e-3}}
"""
OLD = {"num_layers": 2, "hidden_size": 36, "ffn_hidden_size": 60, "num_attention_heads": 6}
IDS = (torch.arange(48).view(2, 24) * 37 + 11) % 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a random Qwen 3, with a tied head as its small ones, that `transformers` wrote."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = make_data(tmp_path_factory.mktemp("surgery"))
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=36, intermediate_size=60, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=8, vocab_size=500, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    return folder


def done(*arguments: str | Path) -> None:
    """A command that has to succeed."""
    result = flm(*arguments)
    assert result.returncode == 0, result.stderr


def trained(folder: Path, name: str, initial: Path, *layouts: str) -> Path:
    """The last checkpoint of a run that starts from `initial`: a start for each layout, two steps in all."""
    run = folder / f"{name}.yaml"
    for start, layout in enumerate(layouts, 1):
        tokens = 256 * start // len(layouts)
        run.write_text(TRAINED.format(folder=folder, name=name, initial=initial, layout=layout, tokens=tokens))
        done("train", run)
    return folder / name / "checkpoints" / name / "step_00000002"


def changed(**model: int) -> list[str]:
    """Options that change fields of a checkpoint's model."""
    return [word for name, value in model.items() for word in (f"--model.{name}", str(value))]


def engine_logits(checkpoint: Path) -> Tensor:
    """Logits of the engine, [2, 24, 500] fp32."""
    opened = open_checkpoint(checkpoint)
    model = required_model(opened, str(checkpoint))
    with one_process():
        chunk = chunks_to_evaluate(opened, StageConfig(model=model))[0]
        return forward(chunk, [Batch(IDS)], 1, lambda _, logits: logits[..., :500].clone())[0]


def transformers_logits(folder: Path) -> Tensor:
    """Logits of `transformers`, [2, 24, 500] fp32."""
    from safetensors.torch import load_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    # Not `from_pretrained` of the model: first imported beside the engine's CPU adapter, it leaves frequencies unset.
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder))
    assert model.load_state_dict(load_file(folder / "model.safetensors"), strict=False).missing_keys == [
        "lm_head.weight"  # which is the embedding
    ]
    with torch.no_grad():
        return model.float().eval()(IDS).logits


def exported(folder: Path, checkpoint: Path) -> Tensor:
    """What both compute from a checkpoint, after it was exported."""
    out = folder / f"{checkpoint.parent.name}-{checkpoint.name}-exported"
    done("checkpoint", "export-hf", checkpoint, out, "--flavour", "qwen3")
    theirs = transformers_logits(out)
    torch.testing.assert_close(engine_logits(checkpoint), theirs, rtol=1e-5, atol=1e-5)
    return theirs


def test_a_qwen3_is_imported_trained_grown_trained_in_parallel_shrunk_and_exported(folder: Path) -> None:
    imported, grown = folder / "imported", folder / "grown"
    done("checkpoint", "import-hf", folder / "qwen3", imported)
    torch.testing.assert_close(exported(folder, imported), transformers_logits(folder / "qwen3"))
    continued = trained(folder, "continued", imported, "{}")
    before = exported(folder, continued)
    larger = changed(num_layers=4, hidden_size=54, ffn_hidden_size=76, num_attention_heads=8)
    done("grow", continued, "--out", grown, *larger)
    torch.testing.assert_close(exported(folder, grown), before, rtol=1e-4, atol=1e-5)
    in_parallel = trained(folder, "parallel", grown, "{tensor: 2, pipeline: 2}", "{pipeline: 2}")
    large = exported(folder, in_parallel)
    assert not torch.allclose(large, before, atol=1e-2), "trained"
    importance, small = folder / "units.safetensors", folder / "small"
    (folder / "text.txt").write_text(prose(1)[0])
    text = ["--text", str(folder / "text.txt"), "--data.sequence_length", "32"]
    by = ["--ffn", "gradient", "--heads", "gradient"]  # new units are active, but hardly anything reads them yet
    done("importance", in_parallel, *text, *by, "--out", importance)
    criteria = ["--shrink.ffn", "gradient", "--shrink.heads", "gradient"]
    done("shrink", in_parallel, "--importance", importance, "--out", small, *changed(**OLD), *criteria)
    torch.testing.assert_close(exported(folder, small), large, rtol=0, atol=0.02)


def test_the_five_commands_of_the_readme(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model and text, with a smaller run file of the same name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    section = (ROOT / "README.md").read_text().split("## From an open model")[1]
    commands = re.findall(r"^flm (.*?)(?: +#.*)?$", section.split("```")[1], re.MULTILINE)
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=32, num_attention_heads=2, vocab_size=500,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("Llama-2-7b")
    shutil.copy(folder / "tokenizer.model", "Llama-2-7b")
    Path("corpus").mkdir()
    Path("corpus/text.txt").write_text("\n".join(prose(8)))
    Path("examples").mkdir()
    run = (ROOT / "examples/continue.yaml").read_text()
    smaller = {"4096": "32", "2560": "8", "256": "8", "1.0e9": "512"}
    for large, small in smaller.items():
        assert large in run
        run = run.replace(large, small)
    Path("examples/continue.yaml").write_text(re.sub("parallel: {.*}", "parallel: {}", run))
    for command in commands:
        done(*shlex.split(command.replace("step_00000954", "step_00000002")))
    written = LlamaConfig.from_pretrained("larger")
    assert (written.num_hidden_layers, written.hidden_size) == (40, 16)
    assert (tmp_path / "larger" / "tokenizer.model").is_file()
