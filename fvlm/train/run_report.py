"""What a run folder tells of its run: state, position, speed, last checkpoint. Read from files alone, and only read.

Works while the cluster is down, and on folders that are empty or damaged: those are reported as what they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fvlm import locks
from fvlm.config import Config
from fvlm.data.corrupt import CORRUPT, known_corrupt
from fvlm.errors import UserError
from fvlm.train.checkpoint_report import CheckpointReport, look_at_newest
from fvlm.train.metrics import RATIOS
from fvlm.train.run_folder import CONFIG, LOCK, read_began
from fvlm.train.run_log import Readings, RunLog, read_log, read_metrics
from fvlm.train.same_run import stored_config
from fvlm.train.sinks import METRICS, TRAIN_LOG
from fvlm.train.skipped import SKIPPED
from fvlm.train.store import CHECKPOINTS

State = Literal["empty", "damaged", "starting", "running", "stalled", "finished", "held", "stopped", "failed"]
STATES: dict[State, str] = {
    "empty": "no run has begun here",
    "damaged": "its config cannot be read, so no start would go on with it",
    "starting": "a process holds it and has not finished a step yet",
    "running": "a process trains it",
    "stalled": "a process holds it, and nothing was written for longer than a hanging rank may live",
    "finished": "all steps are done",
    "held": "stopped on purpose: `ray_jobs.resume` leaves it alone",
    "stopped": "its last start was asked to stop, or finished what it was asked for",
    "failed": "its last start ended without a word: it was killed, or its job's log or terminal tells",
}
WANTED = ("train/loss", "train/step_time", *(f"{name}_avg" for name in RATIOS))
MOST_QUIET_S = 600.0
"""As the default of scale.hang_s; for runs that set that to 0."""
FRESH_S = 60.0
LONG_START = 3
"""So many times as long is allowed for the first step, as `hang.LONG`."""


@dataclass(frozen=True)
class RunReport:
    """A figure that the folder does not tell is None."""

    run: str
    folder: str
    state: State
    step: int = 0
    """The last in metrics.jsonl. A next start goes on from the checkpoint's."""
    max_steps: int | None = None
    left_s: float | None = None
    """Of training, at the last speed."""
    age_s: float | None = None
    """Since metrics were last written."""
    loss: float | None = None
    caption_ratio: float | None = None
    recon_ratio: float | None = None
    """Averages of the last readings, as people watch them."""
    step_s: float | None = None
    clips_per_s: float | None = None
    mfu: float | None = None
    """Share of the GPU's peak; None where it is not known."""
    data_wait: float | None = None
    epoch: float | None = None
    steps_per_epoch: int | None = None
    on: str = ""
    checkpoint: CheckpointReport | None = None
    checkpoints_seen: bool = True
    """False: where they are kept cannot be looked at now."""
    starts: int = 0
    started_at: float | None = None
    """Seconds since 1970."""
    skipped: int = 0
    corrupt: int = 0
    log: str = ""
    failed: str = ""
    """Why the last start failed, as far as it could still say so."""
    note: str = ""
    """The last line of the log that is not about a step or a checkpoint."""
    wandb: str = ""
    remarks: tuple[str, ...] = ()
    """What a person should know besides."""

    @property
    def percent(self) -> float | None:
        return 100 * self.step / self.max_steps if self.max_steps else None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"percent": self.percent, "restarts": self.restarts}


def began_config(run_dir: Path) -> Config:
    """The config that the run began with, for a look: not validated. Raises UserError."""
    try:
        return stored_config(read_began(run_dir)["config"])
    except TypeError as error:
        raise UserError(f"{run_dir / CONFIG}: damaged ({error}). Restore it, or use another --run name.") from error


@dataclass(frozen=True)
class LastStart:
    """What the command line of the last start left in the folder."""

    config: Config | None
    """None where it cannot be had."""
    at: float | None
    """Seconds since 1970; None where it is not known."""
    held: bool


def report(run_dir: Path, last: LastStart, now: float) -> RunReport:
    """now: seconds since 1970."""
    remarks: list[str] = []
    config = last.config
    log, readings, age_s = RunLog(), Readings(0, {}, 0, 0), None
    try:
        log = read_log(run_dir / TRAIN_LOG)
        readings = read_metrics(run_dir / METRICS, WANTED)
        age_s = max(0.0, now - (run_dir / METRICS).stat().st_mtime)
    except FileNotFoundError:
        pass
    except OSError as error:
        remarks.append(f"cannot be read: {error}")
    if readings.unreadable:
        remarks.append(
            f"{run_dir / METRICS}: {readings.unreadable} of its last lines are no metrics; the rest is shown"
        )
    checkpoint, seen = look_at_newest(run_dir, config, log.saved, now, remarks)
    step = max(readings.step, checkpoint.step if checkpoint else 0)
    step_s, max_steps = readings.value("train/step_time"), config.train.max_steps if config else None
    ended = log.ended == "finished" and not seen  # it says so when its checkpoint is safe
    done = checkpoint.step if checkpoint else readings.step if ended else 0
    state = _state(run_dir, last, log, done, step_s or 0.0, now, remarks)
    said_why = log.ended or log.failed
    if age_s is not None and age_s < FRESH_S and state in ("held", "stopped", "failed") and not said_why:
        remarks.append(
            f"written {age_s:.0f} s ago, though no process of this machine holds its lock: it ended just now, or is "
            "trained on a machine whose locks are not seen here"
        )
    caption_ratio, recon_ratio = (readings.value(f"{name}_avg") for name in RATIOS)
    return RunReport(
        run=run_dir.name,
        folder=str(run_dir),
        state=state,
        step=step,
        max_steps=max_steps,
        left_s=max(0, max_steps - step) * step_s if max_steps and step_s else None,
        age_s=age_s,
        loss=readings.value("train/loss"),
        caption_ratio=caption_ratio,
        recon_ratio=recon_ratio,
        step_s=step_s,
        clips_per_s=readings.value("train/clips_per_s"),
        mfu=readings.value("train/mfu"),
        data_wait=readings.value("train/data_wait"),
        epoch=readings.value("train/epoch"),
        steps_per_epoch=readings.steps_per_epoch or None,
        on=log.on,
        checkpoint=checkpoint,
        checkpoints_seen=seen,
        starts=log.starts,
        started_at=log.started_at,
        skipped=_lines(run_dir / SKIPPED, remarks),
        corrupt=_corrupt(run_dir, remarks),
        log=str(run_dir / TRAIN_LOG),
        failed=log.failed,
        note=log.note,
        wandb=_wandb(run_dir),
        remarks=tuple(remarks),
    )


def is_locked(run_dir: Path) -> bool:
    """Whether a command trains the run now, as far as this machine sees locks. No start fails by it. Raises OSError."""
    return locks.is_held(run_dir / LOCK)


def _state(
    run_dir: Path,
    last: LastStart,
    log: RunLog,
    done: int,
    step_s: float,
    now: float,
    remarks: list[str],
) -> State:
    """done: steps that are safe"""
    traces = [run_dir / name for name in (CONFIG, TRAIN_LOG, METRICS, CHECKPOINTS)]
    if not any(path.exists() for path in traces):
        return "empty"
    damaged = False
    try:
        read_began(run_dir)
    except UserError as error:
        damaged = True
        remarks.append(str(error))
    try:
        if is_locked(run_dir):
            return _state_of_locked([run_dir / LOCK, *traces], last, log, step_s, now)
    except OSError as error:
        remarks.append(f"whether a process trains it cannot be seen: {error}")
    if damaged or last.config is None:
        return "damaged"
    if done >= last.config.train.max_steps:
        return "finished"
    if last.held:
        return "held"
    return "stopped" if log.ended else "failed"


def _state_of_locked(traces: list[Path], last: LastStart, log: RunLog, step_s: float, now: float) -> State:
    announced = log.started_at is not None and (last.at is None or log.started_at > last.at - 1)  # it has whole seconds
    starting = not (announced and log.stepped) or log.ended != ""
    most_s = MOST_QUIET_S
    if last.config:
        most_s = max(last.config.scale.hang_s or MOST_QUIET_S, LONG_START * last.config.train.log_every * step_s)
    if now - max(path.stat().st_mtime for path in traces if path.exists()) > most_s * (LONG_START if starting else 1):
        return "stalled"
    return "starting" if starting else "running"


def _lines(path: Path, remarks: list[str]) -> int:
    try:
        return path.read_bytes().count(b"\n") if path.exists() else 0
    except OSError as error:
        remarks.append(f"cannot be read: {error}")
        return 0


def _corrupt(run_dir: Path, remarks: list[str]) -> int:
    try:
        return len(known_corrupt(run_dir))
    except UserError as error:
        remarks.append(str(error))
        return _lines(run_dir / CORRUPT, [])


def _wandb(run_dir: Path) -> str:
    """Where W&B's files are, and how to send those of an offline run."""
    folder = run_dir / "wandb"
    if not folder.is_dir():
        return ""
    offline = any(folder.glob("offline-run-*"))
    return f"offline: wandb sync {folder}/offline-*" if offline else str(folder)
