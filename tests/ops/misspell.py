"""One key of a file, spelt wrong: what every validation has to notice."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def misspell(path: Path, key: str) -> None:
    """Double the last letter of the first `key:` or `"key":` in the file, comments left out."""
    place = re.compile(rf'^([^#\n]*[\s{{,-]|)("?{re.escape(key)})("?:)', re.MULTILINE)
    text, times = place.subn(rf"\g<1>\g<2>{key[-1]}\g<3>", path.read_text(), count=1)
    assert times == 1, f"{path} has no key {key}"
    path.write_text(text)


def every_misspelling(tree: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(where, a copy of the whole tree with the last letter of that key doubled), for every key in it."""
    for where in list(keys(tree, at)):
        broken = copy.deepcopy(tree)
        holder = broken
        for step in where[:-1]:
            holder = holder[step]
        name = where[-1]
        holder[name + name[-1]] = holder.pop(name)
        yield where, broken


def keys(tree: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every key of every object in the tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        if isinstance(tree, dict):
            yield (*at, name)
        yield from keys(value, (*at, name))
