"""Where the two pretrained parts come from: the Hugging Face hub by name, or the same architectures at random."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Dinov2Config, LlamaConfig, PreTrainedModel

from fvlm.config import ModelConfig
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM

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


def build_model(
    config: ModelConfig, latent_shape: tuple[int, int, int], seed: int, pretrained: bool = True
) -> FoveatedVLM:
    """The whole model in float32 on the CPU. What is not pretrained is drawn from `seed`, the same on every rank.

    pretrained=False leaves out the hub's weights, for a model that a checkpoint is about to fill.
    Raises UserError when a name is unknown or weights cannot be had, with the cure.
    """
    torch.manual_seed(seed)
    if config.init == "random" or not pretrained:
        vision = AutoModel.from_config(architecture(config.vision, "model.vision"), attn_implementation="sdpa")
        language = AutoModelForCausalLM.from_config(
            architecture(config.language, "model.language"), attn_implementation="sdpa"
        )
    else:
        vision = _pretrained(AutoModel, config.vision, "model.vision")
        language = _pretrained(AutoModelForCausalLM, config.language, "model.language")
    check_families(vision, language, config)
    return FoveatedVLM(vision, language, config, latent_shape)


def architecture(name: str, key: str) -> Any:
    """The transformers config behind a name: from the table above, a local folder, or the hub."""
    if name in ARCHITECTURES:
        kind = Dinov2Config if "dinov2" in name else LlamaConfig
        return kind(**ARCHITECTURES[name])
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--{key} {name!r}: neither a folder with a config.json, nor reachable on the hub, nor one of "
            f"{', '.join(ARCHITECTURES)}."
        ) from error


def vocabulary_size(config: ModelConfig) -> int:
    return int(architecture(config.language, "model.language").vocab_size)


def _pretrained(auto: Any, name: str, key: str) -> PreTrainedModel:
    try:
        return auto.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--{key} {name!r}: its weights are neither a local folder nor reachable on the hub "
            f"({str(error).splitlines()[0]}). Download them where there is a network "
            f"(`hf download {name}`) and copy the cache, give a folder, or train from scratch with --model.init random."
        ) from error


def check_families(vision: PreTrainedModel, language: PreTrainedModel, config: ModelConfig) -> None:
    if vision.config.model_type != "dinov2":
        raise UserError(
            f"--model.vision {config.vision!r} is a {vision.config.model_type}; the query path needs a dinov2."
        )
    inner = getattr(language, "model", None)
    if inner is None or not hasattr(inner, "embed_tokens") or not hasattr(language, "lm_head"):
        raise UserError(
            f"--model.language {config.language!r} ({language.config.model_type}) is not laid out like a Llama "
            "(.model.embed_tokens, .lm_head). Take a language model of the Llama family."
        )
