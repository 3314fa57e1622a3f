"""What the switch from the earlier trainer's shards costs: python tests/benchmarks/convert.py [FOLDER]

Makes two shards as large as real ones (200 clips of 24 frames of 256 px, 1 GB) in FOLDER (a temporary one by default),
converts them with two tasks and the default options, and prints one line of JSON. Memory is that of the whole process
tree, Ray's own processes included, sampled from /proc/PID/smaps_rollup: `private` counts what only one process maps,
`pss` adds its share of what several map (page cache and object store included).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

CLIPS, FRAMES, SIZE, SHARDS, TASKS = 200, 24, 256, 2, 2
USERS_SHARDS = 513
OCTAVES = {8: 60.0, 16: 40.0, 32: 22.0, 64: 12.0, 128: 7.0, 288: 4.0}
"""Points across, and contrast: noise at all scales, so that a JPEG takes as many bytes as one of a real video frame."""


def texture(random: np.random.Generator) -> np.ndarray:
    """[288, 288, 3] float32"""
    total = np.full((288, 288, 3), 120.0, np.float32)
    for points, contrast in OCTAVES.items():
        for channel in range(3):
            noise = Image.fromarray(random.standard_normal((points, points)).astype(np.float32))
            total[..., channel] += contrast * np.asarray(noise.resize((288, 288), Image.Resampling.BICUBIC))
    grey = total.mean(2, keepdims=True)
    return grey + 0.3 * (total - grey)  # videos are less colourful than noise


def make_shard(path: Path, seed: int) -> None:
    random, samples = np.random.default_rng(seed), []
    for clip in range(CLIPS):
        large = np.clip(texture(random), 0, 255).astype(np.uint8)
        frames = np.stack([large[t : t + SIZE, 2 * (t // 2) : 2 * (t // 2) + SIZE] for t in range(FRAMES)])
        latents = random.standard_normal((FRAMES, 4, SIZE // 8, SIZE // 8), np.float32)
        samples.append({
            "frames": torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))),
            "latents": torch.from_numpy(latents).bfloat16(),
            "caption": f"clip {clip} of shard {seed}: noise that moves",
            "video_id": f"{seed}-{clip}",
        })  # fmt: skip
    torch.save({"samples": samples, "count": CLIPS}, path)


def memory(root: psutil.Process) -> tuple[int, int]:
    """-> (PSS, private) bytes of `root` and everything below it."""
    pss = private = 0
    try:
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in tree:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        pss += sizes["Pss"]
        private += sizes["Private_Clean"] + sizes["Private_Dirty"]
    return pss, private


def convert(src: Path, out: Path) -> tuple[float, int, int]:
    """-> seconds, and the peaks of PSS and private bytes."""
    started, pss, private = time.monotonic(), 0, 0
    command = [sys.executable, "-m", "ray_jobs.convert", "--src", str(src), "--out", str(out), "--tasks", str(TASKS)]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            now = memory(root)
            pss, private = max(pss, now[0]), max(private, now[1])
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"the conversion ended with code {process.returncode}")
    return time.monotonic() - started, pss, private


def main() -> None:
    parent = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=parent) as name:
        src, out = Path(name) / "src", Path(name) / "out"
        src.mkdir()
        for seed in range(SHARDS):
            make_shard(src / f"shard_{seed:04d}.pt", seed)
        before = sum(path.stat().st_size for path in src.iterdir())
        seconds, pss, private = convert(src, out)
        after = sum(path.stat().st_size for path in out.iterdir())
        copied = time.monotonic()
        shutil.copyfile(src / "shard_0000.pt", Path(name) / "copy")
        copied = time.monotonic() - copied
    clips = CLIPS * SHARDS
    print(json.dumps({
        "shards": SHARDS,
        "clips": clips,
        "tasks": TASKS,
        "cpus": psutil.cpu_count(),
        "load": round(psutil.getloadavg()[0], 1),
        "seconds": round(seconds, 1),
        "clips_per_s": round(clips / seconds, 1),
        "peak_pss_mb": round(pss / 1e6),
        "peak_private_mb": round(private / 1e6),
        "bytes_a_clip_before": round(before / clips),
        "bytes_a_clip_after": round(after / clips),
        "copy_of_a_shard_s": round(copied, 1),
        f"hours_for_{USERS_SHARDS}": round(seconds / SHARDS * USERS_SHARDS / 3600, 1),
        f"gb_for_{USERS_SHARDS}": round(after / SHARDS * USERS_SHARDS / 1e9),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
