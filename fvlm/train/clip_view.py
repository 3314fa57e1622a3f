"""A picture of one clip: its frames, where queries look, and the next frames as they are and as they were foreseen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fvlm.data.latents import BlockTransform

GAP = 32
"""Between frames there is one part in so many of their width."""
GREY = (0.3, 0.6, 0.1)


@dataclass(frozen=True)
class ClipView:
    """What the model sees in one clip, says of it and foresees.

    frames:            [T, H, W, 3] uint8
    coarse, fine:      [T, rows, columns] attention on patches
    caption, said:     the true text and the model's
    codec:             of the latents
    latents:           [T, C, h, w] float32, as stored
    predicted:         the same, each predicted from those before it
    """

    clip_id: str
    frames: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray
    caption: str
    said: str
    codec: str
    latents: np.ndarray
    predicted: np.ndarray


def draw(view: ClipView, lines: Sequence[str]) -> bytes:
    """A PNG with a column a frame, under `lines`."""
    # Not above: a rank's start does not wait for its import. Not pyplot: that is for one thread of a process.
    from matplotlib.figure import Figure

    true, foreseen = pictures_of_latents(view)
    how = "" if view.codec == BlockTransform.name else "\nfalse colours"
    # One scale for both, so that they can be compared.
    top = float(max(view.coarse.max(), view.fine.max()))
    rows = [
        ("frames", view.frames),
        ("coarse gaze", gaze_on_frames(view.frames, view.coarse, top)),
        ("fine gaze", gaze_on_frames(view.frames, view.fine, top)),
        (f"latents{how}", true),
        (f"foreseen{how}", foreseen),
    ]
    t = len(view.frames)
    figure = Figure(figsize=(1.5 * t + 0.5, 1.5 * len(rows) + 0.3 * len(lines)), layout="constrained")
    for axis, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        axis.imshow(side_by_side(images, view.frames.shape[2]), interpolation="nearest", aspect="equal")
        axis.set(xticks=[], yticks=[], ylabel=label)
        axis.set_frame_on(False)
    figure.suptitle("\n".join(lines), fontsize=10)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()


def gaze_on_frames(frames: np.ndarray, attention: np.ndarray, top: float) -> np.ndarray:
    """[T, H, W, 3] uint8: grey frames under the attention on their patches, of which `top` is the brightest."""
    from matplotlib import colormaps

    height, width = frames.shape[1:3]
    rows, columns = attention.shape[1:]
    of_pixel = attention[:, np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width]
    colours = colormaps["inferno"](of_pixel / max(top, 1e-12))[..., :3] * 255
    return (0.4 * (frames @ np.array(GREY))[..., None] + 0.6 * colours).astype(np.uint8)


def pictures_of_latents(view: ClipView) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted latents as pictures [T, h, w, 3] uint8: decoded where that needs no weights.

    Otherwise the first three channels are red, green and blue, both with the scale of the true ones.
    """
    predicted = np.nan_to_num(view.predicted)
    if view.codec == BlockTransform.name:
        codec = BlockTransform()
        return codec.decode(view.latents), codec.decode(predicted)
    shown = np.minimum(np.arange(3), view.latents.shape[1] - 1)
    centre = view.latents[:, shown].mean((0, 2, 3))[:, None, None]
    spread = view.latents[:, shown].std((0, 2, 3))[:, None, None] + 1e-6

    def colours(latents: np.ndarray) -> np.ndarray:
        scaled = (latents[:, shown] - centre) / (4 * spread) + 0.5  # two standard deviations either way
        return (255 * scaled.clip(0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)

    return colours(view.latents), colours(predicted)


def side_by_side(images: np.ndarray, wide: int) -> np.ndarray:
    """[T, H, W, 3] uint8 -> one picture of them in a row on white, each about `wide` pixels wide."""
    times = max(1, wide // images.shape[2])
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    t, height, width = images.shape[:3]
    gap = max(1, width // GAP)
    row = np.full((height, t * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        row[:, i * (width + gap) : i * (width + gap) + width] = image
    return row
