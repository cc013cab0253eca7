from pathlib import Path

import pytest
import torch
from PIL import Image

from megavar.config.data import DataConfig, ImageFolderSource, VarTransform
from megavar.data.build import build_loader, build_source
from megavar.data.image_folder import ImageFolder
from megavar.errors import ConfigError, DataError, ExitCode


def write_folder(root: Path, classes=("cat", "dog"), images=3) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (20, 24 + index), (50 * label, 10 * index, 0)).save(root / name / f"{index}.png")
    return root


def test_classes_are_the_sorted_folders(tmp_path):
    source = ImageFolder("train", write_folder(tmp_path, ("zebra", "ant")))
    assert source.class_names == ("ant", "zebra")
    assert [source.read(index).key for index in range(6)] == [
        "ant/0.png", "ant/1.png", "ant/2.png", "zebra/0.png", "zebra/1.png", "zebra/2.png",
    ]
    assert [source.read(index).label for index in range(6)] == [0, 0, 0, 1, 1, 1]


def test_the_fingerprint_follows_the_listing(tmp_path):
    write_folder(tmp_path)
    before = ImageFolder("train", tmp_path).fingerprint
    assert ImageFolder("train", tmp_path).fingerprint == before
    (tmp_path / "dog" / "2.png").unlink()
    assert ImageFolder("train", tmp_path).fingerprint != before


def test_a_folder_without_what_is_needed_is_explained(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder("train", tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no sub-folders"):
        ImageFolder("train", tmp_path)
    write_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty contains no images"):
        ImageFolder("train", tmp_path)


def test_test_images_need_the_same_classes(tmp_path):
    train, test = write_folder(tmp_path / "train"), write_folder(tmp_path / "test", ("cat", "cow"))
    config = DataConfig(source=ImageFolderSource(path=str(train), test_path=str(test)))
    with pytest.raises(DataError, match="'cow'"):
        build_source(config, "test")
    with pytest.raises(ConfigError, match="test_path"):
        build_source(DataConfig(source=ImageFolderSource(path=str(train))), "test")


def test_a_colour_type_that_is_not_rgb_is_converted(tmp_path):
    (tmp_path / "only").mkdir()
    Image.new("L", (20, 20), 100).save(tmp_path / "only" / "grey.png")
    Image.new("CMYK", (20, 20)).save(tmp_path / "only" / "print.jpg")
    Image.new("RGBA", (20, 20)).save(tmp_path / "only" / "transparent.png")
    config = DataConfig(source=ImageFolderSource(path=str(tmp_path)), image_size=16, transform=VarTransform())
    loader = build_loader(config, build_source(config), seed=0, global_batch_size=3, micro_batch_size=3)
    assert next(iter(loader))[0].images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_the_run_or_is_replaced_and_counted(tmp_path, workers):
    write_folder(tmp_path, images=8)
    whole = (tmp_path / "cat" / "1.png").read_bytes()
    (tmp_path / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    arguments = {"seed": 0, "global_batch_size": 4, "stop_step": 8}
    config = DataConfig(source=ImageFolderSource(path=str(tmp_path)), transform=VarTransform(), workers=workers)
    source = build_source(config)
    with pytest.raises(DataError, match=r"cat/1\.png.*skip-and-count"):
        list(build_loader(config, source, micro_batch_size=4, **arguments))

    config = config.model_copy(update={"damaged_samples": "skip-and-count"})
    loader = build_loader(config, source, micro_batch_size=4, **arguments)
    batches = [batch for step in loader for batch in step]
    assert loader.replaced == 2  # 32 samples are two epochs of 16
    ids = torch.cat([batch.sample_ids for batch in batches])
    replaced = torch.cat([batch.replaced for batch in batches])
    assert 1 not in ids
    assert torch.equal(loader.order.locate(0, 32)[1][replaced], torch.tensor([1, 1]))

    on_two_ranks = [
        [
            batch
            for step in build_loader(
                config, source, micro_batch_size=1, data_parallel_rank=rank, data_parallel_size=2, **arguments
            )
            for batch in step
        ]
        for rank in range(2)
    ]
    ids_of_ranks = [torch.cat([batch.sample_ids for batch in batches]).view(8, 2) for batches in on_two_ranks]
    assert torch.equal(torch.cat(ids_of_ranks, dim=1).flatten(), ids)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("policy", ["fail", "skip-and-count"])
def test_a_file_system_that_fails_is_not_the_datas_fault(tmp_path, workers, policy):
    """A launcher starts the run again, which it does not where samples are damaged."""
    paths = list(write_folder(tmp_path).rglob("*.png"))
    config = DataConfig(source=ImageFolderSource(path=str(tmp_path)), damaged_samples=policy, workers=workers)
    source = build_source(config)
    for path in paths:
        path.unlink()
        path.mkdir()  # reading it raises OSError
    with pytest.raises(DataError, match="Is a directory") as caught:
        next(iter(build_loader(config, source, seed=0, global_batch_size=1, micro_batch_size=1)))
    assert caught.value.exit_code == ExitCode.FAILED


def test_a_folder_that_is_damaged_throughout_ends_the_run(tmp_path):
    for path in write_folder(tmp_path).rglob("*.png"):
        path.write_bytes(b"")
    config = DataConfig(source=ImageFolderSource(path=str(tmp_path)), damaged_samples="skip-and-count")
    with pytest.raises(DataError, match="damaged throughout") as caught:
        next(iter(build_loader(config, build_source(config), seed=0, global_batch_size=1, micro_batch_size=1)))
    assert caught.value.exit_code == ExitCode.CONFIGURATION
