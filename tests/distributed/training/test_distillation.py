"""Learning from a teacher under layouts of its own: against plain PyTorch, between layouts, and in whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.model_state import load_state
from flm_megatron.config.schema import (
    DataConfig,
    DistillConfig,
    ModelConfig,
    MupConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
)
from flm_megatron.config.schema.stage import Precision
from flm_megatron.data.streams.loader import batches
from flm_megatron.distributed.world import Layouts
from flm_megatron.engine import parallel_state
from flm_megatron.errors import RequestError
from flm_megatron.launch.preflight import resolve
from flm_megatron.optim.learning_rate import learning_rate, set_learning_rates
from flm_megatron.training.distillation.source import TeacherSource, check_teachers
from flm_megatron.training.distillation.teacher import Teacher
from flm_megatron.training.resume.start import checkpoint_store, find_start
from flm_megatron.training.stage import train_stage
from flm_megatron.training.step import TrainState
from tests.support.checkpoint_cases import Memory, flm_checkpoint, write_small
from tests.support.layouts import GLOBAL_BATCH, SEQUENCE, STAGE, relative_difference, synthetic_batch
from tests.support.pool import Pool
from tests.support.reference_model import random_tensors, reference_logits
from tests.support.runs import losses, make_run

STEPS = 2
DISTILL = DistillConfig("a checkpoint", temperature=2.0, weight=0.7)
STUDENT = replace(
    STAGE,
    model=replace(STAGE.model, num_layers=4, mup=MupConfig()),
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, weight_decay=0.0),
    distill=DISTILL,
)
TEACHER = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=40, num_attention_heads=12, num_query_groups=4, vocab_size=500
)
Numbers = tuple[float, float, float]


class Samples:
    """The stream of the synthetic batches."""

    limit_samples = None

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One sample."""
        batch = synthetic_batch(index // GLOBAL_BATCH, 500)
        return {name: values[index % GLOBAL_BATCH] for name, values in batch.items()}

    def check_budget(self, samples: int) -> None:
        """There is no end."""

    def want(self, indices: Iterable[int]) -> None:
        """They are made when they are asked for."""


def teacher_tensors() -> dict[str, torch.Tensor]:
    """A teacher that is sure of something."""
    tensors = random_tensors(TEACHER, seed=11)
    tensors["output_layer.weight"] *= 40
    return tensors


def rates(stage: StageConfig) -> list[float]:
    """The learning rate of each step."""
    run = RunConfig(data=DataConfig(sequence_length=SEQUENCE), stages=[stage])
    return [learning_rate((step + 1) * GLOBAL_BATCH * SEQUENCE, run, 0) for step in range(STEPS)]


def distilled(
    layouts: list[tuple[ParallelConfig, ParallelConfig | None]], precision: Precision = "fp32"
) -> list[list[Numbers]]:
    """Loss, gradient norm and divergence of each step, under each layout of the student with one of the teacher.

    `precision` is the student's; the teacher's is fp32.
    """
    found = []
    source: Any = TeacherSource(Path("teacher"), Memory(teacher_tensors()), TEACHER)
    for parallel, of_teacher in layouts:
        micro = GLOBAL_BATCH // (parallel.data or 1) // max(2, parallel.pipeline)
        distill = replace(DISTILL, parallel=of_teacher, precision="fp32")
        stage = replace(STUDENT, parallel=parallel, micro_batch=micro, distill=distill, precision=precision)
        with Layouts(timeout_s=120) as under, under(parallel):
            state = TrainState(stage, SEQUENCE)
            load_state(InitialCheckpoint(stage.model, 7), state.chunks, state.optimizer)
            teacher, stream = Teacher(source, stage, SEQUENCE, under), Samples()
            rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
            feed = batches(stream, 0, GLOBAL_BATCH, micro, rank, size)  # type: ignore[arg-type]
            teacher.begin(stream, 0)  # type: ignore[arg-type]
            results = []
            for rate in rates(stage):
                set_learning_rates(state.optimizer, stage, rate)
                result = state.train_step(teacher.teach(next(feed)))
                assert result.divergence is not None
                results.append((result.loss, result.grad_norm, result.divergence))
            feed.close()
            teacher.close()
        found.append(results)
    return found


def plain() -> list[Numbers]:
    """The same in plain PyTorch in float64."""
    checkpoint = InitialCheckpoint(STUDENT.model, 7)
    tensors = {name: checkpoint.read(name).double().requires_grad_() for name in checkpoint.tensors}
    wise = {name: values.double() for name, values in teacher_tensors().items()}
    options = STUDENT.optimizer
    optimizer = torch.optim.AdamW(tensors.values(), betas=options.betas, eps=options.eps, weight_decay=0.0)
    found = []
    for step, rate in enumerate(rates(STUDENT)):
        batch = synthetic_batch(step, 500)
        mask, temperature = batch["loss_mask"].double(), DISTILL.temperature
        logits = reference_logits(STUDENT.model, tensors, batch["tokens"])
        other = reference_logits(TEACHER, wise, batch["tokens"])
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        log_q, log_p = F.log_softmax(logits / temperature, -1), F.log_softmax(other / temperature, -1)
        divergences = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        loss, divergence = ((values * mask).sum() / mask.sum() for values in (losses, divergences))
        optimizer.zero_grad()
        ((1 - DISTILL.weight) * loss + DISTILL.weight * temperature**2 * divergence).backward()
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), options.clip_grad)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        found.append((loss.item(), norm.item(), divergence.item()))
    return found


@pytest.fixture(scope="module")
def single(pool: Pool) -> list[Numbers]:
    """On one process."""
    return pool.run(1, distilled, [(ParallelConfig(), None)])[0][0]


def test_one_process_is_plain_pytorch(single: list[Numbers]) -> None:
    assert relative_difference(single, plain()) <= 1e-5
    assert min(divergence for _, _, divergence in single) > 1


def check(pool: Pool, single: list[Numbers], layouts: list[tuple[ParallelConfig, ParallelConfig | None]]) -> None:
    """All ranks of four report the same numbers under each layout, and they are those of one process."""
    ranks = pool.run(4, distilled, layouts)
    assert all(rank == ranks[0] for rank in ranks)
    for found in ranks[0]:
        assert relative_difference(found, single) <= 1e-5


def test_another_layout_of_the_teacher_and_of_the_student_agrees_with_one(pool: Pool, single: list[Numbers]) -> None:
    student = ParallelConfig(tensor=2, pipeline=2, data=1, sequence=True)
    check(pool, single, [(student, ParallelConfig(tensor=4))])


@pytest.mark.slow
def test_further_layouts_agree_with_one(pool: Pool, single: list[Numbers]) -> None:
    """A teacher of one rank, and of a pipeline; a student of two chunks a rank; one layout for both."""
    student = ParallelConfig(tensor=2, pipeline=2, data=1)
    pipelined = ParallelConfig(tensor=2, pipeline=2, sequence=True)
    interleaved = ParallelConfig(pipeline=2, virtual_pipeline=2, data=2)
    check(
        pool, single, [(student, ParallelConfig()), (interleaved, pipelined), (ParallelConfig(tensor=4, data=1), None)]
    )


@pytest.mark.slow
def test_a_student_in_bf16_learns_from_a_teacher_in_fp32(pool: Pool, single: list[Numbers]) -> None:
    found = pool.run(2, distilled, [(ParallelConfig(tensor=2), ParallelConfig(pipeline=2))], "bf16")
    assert relative_difference(found[0][0], single) <= 2e-2


def trained(runs: list[RunConfig]) -> None:
    """Train what is left of each run."""
    for run in runs:
        while (start := find_start(run)) is not None:
            assert train_stage(run, start)


def test_a_stage_learns_from_an_earlier_one_and_resumes_bit_for_bit(pool: Pool, data: Path, tmp_path: Path) -> None:
    runs = []
    for name in ("whole", "halves"):
        options = ("--stages.0.tokens", "256", "--stages.0.validation.samples", "0", "--logging.tensorboard", "false")
        run = resolve(make_run(data, tmp_path / name, *options)[1])
        small = replace(run.stages[0], parallel=ParallelConfig())
        schedule = replace(small.schedule, decay_tokens=512)
        taught = replace(small, name="taught", tokens=512, schedule=schedule, distill=DistillConfig("small", 2.0))
        runs.append(replace(run, stages=[small, taught]))
    half = replace(runs[1], stages=[runs[1].stages[0], replace(runs[1].stages[1], tokens=256)])
    pool.run(1, trained, [runs[0], half, runs[1]])
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    manifests = [latest_manifest(run, "taught") for run in runs]
    assert manifests[0].logical_hash == manifests[1].logical_hash
    recorded, of_teacher = manifests[0].teacher, latest_manifest(runs[0], "small")
    assert recorded is not None and recorded.path.endswith("checkpoints/small/step_00000002")
    assert (recorded.logical_hash, recorded.stage, recorded.step) == (of_teacher.logical_hash, "small", 2)
    assert of_teacher.teacher is None
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    divergences = [line.get("distill_kl") for line in lines if "loss" in line]
    assert divergences[:2] == [None, None] and abs(divergences[2]) < 1e-6 and divergences[-1] > 1e-6
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "teacher: " in log and f"distill KL {divergences[-1]:.4f} | grad norm" in log


def latest_manifest(run: RunConfig, stage: str) -> Manifest:
    """The manifest of a stage's last checkpoint."""
    path = checkpoint_store(run).latest([stage])
    assert path is not None
    return open_checkpoint(path).manifest


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    run = resolve(make_run(data, tmp_path / "run")[1])
    other = replace(run.stages[0].model, vocab_size=331)
    write_small(tmp_path / "other", other)
    write_small(tmp_path / "same size", run.stages[0].model, tokenizer_sha256="0" * 64)
    write_small(tmp_path / "large", replace(other, vocab_size=512))
    assert flm_checkpoint("export-hf", tmp_path / "large", tmp_path / "theirs", "--flavour", "llama") == 0
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(config | {"true_vocab_size": None}))
    expected = {
        "other": "a vocabulary of 331, the stage one of 500",
        "theirs": "a vocabulary of 512, the stage one of 500",
        "same size": "is not the one that",
    }
    for name, words in expected.items():
        run.stages[0].distill = DistillConfig(str(tmp_path / name))
        with pytest.raises(RequestError, match=f"stage 'small': distill.teacher .*{words}"):
            check_teachers(run)
    second = replace(run.stages[0], name="second", distill=DistillConfig("small"))
    first = replace(second, name="small", distill=None, model=other)
    with pytest.raises(RequestError, match=r"distill.teacher 'small' has a vocabulary of 331, the stage of 500"):
        check_teachers(replace(run, stages=[first, second]))
