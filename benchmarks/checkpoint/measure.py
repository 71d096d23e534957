"""Memory and speed of the checkpoint tools beside `cp`, on this machine.

    python benchmarks/checkpoint/measure.py memory --folder /tmp/measure --millions 10 100 1000
    python benchmarks/checkpoint/measure.py speed --folder /tmp/measure --millions 300 --repeats 5 [--cold]
    python benchmarks/checkpoint/measure.py processes --folder /tmp/measure --millions 300 --processes 1 2
    python benchmarks/checkpoint/measure.py trillion

Prints Markdown. `--cold` empties the page cache before each run, which needs root. Checkpoints hold noise:
weights in bf16, fp32 masters and moments, 14 bytes for each parameter. The folder's contents are removed at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOL = str(ROOT / "tools" / "reshard_checkpoint.py")
FLM = [sys.executable, "-m", "flm_megatron.cli.main", "checkpoint"]
OWN_PEAK = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
try:
    runpy.run_module("flm_megatron.cli.main", run_name="__main__")
except SystemExit as stop:
    if stop.code:
        raise
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""
"""Runs the command and prints its peak resident MiB last. (What `wait4` tells holds the parent's peak as well.)"""


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a command. Raises CalledProcessError if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def peak(*arguments: object) -> float:
    """Peak resident MiB of `flm checkpoint` with these arguments."""
    command = [sys.executable, "-c", OWN_PEAK, "flm", "checkpoint", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def make(folder: Path, millions: int) -> Path:
    """A checkpoint of about so many million parameters with optimizer, at most 14 bytes each."""
    import torch

    from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
    from flm_megatron.checkpoint.logical import Region
    from flm_megatron.checkpoint.manifest import Manifest
    from flm_megatron.checkpoint.torch_dist.writer import copy_checkpoint
    from flm_megatron.config.schema import ModelConfig, RunConfig, StageConfig
    from flm_megatron.model.parameters import parameter_count

    hidden = {10: 256, 100: 768, 300: 1024, 1000: 2048}[millions]
    model = ModelConfig(hidden_size=hidden, ffn_hidden_size=hidden * 8 // 192 * 64, num_attention_heads=hidden // 64)
    model.vocab_size, model.num_layers = 8000, 1
    fixed = parameter_count(model)
    model.num_layers = 2
    model.num_layers = 1 + round((millions * 1e6 - fixed) / (parameter_count(model) - fixed))
    path, noise = folder / f"{millions}m", torch.randn(2**22)

    class Noise(InitialCheckpoint):
        """The same shapes with values that cost nothing: the same block of noise again and again."""

        def read(self, name: str, region: Region | None = None) -> torch.Tensor:
            """Values of a region."""
            assert region is not None and region.numel <= noise.numel()
            return noise[: region.numel].view(region.sizes).to(self.tensors[name].dtype)

    run_file = asdict(RunConfig(stages=[StageConfig(name="measured", model=model)]))
    checkpoint = Noise(model, 1, optimizer=True, dtype=torch.bfloat16)
    manifest = {"run": run_file, "stage": "measured", "step": 1, "optimizer_step": 1}
    copy_checkpoint(checkpoint, path, Manifest.from_json(manifest))
    print(f"<!-- {parameter_count(model):,} parameters, {size_of(path) / 1e9:.2f} GB -->", flush=True)
    return path


def size_of(path: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in path.iterdir())


def forget(cold: bool) -> None:
    """Write everything out, and empty the page cache if `cold`."""
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")


def memory(args: argparse.Namespace) -> None:
    """Peak resident memory of each tool by model size, above one that only opens the checkpoint (`inspect`)."""
    print("| parameters | inspect | reshard to tensor 2 x pipeline 2 | export-hf | verify | diff | classic, weights |")
    print("|---|---|---|---|---|---|---|")
    for millions in args.millions:
        source = make(args.folder, millions)
        out, classic, hf = (args.folder / name for name in ("out", "classic", "hf"))
        idle = peak("inspect", source)
        peaks = [
            peak("reshard", source, out, "--tensor", 2, "--pipeline", 2),
            peak("export-hf", source, hf),
            peak("verify", out),
            peak("diff", source, hf),
            peak("reshard", source, classic, "--format", "classic", "--tensor", 2),
        ]
        row = " | ".join(f"+ {value - idle:.0f} MiB" for value in peaks)
        print(f"| {millions} M | {idle:.0f} MiB | {row} |", flush=True)
        for path in (source, out, classic, hf):
            shutil.rmtree(path)


def speed(args: argparse.Namespace) -> None:
    """Re-sharding, merged and for a layout, beside `cp` and a sync of its files, in turn."""
    source, out = make(args.folder, args.millions[0]), args.folder / "out"
    nbytes = size_of(source)
    commands = {
        "cp, then sync": ["sh", "-c", f"cp -r {source} {out} && sync {out}/*"],
        "reshard, merged": [*FLM, "reshard", str(source), str(out)],
        "reshard, tensor 2 x pipeline 2": [*FLM, "reshard", str(source), str(out), "--tensor", "2", "--pipeline", "2"],
        "export-hf (weights only)": [*FLM, "export-hf", str(source), str(out)],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            forget(args.cold)
            wall, busy = run(command)
            times[name].append(wall)
            cpu[name].append(busy)
            shutil.rmtree(out)
    start, start_cpu = run([*FLM, "inspect", str(source)])
    shutil.rmtree(source)
    print(f"{'Cold' if args.cold else 'Warm'} page cache, {nbytes / 1e9:.2f} GB, medians of {args.repeats}. Starting")
    print(
        f"Python, importing torch and reading the metadata (`inspect`) takes {start:.1f} s ({start_cpu:.1f} s of CPU)"
    )
    print(f"of each but cp's. Load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.\n")
    print("| command | s | s after start | CPU s after start | all runs, s |\n|---|---|---|---|---|")
    for name, values in times.items():
        middle, busy, is_cp = statistics.median(values), statistics.median(cpu[name]), name.startswith("cp")
        bare = (middle, busy) if is_cp else (middle - start, busy - start_cpu)
        every = ", ".join(f"{value:.1f}" for value in sorted(values))
        print(f"| {name} | {middle:.2f} | {bare[0]:.2f} | {bare[1]:.2f} | {every} |")


def processes(args: argparse.Namespace) -> None:
    """Wall time of re-sharding by several processes under torchrun."""
    source, out = make(args.folder, args.millions[0]), args.folder / "out"
    print("| processes | median s | all runs |\n|---|---|---|")
    for count in args.processes:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(count), TOOL]
        values = []
        for _ in range(args.repeats):
            forget(args.cold)
            values.append(run([*torchrun, str(source), str(out)])[0])
            shutil.rmtree(out)
        spread = ", ".join(f"{value:.1f}" for value in sorted(values))
        print(f"| {count} | {statistics.median(values):.2f} | {spread} |", flush=True)
    shutil.rmtree(source)


def trillion(args: argparse.Namespace) -> None:
    """One rank's whole shard of tensor 32 x pipeline 28 at the shapes of 1T, streamed out of an initial checkpoint."""
    import torch

    from flm_megatron.checkpoint.lazy.initial import InitialCheckpoint
    from flm_megatron.checkpoint.regions import split_region
    from flm_megatron.checkpoint.sharding.layout import rank_regions
    from flm_megatron.checkpoint.torch_dist.logical_hash import partial_hash
    from flm_megatron.config.presets import load_preset
    from flm_megatron.config.schema import ModelConfig, ParallelConfig

    model = ModelConfig(**(load_preset("tele-flm-1t")["model"] | {"vocab_size": 80_000}))
    checkpoint = InitialCheckpoint(model, 1, dtype=torch.bfloat16)
    before, started, count, total = peak_mib(), time.perf_counter(), 0, 0
    for name, regions in rank_regions(model, ParallelConfig(tensor=32, pipeline=28), 17, 5).items():
        for region in regions:
            for part in split_region(region, 2**22):
                total += partial_hash(checkpoint.tensors[name].shape, part, checkpoint.read(name, part))
                count += part.numel
    seconds = time.perf_counter() - started
    print(f"{count:,} values of rank (17, 5) in {seconds:.0f} s, peak {peak_mib() - before:.0f} MiB above the imports")


def peak_mib() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "speed", "processes", "trillion"])
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/measure"), help="scratch folder on the disk to measure"
    )
    parser.add_argument("--millions", type=int, nargs="+", default=[100], help="sizes: 10, 100, 300, 1000")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="empty the page cache before each run (root)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    globals()[args.what](args)


if __name__ == "__main__":
    main()
