"""Captions -> token ids and labels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fvlm.batch import IGNORE
from fvlm.errors import UserError
from fvlm.files import TEMPORARY, fsync_dir
from fvlm.hub_files import ModelFiles, read_json

END = "<|im_end|>"
"""End of a text, and padding too, as in SmolLM2's own tokenizer."""
TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = ("special_tokens_map.json", "tokenizer_config.json")
LENGTH_STEP = 32
"""Captions are padded to a multiple of this, so that a compiled step meets few lengths."""


def padded_lengths(max_tokens: int) -> list[int]:
    """Every length that a batch's captions can have, the greatest first."""
    return [max_tokens, *range((max_tokens - 1) // LENGTH_STEP * LENGTH_STEP, 0, -LENGTH_STEP)]


class CaptionTokenizer:
    """Turns captions into what the batch contract asks for.

    With `train_eos` the end token follows every caption that was not cut, and is trained on. Without, nothing is
    appended and every position that holds the *pad id* is ignored, wherever it stands: the earlier trainer's labels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, train_eos: bool):
        if tokenizer.eos_token_id is None:
            raise UserError("model.language: its tokenizer has no end token, which captions need.")
        self.tokenizer, self.max_tokens, self.train_eos = tokenizer, max_tokens, train_eos
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = int(self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """-> ids [B, L] int64, labels [B, L] int64, and how many captions were longer than `max_tokens`."""
        encoded = self.tokenizer(list(captions), add_special_tokens=True)["input_ids"]
        if self.train_eos:
            encoded = [[*ids, self.eos_id] for ids in encoded]
        cut = sum(len(ids) > self.max_tokens for ids in encoded)
        encoded = [ids[: self.max_tokens] for ids in encoded]
        longest = max(map(len, encoded))
        length = min(-(-max(longest, 1) // LENGTH_STEP) * LENGTH_STEP, self.max_tokens)
        ids = torch.full((len(encoded), length), self.pad_id, dtype=torch.int64)
        labels = torch.full((len(encoded), length), IGNORE, dtype=torch.int64)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        if not self.train_eos:
            labels = torch.where(ids == self.pad_id, IGNORE, ids)
        return ids, labels, cut

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def train_tokenizer(captions: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from the captions at hand, for models without a published one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def published_tokenizer(files: ModelFiles) -> PreTrainedTokenizerFast:
    """The tokenizer.json of a model as it stands, with the special tokens that its other files name.

    Not by the class that tokenizer_config.json declares: transformers 5 builds that class's own pipeline, without, for
    example, SmolLM2's splitting of digits, so that numbers in captions would get other ids. Raises UserError.
    """
    path = files.path(TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the only class that this library raises
        raise UserError(f"{path}: no tokenizer, cut short or damaged ({error}). Fetch it again.") from error
    special: dict[str, str] = {}
    for name in SPECIAL_TOKENS:  # the later file wins
        found = files.find(name)
        raw = read_json(found) if found else {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = raw.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[key] = token
                if tokenizer.token_to_id(token) is None:
                    raise UserError(f"{found}: its {key} {token!r} is not in {path}. The two are of different models.")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def require_tokens_fit(tokenizer: PreTrainedTokenizerBase, embedding_rows: int, where: str) -> None:
    """Raises UserError when a token has an id for which the language model has no embedding."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    if largest >= embedding_rows:
        raise UserError(
            f"{where}: its token {token!r} has the id {largest}, and the language model has {embedding_rows} "
            "embeddings (vocab_size of config.json). Tokenizer and weights are of different models."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Whole or not at all, like everything a restart relies on."""
    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")
    tokenizer.save_pretrained(str(temporary))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    fsync_dir(folder.parent)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `save_tokenizer` wrote."""
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def caption_lengths(tokenizer: CaptionTokenizer, captions: Sequence[str]) -> np.ndarray:
    """[len(captions)] int64: tokens of each caption before cutting and without the end token."""
    return np.array([len(ids) for ids in tokenizer.tokenizer(list(captions))["input_ids"]])
