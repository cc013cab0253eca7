"""A folder with one sub-folder of images per class, as ImageNet is usually unpacked."""

import hashlib
import os
from pathlib import Path

from megavar.data.source import Sample, Split
from megavar.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_class_folders(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """List the images below ``root`` in a fixed order.

    Returns:
        class names (sorted names of the sub-folders) and (path relative to ``root``, class) per image, classes in
        order and paths sorted within each.

    Raises:
        DataError: ``root`` is absent, or has no class folders, or a class folder has no images.
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
            f"{root}/cat/0001.jpg. If the images lie in a folder for training and one for validation, name that folder."
        )
    images = []
    for label, name in enumerate(names):
        paths = sorted(
            (Path(folder) / file).relative_to(root).as_posix()
            for folder, _, files in os.walk(root / name)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES)
        )
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
        listing = hashlib.sha256("\n".join(f"{path}\t{label}" for path, label in self._images).encode())
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
