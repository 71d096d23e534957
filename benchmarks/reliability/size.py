"""What grows with the number of layouts, of ranks and of values: measured, or made up where the ranks are not there.

OMP_NUM_THREADS=1 python benchmarks/reliability/size.py layouts --processes 4 [--bare-engine]
OMP_NUM_THREADS=1 python benchmarks/reliability/size.py agree --ranks 2000
OMP_NUM_THREADS=1 python benchmarks/reliability/size.py replicas
OMP_NUM_THREADS=1 python benchmarks/reliability/size.py update [--whole]
"""

from __future__ import annotations

import argparse
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from flm_megatron.checkpoint.logical import MASTER, LogicalCheckpoint, Region, TensorInfo
from flm_megatron.checkpoint.manifest import Manifest
from flm_megatron.checkpoint.torch_dist.shard_file import Record, Written
from flm_megatron.config.schema import DistributedConfig, ModelConfig, ParallelConfig, StageConfig
from flm_megatron.distributed.channels import StoreChannel, gathered
from flm_megatron.distributed.local_processes import run_processes
from flm_megatron.distributed.processes import Processes
from flm_megatron.optim import by_entry

MIB = 2**20
CONNECTIONS = 40
"""To the store, of the made-up ranks of one machine."""
REGIONS = 245_000
"""Records of a checkpoint of the 1T stage."""


def held() -> str:
    """What this process holds."""
    gc.collect()
    process = psutil.Process()
    return f"{len(_world.pg_map):7d}{process.num_fds():13d}{process.num_threads():9d}"


def six_layouts(bare: bool) -> int:
    """Six layouts one after the other; rank 0 prints what is held after each."""
    from flm_megatron.distributed.world import layout

    world = dist.get_world_size()
    kinds = [ParallelConfig(tensor=world), ParallelConfig(pipeline=world), ParallelConfig(tensor=2)]
    lines = [f"layout   groups  descriptors  threads\n0       {held()}"]
    for number, parallel in enumerate(kinds * 2, 1):
        if bare:
            _bare_layout(parallel)
        else:
            with layout(parallel, 600):
                pass
        dist.barrier()
        lines.append(f"{number}       {held()}")
        dist.barrier()
    if dist.get_rank() == 0:
        print("\n".join(lines))
    return 0


def _bare_layout(parallel: ParallelConfig) -> None:
    """As megatron-core alone does it."""
    from flm_megatron.engine import parallel_state

    parallel_state.initialize_model_parallel(parallel)
    parallel_state.destroy_model_parallel()


def agree(ranks: int, delay_s: float) -> None:
    """A save of the 1T stage by so many ranks, threads of this process: all but its writing."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(CONNECTIONS)]
    process = psutil.Process()
    before, files = process.memory_info().rss, process.num_fds()
    sizes: list[int] = []
    began = time.perf_counter()

    def save(rank: int) -> float:
        processes = Processes(StoreChannel(clients[rank % CONNECTIONS], rank, ranks, timedelta(minutes=10)))
        processes.on_first(lambda: None)
        results = processes.together(lambda: _written(rank, ranks, delay_s))
        told = processes.on_first(
            lambda: {"files": {}, "run": "x" * 20_000, "records": sum(len(r.records) for r in results)}
        )
        records = told["records"]
        if rank == 0 and isinstance(records, int):
            sizes.append(records)
        return time.perf_counter() - began

    stack = threading.stack_size(512 * 1024)
    with ThreadPoolExecutor(ranks) as executor:
        seconds = max(executor.map(save, range(ranks)))
    threading.stack_size(stack)
    print(
        f"{ranks} ranks, {sizes[0]} records, each rank writes for {delay_s:g} s: {seconds:.1f} s in all, "
        f"{(process.memory_info().rss - before) / MIB:.0f} MiB for all ranks together, "
        f"{process.num_fds() - files} more descriptors, {server.num_keys()} entries left in the store"
    )


def _written(rank: int, ranks: int, delay_s: float) -> Written:
    time.sleep(delay_s)
    region = Region((rank, 0), (1, 8192))
    count = REGIONS * (rank + 1) // ranks - REGIONS * rank // ranks
    records = [
        Record("optimizer.state.exp_avg.decoder.layers", region, f"__{rank}_0.distcp", i, 1) for i in range(count)
    ]
    return Written({}, records=records)


class Counted(LogicalCheckpoint):
    """Random weights that count the bytes that are read of them."""

    def __init__(self, model: ModelConfig) -> None:
        from flm_megatron.model.parameters import parameter_specs

        shapes = {name: tuple(spec.shape) for name, spec in parameter_specs(model).items()}
        self.tensors = {
            prefix + name: TensorInfo(s, torch.float32) for prefix in ("", MASTER) for name, s in shapes.items()
        }
        self.manifest, self.nbytes = Manifest(), 0

    def read(self, name: str, region: Region | None = None) -> torch.Tensor:
        """Values that do not matter."""
        values = torch.full((region or Region.whole(self.tensors[name].shape)).sizes, 0.01)
        self.nbytes += values.nbytes
        return values


def replicas() -> int:
    """Certify a growth under tensor 2 x data 2; rank 0 prints what each rank read."""
    from flm_megatron.config.schema import GrowthConfig
    from flm_megatron.distributed.world import Layouts
    from flm_megatron.growth.certificate.certificate import certify
    from flm_megatron.growth.grown.checkpoint import GrownCheckpoint
    from flm_megatron.growth.plan import make_plan

    old = ModelConfig(num_layers=4, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, vocab_size=1000)
    new = ModelConfig(num_layers=6, hidden_size=256, ffn_hidden_size=768, num_attention_heads=8, vocab_size=1000)
    stage = StageConfig(name="big", model=new, parallel=ParallelConfig(tensor=2), precision="bf16")
    source, tokens = Counted(old), torch.arange(4 * 65).view(4, 65)
    plan = make_plan(old, new, GrowthConfig(mask_steps=10, layer_selection="interleave"), seed=1, stage="big")
    with Layouts(600) as under:
        certify(source, GrownCheckpoint(source, plan), plan, stage, tokens, under)
    everyone = gathered(source.nbytes)
    if dist.get_rank() == 0:
        print("MiB read by ranks 0 to 3 (tensor 2, data 2):", *(f"{nbytes / MIB:.1f}" for nbytes in everyone))
    return 0


def update(whole: bool) -> None:
    """One update by age of 128 million values: the most memory that it took beside them."""
    if whole:
        by_entry.CHUNK_VALUES = 2**62
    count = 2**27
    param = torch.nn.Parameter(torch.zeros(count))
    param.grad = torch.ones(count)
    state = {name: torch.zeros(count, dtype=kind) for name, kind in STATE.items()}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 9}
    before, began = _peak(), time.perf_counter()
    by_entry.update_by_entry(param, state, group)
    seconds = time.perf_counter() - began
    print(f"{(_peak() - before) / count:.2f} bytes a value beside the state, {seconds:.2f} s, {count} values")


STATE = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "step_offset": torch.int32}


def _peak() -> int:
    """Largest resident set so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    """Measure one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layouts", "agree", "replicas", "update"])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--bare-engine", action="store_true", help="layouts as megatron-core makes and forgets them")
    parser.add_argument("--ranks", type=int, default=2000)
    parser.add_argument("--write-s", type=float, default=1.0, help="how long each made-up rank writes")
    parser.add_argument("--whole", action="store_true", help="update the whole tensor at once")
    options = parser.parse_args()
    timeout_s = DistributedConfig().timeout_s
    if options.what == "layouts":
        run_processes(options.processes, six_layouts, (options.bare_engine,), timeout_s)
    elif options.what == "agree":
        agree(options.ranks, options.write_s)
    elif options.what == "replicas":
        run_processes(4, replicas, (), timeout_s)
    else:
        update(options.whole)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
