"""One loader, once, in this process: `python one_pass.py TASK`, TASK as JSON. What `passes.py` starts.

Speaks on stdout, a JSON value a line: "idle" once everything is imported and connected, and what was measured at the
end. Between the two it waits for a line on stdin, so that the idle memory can be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import adopt_orphans

Task = dict[str, Any]


@contextlib.contextmanager
def peer_pass(task: Task) -> Iterator[Callable[[], dict[str, Any]]]:
    import loaders
    from consume import consume

    folder, batch, epochs = Path(task["folder"]), task["batch"], task["epochs"]
    make = loaders.LOADERS[task["loader"]]

    loaders.import_package(task["loader"])

    def epochs_of_loader() -> Iterator[Any]:
        loader = make(folder, batch, task["variant"])
        for _ in range(epochs):
            yield loader

    yield lambda: consume(epochs_of_loader(), os.getpid())


@contextlib.contextmanager
def limit_pass(task: Task) -> Iterator[Callable[[], dict[str, Any]]]:
    import limit

    batches = limit.load(Path(task["folder"]), task["batch"])
    yield lambda: limit.measure(batches, task["variant"], task["epochs"])


def prepared(task: Task) -> contextlib.AbstractContextManager[Callable[[], dict[str, Any]]]:
    """Everything up to the loader itself: imports, clusters. Enter it, then call what it gives."""
    if task["loader"] == "limit":
        return limit_pass(task)
    if task["loader"] in ("ours", "ours_roomy", "raydata"):
        import on_ray

        return on_ray.documented(task) if task["loader"] == "raydata" else on_ray.ours(task)
    return peer_pass(task)


def main() -> None:
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no part of the talk
    task, begin = json.loads(sys.argv[1]), time.perf_counter()
    adopt_orphans()
    with prepared(task) as run:
        print(json.dumps("idle"), file=talk, flush=True)
        sys.stdin.readline()
        started = time.perf_counter()
        result = run() | {"start_s": started - begin}
        print(json.dumps(result), file=talk, flush=True)


if __name__ == "__main__":
    main()
