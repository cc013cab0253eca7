"""What README and pages say is there: every key, every link."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import PAGES, ROOT


def test_the_configuration_reference_is_what_the_sections_say() -> None:
    """In a process of its own: others have plugins."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.configuration_reference", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_key_of_every_section_has_a_meaning() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", text, re.MULTILINE)
    assert len(rows) > 400
    alone = re.compile(r"`[^`]+`")  # the only possible value: a kind's own name
    silent = {name for name, kind, _, meaning in rows if not meaning.strip() and not alone.fullmatch(kind)}
    assert not silent, f"these keys have no docstring: {sorted(silent)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            place, _, anchor = target.partition("#")
            assert (page.parent / place).exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (page.parent / place).read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page.name}: {target}"


def test_every_page_can_be_found() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in readme]


def test_every_room_is_named() -> None:
    rooms = {path.parent.name for path in (ROOT / "megavar").glob("*/__init__.py")}
    named = set(re.findall(r"megavar/(\w+)", (ROOT / "docs/rooms.md").read_text()))
    assert rooms <= named, rooms - named


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
