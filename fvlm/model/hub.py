"""Where the two pretrained parts come from: the Hugging Face hub, a folder, or the same architectures at random.

A run keeps the architecture that it began with (`Architecture`, in its folder) and is built from that ever after, so
neither another file on the hub nor a machine without a network changes what it computes.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, LlamaConfig

from fvlm.config import ARCHITECTURE, Config, ModelConfig, real_folder
from fvlm.errors import UserError
from fvlm.files import unwritable_is_a_user_error, write_atomic
from fvlm.hub_files import CONFIG, ModelFiles, NotHere, read_json
from fvlm.model.families import OPTIONS, make_module, read_config
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.weights import ParametersOnMeta, load_weights, require_weights

_DINOV2: dict[str, Any] = {"image_size": 518, "patch_size": 14, "num_hidden_layers": 12}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

# What the hub's config.json files say, so that `init="random"` needs no network. The tiny ones are ours.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "facebook/dinov2-small": _DINOV2 | {"hidden_size": 384, "num_attention_heads": 6},
    "facebook/dinov2-base": _DINOV2 | {"hidden_size": 768, "num_attention_heads": 12},
    "tiny-dinov2": {
        "image_size": 112, "patch_size": 14, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2
    | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "HuggingFaceTB/SmolLM2-360M-Instruct": _SMOLLM2
    | {
        "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
        "num_attention_heads": 15, "num_key_value_heads": 5,
    },
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _SMOLLM2
    | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 130_000.0},
    },
    "tiny-llama": _SMOLLM2
    | {
        "vocab_size": 512, "max_position_embeddings": 128, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One of the two pretrained models.

    name: as the run's config says it; revision: a commit of the hub, or "" where no hub was asked; config: every field
    of its transformers config
    """

    name: str
    revision: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What the two models compute, all but their weights."""

    language: Part
    vision: Part

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Architecture:
        """Raises UserError when the file is damaged."""
        raw = read_json(path)
        try:
            return cls(**{part: Part(**raw[part]) for part in OPTIONS})
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}). Restore it, or use another --run name.") from error

    def part(self, part: str) -> Part:
        chosen: Part = getattr(self, part)
        return chosen

    def files(self, part: str, local_only: bool = False) -> ModelFiles:
        """Of "vision" or "language", at the commit that is pinned."""
        return ModelFiles(OPTIONS[part], self.part(part).name, self.part(part).revision, local_only)


def published_architecture(config: ModelConfig) -> Architecture:
    """What a new run with pretrained weights begins with: the config.json of folder or hub, at the newest commit.

    Raises UserError: a file cannot be had, or describes what this trainer does not compute.
    """
    return Architecture(**{part: published_part(part, getattr(config, part)) for part in reversed(OPTIONS)})


def named_architecture(config: ModelConfig) -> Architecture:
    """By names alone: from the table above, which needs no network, or the config.json of a folder or the hub.

    Raises UserError.
    """
    return Architecture(**{part: _named_part(part, getattr(config, part)) for part in OPTIONS})


def kept_architecture(config: Config) -> Architecture | None:
    """The one that the run began with, from its folder; None where there is none of the config's models.

    Raises UserError when the file is damaged.
    """
    path = config.run_dir / ARCHITECTURE
    if not path.exists():
        return None
    kept = Architecture.read(path)
    same = all(real_folder(kept.part(part).name) == real_folder(getattr(config.model, part)) for part in OPTIONS)
    return kept if same else None


def keep_architecture(config: Config, begun: bool) -> Architecture:
    """The run's architecture, which its folder has from now on. Raises UserError.

    begun: the run has a checkpoint. Until then a folder of a model may be mended, so it is read again; the commit of
    the hub is pinned from the first start on.
    """
    kept = kept_architecture(config)
    if kept and begun:
        return kept
    # A run of an earlier release has no such file, and was resumed by the names of its models.
    fresh = _named_part if begun or config.model.init == "random" else published_part
    parts = {}
    for part in OPTIONS:
        pinned = kept.part(part) if kept and kept.part(part).revision else None
        parts[part] = pinned or fresh(part, getattr(config.model, part))
    architecture = Architecture(**parts)
    if architecture != kept:
        with unwritable_is_a_user_error(config.run_dir):
            write_atomic(config.run_dir / ARCHITECTURE, architecture.to_json())
    return architecture


def published_part(part: str, name: str, local_only: bool = False) -> Part:
    """By the config.json of a folder or the hub. local_only: NotHere is raised where it would have to be fetched."""
    files = ModelFiles(OPTIONS[part], name, local_only=local_only)
    path = files.path(CONFIG)
    return Part(name, files.revision, read_config(part, read_json(path), str(path)))


def _named_part(part: str, name: str) -> Part:
    if name in ARCHITECTURES:
        kind = Dinov2Config if "dinov2" in name else LlamaConfig
        return Part(name, "", read_config(part, ARCHITECTURES[name] | {"model_type": kind.model_type}, f"{name!r}"))
    try:
        return published_part(part, name)
    except NotHere as error:
        raise UserError(
            f"{OPTIONS[part]} {name!r}: neither a folder with a config.json, nor reachable on the hub, nor one of "
            f"{', '.join(ARCHITECTURES)}."
        ) from error


def build_model(
    config: ModelConfig,
    latent_shape: tuple[int, int, int],
    seed: int,
    pretrained: bool = True,
    architecture: Architecture | None = None,
) -> FoveatedVLM:
    """The whole model in float32 on the CPU. What is not pretrained is drawn from `seed`, the same on every rank.

    pretrained=False leaves out the hub's weights, for a model that a checkpoint is about to fill.
    architecture: the run's (`kept_architecture`); None: that of the names in `config`
    Raises UserError when a name is unknown or weights cannot be had or do not fit, with the cure.
    """
    torch.manual_seed(seed)
    from_hub = pretrained and config.init == "hub"
    if architecture is None:
        architecture = published_architecture(config) if from_hub else named_architecture(config)
    with ParametersOnMeta() if from_hub else contextlib.nullcontext():
        vision: Any = make_module("vision", architecture.vision.config, repr(config.vision))
        language = make_module("language", architecture.language.config, repr(config.language))
    if from_hub:  # which draws no random number
        load_weights("vision", vision, architecture.files("vision"))
        load_weights("language", language, architecture.files("language"))
    return FoveatedVLM(vision, language, config, latent_shape)


def vocabulary_size(config: ModelConfig) -> int:
    return int(_named_part("language", config.language).config["vocab_size"])


def require_pretrained(config: ModelConfig, architecture: Architecture, local_only: bool = False) -> None:
    """Raises UserError, naming file and key, unless the weights of both models are there and fit; fetches them.

    Reads headers, not weights. local_only: NotHere is raised where they would have to be fetched.
    """
    with torch.device("meta"):
        model = build_model(config, (1, 1, 1), 0, pretrained=False, architecture=architecture)
    for part, module in (("language", model.llm), ("vision", model.encoder.dino)):
        require_weights(part, module, architecture.files(part, local_only))
