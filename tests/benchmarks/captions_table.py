"""Memory and time of a captions table with many rows: `python tests/benchmarks/captions_table.py --rows 1000000`.

Writes the table as CSV and as Parquet (with a column of 1 kB a row that nobody wants) into a temporary folder, and
reads each in a process of its own: opening (with the search for duplicates), then all rows, a portion at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

PORTION = 65536


@dataclass(frozen=True)
class Bench:
    rows: int = 1_000_000
    read: Path | None = None
    """Read this table, and print the figures as JSON."""


def measure(path: Path) -> None:
    from fvlm.data.captions import Captions

    before, started = peak_mb(), time.monotonic()
    captions = Captions(path)
    opened, opened_mb = time.monotonic() - started, peak_mb()
    for first in range(0, len(captions), PORTION):
        captions.rows(first, first + PORTION)
    seconds = {"opened": round(opened, 1), "all rows": round(time.monotonic() - started - opened, 1)}
    print(json.dumps({"seconds": seconds, "peak MB": {"imports": before, "opened": opened_mb, "all rows": peak_mb()}}))


def peak_mb() -> int:
    """The process's largest RSS so far. (getrusage's would begin with that of the process that started this one.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return round(int(line.split()[1]) / 1024)


def write_tables(folder: Path, rows: int) -> list[Path]:
    csv_path, parquet_path = folder / "t.csv", folder / "t.parquet"
    writer = None
    with csv_path.open("w") as file:
        file.write("video,caption\n")
        for first in range(0, rows, PORTION):
            numbers = range(first, min(first + PORTION, rows))
            videos = [f"{number // 1000:06d}/{number:09d}.mp4" for number in numbers]
            texts = [f"clip {number}, of a person who walks along the beach at sunset" for number in numbers]
            file.writelines(f'{video},"{text}"\n' for video, text in zip(videos, texts, strict=True))
            unwanted = [f"{number:01000d}" for number in numbers]
            table = pa.table({"video": videos, "caption": texts, "unwanted": unwanted})
            writer = writer or pq.ParquetWriter(parquet_path, table.schema)
            writer.write_table(table)
    if writer:
        writer.close()
    return [csv_path, parquet_path]


def main() -> None:
    bench = tyro.cli(Bench)
    if bench.read:
        measure(bench.read)
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in write_tables(Path(folder), bench.rows):
            done = subprocess.run(
                [sys.executable, __file__, "--read", str(path)], capture_output=True, text=True, check=True
            )
            print(f"{path.suffix} {path.stat().st_size / 1e6:.0f} MB: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
