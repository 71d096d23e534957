"""Reading and writing in bounded memory, whatever the size of tensors and chunks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
import torch
from flm_megatron.checkpoint.logical import LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.opening import open_checkpoint
from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
from flm_megatron.device import current

ROWS, COLUMNS = int(sys.argv[2]), 4096

class Ramp(LogicalCheckpoint):
    manifest = Manifest()
    tensors = {"x": TensorInfo((ROWS, COLUMNS), torch.float32)}
    def read(self, name, region=None):
        rows = torch.arange(region.offsets[0], region.offsets[0] + region.sizes[0], dtype=torch.float32)
        columns = torch.arange(region.offsets[1], region.offsets[1] + region.sizes[1], dtype=torch.float32)
        return rows[:, None] + columns / COLUMNS

path = Path(sys.argv[1])
device = current()
device.reset_peak_memory()
before = device.peak_memory_gib()
copy_checkpoint(Ramp(), path / "a")
writing = device.peak_memory_gib() - before
torch.distributed.checkpoint.save({"x": Ramp().read("x", Region((0, 0), (ROWS, COLUMNS)))},
                                  checkpoint_id=str(path / "one"), no_dist=True)
device.reset_peak_memory()
before = device.peak_memory_gib()
checkpoint = open_checkpoint(path / "one")  # one chunk
column = checkpoint.read("x", Region((0, 1000), (ROWS, 8)))
band = checkpoint.read("x", Region((0, 0), (ROWS, 256)))
rows = checkpoint.read("x", Region((ROWS // 2, 5), (100, 77)))
copy_checkpoint(checkpoint, path / "b")
reading = device.peak_memory_gib() - before
assert torch.equal(column, Ramp().read("x", Region((0, 1000), (ROWS, 8))))
assert torch.equal(band, Ramp().read("x", Region((0, 0), (ROWS, 256))))
assert torch.equal(rows, Ramp().read("x", Region((ROWS // 2, 5), (100, 77))))
print(writing * 1024, reading * 1024)
"""


def test_memory_does_not_grow_with_the_chunk(tmp_path: Path) -> None:
    rows = 32_000  # 500 MiB in one chunk: half of it is far above what buffers and threads take on a busy machine
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), str(rows)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    writing_mib, reading_mib = map(float, done.stdout.split())
    assert writing_mib < 250 and reading_mib < 250, (writing_mib, reading_mib)
