"""The process beside a rank that ends it when it hangs: `python hang_watcher.py PID TICK_S LINGER_S SIGNAL`.

Standard input tells how many seconds are left from now on, RECORD_BYTES of text each time; its end is the rank's.
A process of its own needs nothing of the rank's interpreter, whose lock other code may hold for ever. It counts its own
waits and reads no clock: while the machine sleeps, or all processes are stopped, nothing is counted.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys

RECORD_BYTES = 16


def main() -> None:
    pid, tick_s, linger_s, dump_signal = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    left_s, dumped = math.inf, False
    while os.getppid() == pid:
        if select.select([0], [], [], tick_s)[0]:
            records = os.read(0, 256 * RECORD_BYTES)
            if not records:
                return
            left_s, dumped = float(records[-RECORD_BYTES:]), False
            continue
        left_s -= tick_s
        if left_s <= 0 and not dumped:
            os.kill(pid, dump_signal)  # faulthandler writes the stacks
            dumped = True
        if left_s <= -linger_s:
            os.kill(pid, signal.SIGKILL)
            return


if __name__ == "__main__":
    main()
