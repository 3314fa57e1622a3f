"""One start of tests/test_wandb.py: `wandb_rank.py HOW FOLDER FIRST STOP`. Ends with a line of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
from PIL import Image

import fvlm
from fvlm.config import Config, LogConfig, OptimConfig
from fvlm.train import wandb_sink
from fvlm.train.sinks import Picture
from fvlm.train.wandb_sink import Wandb

MOST_WAITING = 5


def service() -> psutil.Process:
    while True:
        for process in psutil.Process().children():
            if process.name() == "wandb-core":
                return process
        time.sleep(0.02)


def main() -> None:
    how, folder, first, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config = Config(
        run="run",
        runs_dir=str(folder),
        log=LogConfig(wandb="online" if how == "unreachable" else "offline", wandb_project="test"),
        optim=OptimConfig(lr=1 / first),  # another one at each start
    )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if how == "stopped":
        wandb_sink.MOST_WAITING, wandb_sink.FINISH_S, wandb_sink.MORE_S = MOST_WAITING, 1.0, 1.0
    notes: list[str] = []
    sink = Wandb(config, notes.append, [Path(fvlm.__file__).parent])
    pid, slowest = 0, 0.0
    for step in range(first, stop + 1):
        if step == first + 2 and how in ("killed", "stopped"):
            time.sleep(3)  # it has begun
            pid = service().pid
            os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            time.sleep(0.5)
        begin = time.monotonic()
        padding = {f"train/x{i}": 0.5 for i in range(2000 if how == "stopped" else 2)}
        sink.write([], {"step": step, "train/loss": 1 / step} | padding)
        if step % 2 == 0:
            png = config.run_dir / f"{step}.png"
            Image.new("RGB", (8, 8)).save(png)
            sink.evaluated({"step": step, "eval/caption/ratio": 1.0 + step}, [Picture(png, f"step {step}")])
        slowest = max(slowest, time.monotonic() - begin)
        if how == "stopped":
            time.sleep(0.01)
    begin = time.monotonic()
    sink.close()
    print(json.dumps({"notes": notes, "slowest": slowest, "closed": time.monotonic() - begin, "pid": os.getpid()}))


if __name__ == "__main__":
    main()
