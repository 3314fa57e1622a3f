"""What a feed test has measured, and what that says about disk, cores, codec and memory. Arithmetic and sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fvlm.config import Config
from fvlm.data.memory import MB, MOST_WAITING, IngestMemory
from fvlm.data.schema import Manifest
from fvlm.data.storage import Storage

FED = 0.01
"""Share of the time that a GPU may wait and still count as fed."""
RESERVE = 1.1
"""What is wanted of disk and cores: a tenth more than the step takes."""
USED_UP = 0.8
"""Share of its time above which a thread that reads or decodes is what the rest waits for."""
MOSTLY_OTHERS = 0.5
"""Share of their time below which the decoding threads, where all cores are busy, do not get them."""
IN_HAND = 2
"""Of the blocks that wait, those that the consumer has: when these alone are left, it has to wait for the next."""
ALL_CORES = 0.9
"""Share of the machine's cores above which there is nothing left for decoding."""


@dataclass(frozen=True)
class Findings:
    """All ranks together, where nothing else is said.

    step_s:       seconds of a step
    wanted:       clips/s: what the step takes
    delivered:    clips/s: what it got
    wait:         share of its time that the rank that waited longest spent waiting
    most:         clips/s without a step: what the ingest can deliver
    first_s:      seconds to the first batch
    decode_ms:    CPU milliseconds a clip
    read_ms:      milliseconds of a reading thread a clip
    threads:      that decode
    readers:      threads that read
    cores_busy:   share of the machine's cores that were busy, with whatever, while `delivered` was measured
    blocks_mean:  decoded blocks that waited, of one rank ...
    blocks_least: ... and the fewest
    store_bytes:  in use in the object store, at the most
    stored_bytes: of one clip, in the dataset
    replaced:     damaged clips that others stood in for
    """

    step_s: float
    wanted: float
    delivered: float
    wait: float
    most: float
    first_s: float
    decode_ms: float
    read_ms: float
    threads: int
    readers: int
    cores_busy: float
    blocks_mean: float
    blocks_least: int
    store_bytes: int
    stored_bytes: float
    replaced: int = 0

    @property
    def decode_use(self) -> float:
        """Share of the decoding threads' time that is spent decoding at the most that the ingest delivers."""
        return self.most * self.decode_ms / 1000 / self.threads

    @property
    def read_use(self) -> float:
        """The same of the reading threads."""
        return self.most * self.read_ms / 1000 / self.readers

    @property
    def lack(self) -> float:
        """How many times the present speed would do, with a reserve."""
        return RESERVE * self.wanted / self.most

    def report(self, reasons: list[str]) -> str:
        """The figures, then `reasons`, which `diagnose` gave."""
        able = f"could feed a step of {1000 * self.step_s * self.wanted / self.most:.0f} ms"
        rows = {
            "wanted": f"{self.wanted:.1f} clips/s",
            "delivered": f"{self.delivered:.1f} clips/s, cores {self.cores_busy:.0%} busy",
            "data wait": f"{self.wait:.2%} of the time",
            "first batch": f"after {self.first_s:.1f} s",
            "decode": f"{self.decode_ms:.2f} ms of CPU a clip, {self.threads} threads",
            "read": f"{self.read_ms:.2f} ms a clip, {self.delivered * self.stored_bytes / MB:.1f} MB/s",
            "blocks waiting": f"{self.blocks_mean:.1f} on the mean, {self.blocks_least} at least",
            "object store": f"{self.store_bytes / MB:.0f} MB at the most",
            "without a step": f"{self.most:.0f} clips/s: {able}",
        }
        if self.replaced:
            rows["damaged"] = f"{self.replaced} clips, others stood in for them"
        lines = [f"{name:<16}{value}" for name, value in rows.items()]
        verdict = ["does NOT feed the GPU", *(f"- {reason}" for reason in reasons)] if reasons else ["feeds the GPU"]
        return "\n".join([*lines, *verdict])


def diagnose(found: Findings, config: Config, manifest: Manifest, memory: IngestMemory) -> list[str]:
    """What limits, and what to change; nothing when the GPU is fed."""
    if found.wait < FED:
        return []
    if found.most >= RESERVE * found.wanted:
        return _unsteady(found, config, memory)
    if found.read_use >= USED_UP and found.read_use > found.decode_use:
        return _disk(found, config, manifest)
    if found.decode_use >= USED_UP or found.cores_busy >= ALL_CORES:
        return _cores(found, config, manifest)
    return [
        f"neither decoding ({found.decode_use:.0%} of its threads) nor reading ({found.read_use:.0%}) is at its "
        f"limit, and the cores are {found.cores_busy:.0%} busy: something slows the machine as a whole. Look for "
        "other programs, a limit on this container's CPU time, or a cluster whose other nodes do the work."
    ]


def _unsteady(found: Findings, config: Config, memory: IngestMemory) -> list[str]:
    able = f"disk and cores suffice on the mean ({found.most:.0f} clips/s; {found.wanted:.0f} are wanted), but"
    if found.blocks_least <= IN_HAND and memory.waiting < MOST_WAITING:
        double = 2 * memory.total * config.scale.workers / MB
        return [
            f"memory: {able} the {memory.waiting} blocks that may wait ran out. Let more wait: "
            f"--ingest-memory {double:.0f}MB (it holds at most {double / 2:.0f} MB now)."
        ]
    if found.cores_busy >= ALL_CORES:
        return [
            f"other programs: {able} batches came late, and the cores were {found.cores_busy:.0%} busy. End what else "
            "runs here, and test again."
        ]
    return [f"{able} batches came late: now and then the disk, or another program, held them up. Test again."]


def _disk(found: Findings, config: Config, manifest: Manifest) -> list[str]:
    needed, can = RESERVE * found.wanted * found.stored_bytes / MB, found.most * found.stored_bytes / MB
    storage, spec, data = Storage(manifest.root), manifest.spec, config.data
    reasons = [
        f"disk: reading {manifest.where} gives {can:.1f} MB/s ({found.readers} reading threads, "
        f"{found.read_ms:.1f} ms a clip), and {needed:.1f} MB/s are needed."
    ]
    if not storage.is_local and not data.cache_dir:
        reasons.append("remote store: keep what was read on a local disk, from the second epoch on: --data.cache-dir.")
    elif storage.is_local:
        reasons.append("put the dataset on a faster disk.")
    else:
        reasons.append("what the cache holds is read from its disk: test again when it has seen an epoch.")
    if spec.num_frames > data.num_frames:
        reasons.append(
            f"stored frames: {data.num_frames} of {spec.num_frames} are read, a piece here and a piece there. Prepared "
            f"with --num-frames {data.num_frames}, a row group is one piece."
        )
    return [*reasons, _fewer_frames(found, config)]


def _cores(found: Findings, config: Config, manifest: Manifest) -> list[str]:
    spec = manifest.spec
    would_do = math.ceil(found.threads * found.lack)
    reasons = [
        f"cores: {found.threads} threads that decode give {found.most:.0f} clips/s (decoding alone, on cores of their "
        f"own: {1000 * found.threads / found.decode_ms:.0f}), and {found.wanted:.0f} are wanted. {would_do} threads on "
        f"as many free cores would do{_idle_cores(found, config, would_do)}."
    ]
    if found.decode_use < MOSTLY_OTHERS:
        reasons.append(
            f"all cores are busy, but decoding gets only {found.decode_use:.0%} of its threads' time: end what else "
            "runs here."
        )
    if spec.frame_codec == "png":
        reasons.append("codec: PNG takes about five times as long to decode as JPEG. Prepare with --codec jpeg.")
    elif spec.jpeg_subsampling != "420":
        reasons.append(
            f"codec: frames are JPEG 4:{spec.jpeg_subsampling[1]}:{spec.jpeg_subsampling[2]} of quality "
            f"{spec.jpeg_quality}. Prepared with --subsampling 420 they decode in about 70 % of the time."
        )
    side = spec.frame_size / math.sqrt(found.lack)
    return [*reasons, f"smaller frames: {side:.0f} px in place of {spec.frame_size} would do.",
            _fewer_frames(found, config)]  # fmt: skip


def _idle_cores(found: Findings, config: Config, would_do: int) -> str:
    if found.cores_busy >= ALL_CORES:
        return ""
    return (
        f"; the cores are only {found.cores_busy:.0%} busy, so try --data.decode-threads "
        f"{math.ceil(would_do / config.scale.workers)}"
    )


def _fewer_frames(found: Findings, config: Config) -> str:
    frames = int(config.data.num_frames / found.lack)
    if frames:
        return f"fewer frames a clip, which is another experiment: --data.num-frames {frames} would do."
    return "fewer frames a clip would not do: one is too many."
