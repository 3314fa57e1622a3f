"""Which published models this trainer computes exactly as they were meant: DINOv2 to see, Llama to speak.

The step runs the layers' arithmetic itself (`fvlm.model.blocks`) and reads only the fields that Dinov2Config and
LlamaConfig have. A config.json that asks for more than that is refused by the field's name: dropped in silence, a
multiplier or a sliding window would make another model of the same weights.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config, LlamaConfig, PreTrainedModel

from fvlm.errors import UserError

KINDS: dict[str, Any] = {"language": LlamaConfig, "vision": Dinov2Config}
OPTIONS = {part: f"--model.{part}" for part in KINDS}
"""The two parts of a model that are published, and the options that name them."""

HARMLESS = set(
    """
    torch_dtype use_bfloat16 torchscript is_llama_config rope_theta rope_scaling transformers.js_config tokenizer_class
    max_sequence_length model_max_length max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens remove_invalid_values tf_legacy_loss
    finetuning_task task_specific_params prefix pruned_heads
    """.split()  # noqa: SIM905  (a list is four times as long)
)
"""Fields outside the two config classes that say nothing about what a model computes from its inputs, or, for
rope_theta and rope_scaling, that older files have and transformers understands."""
_NOTES = re.compile(r"_.*|transformers_.*|unsloth.*|.*_token_id|.*_token_index")
_FACTOR = re.compile(r"multiplier|scal|factor")
_NOT_KEPT = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "id2label", "label2id")
_FAULTS = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)


def read_config(part: str, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Every field of the model that a config.json describes, the defaults of transformers among them.

    part: "vision" or "language"; raw: the file's contents; where: the file, for errors
    Raises UserError, naming file and field, for a model that this trainer does not compute, and for fields that make
    no sense. What is returned can be stored as JSON.
    """
    kind = KINDS[part]
    if raw.get("model_type") != kind.model_type:
        raise UserError(
            f"{OPTIONS[part]}: {where} says model_type {raw.get('model_type')!r}; this trainer computes "
            f"{kind.model_type!r} models alone, and of others it would drop what makes them others. "
            f"Take a {'DINOv2' if part == 'vision' else 'Llama'}."
        )
    foreign = [key for key in raw.keys() - kind().to_dict().keys() if not _says_nothing(key, raw[key])]
    if foreign:
        fields = ", ".join(f"{key} {raw[key]!r}" for key in sorted(foreign))
        raise UserError(
            f"{OPTIONS[part]}: {where} has fields that no {kind.model_type} has and that would be dropped: {fields}. "
            "Take another model; if a field changes nothing in what the model computes, remove it from a copy."
        )
    try:
        config = kind.from_dict(raw)
        fields = json.loads(json.dumps(config.to_dict()))
    except _FAULTS as error:
        raise UserError(f"{OPTIONS[part]}: {where} describes no model ({_first_line(error)}). Mend it.") from error
    require_computed(part, config)
    if part == "vision":
        _require_square_rgb(config, where)
    return {key: value for key, value in fields.items() if key not in _NOT_KEPT}


def require_computed(part: str, config: Any) -> None:
    """Raises UserError for a DINOv2 or a Llama whose layers do what the step does not.

    config: transformers' own
    """
    if part == "language":
        if getattr(config, "attention_dropout", 0.0):
            raise UserError(
                "model.language: this language model has attention_dropout above 0, and a run that is resumed could "
                "not repeat it. Set it to 0."
            )
        return
    if config.hidden_dropout_prob or config.attention_probs_dropout_prob or config.drop_path_rate:
        raise UserError(
            "model.vision: this DINOv2 has dropout or drop path above 0; the query path has none. Set them to 0."
        )
    if not config.use_swiglu_ffn and config.hidden_act != "gelu":  # as `blocks.vision_layer` reads them
        raise UserError(
            f"model.vision: this DINOv2's hidden_act is {config.hidden_act!r}; the query path knows gelu and SwiGLU."
        )


def make_module(part: str, config: dict[str, Any], where: str) -> PreTrainedModel:
    """The module, in float32 whatever the files are in, with transformers' random weights.

    config: as `read_config` returns it. Raises UserError when no module can be made of it.
    """
    auto = AutoModel if part == "vision" else AutoModelForCausalLM
    try:
        module: PreTrainedModel = auto.from_config(
            KINDS[part].from_dict(config), attn_implementation="sdpa", dtype=torch.float32
        )
    except (*_FAULTS, RuntimeError) as error:
        raise UserError(f"{OPTIONS[part]}: {where} describes no model ({_first_line(error)}). Mend it.") from error
    return module


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a field can be left out: of the harmless ones, or with a value that changes nothing."""
    if key in HARMLESS or _NOTES.fullmatch(key):
        return True
    return value in (None, False, 0, "", [], {}) or (value == 1 and _FACTOR.search(key) is not None)


def _require_square_rgb(config: Any, where: str) -> None:
    """Raises UserError: frames are RGB, patches and the table of positions square."""
    for field in ("image_size", "patch_size"):
        value = getattr(config, field)
        if not isinstance(value, int) and len(set(value)) != 1:
            raise UserError(f"--model.vision: {where} has {field} {value}; this trainer knows square ones alone.")
    if config.num_channels != 3:
        raise UserError(f"--model.vision: {where} has num_channels {config.num_channels}; frames are RGB, which has 3.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
