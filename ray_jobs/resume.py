"""`python -m ray_jobs.resume RUNS_DIR`: submit again what a reboot or a lost cluster has left unfinished."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ray.dashboard.modules.job.common import JobErrorType
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from fvlm.config import Config
from fvlm.data.storage import is_uri
from fvlm.errors import StoreUnavailable, UserError
from fvlm.files import file_error
from fvlm.train.run_folder import CONFIG
from fvlm.train.run_report import is_locked
from fvlm.train.store import checkpoint_store, newest_step
from ray_jobs.cli import run_command
from ray_jobs.command import COMMAND, HELD, hold, release, remembered, valid_now
from ray_jobs.paths import absolute
from ray_jobs.submit import (
    RETRY_S,
    TRIES,
    active_job,
    asking_for_token,
    connect,
    default_address,
    entrypoint,
    outcome,
    submit,
)

SET_UP_S = 120.0
"""How long a job may take until its command runs; it waits for its GPU after that."""

HELP = """
A run is submitted once, by the options of its last start (command.json in its folder), as ray_jobs.submit would. When
it cannot be trained, its job says why and is not tried again before the next call; the call itself does not wait for
the end of a job. Several runs on one GPU wait for each other in the cluster.

Left alone is a run that is finished, that is held, that a job or another process trains, whose folder was copied or
moved, or that has no command.json. --hold is for a run that was stopped on purpose (it stops nothing itself); starting
the run by hand ends it.

exit code: 0; 2 when the input was at fault or a run could not be submitted, after all others were. Token: as
ray_jobs.submit.
"""


@dataclass(frozen=True)
class Unfinished:
    """A run that nobody trains."""

    config: Config
    args: list[str]
    """Options of its last start, paths absolute."""
    steps: int | None
    """Finished ones; None where their store is away. The job waits for it, and ends at once if the run is finished."""


def main() -> None:
    """The command. Ends the process with code 2 when a run that should go on does not."""
    logging.disable(logging.WARNING)  # Ray's client tells of every upload and socket
    options = arguments(sys.argv[1:])
    root, deadline = Path(absolute("RUNS_DIR", options.runs_dir)), time.monotonic() + options.wait
    if options.hold or options.release:
        change_hold(run_folder(root, options.hold or options.release), bool(options.hold))
        return
    wait_for(root, deadline)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give the one in which the folders of runs lie (--runs-dir).")
    failed, unfinished = False, []
    for folder in run_folders(root):
        try:
            found = examine(folder)
        except (UserError, OSError) as error:
            reason = file_error(error, folder) if isinstance(error, OSError) else error
            print(f"{folder.name}: error: {reason}", flush=True)
            failed = True
            continue
        if isinstance(found, Unfinished):
            unfinished.append(found)
        else:
            print(f"{folder.name}: {found}", flush=True)
    if unfinished:
        client = connect_by(options.address, deadline)
        with asking_for_token(client.get_address()):
            submitted = [go_on(client, run, options.dry_run, deadline) for run in unfinished]
        failed = failed or not all(submitted)
    sys.exit(2 if failed else 0)


def arguments(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.resume",
        description="Submit every unfinished run of a folder of runs again.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs_dir", metavar="RUNS_DIR")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="say what would be done, a line a run, and do nothing")
    what.add_argument("--hold", metavar="RUN", help="from now on leave this run alone")
    what.add_argument("--release", metavar="RUN", help="end its hold")
    parser.add_argument("--address", default=default_address(), metavar="URL", help="of the dashboard; %(default)s")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="after a boot: how long the folders of runs and data may take to be mounted, and the cluster to come up",
    )
    return parser.parse_args(args)


def run_folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/{CONFIG}"))


def run_folder(root: Path, name: str) -> Path:
    """Raises UserError when `root` has no such run."""
    if not (root / name / CONFIG).is_file():
        known = ", ".join(folder.name for folder in run_folders(root)) or "none"
        raise UserError(f"{root} holds no run {name!r}. Runs there: {known}.")
    return root / name


def change_hold(folder: Path, held: bool) -> None:
    if held:
        hold(folder)
        print(f"{folder.name}: held. A job that trains it goes on; this does not stop it.")
    else:
        release(folder)
        print(f"{folder.name}: released")


def examine(folder: Path) -> Unfinished | str:
    """The run of this folder, or why it is to be left alone. Raises UserError when its command cannot be used."""
    args = remembered(folder)
    if args is None:
        return f"left alone: it has no {COMMAND}; starting it once by hand writes one"
    config = valid_now(args)
    if isinstance(config, str):
        raise UserError(
            f"{folder / COMMAND}: its options are not valid now: {config}\nStart the run by hand with others."
        )
    if config.run_dir.resolve() != folder.resolve():
        return f"left alone: its last start trained {config.run_dir}, so it was copied or moved; start it by hand"
    steps = finished_steps(config)
    if steps is not None and steps >= config.train.max_steps:
        return f"finished: {steps} of {config.train.max_steps} steps"
    if (folder / HELD).exists():
        return f"held at {position(config, steps)}; --release {folder.name} ends that"
    if is_locked(folder):
        return "running: a process trains it"
    return Unfinished(config, args, steps)


def finished_steps(config: Config) -> int | None:
    """None where the store of the checkpoints does not answer, which is told on a line."""
    try:
        return newest_step(checkpoint_store(config))
    except StoreUnavailable as error:
        print(f"{config.run_name}: {error}", flush=True)
        return None


def position(config: Config, steps: int | None) -> str:
    return f"step {'?' if steps is None else steps} of {config.train.max_steps}"


def go_on(client: JobSubmissionClient, run: Unfinished, dry_run: bool, deadline: float) -> bool:
    """Submit the run and say so on one line, or say why not. Returns False when that is an error."""
    name, steps = run.config.run_name, position(run.config, run.steps)
    if job := active_job(client, run.config):
        print(f"{name}: running: job {job.submission_id} is {job.status}", flush=True)
        return True
    command = entrypoint(run.config, run.args)
    if dry_run:
        print(f"{name}: would be submitted at {steps}: {command}", flush=True)
        return True
    if not is_uri(run.config.data.path):
        wait_for(Path(run.config.data.path), deadline)  # still absent then: the job says so
    try:
        print(f"{name}: submitted at {steps} as {start(client, run)}: {command}", flush=True)
    except UserError as error:
        print(f"{name}: error: {error}", flush=True)
        return False
    return True


def start(client: JobSubmissionClient, run: Unfinished) -> str:
    """Submit the next attempt and see it begin. Returns its submission id. Raises UserError when it cannot begin."""
    for _ in range(TRIES):
        job = submit(client, run.config, run.args)
        info = begun(client, job)
        if info.error_type is None or info.driver_exit_code is not None:
            return job
        # As in ray_jobs.submit: the code that was uploaded for one job may be dropped while the next one starts.
        if info.error_type != JobErrorType.RUNTIME_ENV_SETUP_FAILURE:
            break
        time.sleep(RETRY_S)
    raise UserError(f"its job did not begin. {outcome(info)}")


def begun(client: JobSubmissionClient, job: str) -> JobDetails:
    """The job once its command runs, has ended, or could not be started within SET_UP_S."""
    deadline = time.monotonic() + SET_UP_S
    while True:
        info = client.get_job_info(job)
        if info.status != JobStatus.PENDING or time.monotonic() > deadline:
            return info
        time.sleep(0.5)


def connect_by(address: str, deadline: float) -> JobSubmissionClient:
    """`connect`, tried again until `deadline`. Raises UserError."""
    while True:
        try:
            return connect(address)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def wait_for(folder: Path, deadline: float) -> None:
    """Until `folder` holds something, at most until `deadline`: one that is not mounted yet is absent or empty."""
    told = False
    while time.monotonic() < deadline and not (folder.is_dir() and any(folder.iterdir())):
        if not told:
            print(f"waiting for {folder}", flush=True)
        told = True
        time.sleep(1)


if __name__ == "__main__":
    run_command(main)
