"""One rank of tests/test_samples.py: `samples_rank.py FOLDER RANK WORLD FIRST STOP BROKEN...`, steps counted from 1."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_run import batches, bits, make_config, make_run

from fvlm.train.logger import Logger
from fvlm.train.loop import train
from fvlm.train.samples import SAMPLES, Samples
from fvlm.train.sinks import METRICS

LATE_S = 0.4


def main() -> None:
    folder, (rank, world, first, stop, *broken) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{first}'}", rank=rank, world_size=world)
    config = make_config(folder, samples=True, max_steps=stop, log_every=3)
    run = make_run(config, first - 1)
    samples = Samples(config, first - 1, rank, world)
    take = samples.take

    def late_take(step):
        """The other ranks' lines are on the disk before any rank goes on, however late they are."""
        if rank:
            time.sleep(LATE_S)
        taken = take(step)
        for other in range(world):
            lines = (config.run_dir / SAMPLES / f"rank-{other:05d}.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["step"] == step, f"rank {rank} goes on without rank {other}'s step {step}"
        return taken

    samples.take = late_take
    train(run, samples.of(batches(first, broken, rank, world)), [Logger(run, [], samples)])
    (folder / f"bits-{rank}").write_bytes(b"".join(bits(run).values()))
    assert rank == 0 or not (config.run_dir / METRICS).exists()


if __name__ == "__main__":
    main()
