"""Reading W&B's offline files: a LevelDB log (blocks of 32 KiB) of protobuf records, behind a header of 7 bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32 << 10, 7
FULL, LAST = 1, 4


def records(folder: Path) -> Iterator[Record]:
    """Of one start: `folder` is its offline-run-...; up to where it was cut, if it was."""
    (path,) = folder.glob("run-*.wandb")
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER < len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that were logged, each with W&B's own step as `_step`."""
    rows = []
    for record in records(folder):
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append(row | {"_step": record.history.step.num})
    return rows


def starts(run_dir: Path) -> list[Path]:
    """The offline folders of a run, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))
