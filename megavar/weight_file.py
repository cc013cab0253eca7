"""Files of weights: state dicts as others publish them, and our own exports.

An export (``tools/convert_checkpoint.py`` to ``.safetensors``) holds logical tensors and persistent buffers under our
names (``parallel/logical.py``): what a model built from the same section of the configuration consists of, under any
parallel layout and expert backend. Its metadata says what it is; see :class:`About`. :func:`read_weights_file` reads
such a file, or a file or folder in a public weight layout of the model, into the same names and shapes.
"""

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

import megavar
from megavar import storage, weight_layout
from megavar.errors import CheckpointError
from megavar.state_dicts import state_dicts, without_wrappers
from megavar.weight_folder import is_weight_folder, read_folder
from megavar.weight_layout import Shape, WeightLayout

_log = logging.getLogger(__name__)

OURS = "megavar"
"""The weight layout of our own exports."""
AUTO = "auto"
FORMAT = 3
"""1: until commit 9f0263a, metadata ``module``, ``step``, ``weights``; 2: without ``config``, tokenizer and names of
classes. All are read."""
EMBEDDED = "tokenizer/"
"""Beginning of the names of the tokenizer's tensors in an export of a generator."""
_DESCRIPTION = (
    "Logical tensors of megavar, whatever the parallel layout. Open with megavar.load(FILE), which is strict. Modules "
    "name some of them otherwise (experts): their load_state_dict(strict=False) would leave those random."
)


@dataclass(frozen=True)
class About:
    """What the metadata of an export say of it."""

    module: str
    """Name of the module in its recipe."""
    step: int
    """Steps that it was trained."""
    weights: str
    """``model``, or ``ema`` for their moving average."""
    choice: Mapping[str, Any]
    """Its section of the configuration; empty if nobody knew."""
    space: Mapping[str, Any]
    """The token space of its tokenizer."""
    dropped: tuple[str, ...] = ()
    """Beginnings of the names of tensors that were left out."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration of the run; empty if nobody knew."""
    class_names: tuple[str, ...] = ()
    """By label; empty if nobody knew."""
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    """Identity of the weights of the tokenizer that a generator learned from; empty if nobody knew."""


def write_export(
    path: Path, tensors: Mapping[str, Tensor], about: About, tokenizer: Mapping[str, Tensor] | None = None
) -> None:
    """Write logical tensors and buffers into a ``.safetensors`` file, atomically.

    Args:
        tokenizer: those of the tokenizer that a generator learned from, to make the file complete.
    """
    facts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in asdict(about).items()}
    facts |= {"format": OURS, "format_version": str(FORMAT), "megavar": megavar.__version__}
    facts["description"] = _DESCRIPTION
    every = dict(tensors) | {f"{EMBEDDED}{name}": value for name, value in (tokenizer or {}).items()}
    contiguous = {name: value.contiguous() for name, value in every.items()}
    storage.write_bytes_atomic(path, save(contiguous, metadata=facts))


def read_metadata(path: Path) -> dict[str, str]:
    """Metadata of a ``.safetensors`` file; nothing for other files and for files without.

    Raises:
        CheckpointError: it is damaged.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # of safetensors' own kind
        raise CheckpointError(f"The file of weights {path} cannot be read: {_reason(path, error)}") from error


def stored_value(metadata: Mapping[str, str], name: str, default: Any, path: Path) -> Any:
    """A value of an export's metadata, of the type of ``default``, which stands for an absent one.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        value = json.loads(metadata[name]) if name in metadata else default
    except ValueError:
        value = None
    if not isinstance(value, type(default)):
        raise CheckpointError(f"{path} is damaged: {name!r} of its metadata cannot be read. Export it again.")
    return value


def embedded_tokenizer(path: Path) -> dict[str, Tensor]:
    """Tensors of the tokenizer that an export of a generator holds, by its own names; nothing if it holds none."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(EMBEDDED)]  # noqa: SIM118  no dictionary
        return {name.removeprefix(EMBEDDED): file.get_tensor(name) for name in names}


def names_in_export(path: Path) -> set[str]:
    """Names of the tensors of a ``.safetensors`` file, unread; nothing for other files."""
    if path.suffix != ".safetensors" or not path.is_file():
        return set()
    with safe_open(path, framework="pt") as file:
        return {name for name in file.keys() if not name.startswith(EMBEDDED)}  # noqa: SIM118  no dictionary


def read_weights_file(
    path: Path,
    expected: Mapping[str, Shape],
    layouts: Mapping[str, WeightLayout],
    layout: str = AUTO,
    fresh: tuple[str, ...] = (),
    what: str = "The file of weights",
) -> dict[str, Tensor]:
    """The tensors of a model from an export of ours or from a file in one of its public layouts, strictly.

    Args:
        path: ``.safetensors``, or a pickled state dict.
        expected: shape of every logical tensor and persistent buffer of the model by name.
        layouts: the model's public layouts by name.
        layout: the one of the file; ``megavar`` for ours, ``auto`` finds out.
        fresh: beginnings of our names of tensors that are not taken, whether the file has them or not.
        what: what the file should be, for messages.

    Returns:
        CPU tensors of the expected names and shapes without fresh ones, floating-point ones in float32. Some may be
        absent where a public layout says so.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are not those of the model.
    """
    path = Path(path)
    fitting: dict[str, dict[str, Tensor]] = {}
    problems = []
    states = read_state_dicts(path, what)
    for place, state in states.items():
        state = {name: value for name, value in state.items() if not name.startswith(EMBEDDED)}
        try:
            fitting[place] = _fitted(state, read_metadata(path), expected, layouts, layout, fresh)
        except CheckpointError as error:
            problems.append(f"{error}" if len(states) == 1 else f"In {place!r}: {error}")
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        raise CheckpointError(
            f"{what} {path} holds {len(fitting)} state dicts of this model: {', '.join(fitting)}. Save the one that "
            f"you mean in a file of its own."
        )
    raise CheckpointError(f"{what} {path} cannot be used: {' '.join(problems)}")


def _fitted(
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    expected: Mapping[str, Shape],
    layouts: Mapping[str, WeightLayout],
    layout: str,
    fresh: tuple[str, ...],
) -> dict[str, Tensor]:
    """As :func:`read_weights_file`, from one state dict."""
    passed = {name: shape for name, shape in expected.items() if name.startswith(fresh)}
    expected = {name: shape for name, shape in expected.items() if name not in passed}
    ours = state.keys() >= expected.keys()
    candidates = _candidates(metadata, layouts, ours) if layout == AUTO else (layout,)
    problems = []
    for name in candidates:
        try:
            if name == OURS:
                return _read_ours({n: v for n, v in state.items() if not n.startswith(fresh)}, metadata, expected)
            if name not in layouts:
                raise CheckpointError(f"the model has no weight layout {name!r}; it has {', '.join([*layouts, OURS])}.")
            return layouts[name].load(state, expected, passed)
        except CheckpointError as error:
            problems.append(f"{error}" if len(candidates) == 1 else f"As {name!r}: {error}")
    raise CheckpointError(" ".join(problems))


def _candidates(metadata: Mapping[str, str], layouts: Mapping[str, WeightLayout], ours: bool) -> tuple[str, ...]:
    """The weight layouts that a file may have, the likeliest first.

    Args:
        ours: whether the file has all of our names.
    """
    if metadata.get("format") == OURS:
        return (OURS,)
    if metadata.get("weight_layout") in layouts:
        return (metadata["weight_layout"],)
    return (*layouts, OURS) if ours or not layouts else tuple(layouts)


def _read_ours(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], expected: Mapping[str, Shape]
) -> dict[str, Tensor]:
    version = metadata.get("format_version", "1")
    if not version.isdigit() or int(version) > FORMAT:
        raise CheckpointError(
            f"it was exported by a newer megavar ({metadata.get('megavar', 'unknown')}): its format is {version}, this "
            f"version reads formats 1 to {FORMAT}. Use that version, or export again with this one."
        )
    problems = weight_layout.differences(expected, {name: tuple(value.shape) for name, value in state.items()})
    if problems:
        made = f" It was made of {metadata['choice']}." if metadata.get("choice", "{}") != "{}" else ""
        raise CheckpointError(
            f"it does not fit the configured model: {'; '.join(problems)}.{made} Give the configuration that it was "
            f"trained with, or another file."
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def read_state_dict(path: str | Path, what: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a ``.pth`` state dict, on the CPU, mapped where possible.

    Args:
        path: the file. Of a pickle only tensors and plain containers are accepted.
        what: what the file should be, for messages ("Tokenizer checkpoint").

    Raises:
        CheckpointError: the file is missing, cannot be read, holds something else, or several state dicts.
    """
    states = read_state_dicts(path, what)
    if len(states) > 1:
        raise CheckpointError(
            f"{what} {path} holds {len(states)} state dicts: {', '.join(states)}. Save the one that you mean in a file "
            f"of its own."
        )
    return next(iter(states.values()))


def read_state_dicts(path: str | Path, what: str) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file by their places in it, without what wrappers added to names; a warning says so.

    A plain state dict is the only one, at "". Arguments and errors as in :func:`read_state_dict`.
    """
    path = Path(path)
    if is_weight_folder(path):
        return {"": read_folder(path)}
    if not path.is_file():
        raise CheckpointError(
            f"{what} {path} does not exist. Give the path of a downloaded or exported state dict (.pth, .safetensors)."
        )
    try:
        content = load_file(path) if _is_safetensors(path) else _load_pickle(path)
    except Exception as error:  # a file that is no pickle may raise almost anything
        raise CheckpointError(f"{what} {path} cannot be read: {_reason(path, error)}") from error
    found = state_dicts(content)
    if not found:
        raise CheckpointError(
            f"{what} {path} is not a plain state dict (names to tensors). If it is a training checkpoint, extract the "
            "model's state dict from it first."
        )
    result = {}
    for place, state in found.items():
        result[place], removed = without_wrappers(state)
        if place or removed:
            names = f" without {' and '.join(map(repr, removed))} in their names" if removed else ""
            _log.warning("%s: tensors%s are read%s.", path, f" of {place!r}" if place else "", names)
    return result


_TEXTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`.",
    b"<": "it is a web page: the download was answered with a message. Look into it, and fetch the weights again.",
    b"{": "it is JSON, not weights. Name the file of the weights.",
}
_FOREIGN = re.compile(r"GLOBAL (\S+)|class(?:es)? (\S+)|type (\S+)")


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file of weights, and what to do. Never torch's advice, which is to load it unsafely."""
    with path.open("rb") as file:
        beginning = file.read(24)
    if not beginning:
        return "it is empty. Fetch or export it again."
    text = beginning.lstrip() if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in beginning) else b""
    for start, reason in _TEXTS.items():
        if text.startswith(start):
            return reason
    if beginning.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip. Decompress it first."
    if beginning.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "it is a truncated PyTorch file. Fetch or export it again."
    if isinstance(error, pickle.UnpicklingError) and (found := _FOREIGN.search(str(error))):
        named = next(group for group in found.groups() if group)
        return (
            f"beside tensors it holds objects ({named.rstrip('.,')}) that could run code, so it is not opened. If it "
            f"is a training checkpoint of yours, export the plain state dict of its model first."
        )
    first = (str(error).splitlines() or [type(error).__name__])[0]
    first = "" if "weights_only" in first else f"{first}. "
    return f"{first}It is truncated, damaged or not a state dict of tensors: fetch or export it again."


def _is_safetensors(path: Path) -> bool:
    """By content, because files are renamed: eight bytes of length, and the JSON of the header."""
    with path.open("rb") as file:
        beginning = file.read(9)
    return path.suffix == ".safetensors" or (beginning[8:] == b"{" and not beginning.startswith((b"PK", b"\x80")))


def _load_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # of the format before torch 1.6, which cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``given`` from being loaded strictly into a model with the tensors ``expected``, in words."""
    return weight_layout.differences(*({name: tuple(v.shape) for name, v in of.items()} for of in (expected, given)))
