"""slurm.sbatch, sky.yaml and the image: read by shellcheck, SkyPilot and hadolint."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from fvlm.config import validate
from ops.launcher import START_OPTIONS, settings
from ops.manifests import unknown_settings
from ops.misspell import misspell
from ops.shell import shellcheck, training_commands
from ops.tools import CLUSTER, ROOT, checkers, run, skypilot
from ray_jobs.options import parse

pytestmark = pytest.mark.ops

DOCKERFILE = CLUSTER / "Dockerfile"
SLURM_OPTIONS = set(
    """
    --account --array --begin --chdir --comment --constraint --cpus-per-gpu --cpus-per-task --deadline --dependency
    --error --exclude --exclusive --export --gpus --gpus-per-node --gpus-per-task --gres --hold --input --job-name
    --kill-on-invalid-dep --licenses --mail-type --mail-user --mem --mem-per-cpu --mem-per-gpu --nice --no-requeue
    --nodelist --nodes --ntasks --ntasks-per-node --open-mode --output --overlap --partition --priority --qos --requeue
    --reservation --signal --switches --time --time-min --tmp --wait
    """.split()  # noqa: SIM905  (a list is four times as long)
)
"""Of sbatch and srun, by their manuals: neither can be asked without a Slurm cluster."""


# ---- slurm.sbatch


def slurm_problems(path: Path) -> list[str]:
    text = path.read_text()
    joined = re.sub(r"\\\n|(?<=\()\n|\n(?= *[-)])", " ", text)
    options = {option for line in re.findall(r" ray start (.*)|resources=\((.*)\)", joined) for option in words(line)}
    slurm = {
        option for line in re.findall(r"^#SBATCH (.*)|srun (.*?) \w+ ", joined, re.MULTILINE) for option in words(line)
    }
    return (
        shellcheck(text)
        + sorted(slurm - SLURM_OPTIONS)
        + sorted(options - START_OPTIONS)
        + unknown_settings(settings(text))
    )


def words(groups: tuple[str, ...]) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[\w-]+", " ".join(groups)))


def test_the_slurm_script_is_clean_and_ray_knows_its_options():
    assert slurm_problems(CLUSTER / "slurm.sbatch") == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("fi\n", "fii\n"),
        ("--temp-dir=", "--temp-dirr="),
        ("RAY_health_check_period_ms=", "RAY_health_check_period_mss="),
    ],
)
def test_a_misspelling_in_the_slurm_script_is_caught(copy, right, wrong):
    path = copy / "slurm.sbatch"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    assert slurm_problems(path)


def test_the_command_in_the_slurm_script_s_head_is_one_of_ours():
    (command,) = training_commands((CLUSTER / "slurm.sbatch").read_text())
    assert validate(parse(command)).run


# ---- sky.yaml


def sky_task(path: Path, home: Path) -> tuple[int, str]:
    """As `sky jobs launch` reads the file. -> exit code, output"""
    code = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, *task.resources)"
    return run(skypilot() / "python", "-c", code, path, cwd=home, env={**os.environ, "HOME": str(home)})


def with_bucket(folder: Path) -> Path:
    path = folder / "sky.yaml"
    path.write_text(path.read_text().replace("BUCKET: null", "BUCKET: some-bucket"))
    return path


def test_skypilot_reads_the_task_and_asks_for_the_bucket(copy, tmp_path):
    assert "'BUCKET' is None" in sky_task(copy / "sky.yaml", tmp_path)[1]
    code, said = sky_task(with_bucket(copy), tmp_path)
    assert code == 0, said
    assert "[Spot]" in said
    assert "L4" in said


@pytest.mark.parametrize("key", ["resources", "accelerators", "use_spot", "file_mounts", "mode", "workdir"])
def test_a_misspelt_key_of_the_task_is_caught(copy, tmp_path, key):
    path = with_bucket(copy)
    misspell(path, key)
    assert sky_task(path, tmp_path)[0] != 0


def test_the_task_s_scripts_are_clean_and_its_command_is_one_of_ours():
    task = yaml.safe_load((CLUSTER / "sky.yaml").read_text())
    assert shellcheck(task["setup"] + task["run"]) == []
    (command,) = training_commands(task["run"].replace("$BUCKET", "some-bucket"))
    config = validate(parse(command))
    assert config.runs_dir.startswith(next(iter(task["file_mounts"])))
    assert config.train.checkpoint_dir.startswith("s3://")  # a mounted bucket renames nothing at once
    assert config.scale.workers == int(task["resources"]["accelerators"].partition(":")[2])


# ---- the image


def image_problems(path: Path) -> list[str]:
    """hadolint's words, and what would be missing in the image."""
    code, said = run(checkers() / "hadolint", "--no-color", path)
    found = said.splitlines() or ([f"exit code {code}"] if code else [])
    let_in = {
        line[1:] for line in path.with_name("Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", path.read_text(), re.MULTILINE) for name in line.split()}
    found += [f"{name} is copied and not let in" for name in sorted(copied - let_in)]
    found += [f"{name} is let in and not copied" for name in sorted(let_in - copied)]
    return found + [f"there is no {name}" for name in sorted(copied) if not (ROOT / name).exists()]


def test_the_image_is_clean_and_gets_the_files_that_it_copies():
    assert image_problems(DOCKERFILE) == []


def test_the_image_is_pinned_and_runs_as_the_user_that_the_pods_run_as():
    text = DOCKERFILE.read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    head = yaml.safe_load((CLUSTER / "kuberay" / "base" / "cluster.yaml").read_text())["spec"]["headGroupSpec"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    assert int(user) == head["template"]["spec"]["securityContext"]["runAsUser"] > 0
    assert "pip install -c constraints.txt" in text


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("Dockerfile", "\nUSER ", "\nUSERR "),
        ("Dockerfile", "COPY fvlm fvlm", "COPY fvlmm fvlm"),
        ("Dockerfile.dockerignore", "!ray_jobs", "!ray_jobss"),
    ],
)
def test_a_misspelling_in_the_image_s_files_is_caught(copy, file, right, wrong):
    path = copy / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    assert image_problems(copy / "Dockerfile")
