"""Tables as VLMEvalKit publishes them: tab-separated, images in base64 or, to save space, the index of the row that has
the image. A rank holds the table in memory, encoded images included.
"""

import base64
import binascii
import csv
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from megavar.errors import DataError

Row = Mapping[str, str]
_LONGEST_REFERENCE = 64
"""Characters; what is longer is an image."""
_LONGEST_FIELD = 2**31 - 1


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows as {column: text}, empty where a cell is.

    Raises:
        DataError: there is no such file, or it lacks one of ``columns``.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            rows: list[Row] = list(reader)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({error}): name VLMEvalKit's .tsv file.") from error
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}: name VLMEvalKit's .tsv file with images and answers.")
    return rows


class Images:
    """The images of a table."""

    def __init__(self, rows: Sequence[Row], path: Path) -> None:
        """Look up references.

        Raises:
            DataError: a row refers to a row that has no image.
        """
        self._encoded = {row["index"]: row["image"] for row in rows}
        for index, value in self._encoded.items():
            if len(self._encoded.get(value, value)) <= _LONGEST_REFERENCE:
                raise DataError(f"{path}: row {index} has no image, nor the index of a row with one: fetch it again.")

    def key(self, row: Row) -> str:
        """The index of the row that has this row's image."""
        return row["image"] if row["image"] in self._encoded else row["index"]

    def of(self, row: Row) -> "functools.partial[bytes]":
        """What decodes a row's image."""
        return functools.partial(_decode, self._encoded[self.key(row)], row["index"])


def _decode(text: str, index: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"The image of row {index} is not in base64 ({error}): fetch the table again.") from error
