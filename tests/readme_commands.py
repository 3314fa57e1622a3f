"""The commands of a Markdown file, and what the test of README.md does with each: run it, or say why it cannot be."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_jobs import submit
from ray_jobs.options import command_line, parse

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "cluster/README.md")
PROGRAMS = {
    "python", ".venv/bin/python", "make", "pip", "uv", "ray", "wandb", "hf", "bash", "git", "tests/benchmarks/gpu.sh",
    "cluster/local/start.sh", "cluster/local/stop.sh", "cluster/local/install.sh", "cluster/local/uninstall.sh",
    "systemctl", "journalctl", "loginctl", "sudo", "schtasks", "wsl", "ssh", "scp", "mkdir", "export", "curl",
    "docker", "kubectl", "sbatch", "scancel", "sky", "aws", "gsutil", "prometheus",
}  # fmt: skip
"""What a line or a piece of code in the text begins with that is a command."""
NO_COMMANDS = ("mp4 + captions", "fvlm/       the library", "# kustomization.yaml")
"""How the blocks begin that hold no commands: a drawing, a list of files, a file's content."""


@dataclass(frozen=True)
class Command:
    file: str
    line: int
    text: str
    """On one line, without a comment."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


# ---- what is in a file


def commands_of(file: str, markdown: str) -> list[Command]:
    """Every command of the blocks and of the pieces of code in the text.

    Raises ValueError for a line of a block that is neither a command by its first word, nor a comment, nor output, and
    stands in no block of NO_COMMANDS: a new program has to be looked at.
    """
    found = []
    text = []
    for number, lines in blocks(markdown):
        if not lines[0].startswith("\t"):
            found += list(_of_block(file, number, lines))
        else:
            text += [(number + index, line[1:]) for index, line in enumerate(lines)]
    found += list(_of_text(file, text))
    return sorted(found, key=lambda command: command.line)


def blocks(markdown: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines) of every block of code, and, with a tab before each, of the text between.

    A block stands between ``` or is indented by four columns after an empty line.
    """
    kind, number, held = "text", 1, list[str]()
    before = ""
    for index, line in enumerate(markdown.splitlines(), 1):
        fence = line.startswith("```")
        indented = line.startswith("    ") and (kind == "indented" or (kind == "text" and not before.strip()))
        now = "text" if fence and kind == "fenced" else "fenced" if fence or kind == "fenced" else ""
        now = now or ("indented" if indented or (kind == "indented" and not line.strip()) else "text")
        if fence or now != kind:
            if any(each.strip() for each in held):
                yield number, [f"\t{each}" for each in held] if kind == "text" else held
            kind, number, held = now, index + fence, []
        if not fence:
            held.append(line)
        before = line
    if any(each.strip() for each in held):
        yield number, [f"\t{each}" for each in held] if kind == "text" else held


def _of_block(file: str, number: int, lines: list[str]) -> Iterator[Command]:
    if any("\n".join(lines).strip().startswith(begin) for begin in NO_COMMANDS):
        return
    prompted = any(line.startswith("$ ") for line in lines)
    whole, start = "", number
    for index, line in enumerate(lines):
        start = start if whole else number + index
        whole += line.removeprefix("$ ").strip() if not prompted or whole or line.startswith("$ ") else ""
        if whole.endswith("\\"):
            whole = whole[:-1]
            continue
        text, whole = without_comment(whole), ""
        if not text:
            continue
        if first_word(text) not in PROGRAMS:
            raise ValueError(f"{file}:{start}: neither a known command nor a block of NO_COMMANDS: {text}")
        yield Command(file, start, text)


def _of_text(file: str, lines: list[tuple[int, str]]) -> Iterator[Command]:
    """A piece of code is a command when it begins with a program and goes on."""
    text = "\n".join(line for _, line in lines)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
        piece = " ".join(match[1].split())
        if first_word(piece) in PROGRAMS and " " in piece:
            yield Command(file, lines[text[: match.start()].count("\n")][0], piece)


def without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#(\s.*)?$", "", line).strip()


def first_word(text: str) -> str:
    """The program: variables that are set before it are passed over."""
    words = [word for word in text.split() if not re.match(r"[A-Z_]+=", word)]
    return words[0] if words else ""


# ---- what is done with each


SMALL_MODEL = "--model.init random --model.vision tiny-dinov2 --model.language tiny-llama --model.query-width 96"
SMALL = (
    f"{SMALL_MODEL} --data.frame-size 256 --data.num-frames 2 --data.global-batch 4 --data.lanes 4 "
    "--data.window-steps 2 --train.log-every 1 --eval.pictures 1"
)
"""The sizes of every run here: a tiny model with random weights, for there is no hub, and few and small clips."""
STEPS = "--train.max-steps {steps}"
"""Each start of a run trains for one more step than the one before."""


@dataclass(frozen=True)
class Run:
    """Run it literally in a fresh folder, `append` at its end.

    where:  the folder: "videos" has videos and captions; "earlier" what the earlier trainer left; "cluster" is the
            first, with a cluster on this machine
    codes:  exit codes that are an answer
    says:   what it must print, a regular expression
    long:   it takes longer than what else is run, and waits for `-m long`

    "{steps}" stands for the number of steps that the start trains up to.
    """

    append: str = ""
    where: str = "videos"
    codes: tuple[int, ...] = (0,)
    says: str = ""
    long: bool = False


@dataclass(frozen=True)
class Listed:
    """It cannot be run here. `parse` raises when it is no command."""

    reason: str
    parse: Callable[[str], object]


def shell(text: str) -> None:
    """Bash can read it."""
    subprocess.run(["bash", "-n", "-c", text], check=True)


def script(text: str) -> None:
    """Bash can read the script that it calls."""
    path = next(word for word in text.split() if word.endswith(".sh"))
    subprocess.run(["bash", "-n", path], cwd=ROOT, check=True)


def make(text: str) -> None:
    """Make knows how: it prints what it would do."""
    targets = text.split("&&")[0]
    subprocess.run(["bash", "-c", f"{targets} --dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def training(text: str) -> None:
    """Our own command line takes the options of `python -m ray_jobs.train` and `.submit`, and of slurm.sbatch."""
    program, words = re.split(r"-m ray_jobs\.(?=train|submit)|(?=slurm\.sbatch)", text)[-1].split(maxsplit=1)
    given = shlex.split(words)
    if program == "submit":
        parse(submit.arguments(given)[1])
    else:
        command_line(given)


def options_known(text: str) -> None:
    """The script's own help lists every option."""
    script = next(word for word in text.split() if word.endswith(".py"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    said = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r"--[a-z-]+", text)) <= set(re.findall(r"--[a-z-]+", said))


RULES: list[tuple[str, Run | Listed]] = [
    # What needs other machines, accounts, or rights here.
    (r"s3://bucket.*http://HEAD", Listed("a bucket, and a cluster of 16 GPUs", training)),
    (r"-m ray_jobs\.train .*s3://", Listed("a bucket; tests/test_remote.py has a server of S3", training)),
    (r"-m ray_jobs\.submit .*http://192\.168", Listed("a second machine; tests/test_nodes.py has nodes", training)),
    (r"-m ray_jobs\.submit .*--scale\.device cuda", Listed("a GPU in a cluster of Kubernetes", training)),
    (r"^scancel --batch --signal=TERM JOB$", Listed("Slurm's own", shell)),
    (r"^sbatch .*slurm\.sbatch", Listed("Slurm; tests/ops runs it with stand-ins", training)),
    (r"^FVLM_H\w+=192\.168|^scp |^ssh |^mkdir -p ~/\.fvlm-cluster && scp", Listed("a second machine", shell)),
    (r"^(kubectl|docker) |\$\(kubectl", Listed("Kubernetes and a registry; tests/ops reads the files", shell)),
    (r"^(aws|sky) |^ray (up|down|dashboard)", Listed("an account at a cloud", shell)),
    (r"^wandb ", Listed("an account at W&B", shell)),
    (r"^(systemctl|journalctl|loginctl|sudo) ", Listed("changes this machine's services", shell)),
    (r"^(schtasks|wsl) ", Listed("Windows", shell)),
    (r"^prometheus ", Listed("Prometheus; tests/ops runs it", shell)),
    (r"^pip install|^make \.venv/ready", Listed("makes an environment, from the network", shell)),
    (r"^make (test|test-long|test-ops|torture)$", Listed("runs the tests themselves, this one too", make)),
    (r"benchmarks/gpu\.sh", Listed("a CUDA GPU; --dry-run takes minutes", script)),
    (r"benchmarks/\w+\.py", Listed("measures for many minutes; tests/test_bench_*.py run the parts", options_known)),
    (r"^make bench-", Listed("measures for many minutes; tests/test_bench_*.py run the parts", make)),
    (r"^make demo$", Listed("sets an environment up from the network; what it runs then is run below", make)),
    # What is run. In the order of the file, so that each finds what those before it have made.
    (r"-m ray_jobs\.prepare ", Run("--latents block-transform", says="clips  ")),
    (r"-m ray_jobs\.train .*--feed-test", Run(f"--feed-seconds 3 {SMALL}", codes=(0, 1), says="delivered ")),
    (r"-m ray_jobs\.train .*--import-checkpoint", Run(f"{SMALL} {STEPS}", "earlier", says="finished {steps} steps")),
    (r"^python -m ray_jobs\.train .*--data\.path /data/clips$",  # what resumes the run that a relative path has begun
     Run(f"{SMALL} {STEPS}", says="finished {steps} steps", long=True)),
    (r"^python -m ray_jobs\.train .*--scale\.workers 8",
     Run(f"{SMALL} {STEPS} --scale.workers 2", says="finished {steps} steps", long=True)),
    (r"^python -m ray_jobs\.train ", Run(f"{SMALL} {STEPS}", says="finished {steps} steps")),
    (r"-m ray_jobs\.doctor \w", Run(f"{SMALL} {STEPS}", says="ok    data")),
    (r"-m ray_jobs\.doctor$", Run(codes=(0, 1), says="ok    ")),
    (r"-m ray_jobs\.status ", Run(says="joint_multifine")),
    (r"-m ray_jobs\.convert ", Run(where="earlier", says="clips  ")),
    (r"-m fvlm\.data\.shards$", Run("data/clips", says="fingerprint")),
    (r"-m fvlm\.data\.shards data/clips --sample", Run(where="earlier", says="look.png")),
    (r"-m fvlm\.convert\.legacy_checkpoint ", Run(
        "--config.model.init random --config.model.vision tiny-dinov2 --config.model.language tiny-llama "
        "--config.model.query-width 96", "earlier", says="written: ")),
    (r"local/(un)?install\.sh", Run("--dry-run", says="would write|no units")),
    (r"-m ray_jobs\.submit --help$", Run(says="exit code: ")),
    (r"-m ray_jobs\.resume RUNS_DIR --hold RUN$", Run(says="held")),
    (r"-m ray_jobs\.resume ", Run(says="finished: ")),
    (r"^export [A-Z_]+=\S+( [A-Z_]+=\S+)*$", Run()),
    (r"^cluster/local/start\.sh$", Run(where="cluster", says="export RAY_AUTH_TOKEN_PATH=", long=True)),
    (r"^cluster/local/stop\.sh$", Run(where="cluster", says="stopped the cluster", long=True)),
    (r"-m ray_jobs\.submit ", Run(f"{SMALL} {STEPS}", "cluster", says="SUCCEEDED", long=True)),
    (r"^ray job submit .*ray_jobs\.train", Run(f"{SMALL} {STEPS}", "cluster", says="succeeded", long=True)),
    (r"^ray job stop --address", Run(where="cluster", says="demo-a1", long=True)),
    (r"^ray job (stop|submit)$", Listed("names the program; given whole, it is run", shell)),
]  # fmt: skip
"""(pattern, what is done): the first that is found in a command counts."""


def plan_for(command: Command) -> Run | Listed | None:
    """None: it is neither run nor listed."""
    return next((plan for pattern, plan in RULES if re.search(pattern, command.text)), None)
