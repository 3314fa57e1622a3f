"""`python -m ray_jobs.submit PRESET [--key value ...]`: ray_jobs.train as a job of a running cluster, watched here."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.dashboard.modules.job.common import JobErrorType
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from fvlm import presets
from fvlm.config import Config
from fvlm.errors import StoreUnavailable, UserError
from fvlm.proxies import keep_loopback_direct, proxy_between
from fvlm.train.store import LocalStore, checkpoint_store, newest_step
from fvlm.train.wandb_sink import COMMIT
from ray_jobs.cli import run_command
from ray_jobs.command import with_paths
from ray_jobs.options import parse

PROJECT = Path(__file__).resolve().parents[1]
UPLOADED = ".rayignore"
"""Says what of PROJECT travels to the cluster; `ray job submit --working-dir .` reads it too."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENVIRONMENT = {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
OUR_VARIABLES = (*ENVIRONMENT, "FVLM_JOB", COMMIT)
SECRET_NAME = r"SECRET|TOKEN(?!IZER)|PASSW|PASSPHRASE|CREDENTIAL|APIKEY|PRIVATE|_PWD$|(^|_)(KEYS?|PAT|AUTH|DSN)($|_)"
MIN_SECRET_CHARS = 8
"""Of a value that is looked for in others."""
TRIES = 4
RETRY_S = 2.0
SILENT_S = 60.0
"""A log that says nothing for so long is asked for again: a dead connection looks the same."""
LOST_S = 600.0
"""How long an unreachable cluster is waited for."""
MAX_REASON_CHARS = 200
STOPPED, INTERRUPTED = 143, 130
LOST = (OSError, RuntimeError, aiohttp.ClientError)
"""What Ray's client raises when a request fails; the errors of `requests` are OSErrors."""

HELP = f"""
exit code: 0 when the run is finished; 1 when --feed-test found that the GPU would wait; 2 when the input was at fault,
found here or by the job; {STOPPED} when the job was stopped; {INTERRUPTED} after Ctrl-C, which leaves the job running;
otherwise the job's own.

The same command continues a run that was stopped or failed. Relative paths are taken from this folder and have to
exist, as they are then, on the cluster's nodes.

Token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN); cluster/local/start.sh prints the lines.
W&B: WANDB_API_KEY or `wandb login` belong on the cluster's nodes, and so do the credentials of S3 or Google storage.
Nothing of this shell's environment travels but what --env names: whoever may list jobs can read what a job was given,
so a secret is refused there. A run does not remember it: what every start needs belongs on the nodes, too.
"""


def main() -> None:
    """The command. Ends the process with the job's exit code."""
    logging.disable(logging.WARNING)  # Ray's client tells of every upload and socket
    own, training = arguments(sys.argv[1:])
    config = parse(training, prog="python -m ray_jobs.submit")
    if not config.data.path:
        raise UserError("--data.path is missing: the folder of a prepared dataset, as the cluster's nodes see it.")
    client = connect(own.address)
    with asking_for_token(client.get_address()):
        for left in reversed(range(TRIES)):
            job = submit(client, config, training, own.env)
            print(f"{job}: submitted to {client.get_address()}\n{hints(client, job)}", flush=True)
            if own.no_wait:
                return
            try:
                end = watch(client, job)
            except KeyboardInterrupt:
                print(f"\n{job} goes on.\n{hints(client, job)}", flush=True)
                sys.exit(INTERRUPTED)
            # The cluster drops uploaded code when the last job that used it ends: also between our finding it there
            # and our job's start. The next try uploads it.
            if end.error_type != JobErrorType.RUNTIME_ENV_SETUP_FAILURE or left == 0:
                break
            print(f"{job}: {end.status}: the cluster could not set up its code; submitting it again", flush=True)
            time.sleep(RETRY_S)
    print(outcome(end), flush=True)
    sys.exit(exit_code(end))


def arguments(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which is ray_jobs.train's."""
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.submit",
        usage="%(prog)s PRESET [--key value ...] [--address URL] [--no-wait] [--env KEY=VALUE ...]",
        description="Submit `python -m ray_jobs.train PRESET [--key value ...]` to a Ray cluster and follow it.\n"
        f"Presets: {', '.join(presets.PRESETS)}. `PRESET --help` lists the keys.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--address", default=default_address(), metavar="URL", help="of the dashboard; %(default)s")
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the job is submitted")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable of the job's processes on all nodes, of this attempt alone; no secret; may be repeated",
    )
    own, training = parser.parse_known_args(args)
    own.env = variables(own.env)
    if not training or training[0] in ("-h", "--help"):
        parser.print_help()
        sys.exit(0 if training else 2)
    return own, training


def variables(given: list[str]) -> dict[str, str]:
    """["KEY=VALUE", ...] -> {KEY: VALUE}. Raises UserError, which holds no value: it is no such pair, one of ours, or a
    secret: Ray keeps the variables of a job, shows them to whoever may list jobs, and writes them into its logs."""
    found: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
            raise UserError(
                f"--env {name if equals else '...'}: give KEY=VALUE, a variable's name and what it is to be."
            )
        if name in OUR_VARIABLES:
            raise UserError(f"--env {name}: that variable is set by this command itself. Leave it out.")
        secrets = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= MIN_SECRET_CHARS}
        if is_secret(name) or any(secret in value for secret in secrets) or holds_password(value):
            raise UserError(
                f"--env {name}: it looks like a secret, and Ray would keep it with the job, show it to whoever may "
                "list jobs and write it into logs. Set it on the cluster's nodes, before the cluster starts."
            )
        found[name] = value
    return found


def is_secret(name: str) -> bool:
    """Whether a variable of this name is likely to hold one."""
    return re.search(SECRET_NAME, name.upper()) is not None


def holds_password(value: str) -> bool:
    """https://user:password@host, also in the middle of a text."""
    return re.search(r"://[^/\s:@]*:[^/\s@]+@", value) is not None


def default_address() -> str:
    """As Ray's own job commands choose it."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS


def connect(address: str) -> JobSubmissionClient:
    """Raises UserError when no cluster answers at `address`, or when it does not let us in."""
    if not address.startswith(("http://", "https://")):
        raise UserError(f"the address {address} is not that of a dashboard, which begins with http:// or https://.")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client lets this variable and RAY_ADDRESS overrule us
    keep_loopback_direct()
    proxy = proxy_between(address)
    between = f" The proxy {proxy} of the environment stands in between; NO_PROXY={host_of(address)} goes round it."
    between *= bool(proxy)
    with asking_for_token(address, between):
        try:
            return JobSubmissionClient(address)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at {address}. Start one (cluster/local/start.sh makes this machine one), "
                f"or give the address of its dashboard with --address.{between}"
            ) from error
        except (RuntimeError, KeyError, requests.RequestException) as error:
            reason = one_line(error)
            raise UserError(
                f"what answers at {address} is not the dashboard of a Ray cluster ({reason}).{between}"
            ) from error


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:MAX_REASON_CHARS]


@contextlib.contextmanager
def asking_for_token(address: str, more: str = "") -> Iterator[None]:
    """Turns Ray's AuthenticationError into a UserError that names the variable to set. more: added to it"""
    try:
        yield
    except AuthenticationError as error:
        names = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            cure = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file with its token"
        elif names:
            cure = f"{names[0]} does not hold its token: correct it"
        else:
            cure = "Set RAY_AUTH_TOKEN_PATH to the file with its token, or RAY_AUTH_TOKEN to the token itself"
        raise UserError(
            f"the cluster at {address} asks for a token. {cure}; cluster/local/start.sh prints what its cluster "
            f"needs.{more}"
        ) from error


def submit(
    client: JobSubmissionClient, config: Config, args: list[str], env: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Submit the next attempt of the run and return its submission id. env: more variables of its processes

    Raises UserError when an attempt of the run is under way.
    """
    if not (PROJECT / UPLOADED).is_file():
        raise UserError(f"{PROJECT} has no {UPLOADED}: this is not the project's folder. Submit from a checkout of it.")
    for left in reversed(range(TRIES)):
        try:
            job = next_attempt(client, config)
            known = metadata(config)
            # A node remembers for ten minutes that an environment could not be set up; so each has its own. W&B asks
            # for the commit, which the copy of the code no longer knows.
            ours = ENVIRONMENT | {"FVLM_JOB": job, COMMIT: known.get("commit", "")}
            return client.submit_job(
                entrypoint=entrypoint(config, args),
                submission_id=job,
                runtime_env={"working_dir": str(PROJECT), "env_vars": {**env, **ours}},
                metadata=known,
            )
        except RuntimeError:  # the id was taken a moment ago, or the cluster is not ready yet
            if left == 0:
                raise
            time.sleep(RETRY_S)
    raise AssertionError


def active_job(client: JobSubmissionClient, config: Config) -> JobDetails | None:
    """The job that trains the run or is about to; None when there is none."""
    for job in client.list_jobs():
        if (job.metadata or {}).get("run_dir") == str(config.run_dir) and not job.status.is_terminal():
            return job
    return None


def next_attempt(client: JobSubmissionClient, config: Config) -> str:
    """`<run>-a<attempt>`: a submission id can be used once."""
    if job := active_job(client, config):
        raise UserError(
            f"run {config.run_name} is under way: job {job.submission_id} is {job.status}.\n"
            + hints(client, str(job.submission_id))
        )
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", config.run_name)  # it becomes part of URLs and file names
    used = [re.fullmatch(re.escape(name) + r"-a(\d+)", job.submission_id or "") for job in client.list_jobs()]
    attempts = [0, *(int(match[1]) for match in used if match)]
    return f"{name}-a{max(attempts) + 1}"


def entrypoint(config: Config, args: list[str]) -> str:
    """The command of the job."""
    return shlex.join(["python", "-m", "ray_jobs.train", *with_paths(args, config)])


def metadata(config: Config) -> dict[str, str]:
    """What the dashboard shows of the job, and what tells attempts of a run from other jobs."""
    known = {
        "run": config.run_name,
        "run_dir": str(config.run_dir),
        "preset": config.preset,
        "step": begun_at(config),
        "steps": str(config.train.max_steps),
        "config": hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:12],
        "commit": commit(),
    }
    return {key: value for key, value in known.items() if value}


def begun_at(config: Config) -> str:
    """The finished step that the job goes on from, '0' for a new run; '' where that cannot be seen from here at once.

    Runs may lie in a folder that only the cluster's nodes have, and the keys of an object store are theirs too.
    """
    store = checkpoint_store(config)
    if isinstance(store, LocalStore):
        of_all_runs = store.root.parent if config.train.checkpoint_dir else store.root.parents[1]
        with contextlib.suppress(OSError, StoreUnavailable):
            return str(newest_step(store)) if of_all_runs.is_dir() else ""
    return ""


def commit() -> str:
    """Of the code that travels, with -dirty when it was changed since; '' outside a git checkout."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def watch(client: JobSubmissionClient, job: str) -> JobDetails:
    """Print the job's log until it ends, across lost connections. Raises UserError when the cluster stays away."""
    log, reached, lost = Log(client, job), time.monotonic(), False
    while True:
        try:
            asyncio.run(log.show())
            info = client.get_job_info(job)
            reached, lost = time.monotonic(), False
            if info.status.is_terminal():
                log.show_rest()
                return info
        except LOST as error:
            if "status code 404" in str(error):
                raise UserError(
                    f"the cluster at {client.get_address()} no longer knows {job}; it was started anew. "
                    "Submit the same command again to continue the run."
                ) from error
            if time.monotonic() - reached > LOST_S:
                raise UserError(
                    f"no answer from {client.get_address()} for {LOST_S:.0f} s ({error}). {job} may still be running.\n"
                    + hints(client, job)
                ) from error
            if not lost:
                print(f"{job}: connection lost ({error}); trying for {LOST_S:.0f} s", file=sys.stderr, flush=True)
            lost = True
        time.sleep(RETRY_S)


class Log:
    """A job's log on this terminal, every line once."""

    def __init__(self, client: JobSubmissionClient, job: str):
        self._client, self._job, self._printed = client, job, 0

    async def show(self) -> None:
        """Print what was not printed yet, until the job ends, its log falls silent, or the connection breaks."""
        skip = self._printed  # a new connection starts from the log's beginning
        pieces = self._client.tail_job_logs(self._job)
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(SILENT_S):
                    piece = await anext(pieces, None)
                if piece is None:
                    return
                self._print(piece[skip:])
                skip = max(0, skip - len(piece))

    def show_rest(self) -> None:
        """Of a job that has ended: what came after `show` gave up."""
        self._print(self._client.get_job_logs(self._job)[self._printed :])

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)
        self._printed += len(text)


def hints(client: JobSubmissionClient, job: str) -> str:
    return (
        f"  follow it: ray job logs --address {client.get_address()} --follow {job}\n"
        f"  stop it:   ray job stop --address {client.get_address()} {job}"
    )


def outcome(info: JobDetails) -> str:
    """The last line. A job whose command never ran or did not return says why itself."""
    if info.status == JobStatus.FAILED and info.driver_exit_code is None:
        return f"{info.submission_id}: {info.status}: {info.message}"
    return f"{info.submission_id}: {info.status}"


def exit_code(info: JobDetails) -> int:
    """0, the driver's own code (128 + n where signal n killed it), STOPPED, or 1 where the driver never ended."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED
    code = info.driver_exit_code if info.driver_exit_code is not None else 1
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    run_command(main)
