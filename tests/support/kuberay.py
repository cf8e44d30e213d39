"""The schema of KubeRay's resources, as far as manifests here use them: fields of RayJob and RayCronJob (v1).

Source: the Go types from which KubeRay's CRDs are made (ray-operator/apis/ray/v1). A field that is not among them is an
error, as it is for an API server with strict validation. Pod templates are checked against the Kubernetes client's models.
"""

from __future__ import annotations

import re
from typing import Any

from kubernetes import client

BOOL, TEXT, NUMBER, COUNT = {"type": "boolean"}, {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object", "x-model": "V1PodTemplateSpec"}


def of(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


HEAD = of(
    ["rayStartParams", "template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
    headService={"type": "object"},
    enableIngress=BOOL,
    rayStartParams=TEXTS,
    template=POD,
)
WORKERS = of(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS,
    template=POD,
    scaleStrategy={"type": "object"},
)
CLUSTER = of(
    ["headGroupSpec"],
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    rayVersion=TEXT,
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=of(
        [],
        resources={"type": "object"},
        image=TEXT,
        imagePullPolicy=TEXT,
        env={"type": "array"},
        envFrom={"type": "array"},
        volumeMounts={"type": "array"},
        securityContext={"type": "object"},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    ),
    headServiceAnnotations=TEXTS,
    suspend=BOOL,
)
JOB = of(
    [],
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=of([], backoffLimit=COUNT),
    managedBy={"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=BOOL,
    suspend=BOOL,
)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = of([], name=TEXT, generateName=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    version = {"const": "ray.io/v1"}
    return of(
        ["apiVersion", "kind", "metadata", "spec"], apiVersion=version, kind={"const": kind}, metadata=name, spec=spec
    )


RAYJOB = resource("RayJob", JOB)
RAYCRONJOB = resource("RayCronJob", of(["schedule", "jobTemplate"], schedule=TEXT, jobTemplate=JOB))


def pods(value: Any, schema: dict[str, Any]) -> list[Any]:
    """All pod templates in a manifest that its schema has found good."""
    if schema is POD:
        return [value]
    if isinstance(value, list):
        return [pod for item in value for pod in pods(item, schema.get("items", {}))]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return [pod for name, item in value.items() for pod in pods(item, known.get(name, {}))]
    return []


def check(value: Any, model: str, where: str = "") -> None:
    """`value` has the fields and kinds of a Kubernetes model, and no others."""
    if inner := re.fullmatch(r"list\[(.+)\]", model):
        assert isinstance(value, list), where
        for at, item in enumerate(value):
            check(item, inner[1], f"{where}[{at}]")
    elif inner := re.fullmatch(r"dict\(str, (.+)\)", model):
        assert isinstance(value, dict), where
        for name, item in value.items():
            check(item, inner[1], f"{where}.{name}")
    elif model.startswith("V1"):
        kind = getattr(client, model)
        names = {json: kind.openapi_types[python] for python, json in kind.attribute_map.items()}
        assert isinstance(value, dict), where
        for name, item in value.items():
            assert name in names, f"{where}.{name} is no field of {model}"
            check(item, names[name], f"{where}.{name}")
        kind(**{python: value[json] for python, json in kind.attribute_map.items() if json in value})  # what it requires
    else:
        kinds = {"str": str, "int": int, "bool": bool, "float": float}
        assert isinstance(value, kinds.get(model, object)), f"{where} is no {model}: {value!r}"
