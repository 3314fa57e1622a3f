"""How long a step takes with so many ranks, from figures that were each taken without the others.

On one machine the ranks share its cores; between machines each has its own GPU, and gradients cross a network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """Of one step, on one machine's CPU; a rank computes on one thread."""

    fixed_s: float
    """What a rank does once a step, whatever its number of clips: the optimizer, launching."""
    clip_s: float
    """Forward and backward pass of one clip."""
    crowded: float
    """How many times as long a step takes when a rank computes on every core and they average their gradients."""
    ingest_s: float
    """CPU seconds to read and decode one clip."""


def seconds_a_step(parts: Parts, ranks: int, global_batch: int, cores: int) -> float:
    """The slower of two: one rank's own work on one core, or everybody's on all cores."""
    own = parts.fixed_s + parts.clip_s * global_batch / ranks
    everybody = (ranks * own + parts.ingest_s * global_batch) / cores
    return max(own, everybody) * (parts.crowded if ranks >= cores else 1.0)


@dataclass(frozen=True)
class Cluster:
    """Many GPUs, each with a rank. Nothing here was measured on one: every figure is an option of the program."""

    step_s: float
    """One GPU's step, alone, with `clips_a_gpu` clips: `train/step_time` of a run with one rank."""
    clips_a_gpu: int
    backward: float
    """Share of the step in which gradients are made, and their sums can be on their way."""
    gradient_bytes: float
    network: float
    """Bytes a second that a GPU's link carries each way."""
    hop_s: float
    """Until a message has reached the next rank."""
    buckets: int
    ingest_s: float
    """CPU seconds to read and decode one clip."""
    bytes_a_clip: float


@dataclass(frozen=True)
class Forecast:
    gpus: int
    step_s: float
    exposed_s: float
    """Of the step: waiting for gradients after the backward pass."""
    clips_per_s: float
    cores_a_gpu: float
    read_bytes_per_s: float

    @property
    def efficiency(self) -> float:
        """Share of the speed that as many separate GPUs would have."""
        return 1 - self.exposed_s / self.step_s


def forecast(cluster: Cluster, gpus: int) -> Forecast:
    """Each GPU keeps its number of clips, so the global batch and the lanes grow with the GPUs.

    A bucket's sum takes whichever is faster, as NCCL does it: a ring, in which every rank sends 2 (n - 1) / n of the
    bucket in 2 (n - 1) hops, or a pair of trees, which send it twice in 2 log2(n) hops. The last bucket's sum can never
    hide behind the backward pass.
    """
    sent_s = cluster.gradient_bytes / cluster.buckets / cluster.network
    ring_s = 2 * (gpus - 1) * (sent_s / gpus + cluster.hop_s)
    tree_s = 2 * (sent_s + math.log2(gpus) * cluster.hop_s) if gpus > 1 else 0.0
    sums_s = cluster.buckets * min(ring_s, tree_s)
    exposed = max(sums_s - cluster.backward * cluster.step_s, sums_s / cluster.buckets)
    step_s = cluster.step_s + exposed
    clips_per_s = gpus * cluster.clips_a_gpu / step_s
    each = clips_per_s / gpus
    return Forecast(gpus, step_s, exposed, clips_per_s, each * cluster.ingest_s, clips_per_s * cluster.bytes_a_clip)
