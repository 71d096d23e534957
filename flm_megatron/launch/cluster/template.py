"""Texts with places to fill in: the templates of scripts and manifests."""

from __future__ import annotations

import re
from importlib.resources import files

from flm_megatron.launch.cluster.job import Job

SPARE_S = 30
"""Part of the grace period that is left for the container or the job to end after its ranks."""


def shared_values(job: Job) -> dict[str, str]:
    """What every template may say of a job."""
    return {
        "summary": "\n".join(f"#   {line}" for line in job.summary()),
        "run_file": job.run_file,
        "job": job.name,
        "nodes": str(job.nodes),
        "per_node": str(job.per_node),
        "restarts": str(job.restarts),
        "grace": str(job.grace_s + SPARE_S),
    }


def fill(template: str, values: dict[str, str]) -> str:
    """The template with each `{{name}}` replaced.

    Where a value stands alone its lines get the place's indentation, and an empty one leaves no line.
    """
    text = files(__package__).joinpath("templates").joinpath(template).read_text(encoding="utf-8")
    text = re.sub(r"^ *\{\{(\w+)\}\}\n", lambda match: match[0] if values[match[1]] else "", text, flags=re.MULTILINE)
    return re.sub(r"^( *)\{\{(\w+)\}\}|\{\{(\w+)\}\}", lambda match: _value(match, values), text, flags=re.MULTILINE)


def _value(match: re.Match[str], values: dict[str, str]) -> str:
    if match[3]:
        return values[match[3]]
    lines = values[match[2]].split("\n")
    return "\n".join(match[1] + line if line else line for line in lines)
