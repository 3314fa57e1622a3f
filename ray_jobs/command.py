"""The command line of a run, as its folder remembers it: `command.json`, written at every start. The last one wins."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.files import fsync_dir, write_atomic
from ray_jobs.options import parse
from ray_jobs.paths import fixed_paths

COMMAND = "command.json"
HELD = "held"
"""An empty file of the run folder: the run was stopped on purpose, and goes on only when a person starts it."""


def with_paths(args: list[str], config: Config) -> list[str]:
    """`args`, and behind them the paths of `config`: a later option overrides an earlier one."""
    paths = fixed_paths(config)
    return args if args[-len(paths) :] == paths else [*args, *paths]


def remember(config: Config, args: list[str]) -> None:
    """Write down with what options the run is being started, for `ray_jobs.resume`. Ends a hold: a person wants it.

    args: the options as they were given, of which `config` was made
    """
    content = {"arguments": with_paths(args, config)}
    write_atomic(config.run_dir / COMMAND, json.dumps(content, indent=2) + "\n")
    if (config.run_dir / HELD).exists():
        release(config.run_dir)
        print(f"{config.run_name} was held; from this start on `ray_jobs.resume` continues it again", flush=True)


def remembered(run_dir: Path) -> list[str] | None:
    """The options of the run's last start; None when it has none written down. Raises UserError for a damaged file."""
    path = run_dir / COMMAND
    if not path.exists():
        return None
    try:
        args = json.loads(path.read_bytes())["arguments"]
        if not isinstance(args, list) or not all(isinstance(arg, str) for arg in args):
            raise TypeError("arguments are not a list of strings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}). Start the run once by hand; that writes it anew.") from error
    return args


def valid_now(args: list[str]) -> Config | str:
    """The config of remembered options, or what this version of the code has against them."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return parse(args)
        except (SystemExit, UserError) as error:
            return said.getvalue().strip() or str(error)


def hold(run_dir: Path) -> None:
    """Keep the run from being started by `ray_jobs.resume`."""
    write_atomic(run_dir / HELD, "")


def release(run_dir: Path) -> None:
    (run_dir / HELD).unlink(missing_ok=True)
    fsync_dir(run_dir)
