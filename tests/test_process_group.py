"""The network interface at which ranks listen for each other: for gloo and for NCCL."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from ray_jobs.process_group import listen_where_the_cluster_does

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
INTERFACES = {"lo": "127.0.0.1", "eth10": "192.168.0.7", "eth1": "10.0.0.7", "dummy0": "10.0.0.70"}


@pytest.fixture
def chosen(monkeypatch):
    """-> what the variables are on a node with INTERFACES that has such an address in the cluster"""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what is set here goes again
        monkeypatch.delenv(name)

    def choose(address: str, flags: str = "up,broadcast,running,multicast") -> list[str | None]:
        have = {
            name: [SimpleNamespace(family=socket.AF_PACKET, address="00:00"),
                   SimpleNamespace(family=socket.AF_INET, address=ip)]
            for name, ip in INTERFACES.items()
        }  # fmt: skip
        stats = {name: SimpleNamespace(flags="up,loopback,running" if name == "lo" else flags) for name in INTERFACES}
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: have)
        monkeypatch.setattr(psutil, "net_if_stats", lambda: stats)
        listen_where_the_cluster_does()
        return [os.environ.get(name) for name in NAMES]

    return choose


def test_both_listen_at_the_address_of_the_cluster_and_nccl_takes_no_other_interface_that_begins_alike(chosen):
    assert chosen("10.0.0.7") == ["eth1", "=eth1"]


def test_what_a_user_has_set_stays(chosen, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    assert chosen("10.0.0.7") == ["eth1", "ib"]


def test_what_a_user_has_set_for_gloo_stays(chosen, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "dummy0")
    assert chosen("10.0.0.7") == ["dummy0", "=eth1"]


def test_a_cluster_at_a_loopback_address_is_one_machine_and_depends_on_no_other_address(chosen):
    assert chosen("127.0.0.1") == ["lo", "=lo"]


def test_an_address_of_the_cluster_on_a_loopback_interface_is_no_better(chosen):
    assert chosen("10.0.0.70", "up,loopback,running") == ["dummy0", None]


def test_an_address_that_no_interface_has_sets_nothing(chosen):
    assert chosen("203.0.113.9") == [None, None]


def test_psutil_knows_the_loopback_of_this_machine():
    flags = {name: stats.flags.split(",") for name, stats in psutil.net_if_stats().items()}
    assert [name for name in flags if "loopback" in flags[name]] == ["lo"]
