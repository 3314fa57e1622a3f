"""A model in shards, built without a moment at which one device or another rank's host holds all of it.

Every rank makes the model without contents, cuts it (`shard_decoder`), and gives memory to its own parts alone. A new
run's values come from rank 0's host, one tensor at a time; a resumed run's from the checkpoint, which every rank maps
and of which it reads its parts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import build_model, kept_architecture
from fvlm.model.weights import ParametersOnMeta
from fvlm.train.optim import freeze_unreached
from fvlm.train.parallel import shard_decoder
from fvlm.train.tensor_parts import is_shard, part_like


def build_sharded(config: Config, latent_shape: tuple[int, int, int], device: torch.device, new: bool) -> FoveatedVLM:
    """The model on `device`, its decoder's layers in shards, as `build_model` would fill it. All ranks call it.

    new: fill it, with pretrained weights or from the seed; otherwise parameters hold anything and a checkpoint follows
    Raises UserError as `build_model` does, and when pretrained weights are not of the architecture that the name says.
    """
    architecture = kept_architecture(config)
    with ParametersOnMeta():
        model = build_model(config.model, latent_shape, config.train.seed, False, architecture)
    freeze_unreached(model, config)
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    shard_decoder(model, device)
    model.to_empty(device=device)
    model.llm.tie_weights()  # which empty tensors are no longer
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if new:
        whole = None
        if dist.get_rank() == 0:
            whole = build_model(config.model, latent_shape, config.train.seed, architecture=architecture)
        fill_from_rank_0(model, whole)
    return model


def fill_from_rank_0(model: FoveatedVLM, whole: FoveatedVLM | None) -> None:
    """Copy the parameters of `whole`, which rank 0 has on its host, to every rank's `model`. All ranks call it.

    Besides its model a device holds at most one whole tensor of a layer. Raises UserError on rank 0 when they do not
    fit.
    """
    parameters = dict(model.named_parameters())
    values = dict(whole.named_parameters()) if whole else None
    if values:
        differ = [n for n in parameters.keys() | values.keys() if _shape(parameters, n) != _shape(values, n)]
        if differ:
            raise UserError(
                f"the weights of {model.config.vision} or {model.config.language} are not of the architecture known "
                f"by that name: {', '.join(sorted(differ)[:3])}. Give a folder that holds config.json and weights."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            _receive(parameter, values[name] if values else None)


def _receive(parameter: torch.nn.Parameter, value: torch.Tensor | None) -> None:
    """`value` is rank 0's; the others have None."""
    whole = parameter.detach()
    if is_shard(parameter):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    if value is not None:
        whole.copy_(value)
    dist.broadcast(whole, 0)
    if is_shard(parameter):
        parameter.copy_(part_like(whole, parameter))


def _shape(parameters: dict[str, torch.nn.Parameter], name: str) -> torch.Size | None:
    return parameters[name].shape if name in parameters else None
