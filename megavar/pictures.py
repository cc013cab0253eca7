"""Pictures with words: grids of images whose rows and columns are named."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2
LEAST_SIDE = 64
"""Pixels to which smaller images are enlarged, so that they can be looked at."""
_TEXT = 13
_INK = (30, 35, 48)


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    caption: str = "",
) -> Image.Image:
    """Images in rows, with a name above each column, one left of each row, and a caption below.

    Args:
        rows: uint8 [H, W, 3] images of one size; rows may be of different lengths.
        columns: names above; too long ones are cut.
        names: names on the left, where there are any.
    """
    side = rows[0][0].shape[1]
    factor = max(1, LEAST_SIDE // side)
    height, width = rows[0][0].shape[0] * factor, side * factor
    font = ImageFont.load_default(_TEXT)
    left = max([0, *(int(font.getlength(name)) + 12 for name in names if name)])
    top, across = (20 if any(columns) else GAP), max(map(len, rows))
    least = int(font.getlength(caption)) + 12 if caption else 0
    size = (max(left + across * (width + GAP) + GAP, least), top + len(rows) * (height + GAP) + (22 if caption else 0))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns[:across]):
        draw.text((left + column * (width + GAP) + width // 2, 9), _cut(name, width, font), _INK, font, anchor="mm")
    for row, images in enumerate(rows):
        y = top + row * (height + GAP)
        if row < len(names):
            draw.text((left - 6, y + height // 2), names[row], _INK, font, anchor="rm")
        for column, image in enumerate(images):
            enlarged = np.repeat(np.repeat(image, factor, 0), factor, 1)
            canvas.paste(Image.fromarray(enlarged), (left + column * (width + GAP) + GAP, y))
    if caption:
        draw.text((6, size[1] - 11), caption, _INK, font, anchor="lm")
    return canvas


def stacked(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one width below each other, each under its name."""
    width = max(picture.width for _, picture in pictures)
    scaled = [
        (name, picture.resize((width, max(1, round(picture.height * width / picture.width)))))
        for name, picture in pictures
    ]
    canvas = Image.new("RGB", (width, sum(picture.height + 24 for _, picture in scaled)), "white")
    draw, y = ImageDraw.Draw(canvas), 0
    for name, picture in scaled:
        draw.text((4, y + 12), name, _INK, ImageFont.load_default(_TEXT), anchor="lm")
        canvas.paste(picture, (0, y + 24))
        y += picture.height + 24
    return canvas


def _cut(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
