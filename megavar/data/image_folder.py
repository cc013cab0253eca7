"""A folder with one sub-folder of images per class, as ImageNet is usually unpacked."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megavar.data.skipping import is_no_data, kind_of
from megavar.data.source import Sample, Split
from megavar.errors import DataError
from megavar.storage import sha256_of_file

_log = logging.getLogger(__name__)

_told: set[tuple[Path, str]] = set()
"""What this process has said already: a folder is opened by training, validation and scores."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def walk(root: Path, ignored: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Folders below ``root`` and their files, without what is no data (see ``skipping.py``) and without linked folders.

    Args:
        ignored: counts what is left out.

    Raises:
        DataError: a folder cannot be read, which ``os.walk`` would pass over.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"The folder {error.filename} cannot be read ({error.strerror}). Correct its permissions.")

    for folder, folders, files in os.walk(root, onerror=fail):
        for name in [name for name in folders if is_no_data(name)]:
            ignored[kind_of(name, is_folder=True)] += 1
            folders.remove(name)
        ignored["linked folder"] += sum((Path(folder) / inner).is_symlink() for inner in folders)
        kept = [name for name in files if not is_no_data(name)]
        if len(kept) < len(files):
            ignored[kind_of("", is_folder=False)] += len(files) - len(kept)
        yield folder, kept


def describe_ignored(ignored: Counter[str]) -> str:
    """``2 .txt, 1 folder __MACOSX``; empty where there is nothing."""
    return ", ".join(f"{count} {kind}" for kind, count in (+ignored).most_common(10))


def list_class_folders(
    root: Path, ignored: Counter[str] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """List the images below ``root`` in a fixed order.

    Args:
        ignored: counts what is left out: what is no data (see ``skipping.py``), what is no image by its name, by
            suffix, files beside the class folders, and linked folders, which are not followed.

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
    ignored = Counter() if ignored is None else ignored
    names = tuple(sorted(_class_names(root, ignored)))
    if not names:
        raise DataError(
            f"The image folder {root} has no sub-folders. Each class needs a sub-folder with its images, for example "
            f"{root}/cat/0001.jpg. If the images lie in a folder for training and one for validation, name that "
            f"folder. If labels are in a file, make shards of it with tools/shard_images.py --list."
        )
    images = []
    for label, name in enumerate(names):
        paths = []
        for folder, files in walk(root / name, ignored):
            here = Path(folder).relative_to(root).as_posix()
            for file in files:
                if file.lower().endswith(IMAGE_SUFFIXES):
                    paths.append(f"{here}/{file}")
                else:
                    ignored[Path(file).suffix.lower() or file] += 1
        paths.sort()
        if not paths:
            raise DataError(
                f"The class folder {root / name} contains no images ({', '.join(IMAGE_SUFFIXES)}). Add images to it or "
                f"remove it: every sub-folder of {root} counts as a class."
            )
        images += [(path, label) for path in paths]
    return names, images


def list_one_class(root: Path, ignored: Counter[str]) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """The same of a folder whose images are all of one class, named after the folder.

    Raises:
        DataError: ``root`` is absent or unreadable, or holds no images.
    """
    if not root.is_dir():
        raise DataError(f"The image folder {root} does not exist or is not a folder. Give the path of a folder.")
    paths = []
    for folder, files in walk(root, ignored):
        here = Path(folder).relative_to(root)
        for file in files:
            if file.lower().endswith(IMAGE_SUFFIXES):
                paths.append((here / file).as_posix())
            else:
                ignored[Path(file).suffix.lower() or file] += 1
    if not paths:
        raise DataError(f"The folder {root} contains no images ({', '.join(IMAGE_SUFFIXES)}). Add images to it.")
    return (root.resolve().name,), [(path, 0) for path in sorted(paths)]


def _of_split(images: list[tuple[str, int]], split: Split, share: float) -> list[tuple[str, int]]:
    """Of every class, the images whose paths have the smallest hashes are held out: a fixed choice without pattern."""
    classes: dict[int, list[str]] = {}
    for path, label in images:
        classes.setdefault(label, []).append(path)
    held: set[str] = set()
    for paths in classes.values():
        count = min(max(1, round(share * len(paths))), len(paths) - 1)
        ordered = sorted(paths, key=lambda path: hashlib.sha256(path.encode(errors="surrogateescape")).digest())
        held.update(ordered[:count])
    return [(path, label) for path, label in images if (path in held) == (split == "test")]


def _class_names(root: Path, ignored: Counter[str]) -> Iterator[str]:
    with os.scandir(root) as entries:
        for entry in entries:
            if is_no_data(entry.name):
                ignored[kind_of(entry.name, entry.is_dir())] += 1
            elif entry.is_dir():
                yield entry.name
            else:
                ignored["file beside the class folders"] += 1


class ImageFolder:
    """Images of a class folder, read as encoded bytes.

    The fingerprint covers paths and classes, not pixels: hashing ImageNet at every start would take an hour. Where
    results of the images are kept and used again, ``content_sha256`` goes with it.
    """

    def __init__(
        self, split: Split, path: Path, test_share: float | None = None, *, one_class: bool = False
    ) -> None:
        """List ``path``.

        Args:
            test_share: share of every class that is the test split; None: all images are ``split``.
            one_class: the images in and below ``path`` are one class, named after it.
        """
        self.split: Split = split
        self.root = Path(path)
        self.ignored: Counter[str] = Counter()
        """What is left out, in words."""
        listing_of = list_one_class if one_class else list_class_folders
        self.class_names, self._images = listing_of(self.root, self.ignored)
        if test_share is not None:
            self._images = _of_split(self._images, split, test_share)
        if (said := describe_ignored(self.ignored)) and (self.root, said) not in _told:
            _told.add((self.root, said))
            _log.info("Beside the %d images of %s there are, and are ignored: %s.", len(self._images), self.root, said)
        lines = "\n".join(f"{path}\t{label}" for path, label in self._images)
        listing = hashlib.sha256(lines.encode(errors="surrogateescape"))  # names need not be UTF-8
        self.fingerprint = f"image_folder-{split}-{len(self._images)}-{listing.hexdigest()[:16]}"

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.class_names)

    @property
    def listing(self) -> list[tuple[str, int]]:
        """Path relative to the folder, and class, of every image."""
        return list(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def content_sha256(self) -> str:
        """Hash of the content of all images. Reads every byte."""

        def of(image: tuple[str, int]) -> str:
            return sha256_of_file(self.root / image[0])

        with ThreadPoolExecutor(8) as pool:
            return hashlib.sha256("".join(pool.map(of, self._images)).encode()).hexdigest()

    def read(self, index: int) -> Sample:
        """Sample ``index`` with its encoded image."""
        path, label = self._images[index]
        return Sample(key=path, label=label, image=(self.root / path).read_bytes())
