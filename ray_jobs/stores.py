"""The stores of a run while it is kept going: one that is away is waited for, and no failure of the training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from fvlm.config import Config
from fvlm.data.outage import FIRST_WAIT_S, LONGEST_WAIT_S, Outage, sleep, wait_out
from fvlm.data.schema import MANIFEST
from fvlm.data.shards import read_manifest
from fvlm.data.storage import Storage
from fvlm.errors import StoreUnavailable
from fvlm.train.store import checkpoint_store, newest_step, require_known

T = TypeVar("T")


class Stores:
    """Where data and checkpoints are, and for how long they have been away.

    note: takes the lines; is_stopped: whether nothing is to be waited for any more
    """

    def __init__(self, config: Config, note: Callable[[str], object], is_stopped: Callable[[], object]):
        self._config, self._is_stopped = config, is_stopped
        self._checkpoints = checkpoint_store(config)
        self._outage = Outage(note, config.scale.store_wait_s)
        self._in_a_row = 0
        """Starts that a store ended, without a new checkpoint between them."""
        self._stuck_since = 0.0

    def finished_steps(self, before: int) -> int:
        """From the newest checkpoint; `before` where nobody waits for the answer any more. Raises StoreUnavailable when
        the store is away for too long."""
        try:
            return wait_out(self._newest, "the run waits", self._outage, self._is_stopped)
        except StoreUnavailable:
            if self._is_stopped():
                return before
            raise

    def _newest(self) -> int:
        step = newest_step(self._checkpoints)
        if step == 0:
            require_known(self._checkpoints, self._config.run_dir, [])
        return step

    @contextlib.contextmanager
    def there(self, made: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """The context `made()`, entered when its disks are there."""
        with contextlib.ExitStack() as stack:
            yield wait_out(lambda: stack.enter_context(made()), "the run waits", self._outage, self._is_stopped)

    def wait(self, failure: StoreUnavailable, progress: bool) -> None:
        """Return when the data can be read again, or when the run is to stop. Raises StoreUnavailable after too long.

        progress: there was a new checkpoint since the last time
        """
        if progress or not self._in_a_row:
            self._in_a_row, self._stuck_since = 0, time.monotonic()
        self._outage.failed(failure, "then the ranks start again")
        limit_s = self._config.scale.store_wait_s
        if 0 < limit_s < time.monotonic() - self._stuck_since:
            raise failure
        pause = min(FIRST_WAIT_S * 2**self._in_a_row, LONGEST_WAIT_S)
        self._in_a_row += 1
        if not sleep(pause, self._is_stopped):
            return
        try:
            wait_out(self._look_at_data, "the run waits", self._outage, self._is_stopped)
        except StoreUnavailable:
            if not self._is_stopped():
                raise

    def _look_at_data(self) -> None:
        for path in filter(None, (self._config.data.path, self._config.eval.path)):
            place = Storage(path)
            if place.is_local and not (place.folder / MANIFEST).exists():  # it was there when the run was started
                raise StoreUnavailable(f"{place.folder}: the dataset has gone. Check the mount.")
            read_manifest(path)

    def no_progress(self, step: int) -> RuntimeError:
        """What is to be said of ranks that ended without a failure and without a new checkpoint."""
        return RuntimeError(
            f"the ranks ended well, but {self._checkpoints.locate()} has no checkpoint newer than that of step {step}; "
            "is it the same folder on every node?"
        )
