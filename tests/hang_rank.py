"""One process of tests/test_hang.py: `hang_rank.py HOW FOLDER RANK WORLD`. How it hangs, or does not."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from fvlm.config import Config, ScaleConfig
from fvlm.train.hang import HEAD_BYTES, STACKS, HangWatch

HANG_S = 4.0


def join(folder: Path, rank: int, world: int) -> None:
    import torch.distributed as dist  # only here: seconds, and five of the seven processes have no use for it

    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)


def wait_for_the_others() -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))


def sit_in_a_driver() -> None:
    time.sleep(1000)


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(1000)  # a PyDLL call keeps the interpreter's lock: no Python thread runs any more


def be_slow(stacks: Path) -> None:
    while all(path.stat().st_size <= HEAD_BYTES for path in stacks.iterdir()):
        time.sleep(0.01)


def main() -> None:
    how, folder, rank, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config = Config(runs_dir=str(folder), run="run", scale=ScaleConfig(hang_s=HANG_S))
    if world > 1:
        join(folder, rank, world)
    with HangWatch(config, 16, rank, world) as watch:
        if how == "error":
            raise SystemExit(3)
        if how == "first":
            time.sleep(1.5 * HANG_S)  # more than a later step may take
        for step in (17, 18):
            watch.after_step(step, {})
        began = time.monotonic()
        (folder / f"began-{rank}").touch()
        match how:
            case "collective" if rank == 0:
                wait_for_the_others()
            case "collective":
                sit_in_a_driver()
            case "interpreter":
                hold_the_interpreter()
            case "slow":
                be_slow(config.run_dir / STACKS)
                watch.after_step(19, {})
            case "long":
                with watch.long():
                    time.sleep(1.5 * HANG_S)
        print(f"{time.monotonic() - began:.1f} s")
    print("ended")


if __name__ == "__main__":
    main()
