"""Fills the batch scripts in ``slurm/``: every value is quoted for the shell, unless its type says that it is shell.

``{{name}}`` becomes the quoted value, ``{{include file}}`` the text of another file of that folder. Placeholders may
not stand in comments, because a line end in a value would end the comment.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megavar.errors import ConfigError
from megavar.paths import shipped

_PLACEHOLDER = re.compile(r"\{\{(include )?([\w.]+)\}\}")


class Shell(str):
    """Text that is shell already: directives, which are validated, and the operator's own set-up lines."""


Value = Shell | str | int | Path | Sequence[str]


def render(template: str, values: Mapping[str, Value]) -> str:
    """The text of ``slurm/<template>`` with all placeholders replaced by ``values``."""
    text = _with_includes(_text_of(template))
    wanted = {match[2] for match in _PLACEHOLDER.finditer(text)}
    assert wanted == set(values), f"{template} wants {sorted(wanted)}, got {sorted(values)}"
    for line in text.splitlines():
        assert not (line.startswith("#") and _PLACEHOLDER.search(line)), f"placeholder in the comment {line!r}"
    return _PLACEHOLDER.sub(lambda match: _quoted(values[match[2]]), text)


def _text_of(template: str) -> str:
    path = shipped(f"slurm/{template}")
    if path is None:
        raise ConfigError(f"slurm/{template} did not come with this installation of megavar: submit from a checkout.")
    return path.read_text()


def _with_includes(text: str) -> str:
    def content(match: re.Match[str]) -> str:
        return _text_of(match[2]).rstrip("\n") if match[1] else match[0]

    return _PLACEHOLDER.sub(content, text)


def _quoted(value: Value) -> str:
    if isinstance(value, Shell):
        return str(value)
    if isinstance(value, str | int | Path):
        return shlex.quote(str(value))
    return shlex.join(value)


def directives(options: Mapping[str, str | int | bool | None]) -> Shell:
    """``#SBATCH`` lines; ``True`` gives an option without a value, ``None`` and ``False`` leave it out.

    sbatch reads these lines with rules of its own and without the shell, so values may only hold harmless characters.

    Raises:
        ValueError: a value holds blanks, quotes, line ends or other characters that sbatch may interpret.
    """
    lines = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        if value is True:
            lines.append(f"#SBATCH --{name}")
            continue
        text = str(value)
        if not re.fullmatch(r"[A-Za-z0-9._/+=@:,&|*\[\]%-]+", text):
            raise ValueError(
                f"--{name}={text!r} holds characters that may not stand on an #SBATCH line; use letters, "
                f"digits and . _ - / + = @ : ,"
            )
        lines.append(f"#SBATCH --{name}={text}")
    return Shell("\n".join(lines))
