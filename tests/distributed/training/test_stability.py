"""Spikes in real runs, silent corruption on real ranks, and the two options against plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
from flm_megatron.cli.main import main as flm
from flm_megatron.config.schema import ParallelConfig, RunConfig, StabilityConfig
from flm_megatron.distributed.signals import StopRequest, stop_on_signal
from flm_megatron.distributed.world import Layouts, layout
from flm_megatron.errors import FlmError
from flm_megatron.launch.preflight import resolve
from flm_megatron.model.parameters import EMBEDDING
from flm_megatron.training.hooks.replicas import check_replicas
from flm_megatron.training.metrics.events import RefusedEvent, StepEvent, read_events
from flm_megatron.training.metrics.goodput import read_goodput
from flm_megatron.training.resume.start import begin, checkpoint_store, find_start
from flm_megatron.training.stage import StageTrainer
from flm_megatron.training.step import Batch
from tests.support.layouts import STAGE, relative_difference, synthetic_batch, take_steps, train_state_under
from tests.support.pool import Pool, RankFailed
from tests.support.reference_model import reference_logits
from tests.support.runs import make_run

OPTIONS = replace(STAGE, stability=StabilityConfig(z_loss=0.1, embedding_gradient_shrink=0.1))


class FaultyTrainer(StageTrainer):
    """A trainer whose gradients are NaN, or whose loss is 50 times too high, at given steps."""

    def inject(self, faults: dict[int, str]) -> None:
        """Put the faults in, by the number of the step."""
        honest = self.state._run

        def faulty(batches: list[Batch], forward_only: bool) -> list[torch.Tensor]:
            outputs = honest(batches, forward_only)
            fault = None if forward_only else faults.get(self.step + 1)
            if fault == "gradient" and torch.distributed.get_rank() == 1:
                weight: Any = next(iter(self.state.chunks[0].parameters()))
                weight.main_grad.view(-1)[0] = math.nan
            return [output * torch.tensor([50.0, 1.0]) if fault == "loss" else output for output in outputs]

        self.state._run = faulty  # type: ignore[method-assign]
        self.faults = faults

    def _at_intervals(self) -> None:
        """What is done between steps, after a bit of a weight has flipped on one rank."""
        if self.faults.get(self.step) == "weight" and torch.distributed.get_rank() == 1:
            next(iter(self.state.chunks[0].parameters())).data.view(-1).view(torch.int32)[5] ^= 1
        super()._at_intervals()


def train_with_faults(run: RunConfig, faults: dict[int, str]) -> list[float]:
    """Train stage 0; the sum of all weights of this rank after each step."""
    start = find_start(run)
    assert start is not None
    sums: list[float] = []
    beginning = begin(run, start, Layouts(120))
    with layout(beginning.stage.parallel, 120), stop_on_signal() as stop:
        trainer = FaultyTrainer(run, start, beginning)
        trainer.inject(faults)
        take = trainer._train_step

        def recorded(group: list[Batch], stop: StopRequest, waited_s: float) -> bool:
            stopped = take(group, stop, waited_s)
            sums.append(sum(p.double().sum().item() for p in trainer.state.chunks[0].parameters()))
            return stopped

        trainer._train_step = recorded  # type: ignore[method-assign]
        try:
            trainer.train(stop)
        finally:
            trainer.close()
    return sums


def faulty_run(data: Path, output: Path, policy: str) -> RunConfig:
    """A run of eight steps that looks for outliers from the third step on."""
    stability = f"{{policy: {policy}, window_steps: 4, sigmas: 100}}"
    overrides = ["--checkpoint.interval_steps", "2", "--stages.0.stability", stability]
    return resolve(make_run(data, output, *overrides)[1])


def test_a_spike_is_skipped_logged_and_counted(
    pool: Pool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = faulty_run(data, tmp_path, "skip")
    sums = pool.run(2, train_with_faults, run, {4: "gradient", 6: "loss"})[0]
    assert sums[3] == sums[2] and sums[5] == sums[4] and len(set(sums)) == 6
    refused = read_events(tmp_path, RefusedEvent)
    assert [event.step for event in refused] == [4, 6]
    assert refused[0].reason == "grad_norm is nan" and "sigma above" in refused[1].reason
    assert [step.skipped_steps for step in read_events(tmp_path, StepEvent)] == [0, 0, 0, 1, 2, 2]
    assert "small step 6 refused (skip): loss" in (tmp_path / "log.txt").read_text()
    # The sample is shown as the text that the stream gives.
    name = refused[0].samples[1]
    assert flm(["data", "show", str(tmp_path / "test.yaml"), "--sample", name]) == 0
    shown = capsys.readouterr().out
    assert name in shown
    assert flm(["data", "show", str(tmp_path / "test.yaml"), "--sample", str(3 * 4 + 1)]) == 0
    assert capsys.readouterr().out == shown


def test_rollback_returns_to_the_last_checkpoint(pool: Pool, data: Path, tmp_path: Path) -> None:
    run = faulty_run(data, tmp_path, "rollback")
    sums = pool.run(2, train_with_faults, run, {4: "gradient"})[0]
    assert sums[3] == sums[1] != sums[2]
    goodput = read_goodput(tmp_path)
    assert goodput is not None and goodput.lost_steps == 1 and "rollback" in goodput.stalls_s
    assert checkpoint_store(run).steps("small")[-1] == 8


def test_spikes_in_a_row_end_the_run(pool: Pool, data: Path, tmp_path: Path) -> None:
    run = faulty_run(data, tmp_path, "skip")
    with pytest.raises(RankFailed, match=r"FlmError: 3 steps in a row were refused.*samples 8 to 11"):
        pool.run(2, train_with_faults, run, dict.fromkeys(range(3, 9), "gradient"))
    assert checkpoint_store(run).steps("small")[-1] == 4  # saved without any of the refused steps


def test_replicas_that_differ_are_not_saved(pool: Pool, data: Path, tmp_path: Path) -> None:
    """The weights are compared before each save, however long the interval is."""
    overrides = ("--checkpoint.interval_steps", "2", "--stages.0.stability", "{checksum_interval_steps: 1000}")
    run = resolve(make_run(data, tmp_path, "--stages.0.parallel.tensor", "1", *overrides)[1])
    with pytest.raises(RankFailed, match=r"after step 4 copies .* differ.* after step 2: take"):
        pool.run(2, train_with_faults, run, {4: "weight"})
    assert checkpoint_store(run).steps("small") == [2]


def corrupted(rank: int, name: str, parallel: ParallelConfig) -> str:
    """Flip one bit of a weight on one rank after a step; what the comparison says before and after."""
    with train_state_under(parallel, replace(STAGE, model=replace(STAGE.model, num_layers=2))) as state:
        take_steps(state, range(1))
        with pytest.MonkeyPatch.context() as patch:  # objects of thousands of ranks are a gigabyte
            patch.delattr(torch.distributed, "all_gather_object")
            check_replicas(state.chunks, 1, 0)
        if torch.distributed.get_rank() == rank:
            weight = dict(state.chunks[0].module.named_parameters())[name]
            weight.data.view(-1).view(torch.int32)[5] ^= 1
        try:
            check_replicas(state.chunks, 1, 0)
        except FlmError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", ParallelConfig(data=4)),
        ("decoder.layers.1.input_layernorm.weight", ParallelConfig(tensor=2, data=2, sequence=True)),
    ],
    ids=["data", "tensor"],
)
def test_silent_corruption_names_the_rank(pool: Pool, name: str, parallel: ParallelConfig) -> None:
    for message in pool.run(4, corrupted, 2, name, parallel):
        assert "after step 1 copies" in message and "for the last time after step 0:" in message
        assert "rank 2 on" in message and "of layer 1" in message
        assert all(f"rank {other} on" not in message for other in (0, 1, 3))


def step_with_options(parallel: ParallelConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of a first step with both options."""
    with train_state_under(parallel, OPTIONS) as state:
        return take_steps(state, range(1))


def test_z_loss_and_embedding_shrink_are_those_of_plain_pytorch(pool: Pool) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    checkpoint = InitialCheckpoint(STAGE.model, 7)
    tensors = {name: checkpoint.read(name).double().requires_grad_() for name in checkpoint.tensors}
    batch = synthetic_batch(0, STAGE.model.vocab_size or 0)
    logits, mask = reference_logits(STAGE.model, tensors, batch["tokens"]), batch["loss_mask"].double()
    denominator = logits.logsumexp(-1)
    losses = denominator - logits.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
    loss = (losses * mask).sum() / mask.sum()
    (loss + 0.1 * (denominator.square() * mask).sum() / mask.sum()).backward()
    norms = {name: float(tensor.grad.norm()) for name, tensor in tensors.items() if tensor.grad is not None}
    norms[EMBEDDING] *= 0.1
    expected = [(loss.item(), math.hypot(*norms.values()))]
    found = pool.run(parallel.tensor, step_with_options, parallel)[0]
    assert relative_difference(found, expected) <= 1e-5
