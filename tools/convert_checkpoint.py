"""Convert weights between megavar checkpoints, safetensors, and the layout of the authors' public VAR checkpoints.

    python -m tools.convert_checkpoint runs/mepa-d16 weights.safetensors --ema     from the newest checkpoint of a run
    python -m tools.convert_checkpoint runs/var-d16/checkpoints/step-00250000 var_d16.pth
    python -m tools.convert_checkpoint runs/tokenizer vae.pth                      VAR's VQVAE layout
    python -m tools.convert_checkpoint var_d16.pth runs/finetune --config configs/var/d16.yaml
    python -m tools.convert_checkpoint weights.safetensors runs/finetune --config configs/mepa/d16.yaml

A directory is read as a checkpoint of megavar (any layout, verified); a file is written into a new run directory, as
the checkpoint from which `megavar train` with that run.directory starts, and which `megavar sample` can use at once.
``.safetensors`` holds our names (float32 unless --dtype says otherwise); ``.pth`` holds the authors' names.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from megavar import storage
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.errors import CheckpointError, ConfigError, ExitCode, MegavarError
from megavar.parallel.environment import Environment
from megavar.training.checkpoint import find_checkpoint, load_weights, read_weights
from megavar.training.checkpoint.weights import write_weights

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    options = _parse(arguments)
    try:
        if options.input.is_dir():
            written = export(options.input, options.output, options.module, options.ema, options.dtype, options.config)
        elif options.input.exists():
            written = import_weights(options.input, options.output, options.module, options.config)
        else:
            raise CheckpointError(f"{options.input} does not exist. Give a run, a checkpoint, or a file of weights.")
    except MegavarError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(f"wrote {written}")
    return int(ExitCode.FINISHED)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, help="run, checkpoint, or file of weights")
    parser.add_argument("output", type=Path, help="file (.safetensors, .pth) or run directory")
    parser.add_argument("--module", help="module of the checkpoint (default: the only one)")
    parser.add_argument("--ema", action="store_true", help="export the moving average instead of the weights")
    parser.add_argument("--dtype", choices=TYPES, default="float32", help="type of exported floating-point tensors")
    parser.add_argument("--config", type=Path, help="configuration of the run (default: config.yaml in it)")
    return parser.parse_args(arguments)


def export(source: Path, target: Path, module: str | None, ema: bool, dtype: str, config: Path | None) -> Path:
    """Write one module of a checkpoint into a file.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the file's layout cannot hold it.
        ConfigError: the file's ending is not known, or the layout needs a configuration that is not there.
    """
    checkpoint, manifest = find_checkpoint(source, verify=False)  # reading verifies
    module = _only(checkpoint, list(manifest.modules)) if module is None else module
    if target.suffix == ".safetensors":
        tensors = read_weights(checkpoint, module, ema)
        about = {"format": "megavar", "module": module, "step": str(manifest.step), "weights": "ema" if ema else "raw"}
        storage.write_bytes_atomic(target, save(_cast(tensors, dtype), metadata=about))
        return target
    if target.suffix not in (".pth", ".pt"):
        raise ConfigError(f"{target} ends neither in .safetensors (our names) nor in .pth (the authors' names).")
    tensors = _published(checkpoint, module, ema, _configuration(checkpoint, config))
    with storage.atomic_file(target) as file:
        torch.save(_cast(tensors, dtype), file)
    return target


def _only(checkpoint: Path, modules: list[str]) -> str:
    for usual in ("generator", "autoencoder"):
        if usual in modules:
            return usual
    if len(modules) > 1:
        raise ConfigError(f"{checkpoint} holds the modules {', '.join(modules)}. Choose one with --module.")
    return modules[0]


def _cast(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    target = TYPES[dtype]
    return {name: (v.to(target) if v.is_floating_point() else v).contiguous() for name, v in tensors.items()}


def _configuration(checkpoint: Path, given: Path | None) -> Config:
    """The configuration of a run, from ``given`` or from the run directory around a checkpoint."""
    path = given or checkpoint.parent.parent / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Name the configuration of the run with --config.")
    return load_config(path)


def _published(checkpoint: Path, module: str, ema: bool, config: Config) -> dict[str, Tensor]:
    if module == "autoencoder":
        from megavar.tokenizers.multiscale_vq import MultiScaleVQ

        tokenizer = MultiScaleVQ(config.tokenizer)
        load_weights(tokenizer, checkpoint, module, ema)
        return tokenizer.reference_state_dict()
    from megavar.assembly import require_generator
    from megavar.generators.var.published import VARLayout

    tensors = read_weights(checkpoint, module, ema)
    _compare(checkpoint, {name: tuple(value.shape) for name, value in tensors.items()}, _expected_shapes(config))
    return VARLayout(require_generator(config), config.tokenizer.space).export(tensors)


def _expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every logical tensor of the configured generator, built without memory for its weights."""
    from megavar.assembly import build_generator
    from megavar.parallel import topology
    from megavar.parallel.logical import logical_tensors

    topology.initialize(ParallelConfig(), Environment(0, 1, 0, "single"))
    try:
        model = build_generator(config, None, dtype=torch.float32, device=torch.device("meta"))
        return {tensor.name: tensor.shape for tensor in logical_tensors(model)}
    finally:
        topology.shutdown()


def _compare(origin: Path, given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    different = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{origin} does not fit the configuration: {name} has shape {given.get(name, 'missing')} there and "
            f"{expected.get(name, 'missing')} in the configured model ({len(different)} tensors differ). Give the "
            f"configuration it was trained with."
        )


def import_weights(source: Path, run_directory: Path, module: str | None, config: Path | None) -> Path:
    """Write a file of generator weights as the first checkpoint of a new run.

    Raises:
        ConfigError: no configuration is given, or the file's ending is not known.
        CheckpointError: the file does not fit the configuration, or the run has checkpoints already.
    """
    from megavar.assembly import require_generator
    from megavar.generators.var.published import VARLayout

    if config is None:
        raise ConfigError(f"Which model is {source}? Name the configuration of the new run with --config.")
    configuration = load_config(config)
    expected = _expected_shapes(configuration)
    if source.suffix == ".safetensors":
        tensors = load_file(source)
        _compare(source, {name: tuple(value.shape) for name, value in tensors.items()}, expected)
    elif source.suffix in (".pth", ".pt"):
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        layout = VARLayout(require_generator(configuration), configuration.tokenizer.space)
        tensors = layout.load(state, expected)
    else:
        raise ConfigError(f"{source} ends neither in .safetensors (our names) nor in .pth (the authors' names).")
    state = {"step": 0, "data_step": 0, "recovery": {"skipped": 0}}
    return write_weights(run_directory / "checkpoints", module or "generator", tensors, state)


if __name__ == "__main__":
    sys.exit(main())
