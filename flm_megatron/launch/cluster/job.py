"""A run on the machines it is given: its stages, the processes of each, and whether they fit."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flm_megatron.config.rules import check
from flm_megatron.config.schema import RunConfig, StageConfig
from flm_megatron.config.stage_names import stage_index
from flm_megatron.errors import RequestError


@dataclass(frozen=True)
class Job:
    """The `stages` of a run to start on `nodes` equal nodes, all in one job or one job each."""

    run: RunConfig
    run_file: str
    overrides: tuple[str, ...]
    stages: tuple[StageConfig, ...]
    nodes: int
    per_node: int
    gpu: bool = True
    whole: bool = True
    """Whether all stages of the run are started."""
    separate: bool = False
    """Whether every stage is a job of its own."""
    grace_s: int = 120
    """Seconds from SIGTERM until processes are killed: one step and one checkpoint."""
    restarts: int = 10
    """How often torchrun restarts the ranks after a failure."""
    branch: str | None = None
    """The branch to train, as `flm train` takes it: `run` is that branch."""

    @property
    def name(self) -> str:
        """The run's name as a job name: lower-case letters, digits and hyphens."""
        return re.sub(r"[^a-z0-9]+", "-", self.run.name.lower()).strip("-") or "run"

    def nodes_of(self, stage: StageConfig) -> int:
        """Nodes that train a stage: all, or in a job of its own as many as its data-parallel size needs."""
        if stage.parallel.data is None or not self.separate:
            return self.nodes
        return -(-stage.parallel.processes // self.per_node)

    def command(self, stage: str | None = None) -> str:
        """The `flm train` command; `stage` is inserted unquoted, so that a shell can expand it."""
        words = ["train", shlex.quote(self.run_file)]
        if self.branch is not None:
            return " ".join([*words, "--branch", shlex.quote(self.branch), *map(shlex.quote, self.overrides)])
        chosen = stage or (None if self.whole else shlex.quote(self.stages[0].name))
        words += ["--stage", chosen] if chosen else []
        return " ".join([*words, *map(shlex.quote, self.overrides)])

    def summary(self) -> list[str]:
        """One line for every stage: its layout, and what is unusual about it."""
        return [_layout(stage, self) for stage in self.stages]


def plan_job(
    run: RunConfig,
    run_file: str | Path,
    overrides: Sequence[str],
    nodes: int,
    per_node: int,
    stage: str | None = None,
    separate: bool = False,
    gpu: bool = True,
    grace_s: int = 120,
    restarts: int = 10,
    branch: str | None = None,
) -> Job:
    """The job that trains `run` (or one stage of it) on `nodes` nodes of `per_node` processes.

    With `branch` `run` is that branch, and the stage its last one.
    With `separate` every stage is a job of its own and may take fewer nodes. `grace_s` is in seconds.

    Raises:
        RequestError: no such stage, or a stage's layout does not fit the nodes.
    """
    for name, value in (("--nodes", nodes), ("--processes-per-node", per_node), ("--grace-s", grace_s)):
        if value < 1:
            raise RequestError(f"{name} is {value}, give at least 1")
    if restarts < 0:
        raise RequestError(f"--max-restarts is {restarts}, give 0 or more")
    stages = tuple(run.stages) if stage is None else (run.stages[stage_index(run, stage)],)
    job = Job(
        run,
        str(run_file),
        tuple(overrides),
        stages,
        nodes,
        per_node,
        gpu,
        whole=stage is None,
        separate=separate,
        grace_s=grace_s,
        restarts=restarts,
        branch=branch,
    )
    check(run, stages=[])
    for each in stages:
        _check_stage(job, each)
    return job


def _check_stage(job: Job, stage: StageConfig) -> None:
    """The stage's rules on the processes that its job has."""
    count = job.nodes_of(stage)
    if count > job.nodes:
        raise RequestError(
            f"stage {stage.name!r} needs {stage.parallel.processes} processes, {count} nodes of {job.per_node}, "
            f"but there are {job.nodes}: give --nodes {count}, or leave parallel.data out"
        )
    check(job.run, count * job.per_node, stages=[stage.name])


def _layout(stage: StageConfig, job: Job) -> str:
    parallel = stage.parallel
    nodes = job.nodes_of(stage)
    data = nodes * job.per_node // parallel.model_size
    text = f"{stage.name}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data}"
    if parallel.tensor > job.per_node:
        text += f"; tensor groups span {parallel.tensor // job.per_node} nodes, so their traffic is on the network"
    return text
