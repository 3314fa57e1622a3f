"""Read a dashboard as Grafana's own library does, write it again, and print the keys that got lost: it knows none such.

Runs in the checkers' environment: python grafana_keys.py dashboard.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def lost(before: Any, after: Any, at: str = "$") -> Iterator[str]:
    if isinstance(before, dict):
        for key, value in before.items():
            if isinstance(after, dict) and key in after:
                yield from lost(value, after[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}"
    elif isinstance(before, list):
        for number, value in enumerate(before):
            yield from lost(value, after[number] if isinstance(after, list) else None, f"{at}[{number}]")


def main() -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    before = json.loads(Path(sys.argv[1]).read_text())
    after = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(before)))
    for place in lost(before, after):
        print(place)


if __name__ == "__main__":
    main()
