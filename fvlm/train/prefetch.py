"""The next item, made in a thread while this one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")
JOIN_S = 5.0
"""How long `close` waits for the thread: it may be waiting for data that never come."""


class Prefetch(Iterator[T], Generic[T]):
    """`items`, in their order; while the consumer has one, a thread makes the next, and never more than that one.

    What `items` raises is raised where its item would have come. Use it in a `with` block; leaving that ends the
    thread.
    """

    def __init__(self, items: Iterator[T], name: str = "prefetch"):
        self._items = items
        self._made: queue.SimpleQueue[tuple[T] | BaseException] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(1)  # the first
        self._closed = False
        self._ended: BaseException | None = None
        # A daemon: one that waits for data must not keep the process from ending.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._ended or self._closed:
            raise StopIteration
        made = self._made.get()
        if isinstance(made, BaseException):
            self._ended = made
            raise made
        self._wanted.release()
        (item,) = made
        return item

    def close(self) -> None:
        """End the thread, if it does not wait for data, and drop what it has made."""
        self._closed = True
        self._wanted.release()
        self._thread.join(JOIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed:
                return
            try:
                self._made.put((next(self._items),))
            except BaseException as error:  # noqa: BLE001  StopIteration, too: raised where the item is asked for
                self._made.put(error)
                return
