"""Who takes part, with what: names of the table, formats, and what is varied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from formats import LEGACY_CLIPS

Variants = Callable[[list[int]], list[Any]]


@dataclass(frozen=True)
class Contender:
    """
    title:     its line of the table
    format:    the folder that it reads
    variants:  from the numbers of workers to try, what to try: numbers of workers, or kinds
    fixed:     the first variant is the loader's own default and is timed; others only compare orders
    at_most:   clips that it gets
    exact:     whether its frames must equal those of the shards byte by byte
    """

    title: str
    format: str = "parquet"
    variants: Variants = list
    fixed: bool = False
    at_most: int | None = None
    exact: bool = True

    def clips(self, clips: int) -> int:
        return clips if self.at_most is None else min(clips, self.at_most)


CONTENDERS = {
    # 0: as many decoding threads as training would have
    "ours": Contender("ours", variants=lambda _: [0, 1], fixed=True),
    "ours_roomy": Contender("ours, --ingest-memory 1.5GB", variants=lambda _: [0], fixed=True),
    "mds": Contender("MosaicML Streaming (MDS)", "mds"),
    "litdata": Contender("LitData", "litdata"),
    "webdataset": Contender("WebDataset", "webdataset"),
    "parquet": Contender("Parquet + DataLoader"),
    "legacy": Contender(
        "earlier trainer's loader",
        "legacy",
        lambda n: [w for w in n if w <= 2] or n[:1],
        at_most=LEGACY_CLIPS,
        exact=False,
    ),
    # 0: no limit on concurrency, as documented
    "raydata": Contender("Ray Data as documented", variants=lambda _: [0, 1], fixed=True),
    "limit": Contender("limit: decode alone", variants=lambda _: ["threads", "processes"]),
}


def formats_needed(names: list[str]) -> dict[str, str]:
    """loader -> the format that has to be written for it"""
    return {name: CONTENDERS[name].format for name in names if CONTENDERS[name].format != "parquet"}
