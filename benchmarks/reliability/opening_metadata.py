"""Time to read the metadata of a checkpoint of very many regions, beside Python's own unpickler, which is not safe.

python benchmarks/reliability/opening_metadata.py --regions 245000
"""

from __future__ import annotations

import argparse
import gc
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flm_megatron.checkpoint.logical import Region, TensorInfo
from flm_megatron.checkpoint.torch_dist.metadata import parse_metadata
from flm_megatron.checkpoint.torch_dist.reader import TorchDistCheckpoint
from flm_megatron.checkpoint.torch_dist.shard_file import Record
from flm_megatron.checkpoint.torch_dist.writer import _metadata

TENSORS = 27  # of a decoder with masters and one moment
FILES = 896


def made_up(regions: int) -> bytes:
    """Metadata of a checkpoint of about so many regions, as a save writes it."""
    each = regions // TENSORS
    tensors = {f"decoder.layers.tensor_{i}": TensorInfo((140, 20 * each, 2048), torch.bfloat16) for i in range(TENSORS)}
    records = [
        Record(name, Region((k % 140, 20 * k, 0), (1, 20, 2048)), f"__{k % FILES}_0.distcp", 100_000 * k, 99_999)
        for name in tensors
        for k in range(each)
    ]
    return pickle.dumps(_metadata(tensors, records))


def seconds(act: Callable[[], object], times: int = 3) -> float:
    """Processor time of the fastest of a few."""
    spent = []
    for _ in range(times):
        gc.collect()
        began = time.process_time()
        kept = act()
        spent.append(time.process_time() - began)
        del kept
    return min(spent)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=245_000)
    args = parser.parse_args()
    data = made_up(args.regions)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ".metadata").write_bytes(data)
        rows = {
            "pickle.loads": seconds(lambda: pickle.loads(data)),
            "parse_metadata": seconds(lambda: parse_metadata(data, "metadata")),
            "TorchDistCheckpoint": seconds(lambda: TorchDistCheckpoint(folder)),
        }
    print(f"{args.regions:,} regions, {len(data) / 1e6:.1f} MB")
    for name, spent in rows.items():
        print(f"{name:20} {spent:5.2f} s")


if __name__ == "__main__":
    main()
