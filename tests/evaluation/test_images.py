"""Images read from files, and written for ADM's script, keep every byte and a stated order."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from megavar.chunks import ChunkStore
from megavar.config.data import DataConfig, ImageFolderSource
from megavar.data.build import build_source, build_transform
from megavar.errors import DataError
from megavar.evaluation.export import export_npz, export_order, is_sorted_by_class
from megavar.evaluation.images import NpzImages, PngFolder, SourceImages, open_images
from megavar.sampling.samples import Samples

COUNT, CLASSES = 23, 5


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (COUNT, 3, 6, 4), generator=generator).to(torch.uint8), torch.arange(COUNT) % CLASSES


@pytest.fixture
def chunks(tmp_path, pictures):
    images, labels = pictures
    store = ChunkStore.open(tmp_path / "chunks", count=COUNT, size=4, identity={})
    for chunk in store.missing():
        rows = slice(*store.range(chunk))
        store.write(chunk, {"labels": labels[rows].numpy(), "images": images[rows].numpy()})
    return store.directory


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_ranges_from_disk(tmp_path, pictures, save):
    images, labels = pictures
    save(tmp_path / "x.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=labels.numpy())
    opened = open_images(tmp_path / "x.npz", Samples.stored)
    assert isinstance(opened, NpzImages) and len(opened) == COUNT
    assert isinstance(opened._images, np.memmap) == (save is np.savez)
    assert torch.equal(opened.read(3, 9), images[3:9]) and torch.equal(opened.labels, labels)


def test_folder_is_ordered_by_number_not_by_file_system(tmp_path, pictures):
    images, _ = pictures
    for index in torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).tolist():
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    opened = open_images(tmp_path, Samples.stored)
    assert isinstance(opened, PngFolder) and torch.equal(opened.read(0, COUNT), images)
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / "1.jpg")
    again = open_images(tmp_path, Samples.stored)
    assert "1 JPEG" in again.notes[0] and len(again) == COUNT and again.identity == opened.identity
    Image.fromarray(np.zeros((6, 4, 3), np.uint8)).save(tmp_path / "7.png")  # another image under the same name
    assert open_images(tmp_path, Samples.stored).identity != opened.identity


def test_chunks_are_read_across_their_boundaries(chunks, pictures):
    images, labels = pictures
    opened = open_images(chunks, Samples.stored)
    assert isinstance(opened, Samples) and len(opened) == COUNT and torch.equal(opened.labels, labels)
    for first, last in ((0, COUNT), (3, 5), (4, 8), (7, 22), (22, 23)):
        assert torch.equal(opened.read(first, last), images[first:last])
    (chunks / "chunk_000002.npz").unlink()
    with pytest.raises(DataError, match=r"1 of 6 chunks are missing.*chunk_000002"):
        open_images(chunks, Samples.stored)


def test_data_source_is_an_image_set():
    config = DataConfig()
    source = build_source(config, "test")
    images = SourceImages(source, build_transform(config, "test"))
    assert len(images) == 364 and images.read(5, 7).shape == (2, 3, 16, 16)
    assert np.array_equal(images.read(5, 6)[0].permute(1, 2, 0).numpy(), source.read(5).image)
    assert images.identity["fingerprint"] == source.fingerprint


def test_unusable_files_are_refused(tmp_path, pictures):
    images, _ = pictures
    with pytest.raises(DataError, match="no PNG files"):
        open_images(tmp_path, Samples.stored)
    with pytest.raises(DataError, match="does not exist"):
        open_images(tmp_path / "absent", Samples.stored)
    np.savez(tmp_path / "channels_first.npz", arr_0=images.numpy())
    with pytest.raises(DataError, match=r"\[N, H, W, 3\]"):
        open_images(tmp_path / "channels_first.npz", Samples.stored)
    np.savez(tmp_path / "other.npz", x=images.numpy())
    with pytest.raises(DataError, match="no member arr_0"):
        open_images(tmp_path / "other.npz", Samples.stored)
    content = (tmp_path / "channels_first.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.npz"):
        open_images(tmp_path / "cut.npz", Samples.stored)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match=r"0\.png cannot be decoded"):
        open_images(tmp_path / "bad", Samples.stored).read(0, 1)


@pytest.mark.parametrize("order", ["interleaved", "shuffled"])
def test_export_is_byte_for_byte_what_numpy_writes_in_a_stated_order(tmp_path, chunks, pictures, order):
    images, labels = pictures
    opened = open_images(chunks, Samples.stored)
    export_npz(tmp_path / "out.npz", opened, order)
    sequence = export_order(opened, order)
    assert sorted(sequence.tolist()) == list(range(COUNT))
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and not np.isfortran(file["arr_0"])
        assert np.array_equal(file["arr_0"], images[sequence].permute(0, 2, 3, 1).numpy())
        assert np.array_equal(file["arr_1"], labels[sequence].numpy())
    with zipfile.ZipFile(tmp_path / "out.npz") as archive:  # ADM's reader streams uncompressed members only
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    if order == "interleaved":
        assert torch.equal(sequence, torch.arange(COUNT))
    assert torch.equal(open_images(tmp_path / "out.npz", Samples.stored).read(0, COUNT), images[sequence])


def test_export_reads_every_image_once_and_leaves_nothing_else(tmp_path, chunks):
    opened, read = open_images(chunks, Samples.stored), []
    opened._read = lambda chunk, original=opened._read: read.append(chunk) or original(chunk)
    (tmp_path / "out").mkdir()
    export_npz(tmp_path / "out" / "x.npz", opened, "shuffled")
    assert read == list(range(6)) and [path.name for path in (tmp_path / "out").iterdir()] == ["x.npz"]


def test_class_sorted_exports_are_refused(tmp_path, pictures):
    images, labels = pictures
    by_class = torch.argsort(labels, stable=True)
    np.savez(tmp_path / "sorted.npz", arr_0=images[by_class].permute(0, 2, 3, 1), arr_1=labels[by_class])
    opened = open_images(tmp_path / "sorted.npz", Samples.stored)
    assert is_sorted_by_class(opened.labels)
    for order in ("interleaved", "shuffled"):
        assert not is_sorted_by_class(opened.labels[export_order(opened, order)])
    for order in ("sorted", "index"):
        with pytest.raises(DataError, match="sorted by class"):
            export_npz(tmp_path / "out.npz", opened, order)
    opened.labels = None
    with pytest.raises(DataError, match="no labels"):
        export_npz(tmp_path / "out.npz", opened, "interleaved")
    assert not (tmp_path / "out.npz").exists()


def test_pictures_drawn_anew_are_other_images(tmp_path):
    """Under the same names, with the same sizes of the files: only the content tells them apart."""
    rows = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(rows).save(tmp_path / "0.png", compress_level=0)
    before, size = open_images(tmp_path, Samples.stored), (tmp_path / "0.png").stat().st_size
    assert open_images(tmp_path, Samples.stored).identity == before.identity
    Image.fromarray(rows[::-1].copy()).save(tmp_path / "0.png", compress_level=0)
    assert (tmp_path / "0.png").stat().st_size == size
    assert open_images(tmp_path, Samples.stored).identity != before.identity


def test_an_image_folder_is_identified_by_content_where_features_are_kept(tmp_path):
    (tmp_path / "cat").mkdir()
    config = DataConfig(source=ImageFolderSource(path=str(tmp_path)), image_size=4)

    def identity():
        Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(tmp_path / "cat" / "0.png", compress_level=0)
        return SourceImages(build_source(config), build_transform(config)).identity

    shade = 1
    before, again = identity(), identity()
    shade = 2
    assert before == again != identity()


def test_images_of_several_sizes_are_refused_before_anything_is_scored(tmp_path):
    for index in range(5):
        side = 64 if index == 3 else 32
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"2 sizes: 4 of 32x32 pixels, but 1 of 64x64, for example 3\.png"):
        open_images(tmp_path, Samples.stored)


LABELS = {
    "one-hot": (np.eye(3, dtype=np.int64), r"int64 \[3, 3\]"),
    "short": (np.arange(2), r"int64 \[2\]"),
    "long": (np.arange(4), r"int64 \[4\]"),
    "text": (np.array(["a", "b", "c"]), r"<U1 \[3\]"),
    "negative": (np.array([0, -1, 2]), "from -1 to 2"),
    "fractions": (np.array([0.5, 1, 2]), "float64"),
    "not numbers": (np.array([0, 1, np.nan]), "float64"),
    "too large": (np.array([0, 1, 10**12]), "to 1000000000000"),
    "of a single one": (np.array(1), r"int64 \[\]"),
    "truth values": (np.array([True, False, True]), "bool"),
}


@pytest.mark.parametrize("labels, found", LABELS.values(), ids=LABELS)
def test_labels_are_one_class_number_per_image(tmp_path, labels, found):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8), arr_1=labels)
    with pytest.raises(DataError, match=f"arr_1 of .*x.npz is .*{found}.*int64 \\[3\\]"):
        NpzImages(tmp_path / "x.npz")


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float32])
def test_whole_numbers_of_any_type_are_labels(tmp_path, dtype):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8), arr_1=np.array([2, 0, 1], dtype))
    labels = NpzImages(tmp_path / "x.npz").labels
    assert labels.dtype == torch.int64 and labels.tolist() == [2, 0, 1]
