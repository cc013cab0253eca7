"""Folders of weights as Hugging Face's transformers and diffusers keep them: ``config.json`` beside one
``.safetensors`` file or numbered ones.

They are read without transformers, by the names in the files, which may differ from those of its modules.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from megavar import storage
from megavar.errors import CheckpointError

NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""Of the one file; where there are several, a file of that name with :data:`INDEX` says in which one each tensor is."""
INDEX = ".index.json"


def _name(folder: Path) -> str | None:
    return next((n for n in NAMES if (folder / n).is_file() or (folder / f"{n}{INDEX}").is_file()), None)


def is_weight_folder(path: Path) -> bool:
    """Whether ``path`` is a folder of this kind (a run or a checkpoint of ours is none)."""
    return _name(path) is not None


def is_own_directory(path: Path) -> bool:
    """Whether ``path`` is a directory that is none of these: a run or a checkpoint of ours."""
    return path.is_dir() and not is_weight_folder(path)


def files_of(folder: Path) -> dict[str, str]:
    """The file of each tensor by its name.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    single = _name(folder) or NAMES[0]
    index = folder / f"{single}{INDEX}"
    if not index.is_file():
        return dict.fromkeys(_names_in(folder / single), single)
    try:
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is damaged ({error}): fetch the folder again.") from error
    missing = sorted({file for file in files.values() if not (folder / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: {index.name} names {len(missing)} files that are not there, the first is "
            f"{missing[0]}. Fetch them."
        )
    return files


def read_folder(folder: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors by their names in the files, on the CPU, as they are stored.

    Args:
        wanted: whether a tensor of that name is read; default: all.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted({file for name, file in files_of(folder).items() if wanted is None or wanted(name)}):
        tensors |= _load(folder / file, wanted)
    return tensors


def write_folder(template: Path, folder: Path, replaced: Mapping[str, Tensor], depth: int | None = None) -> None:
    """Copy ``template`` with other values of some tensors; whatever else it holds stays as it is, byte for byte.

    Tensors keep the type and the file that they have in the template, so unchanged values give an equal folder.

    Args:
        folder: must not exist.
        replaced: values by their names in the template, perhaps without a prefix, which is then the same for all.
        depth: blocks that are kept; blocks ``layers.<n>`` of the replaced ones' prefix are left out from there on, and
            ``config.json`` says so. None: all.

    Raises:
        CheckpointError: the template is damaged, has no such tensors, or other shapes.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists: give a new name, or remove it first.")
    files = files_of(template)
    prefix = _common_prefix(files, replaced, template)
    dropped = {name for name in files if depth is not None and _block(name, prefix) >= depth}
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    shutil.copytree(template, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    size = 0
    for file in sorted(set(files.values())):
        with safe_open(template / file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {name: value for name, value in _load(template / file).items() if name not in dropped}
        for name in tensors:
            if (new := replaced.get(name.removeprefix(prefix))) is not None and name.startswith(prefix):
                tensors[name] = _like(tensors[name], new, name, template)
        size += sum(value.numel() * value.element_size() for value in tensors.values())
        storage.write_bytes_atomic(partial / file, save(tensors, metadata=metadata))
    if dropped:
        _note_depth(partial, dropped, size, depth)
    partial.rename(folder)


def _like(old: Tensor, new: Tensor, name: str, template: Path) -> Tensor:
    if old.shape != new.shape:
        raise CheckpointError(
            f"{name} is {tuple(old.shape)} in {template} and {tuple(new.shape)} in the model: name the folder that the "
            f"model began with."
        )
    return new.to(old.dtype).contiguous()


def _block(name: str, prefix: str) -> int:
    """Number of the block that a tensor belongs to; -1: to none."""
    before = f"{prefix}layers."
    return int(name.removeprefix(before).partition(".")[0]) if name.startswith(before) else -1


def _note_depth(folder: Path, dropped: set[str], size: int, depth: int | None) -> None:
    """Let configuration and index say that blocks are gone."""
    config = json.loads((folder / "config.json").read_text())
    for section in (config, *(config[key] for key in ("text_config", "llm_config") if key in config)):
        if "num_hidden_layers" in section:
            section["num_hidden_layers"] = depth
        if isinstance(section.get("layer_types"), list):
            section["layer_types"] = section["layer_types"][:depth]
    _write_json(folder / "config.json", config)
    place = folder / f"{_name(folder) or NAMES[0]}{INDEX}"
    if place.is_file():
        index = json.loads(place.read_text())
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in dropped}
        index["metadata"]["total_size"] = size
        _write_json(place, index)


def _write_json(path: Path, value: Any) -> None:
    storage.write_bytes_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def _common_prefix(files: Mapping[str, str], replaced: Mapping[str, Tensor], template: Path) -> str:
    """What stands before all replaced names in the template."""
    first = next(iter(replaced))
    candidates = [name.removesuffix(first) for name in files if name.endswith(first)]
    fitting = [prefix for prefix in candidates if all(f"{prefix}{name}" in files for name in replaced)]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{template} does not hold the model's {len(replaced)} tensors ({first}, ...) under one prefix: name the "
            f"folder that the model began with."
        )
    return fitting[0]


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except Exception as error:  # of safetensors' own kind
        raise CheckpointError(f"{path} is truncated or damaged ({error}): fetch it again.") from error


def _load(path: Path, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    try:
        if wanted is None:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118  no dictionary
    except Exception as error:  # of safetensors' own kind
        raise CheckpointError(f"{path} is truncated or damaged ({error}): fetch it again.") from error
