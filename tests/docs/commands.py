"""Commands as README and pages show them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path, heading: str = "") -> Iterator[list[str]]:
    """Words of every command in ``bash`` blocks, from ``heading`` on to the next one."""
    text = page.read_text()
    if heading:
        text = text[text.index(heading) + len(heading) :].split("\n## ")[0]
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words:
                    yield words


def module_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """Of ``python -m MODULE ...`` or ``torchrun ... -m MODULE ...``; None for other programs."""
    if "-m" not in words or not re.match(r"python3?$|torchrun$|[A-Z_]+=", words[0]):
        return None
    place = words.index("-m")
    return words[place + 1], words[place + 2 :]
