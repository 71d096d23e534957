"""Generations in memory as training makes them: one is always whole, and no neighbour holds training up."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.memory import refresh as refresh_module
from flm_megatron.checkpoint.memory.blobs import NONE, Generation
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent, RemoteAgent
from flm_megatron.checkpoint.memory.peers import Peers
from flm_megatron.checkpoint.memory.refresh import Refresher
from flm_megatron.checkpoint.memory.starting import agent_name, obstacle
from flm_megatron.config.loader import run_to_dict
from flm_megatron.config.schema import CheckpointConfig, MemoryConfig, RunConfig, StageConfig
from flm_megatron.distributed.process_group import process_group
from flm_megatron.errors import DamagedError, FlmError, RequestError
from flm_megatron.training.resume.memory_copies import (
    NOT_USED,
    MemoryCopies,
    first_start,
    forgotten_on_error,
    memory_copies,
)
from flm_megatron.training.resume.start import Start
from tests.support.memory_cases import agents, fill, overwrite, wait_until

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
SHAPE = (300, 70)
STATE = torch.zeros(SHAPE)


class OneHost(Peers):
    """A world of one rank whose copies go where a test wants them."""

    target: Endpoint | None = None

    @property
    def neighbour(self) -> Endpoint | None:
        """Where copies go."""
        return self.target


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OneHost]:
    """The agent of this host, and a state of one tensor."""
    parts = [("weight", Region.whole(SHAPE), STATE)]
    monkeypatch.setattr(
        refresh_module, "stored_state", lambda *_: ({"weight": TensorInfo(SHAPE, torch.float32)}, parts)
    )
    with process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1):
        made = OneHost()
        yield made
        made.stop()


def started(peers: Peers, newest: Generation, kept: Generation | None) -> Refresher:
    """A start of the ranks, with memory set aside."""
    refresher = Refresher(peers, newest, kept)
    refresher.reserve([], None, budget_gib=None)
    return refresher


def refresh(refresher: Refresher, step: int, **more: Any) -> str | None:
    STATE.fill_(step)
    return refresher.refresh([], None, Manifest.from_json({"stage": "small", "step": step, **more}))


def settle(peers: Peers) -> None:
    wait_until(lambda: peers.local.copy_state(0) != "")


def kept(peers: Peers) -> list[int]:
    return sorted(blob["step"] for blob in peers.local.ask("list")["blobs"])


def always(stage: str, step: int) -> bool:
    return True


def test_the_last_two_copies_are_kept_and_the_newest_is_found(peers: OneHost) -> None:
    refresher = started(peers, NONE, None)
    held = peers.local.ask("list")["held"]
    for step in (10, 20, 30, 40):
        assert refresh(refresher, step) is None
        settle(peers)
        assert kept(peers) == [step - 10, step][step == 10 :]
        STATE.fill_(-1)  # training goes on
        search, checkpoint = peers.search(always)
        assert checkpoint is not None and search.generation == Generation(1, step // 10)
        assert search.line.startswith(f"small goes on from step {step}, kept in the memory of ")
        assert torch.equal(checkpoint.read("weight"), torch.full(SHAPE, float(step)))
        checkpoint.close()
    assert peers.local.ask("list")["held"] == held  # the same memory all the time


def test_an_older_copy_takes_the_place_of_one_that_makes_no_sense(peers: OneHost) -> None:
    refresh(started(peers, NONE, None), 10)
    settle(peers)
    fill(peers.local, Generation(1, 2), Generation(1, 1), b"x", header={"world": 1, "stage": "small", "step": 20})
    assert kept(peers) == [10, 20]
    search, checkpoint = peers.search(always)
    assert checkpoint is not None and search.generation == Generation(1, 1) and checkpoint.manifest.position.step == 10
    checkpoint.close()
    search, checkpoint = peers.search(lambda stage, step: step > 10)
    assert checkpoint is None and "is not understood" in search.line


def test_what_a_start_goes_on_from_is_kept_until_its_own_copy_is_whole(peers: OneHost) -> None:
    assert refresh(started(peers, NONE, None), 10) is None
    settle(peers)
    search, checkpoint = peers.search(always)
    assert checkpoint is not None
    again = started(peers, search.newest, search.generation)
    refresh(again, 12)
    settle(peers)
    assert kept(peers) == [10, 12] and again.kept == search.generation
    refresh(again, 14)
    settle(peers)
    assert kept(peers) == [12, 14]


def test_a_start_from_the_disk_keeps_nothing_of_before(peers: OneHost) -> None:
    refresh(started(peers, NONE, None), 10)
    settle(peers)
    search, checkpoint = peers.search(lambda stage, step: step > 10)
    assert checkpoint is None and search.line == "" and search.newest == Generation(1, 1)
    refresh(started(peers, search.newest, None), 4)
    settle(peers)
    assert kept(peers) == [4]


def test_a_neighbour_that_stands_still_holds_nothing_up(peers: OneHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        peers.target = Endpoint("node2", "127.0.0.1", server.getsockname()[1], "00")
        refresher = started(peers, NONE, None)
        began = time.monotonic()
        assert refresh(refresher, 10) is None
        line = refresh(refresher, 20)
        assert time.monotonic() - began < 5
        assert line == "no copy of step 20 in memory: the one of step 10 is still on its way to the neighbours"
        server.accept()[0].close()
    settle(peers)


def test_a_copy_that_did_not_arrive_is_named_and_the_one_before_is_kept(peers: OneHost) -> None:
    with agents() as (neighbour,):
        peers.target = neighbour.endpoint()
        refresher = started(peers, NONE, None)
        assert refresh(refresher, 10) is None
        settle(peers)
    peers.target = Endpoint("node2", "127.0.0.1", 1, "00")
    assert refresh(refresher, 20) is None
    settle(peers)
    line = refresh(refresher, 30)
    assert line is not None and line.startswith("the copy of step 20 in memory is not whole: rank 0: node2: ")
    settle(peers)
    assert kept(peers) == [10, 30]
    assert refresher.kept == Generation(1, 1)


def test_an_agent_that_is_gone_costs_a_line_not_the_run(peers: OneHost) -> None:
    refresher = started(peers, NONE, None)
    refresh(refresher, 10)
    settle(peers)
    peers.local.stop()
    peers.local.socket.close()
    assert "this host's agent does not answer" in str(refresh(refresher, 20))
    assert "the copy of step 20 in memory is not whole: rank 0: " in str(refresh(refresher, 30))


def test_a_damaged_copy_is_passed_over_for_an_older_one_then_for_the_disk(peers: OneHost) -> None:
    refresher = started(peers, NONE, None)
    for step in (10, 20):
        refresh(refresher, step)
        settle(peers)
    overwrite(peers.local, Generation(1, 2), 0, 5000)
    search, checkpoint = peers.search(always)
    assert checkpoint is not None and checkpoint.manifest.position.step == 10
    overwrite(peers.local, Generation(1, 1), 0, 5000)
    search, checkpoint = peers.search(always)
    assert checkpoint is None
    assert search.line == ("step 10 of small was kept in memory, but of 1 of 1 ranks (0) no copy is left or right")


@pytest.mark.parametrize("change", [{"manifest": None}, {"parts": []}, {"tensors": "all"}])
def test_a_description_that_makes_no_sense_is_passed_over_for_the_disk(peers: OneHost, change: dict[str, Any]) -> None:
    refresh(started(peers, NONE, None), 10)
    settle(peers)
    with RemoteAgent(peers.endpoints[0]) as agent:
        ((_, header),) = agent.ask("describe", generation=Generation(1, 1))["headers"]
    fill(peers.local, Generation(1, 2), NONE, bytes(4 * STATE.numel()), header=header | {"step": 20} | change)
    search, checkpoint = peers.search(always)
    assert checkpoint is None and search.generation is None and search.line


def test_a_budget_that_is_too_small_is_refused(peers: OneHost) -> None:
    refresher = Refresher(peers, NONE, None)
    with pytest.raises(RequestError, match=r"but checkpoint\.memory\.budget_gib is 1e-06"):
        refresher.reserve([], None, budget_gib=1e-6)


def test_where_nobody_starts_ranks_again_copies_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1):
        for memory, said in ((None, ""), (MemoryConfig(), f"{NOT_USED}\n")):
            with memory_copies(RunConfig(checkpoint=CheckpointConfig(memory=memory))) as copies:
                assert copies is None
            assert capsys.readouterr().out == said


def test_a_run_whose_ranks_are_lost_goes_on_from_memory_if_that_is_further_than_the_disk(
    peers: OneHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    (tmp_path / "checkpoints/small/step_00000012").mkdir(parents=True)
    stages = [StageConfig(name=name, tokens=10**6) for name in ("tiny", "small")]
    run = RunConfig(stages=stages, checkpoint=CheckpointConfig(memory=MemoryConfig()), output=str(tmp_path))
    refresh(started(peers, NONE, None), 10, run=run_to_dict(run))
    settle(peers)
    saved = Path("checkpoints/small/step_00000004")
    for start, only, step in (
        (Start(1, 4, saved, resumes=True, taken=("step_00000004",)), None, 10),
        (Start(1, 0, saved, resumes=False), "small", 10),
        (Start(0, 99, saved, resumes=True, taken=("step_00000099",)), None, 10),
        (Start(0, 99, saved, resumes=True), "tiny", 99),
        (Start(1, 10, saved, resumes=True), None, 10),
        (Start(1, 12, saved, resumes=True), None, 12),
    ):
        with memory_copies(run) as copies:
            assert copies is not None
            copies.peers.stop = lambda: None  # type: ignore[method-assign]
            found = copies.newer(start, only)
            assert found.step == step
            assert found.taken == (start.taken if found.stage == start.stage else ("step_00000012",))
            assert (copies.checkpoint is not None) == (found != start) == (found.source is None)
            if copies.checkpoint is not None:
                assert found.resumes and found.stage == 1 and "small goes on from step 10" in copies.line
            checkpoint = copies.checkpoint
            assert copies.newer(start, only) == start and copies.checkpoint is None  # only the first stage of a start
            if checkpoint is not None:
                with pytest.raises(FlmError, match="no longer in memory"):
                    checkpoint.read(next(iter(checkpoint.tensors)))


def test_memory_is_looked_at_where_every_checkpoint_on_disk_is_damaged(
    peers: OneHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    (tmp_path / "checkpoints/small/step_00000012").mkdir(parents=True)  # without its manifest
    stages = [StageConfig(name=name, tokens=10**6) for name in ("tiny", "small")]
    run = RunConfig(stages=stages, checkpoint=CheckpointConfig(memory=MemoryConfig()), output=str(tmp_path))
    with memory_copies(run) as copies:
        assert copies is not None
        copies.peers.stop = lambda: None  # type: ignore[method-assign]
        with pytest.raises(DamagedError, match="none of the 1 checkpoints"):
            first_start(run, None, copies)
    refresh(started(peers, NONE, None), 10, run=run_to_dict(run))
    settle(peers)
    with memory_copies(run) as copies:
        found = first_start(run, None, copies)
        assert found is not None and copies is not None and copies.checkpoint is not None
        assert (found.stage, found.step, found.resumes, found.source) == (1, 10, True, None)
        assert found.taken == ("step_00000012",) and copies.line.endswith("every checkpoint on the disk is damaged")


def test_copies_of_a_state_that_may_be_wrong_are_forgotten(peers: OneHost) -> None:
    """As where replicas of weights differ: the next start goes on from the disk."""
    copies = MemoryCopies(RunConfig(), MemoryConfig())
    with forgotten_on_error(copies):
        pass
    refresh(started(peers, NONE, None), 10)
    settle(peers)
    assert kept(peers) == [10]
    for kept_by in (None, copies):
        with pytest.raises(FlmError, match="differ"), forgotten_on_error(kept_by):
            raise FlmError("copies of weights differ")
        if kept_by is None:
            assert kept(peers) == [10]
    wait_until(is_gone)


def is_gone() -> bool:
    """Whether this host has no agent."""
    try:
        LocalAgent(agent_name(os.getppid())).close()
    except OSError:
        return True
    return False
