"""Token files as RAR's authors write them: read at any place, indexed once, damage named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megavar.config.data import DataConfig, PhotographsSource, TokenFileSource
from megavar.config.token_space import TokenSpace
from megavar.data.build import build_loader, build_source
from megavar.data.token_file import TokenFile
from megavar.errors import ConfigError, DataError


def write(path: Path, lines: int = 30, length: int = 6) -> list[dict]:
    """As ``scripts/pretokenization.py`` does."""
    rng = np.random.default_rng(0)
    rows = [{"class_id": int(rng.integers(10)), "tokens": rng.integers(1024, size=length).tolist()}
            for _ in range(lines)]  # fmt: skip
    with path.open("w") as file:
        for row in rows:
            json.dump(row, file)
            file.write("\n")
    return rows


class Tokens:
    """A tokenizer as far as a file is compared with it."""

    def __init__(self, length: int = 6, vocabulary: int | None = 1024) -> None:
        self.space = TokenSpace("line", (), length, vocabulary, 4, 16)


def test_every_line_is_a_sample(tmp_path: Path) -> None:
    rows = write(tmp_path / "tokens.jsonl")
    config = DataConfig(source=TokenFileSource(path=str(tmp_path / "tokens.jsonl"), classes=10))
    source = build_source(config)
    assert (len(source), source.num_classes) == (30, 10)
    for index in (29, 0, 13):
        sample = source.read(index)
        assert sample.tokens is not None and sample.tokens.tolist() == [rows[index]["tokens"]]
        assert (sample.label, sample.key) == (rows[index]["class_id"], f"tokens.jsonl:{index + 1}")
    for workers in (0, 1):
        loaded = config.model_copy(update={"workers": workers})
        loader = build_loader(loaded, source, seed=1, global_batch_size=10, micro_batch_size=5, stop_step=3)
        seen = [batch for step in loader for batch in step]
        assert sorted(torch.cat([batch.sample_ids for batch in seen]).tolist()) == list(range(30))
        for batch in seen:
            assert batch.images is None and batch.tokens is not None and batch.tokens.dtype == torch.int64
            assert batch.tokens.tolist() == [rows[index]["tokens"] for index in batch.sample_ids.tolist()]
            assert batch.labels.tolist() == [rows[index]["class_id"] for index in batch.sample_ids.tolist()]


def test_the_index_is_kept_and_belongs_to_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens.jsonl"
    rows = write(path)
    first = TokenFile("train", path, 10)
    with monkeypatch.context() as patch:
        patch.setattr("megavar.data.token_file._scan", lambda path: pytest.fail("lines are found once"))
        again = TokenFile("train", path, 10)
    assert again.fingerprint == first.fingerprint and again.read(7).tokens is not None
    path.write_text(path.read_text().rstrip("\n"))  # the last line without its end
    without = TokenFile("train", path, 10)
    assert len(without) == 30 and without.fingerprint != first.fingerprint
    tokens = without.read(29).tokens
    assert tokens is not None and tokens.tolist() == [rows[29]["tokens"]]
    (tmp_path / "tokens.jsonl.index.npy").write_bytes(b"damaged")
    assert len(TokenFile("train", path, 10)) == 30


def test_blocks_of_any_size_find_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megavar.data import token_file

    write(tmp_path / "tokens.jsonl")
    expected = token_file._scan(tmp_path / "tokens.jsonl")
    monkeypatch.setattr(token_file, "_BLOCK", 7)
    begins, sha256 = token_file._scan(tmp_path / "tokens.jsonl")
    assert np.array_equal(begins, expected[0]) and sha256 == expected[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", r"line 4 of .* is not \{class_id, tokens\}"),
        ('{"class_id": 3, "tokens": [1, 2]}', "it has 2 tokens, and the first line has 6"),
        ('{"class_id": 3, "tokens": [1, 2, 3, 4, 5, 1024]}', "beyond 0 to 1023"),
        ('{"class_id": 10, "tokens": [1, 2, 3, 4, 5, 6]}', r"its class is 10, beyond 0 to 9 \(data.source.classes\)"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "tokens.jsonl"
    write(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
    source = TokenFile("train", path, 10)
    source.check_tokenizer(Tokens())
    assert source.read(4).tokens is not None
    with pytest.raises(DataError, match=said):
        source.read(3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.jsonl"
    with pytest.raises(DataError, match="does not exist"):
        TokenFile("train", path, 10)
    path.write_text("no tokens\n")
    with pytest.raises(DataError, match="is no file of tokens"):
        TokenFile("train", path, 10)
    write(path)
    source = TokenFile("train", path, 10)
    with pytest.raises(ConfigError, match="have 6 tokens, but an image is 8 ids to the tokenizer"):
        source.check_tokenizer(Tokens(length=8))
    with pytest.raises(ConfigError, match="an image is vectors to the tokenizer"):
        source.check_tokenizer(Tokens(vocabulary=None))
    config = DataConfig(source=TokenFileSource(path=str(path)))
    with pytest.raises(ConfigError, match=r"Set data\.source\.images"):
        build_source(config, "test")
    images = PhotographsSource(length=20, test_length=8)
    config = DataConfig(source=TokenFileSource(path=str(path), images=images))
    assert len(build_source(config, "test")) == 8
