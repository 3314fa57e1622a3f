"""Every command of README.md and cluster/README.md, as a person pastes it: in a fresh folder, with relative paths.

Only sizes and numbers of steps are added, at the end (`readme_commands.RULES`), and folders at the root of a disk lie
in the fresh one. What cannot be run here is read by its own parser, and listed there with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from jobs import settings
from legacy_shards import make_sample, write_shard
from legacy_writer import blank_checkpoint
from readme_commands import (
    FILES,
    ROOT,
    RULES,
    SMALL,
    SMALL_MODEL,
    Command,
    Listed,
    Run,
    commands_of,
    plan_for,
)

from fvlm.data.synthetic import write_videos
from fvlm.model.hub import build_model
from ray_jobs.options import parse

PROJECT = (
    *FILES,
    "fvlm",
    "ray_jobs",
    "cluster",
    "tests",
    "Makefile",
    "pyproject.toml",
    "constraints.txt",
    ".rayignore",
)
"""What a checkout has, as far as commands need it."""
CLIPS, DONE = 8, 2
"""Videos, and samples of the earlier trainer; steps that its checkpoint has finished."""
PATIENCE = 500.0
pytestmark = pytest.mark.timeout(900)  # the first test of a long command runs those before it


@dataclass
class Fresh:
    """A checkout of the project in a home of its own, and the commands that were run in it, in the order of the files.

    A command runs when its result is asked for, after all before it.
    """

    home: Path
    commands: list[Command]
    env: dict[str, str] = field(default_factory=dict)
    results: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    """By a command's text: exit code, what it printed, up to what step it was to train."""
    steps: int = DONE

    @property
    def project(self) -> Path:
        return self.home / "fvlm"

    def result(self, command: Command) -> tuple[int, str, int]:
        """Run the command if it was not run yet, after those before it; of these, long ones only where it is one."""
        for each in self.commands[: self.commands.index(command)]:
            if not plan_of(each).long or plan_of(command).long:
                self.run(each)
        return self.run(command)

    def run(self, command: Command) -> tuple[int, str, int]:
        if command.text not in self.results:
            plan = plan_of(command)
            self.steps += "{steps}" in plan.append
            code, said = self.shell(f"{self.in_here(command.text)} {plan.append.format(steps=self.steps)}")
            self.results[command.text] = code, said, self.steps
            if command.text.endswith("start.sh"):
                self.env |= dict(re.findall(r"^export (\w+)=(.*)$", said, re.MULTILINE))
        return self.results[command.text]

    def in_here(self, text: str) -> str:
        """The command with its placeholders filled in; folders at the root of the disk lie in the project."""
        for pattern, place in {
            r"/ABSOLUTE/DATASET|(?<=\s)/data/clips": f"{self.project}/data/clips",
            r"/ABSOLUTE/RUNS|(?<=\s)/data/runs": f"{self.project}/data/runs",
            r"\bDATASET\b": "data/clips",
            r"\bRUNS_DIR\b": "runs",
            r"\bRUN\b": "joint_multifine",
            r"\bDIR\b": "out",
            r"http://127\.0\.0\.1:8265": self.env["RAY_API_SERVER_ADDRESS"],  # the port may be taken here
        }.items():
            text = re.sub(pattern, place, text)
        return text

    def shell(self, text: str) -> tuple[int, str]:
        """-> exit code and output, both streams."""
        process = subprocess.Popen(
            ["bash", "-c", text], cwd=self.project, env=self.env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            raise AssertionError(f"it did not end within {PATIENCE:.0f} s: {text}\n{said}") from error
        except BaseException:  # the test itself is ended
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, said


def plan_of(command: Command) -> Run:
    plan = plan_for(command)
    assert isinstance(plan, Run)
    return plan


def all_commands() -> list[Command]:
    return [command for file in FILES for command in commands_of(file, (ROOT / file).read_text())]


def of_place(where: str) -> list[Command]:
    """Those to be run there, each once."""
    found = [c for c in all_commands() if isinstance(plan := plan_for(c), Run) and plan.where == where]
    return list({command.text: command for command in reversed(found)}.values())[::-1]


def marked(commands: list[Command]) -> list:
    plans = {command: plan_for(command) for command in commands}
    return [
        pytest.param(command, id=f"{command.file}-{command.text}",
                     marks=[pytest.mark.long] if isinstance(plan, Run) and plan.long else [])
        for command, plan in plans.items()
    ]  # fmt: skip


def fresh(where: str) -> Iterator[Fresh]:
    """A folder with nothing but the checkout; its name is short, for Ray's sockets below it."""
    home = Path(tempfile.mkdtemp(prefix="fvlm-"))
    try:
        for name in PROJECT:
            path, copy = ROOT / name, home / "fvlm" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, copy, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(path, copy)
        (home / "fvlm" / ".venv").symlink_to(sys.prefix)
        bare, ports = settings(home)
        url = f"http://127.0.0.1:{ports['FVLM_DASHBOARD_PORT']}"
        ours = {name: value for name, value in ports.items() if name.startswith("FVLM_") and not name.endswith("DIR")}
        # What `pip install -e .` does for every process, and the address of a cluster whose port is not the usual one.
        env = bare | ours | {"PYTHONPATH": str(home / "fvlm"), "RAY_API_SERVER_ADDRESS": url}
        yield Fresh(home, of_place(where), env)
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def videos() -> Iterator[Fresh]:
    """Videos and a table of captions, and nothing prepared yet."""
    for folder in fresh("videos"):
        captions = write_videos(folder.project / "videos", CLIPS, size=64)
        captions.rename(folder.project / "captions.csv")
        yield folder


@pytest.fixture(scope="module")
def earlier() -> Iterator[Fresh]:
    """Shards and a checkpoint of the earlier trainer."""
    for folder in fresh("earlier"):
        (folder.project / "features").mkdir()
        for number in range(2):
            samples = [make_sample(number * CLIPS // 2 + i, size=256, latent=32) for i in range(CLIPS // 2)]
            write_shard(folder.project / "features" / f"shard_{number:04d}.pt", samples)
        model = build_model(parse(["joint_multifine", *SMALL_MODEL.split()]).model, (4, 32, 32), seed=0)
        torch.save(blank_checkpoint(model, DONE), folder.project / "latest.pt")
        yield folder


@pytest.fixture(scope="module")
def cluster(videos: Fresh) -> Iterator[Fresh]:
    """The first folder with its dataset, and commands of which the first starts a cluster and the last ends it."""
    prepare = next(command for command in videos.commands if "ray_jobs.prepare" in command.text)
    assert videos.result(prepare)[0] == 0
    ends = ("start.sh", "stop.sh")
    first, last = (next(c for c in of_place("cluster") if c.text.endswith(end)) for end in ends)
    between = [command for command in of_place("cluster") if not command.text.endswith(ends)]
    yield Fresh(videos.home, [first, *between, last], videos.env, steps=videos.steps)
    videos.shell("cluster/local/stop.sh")  # where a test has failed before


def require_good(folder: Fresh, command: Command) -> None:
    (code, said, steps), plan = folder.result(command), plan_of(command)
    assert code in plan.codes, said
    assert "Traceback" not in said, said
    assert re.search(plan.says.format(steps=steps), said), said


# ---- nothing is left out


def test_every_command_is_run_or_listed_with_a_reason():
    commands = all_commands()
    assert len(commands) > 60
    assert [str(command) for command in commands if plan_for(command) is None] == []
    used = {next(i for i, (pattern, _) in enumerate(RULES) if re.search(pattern, c.text)) for c in commands}
    assert [RULES[i][0] for i in range(len(RULES)) if i not in used] == []


def test_a_new_command_would_be_found_and_missed():
    markdown = "Text `ray new --now`.\n\n    python -m new \\\n        --option  # why\n\n```\n$ make new\nsaid\n```\n"
    found = commands_of("f", markdown)
    assert [(c.line, c.text) for c in found] == [(1, "ray new --now"), (3, "python -m new --option"), (7, "make new")]
    assert [c for c in found if plan_for(c) is None] == found
    with pytest.raises(ValueError, match="f:2: neither a known command nor a block of NO_COMMANDS: frobnicate --all"):
        commands_of("f", "```\nfrobnicate --all\n```\n")


LISTED = [command for command in all_commands() if isinstance(plan_for(command), Listed)]


@pytest.mark.parametrize("command", marked(LISTED))
def test_what_cannot_be_run_here_is_a_command_all_the_same(command):
    plan = plan_for(command)
    assert isinstance(plan, Listed) and plan.reason
    plan.parse(command.text)


# ---- what is run


@pytest.mark.parametrize("command", marked(of_place("videos")))
def test_a_command_for_ones_own_videos_does_what_it_says(videos, command):
    require_good(videos, command)


@pytest.mark.parametrize("command", marked(of_place("earlier")))
def test_a_command_for_the_earlier_trainers_files_does_what_it_says(earlier, command):
    require_good(earlier, command)


@pytest.mark.parametrize("command", marked(of_place("cluster")))
def test_a_command_for_a_cluster_does_what_it_says(cluster, command):
    require_good(cluster, command)


def test_the_same_command_again_resumes_in_the_one_folder_that_it_has_made(videos):
    command = next(c for c in videos.commands if re.search(r"\.train joint_multifine --data\.path data/clips$", c.text))
    videos.result(command)
    run = videos.project / "runs" / "joint_multifine"

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]

    finished = steps()[-1]  # other commands may have gone on with it, or with other runs
    videos.steps += 1
    code, said = videos.shell(f"{videos.in_here(command.text)} {SMALL} --train.max-steps {videos.steps}")
    assert code == 0, said
    assert steps() == list(range(1, videos.steps + 1))
    assert f"resumed at step {finished} from step-{finished:08d}" in said
    assert [path.name for path in run.parent.iterdir()] == ["joint_multifine"]
    assert list(run.glob("wandb/offline-*"))  # what `wandb sync` is told to send


@pytest.mark.long
def test_the_demo_that_make_starts_runs_in_its_relative_folder(videos):
    code, said = videos.shell("python -m ray_jobs.demo --clips 24 --held-out 8 --steps 20")
    assert code == 0, said
    assert (videos.project / "demo-out" / "gaze.png").is_file()
