"""Pretrained weights: safetensors files whose every tensor has its place in the model, or an error that says why not.

Headers alone are enough to know whether they fit, so that is known before anything is loaded (`require_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from fvlm.errors import UserError
from fvlm.hub_files import ModelFiles, read_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = ("F64", "F32", "F16", "BF16")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
MASK = "embeddings.mask_token"
"""DINOv2's, which only its own training uses: a file may lack it (zeros then) or have it where the model has none."""
NAMED = 3
"""Keys of each kind that an error names."""

_ATTENTION = re.compile(r"^(encoder\.layer\.\d+\.attention)\.(?:attention\.(query|key|value)|output\.dense)\.")
_NOT_OURS = {
    "vision": re.compile(r"classifier\.(weight|bias)"),  # of a DINOv2 that was published with a classifier
    "language": re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),  # older files; it is computed
}
"""Names of a file that the model rightly does without."""
_ANCHORS = {"vision": "embeddings.cls_token", "language": "embed_tokens.weight"}
"""The name by which a prefix is known that all names have."""
_GATED = re.compile(r"^(encoder\.layer\.\d+\.mlp)\.weights_in\.(weight|bias)$")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> torch.Tensor:
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.key)
        return tensor


def require_weights(part: str, module: nn.Module, files: ModelFiles) -> None:
    """Raises UserError, naming file and key, unless the files have every tensor of `module` and no other.

    part: "vision" or "language"; module: may be on the meta device
    """
    _match(part, module, stored_tensors(files), files)


def load_weights(part: str, module: nn.Module, files: ModelFiles) -> None:
    """Fill `module`, made under `ParametersOnMeta`, in float32. Raises UserError as `require_weights` does."""
    state = {}
    for name, (stored, rows) in _match(part, module, stored_tensors(files), files).items():
        tensor = stored.read()
        value = tensor[rows].to(torch.float32, copy=True)  # a copy: the file's pages may change under a mapped one
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{stored.path}: {stored.key} holds NaN or infinity. Fetch the file again.")
        state[name] = value
    for name, parameter in module.named_parameters():
        if name == MASK and name not in state:
            state[name] = torch.zeros(parameter.shape)
    module.load_state_dict(state, strict=False, assign=True)
    if part == "language":
        module.tie_weights()  # type: ignore[operator]  # where its config ties them
    left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    assert not left, f"not filled: {left}"


def stored_tensors(files: ModelFiles) -> dict[str, Stored]:
    """Key -> what the headers say of it. Raises UserError: no safetensors, cut short, a shard that is missing."""
    whole = files.find(WEIGHTS)
    if whole:
        return _header(whole)
    index = files.find(INDEX)
    if index is None:
        pickled = next((name for name in PICKLES if files.is_folder and files.find(name)), None)
        if pickled:
            raise UserError(
                f"{files.where}: has {pickled} and no {WEIGHTS}. A pickle can run code, so it is not read: save the "
                "model again with transformers' save_pretrained, which writes safetensors."
            )
        files.path(WEIGHTS, INDEX)  # says what is wrong
    assert index is not None
    of_key = read_json(index).get("weight_map")
    if not isinstance(of_key, dict) or not of_key or not all(isinstance(name, str) for name in of_key.values()):
        raise UserError(f"{index}: has no weight_map from keys to files. Fetch it again.")
    return _shards(index, of_key, files)


def _shards(index: Path, of_key: dict[str, str], files: ModelFiles) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for name in sorted(set(of_key.values())):
        if Path(name).name != name or (path := files.find(name)) is None:
            raise UserError(f"{index}: names {name!r}, which is not there. Fetch that file too.")
        for key, stored in _header(path).items():
            if key in found:
                raise UserError(f"{index}: {key} is in {found[key].path.name} and in {name}. Fetch the files again.")
            found[key] = stored
    lacking = [key for key, name in of_key.items() if key not in found or found[key].path.name != name]
    if lacking:
        raise UserError(f"{index}: {of_key[lacking[0]]} lacks {_some(lacking)}, which the index says it has. "
                        "The files are not of one model: fetch them again.")  # fmt: skip
    return found


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (it is no dict)
            return {key: Stored(path, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: no whole safetensors file, cut short or something else ({str(error).splitlines()[0]}). "
            "Fetch it again."
        ) from error


def _match(
    part: str, module: nn.Module, stored: dict[str, Stored], files: ModelFiles
) -> dict[str, tuple[Stored, slice]]:
    """Parameter's name -> the tensor that fills it, and which of its rows. Raises UserError."""
    wanted = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    where = files.where
    named = _by_our_names(part, stored, wanted, where)
    tied = part == "language" and HEAD not in wanted
    if tied and EMBEDDINGS not in named and HEAD in named:  # safetensors keeps one of two that are the same
        named[EMBEDDINGS] = named.pop(HEAD)
    foreign = [name for name in named if name not in wanted and not _may_be_left(part, name, tied)]
    missing = [name for name in wanted if name not in named and name != MASK]
    other = [name for name in wanted if name in named and _shape(*named[name]) != wanted[name]]
    coded = [name for name in wanted if name in named and named[name][0].dtype not in DTYPES]
    if missing or foreign:
        lines = [f"lacks {len(missing)} of the model's {len(wanted)} tensors ({_some(missing)})"] if missing else []
        lines += [f"has {len(foreign)} that the model has no place for ({_some(foreign)})"] if foreign else []
        paths = sorted({tensor.path for tensor in stored.values()})
        raise UserError(
            f"{paths[0]}{' and its like' if paths[1:] else ''}: {' and '.join(lines)}. These are not the weights of "
            "its config.json. Fetch both again, or save the model itself, without what is wrapped around it."
        )
    if other:
        name = other[0]
        raise UserError(
            f"{named[name][0].path}: {named[name][0].key} is {_shape(*named[name])}, and config.json makes it "
            f"{wanted[name]} ({len(other)} tensors are of other shapes). Weights and config.json are of two models."
        )
    if coded:
        of = named[coded[0]][0]
        raise UserError(f"{of.path}: {of.key} is stored as {of.dtype}; only floats ({', '.join(DTYPES)}) can be "
                        "trained. Take the model that was not quantised.")  # fmt: skip
    if tied and HEAD in named:
        _require_equal(named[HEAD][0], named[EMBEDDINGS][0])
    return {name: place for name, place in named.items() if name in wanted}


def _by_our_names(
    part: str, stored: dict[str, Stored], wanted: dict[str, tuple[int, ...]], where: str
) -> dict[str, tuple[Stored, slice]]:
    """The tensors under the names of transformers' module. Raises UserError when two have the same.

    A prefix that stands before the one known name ("module.", "_orig_mod.", "dinov2.") is left out everywhere; names of
    a Llama without its head get their "model.".
    """
    anchors = [key for key in stored if key == _ANCHORS[part] or key.endswith(f".{_ANCHORS[part]}")]
    prefix = anchors[0].removesuffix(_ANCHORS[part]) if len(anchors) == 1 else ""
    inner = ""
    if part == "language" and anchors:
        inner = "" if prefix.endswith("model.") else "model."
        prefix = prefix.removesuffix("model.")
    rename = _renaming(wanted)
    named: dict[str, tuple[Stored, slice]] = {}
    for key, tensor in stored.items():
        name = inner + key.removeprefix(prefix) if key.startswith(prefix) else key
        for new, rows in rename(name, tensor):
            if new in named:
                raise UserError(f"{where}: {named[new][0].key} and {key} are both {new}. Fetch the files again.")
            named[new] = (tensor, rows)
    return named


def _renaming(wanted: dict[str, tuple[int, ...]]) -> Callable[[str, Stored], list[tuple[str, slice]]]:
    """-> from a name in a file to the module's names, and which rows of the tensor each has.

    Files have DINOv2's names of transformers 4; the module has those of the installed release.
    """
    by_meaning = {_meaning(name): name for name in wanted}

    def rename(name: str, tensor: Stored) -> list[tuple[str, slice]]:
        gated = _GATED.match(name)
        if gated and name not in wanted and tensor.shape:
            half = tensor.shape[0] // 2
            ends = ("gate_proj", slice(half)), ("up_proj", slice(half, None))
            return [(f"{gated[1]}.{end}.{gated[2]}", rows) for end, rows in ends]
        name = re.sub(r"\.mlp\.weights_out\.", ".mlp.down_proj.", name) if name not in wanted else name
        return [(by_meaning.get(_meaning(name), name), slice(None))]

    return rename


def _meaning(name: str) -> str:
    """One spelling for the attention of DINOv2 in transformers 4 and 5."""
    match = _ATTENTION.match(name)
    if match is None:
        return name
    letter = (match[2] or "o")[0]  # query -> q, key -> k, value -> v
    return f"{match[1]}.{letter}_proj.{name[match.end() :]}"


def _may_be_left(part: str, name: str, tied: bool) -> bool:
    return name == MASK or (tied and name == HEAD) or _NOT_OURS[part].fullmatch(name) is not None


def _require_equal(head: Stored, embeddings: Stored) -> None:
    if head.shape != embeddings.shape or not torch.equal(head.read(), embeddings.read()):
        raise UserError(
            f"{head.path}: {head.key} is not the same as {embeddings.key}, but config.json ties the two "
            "(tie_word_embeddings). One of the files is of another model: fetch both again."
        )


def _shape(stored: Stored, rows: slice) -> tuple[int, ...]:
    if not stored.shape:
        return ()
    return (len(range(*rows.indices(stored.shape[0]))), *stored.shape[1:])


def _some(names: list[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:NAMED]) + (", ..." if names[NAMED:] else "")


class ParametersOnMeta(TorchFunctionMode):
    """Tensors that parameters are made of have no contents; buffers, which are computed from numbers, have theirs."""

    _MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand})

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self._MAKERS and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)
