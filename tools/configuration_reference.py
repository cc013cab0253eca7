"""Every key of every section, as a page: ``python -m tools.configuration_reference [--check]``.

Written from the sections themselves (``megavar/config``), whose docstrings are their documentation, into
``docs/configuration.md``; with ``--check`` that page is compared, and nothing is written.
"""

import argparse
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megavar import storage
from megavar.config.analyses.base import AnalysisChoice
from megavar.config.choice import Choice
from megavar.config.cluster import ClusterConfig
from megavar.config.root import Config
from megavar.config.table import TableConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
COMMAND = "python -m tools.configuration_reference"
HEAD = f"""# Configuration reference

Made by `{COMMAND}` from the sections in [megavar/config](../megavar/config); a test compares
them. One YAML file decides everything about a run. Files inherit with `base:`, any key can be set on the command line
(`optimizer.lr=3e-4`), unknown keys are errors with the nearest valid key. Where a section has a **kind** (`name:`,
`procedure:`, `kind:`), its keys depend on it. A key without a default must be given.

**Paths.** `~` and `$VAR` mean what they do in a shell. A relative path of any key is looked for beside the file that
names it; what does not lie there (a run directory that is yet to be made, say) is relative to the current directory, as
are paths on the command line. With `paths: {{root: DIR}}` in a file, all relative paths that this file names lie in
DIR, itself relative to the file (`root: .` is the file's own folder), and so does the run directory. `configs/...` are
found from everywhere.
"""
ROOTS: tuple[tuple[str, str, type[Any]], ...] = (
    ("Run", "What `megavar train` and all other commands read.", Config),
    ("Cluster", "`slurm/cluster.yaml`, for `python -m launchers.slurm`.", ClusterConfig),
    ("Table", "Files of `configs/tables`, for `megavar reproduce`.", TableConfig),
    ("Analysis", "Keys `analysis.KEY=VALUE` of `megavar analyze KIND`.", AnalysisChoice),
)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, text, root in ROOTS:
        parts.append(f"## {title}\n\n{text}\n")
        seen: set[type[BaseModel]] = set()
        parts += _section("", root, seen)
    return "\n".join(parts).rstrip() + "\n"


def _section(prefix: str, section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    """A section's table, then those of the sections in it; a kind's alternatives one after the other."""
    if section in seen:
        return
    seen.add(section)
    if issubclass(section, Choice) and section.tag() is None:
        for tag, alternative in section.alternatives().items():
            yield from _table(f"{prefix}: {section.discriminator} {tag}".lstrip(": "), prefix, alternative, seen)
        return
    yield from _table(prefix or "top level", prefix, section, seen)


def _table(title: str, prefix: str, section: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[str]:
    seen.add(section)
    lines = [f"### {title}", "", _plain(section.__doc__ or ""), "", "| key | type | default | meaning |",
             "|---|---|---|---|"]  # fmt: skip
    below: list[tuple[str, type[BaseModel]]] = []
    for name, field in section.model_fields.items():
        default = _default(field)
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {_cell(field.description or '')} |")
        for inner in _sections(field.annotation):
            tag = inner.model_fields["name"].default if "name" in inner.model_fields else None
            told = f"{prefix}.{name}".lstrip(".")
            of_union = not issubclass(inner, Choice) and len(list(_sections(field.annotation))) > 1
            below.append((f"{told}: name {tag}" if of_union and isinstance(tag, str) else told, inner))
    yield "\n".join(lines) + "\n"
    for told, inner in below:
        yield from _section(told, inner, seen)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in typing.get_args(annotation):
            yield from _sections(argument)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        name = value.tag() if isinstance(value, Choice) else getattr(value, "name", None)
        return f"`{name}`" if isinstance(name, str) else "see below"
    if value is None:
        return "none"
    if isinstance(value, tuple | dict | list) and not value:
        return "empty"
    return "`" + _cell(str(value).lower() if isinstance(value, bool) else str(value)) + "`"


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        names = dict.fromkeys(_type(argument) for argument in arguments if argument is not type(None))
        return " or ".join(names)
    if origin is tuple:
        return f"list of {_type(arguments[0])}" if arguments else "list"
    if origin is not None and arguments:
        return f"{getattr(origin, '__name__', origin)} of {_type(arguments[-1])}"
    words = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plain(text: str) -> str:
    """Docstrings' markup as Markdown, on one line per paragraph."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text.replace("``", "`"))
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _cell(text: str) -> str:
    return _plain(text).replace("\n\n", " ").replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    given = parser.parse_args(arguments)
    text = page()
    if not given.check:
        storage.write_text_atomic(PAGE, text)
        return 0
    there = PAGE.read_text() if PAGE.exists() else ""
    if there == text:
        return 0
    ours, theirs = text.splitlines(), set(there.splitlines())
    first = next((line for line in ours if line not in theirs), "(something that is no longer there)")
    print(f"{PAGE} is not what the sections say, first at: {first[:120]}\nMake it anew: {COMMAND}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
