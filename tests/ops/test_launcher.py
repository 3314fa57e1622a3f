"""aws.yaml, gcp.yaml and onprem.yaml as Ray and the clouds will read them."""

from __future__ import annotations

import fnmatch

import pytest

from fvlm.config import validate
from ops.launcher import load, problems
from ops.misspell import keys, misspell
from ops.shell import training_commands
from ops.tools import CLUSTER, ROOT
from ray_jobs.options import parse

pytestmark = pytest.mark.ops

CLOUDS, FILES = ("aws.yaml", "gcp.yaml"), ("aws.yaml", "gcp.yaml", "onprem.yaml")
MISSPELT = {
    "aws.yaml": "max_workers idle_timeout_minutes cache_stopped_nodes ssh_user resources GPU node_config InstanceType "
    "InstanceMarketOptions MarketType VolumeSize setup_commands head_start_ray_commands",
    "gcp.yaml": "head_node_type project_id availability_zone machineType disks boot initializeParams sourceImage "
    "metadata provisioningModel worker_start_ray_commands",
    "onprem.yaml": "min_workers head_ip worker_ips ssh_user file_mounts rsync_exclude",
}


@pytest.mark.parametrize("file", FILES)
def test_ray_and_the_cloud_know_every_key_and_option(file):
    assert problems(CLUSTER / file) == []


@pytest.mark.parametrize("file", FILES)
def test_the_head_computes_nothing_and_every_node_asks_for_a_token(file):
    config = load(CLUSTER / file)
    (head,) = config["head_start_ray_commands"][1:]
    (worker,) = config["worker_start_ray_commands"][1:]
    assert "--num-cpus=0" in head
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.fvlm-token" in command
        assert "--metrics-export-port=8080" in command
    assert config["file_mounts"]["~/.fvlm-token"] == "~/.fvlm-token"
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("file", CLOUDS)
def test_a_cloud_has_spot_gpu_workers_that_leave_decoding_to_data_workers(file):
    config = load(CLUSTER / file)
    nodes = config["available_node_types"]
    assert nodes[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert nodes["gpu"]["resources"]["CPU"] == nodes["gpu"]["resources"]["GPU"]
    assert "GPU" not in nodes["data"]["resources"]
    for name in ("gpu", "data"):
        node = nodes[name]["node_config"]
        kind = node.get("InstanceMarketOptions", {}).get("MarketType") or node["scheduling"]["provisioningModel"]
        assert kind.lower() == "spot"
        assert nodes[name]["min_workers"] == 0


@pytest.mark.parametrize("file", FILES)
def test_what_is_installed_is_what_the_tests_ran_with(file):
    installed = [line for line in load(CLUSTER / file)["setup_commands"] if "pip install" in line and "-e ." in line]
    assert len(installed) == 1
    assert "-c constraints.txt" in installed[0]


@pytest.mark.parametrize("file", FILES)
def test_all_of_our_code_travels_and_no_environment_does(file):
    patterns = load(CLUSTER / file)["rsync_exclude"]

    def stays(path: str) -> bool:  # as rsync reads a pattern: with a slash at its head from the top, otherwise anywhere
        return any(
            path == pattern[1:] if pattern.startswith("/") else fnmatch.fnmatch(path.rsplit("/")[-1], pattern)
            for pattern in patterns
        )

    ours = [path.relative_to(ROOT).as_posix() for part in ("fvlm", "ray_jobs") for path in (ROOT / part).rglob("*")]
    assert [path for path in ours if stays(path) and "__pycache__" not in path] == []
    assert all(stays(name) for name in (".venv", "build", "runs", ".git"))


@pytest.mark.parametrize("file", FILES)
def test_the_command_in_the_file_s_head_is_one_of_ours(file):
    (command,) = training_commands((CLUSTER / file).read_text())
    config = validate(parse(command))
    assert config.runs_dir == "/shared/runs"
    assert config.scale.device == "cuda"  # "auto" looks before a GPU has come


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, names in MISSPELT.items() for key in names.split()])
def test_a_misspelt_key_is_caught(copy, file, key):
    misspell(copy / file, key)
    assert problems(copy / file)


@pytest.mark.parametrize("wrong", ["--metrics-export-port=8080", "RAY_health_check_period_ms=1000"])
def test_a_misspelt_option_or_setting_of_ray_is_caught(copy, wrong):
    path = copy / "aws.yaml"
    name, _, value = wrong.partition("=")
    path.write_text(path.read_text().replace(wrong, f"{name}s={value}"))
    assert problems(path)


def test_the_keys_that_are_tried_exist():
    for file, names in MISSPELT.items():
        there = {where[-1] for where in keys(load(CLUSTER / file))}
        assert set(names.split()) <= there
