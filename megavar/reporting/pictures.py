"""Pictures inside a page: within a budget of bytes, so that the page stays small enough for a mail."""

import base64
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

BUDGET = 2_000_000
"""Bytes of all pictures of a page, as they stand in it."""
WIDTH = 1000
"""Pixels: wider pictures are made smaller."""


class Album:
    """Hands out pictures as ``data:`` addresses; each gets an equal share of the budget."""

    def __init__(self, number: int, budget: int = BUDGET) -> None:
        self.share = min(400_000, budget // max(1, number))

    def address(self, path: Path) -> str | None:
        """Of the picture in a file; None if it cannot be read."""
        try:
            content = path.read_bytes()
            with Image.open(path) as opened:
                picture = opened.convert("RGB")
        except (OSError, ValueError):
            return None
        kind = "png"
        if picture.width > WIDTH or len(content) * 4 / 3 > self.share:
            kind, content = "jpeg", _smaller(picture, self.share * 3 // 4)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _smaller(picture: Image.Image, limit: int) -> bytes:
    """JPEG of at most ``limit`` bytes, if need be of fewer pixels."""
    width = min(picture.width, WIDTH)
    while True:
        height = max(1, round(picture.height * width / picture.width))
        for quality in (90, 80, 65):
            buffer = io.BytesIO()
            picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= limit or width <= 64:
                return buffer.getvalue()
        width = round(width * 0.75)


def inline_svg(figure: Figure, name: str) -> str:
    """The ``<svg>`` element of a figure, the same bytes each time; names inside do not meet those of other figures."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
