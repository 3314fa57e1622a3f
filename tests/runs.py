"""A small model that trains, in a real `Run`: what tests of checkpoints save, kill, spoil and load."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fvlm import presets
from fvlm.data.plan import Plan
from fvlm.train.loop import Run
from fvlm.train.metrics import Clock, Metrics
from fvlm.train.state import STATE, checkpoints, contents_of, load_checkpoint, step_of
from fvlm.train.store import LocalStore


class Net(nn.Module):
    """Two layers, one parameter that is never trained, and two tied ones, as the product's model has them."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.second.bias = self.first.bias if width == 4 else self.second.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def make(seed: int, width: int = 6) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net(width)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, fused=True)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The data come from the global generator: losses repeat only where its state was restored as well."""
    for _ in range(steps):
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, bytes]:
    """Everything that a step changes, and the random generator."""
    named = dict(net.named_parameters())
    found = {name: p.detach().cpu().numpy().tobytes() for name, p in named.items()}
    if optimizer:
        found["generator"] = torch.get_rng_state().numpy().tobytes()
        for name, p in named.items():
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{key}/{name}"] = value.cpu().numpy().tobytes()
    return found


def save(root: Path, step: int, net: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    contents = contents_of(step, net, optimizer, state)
    LocalStore(root).write(contents)
    return root / contents.name


PLAN = Plan(np.array([64]), 4, 0, 8, 8, 8, "clips")


def make_run(folder: Path, seed: int = 0, width: int = 6, **train_config: Any) -> Run:
    """At step 0; its run folder is `folder`/run."""
    changes = {"max_steps": 1000, "save_every": 1000, "keep_last": 100, "log_every": 1} | train_config
    config = presets.get("demo", runs_dir=str(folder), run="run")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    config.run_dir.mkdir(exist_ok=True)
    net, optimizer = make(seed, width)
    return Run(config, PLAN, net, optimizer, Metrics(3), Clock())


def advance(run: Run, steps: int = 1) -> None:
    for _ in range(steps):
        train(run.model, run.optimizer, 1)
        run.step += 1
        run.metrics.add(run.step, {"caption/ratio": torch.tensor(1.0 + run.step / 8), "recon/ratio": torch.tensor(1.0)})
        run.metrics.drain()


def seal(path: Path, state: dict[str, Any]) -> None:
    """Write `state` as the state.json that a program which knows the format would, by the text of the format."""
    body = json.dumps({key: value for key, value in state.items() if key != "sha256"}, indent=2)[:-2] + ",\n"
    line = f'  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'
    (path / STATE).write_text(body + line)


def vouch(path: Path) -> None:
    """Let state.json of `path` speak for the other files as they are now."""
    state = json.loads((path / STATE).read_text())
    for name in state["files"]:
        content = (path / name).read_bytes()
        state["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal(path, state)


def killed_at(number: int, work: Callable[[], object], how: str) -> bool:
    """Run `work` in a forked process that kills itself (SIGKILL) at the `number`-th change of the disk. Whether it did.

    how: "before" the call, "after" it, or in the "middle": a write stops half way, other calls are as with "before".
    """
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), "the work itself failed"
        return status != 0
    try:
        calls = 0

        def watched(real: Callable) -> Callable:
            @functools.wraps(real)
            def call(*args, **kwargs):
                nonlocal calls
                if real is real_open and not args[1] & os.O_CREAT:
                    return real(*args, **kwargs)
                calls += 1
                mine = calls == number
                if mine and how != "after":
                    if how == "middle" and real is real_write:
                        real(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                result = real(*args, **kwargs)
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        real_open, real_write = os.open, os.write
        for name in ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, watched(getattr(os, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


def require_whole(root: Path) -> list[int]:
    """Load everything that a reader would take for a checkpoint. Returns the steps."""
    listed = checkpoints(root)
    for path in listed:
        load_checkpoint(path, *make(7))
    return [step_of(path) for path in listed]
