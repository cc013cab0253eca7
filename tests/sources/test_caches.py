"""Caches of a small real tokenizer: bytes, resume, damage, and training from them."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavar.config.data import CacheSource, DataConfig, NoTransform, PhotographsSource, TenCropTransform, VarTransform
from megavar.config.shapes import ShapesSource
from megavar.config.tokenizers.multiscale_vq import MultiScaleVQConfig
from megavar.data.build import build_loader, build_source, build_transform, of_images
from megavar.data.caches import FILE_NAME, CachedSamples, CachePlan, part_name, read_cache_file, weights_sha256
from megavar.data.caching import ViewReader, damaged_parts, forget_parts, verify_cache, write_cache
from megavar.data.pixels import to_float
from megavar.data.reading import SampleReader
from megavar.errors import ConfigError, DataError
from megavar.parallel.seeds import uniform
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.sources.interruption import interruptions, run_until
from tests.sources.originals import content_of, flip_bit

SEED = 5
TOKENIZER = MultiScaleVQ(
    MultiScaleVQConfig(
        scales=(1, 2, 4),
        vocabulary_size=300,
        code_dimension=8,
        base_channels=8,
        channel_multipliers=(1, 1, 2),
        residual_blocks=1,
        norm_groups=4,
        lowest_level_attention=False,
        middle_attention=False,
    )
).eval()


def tokens_of(images):
    return TOKENIZER.tokens(TOKENIZER.encode(images))


ENCODERS = {"tokens": (tokens_of, (21,)), "latents": (TOKENIZER.encode, (8, 4, 4))}


def configure(path, views=3, content="tokens", transform=None):
    images = PhotographsSource(length=50, short_side=128)
    source = CacheSource(path=str(path), views=views, content=content, images=images)
    return DataConfig(source=source, image_size=16, transform=transform or VarTransform())


def prepare(config):
    source = build_source(of_images(config))
    views = config.source.views
    reader = ViewReader(source, build_transform(config), seed=SEED, views=views)
    encode, shape = ENCODERS[config.source.content]
    plan = CachePlan(
        content=config.source.content,
        views=views,
        shape=shape,
        rows=len(source),
        rows_per_part=8,
        batch_rows=3,
        image_size=config.image_size,
        transform=repr(build_transform(config)),
        seed=SEED,
        source=source.fingerprint,
        tokenizer_sha256=weights_sha256(TOKENIZER),
        class_names=source.class_names,
    )
    return plan, reader, encode


def make(config, **arguments):
    plan, reader, encode = prepare(config)
    return write_cache(folder_of(config), plan, reader, encode, **arguments)


def folder_of(config):
    return Path(config.source.path)


@pytest.fixture(scope="module", params=["tokens", "latents"])
def made(request, tmp_path_factory):
    config = configure(tmp_path_factory.mktemp("cache") / request.param, content=request.param)
    make(config)
    return config


@pytest.fixture
def cache(tmp_path):
    config = configure(tmp_path / "cache")
    make(config)
    return config


def online(config, epochs, indices):
    """What the tokenizer makes of the images of an online run."""
    images = of_images(config)
    reader = SampleReader(build_source(images), build_transform(images), seed=SEED)
    return ENCODERS[config.source.content][0](to_float(reader.read(epochs, indices).images))


def test_view_v_is_what_online_training_sees_in_epoch_v(made):
    source = build_source(made)
    assert (len(source), source.num_classes, len(source.cache.part_sha256)) == (50, 10, 7)
    for index in (0, 7, 8, 49):
        sample = source.read(index)
        stored = sample.tokens if made.source.content == "tokens" else sample.latents
        expected = online(made, torch.arange(3), torch.full((3,), index)).detach().numpy()
        assert stored.dtype == (np.uint16 if made.source.content == "tokens" else np.float16)
        assert np.allclose(stored.astype(np.float32), expected, rtol=2e-3, atol=1e-4)
        assert sample.label == index % 10


def test_training_takes_a_view_by_hash(made):
    loader = build_loader(made, build_source(made), seed=11, global_batch_size=10, micro_batch_size=5, stop_step=15)
    batches = [batch for step in loader for batch in step]
    seen = set()
    for batch in batches:
        views = (uniform(11, "augmentation", batch.epochs, batch.sample_ids, 0) * 3).long()
        expected = online(made, views, batch.sample_ids)
        found = batch.tokens if made.source.content == "tokens" else batch.latents
        assert batch.images is None
        assert found.dtype == (torch.int64 if made.source.content == "tokens" else torch.float32)
        assert torch.allclose(found.float(), expected.float(), rtol=2e-3, atol=1e-4)
        assert torch.equal(batch.labels, batch.sample_ids % 10)
        seen |= set(views.tolist())
    assert seen == {0, 1, 2}
    with pytest.raises(ConfigError, match="needs images"):
        batches[0].require_images()


def test_latents_in_half_precision_give_the_same_tokens(tmp_path):
    config = configure(tmp_path, content="latents")
    make(config)
    source = CachedSamples("train", tmp_path)
    latents = torch.from_numpy(np.stack([source.read(index).latents[0] for index in range(50)]))
    cached = TOKENIZER.tokens(latents.float())
    exact = online(configure(tmp_path), torch.zeros(50, dtype=torch.int64), torch.arange(50))
    assert cached.shape == exact.shape == (50, 21)
    assert (cached == exact).float().mean() > 0.98


@pytest.mark.parametrize(("ids", "wide"), [(2**16, False), (2**16 + 1, True), (2**31, True)])
def test_ids_of_large_vocabularies_are_kept(ids, wide, tmp_path):
    """A line of 5 tokens, of which the last is the largest id."""
    config = configure(tmp_path)
    plan, reader, _ = prepare(config)

    def encode(images):
        means = (images.mean((1, 2, 3)) * 1000).long().abs()[:, None]
        return torch.cat([means + torch.arange(4), torch.full_like(means, ids - 1)], dim=1)

    plan = replace(plan, shape=(5,), wide=wide)
    write_cache(tmp_path, plan, reader, encode)
    assert ("wide" in json.loads((tmp_path / FILE_NAME).read_text())) == wide
    source = build_source(config)
    assert source.read(3).tokens.dtype == (np.int32 if wide else np.uint16)
    assert (source.read(3).tokens[:, 4] == ids - 1).all()
    assert verify_cache(tmp_path, reader, encode, rows=20).problems == ()
    (batch,) = next(iter(build_loader(config, source, seed=1, global_batch_size=4, micro_batch_size=4, stop_step=1)))
    assert batch.tokens.dtype == torch.int64 and (batch.tokens[:, 4] == ids - 1).all()
    if not wide:
        with pytest.raises(ConfigError, match="its token space says ids below 65536"):
            write_cache(tmp_path / "other", plan, reader, lambda images: encode(images) + 1)


def test_latents_may_have_any_shape(tmp_path):
    """Of a tokenizer without ids: a row of 6 vectors."""
    config = configure(tmp_path, content="latents")
    plan, reader, _ = prepare(config)
    write_cache(tmp_path, replace(plan, shape=(6, 8)), reader, lambda images: images[:, 0, :6, :8])
    batch = next(iter(build_loader(config, build_source(config), seed=1, global_batch_size=4, micro_batch_size=4)))[0]
    assert batch.latents.shape == (4, 6, 8)


def test_ten_crop_views_are_the_ten_crops(tmp_path):
    config = configure(tmp_path, views=10, transform=TenCropTransform())
    make(config)
    images = of_images(config)
    transform = build_transform(images)
    sample = build_source(images).read(4)
    views = [np.asarray(transform.view(Image.fromarray(sample.image), view)) for view in range(10)]
    expected = tokens_of(to_float(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)))
    assert np.array_equal(build_source(config).read(4).tokens, expected.numpy())
    with pytest.raises(ConfigError, match="10 views"):
        make(configure(tmp_path / "other", views=8, transform=TenCropTransform()))


def test_training_from_ten_crops_is_training_from_images(tmp_path):
    config = configure(tmp_path, views=10, transform=TenCropTransform())
    make(config)
    arguments = {"seed": 3, "global_batch_size": 10, "micro_batch_size": 10, "stop_step": 8}
    images = of_images(config)
    cached = build_loader(config, build_source(config), **arguments)
    for (expected,), (found,) in zip(build_loader(images, build_source(images), **arguments), cached):
        assert torch.equal(found.tokens, tokens_of(expected.images))
        assert torch.equal(found.sample_ids, expected.sample_ids)


def test_bytes_do_not_depend_on_ranks_or_workers(cache, tmp_path):
    expected = content_of(folder_of(cache))
    assert set(expected) == {FILE_NAME, *map(part_name, range(7))}
    parted = configure(tmp_path / "parted")
    assert make(parted, rank=2, world_size=3, workers=1) is None
    assert make(parted, rank=0, world_size=3) is None
    assert make(parted, rank=1, world_size=3) is not None
    assert content_of(folder_of(parted)) == expected
    make(parted, rank=2, world_size=3)  # a rank that starts late finds everything done
    assert content_of(folder_of(parted)) == expected


@pytest.mark.parametrize(("workers", "victims"), [(0, "parent"), (1, "group")])
def test_kill_9_at_any_moment_changes_nothing(cache, tmp_path, workers, victims):
    """Five folders (ten over both cases) are killed at random moments from first to last file, and killed again where
    the continued work takes long enough; then they are finished on another number of ranks."""
    expected = content_of(folder_of(cache))
    counted = configure(tmp_path / "counted")
    steps = run_until(lambda: make(counted, workers=workers), None, victims).steps
    assert steps > 50
    kills = 0
    for folder, moments in interruptions(tmp_path, steps, folders=5, seed=victims):
        config = configure(folder)
        for moment in moments:
            kills += run_until(lambda config=config: make(config, workers=workers), moment, victims).killed
        for rank in range(2):
            make(config, rank=rank, world_size=2)
        assert content_of(folder_of(config)) == expected
    assert kills >= 5


def test_every_flipped_bit_is_found_and_repaired(cache):
    folder = folder_of(cache)
    expected = content_of(folder)
    plan, reader, encode = prepare(cache)
    chance = random.Random(1)
    for name in (FILE_NAME, part_name(0), part_name(6)):
        path = folder / name
        size = path.stat().st_size * 8
        for bit in [0, size - 1, *(chance.randrange(size) for _ in range(30))]:
            flip_bit(path, bit)
            if name == FILE_NAME:
                with pytest.raises(DataError, match=r"cache\.json is damaged"):
                    damaged_parts(folder)
            else:
                assert damaged_parts(folder) == [int(name[5:10])]
            flip_bit(path, bit)
    assert damaged_parts(folder) == []

    flip_bit(folder / part_name(2), 77)
    (folder / part_name(4)).unlink()
    report = verify_cache(folder, reader, encode, rows=20)
    assert [problem.split(":")[0] for problem in report.problems] == [part_name(2), part_name(4)]
    forget_parts(folder, damaged_parts(folder))
    write_cache(folder, plan, reader, encode)
    assert content_of(folder) == expected


def read_all(config):
    source = build_source(config)
    source.check_tokenizer(TOKENIZER)
    return [source.read(index) for index in range(len(source))]


@pytest.mark.parametrize("workers", [0, 1])
def test_training_notices_every_damage(cache, workers):
    """A part is compared with its hash when it is mapped: flipped bits, a file of zeros, two parts exchanged."""
    folder, chance = folder_of(cache), random.Random(2)
    config = cache.model_copy(update={"workers": workers})

    def train():
        loader = build_loader(config, build_source(config), seed=0, global_batch_size=10, micro_batch_size=10,
                              stop_step=5)  # fmt: skip
        return [batch for step in loader for batch in step]

    for _ in range(30 if not workers else 3):
        path = folder / part_name(chance.randrange(7))
        bit = chance.randrange(path.stat().st_size * 8)
        flip_bit(path, bit)
        with pytest.raises(DataError, match=rf"{path.name} is not as it was written.*--repair"):
            train()
        flip_bit(path, bit)
    path = folder / part_name(3)
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=r"part-00003\.bin is not as it was written"):
        train()
    path.write_bytes(content)
    first, second = (folder / part_name(part) for part in (1, 2))
    aside = first.rename(folder / "aside")
    second.rename(first)
    aside.rename(second)
    with pytest.raises(DataError, match=r"part-0000[12]\.bin is not as it was written"):
        train()
    aside = first.rename(folder / "aside")
    second.rename(first)
    aside.rename(second)
    assert len(train()) == 5


def rewrite(folder, part, change):
    """Write rows of a part anew, with a hash that agrees: who makes a cache makes its hashes."""
    cache = read_cache_file(folder)
    rows = np.fromfile(folder / part_name(part), dtype=cache.plan.row)
    change(rows)
    rows.tofile(folder / part_name(part))
    hashes = list(cache.part_sha256)
    hashes[part] = hashlib.sha256(rows.tobytes()).hexdigest()
    (folder / FILE_NAME).write_bytes(replace(cache, part_sha256=tuple(hashes)).encode())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("views", 300, "token id 300, but the tokenizer has only 300"), ("views", 65535, "token id 65535"),
     ("label", 10, "labels from .* to 10, but the cache has 10 classes"), ("label", -2, "labels from -2")],
)  # fmt: skip
def test_what_cannot_be_is_refused_although_its_hash_is_right(cache, name, value, message):
    assert len(read_all(cache)) == 50
    rewrite(folder_of(cache), 2, lambda rows: rows[name].__setitem__(Ellipsis, value))
    with pytest.raises(DataError, match=rf"part-00002\.bin holds .*{message}"):
        read_all(cache)


def test_verification_encodes_rows_again(made):
    _, reader, encode = prepare(made)
    report = verify_cache(folder_of(made), reader, encode, rows=200)
    assert report.problems == ()
    assert 40 <= report.rows <= 50
    assert report.agreement >= 0.999
    other = MultiScaleVQ(TOKENIZER.config).eval()
    torch.manual_seed(1)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    wrong = {"tokens": lambda images: other.tokens(other.encode(images)), "latents": other.encode}
    report = verify_cache(folder_of(made), reader, wrong[made.source.content], rows=20)
    assert report.agreement < 0.9
    assert "expected" in report.problems[0]


def test_a_cache_of_something_else_is_refused(cache):
    folder = folder_of(cache)
    expected = content_of(folder)
    with pytest.raises(DataError, match="views 3 -> 2"):
        make(configure(folder, views=2))
    with pytest.raises(ConfigError, match=r"data\.source\.views is 2.*made with 3"):
        build_source(configure(folder, views=2))
    with pytest.raises(ConfigError, match=r"data\.transform is Var\(.*flip=True"):
        build_source(configure(folder, transform=VarTransform(flip=True)))
    with pytest.raises(ConfigError, match="not random"):
        make(configure(folder.parent / "other", views=2, transform=NoTransform()))
    source = build_source(cache)
    source.check_tokenizer(TOKENIZER)
    other = MultiScaleVQ(TOKENIZER.config)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ConfigError, match="another tokenizer"):
        source.check_tokenizer(other)
    assert content_of(folder) == expected


def test_an_incomplete_cache_is_explained(cache, tmp_path):
    folder = folder_of(cache)
    with pytest.raises(DataError, match="does not exist"):
        build_source(configure(tmp_path / "nowhere"))
    content = (folder / part_name(3)).read_bytes()
    (folder / part_name(3)).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"part-00003\.bin has {len(content) - 1} bytes instead of {len(content)}"):
        build_source(cache)
    (folder / FILE_NAME).unlink()
    with pytest.raises(DataError, match="not a finished cache"):
        build_source(cache)


def test_many_parts_are_not_open_at_once(cache, monkeypatch):
    source = build_source(cache)
    expected = [source.read(row).tokens.tolist() for row in range(50)]
    monkeypatch.setattr("megavar.data.caches.MAPPED_PARTS", 2)
    few = build_source(cache)
    for row in np.random.default_rng(0).permutation(50).tolist():
        assert few.read(row).tokens.tolist() == expected[row]
        assert len(few._parts) <= 2


def test_captions_come_from_the_images_that_were_cached(tmp_path):
    images = ShapesSource(length=20)
    source = CacheSource(path=str(tmp_path / "cache"), images=images)
    config = DataConfig(source=source, image_size=32)
    plan, reader, encode = prepare(config)
    write_cache(tmp_path / "cache", replace(plan, shape=(21,)), reader, lambda images: encode(images[:, :, ::2, ::2]))
    shapes = build_source(of_images(config))
    loader = build_loader(config, build_source(config), seed=0, global_batch_size=20, micro_batch_size=20)
    (batch,) = next(iter(loader))
    assert batch.tokens.shape == (20, 21) and batch.labels.tolist() == [-1] * 20
    assert list(batch.captions) == [shapes.read(index).caption for index in batch.sample_ids.tolist()]
    other = config.model_copy(update={"source": source.model_copy(update={"images": ShapesSource(length=20, seed=1)})})
    with pytest.raises(DataError, match=r"data\.source\.images"):
        build_source(other)


def test_the_test_split_is_images(cache):
    test = build_source(cache, "test")
    assert test.read(0).image.shape == (16, 16, 3)


def test_the_documented_layout_is_what_numpy_reads(cache):
    folder = folder_of(cache)
    content = json.loads((folder / FILE_NAME).read_text())
    row = np.dtype([("label", "<i4"), ("views", "<u2", (3, 21))])
    rows = np.concatenate([np.memmap(folder / part_name(part), dtype=row) for part in range(7)])
    assert len(rows) == content["rows"] == 50
    assert rows["label"].tolist() == [index % 10 for index in range(50)]
    assert rows["views"].max() < 300
    assert read_cache_file(folder).plan.tokenizer_sha256 == weights_sha256(TOKENIZER)
