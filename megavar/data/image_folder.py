"""A folder with one sub-folder of images per class, as ImageNet is usually unpacked."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megavar.data.source import Sample, Split
from megavar.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def walk(root: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` that does not pass over folders it cannot read.

    Raises:
        DataError: such a folder.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"The folder {error.filename} cannot be read ({error.strerror}). Correct its permissions.")

    return os.walk(root, onerror=fail)


def list_class_folders(
    root: Path, ignored: Counter[str] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """List the images below ``root`` in a fixed order.

    Args:
        ignored: counts what is no image by its name, by suffix, and linked folders, which are not followed.

    Returns:
        class names (sorted names of the sub-folders) and (path relative to ``root``, class) per image, classes in
        order and paths sorted within each.

    Raises:
        DataError: ``root`` is absent, unreadable or has no class folders, or a class folder has no images.
    """
    if not root.is_dir():
        raise DataError(
            f"The image folder {root} does not exist or is not a folder. Give the path of a folder that has "
            f"one sub-folder of images per class."
        )
    names = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        raise DataError(
            f"The image folder {root} has no sub-folders. Each class needs a sub-folder with its images, for example "
            f"{root}/cat/0001.jpg. If the images lie in a folder for training and one for validation, name that "
            f"folder. If labels are in a file, make shards of it with tools/shard_images.py --list."
        )
    images = []
    for label, name in enumerate(names):
        paths = []
        for folder, folders, files in walk(root / name):
            here = Path(folder).relative_to(root).as_posix()
            for file in files:
                if file.lower().endswith(IMAGE_SUFFIXES):
                    paths.append(f"{here}/{file}")
                elif ignored is not None:
                    ignored[Path(file).suffix.lower() or file] += 1
            if ignored is not None:
                ignored["linked folder"] += sum((Path(folder) / inner).is_symlink() for inner in folders)
        paths.sort()
        if not paths:
            raise DataError(
                f"The class folder {root / name} contains no images ({', '.join(IMAGE_SUFFIXES)}). Add images to it or "
                f"remove it: every sub-folder of {root} counts as a class."
            )
        images += [(path, label) for path in paths]
    return names, images


class ImageFolder:
    """Images of a class folder, read as encoded bytes.

    The fingerprint covers paths and classes, not pixels: hashing ImageNet at every start would take an hour.
    """

    def __init__(self, split: Split, path: Path) -> None:
        self.split: Split = split
        self.root = Path(path)
        self.class_names, self._images = list_class_folders(self.root)
        lines = "\n".join(f"{path}\t{label}" for path, label in self._images)
        listing = hashlib.sha256(lines.encode(errors="surrogateescape"))  # names need not be UTF-8
        self.fingerprint = f"image_folder-{split}-{len(self._images)}-{listing.hexdigest()[:16]}"

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Sample:
        """Sample ``index`` with its encoded image."""
        path, label = self._images[index]
        return Sample(key=path, label=label, image=(self.root / path).read_bytes())
