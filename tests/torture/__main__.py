"""`make torture`, or `python tests/torture --help`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # Python put this folder there, and the package lies in that one

from torture.command import main  # noqa: E402

main()
