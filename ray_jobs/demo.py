"""`make demo`: the whole road in a few minutes on two CPU cores.

Generated videos -> prepare -> train, killed in the middle and started again by the same command -> what came out, as a
table and two pictures. Every part is the real one; only the model and the frames are small.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro

from fvlm import presets
from fvlm.config import Config
from fvlm.data.latents import BlockTransform
from fvlm.data.synthetic import write_videos
from fvlm.errors import UserError
from fvlm.train.metrics import RATIOS
from fvlm.train.pictures import plot_curves
from fvlm.train.run_folder import PICTURES, latest_checkpoint
from fvlm.train.sinks import EVALS, METRICS
from ray_jobs.cli import run_command
from ray_jobs.paths import absolute


@dataclass(frozen=True)
class Demo:
    out: str = "demo-out"
    """Folder for everything the demo makes. What is complete there is used again."""
    clips: int = 320
    """Training videos."""
    held_out: int = 32
    """Videos that are never trained on."""
    steps: int = 160


def main() -> None:
    demo = tyro.cli(Demo, prog="python -m ray_jobs.demo", description=__doc__)
    out = Path(absolute("--out", demo.out))
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    train_data = make_dataset(out / "train", demo.clips, seed=0)
    held_out_data = make_dataset(out / "held-out", demo.held_out, seed=1)
    config = presets.get("demo", runs_dir=str(out / "runs"))
    command = ["train", "demo", "--data.path", str(train_data), "--runs-dir", str(out / "runs"),
               "--train.max-steps", str(demo.steps), "--eval.path", str(held_out_data),
               "--eval.every", str(demo.steps // 2)]  # fmt: skip
    if latest_checkpoint(config.run_dir) is None:
        kill_in_the_middle(command, config.run_dir / METRICS, demo.steps // 2 + config.train.log_every)
        say("starting the same command again: it resumes from the last checkpoint, without a flag")
    job(*command)
    show(config, out)
    say(f"done in {time.monotonic() - began:.0f} s")


def make_dataset(folder: Path, clips: int, seed: int) -> Path:
    """Generated videos, prepared by the command that prepares real ones."""
    say(f"{folder.name}: {clips} videos of moving shapes -> {folder}")
    config = presets.get("demo").data
    captions = write_videos(folder / "videos", clips, config.frame_size, seed)
    job("prepare", "--videos", str(folder / "videos"), "--captions", str(captions), "--out", str(folder / "shards"),
        "--num-frames", str(2 * config.num_frames), "--frame-size", str(config.frame_size),
        "--clips-per-shard", "64", "--latents", BlockTransform.name)  # fmt: skip
    return folder / "shards"


def job(module: str, *args: str) -> None:
    """Run one of our commands as a person would; its output is the demo's."""
    code = subprocess.call([sys.executable, "-m", f"ray_jobs.{module}", *args])
    if code:
        raise UserError(f"`python -m ray_jobs.{module}` ended with exit code {code}; its own message stands above.")


def kill_in_the_middle(command: list[str], metrics: Path, step: int) -> None:
    """Start training, and kill it with SIGKILL once it is past `step`."""
    process = subprocess.Popen([sys.executable, "-m", f"ray_jobs.{command[0]}", *command[1:]])
    while process.poll() is None and last_step(metrics) < step:
        time.sleep(0.2)
    if process.returncode:
        raise UserError(f"training ended with exit code {process.returncode}; its own message stands above.")
    process.kill()
    process.wait()
    say(f"killed the command (SIGKILL) after step {last_step(metrics)}")


def last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def show(config: Config, out: Path) -> None:
    """The table and the two pictures."""
    rows, evaluations = (read_rows(config.run_dir / name) for name in (METRICS, EVALS))
    plot_curves(config.run_dir, out / "curves.png")
    held = evaluations[-1]
    shutil.copy(config.run_dir / PICTURES / f"step-{held['step']:08d}-0.png", out / "gaze.png")
    first, last = rows[0], rows[-1]
    averages = {name: next(r[f"{name}_avg"] for r in reversed(rows) if f"{name}_avg" in r) for name in RATIOS}
    logged = [row for row in rows if "train/clips_per_s" in row]
    middle = logged[len(logged) // 2 :]
    table = [
        ("steps", f"{last['step']} (each once: {[r['step'] for r in rows] == list(range(1, len(rows) + 1))})"),
        ("caption loss, first -> last step", f"{first['caption/loss_fine']:.4f} -> {last['caption/loss_fine']:.4f}"),
        ("reconstruction loss, first -> last step", f"{first['recon/loss_fine']:.4f} -> {last['recon/loss_fine']:.4f}"),
        ("caption ratio (coarse / fine), average", f"{averages['caption/ratio']:.4f}"),
        ("reconstruction ratio, average", f"{averages['recon/ratio']:.4f}"),
        ("held out: caption loss, ratio", scores(held, "caption")),
        ("held out: reconstruction loss, ratio", scores(held, "recon")),
        ("clips/s, median", f"{median(r['train/clips_per_s'] for r in middle):.1f}"),
        ("data-wait share, median", f"{100 * median(r['train/data_wait'] for r in middle):.1f} %"),
    ]
    width = max(len(name) for name, _ in table)
    print("\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in table))
    print(f"\n  curves: {out / 'curves.png'}\n  gaze:   {out / 'gaze.png'}\n  log:    {config.run_dir / 'train.log'}\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"{path} is missing: an earlier release made this run. Delete {path.parent}, or use --out.")
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def scores(evaluation: dict[str, Any], name: str) -> str:
    return f"{evaluation[f'eval/{name}/loss_fine']:.4f}, {evaluation[f'eval/{name}/ratio']:.4f}"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    run_command(main)
