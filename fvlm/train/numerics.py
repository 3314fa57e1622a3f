"""How a GPU rounds and in which order it adds: settings of the whole process."""

from __future__ import annotations

import os

import torch

from fvlm.config import Config


def configure_numerics(config: Config, device: torch.device) -> None:
    """TF32 with bf16 and exact products with fp32; with `train.deterministic`, kernels that add in a fixed order.

    To be called before the process' first matrix product. Does nothing on a CPU, which is deterministic as it is.

    With `train.deterministic` an operator that has no such kernel raises RuntimeError, by torch. Not deterministic
    would be: cuDNN's and the memory-efficient attention in their backward passes, some of cuDNN's convolutions, cuBLAS
    with several workspaces, and what torch.compile chooses by timing candidates.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.precision == "bf16"
    if not config.train.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    # A debugging aid, which costs a pass over everything. The module lets itself be called, and mypy sees only that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # masked attention, of short sequences, is then plain products
    torch._inductor.config.deterministic = True
