"""Where a command finds its Ray cluster: the one it was submitted to, or a small one of its own."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.data
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # a compiled module
from ray._raylet import Config as RayletConfig  # type: ignore[attr-defined]

from fvlm.errors import UserError
from fvlm.proxies import keep_loopback_direct
from fvlm.resources import available_memory, usable_cpus

GIB = 1 << 30
OWN_FOLDER = "fvlm-ray-"
LONGEST_FOLDER = 40
"""Ray puts unix sockets 64 characters below its folder, and the kernel allows them 107."""


@contextlib.contextmanager
def connect(
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    *,
    address: str | None = None,
    dashboard: bool = False,
    log_to_driver: bool = False,
) -> Iterator[None]:
    """Ray, ready to use, for the length of the `with` block.

    With `address`, or RAY_ADDRESS set (`ray job submit` sets it), this is that cluster, and only the connection is
    closed at the end; the sizes and `dashboard` are its own affair then. Otherwise a cluster on this machine is
    started, and nothing of it is left afterwards.

    num_cpus:           CPUs of an own cluster; None: all.
    object_store_bytes: its object store; None: 30 % of the memory that is free now, at most 2 GiB.
    dashboard:          start its web page and the metrics exporter too.
    log_to_driver:      show what workers print on this terminal.

    Raises UserError when the address leads nowhere.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_free_objects_batch_size", "1")  # otherwise dropped blocks lie in the store for a second
    keep_loopback_direct()
    _quiet_ray_data()
    address = address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as cleanup:
        if address and address != "local":
            _join(address, log_to_driver)
        else:
            folder = cleanup.enter_context(_own_folder())
            cleanup.enter_context(_token_authentication(folder))
            ray.init(
                address="local",
                num_cpus=num_cpus or usable_cpus(),
                object_store_memory=object_store_bytes or min(2 * GIB, int(0.3 * available_memory())),
                include_dashboard=dashboard,
                log_to_driver=log_to_driver,
                logging_level=logging.WARNING,
                _temp_dir=str(folder),
            )
        cleanup.callback(ray.shutdown)
        yield


def _quiet_ray_data() -> None:
    """Commands print progress lines of their own; Ray Data's would redraw with \\r and fill job logs."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # for datasets made in workers
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # its wrapper drops the type when it is sent here
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off


def _join(address: str, log_to_driver: bool) -> None:
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"the Ray address {address} is that of a dashboard: `ray job submit` needs it, a command started directly "
            "does not. Submit the command as a job, or unset RAY_ADDRESS to run it on this machine alone."
        )
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # a closed port fails at once here; Ray would try it for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.WARNING)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}). "
            "Start it, or unset RAY_ADDRESS to run on this machine alone."
        ) from error


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A fresh folder for one cluster, locked while its command lives; those that killed commands left are removed."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent / OWN_FOLDER)) + 8 > LONGEST_FOLDER:
        parent = Path("/tmp")
    for stale in parent.glob(f"{OWN_FOLDER}*"):
        with contextlib.suppress(OSError), (stale / "lock").open() as lock:  # in use, or another user's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=OWN_FOLDER, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _token_authentication(folder: Path) -> Iterator[None]:
    """Token authentication, said explicitly. Without a token of the user's the cluster gets its own.

    Left to itself, Ray would write one to ~/.ray, and every later `ray start` of that user would ask for it.
    """
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        token = folder / "auth_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    # Ray read the mode when it was imported and keeps the first token that it has seen; this makes it look again.
    RayletConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
