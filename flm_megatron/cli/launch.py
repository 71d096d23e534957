"""Start a run on a cluster, or print what would start it."""

from __future__ import annotations

import argparse
import sys

from flm_megatron.cli.options.parser import count, path, processes, whole

TOOLS = {"torchrun": "bash", "slurm": "sbatch", "kubernetes": "kubectl"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `flm launch`; anything else of the form `--field value` overrides the run file."""
    from flm_megatron.launch.cluster.site import APIS

    parser.add_argument("run_file", type=path, help="run file (YAML), under a path that every node sees")
    parser.add_argument("--on", required=True, choices=TOOLS, help="what starts the processes")
    parser.add_argument("--nodes", type=processes, default=1, help="nodes (default 1)")
    parser.add_argument("--processes-per-node", type=processes, default=8, help="processes, one per GPU, of a node")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what the nodes have (default cuda)")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--stage", help="only this stage")
    part.add_argument("--branch", metavar="decay@TOKENS", help="only this branch, as `flm train` takes it")
    parser.add_argument(
        "--rehearse", action="store_true", help="first run a rank of every role through one step, without values"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script or manifest and stop")
    parser.add_argument(
        "--grace-s", type=whole(1, 30 * 86400), default=120, help="seconds to save in after SIGTERM (default 120)"
    )
    parser.add_argument(
        "--max-restarts", type=count, default=10, help="restarts of the ranks, and of all pods (default 10)"
    )
    parser.add_argument("--fabric", choices=("infiniband", "roce", "tcp"), default="infiniband", help="network")
    parser.add_argument("--interface", help="network card for first contact and gloo, such as eth0")
    parser.add_argument("--rendezvous", choices=("c10d", "static"), default="c10d", help="torchrun: elastic or static")
    parser.add_argument("--endpoint", help="torchrun: HOST:PORT of the first node (default: $HEAD_NODE:29400)")
    parser.add_argument("--time", default="1-00:00:00", help="Slurm: time limit of one job (default a day)")
    parser.add_argument("--partition", help="Slurm: partition")
    parser.add_argument(
        "--api",
        choices=APIS,
        default="trainjob",
        help="Kubernetes: kind of job (default trainjob, of Kubeflow Trainer)",
    )
    parser.add_argument("--queue", help="Kubernetes: Kueue's queue that admits the job")
    parser.add_argument(
        "--container", choices=("pyxis", "apptainer"), help="Slurm: run the ranks in --image, by Pyxis or Apptainer"
    )
    parser.add_argument(
        "--mounts", help="with --container: folders to mount beside this one, /FOLDER[:/FOLDER_INSIDE], by commas"
    )
    parser.add_argument("--image", default="flm-megatron:latest", help="container image, or with --container its file")
    parser.add_argument("--image-pull-secret", help="Kubernetes: secret that opens the image's registry")
    parser.add_argument("--claim", default="flm-megatron", help="Kubernetes: volume claim with data and runs")
    parser.epilog = (
        "Slurm gets one job per stage, the others one for all stages. Without --dry-run what is printed is also "
        "written to the run's output folder and started: torchrun on this node, the others through sbatch or kubectl."
    )
    parser.set_defaults(accepts_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the script, or start it in place of this process."""
    from dataclasses import fields

    from flm_megatron.checkpoint.run_file import open_run
    from flm_megatron.launch.cluster.job import plan_job
    from flm_megatron.launch.cluster.script import render
    from flm_megatron.launch.cluster.site import Site
    from flm_megatron.paths import require_folder

    config = open_run(args.run_file, args.overrides)
    if args.branch is not None:
        from flm_megatron.launch.branch import decay_branch

        config = decay_branch(config, args.branch)
        args.stage = config.stages[-1].name
    if not args.dry_run:
        require_folder(config.output, "output")
    job = plan_job(
        config,
        args.run_file,
        args.overrides,
        args.nodes,
        args.processes_per_node,
        stage=args.stage,
        separate=args.on == "slurm",
        gpu=args.device == "cuda",
        grace_s=args.grace_s,
        restarts=args.max_restarts,
        branch=args.branch,
    )
    site = Site(**{each.name: getattr(args, each.name) for each in fields(Site)})
    text = render(job, args.on, site)
    if args.rehearse:
        from flm_megatron.api.rehearse import rehearse

        found = rehearse(config, gpus=args.nodes * args.processes_per_node, stage=args.stage)
        print(found, file=sys.stderr)
    if args.dry_run:
        print(text, end="")
        return 0
    return _start(args.on, text, config.output)


def _start(launcher: str, text: str, output: str) -> int:
    """Write the script beside the run's results and become the tool that starts it."""
    import os
    import shutil
    from pathlib import Path

    from flm_megatron.errors import RequestError

    tool = TOOLS[launcher]
    if shutil.which(tool) is None:
        raise RequestError(f"{tool} is not on this machine: run `flm launch` where it is, or see --dry-run")
    path = Path(output) / ("launch.yaml" if launcher == "kubernetes" else "launch.sh")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    command = ["kubectl", "apply", "-f", str(path)] if launcher == "kubernetes" else ["bash", str(path)]
    os.execvp(command[0], command)
