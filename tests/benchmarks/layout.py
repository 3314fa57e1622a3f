"""How a shard should lie on disk: python tests/benchmarks/layout.py VIDEOS_FOLDER

Shards of CLIPS clips of 24 frames, made by repeating the real videos. Three tables: a column a frame against one list
column (bytes and time to read 8 of the 24 frames), rows of a row group, and compression of the columns. Times are CPU
seconds of one core, the files in the page cache; bytes are counted as they pass through the file object.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.decode import encode_frame
from fvlm.data.latents import BlockTransform
from fvlm.data.schema import DatasetSpec, arrow_schema, frame_column, latent_column
from fvlm.data.video import RejectedVideo, read_clip

CLIPS = 128
SPEC = DatasetSpec(24, 256, "jpeg", "short-side", "block-transform", "float16", (4, 32, 32))
WANTED = np.linspace(0, 23, 8, dtype=int).tolist()
ROUNDS = 5


class CountingFile(io.FileIO):
    counted = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.counted += len(data)
        return data


def clips_of(folder: Path) -> list[tuple[list[bytes], list[bytes]]]:
    """CLIPS times (24 JPEG files, 24 latents), each a little different: nothing compresses by mere repetition."""
    codec, originals = BlockTransform(), []
    for path in sorted(folder.iterdir()):
        try:
            originals.append(read_clip(path, SPEC.num_frames, SPEC.frame_size, "short-side")[0])
        except RejectedVideo:
            continue
    clips = []
    for number in range(CLIPS):
        frames = np.roll(originals[number % len(originals)], 5 * (number // len(originals)), axis=(1, 2))
        latents = [row.tobytes() for row in codec.encode(frames, "")]
        clips.append(([encode_frame(frame, SPEC) for frame in frames], latents))
    return clips


def by_column(clips: list[tuple[list[bytes], list[bytes]]]) -> pa.Table:
    schema = pa.schema([f for f in arrow_schema(SPEC) if f.name.startswith(("frame_", "latent_"))])
    columns = [[clip[kind][t] for clip in clips] for kind in (0, 1) for t in range(SPEC.num_frames)]
    return pa.table(columns, schema=schema)


def by_list(clips: list[tuple[list[bytes], list[bytes]]]) -> pa.Table:
    schema = pa.schema([("frames", pa.list_(pa.binary())), ("latents", pa.list_(pa.binary(SPEC.latent_bytes)))])
    return pa.table([[clip[0] for clip in clips], [clip[1] for clip in clips]], schema=schema)


def write(table: pa.Table, path: Path, rows: int = 16, compression: str = "none") -> None:
    pq.write_table(
        table, path, row_group_size=rows, compression=compression, use_dictionary=False, write_statistics=False,
        write_page_checksum=True,
    )  # fmt: skip


def read(path: Path, columns: list[str]) -> tuple[float, float]:
    """-> megabytes read, CPU milliseconds; the best of ROUNDS."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        with CountingFile(str(path)) as file:
            shard = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
            for group in range(shard.num_row_groups):
                shard.read_row_group(group, columns=columns, use_threads=False)
            counted = file.counted
        seconds.append(time.process_time() - started)
    return counted / 1e6, min(seconds) * 1e3


def one_group(path: Path, columns: list[str]) -> float:
    """Megabytes read, and held, for one row group: the unit in which a shuffled order asks for clips."""
    with CountingFile(str(path)) as file:
        pq.ParquetFile(file, pre_buffer=False).read_row_group(0, columns=columns, use_threads=False)
        return file.counted / 1e6


def table(title: str, header: str, rows: list[str]) -> None:
    print(f"\n{title}\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    print("\n".join(f"| {row} |" for row in rows), flush=True)


def main() -> None:
    clips = clips_of(Path(sys.argv[1]))
    wanted = [name(t) for name in (frame_column, latent_column) for t in WANTED]
    columns, lists = by_column(clips), by_list(clips)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"

        def line(name: str, names: list[str], data: pa.Table, rows: int = 16, compression: str = "none") -> str:
            write(data, path, rows, compression)
            megabytes, ms = read(path, names)
            size, group = path.stat().st_size / 1e6, one_group(path, names)
            return f"{name} | {size:.1f} | {megabytes:.1f} | {ms:.0f} | {group:.2f}"

        head = "file MB | MB read for 8 of 24 frames | CPU ms | MB for one row group"
        layouts = [
            line("a column a frame", wanted, columns),
            line("one list column", ["frames", "latents"], lists),
        ]
        table("Columns", f"layout | {head}", layouts)
        rows = [line(str(rows), wanted, columns, rows) for rows in (8, 16, 32, 64)]
        table("Rows of a row group", f"rows | {head}", rows)
        codecs = [
            line(f"{kind}, {codec}", [name(t) for t in WANTED], columns.select(map(name, range(24))), 16, codec)
            for kind, name in (("JPEG", frame_column), ("latents", latent_column))
            for codec in ("none", "zstd", "lz4")
        ]
        table("Compression", f"codec | {head}", codecs)


if __name__ == "__main__":
    main()
