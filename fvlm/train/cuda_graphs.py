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
    """`trained_losses`, or what a compiler made of it, recorded for every shape of inputs.

    Inputs of a shape are computed plainly the first time they come, and recorded the second time. So whoever goes over
    all shapes twice (`warm_up`) has no plain step beside a recording, where what lies between forward and backward
    would exist twice. A recording takes, for its gradients, the trained weights' memory; what lies between is shared by
    all shapes. Weights that autocast converts by itself (the projections and the prediction head) are converted in each
    pass, and their gradients summed in float32.

    required: raise UserError where the step cannot be recorded; otherwise go on without, and `refusal` says why
    """

    def __init__(self, trained: Callable[..., Trained], required: bool = True):
        self._trained, self._required = trained, required
        self._recorded: dict[Shapes, nn.Module] = {}
        self._seen: set[Shapes] = set()
        self._pool: Any = None  # made with the first recording
        self.refusal = ""

    def __call__(self, model: FoveatedVLM, inputs: Inputs, config: ObjectiveConfig) -> Trained:
        shapes = tuple(tensor.shape for tensor in inputs)
        device = model.q_static.device.type
        # Weights that autocast keeps in bf16 until its region ends would be read, as they were, by every later replay.
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
            if shapes not in self._recorded and shapes in self._seen and not self.refusal:
                self._record(shapes, model, inputs, config)
            self._seen.add(shapes)
            if shapes not in self._recorded:
                return self._trained(model, inputs, config)
            out: Trained = self._recorded[shapes](*inputs)
        # Metrics are read steps later. The passes are read from before the next replay.
        earlier = tuple(p.detach() for p in out.earlier)
        return Trained(out.loss, out.caption.detach().clone(), out.recon.detach().clone(), earlier)

    def _record(self, shapes: Shapes, model: FoveatedVLM, inputs: Inputs, config: ObjectiveConfig) -> None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        own = Inputs(*(tensor.clone() for tensor in inputs))  # what later inputs of this shape are copied to
        losses = _OfTensors(self._trained, model, config)
        try:
            # In place. No warm-up: the plain step has been one.
            torch.cuda.make_graphed_callables(losses, tuple(own), num_warmup_iters=0, pool=self._pool)
        except RuntimeError as error:
            # When memory runs out, ending the capture fails too, and that error is the one that arrives.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            # Of all that can go wrong in a step, compilation included, only this is about recording it.
            if "captur" not in str(error):
                raise
            self.refusal = f"this step cannot be recorded on this GPU: {error}"
            if self._required:
                raise UserError(f"--train.cuda-graphs: {self.refusal}. Use --train.cuda-graphs off.") from error
            return
        self._recorded[shapes] = losses


class _OfTensors(nn.Module):
    """The losses as a function of tensors alone, with the parameters that have gradients."""

    def __init__(self, trained: Callable[..., Trained], model: FoveatedVLM, config: ObjectiveConfig):
        super().__init__()
        self._trained, self.model, self._config = trained, model, config

    def forward(self, *inputs: torch.Tensor) -> Trained:
        return self._trained(self.model, Inputs(*inputs), self._config)
