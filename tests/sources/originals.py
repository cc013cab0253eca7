"""Small sets of real image files for the tests of shards and caches."""

import hashlib
import json
from pathlib import Path

from PIL import Image

from megavar.data.photographs import Photographs
from megavar.data.shards.listing import list_originals
from megavar.data.shards.writing import Plan, write_shards


def write_class_folders(root: Path, count: int = 60) -> Path:
    """``count`` crops of photographs as JPEG and PNG files in one folder per photograph."""
    source = Photographs("train", 40, length=count)
    for index in range(count):
        sample = source.read(index)
        folder = root / source.class_names[sample.label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample.image).save(folder / f"{index:04d}.{'JPEG' if index % 3 else 'png'}")
    return root


def write_pairs(root: Path, count: int = 12) -> Path:
    """Images with captions beside them."""
    source = Photographs("train", 40, length=count)
    (root / "part").mkdir(parents=True)
    for index in range(count):
        path = root / ("part" if index % 2 else "") / f"{index:02d}.jpg"
        Image.fromarray(source.read(index).image).save(path)
        path.with_suffix(".txt").write_text(f"a crop of the {source.class_names[index % 10]}, number {index} é\n")
    return root


def shard(originals: Path, out: Path, shards: int = 5, **arguments) -> Path:
    """Shards of class folders."""
    write_shards(Plan(list_originals("class_folders", originals), shards, **arguments), out, processes=2)
    return out


def content_of(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


def member(sample: dict, name: str):
    """A member of a webdataset sample as Python value."""
    return json.loads(sample[name])
