"""Transforms against images whose pixels are their own coordinates, and against torchvision where references use it."""

import contextlib
import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torchvision.transforms.functional as reference
from PIL import Image, features
from torchvision.transforms import InterpolationMode

from megavar.data import transforms
from megavar.data.source import DamagedSampleError
from megavar.data.transforms import Var, decode
from megavar.errors import DataError

ALMOST_ONE = 1 - 2**-53


def coordinates(width: int, height: int) -> Image.Image:
    """Red = x, green = y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def corner(image: Image.Image) -> tuple[int, int]:
    """(left, top) of the part of a coordinate image."""
    return image.getpixel((0, 0))[:2]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def equal(first: Image.Image, second: Image.Image) -> bool:
    return np.array_equal(np.asarray(first), np.asarray(second))


# VAR at 64: the shorter side becomes round(1.125 * 64) = 72, so a 72x100 image is cropped without resizing.
@pytest.mark.parametrize(
    ("draws", "expected"),
    [((0.0, 0.0, 0.9), (0, 0)), ((ALMOST_ONE, ALMOST_ONE, 0.9), (8, 36)), ((0.5, 0.25, 0.0), (2, 18))],
)
def test_var_random_crop(draws, expected):
    image = transforms.Var(64)(coordinates(72, 100), draws)
    assert (corner(image), image.size) == (expected, (64, 64))


def test_var_resizes_to_288_with_lanczos_before_cropping_256():
    image = noise(500, 375)
    resized = image.resize((384, 288), Image.Resampling.LANCZOS)
    assert equal(transforms.Var(256)(image, (0.999, 0.999, 0.9)), resized.crop((128, 32, 384, 288)))
    assert equal(transforms.VarTest(256)(image, ()), resized.crop((64, 16, 320, 272)))
    assert equal(
        transforms.VarTest(256)(image, ()),
        reference.center_crop(reference.resize(image, 288, InterpolationMode.LANCZOS), 256),
    )


def test_var_mirrors_only_on_request():
    image = coordinates(72, 72)
    assert corner(transforms.Var(64)(image, (0.0, 0.0, 0.1))) == (0, 0)
    assert corner(transforms.Var(64, flip=True)(image, (0.0, 0.0, 0.1))) == (71, 0)
    assert corner(transforms.Var(64, flip=True)(image, (0.0, 0.0, 0.6))) == (0, 0)


def test_adm_random_crop_draws_sizes_256_to_291():
    transform = transforms.AdmRandomCrop(256)
    image = noise(600, 700)  # 600 >= 2 * 291: halved with a box filter for every size
    halved = image.resize((300, 350), Image.Resampling.BOX)
    for draw, side in ((0.0, 256), (ALMOST_ONE, 291), (18.5 / 36, 274)):
        resized = halved.resize((side, round(350 * side / 300)), Image.Resampling.BICUBIC)
        top, left = resized.height - 256, side - 256
        expected = resized.crop((left, top, left + 256, top + 256))
        assert equal(transform(image, (ALMOST_ONE, ALMOST_ONE, 0.5, draw)), expected)
        expected = transforms.mirror(image).resize((300, 350), Image.Resampling.BOX)
        expected = expected.resize(resized.size, Image.Resampling.BICUBIC).crop((0, 0, 256, 256))
        assert equal(transform(image, (0.0, 0.0, 0.49, draw)), expected)


def test_adm_halves_what_is_exactly_twice_as_large():
    image = noise(128, 150)
    assert equal(transforms.adm_resize(image, 64), image.resize((64, 75), Image.Resampling.BOX))


@pytest.mark.parametrize(
    ("transform", "place"),
    [(transforms.Var(64, flip=True), 2), (transforms.AdmRandomCrop(64), 2), (transforms.Titok(64), 2),
     (transforms.AdmCenterCrop(64, flip=True), 0)],
)  # fmt: skip
def test_half_of_the_draws_mirror(transform, place):
    image, left = noise(64, 64), [0.0] * transform.draws
    plain, mirrored = (transform(image, [*left[:place], draw, *left[place + 1 :]]) for draw in (0.5, 0.0))
    assert not equal(plain, mirrored)
    for draw in (0.1, 0.3, 0.4999, 0.6, 0.75, 0.9999):
        found = transform(image, [*left[:place], draw, *left[place + 1 :]])
        assert equal(found, mirrored if draw < 0.5 else plain), draw


def test_adm_center_crop_rounds_margins_down():
    assert corner(transforms.adm_center_crop(coordinates(64, 69), 64)) == (0, 2)
    assert corner(transforms.adm_center_crop(coordinates(67, 64), 64)) == (1, 0)
    assert corner(transforms.AdmCenterCrop(64, flip=True)(coordinates(67, 64), (0.2,))) == (64, 0)


def test_ten_crop_offsets_at_256():
    """LlamaGen and RAR: a 281x281 centre crop, corners at 0 and 25, centre at 12, then the same of the mirror image."""
    image = noise(281, 281)
    mirrored = transforms.mirror(image)
    offsets = [(0, 0), (0, 25), (25, 0), (25, 25), (12, 12)]
    expected = [view.crop((left, top, left + 256, top + 256)) for view in (image, mirrored) for top, left in offsets]
    for view in range(10):
        assert equal(transforms.TenCrop(256).view(image, view), expected[view])
        assert equal(transforms.TenCrop(256)(image, ((view + 0.5) / 10,)), expected[view])
        assert equal(expected[view], reference.ten_crop(image, 256)[view])
        assert equal(transforms.TenCrop(256).views(image)[view], expected[view])


def test_titok_crops_along_the_longer_side_only():
    transform = transforms.Titok(64)
    assert corner(transform(coordinates(64, 100), (0.5, 0.5, 0.9))) == (0, 18)
    assert corner(transform(coordinates(64, 100), (ALMOST_ONE, 0.5, 0.1))) == (63, 36)
    image = noise(500, 375)
    expected = reference.center_crop(reference.resize(image, 256, InterpolationMode.BICUBIC, antialias=True), 256)
    assert equal(transforms.Titok(256, random_crop=False, flip=False)(image, (0.1, 0.1, 0.1)), expected)


@pytest.mark.parametrize("margin", [1, 3, 5, 7])
def test_odd_margins_are_rounded_half_to_even_like_torchvisions(margin):
    image = noise(64 + margin, 64)
    assert equal(transforms.center_crop(image, 64), reference.center_crop(image, 64))


def test_square_crop_of_vgt():
    image = noise(100, 60)
    for draw, left in ((0.0, 0), (ALMOST_ONE, 40), (0.5, 20)):
        expected = image.crop((left, 0, left + 60, 60)).resize((32, 32), Image.Resampling.BICUBIC)
        assert equal(transforms.SquareCrop(32)(image, (draw,)), expected)
    expected = image.crop((20, 0, 80, 60)).resize((32, 32), Image.Resampling.BICUBIC)
    assert equal(transforms.SquareCrop(32, random=False)(image, (0.0,)), expected)


def test_resizing_rounds_like_torchvision():
    for size in ((333, 500), (500, 333), (72, 301), (1000, 73)):
        assert (
            transforms.resize_shorter_side(noise(*size), 72, transforms.LANCZOS).size
            == reference.resize(noise(*size), 72).size
        )


def test_no_transform_refuses_another_size():
    with pytest.raises(DataError, match=r"data\.transform"):
        transforms.Unchanged(32)(noise(33, 32), ())


def encoded(image: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {}))
    return stream.getvalue()


def test_every_kind_of_image_is_decoded_to_the_colours_that_it_shows():
    red = Image.new("RGB", (16, 16), (200, 30, 40))
    grey = Image.fromarray(np.full((16, 16), 0x4123, dtype=np.uint16))
    for content, expected in (
        (encoded(red, "PNG"), (200, 30, 40)),  # whatever the name of the file says
        (encoded(red.convert("CMYK"), "JPEG"), (200, 30, 40)),
        (encoded(red.quantize(4), "PNG"), (200, 30, 40)),
        (encoded(red.convert("RGBA"), "WEBP"), (200, 30, 40)),
        (encoded(red.convert("L"), "JPEG"), (82, 82, 82)),
        (encoded(grey, "PNG"), (0x41, 0x41, 0x41)),
    ):
        decoded = transforms.decode(content)
        assert decoded.mode == "RGB"
        assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 3


def test_bytes_that_are_no_image_are_a_damaged_sample():
    with pytest.raises(DamagedSampleError, match=r"^these bytes are not an image$"):
        transforms.decode(b"not an image")
    with pytest.raises(DamagedSampleError, match="cannot be decoded"):
        transforms.decode(encoded(noise(50, 50), "JPEG")[:-100])


class TestDamage:
    """Whatever a decoder raises means that the image is damaged; policies then apply."""

    def test_every_kind_of_error(self, monkeypatch):
        content = io.BytesIO()
        Image.new("RGB", (8, 8)).save(content, "PNG")
        for error in (RuntimeError("x"), KeyError("x"), IndexError(), struct.error("x"), EOFError(), TypeError("x"),
                      zlib.error("x"), NotImplementedError(), OverflowError("x"), AssertionError()):  # fmt: skip
            def fails(self, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
                with pytest.raises(DamagedSampleError, match="cannot be decoded"):
                    decode(content.getvalue())
        assert decode(content.getvalue()).size == (8, 8)

    @pytest.mark.parametrize("kind", ["AVIF", "JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_no_flipped_bit_escapes(self, kind):
        if not features.check(kind.lower()) and kind in ("AVIF", "WEBP"):
            pytest.skip(f"Pillow without {kind}")
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(buffer, kind)
        chance = random.Random(kind)
        for _ in range(300):
            content = bytearray(buffer.getvalue())
            for _ in range(chance.choice((1, 2, 8))):
                content[chance.randrange(min(len(content), 120))] ^= 1 << chance.randrange(8)
            with contextlib.suppress(DamagedSampleError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                decode(bytes(content))

    @pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (2, 30000)])
    def test_lines_of_pixels_are_damaged(self, size):
        """Resized to 256 pixels they would take hundreds of megabytes, or all memory."""
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        with pytest.raises(DamagedSampleError, match=f"{size[0]}x{size[1]} pixels"):
            decode(buffer.getvalue())

    def test_long_images_are_not(self):
        buffer = io.BytesIO()
        Image.new("RGB", (10, 1000)).save(buffer, "PNG")
        assert Var(16)(decode(buffer.getvalue()), [0.5, 0.5, 0.5]).size == (16, 16)
