"""WebDataset shards: listing originals, writing, verifying, and the files that describe them.

A shard folder holds ``shard-000000.tar``, ``shard-000001.tar``, ..., beside each a ``.idx`` file for random access
(``index.py``), and ``manifest.json`` (``manifest.py``). The tars are ordinary WebDataset shards, readable without
megavar. Sample ``<key>`` has the members, in this order and adjacent::

    <key>.cls   class index in ASCII (absent for text-image pairs)
    <key>.jpg   the original bytes of the image, never re-encoded (or .png, .webp, .bmp)
    <key>.json  {"height", "path", "sha256", "width"}: the original's size, path and the hash of its bytes
    <key>.txt   caption in UTF-8 (text-image pairs)

Keys are nine digits: the place of the sample in one seeded permutation of all originals. Shard s holds a contiguous
part of that permutation, so every shard is a random mixture of classes and so is every part of it read in order.
"""
