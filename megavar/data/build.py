"""From the ``data`` section of the configuration to sources, transforms and loaders."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megavar.config import data as config_room
from megavar.config.data import DataConfig
from megavar.data import text_training, transforms
from megavar.data.caches import CachedSamples
from megavar.data.digits import Digits
from megavar.data.image_folder import ImageFolder
from megavar.data.loader import Loader
from megavar.data.mixture import Mixture
from megavar.data.pairs import Pairs
from megavar.data.photographs import Photographs
from megavar.data.shapes import Shapes
from megavar.data.source import Source, Split
from megavar.data.streaming import ShardStreams, StreamLoader
from megavar.data.text import TextEncoder, whole_text
from megavar.data.token_file import TokenFile
from megavar.data.transforms import Transform
from megavar.data.webdataset import ShardFolder
from megavar.errors import ConfigError, DataError

CAPTIONS = 5000
"""On which a text tokenizer is trained on the spot."""


def build_source(config: DataConfig, split: Split = "train") -> Source:
    """Open the training or test samples that ``config`` names.

    Raises:
        ConfigError: the source cannot offer what the configuration asks for.
        DataError: the data are missing or damaged.
    """
    source = config.source
    match source:
        case config_room.DigitsSource():
            return Digits(split, config.image_size)
        case config_room.PhotographsSource():
            length = source.length if split == "train" else source.test_length
            return Photographs(split, config.image_size, length=length, short_side=source.short_side, seed=source.seed)
        case config_room.ShapesSource():
            length = source.length if split == "train" else source.test_length
            return Shapes(
                split, config.image_size, length=length, conditioning=source.conditioning, seed=source.seed,
                tags=source.tags,
            )  # fmt: skip
        case config_room.ImageFolderSource():
            if source.test_share is not None:
                return ImageFolder(split, Path(source.path), source.test_share, one_class=source.one_class)
            of_folder = functools.partial(ImageFolder, one_class=source.one_class)
            return _of_split(of_folder, source.path, source.test_path, split)
        case config_room.CacheSource():
            if split == "test":
                return build_source(of_images(config), split)
            return _cache(config, source)
        case config_room.TokenFileSource():
            if split == "test":
                return build_source(of_images(config), split)
            return TokenFile(split, Path(source.path), source.classes)
        case config_room.WebDatasetSource():
            if source.order == "stream" and split == "train":
                folder, key = Path(source.path), source.caption_key
                return ShardStreams(split, folder, url=source.url, lanes=source.lanes, key=key)
            of_shards = functools.partial(ShardFolder, key=source.caption_key)
            return _of_split(of_shards, source.path, source.test_path, split)
        case config_room.PairsSource():
            of_pairs = functools.partial(Pairs, caption_key=source.caption_key)
            return _of_split(of_pairs, source.path, source.test_path, split)
        case config_room.MixtureSource():
            parts = [build_source(config.model_copy(update={"source": part}), split) for part in source.sources]
            return Mixture(split, parts, source.weights)


def of_images(config: DataConfig) -> DataConfig:
    """The same configuration with the images themselves as source, where a cache or a file of their tokens is named.

    Raises:
        ConfigError: there is a file of tokens, and nothing says where the images are.
    """
    source = config.source
    if isinstance(source, config_room.TokenFileSource) and source.images is None:
        raise ConfigError(
            f"Images are needed, but data.source is the token file {source.path}. Set data.source.images to those "
            f"of which it was made."
        )
    if isinstance(source, config_room.CacheSource | config_room.TokenFileSource):
        return config.model_copy(update={"source": source.images})
    return config


def _cache(config: DataConfig, source: config_room.CacheSource) -> CachedSamples:
    features = None if source.features is None else Path(source.features)
    cached = CachedSamples("train", Path(source.path), lambda: build_source(of_images(config)), features)
    plan, transform = cached.cache.plan, repr(build_transform(config))
    for key, wanted, found in (
        ("data.source.content", source.content, plan.content),
        ("data.source.views", source.views, plan.views),
        ("data.image_size", config.image_size, plan.image_size),
        ("data.transform", transform, plan.transform),
    ):
        if wanted != found:
            raise ConfigError(
                f"{key} is {wanted}, but the cache {source.path} was made with {found}. Change the configuration, or "
                f"make another cache with `python -m tools.cache_tokens CONFIG`."
            )
    return cached


def _of_split(open_folder: Callable[[Split, Path], Source], path: str, test_path: str | None, split: Split) -> Source:
    if split == "train":
        return open_folder(split, Path(path))
    if test_path is None:
        raise ConfigError(
            "Test data are needed, but data.source.test_path is not set. Set it to their folder, or let one folder "
            "of images hold a tenth out with data.source.test_share=0.1."
        )
    source = open_folder(split, Path(test_path))
    expected = open_folder("train", Path(path)).class_names
    if source.class_names != expected:
        differing = sorted(set(source.class_names) ^ set(expected))
        raise DataError(
            f"The classes of {test_path} and {path} differ, for example {differing[0]!r} is in one of them only. "
            f"Labels would not agree: give both the same classes."
        )
    return source


def build_transform(config: DataConfig, split: Split = "train") -> Transform:
    """The transform that ``config`` names, or for the test split its deterministic counterpart."""
    size, choice, train = config.image_size, config.transform, split == "train"
    match choice:
        case config_room.NoTransform():
            return transforms.Unchanged(size)
        case config_room.VarTransform():
            if train:
                return transforms.Var(size, choice.resize, choice.flip)
            return transforms.VarTest(size, choice.resize)
        case config_room.AdmRandomCropTransform() if train:
            return transforms.AdmRandomCrop(size, choice.minimum_share, choice.flip)
        case config_room.TenCropTransform() if train:
            return transforms.TenCrop(size, choice.resize)
        case config_room.AdmCenterCropTransform() if train:
            return transforms.AdmCenterCrop(size, choice.flip)
        case config_room.TitokTransform():
            return transforms.Titok(size, choice.random_crop and train, choice.flip and train)
        case config_room.SquareCropTransform():
            return transforms.SquareCrop(size, random=train)
        case _:  # ADM's centre crop, itself or as the test transform of the crops derived from it
            return transforms.AdmCenterCrop(size)


@functools.lru_cache(maxsize=8)
def build_text(config: DataConfig) -> TextEncoder | None:
    """What makes token ids of captions; None where ``data.text`` is not set.

    Raises:
        ConfigError: no tokenizer is named and the data are not embedded, or a package is missing.
        DataError: the tokenizer is missing or damaged.
    """
    if config.text is None:
        return None
    if config.text.tokenizer is not None:
        return TextEncoder.read(config.text)
    source = build_source(of_images(config))
    if not isinstance(source, Shapes):
        raise ConfigError(
            f"data.text.tokenizer is not set, and only for the embedded data source 'shapes' one is trained on the "
            f"spot, not for {config.source.name!r}. Name the folder of the language model's tokenizer."
        )
    captions = (source.caption(index) for index in range(min(len(source), CAPTIONS)))
    tokenizer = text_training.train((whole_text(config.text, caption) for caption in captions), config.text.vocabulary)
    return TextEncoder(tokenizer, config.text, text_training.PADDING, "the text tokenizer that is trained on the spot")


def build_loader(config: DataConfig, source: Source, **arguments: Any) -> Loader:
    """A loader over ``source``; ``arguments`` are those of :class:`Loader` that the configuration does not decide."""
    arguments |= {"workers": config.workers, "prefetch": config.prefetch, "damaged": config.damaged_samples}
    arguments |= {"text": build_text(config)}
    transform = build_transform(config, source.split)
    if isinstance(source, ShardStreams):
        return StreamLoader(source, transform, **arguments)
    return Loader(source, transform, **arguments)
