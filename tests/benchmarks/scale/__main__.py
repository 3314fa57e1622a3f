"""One command, more ranks: python tests/benchmarks/scale [--rounds 3] [--steps 60], and --paper for many GPUs.

Trains the demo's model by `python -m ray_jobs.train demo --scale.workers N` with each number of ranks, in turns, and
says what a step takes (medians over laps of ten steps, the first two laps left out) next to what `law.py` predicts from
figures that were taken without Ray: a step of few and of many clips on one thread, of a rank on every core, averaging
their gradients, and decoding. And whether all of them trained alike.

--paper measures nothing: it puts a GPU's own step time through the same law, for clusters of 1 to 1,000 of them.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from datasets import write_dataset
from demo_run import demo_config, laps, train
from figures import measure
from jobs import free_ports
from law import Cluster, forecast, seconds_a_step

from fvlm.train.parallel import BUCKET_ELEMENTS

GPUS = (1, 2, 4, 8, 64, 1000)
DAY_S = 24 * 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", default="1,2,4")
    paper = parser.add_argument_group("--paper")
    paper.add_argument("--paper", action="store_true", help="a forecast, from these figures")
    paper.add_argument("--step-ms", type=float, default=123.0, help="of one GPU alone (%(default)s)")
    paper.add_argument("--clips", type=int, default=16, help="of one GPU in a step (%(default)s)")
    paper.add_argument("--backward", type=float, default=0.6, help="share of the step that makes gradients")
    paper.add_argument("--parameters", type=float, default=158.6e6, help="that are trained (%(default)g)")
    paper.add_argument("--network-gbit", type=float, default=100.0, help="of a GPU's link, each way (%(default)g)")
    paper.add_argument("--hop-us", type=float, default=15.0, help="between two ranks (%(default)g)")
    paper.add_argument("--cpu-ms", type=float, default=3.5, help="to read and decode a clip (%(default)g)")
    paper.add_argument("--kb-a-clip", type=float, default=205.0, help="read (%(default)g)")
    paper.add_argument("--dataset", type=float, default=1e9, help="clips in an epoch (%(default)g)")
    args = parser.parse_args()
    on_paper(args) if args.paper else on_this_machine(args)


def on_this_machine(args: argparse.Namespace) -> None:
    cores = len(os.sched_getaffinity(0))
    rank_counts = [int(word) for word in args.ranks.split(",")]
    timed: dict[int, list[float]] = {ranks: [] for ranks in rank_counts}
    losses: dict[int, list[float]] = {}
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as folder:
        root = Path(folder).resolve()
        write_dataset(root / "data", clips=160, frame_size=112, rows_per_row_group=8)
        for number, ranks in itertools.product(range(args.rounds), rank_counts):
            config = demo_config(root, f"{ranks}-ranks-{number}", args.steps, ranks=ranks)
            rows = train(config)
            timed[ranks] += laps(rows)
            losses[ranks] = [row["train/loss"] for row in rows]
            print(f"{config.run}: {1000 * statistics.median(timed[ranks]):.0f} ms a step", flush=True)
        parts = measure(config, cores, free_ports(1))
    print(f"\non {cores} cores, by themselves: {parts}\n")
    print("ranks  ms a step  predicted    off  clips/s  times one  loss, off from one rank's")
    rows, one = [], statistics.median(timed[rank_counts[0]])
    for ranks in rank_counts:
        seconds = statistics.median(timed[ranks])
        predicted = seconds_a_step(parts, ranks, config.data.global_batch, cores)
        off = max(abs(a / b - 1) for a, b in zip(losses[ranks], losses[rank_counts[0]], strict=True))
        rows.append({"ranks": ranks, "step_s": seconds, "predicted_s": predicted, "loss_off": off})
        print(
            f"{ranks:5} {1000 * seconds:10.0f} {1000 * predicted:10.0f} {100 * (predicted / seconds - 1):5.0f}% "
            f"{config.data.global_batch / seconds:8.2f} {one / seconds:10.2f}  {off:.1e}"
        )
    print(json.dumps({"cores": cores, "rounds": args.rounds, "parts": dataclasses.asdict(parts), "runs": rows}))


def on_paper(args: argparse.Namespace) -> None:
    cluster = Cluster(
        step_s=args.step_ms / 1000,
        clips_a_gpu=args.clips,
        backward=args.backward,
        gradient_bytes=4 * args.parameters,
        network=args.network_gbit * 1e9 / 8,
        hop_s=args.hop_us / 1e6,
        buckets=max(1, round(args.parameters / BUCKET_ELEMENTS)),
        ingest_s=args.cpu_ms / 1000,
        bytes_a_clip=args.kb_a_clip * 1000,
    )
    forecasts = [forecast(cluster, gpus) for gpus in GPUS]
    print(f"a forecast, not a measurement, from {cluster}\n")
    print(" GPUs  global batch  ms a step  waiting   clips/s  of linear  cores a GPU  read GB/s  epoch days  GPU hours")
    for each in forecasts:
        days = args.dataset / each.clips_per_s / DAY_S
        print(
            f"{each.gpus:5} {each.gpus * args.clips:13,} {1000 * each.step_s:10.0f} {1000 * each.exposed_s:8.1f} "
            f"{each.clips_per_s:9,.0f} {100 * each.efficiency:9.0f}% {each.cores_a_gpu:12.2f} "
            f"{each.read_bytes_per_s / 1e9:10.2f} {days:11.1f} {24 * days * each.gpus:10,.0f}"
        )
    print(json.dumps([dataclasses.asdict(each) for each in forecasts]))


if __name__ == "__main__":
    main()
