"""What the API servers say of a manifest: schemas made from the custom resource definitions of three projects.

    git clone --branch v2.3.0 https://github.com/kubeflow/trainer
    git clone --branch v0.12.0 https://github.com/kubernetes-sigs/jobset
    git clone --branch v1.9.0 https://github.com/kubeflow/training-operator
    python -m tests.support.kubernetes_schemas trainer jobset training-operator

writes `tests/fixtures/kubernetes/KIND.json`: names, types, enumerations and patterns, without descriptions and without
the parts of a pod in `LEFT_OUT`. A field that is not there is an error, as under `kubectl apply --validate=strict`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from flm_megatron.json_text import Json, JsonObject
from tests.support import REPOSITORY

FOLDER = REPOSITORY / "tests" / "fixtures" / "kubernetes"
DEFINITIONS = {
    "TrainingRuntime": (0, "manifests/base/crds/trainer.kubeflow.org_trainingruntimes.yaml"),
    "TrainJob": (0, "manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml"),
    "JobSet": (1, "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"),
    "PyTorchJob": (2, "manifests/base/crds/kubeflow.org_pytorchjobs.yaml"),
}
"""Kind of manifest: which of the three checkouts, and the file in it."""
KEPT = {
    "type",
    "properties",
    "items",
    "required",
    "enum",
    "pattern",
    "anyOf",
    "additionalProperties",
    *("minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength"),
}
LEFT_OUT = {
    *("affinity", "ephemeralContainers", "initContainers", "initializer", "lifecycle", "runtimePatches"),
    *("livenessProbe", "readinessProbe", "startupProbe", "topologySpreadConstraints", "volumeClaimPolicies"),
    *("resourceClaims", "seLinuxOptions", "windowsOptions", "envFrom", "valueFrom", "dnsConfig"),
}
WORDS: JsonObject = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA: JsonObject = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": WORDS, "annotations": WORDS},
    "required": ["name"],
    "additionalProperties": False,
}
"""What a user may say in `metadata`, which the API server knows by itself: definitions leave it open."""
VOLUMES = {"name", "persistentVolumeClaim", "emptyDir", "hostPath", "nfs", "configMap", "secret"}


def reduced(schema: JsonObject) -> JsonObject:
    """A definition's schema as JSON schema, closed to fields that it does not name."""
    result: JsonObject = {key: value for key, value in schema.items() if key in KEPT}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {
            name: reduced(_object(each)) for name, each in _wanted(properties).items() if name not in LEFT_OUT
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = reduced(_object(schema[key]))
    return result


def _wanted(properties: JsonObject) -> JsonObject:
    """The fields of an object; of a volume, which has dozens of sources, the usual ones."""
    return {n: v for n, v in properties.items() if n in VOLUMES} if "emptyDir" in properties else properties


def _object(value: Json) -> JsonObject:
    assert isinstance(value, dict)
    return value


def schema_of(kind: str) -> JsonObject:
    """The schema of a kind of manifest, as committed."""
    return _object(json.loads((FOLDER / f"{kind}.json").read_text()))


def main(*checkouts: str) -> None:
    """Write the schemas of all kinds."""
    for kind, (place, file) in DEFINITIONS.items():
        definition = yaml.safe_load((Path(checkouts[place]) / file).read_text())
        (version,) = [each for each in definition["spec"]["versions"] if each["served"]]
        schema = reduced(version["schema"]["openAPIV3Schema"])
        fields = _object(schema["properties"])
        fields.pop("status", None)
        fields["apiVersion"] = {"enum": [f"{definition['spec']['group']}/{version['name']}"]}
        fields["kind"] = {"enum": [kind]}
        fields["metadata"] = METADATA
        schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
        (FOLDER / f"{kind}.json").write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
