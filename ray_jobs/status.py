"""`python -m ray_jobs.status [RUN] [--runs-dir DIR]`: how runs stand, from their folders alone, without a cluster."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.files import file_error
from fvlm.train.metrics import duration
from fvlm.train.run_report import STATES, LastStart, RunReport, began_config, report
from ray_jobs.cli import run_command
from ray_jobs.command import COMMAND, HELD, remembered, valid_now
from ray_jobs.paths import absolute

STATE_WORDS = "\n".join(f"  {state:9} {meaning}" for state, meaning in STATES.items())
HELP = f"""
states:
{STATE_WORDS}

Nothing is written, and what a run writes meanwhile is not disturbed. Of metrics.jsonl the end alone is read. A
checkpoint is looked at by its sizes and its state.json; every byte of it is verified when a run goes on from it.

exit code: 0; 2 when there is no such folder or run.
"""
COLUMNS = "RUN STATE STEP OF % LEFT CAPTION RECON CLIPS/S CHECKPOINT AGE RESTARTS".split()  # noqa: SIM905
TO_THE_RIGHT = range(2, len(COLUMNS))
LOCKED = ("starting", "running", "stalled")


def main() -> None:
    """The command."""
    logging.disable(logging.WARNING)  # retries of a store's requests; what comes of them is shown
    options = arguments(sys.argv[1:])
    root = Path(absolute("--runs-dir", options.runs_dir))
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give the one in which the folders of runs lie (--runs-dir).")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if options.run and options.run not in names:
        raise UserError(f"{root} holds no run {options.run!r}. Runs there: {', '.join(names) or 'none'}.")
    reports = [look(root / name) for name in ([options.run] if options.run else names)]
    if options.json:
        print("\n".join(json.dumps(found.to_dict()) for found in reports))
    elif options.run:
        print(page(reports[0]))
    else:
        print(table(reports) if reports else f"{root} holds no runs")


def arguments(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.status",
        description="How a run stands, or all runs of a folder: a line each.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="one run, on a page; without it all, in a table")
    parser.add_argument("--runs-dir", default=Config().runs_dir, metavar="DIR", help="where runs lie; %(default)s")
    parser.add_argument("--json", action="store_true", help="an object for each run, on a line of its own")
    return parser.parse_args(args)


def look(folder: Path) -> RunReport:
    """The report on one run's folder. Never fails for what is wrong with the folder."""
    try:
        last, remarks = last_start(folder)
        found = report(folder, last, time.time())
    except OSError as error:  # another user's, or of a disk that fails
        return RunReport(folder.name, str(folder), "damaged", remarks=(str(file_error(error, folder)),))
    if found.state == "empty":
        return found
    return RunReport(**{**vars(found), "remarks": (*found.remarks, *remarks)})


def last_start(folder: Path) -> tuple[LastStart, list[str]]:
    """What the folder remembers of its last start, or of its beginning; and what a person should know of that."""
    held, at, remarks = (folder / HELD).exists(), None, []
    try:
        args = remembered(folder)
        if args is None:
            remarks.append(f"it has no {COMMAND}: figures are of the config that it began with")
        else:
            at = (folder / COMMAND).stat().st_mtime
            config = valid_now(args)
            if isinstance(config, str):
                raise UserError(f"{folder / COMMAND}: its options are not valid now; start the run by hand with others")
            if config.run_dir.resolve() != folder.resolve():
                remarks.append(f"a copy: its last start trained {config.run_dir}")
            return LastStart(config, at, held), remarks
    except (OSError, UserError) as error:
        remarks.append(str(error))
    try:
        return LastStart(began_config(folder), at, held), remarks
    except UserError:  # the report says so
        return LastStart(None, at, held), remarks


# ---- for people


def page(run: RunReport) -> str:
    """One run, on a few lines."""
    lines = [f"{run.run}: {run.state} ({run.failed if run.state == 'failed' and run.failed else STATES[run.state]})"]
    shown = {
        "step": steps(run),
        "data": data(run),
        "time left": time_left(run),
        "speed": speed(run),
        "ratio": f"caption {number(run.caption_ratio)}, reconstruction {number(run.recon_ratio)} (averages)",
        "loss": loss(run),
        "checkpoint": checkpoint(run),
        "starts": starts(run),
        "clips": f"{run.skipped} steps skipped, {run.corrupt} damaged clips",
        "log": run.log,
        "last note": run.note,
        "W&B": run.wandb,
        "dashboard": dashboard(),
    }
    if run.state == "empty":
        shown = {}
    lines += [f"  {name:10}  {text}" for name, text in {"folder": run.folder, **shown}.items() if text]
    lines += [f"  note        {remark}" for remark in run.remarks]
    return "\n".join(lines)


def steps(run: RunReport) -> str:
    of = f" of {run.max_steps} ({run.percent:.1f}%)" if run.percent is not None else ""
    known = run.state not in LOCKED and run.checkpoint is not None
    again = run.step - run.checkpoint.step if known and run.checkpoint else 0
    repeat = f"; a next start goes on from {run.checkpoint.step}" if again and run.checkpoint else ""
    return f"{run.step}{of}{repeat}"


def data(run: RunReport) -> str:
    if run.epoch is None:
        return ""
    whole = int(run.epoch)
    per_epoch = run.steps_per_epoch
    rest = f" and {round((run.epoch - whole) * per_epoch)} of {per_epoch} steps" if per_epoch else ""
    return f"epoch {run.epoch:.2f}: {whole} whole passes{rest}"


def time_left(run: RunReport) -> str:
    if run.left_s is None or run.state == "finished":
        return ""
    return f"{duration(run.left_s)}{'' if run.state in LOCKED else ' of training, once it goes on'}"


def speed(run: RunReport) -> str:
    if run.step_s is None:
        return ""
    wait = f", {100 * run.data_wait:.1f}% of the time waiting for data" if run.data_wait is not None else ""
    mfu = f", MFU {100 * run.mfu:.1f}%" if run.mfu is not None else ""
    on = f", on {run.on}" if run.on else ""
    return f"{number(run.clips_per_s, 1)} clips/s, {run.step_s:.3f} s a step{mfu}{wait}{on}"


def loss(run: RunReport) -> str:
    if run.age_s is None:
        return ""
    return f"{number(run.loss)}, written {duration(run.age_s)} ago"


def checkpoint(run: RunReport) -> str:
    found = run.checkpoint
    if found is None:
        return "none" if run.checkpoints_seen else "not known: they cannot be looked at now"
    age = f", {duration(found.age_s)} old" if found.age_s is not None else ""
    whole = f"DAMAGED: {found.problem}" if found.problem else "whole, by its sizes"
    return f"{found.where}{age}, {whole}"


def starts(run: RunReport) -> str:
    if run.started_at is None:
        return "none"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.started_at))
    return f"{run.starts} ({run.restarts} restart{'s' * (run.restarts != 1)}), the last at {when}"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def dashboard() -> str:
    """Where it is, and whether something answers there."""
    local = f"http://127.0.0.1:{os.environ.get('FVLM_DASHBOARD_PORT') or 8265}"
    url = os.environ.get("RAY_API_SERVER_ADDRESS") or local
    try:
        parts = urlsplit(url)
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=1).close()
    except (OSError, ValueError):
        return f"{url} (nothing answers there now; cluster/local/start.sh starts a cluster)"
    return url


def table(runs: list[RunReport]) -> str:
    rows = [COLUMNS, *map(row, runs)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            text.rjust(w) if i in TO_THE_RIGHT else text.ljust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in rows
    ]
    notes = [f"{run.run}: {remark}" for run in runs for remark in run.remarks]
    notes += [f"{run.run}: {run.checkpoint.problem}" for run in runs if run.checkpoint and run.checkpoint.problem]
    return "\n".join(line.rstrip() for line in lines + notes)


def row(run: RunReport) -> list[str]:
    if run.state == "empty":
        return [run.run, run.state, *[""] * (len(COLUMNS) - 2)]
    found = run.checkpoint
    return [
        run.run,
        run.state,
        str(run.step),
        str(run.max_steps or "-"),
        number(run.percent, 1),
        duration(run.left_s) if run.left_s is not None else "-",
        number(run.caption_ratio),
        number(run.recon_ratio),
        number(run.clips_per_s, 1),
        f"{found.step}{' DAMAGED' if found.problem else ''}" if found else "-" if run.checkpoints_seen else "?",
        duration(found.age_s) if found and found.age_s is not None else "-",
        str(run.restarts),
    ]


if __name__ == "__main__":
    run_command(main)
