"""A Ray cluster on this machine for one command. It ends with the command, and nothing of it is left.

It listens on loopback alone, so it is out of the network's reach, and a change of the machine's address (VPN, Wi-Fi,
DHCP) is out of its reach. Its processes have sessions of their own and block SIGTERM: whoever ends a whole process
group or control group (a closed terminal, `timeout`, `scancel`, systemd) ends the command, which still needs them to
save.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # a compiled module
from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]

from fvlm import locks

FOLDER_PREFIX = "fvlm-ray-"
LOCK_S = 5
"""A lock file that is younger may not have been locked yet."""
MAX_FOLDER_CHARS = 40
"""Ray puts unix sockets 64 characters below its folder, and the kernel allows them 107."""


@contextlib.contextmanager
def embedded_cluster(num_cpus: int, object_store_bytes: int, *, dashboard: bool, log_to_driver: bool) -> Iterator[None]:
    """Start one, and connect this process to it, for the length of the `with` block.

    num_cpus:           CPUs that Ray hands out
    object_store_bytes: shared memory for its objects
    dashboard:          start its web page and the metrics exporter too
    log_to_driver:      show what workers print on this terminal
    """
    with _folder() as folder, _environment(folder):
        with mock.patch.object(services, "ConsolePopen", _ClusterProcess):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=object_store_bytes,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                log_to_driver=log_to_driver,
                logging_level=logging.WARNING,
                _temp_dir=str(folder),
            )
        try:
            yield
        finally:
            ray.shutdown()


class _ClusterProcess(services.ConsolePopen):
    """One of Ray's own processes: out of reach of what is sent to the command's group."""

    def __init__(self, *args: Any, **options: Any):
        before_exec = options["preexec_fn"]  # Ray's: it blocks SIGINT, and asks the kernel for SIGKILL when we die

        def prepare() -> None:
            before_exec()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})  # what it starts inherits this

        super().__init__(*args, **options | {"preexec_fn": prepare, "start_new_session": True})

    def terminate(self) -> None:
        """Ray's shutdown comes first with SIGTERM, which is blocked, and would wait a second for every process.

        What it has started dies with it: the session is this process's own. Ray's agents would look for a dead cluster
        for a minute.
        """
        self.kill()
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self.pid:
                    process.kill()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A fresh folder for one cluster, locked while its command lives; those that killed commands left are removed."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent / FOLDER_PREFIX)) + 8 > MAX_FOLDER_CHARS:
        parent = Path("/tmp")
    for stale in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), (stale / "lock").open() as lock:  # in use, or another user's
            is_new = time.time() - os.fstat(lock.fileno()).st_mtime < LOCK_S
            if not is_new and locks.try_lock(lock.fileno()):
                shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            locks.lock(lock.fileno())
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What Ray reads when a cluster starts: loopback, and token authentication with a token of its own.

    Left to itself, Ray would write a token to ~/.ray, and every later `ray start` of that user would ask for it. A
    file with a token that the shell names is another cluster's, and may be gone.
    """
    token = folder / "auth_token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    wanted = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or None,  # any will do, and others may have to know it
        "RAY_AUTH_TOKEN_PATH": str(token),
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",  # then Ray takes the loopback for the node's address
    }
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    # Ray read the mode when it was imported and keeps the first token that it has seen; this makes it look again.
    RayletConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        with mock.patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
            yield
    finally:
        _set(before)
        RayletConfig.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def _set(environment: dict[str, str | None]) -> None:
    """None: the variable is not set."""
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
