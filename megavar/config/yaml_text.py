"""YAML as configurations are written in it: what YAML 1.1 would quietly read otherwise is refused in words.

``3e-4`` is a number, a key appears once, ``on`` is a word where it is a key, ``010`` is neither 8 nor 10, ``1:30`` is
not 90, and whatever cannot be read is one sentence with file, line and remedy. Merge keys (``<<: *anchor``) and anchors
work as everywhere.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from megavar.errors import ConfigError

_MERGE, _BOOLEAN, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("merge", "bool", "str"))
_TEMPLATE = re.compile(r"\{\{|\{%|<%|\$\{\{")


class _Loader(yaml.SafeLoader):
    """Strict where YAML 1.1 is surprising."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == _BOOLEAN:  # `on`, `off`, `yes`, `no`: keys are words
                key_node.tag = _TEXT
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _problem(f"{key!r} cannot be a key", key_node)
            if key in seen:
                raise _problem(f"{key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Integers and floats, if a person would read them alike."""
        text = str(self.construct_scalar(node))
        digits = text.lstrip("+-").replace("_", "")
        if ":" in text:
            raise _problem(
                f"{text} is a number to the base 60 in YAML: put quotes around it if it is a time, or write the number",
                node,
            )
        if digits.isdecimal() and digits.startswith("0") and digits.strip("0"):
            raise _problem(f"{text} is an octal number in YAML: write {digits.lstrip('0')}, if you mean that", node)
        if node.tag.endswith(":float"):
            return self.construct_yaml_float(node)
        try:
            return self.construct_yaml_int(node)
        except ValueError:  # Python reads 4300 digits at most
            raise _problem(f"{text[:12]}... is a number of {len(digits)} digits", node) from None


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML; ``origin`` names the text in errors.

    Raises:
        ConfigError: it is not YAML, or holds what is refused here.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = _in_words(error)
    except RecursionError:
        problem = "it is nested too deeply"
    hint = " It looks like a template that was not filled in." if _TEMPLATE.search(text) else ""
    raise ConfigError(f"{origin} is not valid YAML: {problem}.{hint}") from None


def _in_words(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character number {error.position + 1}, {chr(_code(error.character))!r}, may not stand in YAML"
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return place + " ".join(" ".join(part for part in (error.context, error.problem) if part).split())


def _code(character: Any) -> int:
    return character if isinstance(character, int) else ord(character[:1] or "\0")


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read: {error.strerror}. Give the path of a YAML file, for example "
            f"configs/quickstart.yaml."
        ) from None
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
            raise ConfigError(f"The configuration {path} is UTF-16 or UTF-32 text. Save it as UTF-8.")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"The configuration {path} is not UTF-8 text: line {line} holds the byte {content[error.start]:#04x}. Save "
            f"it as UTF-8."
        ) from None
