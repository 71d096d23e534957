"""A generation in the hosts' memory, as a checkpoint like any other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from flm_megatron.checkpoint.files.stored_array import StoredArray, as_bytes, is_contiguous, out_of_run, span
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.memory.blobs import Generation
from flm_megatron.checkpoint.memory.client import Endpoint, LocalAgent, RemoteAgent
from flm_megatron.checkpoint.memory.contents import manifest_of, regions_of, tensors_of
from flm_megatron.checkpoint.regions import split_region
from flm_megatron.checkpoint.torch_dist.chunk_index import ChunkIndex, StoredChunk
from flm_megatron.checkpoint.torch_dist.shard_file import Record
from flm_megatron.checkpoint.torch_dist.writer import check_cover
from flm_megatron.errors import DamagedError, FlmError, RequestError
from flm_megatron.json_text import JsonObject

LARGEST_READ = 64 * 2**20


@dataclass(frozen=True)
class Held:
    """The blob of one rank: its header, and the numbers of the hosts that hold it."""

    header: JsonObject
    holders: tuple[int, ...]


class MemoryCheckpoint(LogicalCheckpoint):
    """A complete generation. Regions are read from this host's memory if it has them, else from another host's.

    Raises:
        DamagedError: its blobs do not make up every tensor once.
    """

    def __init__(
        self, generation: Generation, blobs: Mapping[int, Held], endpoints: list[Endpoint], local: LocalAgent, host: int
    ) -> None:
        """`blobs` by rank; `host` is the number of this host among `endpoints`, and `local` its agent."""
        self.generation, self.blobs, self.endpoints = generation, blobs, endpoints
        self.local, self.host = local, host
        self.manifest = manifest_of(blobs[0].header) | Manifest(optimizer="logical")
        self.step = self.manifest.position.step
        self.tensors: dict[str, TensorInfo] = {}
        self.chunks: dict[str, list[StoredChunk]] = {}
        for rank, blob in blobs.items():
            self.tensors |= tensors_of(blob.header)
            for sub in regions_of(blob.header):
                self.chunks.setdefault(sub.name, []).append(self._chunk(rank, sub.name, sub.region, sub.position))
        self._check_cover()
        self._indices: dict[str, ChunkIndex[StoredChunk]] = {}
        self._files: dict[int, int] = {}
        self._connections: dict[int, RemoteAgent] = {}
        self._asking = Lock()  # a connection takes one question at a time
        self._closed = False

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values of a region; raises as `LogicalCheckpoint.read`, and FlmError after `close`."""
        if self._closed:
            raise FlmError(f"the copy of step {self.step} is no longer in memory")
        if name not in self.tensors:
            raise RequestError(f"the copy in memory has no tensor {name}")
        info = self.tensors[name]
        region = region or Region.whole(info.shape)
        if name not in self._indices:
            self._indices[name] = ChunkIndex(info.shape, self.chunks[name])
        out = torch.empty(region.sizes, dtype=info.dtype)
        for chunk, sub in self._indices[name].meeting(region):
            if sub == region:
                return self._read_chunk(name, chunk, sub.within(chunk.region))
            out[sub.within(region).slices] = self._read_chunk(name, chunk, sub.within(chunk.region))
        return out

    def close(self) -> None:
        """Release memory and connections: the memory may be overwritten from now on."""
        self._closed = True
        for descriptor in self._files.values():
            os.close(descriptor)
        for connection in self._connections.values():
            connection.close()
        self._files, self._connections = {}, {}

    def _chunk(self, rank: int, name: str, region: Region, position: int) -> StoredChunk:
        return StoredChunk(region, str(rank), position, region.numel * self.tensors[name].dtype.itemsize)

    def _check_cover(self) -> None:
        records = (Record(name, c.region, c.file, c.offset, c.length) for name, cs in self.chunks.items() for c in cs)
        try:
            check_cover(self.tensors, records)
        except FlmError as error:
            raise DamagedError(f"copies of step {self.step} in memory: {error}") from error

    def _read_chunk(self, name: str, chunk: StoredChunk, region: Region) -> torch.Tensor:
        """A region of a chunk, from the first holder that delivers it."""
        rank, failures = int(chunk.file), []
        for host in sorted(self.blobs[rank].holders, key=lambda holder: holder != self.host):
            try:
                if host == self.host:
                    return self._array(rank, name, chunk).read(region)
                return self._fetch(host, rank, name, chunk, region)
            except (FlmError, OSError) as error:
                failures.append(str(error))
        raise DamagedError(
            f"{name}: the copy of rank {rank} at step {self.step} cannot be read from memory "
            f"({'; '.join(failures)}); start again to go on from another one or from the disk"
        )

    def _array(self, rank: int, name: str, chunk: StoredChunk) -> StoredArray:
        """A chunk in this host's memory."""
        with self._asking:
            if rank not in self._files:
                self._files[rank] = self.local.open(self.generation, rank)
        path = Path(f"/proc/self/fd/{self._files[rank]}")
        return StoredArray(path, chunk.offset, chunk.region.sizes, self.tensors[name].dtype)

    def _fetch(self, host: int, rank: int, name: str, chunk: StoredChunk, region: Region) -> torch.Tensor:
        """A region of a chunk from another host, cut so that no span is too large."""
        dtype, shape = self.tensors[name].dtype, chunk.region.sizes
        if is_contiguous(region, shape):
            return self._fetch_run(host, rank, chunk, region, dtype).view(region.sizes)
        out = torch.empty(region.sizes, dtype=dtype)
        for sub in _bounded(region, shape, LARGEST_READ // dtype.itemsize):
            run = self._fetch_run(host, rank, chunk, sub, dtype)
            out[sub.within(region).slices] = out_of_run(run, sub, shape)
        return out

    def _fetch_run(self, host: int, rank: int, chunk: StoredChunk, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """All values of a chunk from the first to the last of a region."""
        first, last = span(region, chunk.region.sizes)
        run = torch.empty(last - first, dtype=dtype)
        start = chunk.offset + first * dtype.itemsize
        with self._asking:
            if host not in self._connections:
                self._connections[host] = RemoteAgent(self.endpoints[host])
            try:
                self._connections[host].read(self.generation, rank, start, as_bytes(run))
            except (FlmError, OSError):
                del self._connections[host]  # nobody knows what is still under way on it
                raise
        return run


def _bounded(region: Region, shape: tuple[int, ...], limit: int) -> Iterator[Region]:
    """A region cut into some that each lie within `limit` values of an array of `shape`, if rows are not longer."""
    first, last = span(region, shape)
    if last - first <= limit or region.numel <= 1:
        yield region
        return
    for sub in split_region(region, -(-region.numel // 2)):
        yield from _bounded(sub, shape, limit)
