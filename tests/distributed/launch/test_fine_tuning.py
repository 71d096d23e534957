"""Fine-tuning: packed samples train as separate ones do, in every layout; whole runs resume, freeze and refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.cli.main import main as flm
from flm_megatron.config.budget import stage_budgets
from flm_megatron.config.loader import load_run
from flm_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig, SourceConfig
from flm_megatron.data.conversations.source import ChatSource
from flm_megatron.data.conversations.stream import ChatStream
from flm_megatron.data.conversations.template import ChatTemplate
from flm_megatron.data.streams.stage_streams import training_stream
from flm_megatron.launch.fine_tuning import prepared
from flm_megatron.launch.run import train
from flm_megatron.model.parameters import EMBEDDING, HEAD
from flm_megatron.training.frozen_weights import frozen_units
from flm_megatron.training.resume.start import checkpoint_store
from flm_megatron.training.step import Batch
from tests.support.chat_cases import conversation, tokenizer, write
from tests.support.layouts import name as layout_name
from tests.support.pool import Pool
from tests.support.reference_model import reference_loss
from tests.support.runs import losses
from tests.support.sft_cases import LENGTH, MODEL, SEED, Gradients, chat_folder, furthest, gradients, whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, 24 conversations, and a checkpoint with fresh weights."""
    return chat_folder(tmp_path_factory.mktemp("sft"))


def stream(folder: Path, packing: bool) -> ChatStream:
    """One epoch of the conversations."""
    source = SourceConfig(path=str(folder / "chat.jsonl"), name="chat")
    chat = ChatSource(source, ChatTemplate("tele-flm", tokenizer(folder)), LENGTH)
    return ChatStream([chat], [1.0], LENGTH, seed=1, epochs=1, packing=packing, pad=3)


def global_batch(chat: ChatStream, multiple: int) -> Batch:
    """All samples of a stream, filled up to a multiple with ones that train nothing."""
    samples = [chat[index] for index in range(-(-chat.samples // multiple) * multiple)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def reference(model: ModelConfig, chat: ChatStream) -> tuple[float, Gradients]:
    """Mean loss and its gradient in float64, one conversation after another, each by itself."""
    checkpoint = InitialCheckpoint(model, SEED)
    tensors = {name: checkpoint.read(name).double().requires_grad_() for name in checkpoint.tensors}
    total, count = torch.zeros((), dtype=torch.float64), 0
    for item in chat.sources[0].conversations:
        ids, trained = torch.from_numpy(item.ids).long(), torch.from_numpy(item.trained[1:])
        total = total + reference_loss(model, tensors, ids[None, :-1], ids[None, 1:])[0][trained].sum()
        count += int(trained.sum())
    (total / count).backward()
    return total.item() / count, {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}


@pytest.mark.parametrize(
    ("parallel", "position", "recompute"),
    [
        (ParallelConfig(), "rope", "full"),
        (ParallelConfig(), "xpos", "none"),
        (ParallelConfig(data=2), "rope", "selective"),
        (ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True), "xpos", "none"),
    ],
    ids=lambda value: value if isinstance(value, str) else layout_name(value),
)
def test_packed_and_separate_conversations_train_alike(
    pool: Pool, folder: Path, parallel: ParallelConfig, position: Any, recompute: Any
) -> None:
    model = replace(MODEL, position=position, xpos_scale_base=32.0)
    packed, padded = stream(folder, True), stream(folder, False)
    assert packed.samples < padded.samples / 1.5
    world, multiple = parallel.processes, 4 * (parallel.data or 1)
    batches = [global_batch(chat, multiple) for chat in (packed, padded)]
    checkpoint = InitialCheckpoint(model, SEED)
    ranks = pool.run(world, gradients, parallel, model, checkpoint, batches, recompute)
    loss, expected = reference(model, packed)
    for index in range(2):
        found = whole([rank[index][2] for rank in ranks], checkpoint)
        assert ranks[0][index][0] == pytest.approx(loss, rel=1e-5)
        assert furthest(found, expected) <= 1e-5
    assert ranks[0][0][1] == ranks[0][1][1]


RUN = """
name: sft
output: {output}
data:
  sequence_length: 160
  train: [{{path: {folder}/chat.jsonl}}]
  validation: [{{path: {folder}/chat.jsonl, name: same}}]
  chat: {{epochs: 4}}
checkpoint: {{initial: {folder}/base}}
stages:
  - name: tuned
    parallel: {{tensor: 2}}
    global_batch: 4
    optimizer: {{lr: 2.0e-2, min_lr: 1.0e-9, weight_decay: 0.1}}
    schedule: {{kind: linear}}
    validation: {{samples: 8}}
    trainable: half
"""


def run_file(folder: Path, output: Path) -> Path:
    """A run file in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "sft.yaml"
    path.write_text(RUN.format(folder=folder, output=output))
    return path


def test_a_run_learns_half_of_the_weights_and_resumes_in_mid_epoch(folder: Path, tmp_path: Path) -> None:
    path = run_file(folder, tmp_path / "whole")
    assert flm(["sft", str(path)]) == 0
    whole_run = losses(tmp_path / "whole")
    assert whole_run[-1][2] < 0.8 * whole_run[0][2] and whole_run[-1][4] == pytest.approx(1e-9)
    run, _ = prepared(load_run(run_file(folder, tmp_path / "halves")))
    stage = run.stages[0]
    cut = (len(whole_run) // 2 - 1) * 4 * LENGTH
    schedule = replace(stage.schedule, decay_tokens=len(whole_run) * 4 * LENGTH)
    assert train(replace(run, stages=[replace(stage, tokens=cut, schedule=schedule)])) == 0
    assert flm(["sft", str(tmp_path / "halves" / "sft.yaml")]) == 0
    assert losses(tmp_path / "halves") == whole_run
    checkpoints = [open_checkpoint(last(tmp_path / name)) for name in ("whole", "halves")]
    assert checkpoints[0].manifest.logical_hash == checkpoints[1].manifest.logical_hash
    before, after, frozen = InitialCheckpoint(MODEL, SEED), checkpoints[0], frozen_units(MODEL, 0)
    for name in before.tensors:
        for layer in range(MODEL.num_layers) if name.startswith("decoder.layers.") else [0]:
            index = slice(None) if not name.startswith("decoder.layers.") else layer
            same = torch.equal(before.read(name)[index], after.read(name)[index])
            assert same == ((name, layer) in frozen), (name, layer)


def test_a_fine_tuning_goes_on_with_another_batch(folder: Path, tmp_path: Path) -> None:
    """From the next sample on; what the samples are made of has to stay within the stage. Its teacher, the checkpoint
    that it begins with, sees the same conversations, apart from each other."""
    path = run_file(folder, tmp_path)
    taught = ["--stages.0.distill", f"{{teacher: {folder}/base, parallel: {{tensor: 1}}}}"]
    run, _ = prepared(load_run(path, taught))
    assert train(replace(run, stages=[replace(run.stages[0], tokens=2 * 4 * LENGTH)])) == 0
    assert flm(["sft", str(path), "--data.chat.packing", "false", *taught]) == 2
    assert flm(["sft", str(path), "--stages.0.global_batch", "6", *taught]) == 0
    manifest, chat = open_checkpoint(last(tmp_path)).manifest, training_stream(run, 0)
    assert isinstance(chat, ChatStream)
    steps = 2 + math.ceil((chat.samples - 8) / 6)
    assert (manifest.position.step, manifest.position.samples) == (steps, 8 + 6 * (steps - 2))
    assert [segment["first_sample"] for segment in manifest.history or []] == [0, 8]
    divergences = [
        json.loads(line)["distill_kl"] for line in (tmp_path / "metrics.jsonl").open() if "distill_kl" in line
    ]
    assert len(divergences) == steps and abs(divergences[0]) < 1e-6 and divergences[-1] > 1e-4


def last(output: Path) -> Path:
    """The run's last checkpoint."""
    path = checkpoint_store(RunConfig(output=str(output))).latest(["tuned"])
    assert path is not None
    return path


def test_half_of_the_parameters_are_frozen() -> None:
    shapes = {name: info.shape for name, info in InitialCheckpoint(MODEL, SEED).tensors.items()}
    units = frozen_units(MODEL, 3)
    sizes = {name: torch.Size(s[1:] if name.startswith("decoder.layers.") else s).numel() for name, s in shapes.items()}
    frozen = sum(sizes[name] for name, _ in units)
    every = sum(torch.Size(shape).numel() for shape in shapes.values()) - shapes["decoder.final_layernorm.weight"][0]
    assert 2 * frozen == every and len({EMBEDDING, HEAD} & {name for name, _ in units}) == 1
    assert units == frozen_units(MODEL, 3) != frozen_units(MODEL, 4)


def test_a_hugging_face_folder_is_a_start(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = tmp_path / "hf"
    assert flm(["checkpoint", "export-hf", str(folder / "base"), str(exported)]) == 0
    path = run_file(folder, tmp_path / "out")
    options = ["--checkpoint.initial", str(exported), "--tokenizer", str(folder / "tokenizer.model")]
    capsys.readouterr()
    assert flm(["sft", str(path), "--print-config", *options]) == 0
    assert "num_query_groups: 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.train.0.path", "{bad}"], "bad.jsonl line 2: the conversation has no answer"),
        (["--data.chat.template", "/nowhere.jinja"], "template /nowhere.jinja cannot be read"),
        (["--checkpoint.initial", "null"], "checkpoint.initial is not set"),
        (["--tokenizer", "{other}"], "other.model"),
        (["--stages.0.model.num_layers", "7"], "model.num_layers is 7 in the run file and 4 in the checkpoint"),
        (["--stages.0.growth.hidden", "zero"], "grow the checkpoint first"),
        (["--data.chat.mix", "[{{stage: tuned, source: nobody, passes: 1}}]"], "no source is named 'nobody'"),
        (["--data.chat.epochs", "0"], "epochs is 0"),
        (["--data.chat.epoch", "3"], "epochs"),
    ],
)
def test_a_wrong_request_is_one_line_and_status_two(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    bad = write(tmp_path / "bad.jsonl", [conversation(0), {"messages": [{"role": "user", "content": "q"}]}])
    other = folder / "other.model"
    if not other.exists():
        from flm_megatron.data.tokenizer import train_tokenizer

        train_tokenizer(["some other words for another tokenizer of the same size"] * 20, other, 290)
    filled = [option.format(bad=bad, other=other) for option in options]
    path = run_file(folder, tmp_path)
    assert flm(["sft", str(path), *filled]) == 2
    errors = capsys.readouterr().err
    assert flm(["train", str(path)]) == 2 and "run it with `flm sft`" in capsys.readouterr().err
    assert words in errors and len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "checkpoints").exists()


def test_two_stages_take_their_own_mixtures(folder: Path, tmp_path: Path) -> None:
    write(folder / "special.jsonl", [conversation(i, turns=1) for i in range(100, 108)])
    text = RUN.format(folder=folder, output=tmp_path)
    text = text.replace(
        "chat.jsonl}]\n  val", f"chat.jsonl, name: general}}, {{path: {folder}/special.jsonl, name: special}}]\n  val"
    )
    text = text.replace(
        "{epochs: 4}",
        "{epochs: 1, mix: [{stage: tuned, source: special, passes: 1}, {stage: mixed, source: general, passes: 0.5},"
        " {stage: mixed, source: special, passes: 0.25}]}",
    )
    text = text.replace("trainable: half", "trainable: half\n  - {name: mixed, global_batch: 2, trainable: half}")
    path = tmp_path / "two.yaml"
    path.write_text(text)
    assert flm(["sft", str(path)]) == 0
    run, _ = prepared(load_run(path))
    streams = [training_stream(run, stage) for stage in range(2)]
    first = stage_budgets(run)[1].first_sample
    assert first > 0 and run.stages[0].parallel.tensor == 2
    names = [
        [name.split("/")[0] for index in range(start, chat.limit_samples or 0) for name in chat.names(index)]
        for start, chat in zip((0, first), streams, strict=True)
    ]
    assert (len(names[0]), set(names[0])) == (8, {"special"})
    assert (names[1].count("general"), names[1].count("special")) == (12, 2)
    assert {line[0] for line in losses(tmp_path)} == {"tuned", "mixed"}
    shown = flm(["data", "show", str(tmp_path / "run.yaml"), "--sample", str(first)])
    assert shown == 0
