"""What lets a reader notice that a sample is not as it was written: captions and classes as well as images.

JPEG decoders accept damage, and a flipped bit of a caption or a class is another caption or class. So the ``.json``
member of a sample holds a ``checksum`` of all its members and of itself (for readers of streams), and the index holds a
CRC-32 of image and caption together (for random access; the class stands in the index, whose hash is known).
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

FORMAT = 2
"""Of shards and indexes. 1: the ``.json`` member holds the hash of the image only, the index its CRC-32 only."""
KEY = "checksum"


def checksum(members: Mapping[str, bytes], facts: Mapping[str, Any]) -> str:
    """Of the members of a sample by extension, and of what its ``.json`` member says beside the checksum."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in members.items() if name != "json"}
    content = [{key: value for key, value in facts.items() if key != KEY}, hashes]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def crc_of(image: bytes, caption: bytes, version: int) -> int:
    """What the index of a format notes of a sample."""
    return zlib.crc32(caption, zlib.crc32(image)) if version >= 2 else zlib.crc32(image)
