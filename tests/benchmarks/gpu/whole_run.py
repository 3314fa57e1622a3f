"""The whole trainer with Ray on one GPU, in under five minutes: python tests/benchmarks/gpu/whole_run.py --json FILE

    data           2,000 clips of 8 frames of 256 px with the spectrum of photographs, on the local disk; always made
    bare           the step alone, in a process of its own, on batches that lie decoded in the host's memory
    run            `python -m ray_jobs.train`: clips/s, share of the bare step's, data wait, checkpoints, start, memory
    kill           the same twice with `--train.deterministic`, once with SIGKILL to its rank in the middle: equal bits?
    feed           `--feed-test`: clips/s that the ingest could deliver with all cores
    deterministic  that option once more, undisturbed: equal bits, and what it costs

Options after `--` go to every training (`-- --train.cuda-graphs off`). Everything uses clusters of its own, which end
with their commands, and one temporary folder, which is removed (--folder: one that is kept, with its dataset). FILE is
written after every part. Exit code 1: a part failed or was cut; the others were measured, and FILE has the end of its
log under "failed".

    tests/benchmarks/gpu/whole_run.py --dry-run     all of it with a tiny model on the CPU
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # works where fvlm is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ingest"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import run_figures
from chips import machine
from clips import make_clips
from trainings import SAVED, STARTED, Failed, Training, call

from fvlm.config import Config
from fvlm.data.shards import read_manifest
from fvlm.files import write_atomic
from fvlm.train.store import CHECKPOINTS
from ray_jobs.options import command_line

DETERMINISTIC = "--train.deterministic"
SHARES = {"bare": 100, "run": 80, "kill": 140, "feed": 50, "deterministic": 50}
"""Parts, and the most seconds of each."""
LONGEST_S = 600.0
"""Of a part of a dry run, where nobody waits for a GPU."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """clips: in the dataset; steps: of `run`; twin_steps: of the runs that are compared; laps: of the bare step"""

    clips: int = 2000
    steps: int = 320
    save_every: int = 100
    twin_steps: int = 160
    twin_save_every: int = 40
    log_every: int = 10
    laps: int = 15
    batches: int = 32
    feed_s: float = 18.0


DRY = Sizes(
    clips=48, steps=16, save_every=4, twin_steps=12, twin_save_every=4, log_every=2, laps=3, batches=4, feed_s=6.0
)
SMALL = """
    --data.num-frames 2 --data.frame-size 256 --data.global-batch 2 --data.lanes 2 --data.window-steps 4
    --scale.device cpu --optim.warmup-steps 2 --ingest-memory 800MB
""".split()  # noqa: SIM905  (a list is four times as long)


class WholeRun:
    """The parts, and what they have shown."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        given = {key: getattr(args, key) for key in ("steps", "save_every", "twin_steps", "laps") if getattr(args, key)}
        if args.twin_steps:
            given["twin_save_every"] = max(1, args.twin_steps // 4)
        self.sizes = dataclasses.replace(DRY if args.dry_run else Sizes(), **given)
        self.begin = time.monotonic()
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        # On a machine whose GPU Ray does not see, the command fails, and does not train on the CPU.
        preset, small = ("demo", SMALL) if args.dry_run else (args.preset, ["--scale.device", "cuda"])
        self.common = [
            preset, "--model.init", "random", *small, "--data.path", str(folder / "data" / "parquet"),
            "--log.wandb", "off", "--eval.every", "0", "--train.log-every", str(self.sizes.log_every),
            "--train.compile-cache", str(args.compile_cache or folder / "compiled"), *args.options,
        ]  # fmt: skip
        self.found: dict[str, Any] = {
            "machine": machine(self.device) | {"cores": os.cpu_count()},
            "dry_run": args.dry_run,
            "command": self.common,
            "sizes": dataclasses.asdict(self.sizes),
            "parts": {},
            "failed": {},
            "left_out": {},
        }
        self.config: Config = command_line(self.common)[0]
        self.deterministic = [DETERMINISTIC] if knows([*self.common, DETERMINISTIC]) else []
        self.shares = SHARES | dict(args.share)
        self._twin: Training | None = None

    def figures(self, part: str) -> dict[str, Any]:
        return self.found["parts"].setdefault(part, {})

    def write(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self.begin, 1)
        text = json.dumps(self.found, indent=1)
        if self.args.json:
            write_atomic(self.args.json, text + "\n")

    # ---- parts

    def do(self, part: str, work: Callable[[float], None]) -> None:
        """One part: `work(deadline)`. What goes wrong in it is noted, and what it found until then is kept."""
        share = LONGEST_S if self.args.dry_run else self.shares.get(part, 40)
        began = time.monotonic()
        left = self.begin + self.args.budget - began
        print(f"== {part} (at most {min(share, left):.0f} s)", flush=True)
        try:
            if left < 5:
                raise Failed("not measured: the time is over")
            work(began + min(share, left))
        except Exception as error:  # noqa: BLE001  the other parts go on, and this one's error is in the result
            self.found["failed"][part] = f"{type(error).__name__}: {error}"
            print(f"== {part} failed: {error}", flush=True)
        self.figures(part)["seconds"] = round(time.monotonic() - began, 1)
        print(json.dumps({part: self.found["parts"][part]}), flush=True)
        self.write()

    def data(self, deadline: float) -> None:
        make_clips(self.folder / "data", self.sizes.clips)
        manifest = read_manifest(self.folder / "data" / "parquet")
        size = sum(manifest.files["bytes"].to_pylist())
        self.figures("data").update(clips=manifest.num_clips, bytes_a_clip=size / manifest.num_clips)

    def bare(self, deadline: float) -> None:
        out = self.folder / "bare.json"
        own = ["--json", str(out), "--laps", str(self.sizes.laps), "--batches", str(self.sizes.batches)]
        program = str(Path(__file__).with_name("bare_run.py"))
        call([program, *own, "--", *self.common], self.folder / "bare.txt", self.folder, deadline)
        self.figures("bare").update(json.loads(out.read_text()))

    def run(self, deadline: float) -> None:
        sizes = self.sizes
        training = self.training("whole", sizes.steps, sizes.save_every)
        try:
            training.run(deadline)
        finally:
            rows, lines = training.rows(), [line for _, line in training.lines]
            if rows:
                self.figures("run").update(
                    run_figures.speed(rows, training.steps, self.config.data.global_batch, self.bare_ms),
                    start=run_figures.start(lines),
                    checkpoints=run_figures.saves(rows, lines),
                    saving=run_figures.saving_laps(training.steps, sizes.save_every, sizes.log_every),
                    exit_code=training.exit_code,
                )
            shutil.rmtree(training.run_dir / CHECKPOINTS, ignore_errors=True)

    def kill(self, deadline: float) -> None:
        twin, found = self.twin(deadline), self.figures("kill")
        killed = self.twin_training("killed")
        try:
            killed.run(deadline, kill_at=self.sizes.twin_steps // 2)
        finally:
            if killed.killed_at:
                back = killed.seen(STARTED, after=killed.killed_at)
                found.update(
                    killed_at_step=killed.killed_step,
                    checkpoints_before=len([at for at, _ in killed.seen(SAVED) if at < killed.killed_at]),
                    seconds_to_next_step=back[0][0] - killed.killed_at if back else None,
                    restart=run_figures.start(line for _, line in back),
                )
        found.update(
            {"with": [*self.deterministic, *self.args.twin_options], "undisturbed_ms_step": self.speed(twin)["ms_step"]}
        )
        found.update(run_figures.difference(twin.run_dir, killed.run_dir, self.sizes.twin_steps))
        shutil.rmtree(killed.run_dir, ignore_errors=True)

    def twice(self, deadline: float) -> None:
        twin, found = self.twin(deadline), self.figures("deterministic")
        again = self.twin_training("again")
        again.run(deadline)
        both = [self.speed(training)["ms_step"] for training in (twin, again)]
        plain = self.found["parts"].get("run", {}).get("ms_step")
        found.update(
            ms_step=min(both) if all(both) else None,
            ms_step_both=both,
            ms_step_without=plain,
            price=min(both) / plain - 1 if plain and all(both) else None,
        )
        found.update(run_figures.difference(twin.run_dir, again.run_dir, self.sizes.twin_steps))
        shutil.rmtree(again.run_dir, ignore_errors=True)

    def feed(self, deadline: float) -> None:
        step_ms = self.found["parts"].get("run", {}).get("ms_step") or self.bare_ms
        more = ["--step-ms", f"{step_ms:.2f}"] if step_ms else []
        command = ["-m", "ray_jobs.train", *self.common, "--feed-test", "--feed-seconds", str(self.sizes.feed_s), *more]
        output = call(command, self.folder / "feed.txt", self.folder, deadline, codes=(0, 1))
        self.figures("feed").update(run_figures.feed(output), step_ms=step_ms)
        if self.figures("feed")["most_clips_per_s"] is None:
            raise Failed(f"no report\n{output[-2000:]}")

    # ---- what parts share

    @property
    def bare_ms(self) -> float | None:
        return self.found["parts"].get("bare", {}).get("ms_step")

    def speed(self, training: Training) -> dict[str, Any]:
        return run_figures.speed(training.rows(), training.steps, self.config.data.global_batch, self.bare_ms)

    def training(self, name: str, steps: int, save_every: int, more: list[str] | None = None) -> Training:
        length = ["--train.max-steps", str(steps), "--train.save-every", str(save_every), "--train.keep-last", "1"]
        return Training(self.folder, name, [*self.common, *length, *(more or [])])

    def twin_training(self, name: str) -> Training:
        """One of the runs that are compared with each other."""
        more = [*self.deterministic, *self.args.twin_options]
        return self.training(name, self.sizes.twin_steps, self.sizes.twin_save_every, more)

    def twin(self, deadline: float) -> Training:
        """The undisturbed run that others are compared with."""
        if self._twin is None:
            twin = self.twin_training("twin")
            twin.run(deadline)
            self._twin = twin
        return self._twin


def knows(command: list[str]) -> bool:
    """Whether the command line takes these options."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        try:
            command_line(command)
        except SystemExit:
            return False
    return True


def main() -> int:
    args = parse(sys.argv[1:])
    if not args.dry_run and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here. Try --dry-run.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
        return measure(args, args.folder.resolve())
    folder = Path(tempfile.mkdtemp(prefix="whole-"))  # short: Ray's sockets lie below it
    try:
        return measure(args, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(args: argparse.Namespace, folder: Path) -> int:
    whole = WholeRun(args, folder)
    whole.do("data", whole.data)
    parts = {"bare": whole.bare, "run": whole.run, "kill": whole.kill, "feed": whole.feed, "deterministic": whole.twice}
    whole.found["left_out"].update({part: "not among --parts" for part in parts if part not in args.parts})
    for part, work in ((part, parts[part]) for part in args.parts):
        if part == "deterministic" and not whole.deterministic:
            whole.found["left_out"][part] = f"the command has no option {DETERMINISTIC}"
        else:
            whole.do(part, work)
    whole.write()
    print(json.dumps(whole.found), flush=True)
    return 1 if whole.found["failed"] else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    options: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="whole_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--preset", default="joint_multifine")
    parser.add_argument("--parts", default=",".join(SHARES), help="in this order; default %(default)s")
    parser.add_argument(
        "--share", type=share, action="append", default=[], metavar="PART=SECONDS", help="most of a part"
    )
    parser.add_argument("--folder", type=Path, help="where everything lies, and what is there of it is used again")
    parser.add_argument("--budget", type=float, help="seconds for everything; default 290, of a dry run 1800")
    parser.add_argument("--steps", type=int, help=f"of run; default {Sizes.steps}")
    parser.add_argument("--save-every", type=int, help=f"steps of run; default {Sizes.save_every}")
    parser.add_argument("--laps", type=int, help=f"of the bare step; default {Sizes.laps}")
    parser.add_argument("--twin-steps", type=int, help=f"of the runs that are compared; default {Sizes.twin_steps}")
    parser.add_argument("--twin-options", default="", help="of these runs alone, in one word: --twin-options='--a b'")
    parser.add_argument("--compile-cache", type=Path, help="folder with compiled programs; default: a fresh one")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(arguments)
    args.parts, args.options, args.twin_options = args.parts.split(","), options, args.twin_options.split()
    args.budget = args.budget or (1800.0 if args.dry_run else 290.0)
    if unknown := set(args.parts) - SHARES.keys():
        parser.error(f"--parts: no part {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    return args


def share(text: str) -> tuple[str, float]:
    """run=120 -> ("run", 120.0)"""
    part, _, seconds = text.partition("=")
    if part not in SHARES:
        raise argparse.ArgumentTypeError(f"no part {part!r}; there are {', '.join(SHARES)}")
    return part, float(seconds)


if __name__ == "__main__":
    sys.exit(main())
