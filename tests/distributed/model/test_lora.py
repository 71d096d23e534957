"""Adapters: gradients of plain PyTorch in every layout, frozen weights, and weights merged on export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.hugging_face.reader import HuggingFaceCheckpoint
from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.cli.main import main as flm
from flm_megatron.config.schema import GrowthConfig, LoraConfig, ModelConfig, ParallelConfig, RunConfig
from flm_megatron.errors import RequestError
from flm_megatron.evaluation.evaluated import open_evaluated
from flm_megatron.growth.plan import make_plan
from flm_megatron.model.parameters import FC1, QKV
from flm_megatron.training.resume.start import checkpoint_store
from tests.support.layouts import name as layout_name
from tests.support.layouts import synthetic_batch
from tests.support.pool import Pool
from tests.support.reference_model import reference_loss
from tests.support.runs import losses
from tests.support.sft_cases import LENGTH, MODEL, SEED, chat_folder, furthest, gradients, whole

LORA = replace(MODEL, lora=LoraConfig(rank=3, alpha=6.0))


def trained_checkpoint(model: ModelConfig) -> InitialCheckpoint:
    """A checkpoint whose adapters have learnt something: B is not zero."""
    checkpoint = InitialCheckpoint(model, SEED)
    checkpoint.specs = {n: replace(s, init_std=0.1) if n.endswith("lora_b") else s for n, s in checkpoint.specs.items()}
    return checkpoint


def merged(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Weights with B A in them."""
    weights = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    for name in list(weights):
        stem = name.removesuffix("weight")
        if f"{stem}lora_a" in tensors:
            weights[name] = weights[name] + scale * tensors[f"{stem}lora_b"] @ tensors[f"{stem}lora_a"]
    return weights


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tensor=2), ParallelConfig(tensor=2, pipeline=2, sequence=True)],
    ids=layout_name,
)
def test_adapters_learn_as_in_plain_pytorch(pool: Pool, parallel: ParallelConfig) -> None:
    checkpoint = trained_checkpoint(LORA)
    batch = synthetic_batch(0, 290, sequence=LENGTH, samples=4)
    ranks = pool.run(parallel.model_size, gradients, parallel, LORA, checkpoint, [batch])
    tensors = {name: checkpoint.read(name).double().requires_grad_("lora" in name) for name in checkpoint.tensors}
    each = reference_loss(LORA, merged(tensors, 2.0), batch["tokens"], batch["labels"])
    loss = (each * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    loss.backward()
    expected = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    assert len(expected) == 8 and ranks[0][0][0] == pytest.approx(loss.item(), rel=1e-5)
    assert furthest(whole([rank[0][2] for rank in ranks], checkpoint), expected) <= 1e-5


RUN = """
name: lora
output: {output}
data:
  sequence_length: 160
  train: [{{path: {folder}/chat.jsonl}}]
  chat: {{epochs: 2}}
checkpoint: {{initial: {folder}/base}}
stages:
  - name: tuned
    parallel: {{tensor: 2}}
    model: {{lora: {{rank: 4, targets: [qkv, fc1]}}}}
    recompute: {recompute}
    global_batch: 4
    optimizer: {{lr: 2.0e-2, min_lr: 0.0, weight_decay: 0.1}}
"""


def test_a_run_trains_adapters_alone_and_an_export_has_them_merged(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path)
    results = []
    for recompute in ("none", "full"):
        output = tmp_path / recompute
        path = tmp_path / f"{recompute}.yaml"
        path.write_text(RUN.format(folder=folder, output=output, recompute=recompute))
        assert flm(["sft", str(path)]) == 0
        results.append([line[2:] for line in losses(output)])
    assert results[0] == results[1] and results[0][-1][0] < results[0][0][0]
    last = checkpoint_store(RunConfig(output=str(tmp_path / "none"))).latest(["tuned"])
    assert last is not None and open_evaluated(last).model.lora is not None
    assert flm(["checkpoint", "verify", str(last)]) == 0
    checkpoint, base = open_checkpoint(last), InitialCheckpoint(MODEL, SEED)
    assert all(torch.equal(checkpoint.read(name), base.read(name)) for name in base.tensors)
    states = [name for name in checkpoint.tensors if name.startswith("optimizer.")]
    assert len(states) == 12 and all("lora" in name for name in states)
    exported = tmp_path / "hf"
    assert flm(["checkpoint", "export-hf", str(last), str(exported)]) == 0
    plain = HuggingFaceCheckpoint(exported)
    expected = merged({name: checkpoint.read(name) for name in checkpoint.tensors if "optimizer" not in name}, 4.0)
    assert plain.config.lora is None and set(plain.tensors) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(plain.read(name), weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(plain.read(f"{QKV}.weight"), base.read(f"{QKV}.weight"))
    assert not torch.equal(plain.read(f"{FC1}.weight"), base.read(f"{FC1}.weight"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stages.0.model.lora.rank", "0"], "rank 0"),
        (["--stages.0.trainable", "half"], "neither `trainable: half`"),
        (["--stages.0.model.lora.targets", "[head]"], "one of qkv"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    folder = chat_folder(tmp_path)
    path = tmp_path / "lora.yaml"
    path.write_text(RUN.format(folder=folder, output=tmp_path / "out", recompute="none"))
    assert flm(["sft", str(path), *options]) == 2
    errors = capsys.readouterr().err
    assert words in errors and len(errors.strip().splitlines()) == 1


def test_a_model_with_adapters_does_not_grow() -> None:
    with pytest.raises(RequestError, match="a model with adapters does not grow"):
        make_plan(LORA, replace(LORA, num_layers=6), GrowthConfig(), seed=1)
