"""How the ranks are joined: torch's process group, over the network that the cluster uses."""

from __future__ import annotations

import os
import socket
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class ProcessGroup(TorchConfig):
    """Ray's own, but for the interface that gloo listens at."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(listen_where_the_cluster_does)
        super().on_start(worker_group, backend_config)


def listen_where_the_cluster_does() -> None:
    """Let gloo listen at this node's address in the cluster, unless GLOO_SOCKET_IFNAME says where.

    Left to itself it takes the address of the host's name, which many systems (Debian, for one) map to a loopback
    address: ranks on other nodes would then look for it on their own machine.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
