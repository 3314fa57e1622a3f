"""Which clips the evaluations of a run look at: the same every time, and with any number of ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fvlm.config import Config
from fvlm.data.latents import OTHER_VAE
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.shards import read_manifest
from fvlm.errors import UserError


@dataclass(frozen=True)
class EvalClips:
    """The clips of the first steps of a plan, which is that of the held-out dataset or, without one, of the training.

    steps: global batches of held-out clips; 0: there are none, and no losses
    """

    reader: ClipReader
    steps: int

    @property
    def batches(self) -> int:
        """Global batches to read. Pictures are of the first."""
        return self.steps or 1

    @property
    def kind(self) -> str:
        """For people: whose clips these are."""
        return "held-out clip" if self.steps else "training clip"

    def __str__(self) -> str:
        manifest, clips = self.reader.manifest, self.steps * self.reader.plan.global_batch
        if self.steps:
            return f"{clips} of the {manifest.num_clips} held-out clips in {manifest.where}"
        return "no held-out clips (--eval.path), so pictures of training clips alone"


def eval_clips(config: Config, training: Manifest) -> EvalClips | None:
    """None where the run has no evaluations. Raises UserError: `config.eval` does not fit the run."""
    asked = config.eval
    if not asked.every or not (asked.path or asked.pictures):
        return None
    if not asked.path:
        return EvalClips(ClipReader.of_config(training, Plan.of_config(training, config), config), 0)
    held_out = open_held_out(config)
    _require_fit(config, training, held_out)
    reader = ClipReader.of_config(held_out, Plan.of_config(held_out, config), config)
    # What the run lists as damaged are places in the training dataset.
    reader = dataclasses.replace(reader, known_bad={})
    return EvalClips(reader, min(asked.clips, held_out.num_clips) // config.data.global_batch)


def open_held_out(config: Config) -> Manifest:
    """Raises UserError."""
    return read_manifest(config.eval.path)


def _require_fit(config: Config, training: Manifest, held_out: Manifest) -> None:
    """Raises UserError unless the model can be asked about these clips, and they are not those that it learns."""
    where, spec, trained = f"--eval.path {held_out.where}", held_out.spec, training.spec
    batch = config.data.global_batch
    if held_out.fingerprint == training.fingerprint:
        raise UserError(f"{where}: this is the training dataset itself. Prepare clips that are not trained on.")
    if spec.frame_size != config.data.frame_size:
        raise UserError(
            f"{where}: frames of {spec.frame_size} px; the model is trained on {config.data.frame_size}. "
            f"Prepare it again with --frame-size {config.data.frame_size}."
        )
    if spec.num_frames < config.data.num_frames:
        raise UserError(
            f"{where}: {spec.num_frames} frames a clip; the model is trained on {config.data.num_frames}. "
            f"Prepare it again with --num-frames {trained.num_frames}, as the training dataset has."
        )
    for key in ("latent_codec", "latent_dtype", "latent_shape"):
        mine, theirs = getattr(spec, key), getattr(trained, key)
        if mine != theirs:
            raise UserError(
                f"{where}: {key} is {mine!r}; the training dataset has {theirs!r}. Prepare it again with "
                f"--latents {trained.latent_codec}{_or_folder(trained.latent_codec)}."
            )
    if held_out.num_clips < batch:
        raise UserError(
            f"{where}: {held_out.num_clips} clips do not fill one global batch of {batch}, in which clips are "
            f"evaluated as they are trained. Prepare {batch} or more, or leave --eval.path out: pictures alone then."
        )
    if config.eval.clips < batch:
        raise UserError(
            f"--eval.clips {config.eval.clips} is less than one global batch of {batch}, in which clips are evaluated "
            f"as they are trained. Use --eval.clips {batch} or more."
        )


def _or_folder(codec: str) -> str:
    """What --latents was given where the name is a hash."""
    return ": the folder of the VAE with these weights" if codec.startswith(OTHER_VAE) else ""
