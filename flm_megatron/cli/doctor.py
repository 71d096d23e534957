"""Check the machines before a run; under torchrun or srun, all of them together."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from flm_megatron.cli.options.output import add_json, print_json
from flm_megatron.cli.options.parser import path, real, whole

if TYPE_CHECKING:
    from flm_megatron.config.schema import RunConfig
    from flm_megatron.launch.doctor.findings import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm doctor`; anything else of the form `--field value` overrides the run file."""
    parser.add_argument("run_file", type=path, help="run file (YAML)")
    parser.add_argument(
        "--port", type=whole(1, 65535), default=29400, help="launcher's port, if not launched (default 29400)"
    )
    parser.add_argument(
        "--timeout-s", type=real(0.0, 1e6, above=True), default=60.0, help="longest wait for another rank (default 60)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run a rank of every role through one step, without values"
    )
    add_json(parser)
    parser.epilog = "Exit status 2 if something would stop the run. Start it as `flm train` would be, on every node."
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Examine, and print one screen on rank 0."""
    import os

    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.distributed.world import launched
    from flm_megatron.launch.doctor.findings import status_of
    from flm_megatron.launch.doctor.host import Place, examine_host, facts
    from flm_megatron.launch.run import local_processes

    config = open_run(args.run_file, args.overrides)
    size = largest_checkpoint(config)
    if not launched():
        here = max((local_processes(config, stage) for stage in config.stages), default=1)
        findings = examine_host(config, Place(here, None, args.port, size), args.rehearse)
        _show(findings, args.json)
        return status_of(findings)
    from flm_megatron.launch.doctor.peers import examine_together

    world = int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    leader = os.environ.get("LOCAL_RANK", "0") == "0"
    # What ranks do at their true size is the same wherever it is rehearsed.
    rehearse = args.rehearse and os.environ.get("RANK") == "0"
    own = examine_host(config, Place(here, world, None, size), rehearse) if leader else []
    findings, status = examine_together(config, own, facts(config) if leader else {}, args.timeout_s)
    if findings:
        _show(findings, args.json)
    return status


def _show(findings: list[Finding], as_json: bool) -> None:
    """Print the findings: each with level (ok, warn, stop), topic, text and host, or a line for each topic."""
    from flm_megatron.launch.doctor.findings import render, status_of

    if as_json:
        print_json({"findings": [vars(finding) for finding in findings], "would_fail": bool(status_of(findings))})
    else:
        print(render(findings), flush=True)


def largest_checkpoint(run: RunConfig) -> int | None:
    """Bytes of the largest stage's checkpoint; none while the vocabulary is not known."""
    from flm_megatron.config.loader import resolve_vocabulary
    from flm_megatron.data.tokenizer import open_tokenizer
    from flm_megatron.errors import FlmError
    from flm_megatron.model.parameters import parameter_count
    from flm_megatron.planner.plan import checkpoint_bytes

    try:
        if run.tokenizer and any(stage.model.vocab_size is None for stage in run.stages):
            run = resolve_vocabulary(run, open_tokenizer(run.tokenizer).vocab_size)
        weights = {"fp32": 4, "bf16": 2}
        sizes = [checkpoint_bytes(parameter_count(stage.model), weights[stage.precision]) for stage in run.stages]
    except (FlmError, ValueError):
        return None  # the doctor names the reason among its findings
    return max(sizes, default=None)
