"""Paths of a command line become absolute here, before anything reads them, and nowhere else.

Ray's processes run in folders of their own, where a relative path would mean another place, or none.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from fvlm.config import MODEL_NAMES, Config, is_uri
from fvlm.errors import UserError

CONFIG_PATHS = (
    "data.path",
    "runs_dir",
    "data.cache_dir",
    "eval.path",
    "import_checkpoint",
    "train.checkpoint_dir",
    "train.compile_cache",
    *MODEL_NAMES,
)
"""Every key of a config that is a path, or may be one."""
OF_EACH_NODE = ("train.compile_cache",)
"""Where "~" is not this user's home but that of whoever trains on a node; fvlm.train expands it there."""


def absolute(option: str, path: str) -> str:
    """`path`, seen from this process's folder; "~" is this user's home. URIs and empty strings stay as they are.

    option: the command line's name for it
    Raises UserError for a relative path in a submitted job, and for the home of an unknown user.
    """
    if not path or is_uri(path):
        return path
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{option} {path!r}: there is no such home folder. Give an absolute path.") from error
    if not expanded.is_absolute() and in_job_copy():
        raise UserError(
            f"{option} {path!r} is relative, but a submitted job runs in a temporary copy of the code; "
            "what it wrote there would be lost. Give an absolute path that all nodes see."
        )
    return str(expanded.absolute())


def absolute_unless_name(option: str, name: str) -> str:
    """As `absolute`, for what may be a name as well (of the hub, or of ours): that stays. Raises UserError."""
    is_path = bool(name) and (name.startswith((".", "~", "/")) or Path(name).is_dir())
    return absolute(option, name) if is_path else name


def absolute_paths(config: Config) -> Config:
    """The config with paths that mean the same in every process. Raises UserError as `absolute` does."""
    for key in CONFIG_PATHS:
        path = get(config, key)
        if key in OF_EACH_NODE and path.startswith("~"):
            continue
        make = absolute_unless_name if key in MODEL_NAMES else absolute
        config = _with(config, key, make(option(key), path))
    return config


def fixed_paths(config: Config) -> list[str]:
    """Options for every path of `config` that means the same in any folder: ["--data.path", "/data/clips", ...]."""
    words = []
    for key in CONFIG_PATHS:
        path = get(config, key)
        if is_uri(path) or Path(path).is_absolute():
            words += [option(key), path]
    return words


def option(key: str) -> str:
    """ "data.cache_dir" -> "--data.cache-dir"."""
    return f"--{key.replace('_', '-')}"


def get(config: Config, key: str) -> str:
    """The value of a dotted key that is a path."""
    section, _, name = key.rpartition(".")
    return str(getattr(getattr(config, section) if section else config, name))


def _with(config: Config, key: str, path: str) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{name: path})  # type: ignore[arg-type]
    changed = dataclasses.replace(getattr(config, section), **{name: path})
    return dataclasses.replace(config, **{section: changed})


def in_job_copy() -> bool:
    """Whether this process runs in the working directory that Ray unpacked for a job."""
    return re.search(r"/runtime_resources/working_dir_files/", str(Path.cwd())) is not None
