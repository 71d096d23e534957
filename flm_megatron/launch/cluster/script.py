"""The script that starts a job: templates filled in from the job and the site's options."""

from __future__ import annotations

import re

from flm_megatron.errors import RequestError, one_line
from flm_megatron.launch.cluster.container import container_words
from flm_megatron.launch.cluster.environment import Variable, as_shell, environment, shutdown_timeout
from flm_megatron.launch.cluster.job import Job
from flm_megatron.launch.cluster.kubernetes import manifest
from flm_megatron.launch.cluster.site import Site
from flm_megatron.launch.cluster.template import fill, shared_values

LAUNCHERS = ("torchrun", "slurm", "kubernetes")
HEAD = "${HEAD_NODE:?set it to the name or address of the first node}"
PORT = 29400
ELASTIC = (
    "# A failure starts the ranks of all nodes again from the last checkpoint; a node that comes back joins again."
)
STATIC = "# A failure ends the script on every node; started again on all, it goes on from the last checkpoint."
WORD = re.compile(r"[\w.:/@#,+=\[\]-]+")


def render(job: Job, launcher: str, site: Site) -> str:
    """The script (torchrun, Slurm) or manifest (Kubernetes) of a job.

    Raises:
        RequestError: an option of the site does not fit.
    """
    _check_words(job, site)
    if launcher != "slurm" and site.container:
        raise RequestError(f"--container {site.container} is for --on slurm: {launcher} runs where it is started")
    if launcher == "kubernetes":
        return manifest(job, site, _variables(job, site))
    return _torchrun(job, site) if launcher == "torchrun" else _slurm(job, site)


def _check_words(job: Job, site: Site) -> None:
    """Values that are inserted unquoted must be single words: no spaces, quotes or line ends."""
    for name in ("interface", "endpoint", "time", "partition", "image", "claim", "queue"):
        value = getattr(site, name)
        if value is not None and not WORD.fullmatch(value):
            raise RequestError(f"--{name} {value!r} is no single word: use letters, digits and . : / @ # _ , + = [ ] -")
    if one_line(job.run_file) != job.run_file:
        raise RequestError(f"run file {job.run_file!r} has a control character in its name: rename it")


def _torchrun(job: Job, site: Site) -> str:
    static = site.rendezvous == "static"
    values = {
        "environment": as_shell([*_variables(job, site), shutdown_timeout(job.grace_s)]),
        "rendezvous": _rendezvous(job, site),
        "failures": STATIC if static else ELASTIC,
        "command": job.command(),
    }
    if static:  # nobody tells the other nodes to start again
        values["restarts"] = "0"
    return fill("torchrun.sh", shared_values(job) | values)


def _rendezvous(job: Job, site: Site) -> str:
    if job.nodes == 1:
        return "--standalone"
    host, _, port = (site.endpoint or "").partition(":")
    host, port = host or HEAD, port or str(PORT)
    if not port.isdigit():
        raise RequestError(f"--endpoint {site.endpoint} is not HOST:PORT, such as node001:{PORT}")
    if site.rendezvous == "static":
        rank = "${NODE_RANK:?set it to 0 on the first node, 1 on the next, and so on}"
        return f'--node-rank "{rank}" \\\n--master-addr "{host}" --master-port {port}'
    meet = f'--rdzv-backend c10d --rdzv-endpoint "{host}:{port}"'
    return f"{meet} \\\n--rdzv-id {job.name} --rdzv-conf join_timeout=1800"


def _slurm(job: Job, site: Site) -> str:
    stages = [f"submit {stage.name} {job.nodes_of(stage)}" for stage in job.stages]
    values = {
        "environment": as_shell(_variables(job, site)),
        "submissions": "\n".join(stages),
        "time": site.time,
        "partition": f"#SBATCH --partition={site.partition}\n" if site.partition else "",
        "devices": f"#SBATCH --gpus-per-node={job.per_node}\n" if job.gpu else "",
        "container": container_words(job, site),
        "command": job.command(stage='"$stage"'),
    }
    return fill("slurm.sh", shared_values(job) | values)


def _variables(job: Job, site: Site) -> list[Variable]:
    return environment(job.gpu, job.nodes, site.fabric, site.interface)
