"""The commands, each `python -m ray_jobs.NAME`, and what they do on Ray."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # A command is being imported, which takes seconds: until `cli.run_command` takes over, Ctrl-C ends it at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # read when Ray Train is imported; we are built on V2
