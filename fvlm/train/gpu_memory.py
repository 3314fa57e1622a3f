"""A GPU's free memory, for a process that does not compute on it."""

from __future__ import annotations

import subprocess
import sys

from fvlm.errors import UserError

# Needs torch alone: the process that asks may have been started where fvlm is on nobody else's path.
_ASK = "import torch; print(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 'none')"


def free_gpu_memory() -> int | None:
    """Return the free bytes of the first GPU, less a CUDA context; None without a GPU. Takes seconds.

    Another process asks: a context would stay in this one, and on the GPU, until its end. Raises UserError.
    """
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the GPU's free memory cannot be had: {why}. Give --data.global-batch a number.")
    answer = done.stdout.split()[-1]
    return None if answer == "none" else int(answer)
