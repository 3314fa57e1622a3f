"""Evaluation within a run: what its losses are, that it changes nothing, and what it leaves in the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import decode_clips, make_clip
from evaluated import HELD_OUT, config_of, decoding, go_on, losses, rows, tokenizer, write_clips
from evaluation_rank import STEPS
from PIL import Image
from tiny_run import CLIPS, LATENT, SIDE, T, bits, make_run

from fvlm.config import Config, EvalConfig
from fvlm.data.collate import Collator
from fvlm.data.latents import BlockTransform, from_bits
from fvlm.data.schema import Manifest
from fvlm.data.shards import read_manifest
from fvlm.data.text import CaptionTokenizer
from fvlm.errors import Damaged, UserError
from fvlm.model.objective import compute_losses
from fvlm.train import evaluation
from fvlm.train.clip_view import ClipView, draw, gaze_on_frames, pictures_of_latents
from fvlm.train.evaluation import Evaluation
from fvlm.train.held_out import eval_clips
from fvlm.train.run_folder import PICTURES
from fvlm.train.run_log import read_log
from fvlm.train.sinks import TRAIN_LOG

TRAINED = 8
PATIENCE_S = 240


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """training/ and held-out/"""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder / "training", TRAINED, seed=0)
    write_clips(folder / "held-out", HELD_OUT, seed=2)
    return folder


def training(data: Path) -> Manifest:
    return read_manifest(data / "training")


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Any]:
    """A run of one rank to its end, evaluated after the steps 2, 4 and 5."""
    config = config_of(tmp_path_factory.mktemp("evaluated"), data / "held-out")
    clips = eval_clips(config, training(data))
    return config, go_on(config, clips)


# ---- losses


def test_losses_are_means_over_all_held_out_clips_whatever_the_batches(data, tmp_path):
    """Against one batch of them all. Visual tokens are normed one by one here: else a batch makes a difference."""
    config = config_of(tmp_path, data / "held-out", norm="token", max_steps=1)
    clips = eval_clips(config, training(data))
    run = go_on(config, clips)
    assert clips and clips.steps == 3
    raws = [{key: np.copy(value) for key, value in raw.items()} for raw in decoding(clips)()]
    assert len({clip for raw in raws for clip in raw["clip_id"]}) == 3 * CLIPS
    together = {key: np.concatenate([raw[key] for raw in raws]) for key in raws[0]}
    batch = Collator(clips.reader.manifest.spec, tokenizer())(together)
    per_clip = (batch.labels >= 0).sum(1).reshape(3, CLIPS).sum(1).tolist()
    assert len(set(per_clip)) > 1  # a mean of the batches' means would be another
    with torch.no_grad():
        wanted = compute_losses(run.model, batch, config.objective, readings=True)
    (row,) = rows(config)
    assert row["eval/caption/loss_coarse"] == pytest.approx(float(wanted.caption_coarse), rel=1e-5)
    assert row["eval/caption/loss_fine"] == pytest.approx(float(wanted.caption[-1]), rel=1e-5)
    assert row["eval/recon/loss_coarse"] == pytest.approx(float(wanted.recon_coarse), rel=1e-5)
    assert row["eval/recon/loss_fine"] == pytest.approx(float(wanted.recon[-1]), rel=1e-5)
    assert row["eval/caption/ratio"] == pytest.approx(float(wanted.caption_coarse / wanted.caption[-1]), rel=1e-5)
    assert (row["eval/clips"], row["eval/replaced"]) == (3 * CLIPS, 0)


@pytest.fixture(scope="module")
def ranks(data: Path) -> Path:
    """Two ranks, first with the whole model on each, then with shards of it; the folder of their runs."""
    script = str(Path(__file__).with_name("evaluation_rank.py"))
    started = [
        subprocess.Popen(
            [sys.executable, script, str(data), str(rank)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(2)
    ]
    try:
        ended = [(process.communicate(timeout=PATIENCE_S)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [code for _, code in ended] == [0, 0], "\n".join(output for output, _ in ended)
    return data


@pytest.mark.parametrize("how", ["replicate", "shard"])
def test_two_ranks_give_the_losses_of_one_and_evaluation_changes_no_bit_of_them(ranks, evaluated, how):
    one, two = rows(evaluated[0]), rows(config_of(ranks / how, None))
    assert [row["step"] for row in two] == [2, STEPS] and one[0]["step"] == 2
    assert losses(two[0]) == pytest.approx(losses(one[0]), rel=1e-5)
    assert [json.loads((ranks / how / f"unequal-{rank}.json").read_text()) for rank in range(2)] == [[], []]


def test_pictures_are_of_the_same_clips_with_any_number_of_ranks(ranks, evaluated):
    first, *others = (
        config_of(folder, None).run_dir for folder in (evaluated[0].runs_dir, ranks / "replicate", ranks / "shard")
    )
    for other, pictures in zip(others, (CLIPS, 1), strict=True):
        names = [f"step-00000002-{clip}.png" for clip in range(pictures)]
        assert sorted(path.name for path in (other / PICTURES).glob("step-00000002-*")) == names
        for name in names:
            wanted = np.asarray(Image.open(first / PICTURES / name)).astype(int)
            picture = np.asarray(Image.open(other / PICTURES / name))
            assert picture.shape == wanted.shape
            assert (np.abs(picture - wanted).max(-1) > 8).mean() < 0.01  # the title tells the clip, the rows show it


def test_the_watch_over_hanging_ranks_is_told_of_every_batch_and_of_the_drawing(data, tmp_path):
    """Each may take as long as a first step: the whole evaluation has no limit."""
    config = config_of(tmp_path, data / "held-out", max_steps=2)
    clips = eval_clips(config, training(data))
    told, entered = [], []

    @contextlib.contextmanager
    def long():
        entered.append(None)
        yield
        entered.pop()
        told.append(None)

    def decode():
        for raw in decoding(clips)():
            assert entered
            yield raw

    class Sink:
        def evaluated(self, row, pictures):
            assert entered

    Evaluation(make_run(config), clips, tokenizer(), 0, [Sink()], decode, long).after_step(2, {})  # type: ignore
    assert len(told) == 3 + 2 and not entered  # the batches, the end of them, the drawing


def test_a_model_that_was_never_trained_to_begin_or_to_end_is_given_the_beginning_and_cut_at_the_end(data, tmp_path):
    config = config_of(tmp_path, data / "held-out", max_steps=2)
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, caption_start=False),
        data=dataclasses.replace(config.data, train_eos=False),
    )
    clips = eval_clips(config, training(data))
    texts: list[str] = []

    class Sink:
        def evaluated(self, row, pictures):
            texts.extend(picture.caption for picture in pictures)

    tokens = CaptionTokenizer(tokenizer().tokenizer, 12, train_eos=False)
    Evaluation(make_run(config), clips, tokens, 0, [Sink()], decoding(clips)).after_step(2, {})  # type: ignore
    assert len(texts) == CLIPS
    for text in texts:
        _, true, said = text.splitlines()
        heading, words = said.split(": ")
        assert heading == "model (first token given, cut at the true length)"
        true_words = true.removeprefix("true: ").split()
        assert words.split()[0] == true_words[0] and len(words.split()) <= len(true_words)


# ---- nothing changes


def test_a_run_with_evaluation_has_the_bits_of_one_without(evaluated, tmp_path):
    plain = go_on(config_of(tmp_path, None), None)
    _, run = evaluated
    assert bits(run) == bits(plain)
    assert run.model.training and all(p.grad is None for p in run.model.parameters())


def test_evaluation_draws_no_random_number_and_leaves_the_mode(data, tmp_path):
    config = config_of(tmp_path, data / "held-out", max_steps=2)
    clips = eval_clips(config, training(data))
    run = make_run(config)
    hook = Evaluation(run, clips, tokenizer(), 0, [], decoding(clips))
    np_before, before = np.random.get_state()[1].copy(), torch.get_rng_state()
    hook.after_step(2, {})
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], np_before)
    assert run.model.training and torch.is_grad_enabled()


def test_the_time_of_an_evaluation_is_no_training_time(data, tmp_path):
    config = config_of(tmp_path, data / "held-out", max_steps=2)
    clips = eval_clips(config, training(data))
    pause = 1.0

    def slowly():
        time.sleep(pause)
        yield from decoding(clips)()

    run = go_on(config, clips, decode=slowly)
    assert rows(config)[-1]["eval/seconds"] > pause
    run.clock.waited()  # as the loop would, were there another batch
    step_time, wait = run.clock.lap()
    assert run.clock.trained_s < pause and step_time < pause and wait * step_time * 2 < pause / 4


# ---- the run folder


def test_a_picture_shows_the_frames_and_the_words_of_the_clip_that_it_names(data, tmp_path, monkeypatch):
    """The memory of a batch is decoded into again while the evaluation goes on."""
    shown: list[ClipView] = []
    monkeypatch.setattr(evaluation, "draw", lambda view, lines: shown.append(view) or b"")
    config = config_of(tmp_path, data / "held-out", max_steps=1)
    clips = eval_clips(config, training(data))
    go_on(config, clips)
    spec, frames = clips.reader.manifest.spec, clips.reader.frame_indices
    assert [view.clip_id for view in shown] == list(next(decoding(clips)())["clip_id"])
    for view in shown:
        clip = make_clip(int(view.clip_id.removeprefix("clip-")), spec, seed=2)
        wanted = np.empty((1, T, SIDE, SIDE, 3), np.uint8)
        decode_clips([[clip.frames[index]] for index in frames], wanted, spec)
        assert np.array_equal(view.frames, wanted[0]) and view.caption == clip.caption
        assert np.array_equal(view.latents, from_bits(clip.latents[frames], spec.latent_dtype, LATENT))


def test_each_evaluation_is_there_once_after_a_restart(data, tmp_path):
    config = config_of(tmp_path, data / "held-out", max_steps=5)
    clips = eval_clips(config, training(data))
    go_on(config, clips)
    folder = config.run_dir / PICTURES
    assert [row["step"] for row in rows(config)] == [2, 4, 5]
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=6))
    go_on(longer, clips, step=3)  # as if a process was lost past its last checkpoint
    assert [row["step"] for row in rows(config)] == [2, 4, 6]
    assert sorted({path.name[:13] for path in folder.iterdir()}) == [f"step-{step:08d}" for step in (2, 4, 6)]


def test_the_log_tells_an_evaluation_in_one_line(evaluated):
    config, _ = evaluated
    lines = [line for line in (config.run_dir / TRAIN_LOG).read_text().splitlines() if "evaluated at" in line]
    last = rows(config)[-1]
    assert len(lines) == 3
    assert (
        f"evaluated at step 5: cap: {last['eval/caption/loss_fine']:.4f} r={last['eval/caption/ratio']:.4f} | "
        f"rec: {last['eval/recon/loss_fine']:.4f} r={last['eval/recon/ratio']:.4f} | 6 held-out clips | 2 pictures | "
    ) in lines[-1]
    assert read_log(config.run_dir / TRAIN_LOG).note == ""  # `ray_jobs.status` shows notes, and this is none


def test_without_held_out_clips_there_are_pictures_of_training_clips_and_no_losses(data, tmp_path):
    config = config_of(tmp_path, None, max_steps=1)
    clips = eval_clips(config, training(data))
    assert clips and "no held-out clips (--eval.path)" in str(clips)
    captions: list[str] = []

    class Sink:
        def evaluated(self, row, pictures):
            captions.extend(picture.caption for picture in pictures)
            assert not losses(row) and row["eval/clips"] == 0

    run = make_run(config)
    Evaluation(run, clips, tokenizer(), 0, [Sink()], decoding(clips)).after_step(1, {})  # type: ignore[list-item]
    assert len(captions) == CLIPS and all("step 1, training clip clip-" in caption for caption in captions)
    assert len(list((config.run_dir / PICTURES).iterdir())) == CLIPS


def test_a_damaged_held_out_clip_ends_the_run_by_name_or_is_replaced_and_counted(tmp_path):
    write_clips(tmp_path / "training", TRAINED, seed=0)
    manifest = write_clips(tmp_path / "held-out", HELD_OUT, seed=2)
    spoil_a_frame(tmp_path / "held-out" / "shard-00000.parquet")
    config = config_of(tmp_path, tmp_path / "held-out", max_steps=1)
    with pytest.raises(Damaged, match=r"held-out/shard-00000\.parquet: row group"):
        go_on(config, eval_clips(config, training(tmp_path)))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, on_corrupt="replace"))
    go_on(config, eval_clips(config, training(tmp_path)))
    assert rows(config)[-1]["eval/replaced"] > 0
    assert "evaluation: damaged, clip " in (config.run_dir / TRAIN_LOG).read_text()
    assert manifest.num_clips == HELD_OUT


def spoil_a_frame(shard: Path) -> None:
    """Flip a byte in the pages of the first row group; their checksum tells."""
    content = bytearray(shard.read_bytes())
    content[len(content) // 8] ^= 0xFF
    shard.write_bytes(content)


# ---- what is refused


@pytest.mark.parametrize(
    "changes, eval_changes, message",
    [
        ({"frame_size": 56, "latent_shape": (4, 7, 7)}, {}, r"frames of 56 px.*--frame-size 28"),
        ({"stored_frames": 3}, {}, r"3 frames a clip.*--num-frames 8"),
        ({"latent_codec": "sd-vae-ft-mse"}, {}, r"latent_codec is 'sd-vae-ft-mse'.*'test-noise'.*--latents test-noise"),
        ({"latent_shape": (4, 8, 8)}, {}, r"latent_shape is \(4, 8, 8\).*\(4, 4, 4\)"),
        ({}, {"clips": 1}, r"--eval.clips 1 is less than one global batch of 2.*--eval.clips 2"),
    ],
)
def test_held_out_clips_that_do_not_fit_are_refused_with_the_cure(data, tmp_path, changes, eval_changes, message):
    write_clips(tmp_path / "odd", 4, seed=1, **changes)
    config = config_of(tmp_path, tmp_path / "odd")
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **eval_changes))
    with pytest.raises(UserError, match=message):
        eval_clips(config, training(data))


def test_too_few_held_out_clips_and_the_training_clips_themselves_are_refused(data, tmp_path):
    write_clips(tmp_path / "one", 1, seed=2)
    with pytest.raises(UserError, match=r"1 clips do not fill one global batch of 2.*or leave --eval.path out"):
        eval_clips(config_of(tmp_path, tmp_path / "one"), training(data))
    with pytest.raises(UserError, match="the training dataset itself"):
        eval_clips(config_of(tmp_path, data / "training"), training(data))


def test_every_0_means_never(data, tmp_path):
    config = dataclasses.replace(config_of(tmp_path, data / "held-out"), eval=EvalConfig(every=0, path="nowhere"))
    assert eval_clips(config, training(data)) is None


# ---- pictures


def view(codec: str, latents: np.ndarray, predicted: np.ndarray, side: int = 16) -> ClipView:
    t = len(latents)
    frames = np.zeros((t, side, side, 3), np.uint8)
    looked = np.full((t, 2, 2), 0.25, np.float32)
    return ClipView("clip", frames, looked, looked, "true", "said", codec, latents, predicted)


def test_latents_of_the_block_transform_are_shown_as_the_frames_that_they_stand_for():
    codec, random = BlockTransform(), np.random.default_rng(0)
    frames = np.repeat(np.repeat(random.integers(0, 256, (T, 2, 2, 3), np.uint8), 8, 1), 8, 2)  # flat blocks
    latents = from_bits(codec.encode(frames, "clip"), codec.dtype, codec.shape(16))
    true, foreseen = pictures_of_latents(view(codec.name, latents, latents * np.nan))
    assert np.abs(true.astype(int) - frames).max() <= 2
    assert (foreseen == 128).all()  # what is no number is grey, and no error


def test_other_latents_are_shown_in_false_colours_with_one_scale_for_truth_and_prediction():
    latents = np.random.default_rng(0).standard_normal((T, 4, 3, 3)).astype(np.float32)
    true, foreseen = pictures_of_latents(view("sd-vae-ft-mse", latents, latents))
    assert true.shape == (T, 3, 3, 3) and np.array_equal(true, foreseen) and true.std() > 30
    _, darker = pictures_of_latents(view("sd-vae-ft-mse", latents, latents - 1))
    assert darker.mean() < true.mean() - 30


def test_gaze_is_bright_on_the_patches_that_are_looked_at():
    looked = np.zeros((1, 2, 2), np.float32)
    looked[0, 1, 0] = 0.5
    shown = gaze_on_frames(np.zeros((1, 16, 16, 3), np.uint8), looked, top=0.5)[0].sum(-1)
    assert shown[8:, :8].min() > shown[:8].max() and shown[8:, :8].min() > shown[8:, 8:].max()


def test_a_picture_has_a_row_for_each_thing_and_a_column_a_frame():
    latents = np.zeros((T, 4, 2, 2), np.float32)
    png = draw(view("x", latents, latents), ["a line"])
    assert png[:4] == b"\x89PNG" and len(png) < 1_000_000
