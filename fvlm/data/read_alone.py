"""Reading one video in a process of its own, for those that end the process that reads them.

`python -m fvlm.data.read_alone PATH NUM_FRAMES FRAME_SIZE RESIZE` writes a line of JSON to stdout, then the frames.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fvlm.data.schema import ResizePolicy
from fvlm.data.video import RejectedVideo, read_clip
from fvlm.errors import StoreUnavailable

MEMORY_BYTES = 2 << 30
"""What such a process may take: 17 pictures of 8K in 10 bits fit, and it ends before the machine runs out."""


def read_clip_alone(
    path: Path, num_frames: int, frame_size: int, resize: ResizePolicy
) -> tuple[np.ndarray, dict[str, Any]]:
    """As `read_clip`, but what would end this process ends another. Raises RejectedVideo, then with "crashed"."""
    command = [sys.executable, "-m", __name__, str(path), str(num_frames), str(frame_size), resize]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise RejectedVideo("crashed", f"reading it ends the process ({_end_of(done)})")
    header, _, pixels = done.stdout.partition(b"\n")
    answer = json.loads(header)
    if "away" in answer:
        raise StoreUnavailable(answer["away"])
    if "reason" in answer:
        raise RejectedVideo(answer["reason"], answer["detail"])
    frames = np.frombuffer(pixels, np.uint8).reshape(num_frames, frame_size, frame_size, 3)
    return frames, answer["source"]


def _end_of(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    return (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def main() -> None:
    path, num_frames, frame_size, resize = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        frames, source = read_clip(Path(path), int(num_frames), int(frame_size), resize)  # type: ignore[arg-type]
    except RejectedVideo as error:
        print(json.dumps({"reason": error.reason, "detail": error.detail}))
        return
    except StoreUnavailable as error:
        print(json.dumps({"away": str(error)}))
        return
    sys.stdout.write(json.dumps({"source": source}) + "\n")
    sys.stdout.flush()
    sys.stdout.buffer.write(frames.tobytes())


if __name__ == "__main__":
    main()
