"""A process that lost its lease while it slept renames and removes nothing when it wakes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from flm_megatron.checkpoint.files.destination import destination, new_folder, publish
from flm_megatron.checkpoint.lease import fence
from flm_megatron.checkpoint.lease import file as lease_file
from flm_megatron.checkpoint.lease.holder import this_process
from flm_megatron.checkpoint.lease.lease import lease
from flm_megatron.checkpoint.store import CheckpointStore
from flm_megatron.config.schema import ModelConfig, RunConfig
from flm_megatron.distributed.processes import Processes
from flm_megatron.launch.run import write_run_file
from flm_megatron.training.metrics.log import MetricsLog
from flm_megatron.training.resume.start import set_aside
from tests.support.checkpoint_cases import write_small

ASLEEP_S = 60.0
ELSEWHERE = replace(this_process(ASLEEP_S), host="node007", pid=77, token="other")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flm_megatron.distributed.preload"])
MODEL = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, ffn_hidden_size=8, vocab_size=16)


def save(output: Path) -> None:
    write_small(output / "checkpoints/s/step_00000003", MODEL)


def prune(output: Path) -> None:
    CheckpointStore(output / "checkpoints").prune("s", keep_last=1)


def clean(output: Path) -> None:
    CheckpointStore(output / "checkpoints").clean(["s"])


def begin_anew(output: Path) -> None:
    set_aside(RunConfig(output=str(output)))


def open_metrics(output: Path) -> None:
    MetricsLog(output, tensorboard=False, stages=["s"], stage="s", step=1)


def keep_run_file(output: Path) -> None:
    write_run_file(RunConfig(output=str(output)))


STEPS: list[Callable[[Path], None]] = [save, prune, clean, begin_anew, open_metrics, keep_run_file]


def work(output: Path, step: Callable[[Path], None], words: Path, held: Event, taken: Event) -> None:
    """A holder whose renewal sleeps for a minute."""
    sys.stderr = words.open("w")
    with lease(output / ".lease", "output out", "", Processes(), renew_s=ASLEEP_S):
        held.set()
        taken.wait()
        step(output)


def write_folder(output: Path, fails: bool, words: Path, held: Event, taken: Event) -> None:
    """A tool that loses its lease while it writes, and then ends or fails."""
    sys.stderr = words.open("w")
    with destination(output / "new", Processes(), 0) as folder:
        (folder / "half").touch()
        held.set()
        taken.wait()
        if fails:
            raise ValueError


def robbed(file: Path, words: Path, target: Callable[..., None], *arguments: object) -> tuple[int | None, str]:
    """Exit status and words of a process whose lease `file` is taken over while it holds it."""
    held, taken = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=target, args=(*arguments, words, held, taken))
    process.start()
    assert held.wait(30)
    judged = file.read_bytes()
    assert lease_file.create(lease_file.claim_of(file, lease_file.holder_line(judged)), ELSEWHERE.to_bytes())
    assert lease_file.take_over(file, judged, ELSEWHERE.to_bytes())
    taken.set()
    process.join(30)
    return process.exitcode, words.read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", STEPS, ids=[step.__name__ for step in STEPS])
def test_a_robbed_holder_leaves_everything_as_it_is(tmp_path: Path, step: Callable[[Path], None]) -> None:
    output = tmp_path / "out"
    for number in (1, 2):
        write_small(output / f"checkpoints/s/step_{number:08d}", MODEL)
    (output / "checkpoints/s/step_00000003.partial").mkdir()
    (output / "checkpoints/s/step_00000003.partial/__0_0.distcp").write_text("the other's")
    (output / "metrics.jsonl").write_text('{"stage": "s", "step": 2}\n')
    (output / "run.yaml").write_text("the other's")
    before = contents(output)
    status, words = robbed(output / ".lease", tmp_path / "words", work, output, step)
    assert status == 1 and "output out has been taken over by process 77 on host node007" in words
    assert contents(output) == before | {".lease": (output / ".lease").read_bytes()}


@pytest.mark.parametrize("fails", [False, True])
def test_a_robbed_tool_leaves_the_folder_to_the_other(tmp_path: Path, fails: bool) -> None:
    status, _ = robbed(tmp_path / ".new.lease", tmp_path / "words", write_folder, tmp_path, fails)
    assert status == 1 and list(tmp_path.glob("new~*.partial/half")) and not (tmp_path / "new").exists()


def test_late_bytes_of_one_that_was_robbed_do_not_reach_the_folder_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with new_folder(path, Processes()) as old, new_folder(path, Processes()) as folder:
        with pytest.raises(FileNotFoundError):
            (old / "__1_0.distcp").write_bytes(b"late")
        (folder / "__0_0.distcp").write_bytes(b"whole")
        publish(folder, path)
    assert contents(tmp_path) == {"new/__0_0.distcp": b"whole"}


def test_a_fence_stands_as_long_as_the_lease(tmp_path: Path) -> None:
    fence.check_fences()
    with lease(tmp_path / ".lease", "x", "", Processes(), renew_s=ASLEEP_S):
        (standing,) = fence.standing_fences()
        assert lease_file.holds(standing.file, standing.line)
        fence.check_fences()
        standing.file.unlink()  # by hand: it is nobody's then
        fence.check_fences()
    assert fence.standing_fences() == ()
