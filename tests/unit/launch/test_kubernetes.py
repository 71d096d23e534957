"""Manifests of `flm launch --on kubernetes`: what the API servers take, and what the pods are asked for."""

from __future__ import annotations

import os
import socket
import subprocess
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
def test_the_registry_and_names_that_yaml_takes_for_numbers(
    run_file: Path, capsys: pytest.CaptureFixture[str], api: str
) -> None:
    options = ["--image-pull-secret", "0x10", "--image", "1.5", "--claim", "007", "--queue", "2024-01-01"]
    made = manifests(capsys, str(run_file), *FOUR_PODS, "--api", api, *options)
    pod, container = pod_of(made)
    assert pod["imagePullSecrets"] == [{"name": "0x10"}] and container["image"] == "1.5"
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "007"}
    assert made[-1]["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "2024-01-01"}


@pytest.mark.parametrize("api", APIS)
def test_misspelt_metadata_is_noticed(run_file: Path, capsys: pytest.CaptureFixture[str], api: str) -> None:
    job = manifests(capsys, str(run_file), *FOUR_PODS, "--api", api, "--queue", "training")[-1]
    job["metadata"]["label"] = job["metadata"].pop("labels")
    with pytest.raises(ValidationError, match="label"):
        Draft7Validator(schema_of(job["kind"])).validate(job)


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
    user, privileges = pod["securityContext"], pod["containers"][0]["securityContext"]
    assert (user["runAsNonRoot"], user["runAsUser"], user["fsGroup"]) == (True, 1000, 1000)
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}  # with the next line Kubernetes' level "restricted"
    assert privileges == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


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
    evicted, stopped, wrong = job["podFailurePolicy"]["rules"]
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == ("Ignore", [3])
    assert (evicted["action"], evicted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [2])
    assert jobs["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert "--rdzv-endpoint my-run-node-0-0.my-run:29400" in pod_of(made)[1]["command"][-1]
    if api == "trainjob":
        assert made[1]["spec"]["runtimeRef"]["name"] == made[0]["metadata"]["name"]
        assert made[1]["spec"]["trainer"]["numNodes"] == 4


def pod_command(capsys: pytest.CaptureFixture[str], run_file: Path, port: int) -> list[str]:
    """The command of a pod, whose first pod is this machine at `port`."""
    _, container = pod_of(manifests(capsys, str(run_file), *FOUR_PODS, "--api", "jobset"))
    command: list[str] = container["command"]
    assert "first=my-run-node-0-0.my-run\n" in command[-1] and "$first/29400" in command[-1]
    return [*command[:-1], command[-1].replace("my-run-node-0-0.my-run", "127.0.0.1").replace("29400", str(port))]


def surroundings(folder: Path, index: int) -> dict[str, str]:
    """A pod's variables, under which `python` says that it was started."""
    (folder / "python").write_text("#!/bin/sh\necho started\n")
    (folder / "python").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(index)}


def test_a_pod_waits_until_the_first_one_listens(
    run_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))  # nobody listens yet
        command = pod_command(capsys, run_file, first.getsockname()[1])
        head = subprocess.run(command, env=surroundings(tmp_path, 0), capture_output=True, text=True, timeout=20)
        assert (head.returncode, head.stdout, head.stderr) == (0, "started\n", "")
        with subprocess.Popen(command, env=surroundings(tmp_path, 1), stdout=subprocess.PIPE, text=True) as pod:
            with pytest.raises(subprocess.TimeoutExpired):
                pod.wait(1)
            first.listen()
            said, _ = pod.communicate(timeout=20)
    assert (pod.returncode, said) == (0, "started\n")


def test_a_pod_that_waits_can_be_stopped(run_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        command = pod_command(capsys, run_file, first.getsockname()[1])
        with subprocess.Popen(command, env=surroundings(tmp_path, 1), stdout=subprocess.PIPE, text=True) as pod:
            with pytest.raises(subprocess.TimeoutExpired):
                pod.wait(1)
            pod.terminate()
            said, _ = pod.communicate(timeout=20)
    assert (pod.returncode, said) == (3, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--queue", "Training"], "--queue Training is no name of a queue"),
        (["--queue", "q" * 64], "is no name of a queue"),
        (["--name", "1t"], "becomes the job name 1t, which Kubernetes does not take: begin it with a letter"),
        (["--name", "r" * 60], "keep it within 48 characters"),
        (["--api", "job"], "invalid choice: 'job'"),
        (["--claim", "[data]"], "--claim [data] is no name that Kubernetes takes"),
        (["--claim", "Data"], "--claim Data is no name that Kubernetes takes"),
        (["--image-pull-secret", "a_b"], "--image-pull-secret a_b is no name that Kubernetes takes"),
        (["--image", "@x"], "--image @x is no image: give HOST/PATH/NAME:TAG"),
    ],
)
def test_names_that_kubernetes_does_not_take(
    run_file: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    status, text, errors = launch(capsys, str(run_file), *FOUR_PODS, *options)
    assert (status, text) == (2, "")
    assert words in errors and len(errors.strip().splitlines()) == 1
