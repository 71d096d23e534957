"""A generation in memory reads as the checkpoint on disk of the same state, whatever hosts are left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flm_megatron.checkpoint.files.stored_array import as_bytes
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region
from flm_megatron.checkpoint.memory import reader as reader_module
from flm_megatron.checkpoint.memory.blobs import NONE, Generation
from flm_megatron.checkpoint.memory.client import LocalAgent, RemoteAgent
from flm_megatron.checkpoint.memory.contents import header_of, regions_of, tensors_of
from flm_megatron.checkpoint.memory.generations import found, required
from flm_megatron.checkpoint.memory.peers import _check_budget, available_bytes
from flm_megatron.checkpoint.memory.reader import Held, MemoryCheckpoint
from flm_megatron.checkpoint.memory.starting import obstacle
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.sharding.snapshot import (
    HostBuffer,
    give_back,
    placed,
    prepare_buffer,
    snapshot,
    take_buffer,
)
from flm_megatron.checkpoint.torch_dist.writer import plan_files
from flm_megatron.distributed.addresses import own_address
from flm_megatron.errors import DamagedError, FlmError, RequestError
from tests.support.checkpoint_cases import write_small
from tests.support.memory_cases import agents, fill, overwrite

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
GENERATION = Generation(2, 7)
HOSTS, RANKS = 3, 4


@dataclass
class Cluster:
    """The agents of three hosts over which a checkpoint of four ranks is kept: ranks 0 and 1 on the first host."""

    agents: list[LocalAgent]
    disk: LogicalCheckpoint
    headers: dict[int, dict[str, object]]

    def view(self, *lost: int, host: int = 0) -> MemoryCheckpoint:
        """As a rank of `host` sees what is held by hosts that are not lost."""
        endpoints = [agent.endpoint() for agent in self.agents]
        lists = []
        for number, endpoint in enumerate(endpoints):
            with RemoteAgent(endpoint) as agent:
                lists.append([] if number in lost else agent.ask("list", check=True)["blobs"])
        (entry,) = found(lists)
        assert not entry.missing, entry.missing
        blobs = {rank: Held(self.headers[rank], tuple(holders)) for rank, holders in entry.holders.items()}
        return MemoryCheckpoint(GENERATION, blobs, endpoints, self.agents[host], host)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> LogicalCheckpoint:
    """A checkpoint on disk."""
    path = tmp_path_factory.mktemp("disk") / "checkpoint"
    write_small(path)
    return open_checkpoint(path)


@pytest.fixture
def cluster(disk: LogicalCheckpoint) -> Iterator[Cluster]:
    """The same values in memory."""
    headers = {}
    with agents(HOSTS) as made:
        for rank in range(RANKS):
            host = max(0, rank - 1)
            stored = [
                (name, region, disk.read(name, region))
                for parts in plan_files(disk.tensors, rank, RANKS, 9_999).values()
                for name, region in parts
            ]
            tensors = {name: disk.tensors[name] for name, _, _ in stored}
            headers[rank] = header_of(tensors, stored, RANKS, disk.manifest)
            positions, size = placed(stored)
            data = bytearray(size)
            for (_, _, values), position in zip(stored, positions, strict=True):
                data[position : position + values.nbytes] = as_bytes(values)
            peer = made[(host + 1) % HOSTS].endpoint()
            fill(made[host], GENERATION, NONE, bytes(data), peer, rank, headers[rank])
        yield Cluster(made, disk, headers)


def regions(shape: tuple[int, ...], seed: str) -> Iterator[Region]:
    """All of a tensor, and some regions of it."""
    yield Region.whole(shape)
    chance = random.Random(seed)
    for _ in range(3):
        offsets = tuple(chance.randrange(size) for size in shape)
        yield Region(offsets, tuple(chance.randint(1, n - o) for n, o in zip(shape, offsets, strict=True)))


def assert_same(checkpoint: LogicalCheckpoint, disk: LogicalCheckpoint) -> None:
    assert dict(checkpoint.tensors) == dict(disk.tensors)
    for name, info in disk.tensors.items():
        for region in regions(info.shape, name):
            ours, theirs = checkpoint.read(name, region), disk.read(name, region)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (name, region)


@pytest.mark.parametrize("lost", [(), (0,), (1,), (2,)])
def test_every_region_is_that_of_the_disk(cluster: Cluster, lost: tuple[int, ...]) -> None:
    checkpoint = cluster.view(*lost, host=1 if lost == (0,) else 0)
    assert_same(checkpoint, cluster.disk)
    assert checkpoint.has_optimizer() and checkpoint.manifest.position.step == cluster.disk.manifest.position.step
    checkpoint.close()
    with pytest.raises(FlmError, match="no longer in memory"):
        checkpoint.read(next(iter(checkpoint.tensors)))


def test_several_threads_read_at_once(cluster: Cluster) -> None:
    checkpoint = cluster.view(0, host=1)
    with ThreadPoolExecutor(4) as executor:
        for done in [executor.submit(assert_same, checkpoint, cluster.disk) for _ in range(8)]:
            done.result()


def test_wide_regions_are_fetched_in_several_reads(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "LARGEST_READ", 2**13)
    assert_same(cluster.view(0, host=1), cluster.disk)


def test_two_neighbours_lost_is_too_much(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match=r"\[0, 1\]"):
        cluster.view(0, 1, host=2)
    with pytest.raises(AssertionError, match=r"\[2\]"):
        cluster.view(1, 2)


def test_a_copy_that_was_damaged_gives_way_to_the_other(cluster: Cluster) -> None:
    overwrite(cluster.agents[0], GENERATION, 1, 1000)
    checkpoint = cluster.view()
    assert checkpoint.blobs[1].holders == (1,) and checkpoint.blobs[0].holders == (0, 1)
    assert_same(checkpoint, cluster.disk)


def test_an_agent_that_goes_away_while_it_is_read_is_replaced_by_the_other(cluster: Cluster) -> None:
    checkpoint = cluster.view(host=2)
    cluster.agents[0].stop()
    assert_same(checkpoint, cluster.disk)
    cluster.agents[1].stop()
    with pytest.raises(DamagedError, match="the copy of rank 0 at step 7 cannot be read from memory"):
        checkpoint._connections.clear()
        assert_same(checkpoint, cluster.disk)


@pytest.mark.parametrize("change", ["missing", "twice", "outside", "unknown", "type"])
def test_a_description_that_does_not_cover_the_tensors_is_refused(cluster: Cluster, change: str) -> None:
    checkpoint = cluster.view()
    header = {**checkpoint.blobs[2].header, "parts": list(checkpoint.blobs[2].header["parts"])}
    number, offsets, sizes, position = header["parts"][0]
    if change == "missing":
        header["parts"].pop()
    if change == "twice":
        header["parts"].append(header["parts"][0])
    if change == "outside":
        header["parts"][0] = [number, [offset + 9999 for offset in offsets], sizes, position]
    if change == "unknown":
        header["parts"][0] = [9999, offsets, sizes, position]
    if change == "type":
        header["tensors"] = [[name, "torch.nn", shape] for name, _, shape in header["tensors"]]
    blobs = {**checkpoint.blobs, 2: Held(header, (2,))}
    with pytest.raises(DamagedError):
        MemoryCheckpoint(GENERATION, blobs, checkpoint.endpoints, checkpoint.local, checkpoint.host)


def test_descriptions_survive_the_way_there_and_back(cluster: Cluster) -> None:
    for rank, header in cluster.headers.items():
        with RemoteAgent(cluster.agents[max(0, rank - 1)].endpoint()) as agent:
            headers = dict(agent.ask("describe", generation=GENERATION)["headers"])
        assert tensors_of(headers[rank]) == tensors_of(header) and regions_of(headers[rank]) == regions_of(header)


# Which generation, and how much memory.


def blob(generation: tuple[int, int], rank: int, world: int = 2) -> dict[str, object]:
    return {"generation": generation, "rank": rank, "world": world, "stage": "small", "step": 4 * generation[1]}


def test_the_newest_generations_come_first_with_what_they_lack() -> None:
    first = [blob((1, 3), 0), blob((1, 4), 0), blob((2, 1), 0, world=1)]
    second = [blob((1, 3), 0), blob((1, 3), 1)]
    newest, middle, oldest = found([first, second])
    assert (newest.generation, newest.missing, newest.holders) == ((2, 1), [], {0: [0]})
    assert (middle.generation, middle.missing, middle.step) == ((1, 4), [1], 16)
    assert (oldest.generation, oldest.missing, oldest.holders) == ((1, 3), [], {0: [0, 1], 1: [1]})


def test_a_host_holds_two_blobs_of_each_own_rank_and_of_each_neighbours() -> None:
    assert required([5, 6, 7], [0, 0, 1]) == [[5, 5, 6, 6, 7, 7], [5, 5, 6, 6, 7, 7]]
    assert required([5, 6, 7], [0, 1, 2]) == [[5, 5, 7, 7], [5, 5, 6, 6], [6, 6, 7, 7]]
    assert required([5, 6], [0, 0]) == [[5, 5, 6, 6]]


@pytest.mark.parametrize(
    ("needed", "free", "budget", "words"),
    [
        (2**30, 2**40, 0.5, "are 1 GiB on host node1, but checkpoint.memory.budget_gib is 0.5"),
        (2**30, 2**30, None, "are 1 GiB on host node1, which has 1 GiB free"),
        (2**30, 2**30, 8.0, "which has 1 GiB free"),
    ],
)
def test_too_little_memory_is_one_line(needed: int, free: int, budget: float | None, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        _check_budget("node1", needed, free, budget)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    _check_budget("node1", needed, 2 * free, None)


def test_the_limit_of_the_container_counts(tmp_path: Path) -> None:
    whole = available_bytes(tmp_path)
    assert whole > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_bytes(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == pytest.approx(whole, rel=0.5)


def test_the_card_of_the_run_gives_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    with pytest.raises(RequestError, match="'nowhere0', which has no address"):
        own_address()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert own_address() == "127.0.0.1"


# Snapshots.


def test_a_snapshot_holds_the_values_of_its_time() -> None:
    base = torch.arange(60, dtype=torch.float32).view(6, 10)
    parts = [
        ("a", Region.whole((6, 10)), base),
        ("b", Region((0, 0), (6, 3)), base[:, 4:7]),
        ("c", Region.whole((7,)), torch.arange(7, dtype=torch.bfloat16)),
    ]
    wanted = [tensor.clone() for _, _, tensor in parts]
    buffer = take_buffer(placed(parts)[1])
    copies = snapshot(parts, buffer)
    base.zero_()
    assert all(torch.equal(copy, value) for (_, _, copy), value in zip(copies, wanted, strict=True))
    assert [(name, region) for name, region, _ in copies] == [(name, region) for name, region, _ in parts]
    give_back(buffer)


def test_memory_of_snapshots_is_used_again_where_it_is_large_enough() -> None:
    first = take_buffer(10_000)
    second = take_buffer(10_000)
    assert first is not second
    give_back(first)
    assert take_buffer(9_000) is first
    give_back(first)
    larger = take_buffer(20_000)
    assert larger is not first and larger.nbytes >= 20_000
    for buffer in (larger, second):
        give_back(buffer)
    assert isinstance(larger, HostBuffer)


def test_memory_that_is_got_ready_is_what_the_next_snapshot_takes() -> None:
    drained = [take_buffer(1) for _ in range(8)]
    prepare_buffer(30_000)
    ready = take_buffer(20_000)
    assert ready.nbytes == 30_000
    for buffer in (*drained, ready):
        give_back(buffer)
