"""Writing and reading a checkpoint at a URL of an S3 server on loopback, beside a folder of this machine.

    python -m benchmarks.checkpoint.at_url --megabytes 256 --repeats 3

Prints Markdown. The server is the one of the tests, in a process of its own on the same cores: the figures bound what
the client costs, and say nothing of a real store.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flm_megatron.checkpoint.files.manifest import verify
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.distributed.processes import Processes
from tests.support.checkpoint_cases import Memory
from tests.support.object_store import ObjectStore

ROWS = 1024


def serve(connection: Connection) -> None:
    """Run the server until the connection says so; tells where it is."""
    store = ObjectStore()
    store.begin()
    connection.send((store.environment, store.url("checkpoint")))
    connection.recv()
    store.stop()


def seconds(action: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measured(where: str, again: str, tensors: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Seconds of writing, of verifying and of reading all tensors; `again` makes the place new."""
    place = where + again
    writing = seconds(lambda: copy_checkpoint(Memory(tensors), place, None, Processes()))
    verifying = seconds(lambda: verify(place))
    checkpoint = open_checkpoint(place)
    return writing, verifying, seconds(lambda: [checkpoint.read(name) for name in tensors])


def by_boto(url: str, path: Path) -> tuple[float, float]:
    """Seconds that boto3 takes to send a file of the same bytes as one object, and to bring it back."""
    import boto3

    client, bucket = boto3.client("s3"), url.split("/")[2]
    sending = seconds(lambda: client.upload_file(str(path), bucket, "plain"))
    return sending, seconds(lambda: client.download_file(bucket, "plain", str(path) + ".back"))


def main() -> None:
    """Measure both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    count = max(1, args.megabytes // 32)
    tensors = {f"t{i}": torch.randn(ROWS, 32 * 10**6 // 4 // ROWS) for i in range(count)}
    megabytes = sum(values.nbytes for values in tensors.values()) / 1e6
    here, there = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,))
    server.start()
    environment, url = here.recv()
    os.environ.update(environment)
    folder = tempfile.mkdtemp(prefix="flm-at-url-")
    try:
        rows = {"folder": str(Path(folder, "checkpoint")), "s3:// on loopback": url}
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
        for repeat in range(args.repeats):
            for name, where in rows.items():
                found[name].append(measured(where, f"-{repeat}", tensors))
        shard = next(Path(folder).glob("checkpoint-0/*.distcp"))
        sent, brought = by_boto(url, shard)
    finally:
        here.send(None)
        server.join()
        shutil.rmtree(folder)
    print(f"| {megabytes:.0f} MB | written, MB/s | verified, MB/s | read, MB/s |\n|---|---|---|---|")
    for name, times in found.items():
        speeds = [megabytes / statistics.median(column) for column in zip(*times, strict=True)]
        print(f"| {name} | " + " | ".join(f"{speed:.0f}" for speed in speeds) + " |")
    print(f"| boto3, a file of the same size | {megabytes / sent:.0f} | | {megabytes / brought:.0f} |")


if __name__ == "__main__":
    main()
