"""Whether a config goes on with the experiment that a stored one began, across releases of this code.

A key that the stored config lacks, because a later release added it, has the value that its preset gives it: a release
that adds a key lets the presets of old runs say what they did before. A key that this release no longer has cannot be
compared: the run goes on, and whoever starts it is told the key and its value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fvlm import presets
from fvlm.config import Config, flatten, identity


def stored_config(raw: Any) -> Config:
    """A config as a run folder keeps it, `Config.to_dict`'s JSON -> a Config: missing keys by its preset, unknown ones
    left out. Not validated. Raises TypeError that names the key whose value is of another kind."""
    base = _base(raw)
    config: Config = _filled(base, raw, "")
    return dataclasses.replace(config, run=config.run_name)


def changes_of_identity(raw: Any, config: Config) -> list[str]:
    """What may not change within a run and has, a text each; `raw`: the config that it began with."""
    now = identity(config.to_dict())
    before = identity(_base(raw, config.preset).to_dict()) | identity(raw)
    return [f"{key}: {before[key]!r} -> {now[key]!r}" for key in sorted(now) if before[key] != now[key]]


def unknown_keys(raw: Any) -> dict[str, Any]:
    """Of what may not change within a run: keys that this release does not have, with their values."""
    known = flatten(Config().to_dict())
    return {key: value for key, value in identity(raw).items() if key not in known}


def _base(raw: Any, preset: str = "") -> Config:
    """What the keys that `raw` lacks are taken from."""
    if not isinstance(raw, dict):
        raise TypeError(f"the config is {raw!r:.60}")
    name = raw.get("preset", preset)
    return presets.get(name) if isinstance(name, str) and name in presets.PRESETS else Config(preset=preset)


def _filled(base: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise TypeError(f"{prefix.rstrip('.') or 'the config'} is {values!r:.60}")
    given = {}
    for field in dataclasses.fields(base):
        if field.name not in values:
            continue
        value, default = values[field.name], getattr(base, field.name)
        if dataclasses.is_dataclass(default):
            given[field.name] = _filled(default, value, f"{prefix}{field.name}.")
        elif isinstance(default, tuple) and isinstance(value, list):
            given[field.name] = tuple(value)
        elif isinstance(value, int | float if isinstance(default, int | float) else type(default)):
            given[field.name] = value
        else:
            raise TypeError(f"{prefix}{field.name} is {value!r:.60}")
    return dataclasses.replace(base, **given)
