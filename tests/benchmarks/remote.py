"""What a network costs the ingest: python tests/benchmarks/remote.py

One epoch of CLIPS clips (8 of 24 frames, 256 px) through BlockReader on one decoding thread, in the plan's order: from
the disk, from an S3 server on this machine with a delay of DELAY_S on every request, with 5 % and 30 % of the requests
failing, and through a cache, cold and warm. Batches are compared with the local ones. Server, proxy and reader share
the processor, so read ratios; retries are exact.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import write_dataset  # the tests' own
from faulty_store import Proxy, Store

from fvlm.data.cache import RowGroupCache
from fvlm.data.counts import counted
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.shards import check_shards, read_manifest

CLIPS, DELAY_S = 256, 0.03
FIVE = {"s500": 0.02, "s503": 0.02, "cut": 0.01}
THIRTY = {"s500": 0.08, "s503": 0.06, "cut": 0.06, "short": 0.05, "empty": 0.05}


def epoch(root: str, cache: RowGroupCache | None = None) -> tuple[str, float, float]:
    """-> digest of the batches in their order, seconds to the first block (check_shards included), seconds of all"""
    begin = time.perf_counter()
    manifest = read_manifest(root)
    check_shards(manifest)
    plan = Plan(manifest.shard_rows, manifest.spec.rows_per_row_group, 0, 8, 8, 8, manifest.fingerprint)
    reader, digest, first = BlockReader(ClipReader(manifest, plan, 8, cache)), hashlib.sha256(), 0.0
    for block in reader.steps(0, plan.steps_per_epoch):
        first = first or time.perf_counter() - begin
        digest.update(np.ascontiguousarray(block["frames"]).tobytes() + "".join(block["clip_id"]).encode())
    reader.close()
    return digest.hexdigest(), first, time.perf_counter() - begin


def main() -> None:
    logging.disable(logging.WARNING)  # a line a retry
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder) / "set")
        write_dataset(Path(local), CLIPS, stored_frames=24, frame_size=256, rows_per_row_group=16, shards=8)
        store = Store()
        store.upload(Path(local), "set")
        cache = RowGroupCache(str(Path(folder) / "cache"), 1 << 34)
        wanted, *_ = epoch(local)
        print("| from | first block s | epoch s | requests | failed on purpose | retries | rereads |")
        print("|---|---|---|---|---|---|---|")
        for name, shares, kept in (
            ("disk", None, None),
            ("S3", {}, None),
            ("S3, 5 % fail", FIVE, None),
            ("S3, 30 % fail", THIRTY, None),
            ("S3, cache cold", {}, cache),
            ("S3, cache warm", {}, cache),
        ):
            proxy = Proxy(store, 1, DELAY_S, **(shares or {}))
            before = counted()
            got, first, whole = epoch(local if shares is None else proxy.uri("set"), kept)
            assert got == wanted
            events, faults = counted() - before, sum(proxy.faults.values())
            print(
                f"| {name} | {first:.2f} | {whole:.1f} | {len(proxy.requests)} | {faults} | {events['retries']} "
                f"| {events['rereads']} |",
                flush=True,
            )
            proxy.go_away()
        store.stop()


if __name__ == "__main__":
    main()
