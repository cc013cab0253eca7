"""A first look at a folder of images that nobody has described: classes, sizes, damage."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megavar.data.image_folder import ImageFolder, describe_ignored
from megavar.errors import DataError

LOOKED_AT = 2000
"""Images whose header is read: evenly spread over the folder."""
FEWEST = 2
"""Images of a folder that can be held out from itself."""


@dataclass(frozen=True)
class Survey:
    """What a folder holds."""

    root: Path
    """Absolute."""
    one_class: bool
    """The images lie in the folder itself."""
    classes: dict[str, int]
    """Images by class."""
    held_out: int
    """Images of the test split."""
    smallest: tuple[int, int]
    """Width and height in pixels of the image with the shortest side."""
    largest: tuple[int, int]
    short_side: int
    """Median in pixels."""
    damaged: tuple[str, ...]
    """Of those looked at: what cannot be read."""
    notes: tuple[str, ...]
    """What a person should know, in words."""

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(self.classes.values())


def survey(root: Path, held_out: float) -> Survey:
    """Look at ``root``: a folder with one sub-folder of images per class, or a folder of images.

    Args:
        held_out: share of the images of each class that will be tested with.

    Raises:
        DataError: there are no images, or too few to hold one out.
    """
    root = root.absolute()
    one_class = root.is_dir() and not any(entry.is_dir() and not entry.name.startswith(".") for entry in root.iterdir())
    folder = ImageFolder("train", root, one_class=one_class)
    paths = [root / path for path, _ in folder.listing]
    names = Counter(folder.class_names[label] for _, label in folder.listing)
    if len(paths) < FEWEST:
        raise DataError(f"{root} holds {len(paths)} image: add more, to train on some and to test with others.")
    sizes: list[tuple[int, int]] = []
    damaged: list[str] = []
    for path in paths[:: -(-len(paths) // LOOKED_AT)]:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
                image.draft("RGB", (16, 16))  # JPEG: decodes a sixteenth of it
                image.load()
        except Exception as error:  # whatever a damaged file makes its decoder raise
            damaged.append(f"{path.relative_to(root)} ({type(error).__name__})")
    if not sizes:
        raise DataError(f"None of the images of {root} can be read, for example {damaged[0]}.")
    notes = []
    if said := describe_ignored(folder.ignored):
        notes.append(f"ignored: {said}")
    if damaged:
        notes.append(f"{len(damaged)} of {len(sizes) + len(damaged)} images cannot be read, for example {damaged[0]}: "
                     f"others take their place")  # fmt: skip
    fewest = min(names.values())
    if len(names) > 1 and max(names.values()) > 10 * fewest:
        rare = min(names, key=lambda name: names[name])
        notes.append(f"classes differ in size: {rare} has only {fewest} images and will be learned last")
    sides = sorted(min(size) for size in sizes)
    held = ImageFolder("test", root, held_out, one_class=one_class)
    return Survey(
        root, one_class, {name: names[name] for name in folder.class_names}, len(held), min(sizes, key=min),
        max(sizes, key=min), sides[len(sides) // 2], tuple(damaged), tuple(notes),
    )  # fmt: skip
