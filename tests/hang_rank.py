"""One process of tests/test_hang.py: `hang_rank.py HOW FOLDER RANK WORLD`. How it hangs, or does not."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from fvlm.config import Config, ScaleConfig
from fvlm.train.hang import HEAD_BYTES, LONG, STACKS, HangWatch

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
    empty, _ = os.pipe()
    # A PyDLL call keeps the interpreter's lock: no Python thread runs any more. No signal ends this one.
    ctypes.PyDLL(None).read(empty, ctypes.create_string_buffer(1), 1)


def sleep_with_the_machine() -> None:
    """This process and its children stand still, longer than a hang may take."""
    group = os.getpgid(0)
    assert group == os.getpid()
    script = f"kill -STOP -{group}; sleep {2 * LONG * HANG_S}; kill -CONT -{group}"
    subprocess.Popen(["sh", "-c", script], start_new_session=True)
    time.sleep(HANG_S / 2)


def lose_the_watcher(watch: HangWatch) -> None:
    """Somebody kills it; the next step starts another."""
    (child,) = psutil.Process().children()
    child.kill()
    child.wait()
    watch.after_step(19, {})
    sit_in_a_driver()


def be_slow(stacks: Path) -> None:
    while all(path.stat().st_size <= HEAD_BYTES for path in stacks.iterdir()):
        time.sleep(0.01)


def start_training(folder: Path, rank: int) -> None:
    """With a model in shards, as rank 0 of two. The other never comes to where the weights go round."""
    import torch
    from datasets import write_dataset

    from fvlm import presets
    from fvlm.train.resume import Choice
    from fvlm.train.store import LocalStore
    from ray_jobs.training import Place, train_on

    config = presets.get("demo", runs_dir=str(folder), run="run")
    scale = ScaleConfig(workers=2, strategy="shard", device="cpu", hang_s=HANG_S)
    config = dataclasses.replace(config, scale=scale)
    if rank == 1:
        (folder / "run" / STACKS).mkdir(parents=True, exist_ok=True)
        while all(path.stat().st_size <= HEAD_BYTES for path in (folder / "run" / STACKS).iterdir()):
            time.sleep(0.1)
        time.sleep(2 * HANG_S)  # the other has ended by itself
        raise SystemExit(7)
    manifest = write_dataset(folder / "data", clips=26)
    (folder / f"began-{rank}").touch()
    nothing: Any = None  # what training itself would need
    place = Place(0, 2, torch.device("cpu"))
    train_on(place, config, manifest, LocalStore(folder), Choice(None, 0, 0, ()), nothing, nothing, nothing)


def wait_for_a_checkpoint(folder: Path, how: str) -> None:
    """The write takes longer than a hang may; it gets further all the time, or only at its beginning."""
    from runs import advance, make_run

    from fvlm.train.saver import Saver
    from fvlm.train.state import Contents
    from fvlm.train.store import LocalStore

    class Store(LocalStore):
        def write(self, contents: Contents) -> None:
            files = contents.tensor_files()
            until = time.monotonic() + (1.5 * LONG * HANG_S if how == "slow store" else 1000)
            while time.monotonic() < until:
                if how == "slow store" or time.monotonic() - began < HANG_S / 2:
                    next(files["model.safetensors"].pieces())
                time.sleep(0.1)
            super().write(contents)

    run = make_run(folder)
    config = dataclasses.replace(run.config, scale=ScaleConfig(hang_s=HANG_S))
    with HangWatch(config, 0, 0, 1) as watch, Saver(run, Store(folder / "c"), print, watch.extend) as saver:
        advance(run)
        watch.after_step(1, {})
        began = time.monotonic()
        (folder / "began-0").touch()
        saver.save_now()
    print("ended")


def save_slowly(folder: Path, rank: int) -> None:
    """The first write and the last take longer than a hang may, and get further all the time.

    The second save comes before the first is through, in mid-run; the last comes at the end.
    """
    from runs import advance, make_run

    from fvlm.train.save_signal import SaveSignal
    from fvlm.train.saver import Saver, ShardGiver
    from fvlm.train.state import Contents
    from fvlm.train.store import LocalStore

    class Store(LocalStore):
        def write(self, contents: Contents) -> None:
            files, until = contents.tensor_files(), time.monotonic() + 1.5 * LONG * HANG_S
            while contents.step in (2, 6) and time.monotonic() < until:
                next(files["model.safetensors"].pieces())
                time.sleep(0.1)
            super().write(contents)

    run = make_run(folder, max_steps=6, save_every=2)
    config = dataclasses.replace(run.config, scale=ScaleConfig(hang_s=HANG_S))
    with HangWatch(config, 0, rank, 2) as watch:
        signal = SaveSignal()
        saver, others = (
            Saver(run, Store(folder / "c"), print, watch.extend, signal),
            ShardGiver(run, watch.extend, signal),
        )
        hook = others if rank else saver
        (folder / f"began-{rank}").touch()
        for _ in range(6):
            wait_for_the_others()  # as a step does
            advance(run)
            watch.after_step(run.step, {})
            hook.after_step(run.step, {})
    print("ended")


def main() -> None:
    how, folder, rank, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if world > 1:
        join(folder, rank, world)
    if how == "start":
        start_training(folder, rank)
    elif how == "slow saves":
        save_slowly(folder, rank)
    elif how in ("slow store", "dead store"):
        wait_for_a_checkpoint(folder, how)
    else:
        train(how, folder, rank, world)


def train(how: str, folder: Path, rank: int, world: int) -> None:
    config = Config(runs_dir=str(folder), run="run", scale=ScaleConfig(hang_s=HANG_S))
    if how == "asleep":
        os.setpgrp()
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
            case "asleep":
                sleep_with_the_machine()
            case "watcher killed":
                lose_the_watcher(watch)
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
