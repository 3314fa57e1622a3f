"""Video loaders side by side: `make bench-ingest`, or `python tests/benchmarks/ingest --help`.

Everyone reads the same clips in a format of its own, shuffled, decodes them with the same decoder, and hands batches to
one process, which looks at every page of them. Every pass is a fresh process with a warm page cache.

1. inspection   each loader once with each number of workers, its memory watched: picks the best number, and compares
                the orders that came out
2. rounds       each loader once a round at its best, nobody watching; the table has the medians

Prints a table and one line of JSON; progress goes to stderr, what a failed pass had to say to WORK/logs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Contender, formats_needed
from passes import HERE, PassFailed, run_pass
from peers_env import PEERS, install_peers
from summary import machine, report, summarise

Results = dict[str, dict[str, Any]]
PLAN_SCALE = "1000000000x1000000"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench-ingest", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=3, help="1: a quick look, at the inspection's own figures")
    parser.add_argument(
        "--epochs", type=int, default=3, help="times that one pass goes through the clips; the first is not steady"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", default="1,2,3", help="numbers of DataLoader workers to try")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="loaders, with commas between them")
    parser.add_argument("--work", type=Path, default=Path("build/bench-ingest"), help="where clips and logs go")
    parser.add_argument("--peers", type=Path, default=Path("build/bench-peers"), help="the peers' environment")
    parser.add_argument("--json", type=Path, help="also write the line of JSON to this file")
    parser.add_argument(
        "--plan-scale", nargs="?", const=PLAN_SCALE, metavar="CLIPSxSHARDS",
        help="measure the plan at this scale and nothing else",
    )  # fmt: skip
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(CONTENDERS):
        parser.error(f"--only: no loader {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    if args.clips < 2 * args.batch:
        parser.error(f"--clips {args.clips} is less than two batches of {args.batch}")
    return args


class Bench:
    """One run of the benchmark: its arguments, where things are, and who dropped out, with the reason."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder = (args.work / f"clips-{args.clips}").resolve()
        self.failed: dict[str, str] = {}

    def prepare(self) -> None:
        """The peers' environment, the clips, and the clips in every format that takes part."""
        from clips import make_clips

        peers = [name for name in self.args.only if name in PEERS]
        if peers:
            self.failed |= install_peers(self.args.peers.resolve(), peers)
        note(f"{self.args.clips} clips in {self.folder}")
        make_clips(self.folder, self.args.clips)
        for loader, name in formats_needed(self.args.only).items():
            if loader in self.failed or (self.folder / name).exists():
                continue
            note(f"writing {name}")
            command = [str(self.python(loader)), str(HERE / "formats.py"), name, str(self.folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                self.failed[loader] = f"not written: {done.stderr.strip().splitlines()[-1]}"

    def python(self, loader: str) -> Path:
        return (self.args.peers / "bin" / "python").absolute() if loader in PEERS else Path(sys.executable)

    def attempt(self, loader: str, variant: Any, what: str, **options: Any) -> dict[str, Any] | None:
        """One pass, or None when it failed; the reason is kept for the report."""
        watch = options.pop("watch_memory", False)
        task = {
            "loader": loader,
            "format": CONTENDERS[loader].format,
            "folder": str(self.folder),
            "clips": CONTENDERS[loader].clips(self.args.clips),
            "batch": self.args.batch,
            "epochs": self.args.epochs,
            "variant": variant,
            "from_middle": False,
        } | options
        log = self.args.work / "logs" / f"{loader}.log"
        try:
            result = run_pass(self.python(loader), task, log, watch)
        except PassFailed as error:
            self.failed[loader] = f"{what}: {error}"
            note(f"{loader}: {what} failed: {error} ({log})")
            return None
        speed = result["steady"] or result["epoch"]
        note(f"{loader}, {what}: {speed:.0f} clips/s")
        return result | {"variant": variant, "clips": task["clips"]}

    def inspect(self, loader: str) -> list[dict[str, Any]]:
        """A watched pass for each variant."""
        if loader in self.failed:
            return []
        contender = CONTENDERS[loader]
        variants = contender.variants([int(number) for number in self.args.workers.split(",")])
        passes = [
            self.attempt(loader, variant, f"inspection with {variant}", watch_memory=True) for variant in variants
        ]
        return [result for result in passes if result]


def best_variant(contender: Contender, inspected: list[dict[str, Any]]) -> Any:
    """As configured where a loader has a default of its own, else the fastest."""
    if contender.fixed:
        return inspected[0]["variant"]
    return max(inspected, key=lambda result: result["steady"] or result["epoch"])["variant"]


def side_by_side(bench: Bench) -> Results:
    """Inspect everyone, then time everyone at their best."""
    names = bench.args.only
    inspected = {name: bench.inspect(name) for name in names}
    best = {name: best_variant(CONTENDERS[name], passes) for name, passes in inspected.items() if passes}
    if bench.args.rounds == 1:
        rounds = {name: [p for p in inspected[name] if p["variant"] == best[name]] for name in best}
    else:
        rounds = go_round(bench, best)
    touched = json.loads((bench.folder / "touch.json").read_text())
    results = {
        name: summarise(name, inspected[name], rounds[name], touched, bench.args) for name in names if rounds.get(name)
    }
    if "ours" in results and bench.args.rounds > 1:
        results["ours"] |= from_middle(bench, best["ours"], rounds["ours"][0]["ids"])
    return results


def go_round(bench: Bench, best: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Loader after loader, each round beginning with another one. Nobody watches."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in best}
    names = list(best)
    for number in range(bench.args.rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            if result := bench.attempt(name, best[name], f"round {number + 1}"):
                rounds[name].append(result)
    return rounds


def from_middle(bench: Bench, variant: Any, ids: list[str]) -> dict[str, Any]:
    """A start in the middle of the epoch: as quick as one at the beginning, and with the same order from there on?"""
    result = bench.attempt("ours", variant, "from the middle", from_middle=True)
    if result is None:
        return {}
    same = result["ids"] == ids[-len(result["ids"]) :]
    return {"from_middle_first_s": result["first_s"], "from_middle_same_order": same}


def plan_scale(size: str) -> dict[str, Any]:
    """In a fresh process, whose memory is the plan's alone."""
    command = [sys.executable, str(HERE / "plan_scale.py"), *size.split("x")]
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for key, value in figures.items():
        print(f"{key:>20}  {value:,.3f}" if isinstance(value, float) else f"{key:>20}  {value:,}")
    return figures


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    args = parse()
    if args.plan_scale:
        figures: dict[str, Any] = {"plan_scale": plan_scale(args.plan_scale)}
    else:
        bench = Bench(args)
        bench.prepare()
        figures = {"machine": machine(), "clips": args.clips, "rounds": args.rounds, "epochs": args.epochs}
        figures |= {"batch": args.batch, "loaders": side_by_side(bench), "failed": bench.failed}
        print(report(figures))
        print(f"\nThe plan over {' clips in '.join(PLAN_SCALE.split('x'))} shards")
        figures["plan_scale"] = plan_scale(PLAN_SCALE)
    line = json.dumps(figures)
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)  # clusters of our own, however the shell is set up
    main()
