"""A process that times the bare step of a run: python tests/benchmarks/gpu/bare_run.py --json FILE -- PRESET OPTIONS...

PRESET and OPTIONS are those of `python -m ray_jobs.train`. No Ray runs; model, compilation and mock step are the run's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # works where fvlm is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bare_step import decoded, seconds_of_laps

from fvlm.config import Config
from fvlm.data.row_groups import stored_captions
from fvlm.data.schema import Manifest
from fvlm.data.shards import read_manifest
from fvlm.data.text import save_tokenizer, train_tokenizer
from fvlm.files import write_atomic
from fvlm.model.hub import vocabulary_size
from fvlm.train.memory import settle_memory, warm_up
from fvlm.train.resume import Choice
from fvlm.train.step import Step, compile_kind
from fvlm.train.store import checkpoint_store
from ray_jobs.options import parse as parse_command_line
from ray_jobs.training import make_run


def main() -> None:
    args, config = parse()
    device = torch.device("cuda" if on_gpu(config) else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))  # as a rank has
    manifest = read_manifest(Path(config.data.path).resolve())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        captions = itertools.chain.from_iterable(stored_captions(manifest, None))
        save_tokenizer(train_tokenizer(captions, vocabulary_size(config.model)), tokenizer)
        batches = decoded(config, manifest, tokenizer, args.batches)
    begin = time.perf_counter()
    config, step = make_step(config, manifest, device)
    first_s = time.perf_counter() - begin
    laps = seconds_of_laps(step, batches, args.left_out + args.laps, config.train.log_every, device)
    seconds = statistics.median(laps[args.left_out :])
    found = {
        "ms_step": 1000 * seconds,
        "clips_per_s": config.data.global_batch / seconds,
        "ms_laps": [1000 * lap for lap in laps],
        "laps_left_out": args.left_out,
        "steps_a_lap": config.train.log_every,
        "batches": len(batches),
        "model_and_mock_step_s": first_s,
        "compile": compile_kind(config, device),
        "memory": config.train.memory,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }
    write_atomic(args.json, json.dumps(found))


def parse() -> tuple[argparse.Namespace, Config]:
    own, command = sys.argv[1:], []
    if "--" in own:
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--laps", type=int, default=15, help="of log-every steps, that count")
    parser.add_argument("--left-out", type=int, default=2, help="laps before them")
    parser.add_argument("--batches", type=int, default=32, help="that are decoded, and taken again and again")
    return parser.parse_args(own), parse_command_line(command)


def on_gpu(config: Config) -> bool:
    return config.scale.device != "cpu" and torch.cuda.is_available()


def make_step(config: Config, manifest: Manifest, device: torch.device) -> tuple[Config, Step]:
    """-> the config with its choice of memory, and the step as a rank has it when its first batch comes."""
    shape = manifest.spec.latent_shape
    config = settle_memory(config, shape, device)
    step = make_run(config, manifest, device, checkpoint_store(config), Choice(None, 0, 0, ())).take_step
    if device.type == "cuda" or compile_kind(config, device) != "off":
        print(warm_up(step, shape), flush=True)
    return config, step


if __name__ == "__main__":
    main()
