"""The training step, timed: `make bench-step`, or `python tests/benchmarks/step.py --help`. No Ray, no network.

Builds a preset's model with random weights and times whole optimizer steps (forward, backward, clipping, AdamW) in one
process, in turns, from the same weights and on the same batch:

    present    as the experiment's earlier script works (tests/present_step.py)
    eager      ours
    compiled   ours with torch.compile, a program for each kind of transformer block
    whole      ours with torch.compile, one program for forward and backward (long to compile)
    graphs     compiled, recorded as CUDA graphs

and, to see what single choices bring on a GPU, `graphs` with one of them made otherwise:

    convolution        patches are embedded by DINOv2's own convolution, and not as a matrix product
    channels-first     the prediction head in torch's default format and not compiled
    one-query-program  the twelve layers that a query passes are one program

Without any of the options under "parts" they are compared. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works where fvlm is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent / "step"))
import parts
import speed_table
from compare import Bench, Spec, compare, table
from variants import PRESENT, VARIANTS, make_config

from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.train.numerics import configure_numerics

SWEEP = "8,16,24,32,48,64,96,128"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench-step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is timed")
    what.add_argument("--preset", default="joint_multifine")
    what.add_argument("--variants", default="present,eager,compiled", help="default %(default)s")
    what.add_argument("--precision", help="fp32, bf16, or both with a comma; default: the preset's")
    what.add_argument("--batch", type=int, help="clips in a step; default: the preset's, on a CPU 2")
    what.add_argument("--frames", type=int)
    what.add_argument("--caption", type=int, metavar="TOKENS", help="length of the longest caption")
    what.add_argument("--size", type=int, metavar="PIXELS", help="side of a frame")
    what.add_argument("--fine", type=int, metavar="N", help="fine iterations")
    what.add_argument("--memory", choices=("speed", "balanced", "small"), default="speed", help="what ours keeps")
    what.add_argument("--layers", type=int, metavar="N", help="of both transformers, for a quick look")
    how = parser.add_argument_group("how")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--repeats", type=int, default=10, help="timed readings of each variant; the median counts")
    how.add_argument("--present-repeats", type=int, help="of the present style, where it takes a minute")
    how.add_argument("--warmup", type=int, default=3, help="steps before those")
    how.add_argument("--deterministic", action="store_true", help="kernels that add in a fixed order, in all variants")
    how.add_argument("--threads", type=int, help="of the CPU")
    how.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then what is left is cut")
    how.add_argument("--json", type=Path, help="also write the line of JSON here, after every part")
    part = parser.add_argument_group("parts")
    part.add_argument("--compare", action="store_true", help="the comparison, besides other parts")
    part.add_argument("--captions", type=int, metavar="STEPS", help="recompilations over captions of real lengths")
    part.add_argument("--readings", action="store_true", help="the cost of the losses that are read every tenth step")
    part.add_argument("--profile", type=Path, metavar="FILE", help="where the last variant's time goes")
    part.add_argument("--loss-curve", type=int, metavar="STEPS", help="the last variant in bf16 next to float32")
    part.add_argument("--sweep", nargs="?", const=SWEEP, metavar="SIZES", help=f"batch sizes, {SWEEP}")
    part.add_argument("--table", action="store_true", help="every row of the speed table that is about the step")
    part.add_argument("--row", choices=speed_table.ENTRIES, action="append", help="one row of it")
    part.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="only join such files of JSON into --json")
    args = parser.parse_args(arguments)
    args.variants = args.variants.split(",")
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"--variants: no {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if args.precision and set(args.precision.split(",")) - {"fp32", "bf16"}:
        parser.error(f"--precision {args.precision}: fp32, bf16, or fp32,bf16")
    if args.sweep:
        if not all(size.isdigit() and int(size) for size in args.sweep.split(",")):
            parser.error(f"--sweep {args.sweep}: numbers with commas between them")
        args.sweep = [int(size) for size in args.sweep.split(",")]
    if args.merge and not args.json:
        parser.error("--merge needs --json")
    return args


def make_parts(
    args: argparse.Namespace, bench: Bench, config: Config, specs: list[Spec]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of the parts that were asked for, and what to call for them; what is vital first."""
    ours = [spec for spec in specs if spec.name not in PRESENT] or specs
    chosen = ("captions", "readings", "profile", "loss_curve", "sweep", "table", "row")

    def comparison() -> list[dict[str, Any]]:
        rows = compare(bench, config, specs)
        print(table(rows))
        return [dataclasses.asdict(row) for row in rows]

    if args.compare or not any(getattr(args, name) for name in chosen):
        yield "compare", comparison
    if args.captions:
        yield "captions", lambda: parts.captions(bench, config, ours[-1], args.captions)
    if args.readings:
        yield "readings", lambda: parts.readings(bench, config, ours)
    if args.profile:
        yield "profile", lambda: parts.profile(bench, config, specs[-1], args.profile)
    if args.loss_curve:
        yield "loss_curve", lambda: parts.loss_curve(bench, config, ours[-1].name, args.loss_curve)
    if args.sweep:
        yield "sweep", lambda: parts.sweep(bench, config, specs, args.sweep)
    if args.table or args.row:
        yield "table", lambda: speed_table.run(bench, config, specs, args.row or list(speed_table.ENTRIES))


def main(args: argparse.Namespace) -> None:
    if args.merge:
        write(args.json, merge(args.merge))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    batch = args.batch or (2 if device.type == "cpu" else None)
    changes = {
        "data.global_batch": batch, "data.num_frames": args.frames, "data.max_caption_tokens": args.caption,
        "data.frame_size": args.size, "objective.fine_iterations": args.fine, "train.memory": args.memory,
        "train.deterministic": args.deterministic or None,
    }  # fmt: skip
    config = make_config(args.preset, args.layers, **changes)
    configure_numerics(config, device)  # TF32 is then each variant's own
    precisions = (args.precision or config.train.precision).split(",")
    specs = [Spec(name, precision) for precision in precisions for name in args.variants]
    bench = Bench(device, args.repeats, args.present_repeats or args.repeats, args.warmup, args.budget)
    data = config.data
    setting = {
        "preset": args.preset,
        "batch": data.global_batch,
        "frames": data.num_frames,
        "caption": data.max_caption_tokens,
        "size": data.frame_size,
        "fine_iterations": config.objective.fine_iterations,
        "layers": args.layers,
        "memory": config.train.memory,
        "deterministic": config.train.deterministic,
    }
    result: dict[str, Any] = {"machine": bench.machine, "peaks_tflops": bench.peaks, "setting": setting, "parts": {}}
    print(f"{bench.machine['chip']}, torch {bench.machine['torch']}, peak TFLOP/s {bench.peaks}\n{setting}", flush=True)
    for name, part in make_parts(args, bench, config, specs):
        print(f"\n{name}", flush=True)
        if bench.left() < 0:
            result["parts"][name] = {"note": "not measured: out of time"}
            print(result["parts"][name]["note"])
        else:
            result["parts"][name] = part()
        if args.json:
            write(args.json, result)
    print(json.dumps(result))


def merge(files: list[Path]) -> dict[str, Any]:
    """One object by the files' names; a file that is not there has left a part out, and is named."""
    found = {path.stem: json.loads(path.read_text()) for path in files if path.exists()}
    first = next(iter(found.values()), {"machine": None})
    missing = [path.stem for path in files if not path.exists()]
    return {"bench": "step", "machine": first["machine"], "missing": missing, "runs": found}


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
