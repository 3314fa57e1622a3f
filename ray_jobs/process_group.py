"""How the ranks are joined: torch's process group, over the network that the cluster uses."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class ProcessGroup(TorchConfig):
    """Ray's own, but for the interface at which gloo and NCCL listen."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen_where_the_cluster_does)
        super().on_start(worker_group, backend_config)


def listen_where_the_cluster_does() -> None:
    """Let torch, gloo and NCCL listen at this node's address in the cluster; {GLOO,NCCL}_SOCKET_IFNAME win.

    Left to itself gloo takes the address of the host's name, which many systems (Debian, for one) map to a loopback
    address: ranks on other nodes would then look for it on their own machine. NCCL takes the first interface that is up
    and neither a loopback nor Docker's, which on a node with several networks need not be the one that joins the nodes.
    """
    # What `env://` makes. As an attribute of torch.distributed the module is hidden by a function of its name.
    sys.modules["torch.distributed.rendezvous"].TCPStore = bound_store  # type: ignore[attr-defined]
    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # A loopback interface reaches no other node. At an address of it the cluster is this machine alone, and must not
    # depend on another address, which may change.
    if not is_loopback(interface) or ipaddress.ip_address(address).is_loopback:
        # "=": this interface and no other. Without it NCCL takes the name for a prefix: eth1 is eth10, too.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def bound_store(host_name: str, port: int, is_master: bool = False, **options: Any) -> dist.TCPStore:
    """torch's store through which ranks find each other, at the given address only: left to itself it takes all."""
    if is_master:
        family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
        with contextlib.suppress(OSError):  # an address that is this machine's only to others, behind a router
            options["master_listen_fd"] = socket.create_server((host_name, port), family=family).detach()
    return dist.TCPStore(host_name, port, is_master=is_master, **options)


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has the IP address; None when none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address == address for a in addresses):
            return name
    return None


def is_loopback(interface: str) -> bool:
    stats = psutil.net_if_stats().get(interface)
    return stats is not None and "loopback" in stats.flags.split(",")
