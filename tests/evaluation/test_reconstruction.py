"""Reconstruction metrics: equal to scikit-image, protocols as published, any number of ranks."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision import transforms

from megavar.chunks import ChunkStore
from megavar.data.photographs import Photographs
from megavar.data.pixels import quantize, to_float
from megavar.errors import DataError
from megavar.evaluation.image_quality import psnr, ssim
from megavar.evaluation.reconstruction import (
    Instruments,
    compare,
    model_input,
    prepare,
    reconstruct_chunks,
    reconstruction_metrics,
)
from megavar.evaluation.reference import Reference
from megavar.evaluation.statistics import gaussian

SIDE = 32


@pytest.fixture(scope="module")
def source():
    return Photographs("test", SIDE, length=30, short_side=128)


def blur(x):
    return torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


@pytest.fixture(scope="module")
def pair(source):
    images = torch.from_numpy(np.stack([source.read(i).image for i in range(4)])).permute(0, 3, 1, 2)
    return images.float() / 255, quantize(blur(to_float(images)), "round").float() / 255


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_psnr_and_ssim_are_those_of_scikit_image(pair, data_range):
    first, second = pair
    ours = ssim(first, second, data_range=data_range)
    for index in range(len(first)):
        x, y = (images[index].permute(1, 2, 0).double().numpy() for images in pair)
        expected = structural_similarity(y, x, data_range=data_range, channel_axis=-1)
        assert float(ours[index]) == pytest.approx(expected, abs=1e-10)
        assert float(psnr(first, second)[index]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-8)


def test_wrong_data_range_inflates_ssim(pair):
    assert (ssim(*pair, data_range=2.0) > ssim(*pair)).all()
    assert torch.isinf(psnr(pair[0], pair[0])).all() and (ssim(pair[0], pair[0]) == 1).all()


def test_rounding_rules_on_exact_levels():
    levels = torch.arange(256, dtype=torch.uint8)
    exact = to_float(levels)
    wrong = {rule: int((quantize(exact, rule) != levels).sum()) for rule in ("round", "half_up", "truncate")}
    assert wrong == {"round": 0, "half_up": 0, "truncate": 63}
    assert quantize(torch.tensor([-2.0, 2.0]), "truncate").tolist() == [0, 255]
    between = torch.tensor([10.25, 10.75, 11.4, 11.6]) / 127.5 - 1
    rounded = {rule: quantize(between, rule).tolist() for rule in wrong}
    assert rounded == {"round": [10, 11, 11, 12], "half_up": [10, 11, 11, 12], "truncate": [10, 10, 11, 11]}


def image_of(width, height):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1).astype(np.uint8)


def test_preparation_is_that_of_each_protocol():
    wide = image_of(100, 60)
    standard = prepare(wide, "standard", 32)
    assert np.array_equal(standard, prepare(wide, "llamagen", 32))
    titok = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC, antialias=True), transforms.CenterCrop(32)]
    )
    assert np.array_equal(prepare(wide, "titok", 32), np.asarray(titok(Image.fromarray(wide))))
    vgt = transforms.Resize((32, 32))(Image.fromarray(wide))
    assert np.array_equal(prepare(wide, "vgt", 32), np.asarray(vgt))
    # a crop shows the middle of the red gradient, a squash all of it
    assert standard[:, 0, 0].mean() > 30 > prepare(wide, "vgt", 32)[:, 0, 0].mean()


def test_standard_protocol_compares_rounded_bytes():
    images = torch.from_numpy(image_of(8, 8)).permute(2, 0, 1)[None]
    x = model_input(images, "standard")
    pair = compare(x, x + 0.3 / 127.5, "standard", size=8)
    assert torch.equal(pair.original_bytes, images) and torch.equal(pair.reconstruction_bytes, images)
    half = compare(x, x + 0.5 / 127.5, "llamagen", size=8)
    assert (half.reconstruction_bytes.int() - images.int()).clamp(max=1).float().mean() > 0.9
    with pytest.raises(DataError, match="own size 8"):
        compare(x, x, "standard", size=4)


def test_vgt_protocol_loses_levels_even_without_a_model():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = to_float(levels)
    exact = compare(x, x, "vgt", size=16)
    wrong = (exact.original_bytes.int() - levels.int())[0]
    assert wrong.ne(0).float().mean() > 0.4  # bfloat16 originals: about half of the levels
    assert exact.reconstruction_bytes.eq(levels)[0, 0].sum() == 256 - 63
    assert not torch.equal(exact.original, exact.reconstruction)
    beyond = compare(x, 3 * x, "vgt", size=16).reconstruction
    assert (beyond.min(), beyond.max()) == (0, 1), "what a model overshoots is cut off before it is measured"
    assert compare(x, x, "vgt", size=8).original.shape == (1, 3, 8, 8)


def run(tmp_path, source, reconstruct, protocol="standard", world_size=1, features=True, perceptual=None):
    weights = torch.randn(3 * 16, 6, generator=torch.Generator().manual_seed(0))

    def project(images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) @ weights

    instruments = Instruments(project if features else None, "toy", perceptual or {})
    store = ChunkStore.open(tmp_path, count=len(source), size=7, identity={})
    shares = [store.missing()[rank::world_size] for rank in range(world_size)]
    for chunks in reversed(shares):
        reconstruct_chunks(
            store,
            source,
            reconstruct,
            instruments,
            protocol=protocol,
            model_size=SIDE,
            size=SIDE,
            device=torch.device("cpu"),
            chunks=chunks,
        )
    return store, instruments, reconstruction_metrics(store, protocol, instruments)


def test_metrics_of_a_blur_and_of_nothing(source, tmp_path):
    store, _, (blurred, notes) = run(tmp_path / "blur", source, blur)
    assert set(blurred) == {"rfid@toy", "psnr", "ssim", "ssim_dr2"} and notes == []
    assert 15 < blurred["psnr"] < 45 and 0.3 < blurred["ssim"] < blurred["ssim_dr2"] < 1 and blurred["rfid@toy"] > 0.1
    _, _, (exact, notes) = run(tmp_path / "exact", source, lambda x: x)
    assert exact["ssim"] == 1 and abs(exact["rfid@toy"]) < 1e-6 and "psnr" not in exact
    assert "30 of 30 images were reconstructed exactly" in notes[0]
    _, _, (most, notes) = run(tmp_path / "most", source, lambda x: torch.cat([x[:1], blur(x[1:])]))
    assert "5 of 30 images were reconstructed exactly" in notes[0], "the first of every chunk of 7"
    others = np.concatenate([arrays["psnr"][1:] for arrays in store.read_all()])
    assert most["psnr"] == pytest.approx(others.mean())


def test_protocol_is_part_of_the_key(source, tmp_path):
    _, _, (metrics, _) = run(tmp_path, source, blur, protocol="vgt")
    assert set(metrics) == {"rfid@toy@vgt", "psnr@vgt", "ssim@vgt", "ssim_dr2@vgt"}


def test_any_number_of_ranks_gives_the_same_numbers(source, tmp_path):
    results = [run(tmp_path / str(n), source, blur, world_size=n)[2] for n in (1, 2, 3)]
    assert results[0] == results[1] == results[2]


def test_training_statistics_add_another_rfid(source, tmp_path):
    store, instruments, (metrics, _) = run(tmp_path, source, blur)
    features = torch.cat([torch.from_numpy(arrays["features_original"]) for arrays in store.read_all()])
    reference = Reference(gaussian(features + 1), None, None, {})
    with_reference, _ = reconstruction_metrics(store, "standard", instruments, reference=reference)
    assert with_reference["rfid_adm@toy"] > metrics["rfid@toy"] == with_reference["rfid@toy"]


def test_perceptual_distances_are_reported(source, tmp_path):
    distance = torch.nn.Module()
    distance.forward = lambda a, b: (a - b).square().mean((1, 2, 3))
    store, _, (metrics, _) = run(tmp_path, source, blur, features=False, perceptual={"lpips_alex": distance})
    assert set(metrics) == {"psnr", "ssim", "ssim_dr2", "lpips_alex"}
    # On images in [-1, 1], whose squared errors are four times those of [0, 1] that PSNR is made of.
    psnrs = np.concatenate([arrays["psnr"] for arrays in store.read_all()])
    assert metrics["lpips_alex"] == pytest.approx(4 * np.mean(10 ** (-psnrs / 10)), rel=1e-5)
