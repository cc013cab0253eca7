"""Convert weights between megavar's checkpoints, its exports, and the layouts of public checkpoints.

    python -m tools.convert_checkpoint runs/mepa-d16 weights.safetensors --ema     the newest checkpoint of a run
    python -m tools.convert_checkpoint runs/var-d16/checkpoints/step-00250000 var_d16.pth
    python -m tools.convert_checkpoint runs/tokenizer vae.pth                      VAR's VQVAE layout
    python -m tools.convert_checkpoint var_d16.pth weights.safetensors --config configs/mepa/var_d16.yaml
    python -m tools.convert_checkpoint runs/queryar tuned --ema --into weights/InternVL3-1B-hf      back into its folder

An export (``.safetensors`` without --layout) holds our names, the configuration, class names and a generator's
tokenizer, and ``megavar.load`` opens it; with --layout, or as ``.pth``, a file holds the names of a public weight
layout of the model. A run begins with either under ``train.initial_weights``, and ``recipe.tokenizer_weights`` takes
either. Shapes must be those of the configured model, exactly. Heads that a recipe's terms trained beside the model
(names that begin with ``heads.``) are left out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from safetensors.torch import save
from torch import Tensor

from megavar import storage
from megavar.assembly import (
    build_trained,
    load_tokenizer,
    trained_choice,
    weight_layouts,
    write_into_folder,
)
from megavar.config.loading import load_config, read_tree, stored_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.errors import CheckpointError, ConfigError, ExitCode
from megavar.frozen import TOKENIZER, check_same, identify, identities
from megavar.library.loading import class_names, find_tokenizer
from megavar.parallel import topology
from megavar.parallel.environment import Environment
from megavar.paths import as_path
from megavar.training.checkpoint import find_checkpoint, read_weights
from megavar.training.checkpoint.weights import HEADS, module_of, shapes_of, tensors_of
from megavar.weight_file import (
    AUTO,
    OURS,
    About,
    embedded_tokenizer,
    read_metadata,
    read_weights_file,
    stored_value,
    write_export,
)
from megavar.weight_layout import Shape, differences
from tools.outcome import outcome

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    options = _parse(arguments)
    return outcome("convert_checkpoint", lambda: _run(options))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=as_path, help="run, checkpoint, or file of weights")
    parser.add_argument("output", type=as_path, help="file (.safetensors, .pth); with --into a folder")
    parser.add_argument(
        "--into", type=as_path, metavar="FOLDER",
        help="write a copy of this Hugging Face folder with the model in the place of what it began with",
    )
    parser.add_argument("--layout", help=f"weight layout to write (default: {OURS}; for .pth the model's public one)")
    parser.add_argument("--input-layout", default=AUTO, metavar="LAYOUT", help="weight layout of an input file")
    parser.add_argument("--module", help="module of the checkpoint (default: the one that the run was for)")
    parser.add_argument("--ema", action="store_true", help="take the moving average instead of the weights")
    parser.add_argument("--keep-heads", action="store_true", help="export the heads of the recipe's terms, too")
    parser.add_argument("--without-tokenizer", action="store_true", help="export a generator without its tokenizer")
    parser.add_argument("--dtype", choices=TYPES, default="float32", help="type of written floating-point tensors")
    parser.add_argument("--config", type=as_path, help="configuration of the model (default: config.yaml of the run)")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> int:
    if options.into is None and options.output.suffix not in (".safetensors", ".pth", ".pt"):
        raise ConfigError(f"{options.output} ends neither in .safetensors nor in .pth. Name the file to write so.")
    if not options.input.exists():
        raise CheckpointError(f"{options.input} does not exist. Give a run, a checkpoint, or a file of weights.")
    config = _configuration(options)
    expected = None if config is None else _shapes(config)
    if options.input.is_dir():
        tensors, about = _from_checkpoint(options, config, expected)
    else:
        tensors, about = _from_file(options, config, expected)
    if not options.keep_heads:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(HEADS)}
    _write(options, config, tensors, about)
    print(f"wrote {options.output}")
    return ExitCode.FINISHED


def _configuration(options: argparse.Namespace) -> Config | None:
    """What says which model it is: the given configuration, or the one of the run around a checkpoint."""
    if options.config is not None:
        return load_config(options.config)
    for directory in (options.input, options.input.parent, options.input.parent.parent):
        if options.input.is_dir() and (directory / "config.yaml").exists():
            return stored_config(read_tree(directory / "config.yaml"), str(directory / "config.yaml"))
    metadata = read_metadata(options.input) if options.input.is_file() else {}
    stored = stored_value(metadata, "config", {}, options.input)
    return stored_config(stored, str(options.input)) if stored else None


def _shapes(config: Config) -> dict[str, Shape]:
    """Shape of every logical tensor and buffer of the model, built without memory for its weights."""
    topology.initialize(ParallelConfig(), Environment(0, 1, 0, "single"))
    try:
        return shapes_of(build_trained(config, torch.device("meta")))
    finally:
        topology.shutdown()


def _from_checkpoint(
    options: argparse.Namespace, config: Config | None, expected: Mapping[str, Shape] | None
) -> tuple[dict[str, Tensor], About]:
    checkpoint, manifest = find_checkpoint(options.input, verify=False)  # reading verifies
    module, _ = module_of(checkpoint, manifest, options.module, options.ema)
    tensors = read_weights(checkpoint, module, options.ema)
    if expected is None or module != next(iter(manifest.modules)):
        return tensors, _about(None, module, manifest.step, options)
    names = class_names(options.input)
    given = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith(HEADS)}
    problems = differences({name: shape for name, shape in expected.items() if not name.startswith(HEADS)}, given)
    if problems:
        raise CheckpointError(
            f"{checkpoint} does not fit the configuration: {'; '.join(problems)}. Name the configuration that it was "
            f"trained with by --config."
        )
    return tensors, _about(config, module, manifest.step, options, names, manifest.frozen.get(TOKENIZER, {}))


def _from_file(
    options: argparse.Namespace, config: Config | None, expected: Mapping[str, Shape] | None
) -> tuple[dict[str, Tensor], About]:
    if config is None or expected is None:
        raise ConfigError(f"Which model is {options.input}? Name its configuration with --config.")
    layouts = weight_layouts(trained_choice(config), config.tokenizer.space)
    tensors = read_weights_file(options.input, expected, layouts, options.input_layout, (HEADS,))
    absent = sorted(name for name in expected.keys() - tensors.keys() if not name.startswith(HEADS))
    if absent:
        raise CheckpointError(
            f"{options.input} lacks {', '.join(absent)}, which an export must have. Begin a run with the file itself "
            f"(train.initial_weights), or set the configuration to that of the file."
        )
    metadata = read_metadata(options.input)
    step, module = int(metadata.get("step", 0)), metadata.get("module", "")
    names = tuple(stored_value(metadata, "class_names", [], options.input))
    learned_from = stored_value(metadata, "tokenizer", {}, options.input)
    return tensors, _about(config, module or next(iter(config.recipe.modules)), step, options, names, learned_from)


def _about(
    config: Config | None,
    module: str,
    step: int,
    options: argparse.Namespace,
    class_names: tuple[str, ...] = (),
    tokenizer: Mapping[str, str] = {},
) -> About:
    return About(
        module=module,
        step=step,
        weights="ema" if options.ema else "model",
        choice={} if config is None else trained_choice(config).model_dump(mode="json"),
        space={} if config is None else asdict(config.tokenizer.space),
        dropped=() if options.keep_heads else (HEADS,),
        config={} if config is None else config.model_dump(mode="json"),
        class_names=class_names,
        tokenizer=tokenizer,
    )


def _tokenizer(options: argparse.Namespace, config: Config | None, about: About) -> tuple[dict[str, Tensor], About]:
    """The tensors of the tokenizer that an exported generator learned from, and with them what the export says."""
    if options.without_tokenizer or config is None or not about.config or config.recipe.trains != "generator":
        return {}, about
    if options.input.is_file() and (tensors := embedded_tokenizer(options.input)):
        return tensors, about
    remedy = "Start where recipe.tokenizer_weights is right, or export --without-tokenizer."
    weights = find_tokenizer(config, options.input, remedy)
    found = identify(weights)
    if about.tokenizer:
        remedy = "export with --without-tokenizer."
        check_same(identities({TOKENIZER: about.tokenizer}), {TOKENIZER: found}, options.input, remedy)
    tokenizer = load_tokenizer(config.tokenizer, str(weights), torch.device("cpu"))
    return tensors_of(tokenizer), replace(about, tokenizer=found.to_json())


def _write(options: argparse.Namespace, config: Config | None, tensors: dict[str, Tensor], about: About) -> None:
    if options.into is not None:
        if config is None:
            raise ConfigError("--into needs the configuration of the model: name it with --config.")
        write_into_folder(trained_choice(config), tensors, options.into, options.output)
        return
    layout = _layout_to_write(options, config)
    if layout == OURS:
        if options.output.suffix != ".safetensors":
            raise ConfigError(f"{options.output} must end in .safetensors: an export says what it is in its metadata.")
        tokenizer, about = _tokenizer(options, config, about)
        write_export(options.output, _cast(tensors, options.dtype), about, tokenizer)
        return
    if not about.choice or config is None:
        raise ConfigError(
            f"Weight layout {layout!r} needs the configuration of the model that module {about.module!r} is. Name it "
            f"with --config, or write an export (.safetensors without --layout)."
        )
    layouts = weight_layouts(trained_choice(config), config.tokenizer.space)
    if layout not in layouts:
        known = ", ".join([*layouts, OURS])
        raise ConfigError(f"--layout {layout}: the model has no such weight layout. It has {known}.")
    published = _cast(layouts[layout].export(tensors), options.dtype)
    if options.output.suffix == ".safetensors":
        facts = {"weight_layout": layout, "choice": json.dumps(about.choice), "step": str(about.step)}
        storage.write_bytes_atomic(options.output, save(published, metadata=facts))
        return
    with storage.atomic_file(options.output) as file:
        torch.save(published, file)


def _layout_to_write(options: argparse.Namespace, config: Config | None) -> str:
    if options.layout is not None:
        return options.layout
    if options.output.suffix == ".safetensors":
        return OURS
    known = [] if config is None else list(trained_choice(config).weight_layouts)
    if len(known) != 1:
        which = f"The model's public weight layouts are {', '.join(known)}" if known else "No public layout is known"
        raise ConfigError(f"{which}. Choose one with --layout (and the configuration with --config).")
    return known[0]


def _cast(tensors: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    target = TYPES[dtype]
    return {name: (v.to(target) if v.is_floating_point() else v).contiguous() for name, v in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
