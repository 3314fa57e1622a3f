"""Every overlay against the schemas of its readers; what a schema cannot say; and that a misspelt key is caught."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path

import pytest
import ray

from fvlm.config import validate
from ops import manifests
from ops.manifests import cluster_spec, groups, overlays, problems, render
from ops.misspell import every_misspelling, misspell
from ops.tools import CLUSTER
from ray_jobs.ingest import cpus_needed
from ray_jobs.options import parse

pytestmark = pytest.mark.ops

OVERLAYS = [folder.name for folder in overlays(CLUSTER)]
JOBS = [name for name in OVERLAYS if name.endswith("-job") or name == "kueue"]
CLUSTERS = [name for name in OVERLAYS if name not in JOBS and name != "storage"]


def rendered(name: str, cluster: Path = CLUSTER) -> list[manifests.Manifest]:
    (folder,) = (folder for folder in overlays(cluster) if folder.name == name)
    return render(folder)


def ray_kind(name: str) -> manifests.Manifest:
    (manifest,) = (one for one in rendered(name) if one["apiVersion"] == "ray.io/v1")
    return manifest


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_an_overlay_renders_to_is_valid_and_has_no_unknown_key(name):
    assert problems(rendered(name)) == []


def test_patches_have_the_keys_of_patches():
    assert manifests.unknown_in_patches(CLUSTER) == []


def test_there_is_an_overlay_for_each_way_of_running():
    assert {"cpu", "gpu", "autoscaling", "redis", "kueue", "cpu-job", "gpu-job", "autoscaling-job"} <= set(OVERLAYS)
    assert [ray_kind(name)["kind"] for name in CLUSTERS] == ["RayCluster"] * len(CLUSTERS)
    assert [ray_kind(name)["kind"] for name in JOBS] == ["RayJob"] * len(JOBS)


@pytest.mark.parametrize("name", [*CLUSTERS, *JOBS])
def test_a_cluster_asks_for_a_token_and_computes_nothing_on_its_head(name):
    spec = cluster_spec(ray_kind(name))
    assert spec["authOptions"]["mode"] == "token"
    assert spec["rayVersion"] == ray.__version__
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", [*CLUSTERS, *JOBS])
def test_every_pod_shows_metrics_sees_the_runs_and_is_nobody_special(name):
    for group_name, group in groups(ray_kind(name)):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["metrics"] == int(group["rayStartParams"]["metrics-export-port"]), group_name
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}, group_name
        assert {"configMapRef": {"name": "fvlm-environment"}} in container["envFrom"], group_name
        assert pod["securityContext"]["runAsNonRoot"], group_name
        assert container["image"] == "fvlm", group_name  # a name to be replaced, in nobody's registry


def test_one_entry_of_kustomize_replaces_the_image_of_every_pod(copy):
    overlay = copy / "kuberay" / "overlays" / "autoscaling-job" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + "images:\n  - {name: fvlm, newName: registry.example/fvlm, newTag: v1}\n")
    (job,) = (one for one in rendered("autoscaling-job", copy) if one["kind"] == "RayJob")
    images = [container["image"] for pod in manifests.pods(job) for container in pod["spec"]["containers"]]
    assert images == ["registry.example/fvlm:v1"] * 3


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_a_command_of_ours_that_resumes_and_fits_its_cluster(name):
    job = ray_kind(name)
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "ray_jobs.train"]
    config = validate(parse(words[3:]))
    spec = cluster_spec(job)
    nodes = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    most = "maxReplicas" if spec.get("enableInTreeAutoscaling") else "replicas"
    cpus = sum(int(group["rayStartParams"]["num-cpus"]) * group[most] for group in nodes.values())
    store = sum(
        int(group["rayStartParams"]["object-store-memory"]) * group.get("minReplicas", 1) for _, group in groups(job)
    )

    assert config.run_dir == Path("/shared/runs") / config.run  # named, so that every retry means the same run
    assert config.data.path.startswith("/shared/")
    assert "$" not in job["spec"]["entrypoint"]  # KubeRay's submitter would fill it in, with nothing
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["metadata"] == {"run": config.run_name, "preset": config.preset}
    assert config.scale.device == ("cuda" if "gpu" in nodes else "cpu")  # "auto" looks before a GPU has come
    assert cpus_needed(config) <= cpus
    assert store > 0
    if "gpu" in nodes:
        assert config.scale.workers <= nodes["gpu"][most]


@pytest.mark.parametrize("name", ["autoscaling", "autoscaling-job"])
def test_with_data_workers_decoding_finds_no_cpu_beside_a_gpu(name):
    nodes = dict(groups(ray_kind(name)))
    gpu, data = nodes["gpu"], nodes["data"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert gpu["rayStartParams"]["num-cpus"] == limits["nvidia.com/gpu"]  # a CPU for each rank
    assert int(data["rayStartParams"]["num-cpus"]) > 0
    assert "nvidia.com/gpu" not in data["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_kueue_gets_what_it_can_admit():
    job = ray_kind("kueue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert job["spec"]["suspend"]
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert "enableInTreeAutoscaling" not in cluster_spec(job)
    assert len(cluster_spec(job)["workerGroupSpecs"]) <= 7


def test_the_head_keeps_its_state_in_the_redis_that_is_there():
    everything = rendered("redis")
    options = cluster_spec(ray_kind("redis"))["gcsFaultToleranceOptions"]
    (service,) = (one for one in everything if one["kind"] == "Service" and one["metadata"]["name"] == "fvlm-redis")
    (redis,) = (one for one in everything if one["kind"] == "StatefulSet")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    host, _, port = options["redisAddress"].partition(":")
    assert (host, int(port)) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert service["spec"]["selector"] == redis["spec"]["template"]["metadata"]["labels"]
    assert container["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_deleting_a_cluster_leaves_data_and_runs():
    claims = {name for name in OVERLAYS for one in rendered(name) if one["kind"] == "PersistentVolumeClaim"}
    assert claims == {"storage"}


FREE = {"metadata", "labels", "requests", "limits", "matchLabels", "data"}
"""Objects whose keys anybody may choose."""


@pytest.mark.parametrize("name", ["autoscaling-job", "redis"])
def test_every_single_misspelt_key_of_ray_s_kinds_is_caught(name):
    seen = 0
    for where, broken in every_misspelling(ray_kind(name)):
        if where[0] == "spec" and not FREE & set(where[:-1]):
            found = manifests.against_schema(broken) + (
                manifests.unknown_start_parameters(broken) if "rayStartParams" in where[:-1] else []
            )
            assert found, where
            seen += 1
    assert seen > 80


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("base/kustomization.yaml", "resources"),
        ("base/environment.yaml", "RAY_health_check_period_ms"),
        ("base/cluster.yaml", "authOptions"),
        ("base/cluster.yaml", "metrics-export-port"),
        ("base/cluster.yaml", "optional"),
        ("base/metrics.yaml", "clusterIP"),
        ("storage/kustomization.yaml", "resources"),
        ("storage/claim.yaml", "accessModes"),
        ("components/cpu/kustomization.yaml", "patches"),
        ("components/cpu/workers.yaml", "groupName"),
        ("components/gpu/kustomization.yaml", "path"),
        ("components/gpu/workers.yaml", "tolerations"),
        ("components/autoscaling/kustomization.yaml", "target"),
        ("components/autoscaling/workers.yaml", "runAsNonRoot"),
        ("components/autoscaling/autoscaler.yaml", "idleTimeoutSeconds"),
        ("components/redis/kustomization.yaml", "patches"),
        ("components/redis/fault-tolerance.yaml", "redisAddress"),
        ("components/redis/redis.yaml", "serviceName"),
        ("components/job/kustomization.yaml", "components"),
        ("components/job/copy/kustomization.yaml", "fieldPath"),
        ("components/job/copy/job.yaml", "backoffLimit"),
        ("components/kueue/kustomization.yaml", "path"),
        ("components/kueue/queue.yaml", "value"),
        *((f"overlays/{name}/kustomization.yaml", "components") for name in OVERLAYS if name != "storage"),
    ],
)
def test_a_misspelt_key_is_caught(copy, file, key):
    misspell(copy / "kuberay" / file, key)
    assert manifests.unknown_in_patches(copy) or any(is_refused(folder) for folder in overlays(copy))


def is_refused(folder: Path) -> bool:
    try:
        text = render(folder)
    except ValueError:  # by kubectl itself
        return True
    return text != whole(folder.name) and bool(problems(text))


@cache
def whole(name: str) -> list[manifests.Manifest]:
    """What the overlay of this name renders to, unbroken."""
    return rendered(name)


def test_no_manifest_is_left_out_of_these_tests():
    files = {path.relative_to(CLUSTER / "kuberay").as_posix() for path in CLUSTER.glob("kuberay/**/*.yaml")}
    (mark,) = (mark for mark in test_a_misspelt_key_is_caught.pytestmark if mark.name == "parametrize")
    assert files == {file for file, _ in mark.args[1]}
