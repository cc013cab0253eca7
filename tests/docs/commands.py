"""Commands as README and pages show them: lines of ``bash`` blocks, and inline code that a reader would paste."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(
    r"([A-Z_]+=\S+ )*(python3? |torchrun |megavar [a-z]+ [A-Z]|tools/\w+\.\w+ .|launchers/\w+\.\w+ .|pip |apt-get |"
    r"git |curl |sbatch |scancel |scontrol |squeue |tail )"
)
"""What begins inline code that is a command, and not a key, a file or a flag."""
_OPTIONAL = re.compile(r" \[[^\]]*\.\.\.\]| \.\.\.$")
"""``[key=value ...]`` of a form that is shown."""


@dataclass(frozen=True)
class Shown:
    """A command as a shell would split it."""

    page: str
    text: str
    program: str
    """The module of ``python -m``, with its subcommand if it has any; else the first word."""
    arguments: tuple[str, ...]
    ranks: int = 1
    """Of ``torchrun``."""
    environment: tuple[str, ...] = ()
    inline: bool = False
    """Within a sentence, where a name without its arguments may stand."""

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [text for kind, text in _FENCED.findall(page.read_text()) if kind == language]


def inline(page: Path) -> list[str]:
    """Code within sentences and tables, its line breaks folded."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _FENCED.sub("", page.read_text()))]


def shown(page: Path, heading: str = "") -> Iterator[Shown]:
    """Every command of a page, blocks first; with a ``heading``, only those of the blocks below it."""
    text = page.read_text()
    lines = [block for kind, block in _FENCED.findall(text) if kind == "bash" and not block.startswith("#!")]
    if heading:
        section = text[text.index(heading) + len(heading) :].split("\n## ")[0]
        lines = [block for kind, block in _FENCED.findall(section) if kind == "bash"]
    for block in lines:
        for line in block.replace("\\\n", " ").splitlines():
            yield from _of_line(page, line)
    if not heading:
        for code in inline(page):
            if _PROGRAM.match(code):
                yield from _of_line(page, code, inline=True)


def _of_line(page: Path, line: str, inline: bool = False) -> Iterator[Shown]:
    words: list[str] = []
    for word in [*shlex.split(_OPTIONAL.sub("", line), comments=True), "&&"]:
        if word != "&&":
            words.append(word)
        elif words:
            yield _of_words(page.name, words, inline)
            words = []


def _of_words(page: str, words: list[str], inline: bool) -> Shown:
    text, environment = shlex.join(words), []
    while re.match(r"[A-Z_]+=", words[0]):
        environment.append(words.pop(0))
    ranks, program = 1, words.pop(0)
    if program in ("python", "python3", "torchrun") and "-m" in words:
        if program == "torchrun":
            ranks = int(words[words.index("--nproc-per-node") + 1])
        del words[: words.index("-m") + 1]
        program = words.pop(0)
    elif program.endswith(".py"):
        program = program.removesuffix(".py").replace("/", ".")
    if program in ("megavar", "launchers.slurm", "tools.evaluate_fid") and words and re.fullmatch("[a-z]+", words[0]):
        program += f" {words.pop(0)}"
    return Shown(page, text, program, tuple(words), ranks, tuple(environment), inline)
