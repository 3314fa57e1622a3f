"""The operations of a step as they are counted: by hand, by the step itself, for every length of captions; and MFU."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Ranks
from tiny_run import batches, make_batch, make_config, make_run

from fvlm import presets
from fvlm.config import Config
from fvlm.model.hub import ARCHITECTURES, build_model
from fvlm.model.objective import Inputs, trained_losses
from fvlm.train.chips import peak_of, table_peak
from fvlm.train.flops import FlopMeter, clip_flops, flop_counter, flops_by_length, flops_of
from fvlm.train.logger import Logger
from fvlm.train.loop import train
from fvlm.train.metrics import log_line
from fvlm.train.optim import freeze_unreached
from fvlm.train.samples import Samples
from fvlm.train.sinks import METRICS, JsonLines

LATENT = (4, 14, 14)
"""Of the demo's frames."""


def demo(**changes: Any) -> Config:
    """changes: by section and key, `model__train_vision=False`"""
    config = presets.demo()
    for name, value in changes.items():
        section, key = name.split("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


def by_hand(config: Config, latent_shape: tuple[int, int, int], length: int) -> int:
    """Operations of one clip from the sizes of the model alone. Of a product that is trained, forward, the gradient of
    its input and that of its weights cost the same: 3 times two operations for each multiplication."""
    vision, language = ARCHITECTURES[config.model.vision], ARCHITECTURES[config.model.language]
    t, passes, start = config.data.num_frames, config.objective.fine_iterations, config.objective.caption_start
    d, p, layers = vision["hidden_size"], vision["patch_size"], vision["num_hidden_layers"]
    n = (config.data.frame_size // p) ** 2 + 1  # patches and CLS
    q, e, f = config.model.query_width, language["hidden_size"], language["intermediate_size"]
    kv = e // language["num_attention_heads"] * language["num_key_value_heads"]
    trained = config.model.train_vision

    patches = t * (3 if trained else 1) * ((layers - 1) * (n * 12 * d * d + 2 * n * n * d) + n * 2 * d * d)
    patches += t * (2 if trained else 1) * (n - 1) * d * 3 * p * p  # pixels have no gradient
    looks = t * layers * ((3 if trained else 2) * 10 * d * d + (3 if trained else 2) * 2 * n * d)
    looks += t * 3 * (q * d + d * d + d * e)
    looks *= passes + 1

    def decoder(s: int) -> int:
        layer = s * (2 * e * e + 2 * e * kv + 3 * e * f) + 2 * s * s * e
        return 3 * layer * language["num_hidden_layers"]

    caption, video = 1 + t + start + length, 2 + t
    reads = passes * decoder(video) + decoder(caption + video)
    queries = passes * 3 * (t - 1) * e * q
    head = 3 * (length if start else length - 1) * e * language["vocab_size"]
    c, h, w = latent_shape
    channels = 2 * (c * 64 + 64 * 128 + 128 * 256)
    prediction = 3 * t * (e * 512 + 512 * 512 + 9 * channels * h * w)
    return 2 * (patches + looks + reads + queries + head + prediction)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__train_vision": False},
        {"objective__fine_iterations": 1, "objective__caption_start": False},
        {"model__visual_norm": "none", "train__memory": "small"},  # what is computed again is not needed
    ],
)
def test_what_is_counted_is_what_the_sizes_of_the_model_give(changes):
    config = demo(**changes)
    assert clip_flops(config, LATENT, [24, 7]) == [by_hand(config, LATENT, length) for length in (24, 7)]


def test_a_frozen_vision_encoder_costs_less_and_is_seen():
    (whole,), (frozen,) = (clip_flops(demo(model__train_vision=on), LATENT, [24]) for on in (True, False))
    assert frozen < 0.9 * whole


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=pytest.mark.long) for name in sorted(presets.PRESETS) if name != "demo"]
)
def test_every_preset_is_counted(preset):
    config = presets.get(preset)
    side = config.data.frame_size // 8
    table = flops_by_length(config, (4, side, side))
    assert table == pytest.approx({length: by_hand(config, (4, side, side), length) for length in table}, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"model__deep_query": False}])
def test_two_layers_of_each_transformer_tell_of_all(changes):
    config = demo(**changes)
    with torch.device("meta"):
        model = build_model(config.model, LATENT, seed=0)
        freeze_unreached(model, config)
        ids = torch.zeros(1, 24, dtype=torch.int64)
        data = config.data
        frames = torch.empty(1, data.num_frames, data.frame_size, data.frame_size, 3, dtype=torch.uint8)
        inputs = Inputs(frames, torch.empty(1, data.num_frames, *LATENT), ids, ids, torch.ones(()))
        with flop_counter() as counter:
            trained_losses(model, inputs, config.objective).loss.backward()
    assert clip_flops(config, LATENT, [24]) == [flops_of(counter).useful]


def test_every_length_of_captions_has_its_own_count_though_three_are_counted():
    config = demo(data__max_caption_tokens=200)
    table = flops_by_length(config, LATENT)
    assert list(table) == [200, 192, 160, 128, 96, 64, 32]
    assert table == pytest.approx({length: by_hand(config, LATENT, length) for length in table}, rel=1e-12)
    assert list(flops_by_length(demo(data__max_caption_tokens=40), LATENT)) == [40, 32]
    assert list(flops_by_length(demo(), LATENT)) == [24]


def counted_by_rank_0(config: Config) -> list[float]:
    return clip_flops(config, LATENT, [24]) if dist.get_rank() == 0 else []


def test_one_rank_of_several_counts_alone():
    ranks = Ranks()
    try:
        counts = ranks.all(2, counted_by_rank_0, demo())
    finally:
        ranks.close()
    assert counts == [clip_flops(demo(), LATENT, [24]), []]


def test_mfu_is_operations_by_time_and_peak_of_the_steps_since_the_last_line():
    meter = FlopMeter({5: 3e12}, peak_tflops=100.0)
    made = list(meter.of(itertools.islice(batches(1), 4)))
    assert [batch.caption_ids.shape for batch in made] == [(2, 5)] * 4
    assert meter.lap(0.5) == {"train/tflops": 12.0, "train/mfu": 0.12}  # 2 clips a step
    assert meter.lap(0.5) == {}
    list(meter.of(iter([make_batch(1)])))
    assert meter.lap(0.0) == {}


def test_longer_captions_count_as_more():
    meter = FlopMeter({5: 1e12, 9: 2e12}, peak_tflops=None)
    short, long = make_batch(1), make_batch(2)
    long = dataclasses.replace(long, caption_ids=torch.zeros(2, 9, dtype=torch.int64))
    list(meter.of(iter([short, long, long])))
    assert meter.lap(1.0) == {"train/tflops": pytest.approx((2 + 4 + 4) / 3)}  # no peak, no MFU


def test_only_bf16_on_a_listed_chip_has_a_peak(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert FlopMeter.of_config(demo(train__precision="bf16"), LATENT, cuda).peak_tflops == 989
    assert FlopMeter.of_config(demo(train__precision="fp32"), LATENT, cuda).peak_tflops is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert FlopMeter.of_config(demo(train__precision="bf16"), LATENT, cuda).peak_tflops is None
    assert table_peak(torch.device("cpu")) is None


def test_peaks_are_those_of_the_chip_and_not_of_its_namesakes():
    assert peak_of("NVIDIA GeForce RTX 4090") == 165.2
    assert peak_of("NVIDIA H100 80GB HBM3") == 989 and peak_of("NVIDIA H100 PCIe") == 756
    assert peak_of("NVIDIA L40S") == 362 and peak_of("NVIDIA L4") == 121
    for other in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA L40", "NVIDIA A1000"):
        assert peak_of(other) is None


def test_rows_and_the_log_line_have_mfu_where_there_is_a_meter(tmp_path):
    lines = []

    class Sink:
        def write(self, rows, latest) -> None:
            lines.append(log_line(latest, 4))

        def note(self, text) -> None: ...

    config = make_config(tmp_path, max_steps=4, log_every=2)
    run = make_run(config)
    jsonl, samples, meter = JsonLines(config.run_dir, 0), Samples(config, 0, 0, 1), FlopMeter({5: 1e9}, 0.5)
    train(run, meter.of(samples.of(batches(1))), [Logger(run, [jsonl, Sink()], samples, meter=meter)])
    rows = [json.loads(line) for line in (config.run_dir / METRICS).read_bytes().splitlines()]
    assert ["train/mfu" in row for row in rows] == [False, True, False, True]
    for row, line in zip(rows[1::2], lines, strict=True):
        assert row["train/tflops"] == pytest.approx(2e9 / row["train/step_time"] / 1e12)
        assert row["train/mfu"] == pytest.approx(row["train/tflops"] / 0.5)
        assert f"clips/s MFU {100 * row['train/mfu']:.1f}% wait" in line
