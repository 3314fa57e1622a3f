"""Where the tests leave their pictures: in build/, or in FVLM_PICTURES. The README's are made anew by

FVLM_PICTURES=cluster/monitoring/pictures .venv/bin/python -m pytest -m ops tests/ops/test_browser.py
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image

from ops.tools import ROOT

KEPT = "FVLM_PICTURES" in os.environ
FOLDER = ROOT / os.environ.get("FVLM_PICTURES", "build/pictures")
LARGEST_BYTES = 200_000
COLOURS = 96


def save_small(png: bytes, path: Path) -> None:
    """Text and lines need few colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
