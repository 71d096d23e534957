"""What a cluster is like, as far as the run file does not say it."""

from __future__ import annotations

from dataclasses import dataclass

APIS = ("trainjob", "jobset", "pytorchjob")
"""Kinds of a job on Kubernetes: of Kubeflow Trainer, of JobSet, of the Kubeflow training operator before Trainer."""


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
    api: str = "trainjob"
    """Kubernetes: which kind of job, one of `APIS`."""
    queue: str | None = None
    """Kubernetes: the Kueue queue that admits the job."""
    image: str = "flm-megatron:latest"
    """Kubernetes, and Slurm with a container: the image."""
    container: str | None = None
    """Slurm: what runs the image, `pyxis` or `apptainer`; none runs the ranks on the node itself."""
    mounts: str | None = None
    """Slurm with a container: folders of the node to mount, /FOLDER or /FOLDER:/FOLDER_INSIDE, separated by commas."""
    image_pull_secret: str | None = None
    """Kubernetes: the secret that opens the image's registry."""
    claim: str = "flm-megatron"
    """Kubernetes: volume claim that holds data and runs, mounted by all pods."""
