"""The script that starts a job: templates filled in from the job and the site's options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

from flm_megatron.errors import RequestError, one_line
from flm_megatron.launch.cluster.environment import Variable, as_shell, as_yaml, environment, shutdown_timeout
from flm_megatron.launch.cluster.job import Job

LAUNCHERS = ("torchrun", "slurm", "kubernetes")
HEAD = "${HEAD_NODE:?set it to the name or address of the first node}"
PORT = 29400
ELASTIC = (
    "# A failure starts the ranks of all nodes again from the last checkpoint; a node that comes back joins again."
)
STATIC = "# A failure ends the script on every node; started again on all, it goes on from the last checkpoint."
WORD = re.compile(r"[\w.:/@,+=\[\]-]+")
SPARE_S = 30
"""Part of the grace period that is left for the container or the job to end after its ranks."""


@dataclass(frozen=True)
class Site:
    """Options of a cluster."""

    fabric: str = "infiniband"
    interface: str | None = None
    rendezvous: str = "c10d"
    """torchrun: `c10d` (elastic) or `static`."""
    endpoint: str | None = None
    """torchrun: HOST:PORT of the first node; none leaves it to HEAD_NODE."""
    time: str = "1-00:00:00"
    """Slurm: time limit of one job; the job queues itself again until its stage is done."""
    partition: str | None = None
    image: str = "flm-megatron:latest"
    """Kubernetes: container image."""
    claim: str = "flm-megatron"
    """Kubernetes: volume claim that holds data and runs, mounted by all pods."""


def render(job: Job, launcher: str, site: Site) -> str:
    """The script (torchrun, Slurm) or manifest (Kubernetes) of a job.

    Raises:
        RequestError: an option of the site does not fit.
    """
    _check_words(job, site)
    return {"torchrun": _torchrun, "slurm": _slurm, "kubernetes": _kubernetes}[launcher](job, site)


def _check_words(job: Job, site: Site) -> None:
    """Values that are inserted unquoted must be single words: no spaces, quotes or line ends."""
    for name in ("interface", "endpoint", "time", "partition", "image", "claim"):
        value = getattr(site, name)
        if value is not None and not WORD.fullmatch(value):
            raise RequestError(f"--{name} {value!r} is no single word: use letters, digits and . : / @ _ , + = [ ] -")
    if one_line(job.run_file) != job.run_file:
        raise RequestError(f"run file {job.run_file!r} has a control character in its name: rename it")


def _torchrun(job: Job, site: Site) -> str:
    return _fill(
        "torchrun.sh",
        job,
        site,
        environment=as_shell([*_variables(job, site), shutdown_timeout(job.grace_s)]),
        rendezvous=_rendezvous(job, site),
        failures=STATIC if site.rendezvous == "static" else ELASTIC,
        command=job.command(),
    )


def _rendezvous(job: Job, site: Site) -> str:
    if job.nodes == 1:
        return "--standalone"
    host, _, port = (site.endpoint or "").partition(":")
    host, port = host or HEAD, port or str(PORT)
    if not port.isdigit():
        raise RequestError(f"--endpoint {site.endpoint} is not HOST:PORT, such as node001:{PORT}")
    if site.rendezvous == "static":
        rank = "${NODE_RANK:?set it to 0 on the first node, 1 on the next, and so on}"
        return f'--node-rank "{rank}" \\\n    --master-addr "{host}" --master-port {port}'
    meet = f'--rdzv-backend c10d --rdzv-endpoint "{host}:{port}"'
    return f"{meet} \\\n    --rdzv-id {job.name} --rdzv-conf join_timeout=1800"


def _slurm(job: Job, site: Site) -> str:
    stages = [f"submit {stage.name} {job.nodes_of(stage)}" for stage in job.stages]
    return _fill(
        "slurm.sh",
        job,
        site,
        environment=as_shell(_variables(job, site)),
        submissions="\n    ".join(stages),
        time=site.time,
        partition=f"#SBATCH --partition={site.partition}\n" if site.partition else "",
        devices=f"#SBATCH --gpus-per-node={job.per_node}\n" if job.gpu else "",
        command=job.command(stage='"$stage"'),
    )


def _kubernetes(job: Job, site: Site) -> str:
    lines = ["limits:", f"  nvidia.com/gpu: {job.per_node}"] if job.gpu else ["requests:", f"  cpu: {job.per_node}"]
    if job.gpu and job.nodes > 1 and site.fabric != "tcp":
        lines.append(f"  rdma/hca: {job.per_node}  # the resource name of the cluster's RDMA device plugin")
    return _fill(
        "kubernetes.yaml",
        job,
        site,
        environment=as_yaml([*_variables(job, site), shutdown_timeout(job.grace_s)], 16),
        image=site.image,
        claim=site.claim,
        resources=("\n" + " " * 16).join(lines),
        command=job.command(),
    )


def _variables(job: Job, site: Site) -> list[Variable]:
    return environment(job.gpu, job.nodes, site.fabric, site.interface)


def _fill(template: str, job: Job, site: Site, **values: str) -> str:
    """The template with each `{{name}}` replaced, from `values` and the values that all templates share."""
    text = files(__package__).joinpath("templates").joinpath(template).read_text(encoding="utf-8")
    values |= {
        "summary": "\n".join(f"#   {line}" for line in job.summary()),
        "run_file": job.run_file,
        "job": job.name,
        "nodes": str(job.nodes),
        "per_node": str(job.per_node),
        # Without the elastic rendezvous nobody tells the other nodes to start again.
        "restarts": str(0 if site.rendezvous == "static" else job.restarts),
        "grace": str(job.grace_s + SPARE_S),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)
