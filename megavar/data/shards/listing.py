"""What is to be sharded: class folders, a list file, or image-caption pairs, as one list in a fixed order."""

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from megavar.data.image_folder import IMAGE_SUFFIXES, list_class_folders, walk
from megavar.data.shards.index import CLASSES
from megavar.data.skipping import first_no_data, kind_of
from megavar.errors import DataError

Kind = Literal["class_folders", "list", "pairs"]
Damaged = Literal["fail", "leave-out"]
_CAPTIONS = (".txt", ".json")
"""Files beside an image that hold its caption, the first that there is."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)


@dataclass(frozen=True)
class Original:
    """One image before sharding."""

    path: str
    """Relative to the listing's root."""
    label: int = -1
    caption: str | None = None
    caption_path: str | None = None
    """A file of text, or of JSON, relative to the root, read when the sample is."""
    problem: str | None = None
    """Why it cannot become a sample, known from the list already."""


@dataclass(frozen=True)
class Listing:
    """All originals."""

    kind: Kind
    root: Path
    class_names: tuple[str, ...]
    originals: list[Original]
    ignored: Counter[str] = field(default_factory=Counter)
    """What lies beside the images, in words: files by suffix, linked folders, what is no data."""

    def sha256(self) -> str:
        """Hash of everything but the root and the content of the files."""
        digest = hashlib.sha256(json.dumps([self.kind, self.class_names]).encode())
        for original in self.originals:
            fields = [original.path, original.label, original.caption, original.caption_path]
            fields += [original.problem] if original.problem else []
            digest.update(json.dumps(fields).encode() + b"\n")
        return digest.hexdigest()


def list_originals(kind: Kind, path: Path, damaged: Damaged = "fail") -> Listing:
    """List originals.

    What is no data (hidden, or a system's own: ``megavar/data/skipping.py``) is left out everywhere, and counted.

    Args:
        kind: ``class_folders``: ``path`` has one sub-folder of images per class. ``list``: ``path`` is a text file with
            ``image label`` per line (a tab between them lets labels hold spaces). ``pairs``: ``path`` is a folder with
            ``name.jpg`` and ``name.txt`` (or ``name.json``) beside each other, or a ``.jsonl`` file of
            ``{"image": ..., "caption": ...}`` lines, or a ``.json`` file with a list of such objects; in the place of
            ``caption`` may stand ``annotation``, the path of a JSON file (VGT's lists). Paths in files are relative to
            the folder of the file; text is UTF-8.
        damaged: ``leave-out``: pairs without a readable caption are listed with their problem, instead of an error.

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
    return _pair_up(path, damaged) if path.is_dir() else _read_entries(path, damaged)


def _read_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """(number, text) of the lines that are not empty; None for text that is not UTF-8."""
    if not path.is_file():
        raise DataError(f"{path} is not a file. Give a text file of lines.")
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), 1):  # not splitlines: names may hold other separators
        try:
            text = line.decode()
        except UnicodeDecodeError:
            yield number, None
            continue
        if text.strip():
            yield number, text


def _not_text(path: Path, number: int) -> DataError:
    return DataError(f"{path} is not UTF-8 text (line {number}). Give a text file of lines in UTF-8.")


def _skip(path: str, ignored: Counter[str]) -> bool:
    """Whether a listed path is no data; it is counted then."""
    part = first_no_data(path)
    if part is not None:
        ignored[kind_of(part, is_folder=part != PurePath(path).name)] += 1
    return part is not None


def _read_list(path: Path) -> Listing:
    pairs: list[tuple[int, str, str]] = []
    ignored: Counter[str] = Counter()
    for number, line in _read_lines(path):
        if line is None:
            raise _not_text(path, number)
        parts = line.strip().rsplit("\t", 1) if "\t" in line.strip() else line.strip().rsplit(maxsplit=1)
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise DataError(f"Line {number} of {path} is {line!r}. Each line needs an image path, a space and a label.")
        image, label = (part.strip() for part in parts)
        if not image.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(
                f"Line {number} of {path} is {line!r}, and {image!r} is no image ({', '.join(IMAGE_SUFFIXES)}). Each "
                f"line needs an image path, a space and a label; remove headers, and commas between them."
            )
        if not _skip(image, ignored):
            pairs.append((number, image, label))
    if not pairs:
        raise DataError(f"{path} lists no images. Each line needs an image path, a space and a label.")
    names, number_of = _classes(path, [(number, label) for number, _, label in pairs])
    originals = [Original(image, number_of[label]) for _, image, label in pairs]
    return Listing("list", path.parent, names, originals, ignored)


def _classes(path: Path, labels: list[tuple[int, str]]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of the classes, and the class of every label: numbers count classes, or all labels are names.

    Raises:
        DataError: some labels are numbers and others are not, or numbers are none that count.
    """
    counting = {label for _, label in labels if label.isascii() and label.isdecimal()}
    others = {label for _, label in labels} - counting
    odd = others if counting else {label for label in others if _NUMBER.fullmatch(label)}
    if odd:
        number, label = next((number, label) for number, label in labels if label in odd)
        beside = f", but others are numbers such as {min(counting)}" if counting else ""
        raise DataError(
            f"Line {number} of {path} has the label {label!r}{beside}. Labels are either numbers that count "
            f"classes from 0 (0, 1, 2, ...), or names on every line: correct or remove what is neither (headers, -1 "
            f"for unknown classes), or put a letter in front of names that look like numbers."
        )
    if counting:
        if (largest := max(map(int, counting))) >= CLASSES:
            raise DataError(f"{path} has the label {largest}. Labels that are numbers count classes from 0: use names.")
        return tuple(map(str, range(largest + 1))), {label: int(label) for label in counting}
    names = tuple(sorted(others))
    return names, {name: number for number, name in enumerate(names)}


def _json_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, entry) of a file of lines of JSON, or of one JSON list; None for what is no JSON, or not UTF-8."""
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_bytes())
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not JSON ({error}). Give a list of image-caption objects.") from error
        yield from enumerate(entries if isinstance(entries, list) else [None], 1)
        return
    for number, line in _read_lines(path):
        try:
            yield number, None if line is None else json.loads(line)
        except ValueError:
            yield number, {}


def _read_entries(path: Path, damaged: Damaged) -> Listing:
    originals = []
    ignored: Counter[str] = Counter()
    for number, entry in _json_entries(path):
        found = entry if isinstance(entry, dict) else {}
        image, caption, annotation = (found.get(name) for name in ("image", "caption", "annotation"))
        if isinstance(image, str) and _skip(image, ignored):
            continue
        if isinstance(image, str) and isinstance(caption, str):
            originals.append(Original(image, caption=caption))
        elif isinstance(image, str) and isinstance(annotation, str):
            originals.append(Original(image, caption_path=annotation))
        elif damaged == "leave-out":
            name = image if isinstance(image, str) else path.name
            originals.append(Original(name, problem=f"line {number} of the list has no caption in UTF-8 for an image"))
        elif entry is None and path.suffix != ".json":
            raise _not_text(path, number)
        else:
            what = "Entry" if path.suffix == ".json" else "Line"
            raise DataError(
                f'{what} {number} of {path} is not {{"image": path, "caption": text}}. Correct or remove it.'
            )
    if not originals:
        raise DataError(f'{path} is empty. Each line needs {{"image": path, "caption": text}}.')
    return Listing("pairs", path.parent, (), originals, ignored)


def _pair_up(root: Path, damaged: Damaged) -> Listing:
    originals = []
    ignored: Counter[str] = Counter()
    for folder, files in walk(root, ignored):
        names = set(files)
        unused = {name for name in files if name.endswith(_CAPTIONS)}
        for name in files:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  # millions of Path objects would be slow
            if suffix.lower() not in IMAGE_SUFFIXES:
                if suffix not in _CAPTIONS:
                    ignored[suffix.lower() or name] += 1
                continue
            image = (Path(folder) / name).relative_to(root)
            beside = next((end for end in _CAPTIONS if f"{stem}{end}" in names), None)
            if beside is not None:
                unused.discard(f"{stem}{beside}")
                originals.append(Original(image.as_posix(), caption_path=image.with_suffix(beside).as_posix()))
            elif damaged == "leave-out":
                originals.append(Original(image.as_posix(), problem=f"there is no {stem}.txt with its caption"))
            else:
                raise DataError(
                    f"{root / image} has no caption: there is no {stem}.txt. Add it or move the image, or leave such "
                    f"images out with --damaged leave-out."
                )
        for name in unused:
            ignored["caption without image" if name.endswith(".txt") else ".json"] += 1
    if not originals:
        raise DataError(f"{root} contains no images. Image-caption pairs are files name.jpg and name.txt side by side.")
    return Listing("pairs", root, (), sorted(originals, key=lambda original: original.path), +ignored)
