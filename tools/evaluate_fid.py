"""FID, sFID, Inception score, precision and recall of images by ADM's protocol.

    python -m tools.evaluate_fid reference --images DIR|NPZ --out ref.npz --inception-weights W
    python -m tools.evaluate_fid score --images DIR|NPZ --reference ref.npz --out result.json --inception-weights W
    python -m tools.evaluate_fid export --images SAMPLES --out samples.npz --order interleaved
    python -m tools.evaluate_fid selfcheck --images ADM_SAMPLES.npz --reference ADM_REFERENCE.npz --inception-weights W

``--images`` is an npz with ``arr_0``, a folder of PNG files, or a directory of samples written by ``megavar sample``
or ``megavar evaluate`` (images that were not kept are decoded again from their tokens); ``reference`` also takes the
data of a run (``--config run.yaml [key=value ...]``). Features are kept in chunks beside the output, so an interrupted
command continues; under torchrun or srun the chunks are shared by all ranks, and the result is the same.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from megavar.chunks import ChunkStore
from megavar.config.data import DataConfig
from megavar.config.loading import apply_override, decode, read_tree
from megavar.data.build import build_source, build_transform
from megavar.errors import ConfigError
from megavar.evaluation import adm
from megavar.evaluation.export import export_npz, is_sorted_by_class
from megavar.evaluation.images import ImageSet, SourceImages, open_images
from megavar.evaluation.inception import ADMInception
from megavar.evaluation.reference import check_reference, load_reference, save_reference
from megavar.evaluation.results import Result, class_histogram, write_result
from megavar.evaluation.table import format_table
from megavar.parallel.environment import Environment, environment
from megavar.paths import as_path
from megavar.storage import remove
from tools.outcome import outcome

PUBLISHED_ADM = {"is": 215.837, "fid": 3.9426, "sfid": 6.1404, "precision": 0.8265, "recall": 0.5309}
"""TensorFlow's numbers for ADM's published ImageNet-256 samples (ADM-G, ADM-U), as given by a public torch port."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return outcome("evaluate_fid", lambda: options.run(options))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def score(options: argparse.Namespace) -> None:
    """Score images against a reference and write the result file."""
    check_reference(options.reference)
    ranks, images = _join(), _images(options)
    network = _network(options, ranks)
    store = adm.stored_features(_features_directory(options), images, network, ranks)
    if ranks.rank == 0:
        result = evaluate(options, store, images, network)
        write_result(options.out, result)
        _report(result, options.out)


def evaluate(options: argparse.Namespace, store: ChunkStore, images: ImageSet, network: ADMInception) -> Result:
    """Reduce the features in ``store`` to a result."""
    features = adm.collect_features(store)
    reference = load_reference(options.reference, network, ranks_device(network))
    if options.backend == "torch-fidelity":
        metrics, notes = adm.torch_fidelity_metrics(features, reference, network)
    else:
        metrics, notes = adm.adm_metrics(features, reference, network, labels=images.labels)
    notes += images.notes
    if images.labels is not None and is_sorted_by_class(images.labels):
        notes.append("the images are sorted by class: ADM's official script would give a meaningless Inception score")
    return Result(
        suite=f"adm/{options.backend}",
        metrics=metrics,
        count=len(images),
        rounding=options.rounding,
        class_histogram=class_histogram(images.labels) if images.labels is not None else {},
        order="Inception score over a seeded shuffle, otherwise index order",
        extractor={"name": network.name, "sha256": network.weights_sha256},
        reference=reference.identity,
        sampler={"images": images.identity, "feature_chunk_size": store.size},
        notes=notes,
    )


def reference(options: argparse.Namespace) -> None:
    """Make a reference file from images, from the data of a run, or from ADM's file."""
    ranks = _join()
    network = _network(options, ranks)
    if options.from_reference is not None:
        if ranks.rank == 0:
            found = load_reference(options.from_reference, network, ranks_device(network))
            if found.spatial is None or found.pool_features is None:
                raise ConfigError(f"{options.from_reference} holds statistics only: use it as it is, and convert ADM's")
            save_reference(options.out, found, network)
            print(f"wrote {options.out}: {found.identity['kind']} reference of {len(found.pool_features)} features")
        return
    images = _images(options) if options.images is not None else _images_of_run(*options.config)
    store = adm.stored_features(_features_directory(options), images, network, ranks)
    if ranks.rank == 0:
        made = adm.reference_from(adm.collect_features(store), {"images": images.identity, "count": len(images)})
        save_reference(options.out, made, network)
        if not options.keep_features:
            remove(store.directory)
        print(f"wrote {options.out}: statistics of {len(images)} images")
        transform = str(images.identity.get("transform", ""))
        if transform and not transform.startswith(("AdmCenterCrop", "Unchanged")):
            print(
                f"note: the images went through {transform}, but ADM's reference is of its own centre crop: add "
                f"'data.transform={{name: adm_center_crop}}' after --config to compare with published numbers"
            )


def export(options: argparse.Namespace) -> None:
    """Write images as an npz file for ADM's official script."""
    images = _images(options)
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        export_npz(options.out, images, options.order, on_progress=bar.update)
    print(f"wrote {options.out}: {len(images)} images, {options.order}")


def selfcheck(options: argparse.Namespace) -> None:
    """Score ADM's published samples and compare with the numbers of ADM's own script."""
    check_reference(options.reference)
    ranks, images = _join(), _images(options)
    network = _network(options, ranks)
    store = adm.stored_features(_features_directory(options), images, network, ranks)
    if ranks.rank == 0:
        ours = evaluate(options, store, images, network).metrics
        print(format_table({"published (TensorFlow)": PUBLISHED_ADM, "here": ours}, adm.METRICS))
        apart = {key: abs(ours.get(key, float("nan")) / value - 1) for key, value in PUBLISHED_ADM.items()}
        wrong = [key for key, value in apart.items() if not value < (0.01 if key in ("precision", "recall") else 0.002)]
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)} differ from the published numbers: check that the files are ADM's "
                f"samples (admnet_guided_upsampled_imagenet256.npz) and VIRTUAL_imagenet256_labeled.npz"
            )
        print("agrees with ADM's script")


def ranks_device(network: ADMInception) -> torch.device:
    """Where the network lives."""
    return next(network.parameters()).device


def _features_directory(options: argparse.Namespace) -> Path:
    return options.features or options.out.with_name(options.out.name + ".features")


def _images(options: argparse.Namespace) -> ImageSet:
    return open_images(options.images, _samples)


def _samples(directory: Path) -> ImageSet:
    from megavar.run_samples import stored_samples  # imports Megatron-core: not for npz files and folders

    return stored_samples(directory, environment().device)


def _join() -> Environment:
    ranks = environment()
    if ranks.world_size > 1 and not dist.is_initialized():
        # Ranks share nothing but files; the group only lets rank 0 wait for the others.
        dist.init_process_group(
            "gloo", rank=ranks.rank, world_size=ranks.world_size, timeout=datetime.timedelta(hours=6)
        )
    return ranks


def _network(options: argparse.Namespace, ranks: Environment) -> ADMInception:
    return ADMInception(options.inception_weights, unofficial=options.unofficial_weights).to(ranks.device)


def _images_of_run(config: str, *overrides: str) -> ImageSet:
    tree = read_tree(Path(config))
    for override in overrides:
        apply_override(tree, override)
    data = decode(tree.get("data", {}), DataConfig, config)
    return SourceImages(build_source(data, "train"), build_transform(data, "test"))


def _report(result: Result, path: Path) -> None:
    print(format_table({"value": result.metrics}))
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate_fid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for run in (score, reference, export, selfcheck):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        command.set_defaults(run=run, backend="megavar", rounding="unknown", features=None)
        images = command.add_mutually_exclusive_group(required=True) if run is reference else command
        images.add_argument("--images", type=as_path, required=run is not reference, help="npz, PNG folder, or samples")
        if run is reference:
            images.add_argument(
                "--config",
                nargs="+",
                metavar=("RUN.yaml", "key=value"),
                help="a YAML whose data section names training images, and overrides",
            )
            images.add_argument("--from-reference", type=as_path, help="ADM's npz, to keep 82 MB of it instead of 2 GB")
            command.add_argument("--keep-features", action="store_true", help="keep 16 kB of features per image")
        if run is not selfcheck:
            command.add_argument("--out", type=as_path, required=True, help="file to write")
        else:
            command.set_defaults(out=Path("selfcheck"))
        if run is export:
            command.add_argument("--order", choices=["interleaved", "shuffled"], default="shuffled")
            continue
        command.add_argument("--inception-weights", type=as_path, required=True, help="published Inception weights")
        command.add_argument("--unofficial-weights", action="store_true", help="accept others; the metrics say so")
        command.add_argument("--features", type=as_path, help="directory of feature chunks (default: beside --out)")
        if run is not reference:
            command.add_argument("--reference", type=as_path, required=True, help="reference statistics (three kinds)")
        if run is score:
            command.add_argument("--backend", choices=["megavar", "torch-fidelity"], default="megavar")
            command.add_argument(
                "--rounding",
                choices=["round", "truncate", "half_up", "unknown"],
                default="unknown",
                help="how the images became uint8, for the record",
            )
    return parser


if __name__ == "__main__":
    sys.exit(main())
