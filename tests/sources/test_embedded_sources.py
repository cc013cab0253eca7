import numpy as np
import pytest
import torch

from megavar.config.data import DataConfig, DigitsSource, PhotographsSource
from megavar.data.build import build_source, build_transform
from megavar.data.digits import Digits
from megavar.data.photographs import Photographs, _resized_photographs
from megavar.data.pixels import to_float, to_uint8
from megavar.data.reading import stored_images
from megavar.errors import ConfigError


def test_pixels_round_trip_and_round_to_the_nearest_level():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-3.0, 3.0, (127.6 / 127.5) - 1])).tolist() == [0, 255, 128]


def test_digits_split_is_the_published_one():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1433, 364)
    assert np.bincount(test.labels).tolist() == [36, 37, 36, 37, 37, 37, 37, 36, 35, 36]
    assert not {row.tobytes() for row in train.original} & {row.tobytes() for row in test.original}


def test_digits_pixels_are_the_original_ones_repeated():
    digits = Digits("test", image_size=16)
    sample = digits.read(5)
    assert sample.image.shape == (16, 16, 3)
    grey = sample.image[::2, ::2, 0]
    assert np.array_equal(np.rint(grey * (16 / 255)).astype(np.uint8), digits.original[5])
    assert np.array_equal(sample.image[1::2, 1::2, 2], grey)


def test_digits_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="multiple of 8"):
        Digits("train", image_size=20)


@pytest.mark.parametrize("size", [32, 64])
def test_photograph_crops_come_from_disjoint_regions(size):
    for name, label, pixels in zip(_resized_photographs(256), range(10), _resized_photographs(256).values()):
        regions = [Photographs(split, size, length=10)._regions[label] for split in ("train", "test")]
        axis = 1 if pixels.shape[1] >= pixels.shape[0] else 0
        assert np.array_equal(np.concatenate(regions, axis=axis), pixels), name


def test_photograph_crop_is_a_function_of_its_index():
    long, short = Photographs("train", 32, length=100), Photographs("train", 32, length=20)
    for index in (0, 7, 19):
        assert long.read(index).label == index % 10
        assert np.array_equal(long.read(index).image, short.read(index).image)
        assert np.array_equal(long.read(index).image, long.read(index).image)
    assert len({long.read(index).image.tobytes() for index in range(100)}) == 100
    assert long.fingerprint != short.fingerprint
    assert not np.array_equal(Photographs("train", 32, length=20, seed=1).read(3).image, short.read(3).image)


def test_photographs_too_small_for_the_crop_are_refused():
    with pytest.raises(ConfigError, match="short_side"):
        Photographs("test", 128, length=10)


@pytest.mark.parametrize("source", [DigitsSource(), PhotographsSource(length=50, test_length=20)])
def test_all_images_of_a_split(source):
    config = DataConfig(source=source, image_size=32)
    test = build_source(config, "test")
    images, labels = stored_images(test, build_transform(config, "test"))
    assert images.shape == (len(test), 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [test.read(index).label for index in range(len(test))]
