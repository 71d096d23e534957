"""Write a checkpoint grown into the next stage of a run file."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_megatron.cli.options.parser import path

if TYPE_CHECKING:
    from flm_megatron.checkpoint.logical import LogicalCheckpoint
    from flm_megatron.config.schema import RunConfig
    from flm_megatron.growth.certificate.forward import Layout

EPILOG = """\
Without --certify, and unless layers are chosen by distance, no model is built: torchrun or srun may start any number
of processes on CPU hosts, which share the work. Any field of the run file can be overridden:
--stages.1.growth.layers mask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm grow`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("source", type=path, help="checkpoint of the stage before")
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    parser.add_argument("--stage", required=True, help="stage to grow into")
    parser.add_argument("--out", required=True, type=path, help="folder to write")
    parser.add_argument(
        "--certify", type=path, metavar="TEXT", help="text file on which logits and loss are compared first"
    )
    parser.add_argument(
        "--distances", type=path, metavar="FILE", help="layer distances written by `flm distance --out`"
    )
    parser.epilog = EPILOG
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure what is asked for, then write."""
    from flm_megatron.checkpoint.opening import open_checkpoint
    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.config.stage_names import stage_index
    from flm_megatron.distributed.processes import Processes
    from flm_megatron.growth.boundary import grown_view, needs_distances
    from flm_megatron.growth.foreseen import check_run_file
    from flm_megatron.growth.offline import write_grown
    from flm_megatron.paths import require_folder

    require_folder(args.out, "--out")
    config = open_run(args.run_file, args.overrides)
    check_run_file(config)
    index = stage_index(config, args.stage)
    source = open_checkpoint(args.source)
    measures_distances = needs_distances(config, index) and not args.distances
    with _world(config, bool(args.certify) or measures_distances), _layouts(config) as under:
        distances = _distances(args, config, index, source, under) if needs_distances(config, index) else None
        view, plan = grown_view(source, config, index, distances)
        certificate = _certificate(args, config, index, view, under) if args.certify else None
        processes = Processes()
        manifest = write_grown(view, Path(args.out), processes, certificate)
    if processes.rank == 0:
        copies = [f"{layer.source}{' (copy)' if layer.copy else ''}" for layer in plan.layer_sources]
        print(f"{args.out}: stage {plan.stage}, layers from {', '.join(copies)}")
        print(f"logical hash {manifest['logical_hash']}")
    return 0


def _world(config: RunConfig, runs_a_model: bool) -> AbstractContextManager[Any]:
    from flm_megatron.distributed.launched import launched_processes
    from flm_megatron.distributed.world import tool_world

    return tool_world(config.distributed) if runs_a_model else launched_processes()


def _layouts(config: RunConfig) -> AbstractContextManager[Any]:
    from flm_megatron.distributed.world import Layouts

    return Layouts(config.distributed.timeout_s)


def _distances(
    args: argparse.Namespace, config: RunConfig, index: int, source: LogicalCheckpoint, under: Layout
) -> Any:
    """Read from a file, or measured on the run's validation text."""
    from flm_megatron.growth.certificate.measure import boundary_distances
    from flm_megatron.growth.distance import read_distances

    growth = config.stages[index].growth
    if args.distances:
        return read_distances(args.distances, growth.distance_metric if growth else "cosine")
    return boundary_distances(source, config, index, under)


def _certificate(args: argparse.Namespace, config: RunConfig, index: int, view: Any, under: Layout) -> Any:
    import torch.distributed as dist

    from flm_megatron.growth.certificate.measure import boundary_certificate
    from flm_megatron.growth.text import file_tokens

    growth = config.stages[index].growth
    tokens = file_tokens(args.certify, config, max(1, growth.certify_samples if growth else 4))
    certificate = boundary_certificate(view, config, index, under, tokens)
    if certificate and dist.get_rank() == 0:
        print(certificate.table())
    return certificate
