"""One rank of tests/test_evaluation.py: `evaluation_rank.py FOLDER RANK`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from evaluated import config_of, go_on

from fvlm.data.shards import read_manifest
from fvlm.train.held_out import eval_clips
from fvlm.train.tensor_parts import gathered

STEPS = 3


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for how in ("replicate", "shard"):
        config = config_of(folder / how, folder / "held-out", max_steps=STEPS)
        if how == "shard":  # and rank 1 has nothing to show
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, pictures=1))
        clips = eval_clips(config, read_manifest(folder / "training"))
        run = go_on(config, clips, rank=rank, world=2, shard=how == "shard")
        plain = go_on(
            config_of(folder / f"{how}-plain", None, max_steps=STEPS), None, rank=rank, world=2, shard=how == "shard"
        )
        whole = [{name: gathered(p.detach()) for name, p in one.model.named_parameters()} for one in (run, plain)]
        unequal = [name for name, p in whole[0].items() if not torch.equal(p, whole[1][name])]
        (folder / how / f"unequal-{rank}.json").write_text(json.dumps(unequal))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
