"""Evaluation within a run: losses on held-out clips, and pictures of what the model sees, says and foresees.

The training is the same with it and without, to the last bit: no random number is drawn, nothing of the model changes.
Every rank runs as many forward passes as every other, each on its share of the same global batches, so results do not
depend on the number of ranks, and ranks that share layers never wait for one that is done.
"""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from fvlm.batch import IGNORE, Batch
from fvlm.config import Config, ObjectiveConfig
from fvlm.data.collate import Collator
from fvlm.data.corrupt import CorruptClip
from fvlm.data.read import RawBatch
from fvlm.data.text import CaptionTokenizer
from fvlm.files import write_atomic
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.generate import gaze, generate_captions, predict_latents
from fvlm.model.objective import compute_losses, make_inputs
from fvlm.ranks import world_size
from fvlm.train.clip_view import ClipView, draw
from fvlm.train.held_out import EvalClips
from fvlm.train.loop import Run
from fvlm.train.metrics import Row, Scalars
from fvlm.train.run_folder import PICTURES
from fvlm.train.sinks import Picture, Sink
from fvlm.train.step import compile_kind

LINE = 110
"""Characters of a line above a picture."""


def is_evaluation_step(step: int, config: Config) -> bool:
    every = config.eval.every
    return every > 0 and (step % every == 0 or step == config.train.max_steps)


class Seen(NamedTuple):
    """What one rank has from an evaluation."""

    losses: Row
    """The same on every rank."""
    views: list[ClipView]
    """Of its clips that are to be drawn."""
    replaced: list[CorruptClip]
    """Damaged ones for which others stood in."""


class Evaluation:
    """The hook that evaluates, every `eval.every` steps and after the last. All ranks have one; rank 0 has the sinks.

    Put it before the hook that saves: then a checkpoint implies the evaluation of its step. `decode` gives this rank's
    share of the batches of `clips`, decoded elsewhere; `long` is a context for what may take longer than a step.
    `before` is called first, on all ranks: metrics that were gathered for a log line are to be logged before it.
    A row of evals.jsonl:

    step                            finished steps
    eval/caption/loss_coarse, ...   what training has under these names, over all held-out clips: mean over their
                                    caption tokens, mean over their latents, and the ratios of these means
    eval/clips                      held-out clips; 0 where there are none, and no losses then
    eval/replaced                   times that another clip stood in for a damaged one (`data.on_corrupt`)
    eval/seconds                    that training was held
    """

    def __init__(
        self,
        run: Run,
        clips: EvalClips,
        tokenizer: CaptionTokenizer,
        rank: int,
        sinks: list[Sink],
        decode: Callable[[], Iterator[RawBatch]],
        long: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        before: Callable[[], None] = lambda: None,
    ):
        self._run, self._clips, self._tokenizer, self._before = run, clips, tokenizer, before
        self._rank, self._sinks, self._decode, self._long = rank, sinks, decode, long
        self._collate = Collator(clips.reader.manifest.spec, tokenizer)
        self._known_damage: set[str] = set()
        if rank == 0:
            drop_pictures_after(run.config.run_dir / PICTURES, run.step)

    def after_step(self, step: int, scalars: Scalars) -> None:
        config = self._run.config
        if not is_evaluation_step(step, config):
            return
        self._before()
        if self._run.model.q_static.is_cuda:
            torch.cuda.synchronize()
        self._run.clock.computed()  # what has been waited for now was training
        begin = time.perf_counter()
        with looking(self._run.model, config):
            seen = self._look()
        of_ranks = of_all_ranks(seen)  # in the order of the global batch
        if self._rank == 0:
            row: Row = {"step": step} | seen.losses
            row["eval/clips"] = float(self._clips.steps * config.data.global_batch)
            row["eval/replaced"] = float(sum(len(of_rank.replaced) for of_rank in of_ranks))
            with self._long():
                pictures = self._draw(step, [view for of_rank in of_ranks for view in of_rank.views])
                row["eval/seconds"] = time.perf_counter() - begin
                self._tell(row, pictures, [clip for of_rank in of_ranks for clip in of_rank.replaced])
        self._run.clock.resume()  # a pause is not training time

    def _look(self) -> Seen:
        objective, model = self._run.config.objective, self._run.model
        means, views, replaced = Means(objective), None, []
        for raw in self._batches():
            batch = self._collate(raw).to(model.q_static.device)
            if self._clips.steps:
                means.add(model, batch)
            if views is None:
                views = self._views(raw, batch)
            replaced += [CorruptClip.from_json(text) for text in map(str, raw["replaced"]) if text]
            del raw, batch  # before the next is asked for: two batches exist at a time
        return Seen(means.row(), views or [], replaced)

    def _batches(self) -> Iterator[RawBatch]:
        """Each may take long to come, and to be looked at."""
        batches = self._decode()
        while True:
            with self._long():
                raw = next(batches, None)
                if raw is None:
                    return
                yield raw
                del raw

    def _views(self, raw: RawBatch, batch: Batch) -> list[ClipView]:
        """Of this rank's clips among the first `eval.pictures` of the global batch. All ranks run the same passes."""
        config, model, spec = self._run.config, self._run.model, self._clips.reader.manifest.spec
        if not config.eval.pictures:
            return []
        coarse, fine = gaze(model, batch.frames, config.objective)
        predicted = predict_latents(model, batch.frames, batch.latents, config.objective)
        said = self._captions(batch)
        first = self._rank * len(said)
        return [
            ClipView(
                clip_id=batch.clip_ids[i],
                frames=np.array(batch.frames[i].cpu()),  # a copy: the batch's memory is used again
                coarse=coarse[i].float().cpu().numpy(),
                fine=fine[i].float().cpu().numpy(),
                caption=str(raw["caption"][i]),
                said=self._tokenizer.decode(said[i]),
                codec=spec.latent_codec,
                latents=batch.latents[i].float().cpu().numpy(),
                predicted=predicted[i].cpu().numpy(),
            )
            for i in range(min(len(said), config.eval.pictures - first))
        ]

    def _captions(self, batch: Batch) -> list[list[int]]:
        """What the model says of each clip, prompted as it was trained (`caption_heading` tells people how)."""
        config = self._run.config
        first = None if config.objective.caption_start else batch.caption_ids[:, :1]
        said = generate_captions(
            self._run.model,
            batch.frames,
            config.objective,
            config.data.max_caption_tokens,
            self._tokenizer.eos_id,
            first,
        )
        if config.data.train_eos:
            return said
        true_lengths = (batch.labels != IGNORE).sum(1).tolist()
        return [ids[:length] for ids, length in zip(said, true_lengths, strict=True)]

    def _draw(self, step: int, views: list[ClipView]) -> list[Picture]:
        """Raises UserError: the disk is full."""
        folder = self._run.config.run_dir / PICTURES
        pictures = []
        for number, view in enumerate(views):
            lines = [
                f"step {step}, {self._clips.kind} {view.clip_id}",
                textwrap.shorten(f"true: {view.caption}", LINE),
                textwrap.shorten(f"{caption_heading(self._run.config)}: {view.said}", LINE),
            ]
            folder.mkdir(exist_ok=True)
            path = folder / f"step-{step:08d}-{number}.png"
            write_atomic(path, draw(view, lines))
            pictures.append(Picture(path, "\n".join(lines)))
        return pictures

    def _tell(self, row: Row, pictures: list[Picture], replaced: list[CorruptClip]) -> None:
        for sink in self._sinks:
            sink.evaluated(row, pictures)
            for clip in replaced:
                if clip.error not in self._known_damage:
                    sink.note(f"evaluation: damaged, clip {clip.replaced_by!r} stands in for it: {clip.error}")
        self._known_damage |= {clip.error for clip in replaced}


def caption_heading(config: Config) -> str:
    """What stands before a caption of the model: what of it is not its own."""
    notes = [] if config.objective.caption_start else ["first token given"]
    notes += [] if config.data.train_eos else ["cut at the true length"]  # it was not trained to end
    return f"model ({', '.join(notes)})" if notes else "model"


class Means:
    """Coarse and fine losses of global batches, and their means over all of them. Nothing is read before `row`.

    What `compute_losses` gives is global, so all ranks have the same sums. A caption loss is a mean over tokens, of
    which batches have unequally many; each counts as often as it has tokens.
    """

    NAMES = ("caption/loss_coarse", "caption/loss_fine", "recon/loss_coarse", "recon/loss_fine")

    def __init__(self, objective: ObjectiveConfig):
        self._objective = objective
        self._sums: list[torch.Tensor] = []
        """Of each batch [4], tokens or clips times losses."""
        self._weights: list[torch.Tensor] = []

    def add(self, model: FoveatedVLM, batch: Batch) -> None:
        losses = compute_losses(model, batch, self._objective, readings=True)
        tokens, clips = make_inputs(batch, self._objective).tokens, torch.tensor(len(batch.clip_ids) * world_size())
        values = (losses.caption_coarse, losses.caption[-1], losses.recon_coarse, losses.recon[-1])
        assert all(value is not None for value in values)  # readings are on
        weights = torch.stack([tokens, tokens, clips.to(tokens), clips.to(tokens)]).double()
        self._sums.append(torch.stack([value.double() for value in values if value is not None]) * weights)
        self._weights.append(weights)

    def row(self) -> Row:
        """{} without batches."""
        if not self._sums:
            return {}
        means = torch.stack(self._sums).sum(0) / torch.stack(self._weights).sum(0).clamp(min=1)
        row = {f"eval/{name}": value for name, value in zip(self.NAMES, means.tolist(), strict=True)}
        for name in ("eval/caption", "eval/recon"):
            fine = row[f"{name}/loss_fine"]
            row[f"{name}/ratio"] = row[f"{name}/loss_coarse"] / fine if fine else float("nan")
        return row


@contextlib.contextmanager
def looking(model: FoveatedVLM, config: Config) -> Iterator[None]:
    """The model as in training, precision included, but without gradients, and run eagerly: a program compiled for
    other shapes and without gradients would take longer to compile than to do without."""
    device, trained = model.q_static.device, model.training
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"))
        if compile_kind(config, device) != "off":
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(model.train, trained)
        model.eval()
        yield


def of_all_ranks(mine: Seen) -> list[Seen]:
    """In the order of ranks."""
    if world_size() == 1:
        return [mine]
    of_ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(of_ranks, mine)
    return of_ranks


def drop_pictures_after(folder: Path, step: int) -> None:
    """Those of steps that a lost process had come to."""
    for path in folder.glob("step-*-*.png"):
        if int(path.name.split("-")[1]) > step:
            path.unlink()
