"""Pictures with words: grids of images whose rows and columns are named."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2
LEAST_SIDE, LEAST_SIDE_WITH_WORDS = 64, 160
"""Pixels to which smaller images are enlarged, so that they can be looked at, or words fit below."""
LINES = 3
"""Of words below an image."""
_TEXT, LINE = 13, 16
_INK = (30, 35, 48)


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    below: Sequence[Sequence[str]] = (),
    caption: str = "",
) -> Image.Image:
    """Images in rows, with a name above each column, one left of each row, words below images, and a caption.

    Args:
        rows: uint8 [H, W, 3] images of one size; rows may be of different lengths.
        columns: names above; too long ones are cut.
        names: names on the left, where there are any.
        below: what each image shows, in rows as the images; broken into lines, too many of which are cut.
        caption: below everything.
    """
    side = rows[0][0].shape[1]
    factor = max(1, -(-LEAST_SIDE_WITH_WORDS // side) if below else LEAST_SIDE // side)
    height, width = rows[0][0].shape[0] * factor, side * factor
    font = ImageFont.load_default(_TEXT)
    left = max([0, *(int(font.getlength(name)) + 12 for name in names if name)])
    top, across = (20 if any(columns) else GAP), max(map(len, rows))
    least = int(font.getlength(caption)) + 12 if caption else 0
    words = [[_broken(word, width, font) for word in row] for row in below]
    deep = [max((len(lines) for lines in row), default=0) * LINE for row in words] or [0] * len(rows)
    tall = top + len(rows) * (height + GAP) + sum(deep) + (22 if caption else 0)
    size = (max(left + across * (width + GAP) + GAP, least), tall)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(columns[:across]):
        draw.text((left + column * (width + GAP) + width // 2, 9), _cut(name, width, font), _INK, font, anchor="mm")
    for row, images in enumerate(rows):
        y = top + row * (height + GAP) + sum(deep[:row])
        if row < len(names):
            draw.text((left - 6, y + height // 2), names[row], _INK, font, anchor="rm")
        for column, image in enumerate(images):
            enlarged = np.repeat(np.repeat(image, factor, 0), factor, 1)
            x = left + column * (width + GAP) + GAP
            canvas.paste(Image.fromarray(enlarged), (x, y))
            for line, text in enumerate(words[row][column] if words else ()):
                draw.text((x, y + height + (line + 0.5) * LINE), text, _INK, font, anchor="lm")
    if caption:
        draw.text((6, size[1] - 11), caption, _INK, font, anchor="lm")
    return canvas


def overview(images: Sequence[np.ndarray], shown: Sequence[str], across: int, caption: str = "") -> Image.Image:
    """Images in rows of ``across``, with what each shows: above, where a column shows one thing, else below each.

    Args:
        images: uint8 [H, W, 3] of one size.
        shown: a class or a prompt per image; empty where there is nothing to say.
    """
    starts = range(0, len(images), across)
    rows = [images[start : start + across] for start in starts]
    if all(word == shown[index % across] for index, word in enumerate(shown)):
        return labelled_grid(rows, columns=shown[:across], caption=caption)
    return labelled_grid(rows, below=[shown[start : start + across] for start in starts], caption=caption)


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


def _broken(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Lines of at most ``width`` pixels; a word that is longer is cut."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
    return [_cut(line, width, font) for line in lines]


def _cut(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
