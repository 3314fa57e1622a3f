"""The program: an undisturbed run, one that is killed again and again, and what is different in the end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from datasets import write_dataset

from fvlm.train.sinks import TRAIN_LOG
from torture.attack import LONGEST_DELAY_S, Attack, Stuck
from torture.compare import Comparison, compare
from torture.disk import SmallDisk
from torture.report import Outcome
from torture.schedule import KINDS, plan_kills
from torture.terminal import Terminal
from torture.timeline import Timeline

CLIPS, CPUS, STORE_MB = 96, 4, 512
SMALL = (
    "--data.frame-size 56 --data.global-batch 4 --data.lanes 4 --data.window-steps 4 "
    "--train.log-every 1 --train.save-every 10 --log.samples --log.wandb off --scale.cpus-per-worker 0.5"
)
"""Of `demo`: a step takes 0.1 to 0.3 s. Each step is logged, or nobody could tell from train.log when it was done."""
FIRST_STEPS, STEPS_A_KILL = 60, 40
UNDISTURBED, KILLED = "undisturbed", "killed"


def main() -> None:
    """The command. Exit code 1: something was lost, doubled or unequal, or the run did not come back."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    passed = False
    try:
        passed = Torture(args, folder).run()
    finally:
        if passed:
            shutil.rmtree(folder)
        else:
            print(f"logs, runs and the cluster's own folder are in {folder}", flush=True)
    sys.exit(0 if passed else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torture",
        description="Kill a training run at seeded random moments, start it again by the documented commands, and "
        "compare it with an undisturbed run.",
        epilog="kinds of kills:\n" + "\n".join(f"  {kind:<12} {text}" for kind, text in KINDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the kinds and the moments")
    parser.add_argument(
        "--steps", type=int, default=0, help=f"of each run; {FIRST_STEPS} and {STEPS_A_KILL} for each kill by default"
    )
    parser.add_argument("--only", default="", metavar="KIND,...", help="of kills; all by default")
    parser.add_argument("--workers", type=int, default=1, help="ranks")
    args = parser.parse_args()
    args.only = args.only.split(",") if args.only else list(KINDS)
    if unknown := set(args.only) - KINDS.keys():
        parser.error(f"--only: no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    args.steps = args.steps or FIRST_STEPS + STEPS_A_KILL * args.kills
    return args


class Torture:
    """Both runs, in `folder`."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self._began = time.monotonic()
        self._terminal = Terminal(folder, CPUS * args.workers, STORE_MB * args.workers)
        self._left_out: dict[str, str] = {}

    def run(self) -> bool:
        """Whether the killed run came back each time, and ended as the undisturbed one did."""
        write_dataset(self.folder / "data", CLIPS)
        with contextlib.ExitStack() as at_the_end:
            disk = self._small_disk(at_the_end)
            try:
                outcome = self._both_runs(disk)
            finally:
                left = self._terminal.close()
                if disk:
                    disk.free()
            outcome = dataclasses.replace(outcome, left_behind=left)
            for problem in outcome.problems():
                print(problem)
            print(outcome.line(), flush=True)
            passed = not outcome.problems()
            if disk and not passed:
                shutil.copytree(disk.folder, self.folder / "from-the-small-disk")
        return passed

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def _small_disk(self, at_the_end: contextlib.ExitStack) -> SmallDisk | None:
        if "disk" not in self.args.only:
            return None
        try:
            return at_the_end.enter_context(SmallDisk(self.folder / "disk"))
        except OSError as error:
            self._left_out["disk"] = str(error)
            self.say(f"no kills of kind disk: a small one cannot be mounted here ({error})")
            return None

    def _both_runs(self, disk: SmallDisk | None) -> Outcome:
        runs = self.folder / "runs"
        calm = self._begin(UNDISTURBED, runs, None)
        hard = None
        try:
            calm.run([], 0, 0)
            step_s = self._seconds_a_step(calm)
            longest = min(LONGEST_DELAY_S, STEPS_A_KILL * step_s)  # the steps have to last for all kills
            self.say(
                f"undisturbed: {self.args.steps} steps, {step_s:.2f} s each; kills up to {longest:.1f} s after one"
            )
            kinds = [kind for kind in self.args.only if kind not in self._left_out]
            hard = self._begin(KILLED, disk.folder if disk else runs, disk)
            hard.run(plan_kills(self.args.seed, self.args.kills, kinds), longest, self.args.seed)
        except Stuck as error:
            print(self._terminal.tail())
            return self._outcome(hard, None, str(error))
        killed = (disk.folder if disk else runs) / KILLED
        return self._outcome(hard, compare(runs / UNDISTURBED, killed, self.args.steps), "")

    def _begin(self, run: str, runs_dir: Path, disk: SmallDisk | None) -> Attack:
        self.say(f"{run}: begins")
        paths = ["--run", run, "--runs-dir", str(runs_dir), "--data.path", str(self.folder / "data")]
        size = ["--train.max-steps", str(self.args.steps), "--scale.workers", str(self.args.workers)]
        self._terminal.train(["demo", *paths, *size, *SMALL.split()])
        return Attack(self._terminal, Timeline(runs_dir / run / TRAIN_LOG), disk, self.say)

    def _seconds_a_step(self, calm: Attack) -> float:
        """Of the undisturbed run. Raises Stuck when it was none: there is nothing to compare with then."""
        events = calm.timeline.steps
        if [event.step for event in events] != list(range(1, self.args.steps + 1)):
            raise Stuck(
                f"the undisturbed run was disturbed: its log does not have the steps 1 to {self.args.steps} once"
            )
        return (events[-1].at - events[0].at) / max(len(events) - 1, 1)

    def _outcome(self, hard: Attack | None, comparison: Comparison | None, stuck: str) -> Outcome:
        return Outcome(
            seed=self.args.seed,
            steps=self.args.steps,
            planned=self.args.kills,
            kills=hard.kills if hard else [],
            left_out=self._left_out,
            repeated=hard.timeline.repeated() if hard else 0,
            commands=hard.commands() if hard else [],
            comparison=comparison,
            stuck=stuck,
            left_behind=[],
            seconds=time.monotonic() - self._began,
        )
