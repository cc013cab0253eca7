"""Token ids as the authors of RAR publish and write them: a text file, one JSON object per line.

    {"class_id": 207, "tokens": [1023, 4, ...]}

(``maskgitvq.jsonl``; bytedance/1d-tokenizer ``scripts/pretokenization.py``, whose ten crops of an image are ten lines.)
A sample is a line, so an epoch over 12.8 million lines is ten over ImageNet. The file stays where it is and as it is.
Where lines begin is found once, and kept beside the file in ``NAME.index.npy`` and ``NAME.index.json``; processes map
the former, and no line is read before it is needed. Such a file does not say which tokenizer made it.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from megavar.data.source import DamagedSampleError, Sample, Split
from megavar.errors import ConfigError, DataError
from megavar.storage import atomic_file, write_json_atomic

_BLOCK = 1 << 24
_log = logging.getLogger(__name__)


class TokenFile:
    """The lines of a file of tokens as a data source."""

    def __init__(self, split: Split, path: Path, classes: int) -> None:
        """Open the file, and find its lines if that was not done before.

        Raises:
            DataError: there is no such file, or it holds no line of tokens.
        """
        self.split: Split = split
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"The token file {self.path} does not exist. Correct data.source.path.")
        self.class_names = tuple(str(number) for number in range(classes))
        self._begins, sha256 = _index(self.path)
        if len(self) == 0:
            raise DataError(f"The token file {self.path} has no lines. Correct data.source.path.")
        self.fingerprint = f"token-file-{split}-{len(self)}-{sha256[:16]}"
        self.vocabulary: int | None = None
        """Ids are below it, where the tokenizer is known."""
        try:
            self.length = len(self._parsed(0)[1])
        except DamagedSampleError as error:
            raise DataError(f"{self.path} is no file of tokens: {error}. Correct data.source.path.") from error

    @property
    def num_classes(self) -> int:
        """Number of classes, as configured: the file does not say."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def read(self, index: int) -> Sample:
        """Line ``index``: one view, int64 [1, L].

        Raises:
            DamagedSampleError: the line is not JSON, or says what no tokenizer of this length can have said.
        """
        label, tokens = self._parsed(index)
        if len(tokens) != self.length:
            raise DamagedSampleError(f"it has {len(tokens)} tokens, and the first line has {self.length}")
        limit = self.vocabulary or 1 << 31
        if tokens.min() < 0 or tokens.max() >= limit:
            raise DamagedSampleError(f"its ids go from {tokens.min()} to {tokens.max()}, beyond 0 to {limit - 1}")
        if not 0 <= label < self.num_classes:
            raise DamagedSampleError(f"its class is {label}, beyond 0 to {self.num_classes - 1} (data.source.classes)")
        return Sample(key=f"{self.path.name}:{index + 1}", label=label, tokens=tokens[None])

    def _parsed(self, index: int) -> tuple[int, np.ndarray]:
        begin, end = int(self._begins[index]), int(self._begins[index + 1])
        with self.path.open("rb") as file:
            file.seek(begin)
            line = file.read(end - begin)
        try:
            content = json.loads(line)
            tokens = np.asarray(content["tokens"], dtype=np.int64)
            label = int(content["class_id"])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DamagedSampleError(f"line {index + 1} of {self.path} is not {{class_id, tokens}}: {error}") from error
        if tokens.ndim == 2 and len(tokens) == 1:  # a row of one
            tokens = tokens[0]
        if tokens.ndim != 1 or len(tokens) == 0:
            raise DamagedSampleError(f"the tokens of line {index + 1} of {self.path} are no row")
        return label, tokens

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Make sure that the lines may be of ``tokenizer``; from now on ids must be those of its vocabulary.

        Raises:
            ConfigError: its rows have another length, or its tokens are vectors.
        """
        space = tokenizer.space
        if space.vocabulary is None or space.length != self.length:
            kind = f"{space.length} ids" if space.vocabulary is not None else "vectors"
            raise ConfigError(
                f"The lines of {self.path} have {self.length} tokens, but an image is {kind} to the tokenizer. Give "
                f"the file of this tokenizer, or the tokenizer of this file."
            )
        self.vocabulary = space.vocabulary


def _index(path: Path) -> tuple[np.ndarray, str]:
    """Where lines begin (int64 [lines + 1], the last is the size of the file), and the SHA-256 of the file."""
    places, facts = path.with_name(f"{path.name}.index.npy"), path.with_name(f"{path.name}.index.json")
    status = path.stat()
    now = {"size": status.st_size, "modified": status.st_mtime_ns}
    if facts.is_file() and places.is_file():
        try:
            known = json.loads(facts.read_text())
            begins = np.load(places, mmap_mode="r")
            if {key: known[key] for key in now} == now and len(begins) == known["lines"] + 1:
                return begins, str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _log.warning("The index beside %s is not of this file: making it again.", path)
    begins, sha256 = _scan(path)
    try:
        with atomic_file(places) as file:
            np.save(file, begins)
        write_json_atomic(facts, now | {"lines": len(begins) - 1, "sha256": sha256})
    except OSError as error:  # a folder of which we may only read: every process finds the lines itself
        _log.warning("No index can be kept beside %s (%s): every process reads the whole file once.", path, error)
    return begins, sha256


def _scan(path: Path) -> tuple[np.ndarray, str]:
    digest, ends, offset, last = hashlib.sha256(), [np.zeros(1, dtype=np.int64)], 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")).astype(np.int64) + offset + 1)
            offset, last = offset + len(block), block[-1:]
    if last not in (b"", b"\n"):  # the last line may lack its end
        ends.append(np.array([offset], dtype=np.int64))
    return np.concatenate(ends), digest.hexdigest()
