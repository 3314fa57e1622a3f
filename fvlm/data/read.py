"""Reading and decoding what the plan asks for. Runs in the ingest's processes, never in the training process.

No torch here: an ingest process starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fvlm.config import Config
from fvlm.data.cache import RowGroupCache
from fvlm.data.corrupt import CorruptClip, Place, known_corrupt, neighbours
from fvlm.data.counts import counted
from fvlm.data.decode import decode_frame, even_steps
from fvlm.data.plan import Plan
from fvlm.data.retries import Patience
from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import DatasetSpec, Manifest, frame_column, latent_column
from fvlm.errors import Damaged, StoreUnavailable, UserError

RawBatch = dict[str, Any]
"""Clips of one rank, those of one or more steps one after another, N of them:
frames   [N, T, H, W, 3] uint8     latents [N, T, C, h, w] int16, the bits of the stored half-precision type
caption  [N] strings               clip_id [N] strings
decode_s [N] float32, CPU seconds  read_s  [N] float32, seconds that its row group took to be read, shared by its rows
replaced [N] strings: "", or the damaged clip that this one stands in for (`CorruptClip` as JSON)
events   [N] strings: "" but for a block's first row, which may say what was counted since the last block (JSON object:
         `fvlm.data.counts.Event` -> times); the process that reads is not the one that reports
"""

RING = 2
"""Blocks of memory that a BlockReader goes round: one is decoded into, one is handed out."""
REMOTE_READS = 4
"""Row groups of a remote store that are fetched at a time."""

MOST_NEIGHBOURS = 300
"""Clips tried as a stand-in for one. A dataset where so many in a row are damaged is lost."""
AWAY = "away"
"""Instead of a replaced clip, in the row that carries an error: it is StoreUnavailable, and no UserError."""
WHOLE_SHARD = ("missing", "footer")
"""Reasons for which nothing of a shard can be read."""

Window = tuple[int, int]
"""[lo, hi): steps that lie inside one window of the plan."""


@dataclass(frozen=True)
class ClipReader:
    """What to read: T of the stored frames of a dataset's clips, their latents, captions and ids, in a plan's order.

    cache:     where row groups are kept once read; None: nowhere
    replace:   a damaged clip's place is taken by a neighbour (`fvlm.data.corrupt`); False: it is an error
    known_bad: clips that were damaged once; their stand-ins are read in their place, and they are not tried again

    A value that travels to the ingest's processes; there a BlockReader does the work.
    """

    manifest: Manifest
    plan: Plan
    num_frames: int
    cache: RowGroupCache | None = None
    replace: bool = False
    known_bad: dict[Place, CorruptClip] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def of_config(cls, manifest: Manifest, plan: Plan, config: Config) -> ClipReader:
        """What the run of `config` reads; what its folder lists as damaged is known. Raises UserError."""
        data = config.data
        return cls(
            manifest,
            plan,
            data.num_frames,
            RowGroupCache(data.cache_dir, int(data.cache_gb * 1e9)) if data.cache_dir else None,
            data.on_corrupt == "replace",
            known_corrupt(config.run_dir),
            Patience().within(config.scale.hang_s / 2 or math.inf),  # what is away is known before it looks like a hang
        )

    @property
    def frame_indices(self) -> np.ndarray:
        """[T]: which of the stored frames are used; the same for every clip."""
        return even_steps(self.manifest.spec.num_frames, self.num_frames)

    @property
    def columns(self) -> list[str]:
        used = self.frame_indices.tolist()
        return ["clip_id", "caption", *map(frame_column, used), *map(latent_column, used)]

    @property
    def clip_bytes(self) -> int:
        """Bytes of one decoded clip."""
        spec = self.manifest.spec
        return self.num_frames * (3 * spec.frame_size**2 + spec.latent_bytes)

    @property
    def stored_bytes(self) -> float:
        """Bytes of one clip's used columns as they are stored, on the mean."""
        whole = float(np.sum(self.manifest.files["bytes"].to_numpy())) / self.manifest.num_clips
        return whole * self.num_frames / self.manifest.spec.num_frames


class BlockReader:
    """Decodes windows of the plan into memory that it uses again: fresh memory costs as much as decoding.

    threads:     that decode (libjpeg-turbo works without the interpreter's lock)
    block_steps: steps in one block
    pad:         a window's last block is as long as the others: at its end are clips without an id, undefined pixels;
                 the caption of the first of them, if it has one, is the error that came where its clip should be

    Each row group is read once while windows follow each other, and held compressed until no window needs it. Decoding
    runs one block ahead, reading one window. Not for use by several threads.
    """

    def __init__(self, clips: ClipReader, threads: int = 1, block_steps: int = 1, pad: bool = False):
        self.clips, self.block_steps, self._pad = clips, block_steps, pad
        self._shards, self._shard_rows = clips.manifest.files["name"], clips.manifest.shard_rows
        self._row_groups = RowGroups.of(clips.manifest, clips.cache, clips.patience)
        self._decoding = ThreadPoolExecutor(threads, "decode")
        self._reading = ThreadPoolExecutor(1 if self._row_groups.storage.is_local else REMOTE_READS, "read")
        self._held: dict[tuple[int, int], Future[_RowGroup]] = {}
        self._lock = threading.Lock()  # of _held, where decoding threads look for neighbours
        self._ring: list[tuple[np.ndarray, np.ndarray]] = []
        self._blocks = itertools.count()
        self._counted = counted()

    def read(
        self, windows: Sequence[Window], rank: int = 0, world: int = 1, then: Window | None = None
    ) -> Iterator[RawBatch]:
        """Blocks of `block_steps` steps, the last of each window perhaps shorter. `then`: the window after these.

        A block is good only until the next one is asked for: then its memory is decoded into again.

        After the last step before it, raises Damaged naming shard, row group, row and clip when something is damaged
        and `replace` is False; StoreUnavailable when the store is away. Padded blocks carry it instead.
        """
        at_work: tuple[int, list[Future[_Decoded]]] | None = None
        block = np.empty((0, 0, 3), np.int64)
        following = self._places(windows[0], rank, world) if windows else block
        for after in (*windows[1:], then):
            places = following
            following = self._places(after, rank, world) if after else block[:0]
            self._hold([block, places, following])  # the last window's last block is still at work
            for first in range(0, len(places), self.block_steps):
                block = places[first : first + self.block_steps]
                slot = next(self._blocks) % RING
                frames, latents = self._memory(slot, self.block_steps * places.shape[1])
                clips = [Place(*place) for place in block.reshape(-1, 3).tolist()]
                decoding = [
                    self._decoding.submit(self._clip, place, frames[i], latents[i]) for i, place in enumerate(clips)
                ]
                if at_work:
                    yield from self._finished(*at_work, places.shape[1])
                at_work = slot, decoding
        if at_work:
            yield from self._finished(*at_work, places.shape[1])

    def steps(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[RawBatch]:
        """Blocks of the steps [start, stop), as `read` gives them."""
        return self.read(list(self.clips.plan.windows(start, stop)), rank, world)

    def close(self) -> None:
        for pool in (self._decoding, self._reading):
            pool.shutdown(cancel_futures=True)

    def _places(self, window: Window, rank: int, world: int) -> np.ndarray:
        """[steps, B, 3] int64: shard, row group, row."""
        return np.stack(self.clips.plan.rows(*window, rank, world), axis=-1)

    def _hold(self, windows: Sequence[np.ndarray]) -> None:
        """Start to read what `windows` need and is not there, in the order of its first use; let go of all else."""
        with self._lock:
            wanted = dict.fromkeys(
                self._stand_in(Place(*place))[:2] for places in windows for place in places.reshape(-1, 3).tolist()
            )
            for key in self._held.keys() - wanted.keys():
                del self._held[key]  # never cancelled: a decoding thread may be waiting for it, as for a neighbour
            for key in wanted:
                if key not in self._held:
                    self._held[key] = self._reading.submit(self._read_row_group, *key)

    def _stand_in(self, place: Place) -> Place:
        """Where to read for the clip at `place`, as far as is known without reading."""
        known = self.clips.known_bad.get(place)
        return known.stand_in if known else place

    def _row_group(self, shard: int, group: int) -> _RowGroup:
        """One that is held, or is held from now on until the next window.

        Raises Damaged for what another clip may stand in for. A shard of another dataset is not that: UserError.
        """
        with self._lock:
            if (shard, group) not in self._held:
                self._held[shard, group] = self._reading.submit(self._read_row_group, shard, group)
            future = self._held[shard, group]
        return future.result()

    def _read_row_group(self, shard: int, group: int) -> _RowGroup:
        begin = time.perf_counter()
        table = self._table(shard, group, self.clips.columns)
        return _RowGroup.of(table, self.clips, time.perf_counter() - begin)

    def _table(self, shard: int, group: int, columns: list[str]) -> pa.Table:
        try:
            return self._row_groups.read(self._shards[shard].as_py(), group, columns, int(self._shard_rows[shard]))
        except Damaged as error:
            if error.reason == "foreign":
                raise UserError(str(error)) from error
            raise

    def _memory(self, slot: int, clips: int) -> tuple[np.ndarray, np.ndarray]:
        """Frames and latents of the `slot`th block."""
        if not self._ring or len(self._ring[0][0]) != clips:
            spec, t = self.clips.manifest.spec, self.clips.num_frames
            self._ring = [
                (
                    np.empty((clips, t, spec.frame_size, spec.frame_size, 3), np.uint8),
                    np.empty((clips, t, *spec.latent_shape), np.int16),
                )
                for _ in range(RING)
            ]
        return self._ring[slot]

    def _finished(self, slot: int, decoding: list[Future[_Decoded]], step: int) -> Iterator[RawBatch]:
        """The block, once its clips are there. When one cannot be had: the steps of `step` clips before it, the error.

        Padded blocks carry the error: raised here, it would overtake the blocks that wait for the consumer.
        """
        done: list[_Decoded] = []
        try:
            for future in decoding:
                done.append(future.result())
        except (UserError, StoreUnavailable) as error:
            del done[len(done) // step * step :]
            if self._pad:
                for_s, kind = (error.for_s, AWAY) if isinstance(error, StoreUnavailable) else (0.0, "")
                done.append(_Decoded(str(error), "", 0.0, for_s, kind))
            if done:
                yield self._block(slot, done)
            if not self._pad:
                raise
        else:
            yield self._block(slot, done)

    def _block(self, slot: int, done: list[_Decoded]) -> RawBatch:
        frames, latents = self._ring[slot]
        if self._pad:
            done += [_PADDING] * (len(frames) - len(done))
        return {
            "frames": frames[: len(done)],
            "latents": latents[: len(done)],
            "caption": [clip.caption for clip in done],
            "clip_id": [clip.clip_id for clip in done],
            "decode_s": np.array([clip.decode_s for clip in done], np.float32),
            "read_s": np.array([clip.read_s for clip in done], np.float32),
            "replaced": [clip.replaced for clip in done],
            "events": [self._events()] + [""] * (len(done) - 1),
        }

    def _events(self) -> str:
        """What this process has counted since the last call, as JSON; "" for nothing."""
        before, self._counted = self._counted, counted()
        return json.dumps(new) if (new := self._counted - before) else ""

    def _clip(self, place: Place, frames: np.ndarray, latents: np.ndarray) -> _Decoded:
        """The clip at `place`, or the one that stands in for it, into `frames` [T, H, W, 3] and `latents`."""
        wanted = self._stand_in(place)
        try:
            decoded = self._decode(wanted, frames, latents)
        except Damaged as error:
            named = self._named(wanted, error)
            if not self.clips.replace:
                raise named from error
            return self._neighbour(place, named, frames, latents)
        return decoded if wanted == place else decoded.instead_of(self.clips.known_bad[place])

    def _decode(self, place: Place, frames: np.ndarray, latents: np.ndarray) -> _Decoded:
        """Raises Damaged."""
        group = self._row_group(place.shard, place.group)
        begin = time.thread_time()
        for t, (offsets, images) in enumerate(group.frames):
            try:
                decode_frame(images[offsets[place.row] : offsets[place.row + 1]], frames[t], self.clips.manifest.spec)
            except (ValueError, OSError) as error:
                raise Damaged(
                    f"{self._row_groups.storage.locate(self._shards[place.shard].as_py())}: row group {place.group}, "
                    f"row {place.row}, clip {group.clip_id[place.row]!r}, frame {self.clips.frame_indices[t]}: "
                    f"cannot be decoded ({error}). Restore the shard from a copy.",
                    "image",
                ) from error
            latents[t] = group.latents[t][place.row]
        return _Decoded(
            group.caption[place.row], group.clip_id[place.row], time.thread_time() - begin, group.read_s / len(group)
        )

    def _neighbour(self, bad: Place, why: Damaged, frames: np.ndarray, latents: np.ndarray) -> _Decoded:
        """The first whole clip among the neighbours of `bad`: a pure function of what lies on the disk."""
        lost = {bad.shard} if why.reason in WHOLE_SHARD else set()
        around = neighbours(bad, self._shard_rows, self.clips.plan.rows_per_row_group)
        may_do = (place for place in around if place.shard not in lost and place not in self.clips.known_bad)
        for place in itertools.islice(may_do, MOST_NEIGHBOURS):
            try:
                decoded = self._decode(place, frames, latents)
            except Damaged as error:  # listed when its own turn comes
                if error.reason in WHOLE_SHARD:
                    lost.add(place.shard)
                continue
            name = self._shards[bad.shard].as_py()
            return decoded.instead_of(CorruptClip(*bad, name, self._clip_id(bad), str(why), decoded.clip_id, place))
        raise why

    def _named(self, place: Place, error: Damaged) -> Damaged:
        """`error`, met at `place`, with the row and the clip's id."""
        if error.reason == "image":
            return error
        clip_id = self._clip_id(place)
        clip = "a clip whose id cannot be read" if clip_id is None else f"clip {clip_id!r}"
        return Damaged(f"{error} Lost with it: row group {place.group}, row {place.row}, {clip}.", error.reason)

    def _clip_id(self, place: Place) -> str | None:
        """From its column alone, which may be whole where others are not. None where it cannot be read."""
        try:
            return str(self._table(place.shard, place.group, ["clip_id"])["clip_id"][place.row])
        except Damaged:
            return None


@dataclass(frozen=True)
class _Decoded:
    """All of a clip but its pixels and latents."""

    caption: str
    clip_id: str
    decode_s: float
    read_s: float
    replaced: str = ""

    def instead_of(self, bad: CorruptClip) -> _Decoded:
        return dataclasses.replace(self, replaced=bad.to_json())


_PADDING = _Decoded("", "", 0.0, 0.0)


@dataclass(frozen=True)
class _RowGroup:
    """The used columns of one row group, ready for access row by row: Arrow scalars cost more than small images do.

    frames:  T of (offsets [R+1], bytes): image r lies at [offsets[r], offsets[r+1])
    latents: T of [R, C, h, w] int16
    """

    caption: list[str]
    clip_id: list[str]
    frames: list[tuple[list[int], memoryview]]
    latents: list[np.ndarray]
    read_s: float

    def __len__(self) -> int:
        return len(self.clip_id)

    @classmethod
    def of(cls, table: pa.Table, clips: ClipReader, read_s: float) -> _RowGroup:
        used = clips.frame_indices.tolist()
        return cls(
            table["caption"].to_pylist(),
            table["clip_id"].to_pylist(),
            [_images(table[frame_column(index)]) for index in used],
            [_latents(table[latent_column(index)], clips.manifest.spec) for index in used],
            read_s,
        )


def _images(column: pa.ChunkedArray) -> tuple[list[int], memoryview]:
    array = column.combine_chunks()  # one chunk already: no copy
    _, offsets, data = array.buffers()
    numbers = np.frombuffer(offsets, np.int32, len(array) + 1, array.offset * 4)
    return numbers.tolist(), memoryview(data).cast("B")  # Arrow's bytes are signed


def _latents(column: pa.ChunkedArray, spec: DatasetSpec) -> np.ndarray:
    array = column.combine_chunks()
    numbers = np.frombuffer(
        array.buffers()[1], np.int16, len(array) * spec.latent_bytes // 2, array.offset * spec.latent_bytes
    )
    return numbers.reshape(len(array), *spec.latent_shape)
