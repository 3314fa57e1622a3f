"""Forward and backward pass as CUDA graphs: two calls of the host in place of thousands.

For GPUs that wait for the host, because the batch is small or the GPU is fast. A graph is a recording: it reads and
writes the same addresses every time, so batches of one shape share one, and what it hands out is overwritten by its
next run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fvlm.config import ObjectiveConfig
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import Inputs, Trained

Shapes = tuple[torch.Size, ...]


class RecordedLosses:
    """`trained_losses`, or what a compiler made of it, recorded when inputs of a shape are first met.

    A recording takes four steps' time and, for its gradients, the trained weights' memory; what lies between is shared
    by all shapes. With autocast the passes' gradients of a weight are summed in float32 and not in bf16, because each
    pass converts the weight anew. Raises UserError where the step cannot be recorded.
    """

    def __init__(self, trained: Callable[..., Trained]):
        self._trained = trained
        self._recorded: dict[Shapes, nn.Module] = {}
        self._pool: Any = None  # made with the first recording

    def __call__(self, model: FoveatedVLM, inputs: Inputs, config: ObjectiveConfig) -> Trained:
        shapes = tuple(tensor.shape for tensor in inputs)
        device = model.q_static.device.type
        # Weights that autocast keeps in bf16 until its region ends would be read, as they were, by every later replay.
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            if shapes not in self._recorded:
                self._recorded[shapes] = self._record(model, inputs, config)
            out: Trained = self._recorded[shapes](*inputs)
        # Metrics are read steps later. The passes are read from before the next replay.
        earlier = tuple(p.detach() for p in out.earlier)
        return Trained(out.loss, out.caption.detach().clone(), out.recon.detach().clone(), earlier)

    def _record(self, model: FoveatedVLM, inputs: Inputs, config: ObjectiveConfig) -> nn.Module:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        own = Inputs(*(tensor.clone() for tensor in inputs))  # what later inputs of this shape are copied to
        try:
            losses = _OfTensors(self._trained, model, config)
            torch.cuda.make_graphed_callables(losses, tuple(own), pool=self._pool)  # in place
        except RuntimeError as error:
            # Of all that can go wrong in a step, compilation included, only this is about recording it.
            if "captur" not in str(error):
                raise
            raise UserError(
                f"--train.cuda-graphs: this step cannot be recorded on this GPU: {error}. Use --train.cuda-graphs off."
            ) from error
        return losses


class _OfTensors(nn.Module):
    """The losses as a function of tensors alone, with the parameters that have gradients."""

    def __init__(self, trained: Callable[..., Trained], model: FoveatedVLM, config: ObjectiveConfig):
        super().__init__()
        self._trained, self.model, self._config = trained, model, config

    def forward(self, *inputs: torch.Tensor) -> Trained:
        return self._trained(self.model, Inputs(*inputs), self._config)
