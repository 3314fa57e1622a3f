"""Small published models, written by transformers' own `save_pretrained`, and a hub that serves them."""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

END = "<|im_end|>"
TEXTS = [
    "a red circle moves left", "in 2024 and  in  1999 they were 12345 people", "3:45 pm, 10,000 steps (2x)",
    "é, ü, 😀👩‍👩‍👧 and   blanks", "tabs\tand\nlines", "don't, it's 7.5% of $100",
]  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 56, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 128,
}  # fmt: skip
SMOLLM2_EXTRAS = {
    "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "torch_dtype": "bfloat16",
    "transformers.js_config": {"dtype": {"model": "q4"}}, "_name_or_path": "x", "unsloth_fixed": True,
}  # fmt: skip
"""Fields like those of SmolLM2's own config.json that LlamaConfig does not have."""


def write_vision(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    Dinov2Model(Dinov2Config(**VISION | changes)).save_pretrained(folder)
    return folder


def write_language(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> Path:
    """With a tokenizer that splits digits, and declares a class that would not."""
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(**LANGUAGE | changes)).to(dtype).save_pretrained(folder, max_shard_size=shard)
    change_json(folder / "config.json", **SMOLLM2_EXTRAS | {"torch_dtype": str(dtype).removeprefix("torch.")})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, size: int = 400) -> None:
    """SmolLM2's pipeline on a vocabulary of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=letters.randint(3, 7))) for _ in range(500)]
    tokenizer.train_from_iterator(TEXTS * 5 + words * 3, trainer)
    assert tokenizer.get_vocab_size() == size
    raw = json.loads(tokenizer.to_str())
    # Tokens that only a pipeline uses which has lost the splitting of digits.
    for pair in (["2", "0"], ["1", "9"], ["\u0120", "1"], ["\u0120", "2"]):
        last = max(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
        number = raw["model"]["vocab"].pop(last)
        raw["model"]["merges"] = [merge for merge in raw["model"]["merges"] if "".join(merge) != last]
        raw["model"]["vocab"]["".join(pair)] = number
        raw["model"]["merges"].insert(0, pair)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    config = {
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": END, "pad_token": END,
        "unk_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 8192,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Any) -> None:
    """Write what `change` makes of the tensors, by their keys."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


class Hub:
    """Serves folders as models, as huggingface.co does: `models["owner/name"] = folder`."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.refuses: dict[str, tuple[int, str]] = {}
        """Name -> HTTP status and X-Error-Code."""
        self.asked: list[str] = []
        self.url = ""

    def commit(self, name: str) -> str:
        """Of the folder as it is now."""
        content = b"".join(path.read_bytes() for path in sorted(self.models[name].iterdir()))
        return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub in this process, which everything that asks one asks, with an empty cache."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.asked.append(self.path)
            name, _, rest = self.path.lstrip("/").partition("/resolve/")
            commit, _, file = rest.partition("/")
            if name in hub.refuses or name not in hub.models:
                status, code = hub.refuses.get(name, (401, "RepoNotFound"))
                return self.refuse(status, code)
            path = hub.models[name] / file
            if commit not in ("main", hub.commit(name)) or not path.is_file():
                return self.refuse(404, "EntryNotFound" if commit in ("main", hub.commit(name)) else "RevisionNotFound")
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", hub.commit(name))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)
            return None

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            server.shutdown()
