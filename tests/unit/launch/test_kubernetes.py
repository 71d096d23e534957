"""Manifests of `flm launch --on kubernetes`: what the API servers take, and what the pods are asked for."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator, ValidationError

from flm_megatron.launch.cluster.site import APIS
from tests.support.kubernetes_schemas import schema_of
from tests.unit.launch.test_cluster import launch, printed, run_file

__all__ = ["run_file"]
FOUR_PODS = ["--on", "kubernetes", "--nodes", "4", "--stage", "one"]
CONTAINERS = {"trainjob": "node", "jobset": "node", "pytorchjob": "pytorch"}


def manifests(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What the command prints, which the API server would take."""
    made = list(yaml.safe_load_all(printed(capsys, *arguments)))
    for each in made:
        Draft7Validator(schema_of(each["kind"])).validate(each)
    return made


def pod_of(made: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pods' spec, and their container as it runs: a TrainJob's is its runtime's with what the job says."""
    first = made[0]["spec"]
    if made[0]["kind"] == "PyTorchJob":
        pod = first["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
        return pod, pod["containers"][0]
    jobs = first["template"]["spec"] if made[0]["kind"] == "TrainingRuntime" else first
    pod = jobs["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    if len(made) == 2:
        trainer = made[1]["spec"]["trainer"]
        container = container | trainer | {"resources": trainer["resourcesPerNode"]}
    return pod, container


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("options", [(), ("--queue", "training"), ("--device", "cpu"), ("--fabric", "tcp")])
def test_the_api_server_takes_it(
    run_file: Path, capsys: pytest.CaptureFixture[str], api: str, options: tuple[str, ...]
) -> None:
    made = manifests(capsys, str(run_file), *FOUR_PODS, "--api", api, *options)
    job = made[-1]
    held = job["spec"]["runPolicy"] if api == "pytorchjob" else job["spec"]
    queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    assert (queue, held.get("suspend")) == (("training", True) if "--queue" in options else (None, None))


@pytest.mark.parametrize("api", APIS)
def test_a_misspelt_field_is_noticed(run_file: Path, capsys: pytest.CaptureFixture[str], api: str) -> None:
    made = manifests(capsys, str(run_file), *FOUR_PODS, "--api", api)
    wrong = deepcopy(made)
    pod, _ = pod_of(wrong)
    pod["terminationGracePeriodSecond"] = pod.pop("terminationGracePeriodSeconds")
    with pytest.raises(ValidationError, match="terminationGracePeriodSecond"):
        Draft7Validator(schema_of(wrong[0]["kind"])).validate(wrong[0])


@pytest.mark.parametrize("api", APIS)
def test_pods_and_their_devices(run_file: Path, capsys: pytest.CaptureFixture[str], api: str) -> None:
    made = manifests(capsys, str(run_file), *FOUR_PODS, "--api", api, "--grace-s", "60")
    pod, container = pod_of(made)
    command = container["command"][-1]
    assert "--nnodes 4 --nproc-per-node 8 --max-restarts 10" in command and "--stage one" in command
    assert pod["containers"][0]["name"] == CONTAINERS[api]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/hca": 8}
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == 60
    assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}


@pytest.mark.parametrize("api", APIS)
def test_pods_without_gpus_ask_for_none(run_file: Path, capsys: pytest.CaptureFixture[str], api: str) -> None:
    _, container = pod_of(manifests(capsys, str(run_file), *FOUR_PODS, "--api", api, "--device", "cpu"))
    assert container["resources"] == {"requests": {"cpu": 8}}
    assert not any(each["name"].startswith(("NCCL", "CUDA", "PET_")) for each in container["env"])


@pytest.mark.parametrize("api", ["trainjob", "jobset"])
def test_what_ends_a_pod_decides_what_follows(run_file: Path, capsys: pytest.CaptureFixture[str], api: str) -> None:
    made = manifests(capsys, str(run_file), *FOUR_PODS, "--api", api)
    jobs = made[0]["spec"]["template"]["spec"] if api == "trainjob" else made[0]["spec"]
    job = jobs["replicatedJobs"][0]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 4, 4, 0)
    evicted, wrong = job["podFailurePolicy"]["rules"]
    assert (evicted["action"], evicted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [2])
    assert jobs["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert "--rdzv-endpoint my-run-node-0-0.my-run:29400" in pod_of(made)[1]["command"][-1]
    if api == "trainjob":
        assert made[1]["spec"]["runtimeRef"]["name"] == made[0]["metadata"]["name"]
        assert made[1]["spec"]["trainer"]["numNodes"] == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--queue", "Training"], "--queue Training is no name of a queue"),
        (["--queue", "q" * 64], "is no name of a queue"),
        (["--name", "1t"], "becomes the job name 1t, which Kubernetes does not take: begin it with a letter"),
        (["--name", "r" * 60], "keep it within 48 characters"),
        (["--api", "job"], "invalid choice: 'job'"),
    ],
)
def test_names_that_kubernetes_does_not_take(
    run_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    status, text, errors = launch(capsys, str(run_file), *FOUR_PODS, *options)
    assert (status, text) == (2, "")
    assert words in errors and len(errors.strip().splitlines()) == 1
