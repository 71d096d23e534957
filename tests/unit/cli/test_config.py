"""`flm config`: all fields with their meaning, or a run file resolved."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from flm_megatron.checkpoint.hugging_face.config import config_of
from flm_megatron.checkpoint.hugging_face.families.llama import LLAMA
from flm_megatron.cli.main import main
from flm_megatron.config.fields import all_fields
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import ModelConfig, RopeScaling

RUN = "name: try\nstages: [{preset: tiny}, {name: big, preset: tiny-grown, growth: {hidden: mask}}]\n"


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    """A run file of two stages."""
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return str(path)


def test_every_field_has_a_help_text() -> None:
    listed = list(all_fields())
    assert [field.path for field in listed if not field.help] == []
    assert len({field.path for field in listed}) == len(listed) > 90
    leaves = [f for f in listed if f.path == "stages.schedule.decay_tokens"]
    assert leaves[0].type == "integer or null" and "end of the stage" in leaves[0].help


def test_all_fields_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    shown = capsys.readouterr().out
    assert "stages.parallel.tensor  (integer; 1)\n    Tensor-parallel size.\n" in shown
    assert "data.train.path  (text; required)" in shown
    assert "stages.optimizer.betas  (list of 2 numbers; [0.9, 0.95])" in shown
    assert "stages.preset  (text)" in shown and "tele-flm-52b" in shown


def test_one_section_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--field", "stages.0.validation"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line and not line.startswith(" ")] == [
        "stages.validation",
        "stages.validation.interval_steps",
        "stages.validation.samples",
    ]


def test_run_file_is_shown_resolved(run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", run_file, "--stages.big.tokens", "1e6"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert load_run(resolved) == load_run(run_file, ["--stages.big.tokens", "1e6"])
    assert load_run(resolved).stages[1].tokens == 1_000_000


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("name", "try\n"),
        ("stages.big.growth.hidden", "mask\n"),
        ("stages.0.model.hidden_size", "128\n"),
        ("stages.model.hidden_size", "- 128\n- 192\n"),
    ],
)
def test_one_field_of_a_run_file(run_file: str, field: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", run_file, "--field", field]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--field", "stages.paralel"], "--field stages.paralel: no such field, did you mean 'stages.parallel'?"),
        (["--name=x"], "--name=x: overrides need a run file"),
        (["absent.yaml"], "absent.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_wrong_requests_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *arguments]) == 2
    assert capsys.readouterr().err == f"flm config: {line}\n"


def test_a_run_file_of_a_hugging_face_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it fails
    model = ModelConfig(
        num_attention_heads=6, num_query_groups=2, head_dim=8, vocab_size=331, norm_epsilon=1e-6, rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", 32.0),
    )  # fmt: skip
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model, LLAMA, 384, 4096, "bfloat16")))
    assert main(["config", "--from-hf", str(folder)]) == 0
    written = tmp_path / "run.yaml"
    written.write_text(capsys.readouterr().out)
    run = load_run(written, ["--stages.base.tokens", "1e6"])
    assert [stage.model for stage in run.stages] == [model]
    assert (run.stages[0].tokens, run.checkpoint.initial, run.tokenizer) == (1_000_000, str(folder), None)
    (folder / "tokenizer.model").touch()
    assert main(["config", "--from-hf", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"tokenizer: {folder}/tokenizer.model\n")


def test_a_folder_of_no_known_family_makes_no_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    for arguments, line in (
        (["--from-hf", str(tmp_path)], "model_type 'lama' is not supported: did you mean 'llama'?"),
        (["--from-hf", str(tmp_path / "none")], "none is not a Hugging Face checkpoint: it has no config.json"),
        (["--from-hf", str(tmp_path), "--stages.0.tokens", "9"], "--from-hf stands alone: override the fields of"),
    ):
        assert main(["config", *arguments]) == 2
        assert line in capsys.readouterr().err


def test_a_field_that_a_run_file_does_not_have(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", run_file, "--field", "stages.0.modl"]) == 2
    assert "'modl' leads nowhere, known here: name, model, parallel" in capsys.readouterr().err


def test_sections_of_the_schema_are_all_reached() -> None:
    from flm_megatron.config import schema

    names = {field.path.split(".")[-1] for field in all_fields()}
    sections = [item for item in vars(schema).values() if isinstance(item, type) and is_dataclass(item)]
    assert {field.name for section in sections for field in fields(section)} == names
