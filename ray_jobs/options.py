"""The command line of a run: a preset and its overrides. Light to import, so that a typo is told at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from fvlm import presets
from fvlm.config import Config, validate
from fvlm.errors import UserError
from ray_jobs.paths import absolute_paths

STEP_MS, FEED_SECONDS = 120.0, 60.0


@dataclass(frozen=True)
class FeedTest:
    """What `--feed-test` asks for."""

    step_s: float
    seconds: float


@dataclass(frozen=True)
class _Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    feed_test: tyro.conf.FlagCreatePairsOff[bool] = False
    """Do not train: run the ingest for a minute against a consumer that only waits as long as a step, and say whether
    disk and cores would feed the GPU. Exit code 0: they would; 1: they would not."""
    step_ms: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Only with --feed-test: milliseconds of a step. 120 when not given."""
    feed_seconds: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Only with --feed-test: seconds that it measures after the first batch. 60 when not given."""


def parse(args: list[str] | None = None, prog: str = "python -m ray_jobs.train") -> Config:
    """The preset with its overrides; what belongs to `--feed-test` is checked and left out."""
    return command_line(args, prog)[0]


def command_line(
    args: list[str] | None = None, prog: str = "python -m ray_jobs.train"
) -> tuple[Config, FeedTest | None]:
    """The preset with its overrides, all paths absolute, and the feed test where one is asked for; None: train.

    An unknown or ill-typed key ends the process with code 2 and the nearest name. Raises UserError.
    """
    choices = {
        name: ((preset.__doc__ or "").split("\n")[0], _Options(preset())) for name, preset in presets.PRESETS.items()
    }
    options = tyro.extras.overridable_config_cli(choices, args=args, prog=prog)
    return validate(absolute_paths(options.config)), _feed_test(options)


def _feed_test(options: _Options) -> FeedTest | None:
    """Raises UserError: an option without the mode that it belongs to, or a time that is none."""
    for key, value in {"--step-ms": options.step_ms, "--feed-seconds": options.feed_seconds}.items():
        if value is None:
            continue
        if not options.feed_test:
            raise UserError(f"{key} {value:g} belongs to --feed-test, which is not given: add it, or leave {key} out.")
        if not 0 < value < math.inf:
            raise UserError(f"{key} is {value:g}; it must be above 0.")
    if not options.feed_test:
        return None
    return FeedTest((options.step_ms or STEP_MS) / 1000, options.feed_seconds or FEED_SECONDS)
