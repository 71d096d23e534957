"""`flm grow`, `flm distance`, `flm importance`: what they write and print, and what they refuse in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flm_megatron as flm
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest, StagePosition
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.cli.main import main
from flm_megatron.config.loader import load_run, run_to_dict
from flm_megatron.growth.record import certificate_of, growth_of
from flm_megatron.growth.shrink.importance import check_importance, read_importance
from tests.support.prose import prose
from tests.support.runs import make_data

RUN = """
name: test
output: {folder}/run
tokenizer: {folder}/tokenizer.model
data:
  sequence_length: 32
  train: [{{path: {folder}/train}}]
  validation: [{{path: {folder}/validation}}]
stages:
  - name: small
    model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, vocab_size: 500}}
    tokens: 1024
  - name: big
    model: {{num_layers: 3, hidden_size: 48, ffn_hidden_size: 96, num_attention_heads: 6, vocab_size: 500}}
    parallel: {{tensor: 2}}
    tokens: 1024
    growth: {{layer_selection: interleave, mask_steps: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run file, a text, and a checkpoint of its first stage."""
    folder = make_data(tmp_path_factory.mktemp("grow"))
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    (folder / "text.txt").write_text(prose(1)[0])
    run = load_run(folder / "run.yaml")
    manifest = {
        "run": run_to_dict(run),
        "stage": "small",
        "step": 8,
        "tokens": 1024,
        "samples": 32,
        "optimizer_step": 8,
    }
    checkpoint = InitialCheckpoint(run.stages[0].model, 3, optimizer=True)
    copy_checkpoint(checkpoint, folder / "small", Manifest.from_json(manifest))
    return folder


def grow(folder: Path, out: str, *arguments: str) -> int:
    """`flm grow` in this process; returns its exit status."""
    return main(["grow", str(folder / "small"), str(folder / "run.yaml"), "--out", str(folder / out), *arguments])


def test_grow_says_what_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert grow(folder, "one", "--stage", "big") == 0
    printed = capsys.readouterr().out
    one = open_checkpoint(folder / "one")
    assert one.manifest.logical_hash in printed and "layers from 0, 1, 1 (copy)" in printed
    assert one.manifest.position == StagePosition(0, 32, 1024, 8, "big")
    growth = growth_of(one.manifest)
    assert growth is not None
    assert growth.source_logical_hash == open_checkpoint(folder / "small").manifest.logical_hash


@pytest.mark.slow  # processes that share a growth, and tools under torchrun, have tests of their own
def test_grow_under_torchrun_writes_the_same(folder: Path) -> None:
    assert grow(folder, "alone", "--stage", "big") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "flm_megatron.cli.main", "grow", str(folder / "small"), str(folder / "run.yaml")]
    command += ["--stage", "big", "--out", str(folder / "two")]
    assert subprocess.run(command, capture_output=True, timeout=240, check=False).returncode == 0
    one, two = (open_checkpoint(folder / name) for name in ("alone", "two"))
    assert one.manifest.logical_hash == two.manifest.logical_hash


def test_a_checkpoint_grows_without_a_run_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model.num_layers", "3", "--model.hidden_size", "48", "--model.head_dim", "8", "--growth.ffn", "clone"]
    given += ["--model.ffn_hidden_size", "96", "--tokenizer", str(folder / "tokenizer.model")]
    given += ["--certify", str(folder / "text.txt")]
    assert main(["grow", str(folder / "small"), "--out", str(folder / "lone"), *given]) == 0
    manifest = open_checkpoint(folder / "lone").manifest
    assert manifest.run.sequence_length == 32
    certificate, growth = certificate_of(manifest), growth_of(manifest)
    assert certificate is not None and certificate.preserving and certificate.comparisons[0].loss_change < 1e-6
    assert growth is not None and (growth.plan.hidden, growth.plan.ffn, growth.plan.layers) == ("zero", "clone", "zero")
    assert manifest.position == StagePosition(0, 32, 1024, 8, "small-grown")
    assert "layers from 0, 1, 0 (copy)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing of"),
        (["--model.num_layers", "3", "--growth.layers", "mask"], "growth.layers is `mask`, and masks open over"),
        (["--model.num_layer", "3"], "did you mean 'num_layers'?"),
        (["--model.num_layers", "1"], "num_layers shrinks from 2 to 1"),
        (["--model.rope_theta", "500"], "growth keeps it, so set model.rope_theta to 10000.0"),
        (["--stage", "big"], "--stage names a stage of a run file"),
        (["--model.num_layers", "3", "--name", "x"], "--name means nothing without a run file: give one, or fields of"),
    ],
)
def test_a_lone_growth_that_is_refused(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["grow", str(folder / "small"), "--out", str(folder / "never"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (folder / "never").exists()


def test_distances_then_a_certified_growth(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    distances, plot = folder / "distances.json", folder / "distances.png"
    where = ["--out", str(distances), "--plot", str(plot), "--text", str(folder / "text.txt")]
    assert main(["distance", str(folder / "small"), str(folder / "run.yaml"), *where]) == 0
    assert len(json.loads(distances.read_text())) == 2 and plot.stat().st_size > 1000
    assert "cosine" in capsys.readouterr().out
    measured = flm.layer_distances(folder / "small", load_run(folder / "run.yaml"), text=folder / "text.txt")
    assert [vars(layer) for layer in measured] == json.loads(distances.read_text())
    chosen = ["--stages.1.growth.layer_selection", "distance", "--distances", str(distances)]
    assert grow(folder, "certified", "--stage", "big", "--certify", str(folder / "text.txt"), *chosen) == 0
    assert "relative change" in capsys.readouterr().out
    certificate = certificate_of(open_checkpoint(folder / "certified").manifest)
    assert certificate is not None and [c.precision for c in certificate.comparisons] == ["fp32"]
    assert grow(folder, "measured", "--stage", "big", "--stages.1.growth.layer_selection", "distance") == 0


def test_importance_with_and_without_a_run_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plain := folder / "plain").mkdir()
    text = ["--text", str(folder / "text.txt"), "--samples", "2"]
    command = ["importance", str(folder / "small"), str(folder / "run.yaml"), *text, "--heads", "gradient"]
    assert main([*command, "--out", str(plain / "run.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "influence" in lines[0] and "heads gradient" in lines[0] and len(lines) == 4
    alone = ["importance", str(folder / "small"), *text, "--heads", "gradient"]
    assert main([*alone, "--out", str(plain / "alone.safetensors")]) == 0
    found, again = (read_importance(plain / f"{name}.safetensors") for name in ("run", "alone"))
    assert (found.samples, found.tokens) == (2, 64) and found.criteria["heads"] == "gradient"
    assert all(torch.equal(values, again.tensors[name]) for name, values in found.tensors.items())
    check_importance(found, load_run(folder / "run.yaml").stages[0].model, "units")


def test_measurements_as_json_are_all_of_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    of_text = [str(folder / "small"), str(folder / "run.yaml"), "--text", str(folder / "text.txt"), "--samples", "2"]
    assert main(["distance", *of_text, "--json"]) == 0
    layers = json.loads(capfd.readouterr().out)["layers"]
    assert len(layers) == 2 and {*layers[0]} == {"cosine", "l2"}
    assert main(["importance", *of_text, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {*found} >= {"criteria", "samples", "tokens", "layers", "ffn", "heads", "hidden"} and found["tokens"] == 64


def test_a_growth_beyond_the_tolerance_is_not_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--stages.1.growth.loss_tolerance", "1e-30", "--certify", str(folder / "text.txt")]
    assert grow(folder, "refused", "--stage", "big", *wrong) == 1
    assert "--stages.1.growth.loss_tolerance" in capsys.readouterr().err
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stage", "huge"], "no stage is named 'huge'; the run has small, big"),
        (["--stage", "small"], "stage 'small' is the first"),
        (["--stage", "big", "--stages.1.model.hidden_size", "24"], "shrinks from 32 to 24"),
        (
            ["--stage", "big", "--stages.1.growth.hidden", "mask", "--stages.1.growth.mask_steps", "9"],
            "mask_steps is 9",
        ),
        (["--stage", "big", "--stages.0.model.ffn_hidden_size", "56", "--stages.0.name", "other"], "of stage 'small'"),
        (["--stage", "big", "--certify", "/nowhere/text"], "/nowhere/text: cannot be read"),
        (["--stage", "big", "--stages.1.growth.layer_selection", "distance", "--distances", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_requests(folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert grow(folder, "wrong", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
    assert not (folder / "wrong").exists()


def test_destinations_are_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").mkdir()
    assert grow(folder, "taken", "--stage", "big") == 2
    assert "exists already" in capsys.readouterr().err
