"""Slurm jobs whose ranks run in an image: by Pyxis (options of `srun`) or Apptainer (a command before theirs)."""

from __future__ import annotations

import re
from pathlib import Path

from flm_megatron.errors import RequestError
from flm_megatron.launch.cluster.job import Job
from flm_megatron.launch.cluster.site import Site
from flm_megatron.url import is_url

RUNTIMES = ("pyxis", "apptainer")
MOUNT = re.compile(r"/[\w./@+=-]*(:/[\w./@+=-]*(:r[ow])?)?")
FILE = re.compile(r"\.{0,2}/.*|.*\.(sif|sqsh|squashfs)")
"""An image that is a file; any other is the name of one in a registry."""
OPTIONS = {
    "pyxis": (
        '\\\n    --container-image={image} --no-container-mount-home --container-workdir="$PWD" '
        '\\\n    --container-mounts="{mounts}" \\\n    '
    ),
    "apptainer": '\\\n    apptainer exec {devices}--bind "{mounts}" --pwd "$PWD" {image} ',
}


def container_words(job: Job, site: Site) -> str:
    """What stands between `srun` and the ranks' command; nothing without a container.

    The folder from which the job is submitted is mounted under its own name, as are `site.mounts`.

    Raises:
        RequestError: the image's file is not there, a mount is none, or the run has a folder that would stay outside.
    """
    if site.container is None:
        if site.mounts:
            raise RequestError(
                f"--mounts {site.mounts} is for a container: give --container {' or '.join(RUNTIMES)} too"
            )
        return ""
    mounts = [each for each in (site.mounts or "").split(",") if each]
    for each in mounts:
        if not MOUNT.fullmatch(each):
            raise RequestError(f"--mounts has {each!r}: give /FOLDER or /FOLDER:/FOLDER_INSIDE, separated by commas")
    if FILE.fullmatch(site.image) and not Path(site.image).is_file():
        raise RequestError(
            f"--image {site.image} is not there: give a file that all nodes see, or a name in a registry"
        )
    _check_folders(job, mounts)
    return OPTIONS[site.container].format(
        image=site.image,
        mounts=",".join(["$PWD:$PWD", *(each if ":" in each else f"{each}:{each}" for each in mounts)]),
        devices="--nv " if job.gpu else "",
    )


def _check_folders(job: Job, mounts: list[str]) -> None:
    """What a run reads and writes has to lie outside the container, which goes with its job."""
    inside = [Path.cwd(), *(Path(each.split(":")[1] if ":" in each else each) for each in mounts)]
    run = job.run
    paths = {
        "output": run.output,
        "tokenizer": run.tokenizer,
        "checkpoint.initial": run.checkpoint.initial,
        **{f"data.train.{number}": each.path for number, each in enumerate(run.data.train)},
        **{f"data.validation.{number}": each.path for number, each in enumerate(run.data.validation)},
        "run file": job.run_file,
    }
    for name, path in paths.items():
        if path and not is_url(path) and not any(_absolute(path).is_relative_to(folder) for folder in inside):
            raise RequestError(
                f"{name} {path} is not in the container: add its folder to --mounts, such as {_absolute(path).parent}"
            )


def _absolute(path: str) -> Path:
    return Path.cwd() / path
