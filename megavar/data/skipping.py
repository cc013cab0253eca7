"""What lies among images but is no data: the one rule for class folders, lists, pairs and folders of samples.

Operating systems, storage servers, archivers and editors leave files and folders of their own among images. Some hold
copies of images (``.ipynb_checkpoints``), files with the names of images that are none (``._0001.jpg`` in
``__MACOSX``) or previews (``@eaDir``). Taken for data they become classes, which moves all labels behind them, or
samples. They are left out, at any depth, and whoever lists images says how many.
"""

import re
from collections.abc import Iterable
from pathlib import PurePath

_NAMES = {
    "__macosx", "__pycache__", "lost+found", "system volume information", "$recycle.bin", "recycler", "thumbs.db",
    "desktop.ini", "ehthumbs.db", "icon\r", "network trash folder", "temporary items",
}  # fmt: skip
_SERVERS = re.compile(r"[@#](?:eadir|tmp|recycle|recently-snapshot|snapshots?|syno.*|__thumb)", re.IGNORECASE)


def is_no_data(name: str) -> bool:
    """Whether a file or folder called ``name`` is hidden, a backup, or a system's own."""
    return (
        name.startswith(".")
        or name.endswith("~")
        or name.lower() in _NAMES
        or _SERVERS.fullmatch(name) is not None
    )


def kind_of(name: str, is_folder: bool) -> str:
    """In which words it is counted: folders by name, files together."""
    if is_folder:
        return f"folder {name}"
    return "hidden or system file"


def first_no_data(path: str) -> str | None:
    """The first part of a path from a list that :func:`is_no_data`, or None.

    Of an absolute path, or one that leaves the folder of the list, only the file counts: where somebody keeps images
    is their choice.
    """
    parts: Iterable[str] = PurePath(path).parts
    if PurePath(path).is_absolute() or ".." in parts:
        parts = (PurePath(path).name,)
    return next((part for part in parts if is_no_data(part)), None)
