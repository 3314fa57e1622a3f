"""Where a command finds its Ray cluster: the one it was submitted to, or a small one of its own."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import ray
import ray.data
from ray._private import ray_constants

from fvlm.errors import UserError
from fvlm.proxies import keep_loopback_direct
from fvlm.resources import available_memory, usable_cpus
from ray_jobs.embedded_cluster import embedded_cluster

GIB = 1 << 30


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
    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        # Ray would send the folder of a `uv run` to its workers, and start them by uv: where a cluster's nodes have the
        # environment, that is a second one, and for a folder over 512 MB an error.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    address = address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as cleanup:
        with _own_sigterm():
            if address and address != "local":
                _join(address, log_to_driver)
                cleanup.callback(ray.shutdown)
            else:
                cleanup.enter_context(
                    embedded_cluster(
                        num_cpus or usable_cpus(),
                        object_store_bytes or min(2 * GIB, int(0.3 * available_memory())),
                        dashboard=dashboard,
                        log_to_driver=log_to_driver,
                    )
                )
        yield


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts: give it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread() and handler is not None:
        signal.signal(signal.SIGTERM, handler)


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
        if _is_loopback(host):
            # Ray would look for it at this machine's address in the network, where nothing of it listens.
            ray_constants.ENABLE_RAY_CLUSTER = False
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.WARNING)
    except (OSError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}). "
            "Start it, or unset RAY_ADDRESS to run on this machine alone."
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
