"""What is left of a bare step's speed in a whole run: python tests/benchmarks/end_to_end.py [--help]

Bare: the step alone, in one process, on batches that lie decoded in memory. Run: `python -m ray_jobs.train` on the same
clips, with ingest, metrics, logs and checkpoints. Both compute on so many threads, turn by turn; of each round the
medians over laps of ten steps, the first two laps left out, and of the rounds the median. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bare_step import decoded, seconds_of_laps
from datasets import write_dataset
from demo_run import LAP, LEFT_OUT, demo_config, laps, train

from fvlm.config import Config
from fvlm.data.schema import Manifest
from fvlm.data.shards import read_manifest
from fvlm.model.hub import build_model
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.run_folder import TOKENIZER
from fvlm.train.step import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--clips", type=int, default=8, help="in a step")
    parser.add_argument("--threads", type=int, default=1, help="that the step computes on; the ingest has the others")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    Path("build").mkdir(exist_ok=True)
    bare: list[float] = []  # medians, one a round
    run: list[float] = []
    with tempfile.TemporaryDirectory(dir="build") as folder:
        write_dataset(Path(folder) / "data", clips=160, frame_size=112, rows_per_row_group=8)
        manifest = read_manifest(Path(folder).resolve() / "data")
        for number in range(args.rounds):
            config = demo_config(Path(folder).resolve(), f"round-{number}", args.steps, args.clips, 1, args.threads)
            run.append(statistics.median(laps(train(config))))
            bare.append(statistics.median(laps_of_bare_step(config, manifest)))
            print(f"round {number + 1}: bare {1000 * bare[-1]:.0f} ms a step, run {1000 * run[-1]:.0f}", flush=True)
    speeds = {name: args.clips / statistics.median(seconds) for name, seconds in (("bare", bare), ("run", run))}
    shares = [alone / whole for alone, whole in zip(bare, run, strict=True)]
    share = statistics.median(shares)
    for name, speed in speeds.items():
        print(f"{name:5} {speed:6.2f} clips/s, {1000 * args.clips / speed:5.0f} ms a step")
    listed = ", ".join(f"{100 * value:.1f}" for value in sorted(shares))
    print(f"a whole run has {100 * share:.1f} % of the bare step's speed (median of {listed})")
    print(json.dumps({"clips_per_s": speeds, "share": share, "shares": shares} | vars(args)))


def laps_of_bare_step(config: Config, manifest: Manifest) -> list[float]:
    """Seconds a step of each lap that counts, as many steps as the run has."""
    model = build_model(config.model, manifest.spec.latent_shape, config.train.seed)
    freeze_unreached(model, config)
    step = Step(config, model, make_optimizer(model, config.optim))
    batches = decoded(config, manifest, config.run_dir / TOKENIZER)
    return seconds_of_laps(step, batches, config.train.max_steps // LAP, LAP, torch.device("cpu"))[LEFT_OUT:]


if __name__ == "__main__":
    main()
