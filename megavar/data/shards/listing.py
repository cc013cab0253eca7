"""What is to be sharded: class folders, a list file, or image-caption pairs, as one list in a fixed order."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megavar.data.image_folder import IMAGE_SUFFIXES, list_class_folders, walk
from megavar.data.shards.index import CLASSES
from megavar.errors import DataError

Kind = Literal["class_folders", "list", "pairs"]


@dataclass(frozen=True)
class Original:
    """One image before sharding."""

    path: str
    """Relative to the listing's root."""
    label: int = -1
    caption: str | None = None
    caption_path: str | None = None
    """A text file, relative to the root, read when the sample is written."""


@dataclass(frozen=True)
class Listing:
    """All originals."""

    kind: Kind
    root: Path
    class_names: tuple[str, ...]
    originals: list[Original]
    ignored: Counter[str] = field(default_factory=Counter)
    """Files beside the images, by suffix, and linked folders."""

    def sha256(self) -> str:
        """Hash of everything but the root and the content of the files."""
        digest = hashlib.sha256(json.dumps([self.kind, self.class_names]).encode())
        for original in self.originals:
            fields = [original.path, original.label, original.caption, original.caption_path]
            digest.update(json.dumps(fields).encode() + b"\n")
        return digest.hexdigest()


def list_originals(kind: Kind, path: Path) -> Listing:
    """List originals.

    Args:
        kind: ``class_folders``: ``path`` has one sub-folder of images per class. ``list``: ``path`` is a text file with
            ``image label`` per line. ``pairs``: ``path`` is a folder with ``name.jpg`` and ``name.txt`` beside each
            other, or a ``.jsonl`` file of ``{"image": ..., "caption": ...}`` lines. Paths in files are relative to the
            folder of the file; text is UTF-8.

    Raises:
        DataError: nothing is there, or a line is malformed.
    """
    if kind == "class_folders":
        ignored: Counter[str] = Counter()
        names, images = list_class_folders(path, ignored)
        return Listing(kind, path, names, [Original(image, label) for image, label in images], +ignored)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give the path of the images to shard.")
    if kind == "list":
        return _read_list(path)
    return _pair_up(path) if path.is_dir() else _read_json_lines(path)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not empty."""
    if not path.is_file():
        raise DataError(f"{path} is not a file. Give a text file of lines.")
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # not splitlines: names may hold other separators
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Give a text file of lines.") from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_list(path: Path) -> Listing:
    pairs: list[tuple[str, str]] = []
    for number, line in _read_lines(path):
        parts = line.strip().rsplit(maxsplit=1)
        if len(parts) != 2:
            raise DataError(f"Line {number} of {path} is {line!r}. Each line needs an image path, a space and a label.")
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise DataError(f"{path} lists no images. Each line needs an image path, a space and a label.")
    labels = {label for _, label in pairs}
    if all(label.isascii() and label.isdecimal() for label in labels):
        if (largest := max(map(int, labels))) >= CLASSES:
            raise DataError(f"{path} has the label {largest}. Labels that are numbers count classes from 0: use names.")
        names = tuple(str(label) for label in range(largest + 1))
    else:
        names = tuple(sorted(labels))
    number_of = {name: number for number, name in enumerate(names)}
    number_of |= {label: int(label) for label in labels if label not in number_of}  # written with leading zeros
    return Listing("list", path.parent, names, [Original(image, number_of[label]) for image, label in pairs])


def _read_json_lines(path: Path) -> Listing:
    originals = []
    for number, line in _read_lines(path):
        try:
            entry = json.loads(line)
            image, caption = entry["image"], entry["caption"]
        except (ValueError, KeyError, TypeError):
            image = caption = None
        if not (isinstance(image, str) and isinstance(caption, str)):
            raise DataError(f'Line {number} of {path} is not {{"image": path, "caption": text}}. Correct or remove it.')
        originals.append(Original(image, caption=caption))
    if not originals:
        raise DataError(f'{path} is empty. Each line needs {{"image": path, "caption": text}}.')
    return Listing("pairs", path.parent, (), originals)


def _pair_up(root: Path) -> Listing:
    originals = []
    ignored: Counter[str] = Counter()
    for folder, folders, files in walk(root):
        ignored["linked folder"] += sum((Path(folder) / inner).is_symlink() for inner in folders)
        names = set(files)
        captions = {name for name in files if name.endswith(".txt")}
        for name in files:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  # millions of Path objects would be slow
            if suffix.lower() not in IMAGE_SUFFIXES:
                if suffix != ".txt":
                    ignored[suffix.lower() or name] += 1
                continue
            captions.discard(f"{stem}.txt")
            image = (Path(folder) / name).relative_to(root)
            if f"{stem}.txt" not in names:
                raise DataError(f"{root / image} has no caption: there is no {stem}.txt. Add it or move the image.")
            originals.append(Original(image.as_posix(), caption_path=image.with_suffix(".txt").as_posix()))
        ignored["caption without image"] += len(captions)
    if not originals:
        raise DataError(f"{root} contains no images. Image-caption pairs are files name.jpg and name.txt side by side.")
    return Listing("pairs", root, (), sorted(originals, key=lambda original: original.path), +ignored)
