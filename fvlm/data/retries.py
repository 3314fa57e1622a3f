"""Patience with a store on the network: bounded attempts, back-off with jitter, a deadline on each, none unseen."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from fvlm.data.counts import count
from fvlm.errors import StoreUnavailable, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

# pyarrow reports what a store said as OSError with the store's own code in the text, and nothing else to tell by.
MISSING = ("RESOURCE_NOT_FOUND", "NO_SUCH_KEY")
DENIED = (
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID"),  # S3
    *("NO_SUCH_BUCKET", "INVALID_BUCKET_NAME", "EXPIRED_TOKEN", "EXPIREDTOKEN", "ExpiredToken"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED"),  # Google Cloud Storage
)
# Statuses of a wrong address or of a refusal. Not 404, which is no file; nor 408, 409, 412, 425 and 429, which pass.
REFUSED = re.compile(r"HTTP status (30[1278]|40[0-367]|41[01])\b|^Bucket '.*' not found")

_jitter = random.Random()  # not the global generator: whoever seeds that one must not make all processes wait alike


@dataclass(frozen=True)
class Patience:
    """How long to try.

    attempts:        requests made for one thing before giving up. With 30 % of them failing, 10 fail in a row once
                     in 170,000 things; with the waits below they span about half a minute
    first_wait_s:    wait before the second attempt; doubled each time, then scaled by a random 0.5 to 1
    longest_wait_s:  bound of the doubling
    longest_s:       no new attempt is made after so many seconds, and no read lasts longer, with all its attempts
    timeout_s:       silence after which a request is given up
    slowest_bytes_s: a request for n bytes is given up after timeout_s + n / slowest_bytes_s, silent or not, so that a
                     server that sends a byte now and then cannot hold a run
    """

    attempts: int = 10
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0
    longest_s: float = 300.0
    timeout_s: float = 20.0
    slowest_bytes_s: float = 100_000.0

    def wait_s(self, attempt: int) -> float:
        """Seconds between failed attempt number `attempt`, from 1, and the next."""
        return min(self.first_wait_s * 2 ** (attempt - 1), self.longest_wait_s) * _jitter.uniform(0.5, 1.0)

    def deadline_s(self, size: int) -> float:
        """Seconds that one request for `size` bytes may take."""
        return min(self.timeout_s + size / self.slowest_bytes_s, self.longest_s)

    def within(self, seconds: float) -> Patience:
        """The same, but at most `seconds` for one thing that is read, in which there is time for three attempts."""
        limit_s = min(self.longest_s, seconds)
        return replace(self, longest_s=limit_s, timeout_s=min(self.timeout_s, limit_s / 3))


def one_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def persist(action: Callable[[], T], what: str, where: str, patience: Patience, deadline_s: float) -> T:
    """`action()`, made again while the store fails, is silent or too slow; each retry is counted and logged once.

    Only I/O errors (OSError) are retried; a programming error passes at once. `action` runs in a thread of its own
    and may still be running after it was given up: it must not write to anything that others read.

    Raises FileNotFoundError at once when the store says that there is no such thing, UserError at once when it says
    that we may not, and StoreUnavailable with the last reason when every attempt failed.
    """
    attempt, begin = 1, time.monotonic()
    while True:
        left_s = patience.longest_s - (time.monotonic() - begin)
        try:
            return _within(deadline_s if deadline_s > patience.longest_s else min(deadline_s, left_s), action)
        except OSError as error:
            reason = one_line(error)
            if isinstance(error, FileNotFoundError) or any(code in reason for code in MISSING):
                raise FileNotFoundError(f"{where}: {reason}") from error
            if isinstance(error, PermissionError) or REFUSED.search(reason) or any(code in reason for code in DENIED):
                raise UserError(
                    f"{where}: {what} was refused ({reason}). Check the bucket's name, region and endpoint, the "
                    "credentials that this machine and every node uses, and that they may list the bucket and read its "
                    "objects."
                ) from error
            for_s, wait = time.monotonic() - begin, patience.wait_s(attempt)
            if attempt >= patience.attempts or for_s + wait >= patience.longest_s:
                raise StoreUnavailable(
                    f"{where}: could not be reached: {what} failed {attempt} times, at last with: {reason}. "
                    "Check the network, the endpoint and the store itself.",
                    for_s,
                ) from error
        count("retries")
        log.warning(
            "%s: %s: attempt %d of %d failed (%s); next in %.2f s",
            *(where, what, attempt, patience.attempts, reason, wait),
        )
        time.sleep(wait)
        attempt += 1


def _within(seconds: float, action: Callable[[], T]) -> T:
    """`action()`, or TimeoutError after `seconds`: then its thread is left behind, and must not keep us from exiting.

    A daemon thread and not an executor's: those are joined when the interpreter ends, however long they hang.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001  handed to the caller, who raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="storage-request").start()
    try:
        return future.result(seconds)
    except TimeoutError:
        if future.done():  # the action's own
            raise
        raise TimeoutError(f"no whole answer within {seconds:.1f} s") from None
