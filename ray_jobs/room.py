"""How many ranks the cluster has room for; and what to do where it can never have any."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.experimental import internal_kv

from fvlm.config import Config
from fvlm.data.outage import SAY_EVERY_S, sleep
from fvlm.errors import Unavailable, UserError
from ray_jobs.ingest import cpus_needed

CLUSTER_CHECK_S = 5.0
NODE_GROUP = "ray.io/node-group"
"""A label that nodes have which a cluster launcher or KubeRay has started."""


def ranks_now(config: Config, use_gpu: bool) -> int:
    """As many as the cluster has room for, of those that are allowed; the fewest where it has room for none.

    Their request then waits in the cluster, where an autoscaler sees it.
    """
    if config.scale.min_workers in (0, config.scale.workers):
        return config.scale.workers
    staying = nodes(cluster_state.get_draining_nodes())
    return most_ranks(config, use_gpu, staying) or min(config.rank_counts)


def nodes(draining: Iterable[str]) -> list[dict[str, float]]:
    """What the nodes have that are there to stay."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in set(draining)]


def most_ranks(config: Config, use_gpu: bool, resources: list[dict[str, float]]) -> int:
    """The largest allowed number of ranks for which nodes with these resources have room; 0 for none."""
    scale = config.scale
    each = max(scale.cpus_per_worker, 1e-9)
    places = sum(
        int(min(node.get("CPU", 0) // each, node.get("GPU", 0) if use_gpu else node.get("CPU", 0) // each))
        for node in resources
    )
    cpus = sum(node.get("CPU", 0) for node in resources)
    return max((n for n in config.rank_counts if n <= places and cpus_needed(config, n) <= cpus), default=0)


def lack(config: Config, use_gpu: bool, resources: list[dict[str, float]]) -> str:
    """What nodes with these resources lack for the fewest ranks that are allowed, for people; "" for nothing."""
    if most_ranks(config, use_gpu, resources):
        return ""
    ranks, each = min(config.rank_counts), config.scale.cpus_per_worker
    need = f"{ranks} rank{'s need' if ranks > 1 else ' needs'} {cpus_needed(config, ranks)} CPUs in all ({each:g} for "
    need += "a rank, on one node, and 1 for its decoding)" + (f" and {ranks} GPUs, one for each" if use_gpu else "")
    has = [
        f"{node.get('CPU', 0):g} CPUs" + (f" and {node.get('GPU', 0):g} GPUs" if use_gpu else "") for node in resources
    ]
    return f"{need}; the cluster's nodes have {', '.join(has) or 'nothing'}"


def has_autoscaler() -> bool:
    """Whether somebody adds nodes where ranks wait for a place.

    Every head runs a monitor; without an autoscaler it reports each node as a type of its own, `node_<id>`.
    """
    if any(node["Labels"].get(NODE_GROUP) for node in ray.nodes()):
        return True
    report: dict[str, Any] = json.loads(internal_kv._internal_kv_get("__autoscaling_status") or "{}")
    kinds = (report.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not kind.startswith("node_") for kind in kinds)


def wait_for_room(
    config: Config, use_gpu: bool, is_stopped: Callable[[], object], note: Callable[[str], object], had_room: bool
) -> None:
    """Return when the cluster's nodes could take the ranks, were nothing else running there; at once where an
    autoscaler may add some.

    had_room: the ranks were placed before, so nodes have gone and may come back
    Raises after `scale.room_wait_s`: UserError, or Unavailable where there was room once.
    """
    begin, said, limit_s = time.monotonic(), -SAY_EVERY_S, config.scale.room_wait_s
    while (missing := lack(config, use_gpu, nodes(cluster_state.get_draining_nodes()))) and not has_autoscaler():
        waited = time.monotonic() - begin
        if 0 < limit_s < waited:
            kind = Unavailable if had_room else UserError
            raise kind(
                f"no room in the cluster for {waited:.0f} s (--scale.room-wait-s), and no autoscaler that would add a "
                f"node: {missing}. Add nodes, or use fewer --scale.workers or --scale.cpus-per-worker."
            )
        if waited - said >= SAY_EVERY_S:
            said = waited
            limit = f", for {limit_s:.0f} s at most" if limit_s else ""
            note(f"waiting for a place in the cluster{limit}, no autoscaler adds nodes: {missing}")
        if not sleep(CLUSTER_CHECK_S, is_stopped):
            return
