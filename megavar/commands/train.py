"""``megavar train``: train the run that a configuration describes, or continue it where it stopped."""

import argparse
import functools
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megavar import logs
from megavar.assembly import Assembly
from megavar.beginning import initial_weights, warn_of_differences
from megavar.config.deepspeed import load_deepspeed_json
from megavar.config.loading import load_config
from megavar.config.parallel import ParallelConfig
from megavar.config.root import Config
from megavar.data import text_training
from megavar.data.build import build_loader, build_source, build_text
from megavar.data.loader import Loader
from megavar.data.source import Source
from megavar.errors import ConfigError, DataError, ExitCode, MegavarError, RunInUseError
from megavar.parallel import topology
from megavar.parallel.environment import Environment, choose_kernels, environment, limit_threads
from megavar.parallel.rules import check_compiled, check_layout
from megavar.planning.efficiency import flops_per_image
from megavar.planning.hardware import peak_of_device
from megavar.previews import preview
from megavar.records.cards import end_card
from megavar.records.run import RunRecord
from megavar.storage import write_json_atomic
from megavar.training.console import Console
from megavar.training.run import Run, micro_batch_size, on_first_rank
from megavar.training.run_directory import RunDirectory
from megavar.training.trainer import Trainer
from megavar.watchers import watchers

LOOK_AGAIN_SECONDS = 20.0
"""Between looks at a required run that another process trains."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options beside the configuration."""


def run(options: argparse.Namespace) -> ExitCode:
    """Entry point of the command."""
    place = environment()
    logs.configure(place.rank)
    config = load_config(options.config, options.overrides)
    code = train(config, place)
    topology.shutdown()
    return code


def train(config: Config, place: Environment, required_by: tuple[str, ...] = ()) -> ExitCode:
    """Train the runs that ``config`` requires, then the run itself, then score it if the configuration says so.

    Finished runs are left as they are. Collective.

    Raises:
        ConfigError: runs require each other in a circle, or sections contradict each other.
    """
    if config.run.name in required_by:
        raise ConfigError(f"run.requires goes in a circle: {' -> '.join((*required_by, config.run.name))}.")
    if config.evaluation.after_training:
        topology.initialize(ParallelConfig(), place)
        on_first_rank(functools.partial(_check_scoring, config))
    for path in config.run.requires:
        required = load_config(path)
        if place.rank == 0:
            print(f"{config.run.name} requires {required.run.name} ({path})", flush=True)
        code = _train_required(required, place, (*required_by, config.run.name))
        if code != ExitCode.FINISHED:
            return code
    trained, scores = not Path(config.run.path, "DONE").exists(), dict[str, float]()
    code = _train_one(config, place)
    if code == ExitCode.FINISHED and config.evaluation.after_training:
        from megavar.scoring import score  # scikit-learn and more: not at the start of every rank

        topology.initialize(ParallelConfig(), place)
        scores = score(config, place)
    if code == ExitCode.FINISHED and place.rank == 0 and (trained or scores):
        _say_the_end(Path(config.run.path), scores)
    return code


def _say_the_end(path: Path, scores: Mapping[str, float]) -> None:
    """The end card. What goes wrong with it must not make a failed run of a finished one."""
    try:
        Console(path).say(end_card(RunRecord.read(path), scores))
    except (MegavarError, OSError) as error:
        logging.getLogger(__name__).warning("No summary of the run: %s", error)


def _check_scoring(config: Config) -> None:
    """What could not be scored in the end is not trained."""
    from megavar.scoring import check  # scikit-learn and more: on the first rank only

    check(config)


def _train_required(config: Config, place: Environment, required_by: tuple[str, ...]) -> ExitCode:
    """Train a run that others may require and train, too: then wait for them, and take over if they die."""
    while True:
        try:
            return train(config, place, required_by)
        except RunInUseError as error:  # raised on all ranks alike
            if place.rank == 0:
                print(f"Waiting for {config.run.name}, which {required_by[-1]} requires. {error}", flush=True)
            time.sleep(LOOK_AGAIN_SECONDS)


def _train_one(config: Config, place: Environment) -> ExitCode:
    limit_threads(config.train.cpu_threads)
    choose_kernels(config.train.precision, config.train.tf32, config.train.deterministic)
    mesh = topology.initialize(config.parallel, place)
    directory = RunDirectory.of(config)
    resolved = json.loads(config.model_dump_json())
    if directory.done and not config.train.fresh:
        on_first_rank(lambda: directory.check(resolved))
        if place.rank == 0:
            print(f"{config.run.name} is finished already ({directory.path}).", flush=True)
        return ExitCode.FINISHED
    keeps_logs = bool(os.environ.get("MEGAVAR_LOG_DIRECTORY"))  # a launcher writes what we print to files of its own
    logs.configure(place.rank, None if keeps_logs else directory.path / "logs")
    if place.rank == 0 and place.world_size > 1:
        print(topology.describe(config.parallel, place.world_size), flush=True)
    source = build_source(config.data)
    deepspeed = load_deepspeed_json(Path(config.deepspeed))
    zero_stage = int(deepspeed.get("zero_optimization", {}).get("stage", 0))
    check_layout(
        config.parallel,
        config.limits,
        zero_stage=zero_stage,
        world_size=place.world_size,
        micro_batches=config.train.global_batch_size // mesh.data // micro_batch_size(config.train, mesh),
    )
    if config.train.compile == "blocks":
        check_compiled(config.parallel, config.limits, zero_stage)
    assembly = Assembly(config, source, place.device, mesh)
    recipe = assembly.recipe()
    if place.rank == 0 and not directory.checkpoints.exists():
        warn_of_differences(config)
    on_first_rank(functools.partial(_check_data, directory, source, config))
    on_first_rank(functools.partial(_keep_text_tokenizer, directory, config))

    def loader(start_step: int, size: int) -> Loader:
        return build_loader(
            config.data,
            source,
            seed=config.train.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=size,
            data_parallel_rank=mesh.data_rank,
            data_parallel_size=mesh.data,
            start_step=start_step,
            device=place.device,
        )

    peak = _peak_flops(config)
    trainer = Trainer(
        Run(
            name=config.run.name,
            train=config.train,
            optimizer=config.optimizer,
            logging=config.logging,
            deepspeed=deepspeed,
            deepspeed_origin=config.deepspeed,
            config=resolved,
            directory=directory,
            recipe=recipe,
            samples=len(source),
            loader=loader,
            topology=mesh,
            initial=initial_weights(config),
            preview=preview(assembly, recipe, source.class_names),
            flops_per_image=flops_per_image(config) if place.rank == 0 and peak is not None else None,
            peak_flops=peak,
            observers=watchers(config, source, recipe, place, mesh),
        )
    )
    return trainer.run()


def _check_data(directory: RunDirectory, source: Source, config: Config) -> None:
    """Remember the data of a run, and refuse to continue it on other data.

    Raises:
        DataError: the content of the source has changed since the run began.
    """
    path = directory.path / "data.json"
    described = {"source": config.data.source.name, "samples": len(source), "fingerprint": source.fingerprint}
    # The fingerprint covers classes, too; names are for readers of the run, and runs of earlier versions lack them.
    named = described | {"class_names": list(source.class_names)}
    if path.exists() and directory.begun and not config.train.fresh:
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is damaged ({error}), so nothing says which data the run began with. Restore it from a "
                f"backup; or remove it, and the next start takes the data that it finds for those of the run."
            ) from error
        if not isinstance(before, dict) or {key: before.get(key) for key in described} != described:
            raise DataError(
                f"The data of {config.run.name} have changed since the run began: {path} says {before}, the source now "
                f"is {described}. Restore the data, or start again with train.fresh=true or another run.directory."
            )
        return
    write_json_atomic(path, named)


def _keep_text_tokenizer(directory: RunDirectory, config: Config) -> None:
    """Leave a text tokenizer that is trained on the spot in the run, where transformers can read it, too.

    Raises:
        DataError: the run began with another one.
    """
    if config.data.text is None or config.data.text.tokenizer is not None:
        return
    encoder, folder = build_text(config.data), directory.path / "text_tokenizer"
    assert encoder is not None
    file = folder / "tokenizer.json"
    kept = file.exists() and directory.begun and not config.train.fresh
    if kept and file.read_text() != encoder.tokenizer.to_str(pretty=True):
        raise DataError(
            f"The text tokenizer that is trained on the spot is another one than that of this run, {file}: the version "
            f"of the package tokenizers may have changed. Install the former, or start again with train.fresh=true."
        )
    text_training.save(encoder.tokenizer, folder)


def _peak_flops(config: Config) -> float | None:
    """Peak of this device, where it is known: utilization is then logged."""
    if not torch.cuda.is_available():
        return None
    return peak_of_device(torch.cuda.get_device_name(), config.train.precision)
