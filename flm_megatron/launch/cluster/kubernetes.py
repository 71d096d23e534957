"""Manifests: a job of Kubeflow Trainer (TrainJob), of JobSet, or of the Kubeflow training operator (PyTorchJob)."""

from __future__ import annotations

import re

from flm_megatron.errors import RequestError
from flm_megatron.launch.cluster.environment import Variable, as_yaml, shutdown_timeout
from flm_megatron.launch.cluster.job import Job
from flm_megatron.launch.cluster.site import Site
from flm_megatron.launch.cluster.template import fill, shared_values

PORT = 29400
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A job's name is also that of a service: RFC 1035."""
LONGEST_NAME = 63
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
LONGEST_SUBDOMAIN = 253
IMAGE = re.compile(r"[a-z0-9][\w./:-]*(@sha256:[0-9a-f]{64})?")
FIRST_POD = "{job}-node-0-0.{job}"
"""The name that JobSet gives the first pod; Kubeflow Trainer makes a JobSet."""
IS_HOST = "is_host=$([[ $JOB_COMPLETION_INDEX = 0 ]] && echo 1 || echo 0)"
"""The first pod holds the meeting, whether or not its name is known to it yet."""


def manifest(job: Job, site: Site, variables: list[Variable]) -> str:
    """The manifest of a job for the API that the site names.

    Raises:
        RequestError: a name is none that Kubernetes takes.
    """
    _check_names(job, site)
    values = shared_values(job) | {
        "image": site.image,
        "claim": site.claim,
        "pull_secret": f'imagePullSecrets: [{{name: "{site.image_pull_secret}"}}]' if site.image_pull_secret else "",
        "queue": f'labels: {{kueue.x-k8s.io/queue-name: "{site.queue}"}}' if site.queue else "",
        # The queue lets it go.
        "suspend": "suspend: true" if site.queue else "",
    }
    values["work"] = _work(job, site, variables)
    if site.api == "trainjob":  # the runtime is what the pods are like, the job is what they do
        label = "metadata: {labels: {trainer.kubeflow.org/trainjob-ancestor-step: trainer}}"
        pod = fill("kubernetes/pod.yaml", values | {"container": "node", "work": ""})
        values["jobs"] = fill("kubernetes/jobs.yaml", values | {"pod": pod.rstrip(), "labels": label}).rstrip()
    elif site.api == "jobset":
        pod = fill("kubernetes/pod.yaml", values | {"container": "node"})
        values["jobs"] = fill("kubernetes/jobs.yaml", values | {"pod": pod.rstrip(), "labels": ""}).rstrip()
    else:
        values["pod"] = fill("kubernetes/pod.yaml", values | {"container": "pytorch"}).rstrip()
    return fill(f"kubernetes/{site.api}.yaml", values)


def _check_names(job: Job, site: Site) -> None:
    """Names that become part of others: of services, of pods, of labels."""
    longest = LONGEST_NAME - len(f"-node-0-{job.nodes - 1}-00000")
    if not NAME.fullmatch(job.name) or len(job.name) > longest:
        raise RequestError(
            f"run name {job.run.name!r} becomes the job name {job.name}, which Kubernetes does not take: "
            f"begin it with a letter and keep it within {longest} characters"
        )
    if site.queue is not None and not (LABEL.fullmatch(site.queue) and len(site.queue) <= LONGEST_NAME):
        raise RequestError(
            f"--queue {site.queue} is no name of a queue: use up to {LONGEST_NAME} lower-case letters, digits and -"
        )
    for option, name in (("--claim", site.claim), ("--image-pull-secret", site.image_pull_secret)):
        if name is not None and not (SUBDOMAIN.fullmatch(name) and len(name) <= LONGEST_SUBDOMAIN):
            raise RequestError(
                f"{option} {name} is no name that Kubernetes takes: use up to {LONGEST_SUBDOMAIN} lower-case letters, "
                "digits, - and ."
            )
    if not IMAGE.fullmatch(site.image):
        raise RequestError(f"--image {site.image} is no image: give HOST/PATH/NAME:TAG")


def _work(job: Job, site: Site, variables: list[Variable]) -> str:
    """What a pod does: command, environment and resources."""
    operator = site.api == "pytorchjob"
    first = FIRST_POD.format(job=job.name)
    values = {
        # The operator sets PET_RDZV_BACKEND and PET_RDZV_ENDPOINT.
        "wait": "" if operator or job.nodes == 1 else _wait(first),
        "meeting": "" if operator else f"--rdzv-backend c10d --rdzv-endpoint {first}:{PORT} \\",
        "conf": "join_timeout=1800" if operator else f'"join_timeout=1800,{IS_HOST}"',
        "command": job.command(),
        "environment": as_yaml([*variables, shutdown_timeout(job.grace_s)]),
        "resources_of": "resourcesPerNode" if site.api == "trainjob" else "resources",
        "resources": _resources(job, site),
    }
    return fill("kubernetes/work.yaml", shared_values(job) | values).rstrip()


def _wait(first: str) -> str:
    """Shell lines by which a pod waits for the first one."""
    return fill("kubernetes/wait.sh", {"first": first, "port": str(PORT)}).rstrip()


def _resources(job: Job, site: Site) -> str:
    if not job.gpu:
        return f"requests:\n  cpu: {job.per_node}"
    lines = ["limits:", f"  nvidia.com/gpu: {job.per_node}"]
    if job.nodes > 1 and site.fabric != "tcp":
        lines.append(f"  rdma/hca: {job.per_node}  # the resource name of the cluster's RDMA device plugin")
    return "\n".join(lines)
