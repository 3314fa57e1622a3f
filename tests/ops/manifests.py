"""Kubernetes manifests: rendered by kubectl's own kustomize, compared with the schemas of KubeRay and of Kubernetes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.scripts.scripts import start as ray_start

from ops.tools import ROOT, checkers, run

CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES = "1.33"
Manifest = dict[str, Any]


def overlays(cluster: Path) -> list[Path]:
    """Every folder that one applies."""
    return [*sorted((cluster / "kuberay" / "overlays").iterdir()), cluster / "kuberay" / "storage"]


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send. Raises ValueError with kubectl's words."""
    code, text = run(checkers() / "kubectl", "kustomize", folder)
    if code:
        raise ValueError(f"{folder}: {text}")
    return list(yaml.safe_load_all(text))


def unknown_in_patches(cluster: Path) -> list[str]:
    """kubectl passes over a `valuee`, and adds nothing."""
    files = sorted(cluster.glob("kuberay/**/*.yaml"))
    trees = [(path, tree) for path in files for tree in yaml.safe_load_all(path.read_text())]
    trees += [
        (path, yaml.safe_load(patch["patch"]))
        for path, tree in trees
        if isinstance(tree, dict)
        for patch in tree.get("patches", [])
        if "patch" in patch
    ]
    return [
        f"{path}: {sorted(operation)}"
        for path, tree in trees
        if isinstance(tree, list)
        for operation in tree
        if operation.keys() != {"op", "path", "value"}
    ]


def problems(manifests: list[Manifest]) -> list[str]:
    """What is wrong with them: against KubeRay's schemas, or, where they say nothing, against all others."""
    ours = [manifest for manifest in manifests if manifest["apiVersion"].startswith("ray.io/")]
    core = [manifest for manifest in manifests if manifest not in ours]
    if found := [problem for manifest in ours for problem in against_schema(manifest)]:
        return found
    # KubeRay's schemas leave `metadata` open; a ConfigMap's is the same and is not.
    core += [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest.get("metadata")} for manifest in ours]
    core += [pod for manifest in ours for pod in pods(manifest)]
    found = [problem for manifest in ours for problem in unknown_start_parameters(manifest)]
    return found + unknown_settings(environment(manifests)) + against_kubernetes(core)


def against_schema(manifest: Manifest) -> list[str]:
    """Of a RayCluster or RayJob."""
    schema = closed_schema(manifest["kind"])
    errors = jsonschema.Draft202012Validator(schema).iter_errors(without_nulls(manifest))
    return [f"{manifest['kind']} {error.json_path}: {error.message[:300]}" for error in errors]


@cache
def closed_schema(kind: str) -> dict[str, Any]:
    """The schema of KubeRay's v1 kind, with unknown keys refused wherever it does not ask for them to be kept."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's definitions are absent: {path} is config/crd/bases/{path.name} of its operator")
    versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = (version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    close(schema)
    return schema


def close(schema: Any) -> None:
    """Refuse unknown keys in `schema` and all that it holds."""
    if isinstance(schema, list):
        for part in schema:
            close(part)
    if not isinstance(schema, dict):
        return
    kept = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and not kept:
        schema["additionalProperties"] = False
        for part in schema["properties"].values():
            close(part)
    for name, part in schema.items():
        if name != "properties":
            close(part)


def without_nulls(tree: Any) -> Any:
    """As the API server reads a manifest: a null is a key that is not there."""
    if isinstance(tree, dict):
        return {key: without_nulls(value) for key, value in tree.items() if value is not None}
    return [without_nulls(value) for value in tree] if isinstance(tree, list) else tree


def cluster_spec(manifest: Manifest) -> Manifest:
    """Of a RayCluster, or of the one that a RayJob brings along."""
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def groups(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(name, group) of the head and of every group of workers."""
    spec = cluster_spec(manifest)
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


def pods(manifest: Manifest) -> Iterator[Manifest]:
    for name, group in groups(manifest):
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **group["template"]}


def unknown_start_parameters(manifest: Manifest) -> list[str]:
    """KubeRay hands them to `ray start` as they are."""
    known = {option.removeprefix("--") for parameter in ray_start.params for option in parameter.opts}
    return [
        f"{name}: `ray start` has no --{parameter}"
        for name, group in groups(manifest)
        for parameter in group.get("rayStartParams", {})
        if parameter not in known
    ]


def environment(manifests: list[Manifest]) -> set[str]:
    """Names in every ConfigMap."""
    return {name for manifest in manifests if manifest["kind"] == "ConfigMap" for name in manifest.get("data", {})}


def unknown_settings(names: set[str]) -> list[str]:
    """RAY_... variables that Ray never reads: nobody else would notice a misspelt one."""
    return [f"Ray does not read {name}" for name in sorted(names) if name.startswith("RAY_") and not is_read(name)]


@cache
def is_read(variable: str) -> bool:
    """Whether the name is in Ray's Python code, or, for RAY_lower_case, is a setting of its servers."""
    folder = Path(ray.__file__).parent
    if variable.removeprefix("RAY_").islower():
        places, name = [folder / "core/src/ray/gcs/gcs_server", folder / "core/src/ray/raylet/raylet"], variable[4:]
    else:
        places, name = [folder / part for part in ("_private", "_common", "dashboard", "_raylet.so")], variable
    text = rf"(^|[^A-Za-z_]){re.escape(name)}([^A-Za-z_]|$)"
    return subprocess.run(["grep", "-raqE", text, *places], check=False, timeout=120).returncode == 0


def against_kubernetes(manifests: list[Manifest]) -> list[str]:
    """What the strict schemas of Kubernetes say."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, manifest in enumerate(manifests):
            files.append(Path(folder) / f"{number}-{manifest['kind']}.json")
            files[-1].write_text(json.dumps(manifest))
        command = [checkers() / "kubernetes-validate", "--strict", "--kubernetes-version", KUBERNETES, *files]
        code, said = run(*command, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return [line.strip() for line in said.splitlines() if "ERROR" in line] or ([said] if code else [])
