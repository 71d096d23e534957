"""Copy a checkpoint to another file layout, dtype or format, in bounded memory.

Without --tensor and --pipeline the copy is merged: its tensors are spread evenly over one file for each process that
writes. With them, rank r of that layout finds what it will load in files of its own, so that a large job starts fast;
with --format classic these are Megatron-LM's mp_rank folders (weights only). Any layout can load any of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_megatron.cli.checkpoint.options import add_dtype, add_vocab_size
from flm_megatron.cli.options.parser import path, positive
from flm_megatron.errors import RequestError

if TYPE_CHECKING:
    from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint
    from flm_megatron.checkpoint.logical import LogicalCheckpoint
    from flm_megatron.config.schema import ModelConfig, ParallelConfig
    from flm_megatron.distributed.processes import Processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm checkpoint reshard`."""
    parser.add_argument("source", type=path, help="checkpoint of any format")
    parser.add_argument("destination", type=path, help="new folder")
    parser.add_argument("--format", choices=["torch_dist", "classic"], default="torch_dist", help="format to write")
    parser.add_argument("--tensor", type=positive, help="tensor-parallel size of the target layout")
    parser.add_argument("--pipeline", type=positive, help="pipeline-parallel size of the target layout")
    parser.add_argument("--virtual-pipeline", type=positive, default=1, help="model chunks per pipeline rank")
    parser.add_argument("--no-optimizer", action="store_true", help="weights only")
    add_dtype(parser)
    add_vocab_size(parser)


def run(args: argparse.Namespace) -> int:
    """Copy, and print the logical hash before and after; returns 0."""
    from flm_megatron.checkpoint.lazy.adapters import merged
    from flm_megatron.checkpoint.lazy.converted import ConvertedCheckpoint
    from flm_megatron.cli.checkpoint.options import open_with_model, require_new, torch_dtype, without_mask
    from flm_megatron.config.schema import ParallelConfig
    from flm_megatron.distributed.launched import launched_processes

    if args.virtual_pipeline > 1 and (args.pipeline or 1) < 2:
        raise RequestError(f"--virtual-pipeline {args.virtual_pipeline} needs a --pipeline of at least 2")
    require_new(args.destination)
    with launched_processes() as processes:
        source, model = open_with_model(args.source, args.vocab_size)
        if args.format == "classic":
            source, model = merged(without_mask(source, fold=False), model)
        if not args.no_optimizer and args.format == "torch_dist":
            source.has_optimizer()  # refuses optimizer state that has no names
        view = ConvertedCheckpoint(
            source, torch_dtype(args.dtype), optimizer=not args.no_optimizer and args.format == "torch_dist"
        )
        parallel = None
        if args.tensor or args.pipeline or args.format == "classic":
            parallel = ParallelConfig(
                tensor=args.tensor or 1, pipeline=args.pipeline or 1, virtual_pipeline=args.virtual_pipeline
            )
        if args.format == "classic":
            assert parallel is not None
            _classic(args, view, model, parallel, processes)
        else:
            _torch_dist(args, view, model, parallel, processes)
    return 0


def _classic(
    args: argparse.Namespace,
    view: LogicalCheckpoint,
    model: ModelConfig,
    parallel: ParallelConfig,
    processes: Processes,
) -> None:
    from flm_megatron.checkpoint.megatron_legacy.reader import MegatronLegacyCheckpoint
    from flm_megatron.checkpoint.megatron_legacy.writer import write_megatron_legacy
    from flm_megatron.checkpoint.tools.hashing import shared_hashes

    sequence_length = (view.manifest.get("run") or {}).get("data", {}).get("sequence_length", 4096)
    before = shared_hashes(view, processes)
    write_megatron_legacy(view, args.destination, (model, parallel), processes, sequence_length)
    after = shared_hashes(MegatronLegacyCheckpoint(args.destination), processes)
    _report(processes, before, after, args.destination)


def _torch_dist(
    args: argparse.Namespace,
    view: ConvertedCheckpoint,
    model: ModelConfig,
    parallel: ParallelConfig | None,
    processes: Processes,
) -> None:
    from flm_megatron.checkpoint.stage_manifest import manifest_for
    from flm_megatron.checkpoint.tools.hashing import recorded_hashes, shared_hashes
    from flm_megatron.checkpoint.tools.reshard import reshard

    before = recorded_hashes(view.source, view) or shared_hashes(view, processes)
    manifest = manifest_for(view, model, args.source)
    target = (model, parallel) if parallel else None
    after: dict[str, Any] = reshard(view, args.destination, processes, manifest, target)["tensors"]
    _report(processes, before, after, args.destination)


def _report(processes: Processes, before: dict[str, str], after: dict[str, str], path: Path) -> None:
    """Print both hashes; on a difference remove what was written and raise DamagedError."""
    import shutil

    from flm_megatron.checkpoint.torch_dist.logical_hash import combine_hashes
    from flm_megatron.errors import DamagedError

    changed = [name for name in before if after.get(name) != before[name]]
    if processes.rank == 0:
        print(f"logical hash before {combine_hashes(before)}\nlogical hash after  {combine_hashes(after)}")
        if changed:
            shutil.rmtree(path)
    if changed:
        raise DamagedError(f"{changed[0]}: its values are not those that were recorded for the source; {path} removed")
