"""Images with captions in files beside them, or named in a list."""

import codecs
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megavar.data.captions import decode_caption
from megavar.data.shards.listing import Original, list_originals
from megavar.data.source import Sample, Split
from megavar.storage import sha256_of_file


class Pairs:
    """What ``megavar/data/shards/listing.py`` lists as ``pairs``, read as encoded bytes.

    The fingerprint covers paths and the captions that stand in the list; ``content_sha256`` the files, too.
    """

    class_names: tuple[str, ...] = ()
    num_classes = 0

    def __init__(self, split: Split, path: Path, caption_key: str = "caption") -> None:
        """List ``path``: a folder, or a ``.jsonl`` or ``.json`` file.

        Raises:
            DataError: nothing is there, or an image has no caption.
        """
        self.split: Split = split
        listing = list_originals("pairs", Path(path))
        self.root, self.caption_key = listing.root, caption_key
        self._originals = listing.originals
        digest = hashlib.sha256(f"{listing.sha256()} {caption_key}".encode())
        self.fingerprint = f"pairs-{split}-{len(self)}-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._originals)

    def content_sha256(self) -> str:
        """Hash of the content of all files. Reads every byte."""
        paths = [path for one in self._originals for path in (one.path, one.caption_path) if path is not None]
        with ThreadPoolExecutor(8) as pool:
            hashes = pool.map(lambda path: sha256_of_file(self.root / path), paths)
            return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def read(self, index: int) -> Sample:
        """Sample ``index`` with its encoded image."""
        original = self._originals[index]
        return Sample(
            key=original.path, label=-1, image=(self.root / original.path).read_bytes(), caption=self._caption(original)
        )

    def caption(self, index: int) -> str:
        """Caption of sample ``index``, without its image."""
        return self._caption(self._originals[index])

    def _caption(self, original: Original) -> str:
        if original.caption is not None:
            return original.caption
        assert original.caption_path is not None
        path = self.root / original.caption_path
        key = self.caption_key if path.suffix == ".json" else None
        return decode_caption(path.read_bytes().removeprefix(codecs.BOM_UTF8), original.path, key).strip()
