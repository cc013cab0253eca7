"""Text-image pairs in folders, lists and shards of other tools, and weighted mixtures of sources."""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from megavar.config.data import DataConfig, DigitsSource, MixtureSource, PairsSource, ShapesSource, WebDatasetSource
from megavar.config.loading import load_config
from megavar.data.build import build_loader, build_source
from megavar.data.mixture import MixedOrder
from megavar.data.shards.listing import list_originals
from megavar.data.shards.verification import adopt_shards, verify_shards
from megavar.data.shards.writing import Plan, write_shards
from megavar.data.source import DamagedSampleError
from megavar.errors import ConfigError, DataError


def picture(number):
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two pairs with text, one with JSON."""
    for number, name in enumerate("abc"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{name}.png").write_bytes(picture(number))
    (tmp_path / "pairs/a.txt").write_text("\ufeffa red circle\n")
    (tmp_path / "pairs/b.txt").write_text("a blue ring")
    (tmp_path / "pairs/c.json").write_text(json.dumps({"caption": "two bars", "other": {"short": "bars"}}))
    return tmp_path / "pairs"


def captions(source):
    return [source.read(index).caption for index in range(len(source))]


def data(source, **more):
    return DataConfig(source=source, image_size=32, **more)


def test_pairs_in_a_folder(folder):
    source = build_source(data(PairsSource(path=str(folder))))
    assert captions(source) == ["a red circle", "a blue ring", "two bars"]
    assert [source.caption(index) for index in range(3)] == captions(source)
    before = source.fingerprint, source.content_sha256()
    (folder / "b.txt").write_text("a green ring")
    again = build_source(data(PairsSource(path=str(folder))))
    assert again.fingerprint == before[0] and again.content_sha256() != before[1]
    nested = build_source(data(PairsSource(path=str(folder), caption_key="other.short")))
    assert nested.read(2).caption == "bars" and nested.fingerprint != before[0]
    with pytest.raises(DamagedSampleError, match=r"c\.png: its JSON has no 'nothing'"):
        build_source(data(PairsSource(path=str(folder), caption_key="nothing"))).read(2)
    (folder / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.png has no caption"):
        build_source(data(PairsSource(path=str(folder))))


def test_pairs_in_lists(folder):
    """Lines of JSON, or one list; captions in it, or in files that it names, as VGT's lists do."""
    entries = [{"image": "a.png", "caption": "one"}, {"image": "c.png", "annotation": "c.json"}]
    (folder / "list.json").write_text(json.dumps(entries))
    (folder / "list.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    for name in ("list.json", "list.jsonl"):
        assert captions(build_source(data(PairsSource(path=str(folder / name))))) == ["one", "two bars"]
    (folder / "list.json").write_text(json.dumps([*entries, {"image": "b.png"}]))
    with pytest.raises(DataError, match=r"Entry 3 of .*list\.json"):
        build_source(data(PairsSource(path=str(folder / "list.json"))))


def test_shards_of_pairs_hold_captions_from_json(folder, tmp_path):
    plan = Plan(list_originals("pairs", folder), 1, 0, "fail")
    write_shards(plan, tmp_path / "shards")
    source = build_source(data(WebDatasetSource(path=str(tmp_path / "shards"))))
    assert sorted(captions(source)) == ["a blue ring", "a red circle", "two bars"]


@pytest.fixture
def foreign(tmp_path):
    """Tars of another tool, with captions in JSON members."""
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"tars/{shard}.tar", "w") as tar:
            for number in range(4):
                facts = {"meta": {"text": f"picture {shard}{number}"}}
                members = {"png": picture(number), "json": json.dumps(facts).encode()}
                for extension, content in members.items():
                    header = tarfile.TarInfo(f"{number:04d}.{extension}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    return tmp_path / "tars"


@pytest.mark.parametrize("order", ["index", "stream"])
def test_captions_in_json_members(foreign, order):
    adopt_shards(foreign, captions="json")
    assert verify_shards(foreign, full=True) == []
    source = WebDatasetSource(path=str(foreign), caption_key="meta.text", order=order, lanes=2)
    config = data(source)
    loader = build_loader(
        config, build_source(config), seed=0, global_batch_size=8, micro_batch_size=8, stop_step=1
    )
    ((batch,),) = list(loader)
    assert sorted(batch.captions) == [f"picture {shard}{number}" for shard in range(2) for number in range(4)]
    with pytest.raises(ConfigError, match=r"members \.json\. Set data\.source\.caption_key"):
        build_source(data(source.model_copy(update={"caption_key": None})))


def test_a_key_that_the_shards_do_not_need_is_refused(foreign):
    adopt_shards(foreign)
    with pytest.raises(ConfigError, match=r"in members \.txt, as its manifest says.*--captions json"):
        build_source(data(WebDatasetSource(path=str(foreign), caption_key="text")))


def test_weights_are_exact_in_every_block_and_each_source_has_its_epochs():
    order = MixedOrder([10, 3, 50], [4, 1, 2], seed=3)
    epochs, indices = order.locate(0, 7 * 60)
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(
        zip(*(order.locate(start, start + 5) for start in range(0, 420, 5))), (epochs, indices)
    ))  # fmt: skip
    for block in range(60):
        owners = Counter(0 if i < 10 else 1 if i < 13 else 2 for i in indices[7 * block : 7 * block + 7].tolist())
        assert owners == {0: 4, 1: 1, 2: 2}
    for start, stop, times in ((0, 10, 24), (10, 13, 20), (13, 63, 2)):
        mine = [(e, i) for e, i in zip(epochs.tolist(), indices.tolist()) if start <= i < stop]
        assert len(mine) == len(set(mine))
        for epoch in range(times):
            assert sorted(i for e, i in mine if e == epoch) == list(range(start, stop))
    assert not torch.equal(MixedOrder([10, 3, 50], [4, 1, 2], seed=4).locate(0, 420)[1], indices)


@pytest.mark.parametrize("weights", [None, (3, 1)])
def test_ranks_and_workers_see_the_same_mixture(weights):
    mixture = MixtureSource(sources=(ShapesSource(length=30), ShapesSource(length=7, seed=5)), weights=weights)
    config = data(mixture)
    source = build_source(config)

    def batches(ranks, **more):
        loaders = [
            build_loader(
                config.model_copy(update=more), source, seed=1, global_batch_size=8, micro_batch_size=2, stop_step=9,
                data_parallel_rank=rank, data_parallel_size=ranks,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        return [[caption for part in step for batch in part for caption in batch.captions] for step in zip(*loaders)]

    assert batches(1) == batches(2) == batches(2, workers=2)
    first = build_loader(config, source, seed=1, global_batch_size=8, micro_batch_size=8, start_step=4, stop_step=5)
    assert [caption for (batch,) in first for caption in batch.captions] == batches(1)[4]
    if weights:
        ids = torch.cat([batch.sample_ids for step in build_loader(
            config, source, seed=1, global_batch_size=8, micro_batch_size=8, stop_step=9) for batch in step])
        assert int((ids >= 30).sum()) == 18 and source.read(int(ids.max())).key.startswith("scene-")  # fmt: skip


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(ConfigError, match=r"sources\.1 has 10 classes and data\.source\.sources\.0 has 0"):
        build_source(data(MixtureSource(sources=(ShapesSource(), DigitsSource()))))
    overrides = ["data.source={name: mixture, sources: [{name: shapes}, {name: shapes}], weights: [1]}"]
    with pytest.raises(ConfigError, match="1 numbers for 2 sources"):
        load_config("configs/quickstart.yaml", overrides)
