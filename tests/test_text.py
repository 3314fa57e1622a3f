"""Captions become token ids and labels."""

from __future__ import annotations

import pytest
import torch

from fvlm.batch import IGNORE
from fvlm.data.text import (
    CaptionTokenizer,
    caption_lengths,
    load_tokenizer,
    padded_lengths,
    save_tokenizer,
    train_tokenizer,
)

CAPTIONS = ["a red circle moves left", "a blue square moves up while a white triangle moves down", "Ünïcode, 3 dogs!"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS * 3, 300)


def plain(tokenizer, caption: str) -> list[int]:
    return tokenizer(caption, add_special_tokens=False)["input_ids"]


def test_new_runs_train_every_token_and_one_end_token_and_no_padding(tokenizer):
    ids, labels, cut = CaptionTokenizer(tokenizer, 64, train_eos=True)(CAPTIONS)
    assert ids.dtype == labels.dtype == torch.int64 and cut == 0
    for row, caption in enumerate(CAPTIONS):
        wanted = [*plain(tokenizer, caption), tokenizer.eos_token_id]
        assert labels[row].tolist() == wanted + [IGNORE] * (labels.shape[1] - len(wanted))
        assert ids[row, : len(wanted)].tolist() == wanted


def test_the_old_run_trains_no_end_token(tokenizer):
    labels = CaptionTokenizer(tokenizer, 64, train_eos=False)(CAPTIONS)[1]
    for row, caption in enumerate(CAPTIONS):
        wanted = plain(tokenizer, caption)
        assert labels[row].tolist() == wanted + [IGNORE] * (labels.shape[1] - len(wanted))


def test_the_old_run_ignores_the_pad_id_wherever_it_stands_and_the_new_one_does_not(tokenizer):
    """Padding is the end token. The earlier trainer ignored by id, so one inside a caption was ignored as well."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    caption = f"red{tokenizer.eos_token}circle"
    wanted = plain(tokenizer, caption)
    inside = wanted.index(tokenizer.eos_token_id)
    old = CaptionTokenizer(tokenizer, 64, train_eos=False)([caption])[1][0]
    new = CaptionTokenizer(tokenizer, 64, train_eos=True)([caption])[1][0]
    assert old[inside] == IGNORE and old[inside + 1] == wanted[inside + 1]
    assert new[inside] == tokenizer.eos_token_id and new[len(wanted)] == tokenizer.eos_token_id


@pytest.mark.parametrize("train_eos", [True, False])
def test_long_captions_are_cut_and_counted_without_an_end_token(tokenizer, train_eos):
    long, short = " ".join(["red", "circle"] * 30), "red"
    ids, labels, cut = CaptionTokenizer(tokenizer, 12, train_eos)([long, short, long])
    assert cut == 2
    assert ids.shape == labels.shape == (3, 12)
    assert labels[0].tolist() == plain(tokenizer, long)[:12]


def test_a_caption_that_just_fits_is_not_counted_as_cut(tokenizer):
    tokens = len(plain(tokenizer, CAPTIONS[0]))
    for train_eos in (True, False):
        assert CaptionTokenizer(tokenizer, tokens + train_eos, train_eos)([CAPTIONS[0]])[2] == 0
        assert CaptionTokenizer(tokenizer, tokens + train_eos - 1, train_eos)([CAPTIONS[0]])[2] == 1


@pytest.mark.parametrize(("limit", "wanted"), [(40, [40, 32]), (64, [64, 32]), (20, [20]), (1, [1])])
def test_batches_come_in_few_lengths_and_never_above_the_limit(tokenizer, limit, wanted):
    make = CaptionTokenizer(tokenizer, limit, train_eos=True)
    lengths = {make([" ".join(["red"] * n)])[0].shape[1] for n in range(0, 2 * limit)}
    assert sorted(lengths, reverse=True) == wanted == padded_lengths(limit)


def test_caption_tokens_round_trip_through_a_saved_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    make = CaptionTokenizer(load_tokenizer(tmp_path / "tokenizer"), 64, train_eos=True)
    ids, labels, _ = make(CAPTIONS)
    assert torch.equal(ids, CaptionTokenizer(tokenizer, 64, train_eos=True)(CAPTIONS)[0])
    for row, caption in enumerate(CAPTIONS):
        assert make.decode(ids[row][labels[row] != IGNORE].tolist()) == caption
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_caption_lengths_count_neither_end_token_nor_cut(tokenizer):
    make = CaptionTokenizer(tokenizer, 4, train_eos=True)
    assert caption_lengths(make, CAPTIONS).tolist() == [len(plain(tokenizer, caption)) for caption in CAPTIONS]
