"""A stage rehearsed: which ranks stand for which, what they hold beside what is planned, and who waits for whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from flm_megatron import kernels
from flm_megatron.api.plan import plan
from flm_megatron.api.rehearse import rehearse
from flm_megatron.cli.main import main
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, StageConfig
from flm_megatron.device import current
from flm_megatron.engine import parallel_state
from flm_megatron.errors import FlmError, RequestError
from flm_megatron.model.teleflm import TeleFLM
from flm_megatron.planner.cost.memory import rank_memory
from flm_megatron.planner.layout import CUDA, stage_workload
from flm_megatron.planner.rehearsal.meeting import check_meetings
from flm_megatron.planner.rehearsal.rank import needed_micro_batches, rehearse_rank
from flm_megatron.planner.rehearsal.roles import global_rank, roles
from flm_megatron.planner.rehearsal.stage import StageRehearsal

MODEL = ModelConfig(num_layers=4, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8, vocab_size=4000)
SEQUENCE = 512
LAYOUTS = [
    ParallelConfig(tensor=2, pipeline=2, sequence=True),
    ParallelConfig(tensor=4, pipeline=1),
    ParallelConfig(pipeline=2, virtual_pipeline=2),
    ParallelConfig(distributed_optimizer=False),
]


def run_of(parallel: ParallelConfig, **fields: object) -> RunConfig:
    """A run of one stage in bf16 under a layout."""
    stage = StageConfig(model=MODEL, parallel=parallel, global_batch=32, micro_batch=2, precision="bf16", tokens=10**7)
    return RunConfig(data=DataConfig(sequence_length=SEQUENCE), stages=[replace(stage, **fields)])  # type: ignore[arg-type]


def only(run: RunConfig, gpus: int) -> StageRehearsal:
    """The rehearsal of its only stage, in this process."""
    (stage,) = rehearse(run, gpus=gpus, workers=1).stages
    return stage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        pytest.param(LAYOUTS[0], "selective", id="tensor, sequence and pipeline"),
        pytest.param(LAYOUTS[1], "full", id="tensor"),
        pytest.param(LAYOUTS[2], "none", id="virtual pipeline"),
        pytest.param(LAYOUTS[3], "selective", id="replicas"),
    ],
)
def test_every_role_holds_what_is_planned(parallel: ParallelConfig, recompute: str) -> None:
    run, gpus = run_of(parallel, recompute=recompute), 8
    found = only(run, gpus)
    work = stage_workload(run.stages[0], SEQUENCE, gpus, CUDA)
    for role, report in zip(found.roles, found.reports, strict=True):
        planned = rank_memory(work, role.pipeline_ranks[0])
        assert report.steady["weights"] + report.steady["gradients"] + report.steady["optimizer"] == pytest.approx(
            planned.weights + planned.gradients + planned.optimizer, rel=1e-3
        )
        assert report.most_bytes == pytest.approx(planned.total, rel=0.03), (role, report, planned)


@pytest.mark.parametrize(
    ("fields", "parallel", "rank"),
    [
        pytest.param({"fp8": "tensorwise", "recompute": "selective"}, LAYOUTS[0], 4, id="tensorwise, last"),
        pytest.param({"fp8": "rowwise"}, LAYOUTS[0], 0, id="rowwise, first", marks=pytest.mark.slow),
        pytest.param({"fp8": "rowwise", "recompute": "full"}, LAYOUTS[1], 0, id="tensor", marks=pytest.mark.slow),
    ],
)
def test_fp8_holds_what_is_planned(fields: dict[str, str], parallel: ParallelConfig, rank: int) -> None:
    run = run_of(parallel, **fields, model=replace(MODEL, ffn_hidden_size=1408))
    report = rehearse_rank(run, run.stages[0], rank, 8)
    planned = rank_memory(stage_workload(run.stages[0], SEQUENCE, 8, CUDA), report.pipeline_rank)
    assert report.most_bytes == pytest.approx(planned.total, rel=0.03), (report, planned)


def test_nothing_of_a_rehearsal_stays_in_the_process() -> None:
    device, choice = current(), kernels.current()
    only(run_of(ParallelConfig(tensor=2)), 2)
    assert current() is device and kernels.current() is choice
    normed = kernels.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
    assert torch.allclose(normed, torch.ones(2, 8), atol=1e-4)


def test_ranks_of_one_role_are_one() -> None:
    found = roles(replace(MODEL, num_layers=10), ParallelConfig(pipeline=4))
    assert [(role.name, role.pipeline_ranks, role.layers) for role in found] == [
        ("first", (0,), (3,)),
        ("middle", (1,), (3,)),
        ("middle", (2,), (2,)),
        ("last", (3,), (2,)),
    ]
    (whole,) = roles(MODEL, ParallelConfig(tensor=2))
    assert (whole.name, whole.pipeline_ranks) == ("whole model", (0,))


def test_ranks_are_numbered_as_the_engine_does() -> None:
    parallel = ParallelConfig(tensor=2, pipeline=3)
    assert [global_rank(parallel, 24, 1, tensor, data) for data in (0, 3) for tensor in (0, 1)] == [8, 9, 14, 15]


@pytest.mark.parametrize(("virtual", "needed"), [(1, [5, 4, 3, 2]), (2, [8, 8, 4, 4])])
def test_micro_batches_that_memory_grows_over(virtual: int, needed: list[int]) -> None:
    stage = StageConfig(parallel=ParallelConfig(pipeline=4, virtual_pipeline=virtual))
    assert [needed_micro_batches(stage, rank) for rank in range(4)] == needed


@pytest.mark.parametrize(("gpus", "overlap", "micro_batches"), [(4, False, 16), (8, True, 8)])
def test_more_micro_batches_hold_no_more_and_count_the_same(gpus: int, overlap: bool, micro_batches: int) -> None:
    parallel = ParallelConfig(2, 2, sequence=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    run = run_of(parallel, recompute="selective")
    few = rehearse_rank(run, run.stages[0], 0, gpus)
    more = rehearse_rank(run, run.stages[0], 0, gpus, micro_batches=6)
    assert (few.ran, more.ran, few.micro_batches) == (3, 6, micro_batches)
    assert few.peak.nbytes == more.peak.nbytes
    assert few.flops == more.flops and few.traffic() == more.traffic()


def test_the_world_meets_once_in_a_step() -> None:
    run = run_of(ParallelConfig(tensor=2, pipeline=2, sequence=True))
    report = rehearse_rank(run, run.stages[0], 0, 8, micro_batches=2)
    assert [t.kind for t in report.transfers if len(t.group) == 8] == ["all-reduce"]


def test_a_collective_that_one_rank_leaves_out_is_named_with_both_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = TeleFLM.forward

    def planted(self: TeleFLM, *args: object, **named: object) -> object:
        """Rank 1 of the tensor group reduces something that rank 0 does not."""
        if parallel_state.get_tensor_model_parallel_rank() == 1:
            dist.all_reduce(torch.ones(3), group=parallel_state.get_tensor_model_parallel_group())
        return honest(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(TeleFLM, "forward", planted)
    with pytest.raises(FlmError, match=r"^deadlock: collective \d+ of the group of 2 ranks") as error:
        only(run_of(ParallelConfig(tensor=2)), 2)
    text = str(error.value)
    assert "on rank 0" in text and "all-reduce of 12 bytes of float32 at" in text and "on rank 1" in text
    assert text.count(" at ") == 2 and "\n" not in text


def test_a_rank_that_never_joins_a_group_is_named() -> None:
    run = run_of(ParallelConfig(tensor=2))
    here, there = (rehearse_rank(run, run.stages[0], rank, 2, micro_batches=1) for rank in range(2))
    check_meetings([here, there])
    with pytest.raises(FlmError, match="nothing on rank 1"):
        check_meetings([here, replace(there, transfers=())])


def test_one_rank_alone_has_the_role_that_it_is_in() -> None:
    run = run_of(ParallelConfig(tensor=2, pipeline=2, sequence=True))
    (stage,) = rehearse(run, gpus=4, rank=3).stages
    assert [role.name for role in stage.roles] == ["last"] and stage.reports[0].rank == 3 and stage.met == ()


@pytest.mark.parametrize(
    ("gpus", "rank", "words"),
    [(8, 8, "rank is 8, but 8 processes have the ranks 0 to 7"), (6, None, "6"), (0, None, "gpus")],
)
def test_what_cannot_be_is_refused(gpus: int, rank: int | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        rehearse(run_of(ParallelConfig(tensor=4)), gpus=gpus, rank=rank)


def test_a_plan_is_shown_beside_what_ranks_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    planned = plan(run_of(ParallelConfig(tensor=2, pipeline=2, sequence=True)), gpu="a800", gpus=4, verify=True)
    assert planned.verified is not None
    assert [(role.role, role.pipeline_rank) for role in planned.verified] == [("first", 0), ("last", 1)]
    assert all(abs(role.difference) < 0.05 for role in planned.verified)
    assert "planned (without the allowance) and rehearsed" in str(planned)
    assert planned.to_dict()["verified"][0]["rehearsed"] == planned.verified[0].rehearsed  # type: ignore[index]
    plain = plan(run_of(ParallelConfig()), gpu="a800", gpus=1)
    assert plain.verified is None and "verified" not in plain.to_dict()


def test_a_launch_can_be_rehearsed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(run_to_dict(replace(run_of(ParallelConfig(tensor=2)), output=str(tmp_path / "out"))))
    )
    command = ["launch", str(file), "--on", "torchrun", "--processes-per-node", "4", "--device", "cpu", "--dry-run"]
    assert main(command) == 0
    plain = capsys.readouterr()
    assert main([*command, "--rehearse"]) == 0
    rehearsed = capsys.readouterr()
    assert rehearsed.out == plain.out and "meet in every collective" in rehearsed.err
