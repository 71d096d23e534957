"""A run that takes its model from the checkpoint it starts from: it trains that function on, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from flm_megatron.checkpoint.described import recorded_model
from flm_megatron.checkpoint.manifest import StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.stage_manifest import stage_manifest
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import ModelConfig, MupConfig, RunConfig, StageConfig
from flm_megatron.data.streams.stream import SampleStream
from flm_megatron.training.metrics.events import ValidationEvent, read_events
from tests.support.checkpoint_cases import Memory
from tests.support.reference_model import random_tensors, reference_loss
from tests.support.runs import make_data

# Nothing here is the run file's default, and each changes the loss.
MODEL = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=40, num_attention_heads=12, num_query_groups=6, vocab_size=500,
    norm_epsilon=0.1, rope_theta=100.0, position="xpos", xpos_scale_base=16.0, input_mult=3.0, output_mult=4.0,
    matrix_init_std=0.3, vector_init_std=0.5, mup=MupConfig(enabled=True, base_hidden_size=24),
)  # fmt: skip


def run_file(folder: Path, model: object, tokens: int) -> Path:
    """A run file that starts from `folder`/base."""
    document = {
        "output": str(folder / "run"),
        "tokenizer": str(folder / "tokenizer.model"),
        "data": {
            "sequence_length": 32,
            "train": [{"path": str(folder / "train")}],
            "validation": [{"path": str(folder / "validation")}],
        },
        "checkpoint": {"initial": str(folder / "base")},
        "stages": [
            {
                "name": "on",
                "model": model,
                "global_batch": 2,
                "tokens": tokens,
                "optimizer": {"lr": 1.0e-12, "min_lr": 0.0},
                "schedule": {"kind": "constant"},
                "validation": {"samples": 4},
            }
        ],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(document))
    return folder / "run.yaml"


def validation_losses(folder: Path) -> list[float]:
    """What the run has logged."""
    return [event.loss for event in read_events(folder / "run", ValidationEvent)]


def expected_loss(path: Path) -> float:
    """Mean loss of the checkpoint's model over the validation samples, in plain PyTorch."""
    stream = SampleStream(load_run(path).data, 1234, "validation")
    samples = [stream[index] for index in range(4)]
    tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
    return reference_loss(MODEL, random_tensors(MODEL), tokens, labels).mean().item()


def test_the_function_of_the_checkpoint_is_trained_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_data(tmp_path)
    run = RunConfig(tokenizer=str(folder / "tokenizer.model"), stages=[StageConfig(name="base", model=MODEL)])
    manifest = stage_manifest(run, 0, MODEL, StagePosition(9, 9, 9, 9))
    copy_checkpoint(Memory(random_tensors(MODEL)), folder / "base", manifest)

    path = run_file(folder, "from_checkpoint", tokens=64)
    assert main(["train", str(path)]) == 0
    assert validation_losses(folder) == [pytest.approx(expected_loss(path), rel=1e-5)]
    saved = open_checkpoint(folder / "run" / "checkpoints" / "on" / "step_00000001")
    assert recorded_model(saved) == MODEL

    shutil.rmtree(folder / "base")
    longer = ["--stages.0.tokens", "128"]
    assert main(["train", str(path), *longer]) == 2
    assert f"{folder}/run/run.yaml has the model written out" in capfd.readouterr().err
    assert main(["train", str(folder / "run" / "run.yaml"), *longer]) == 0
    assert validation_losses(folder)[1] == pytest.approx(validation_losses(folder)[0], rel=1e-5)
