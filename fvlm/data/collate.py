"""From what the ingest ships to what the model takes. Runs in the training process and decodes nothing."""

from __future__ import annotations

import warnings

import torch

from fvlm.batch import Batch
from fvlm.data.read import RawBatch
from fvlm.data.schema import DatasetSpec
from fvlm.data.text import CaptionTokenizer

# Blocks in the object store are read-only, which a torch tensor cannot say; nobody writes into a batch.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Collator:
    """RawBatch -> Batch: tokenises the captions, shares the memory of frames and latents. Counts cut captions."""

    def __init__(self, spec: DatasetSpec, tokenizer: CaptionTokenizer):
        self.dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[spec.latent_dtype]
        self.tokenizer = tokenizer
        self.captions_cut = 0

    def __call__(self, raw: RawBatch) -> Batch:
        ids, labels, cut = self.tokenizer([str(caption) for caption in raw["caption"]])
        self.captions_cut += cut
        return Batch(
            torch.from_numpy(raw["frames"]),
            torch.from_numpy(raw["latents"]).view(self.dtype),
            ids,
            labels,
            # Copies: a view into a block would keep the whole block in the object store.
            tuple(str(clip) for clip in raw["clip_id"]),
        ).check()
