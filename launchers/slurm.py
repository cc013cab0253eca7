"""Submit runs to Slurm: ``python -m launchers.slurm submit CONFIG --nodes 4 [key=value ...]``.

Resolves the configuration, writes everything the run needs into its directory (launchers/provenance.py), renders
``submit.sbatch`` there from ``slurm/train.sbatch`` and submits it. ``evaluate`` and ``shard`` do the same for the other
two templates.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launchers import provenance
from launchers.rendering import (
    ContinueBy,
    Job,
    check_job,
    excluded_nodes,
    render_evaluation,
    render_sharding,
    render_training,
)
from launchers.slurm_commands import run_slurm
from megavar.config.cluster import ClusterConfig
from megavar.config.loading import decode, dump, load_config, read_tree
from megavar.config.root import Config
from megavar.errors import ClusterError, ConfigError, ExitCode, MegavarError
from megavar.paths import as_path, expanded, shipped
from megavar.storage import write_text_atomic

DEFAULT_CLUSTER_FILE = "slurm/cluster.yaml"
SCRIPT = "submit.sbatch"


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    given = _parse(list(arguments))
    try:
        return given.run(given)
    except MegavarError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Overrides may stand anywhere; what follows ``--`` belongs to the tool that a job runs."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    given, rest = parser.parse_known_args(arguments[:end])
    for word in rest:
        if word.startswith("-") or "=" not in word or given.run is _shard:
            parser.error(f"{word!r} is neither an option nor an override such as train.steps=100")
    given.overrides, given.arguments = rest, arguments[end + 1 :]
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launchers.slurm", description="Submit work to Slurm.")
    commands = parser.add_subparsers(required=True, metavar="submit | evaluate | shard")
    submit = commands.add_parser(
        "submit",
        allow_abbrev=False,
        help="train; the run continues over as many jobs as it needs",
        epilog="Further arguments key=value change the configuration.",
    )
    submit.add_argument("config", help="YAML file of the run")
    _add_common(submit)
    submit.add_argument(
        "--chain",
        type=int,
        metavar="N",
        help="queue N jobs one behind the other instead of letting one job requeue itself",
    )
    submit.add_argument("--behind", action="store_true", help="queue behind jobs of this run that exist already")
    submit.set_defaults(run=_submit)

    evaluate = commands.add_parser(
        "evaluate",
        help="sample from a trained run and score it",
        epilog="Further arguments key=value change the configuration.",
    )
    evaluate.add_argument("config", help="YAML file of the run")
    _add_common(evaluate)
    evaluate.set_defaults(run=_evaluate)

    shard = commands.add_parser(
        "shard",
        help="write image shards, one task per node",
        epilog="What follows -- are the arguments of python -m tools.shard_images.",
    )
    _add_common(shard)
    shard.add_argument("--logs", type=as_path, default=Path("runs/shard"), help="folder of the script and its log")
    shard.set_defaults(run=_shard)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=_positive, required=True)
    parser.add_argument("--cluster", help=f"cluster file; default $MEGAVAR_CLUSTER, then {DEFAULT_CLUSTER_FILE}")
    parser.add_argument("--time", help="time limit of one job, instead of the cluster file's")
    parser.add_argument("--partition", help="partition, instead of the cluster file's")
    parser.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let the job put itself into the queue again until the run is done (default)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("--test-only", action="store_true", help="let Slurm check the job and say when it would start")


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def load_cluster(given: str | None, *, time: str | None = None, partition: str | None = None) -> ClusterConfig:
    """Read the cluster file ``given``, or the default one, and apply what the command line says.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    try:
        path = Path(expanded(given or os.environ.get("MEGAVAR_CLUSTER") or DEFAULT_CLUSTER_FILE))
    except ValueError as error:
        raise ConfigError(f"--cluster or $MEGAVAR_CLUSTER: {error}.") from None
    if not path.exists():
        raise ConfigError(
            f"There is no cluster file {path}. Copy {shipped('slurm/cluster.example.yaml')} to {DEFAULT_CLUSTER_FILE} "
            f"and fill in your partition; if it lies elsewhere, use --cluster or $MEGAVAR_CLUSTER."
        )
    tree = read_tree(path)
    tree |= {key: value for key, value in (("time", time), ("partition", partition)) if value is not None}
    return decode(tree, ClusterConfig, str(path))


def resolve(path: str, overrides: Sequence[str]) -> tuple[Config, Path]:
    """The configuration with its run directory made absolute, and that directory."""
    config = load_config(path, overrides)
    run_directory = Path(config.run.path).absolute()
    run = config.run.model_copy(update={"directory": str(run_directory)})
    return config.model_copy(update={"run": run}), run_directory


def required_runs(config: Config, required_by: tuple[str, ...] = ()) -> list[Path]:
    """Directories of the runs that ``config`` requires, and of those that they require, the deepest first.

    Raises:
        ConfigError: runs require each other in a circle.
    """
    if config.run.name in required_by:
        raise ConfigError(f"run.requires goes in a circle: {' -> '.join((*required_by, config.run.name))}.")
    found: list[Path] = []
    for path in config.run.requires:
        required = load_config(path)
        found += [*required_runs(required, (*required_by, config.run.name)), Path(required.run.path).absolute()]
    return list(dict.fromkeys(found))


def _submit(given: argparse.Namespace) -> int:
    if given.chain is not None and given.requeue:
        raise ConfigError("--chain and --requeue are two ways to continue a run: give one of them.")
    if given.chain is not None and given.chain < 1:
        raise ConfigError(f"--chain {given.chain} queues no job: give 1 or more.")
    continue_by: ContinueBy = "chain" if given.chain else "hand" if given.requeue is False else "requeue"
    config, run_directory = resolve(given.config, given.overrides)
    job = _job(given, run_directory, continue_by, config.run.name)
    job = replace(job, required_runs=required_runs(config))
    if given.dry_run or given.test_only:
        return _try_out(render_training(job), given)
    if (run_directory / "DONE").exists() and not config.train.fresh:
        print(f"{run_directory} is finished already: nothing to submit.")
        return ExitCode.FINISHED
    _refuse_second_submission(job, behind=given.behind)
    job = _copy_code(job)
    provenance.write_config(run_directory, provenance.refer_to_copy(config, job.code_directory))
    (run_directory / "DONE").unlink(missing_ok=True)
    script = run_directory / SCRIPT
    _write_script(job, script, render_training(job))
    jobs: list[str] = []
    try:
        for _ in range(given.chain or 1):
            jobs.append(_sbatch([str(script)]))
    except ClusterError as error:
        if jobs:
            raise ClusterError(
                f"Only {len(jobs)} of {given.chain} jobs are queued ({', '.join(jobs)}). {error} To queue the others "
                f"then: --behind --chain {(given.chain or 1) - len(jobs)}."
            ) from None
        raise
    finally:
        if jobs:
            provenance.note_submission(
                run_directory, jobs=jobs, nodes=given.nodes, continue_by=continue_by, arguments=sys.argv[1:]
            )
    print(
        f"Submitted {job.name} as job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}: {job.nodes} nodes, "
        f"{job.world_size} ranks."
    )
    print(f"Watch:       python -m megavar status {run_directory} --watch")
    print(f"Read:        tail -F {run_directory}/logs/current.log")
    print(f"Stop:        scancel --signal=USR1 --batch {jobs[0]}   (saves; continues if it may)")
    print(f"Understand:  python -m launchers.doctor {run_directory}")
    return ExitCode.FINISHED


def _evaluate(given: argparse.Namespace) -> int:
    config, run_directory = resolve(given.config, given.overrides)
    job = _job(given, run_directory, "hand" if given.requeue is False else "requeue", config.run.name)
    configuration = run_directory / "evaluate.yaml"

    if given.dry_run or given.test_only:
        return _try_out(render_evaluation(job, [str(configuration)]), given)
    job, script = _copy_code(job), run_directory / "evaluate.sbatch"
    write_text_atomic(configuration, dump(provenance.refer_to_copy(config, job.code_directory)))
    _write_script(job, script, render_evaluation(job, [str(configuration)]))
    print(f"Submitted {job.name}-evaluate as job {_sbatch([str(script)])}.")
    return ExitCode.FINISHED


def _shard(given: argparse.Namespace) -> int:
    directory = given.logs.absolute()
    job = _job(given, directory, "hand" if given.requeue is False else "requeue")

    if given.dry_run or given.test_only:
        return _try_out(render_sharding(job, given.arguments), given)
    job, script = _copy_code(job), directory / "shard.sbatch"
    _write_script(job, script, render_sharding(job, given.arguments))
    print(f"Submitted {job.name}-shard as job {_sbatch([str(script)])}.")
    return ExitCode.FINISHED


def _job(given: argparse.Namespace, run_directory: Path, continue_by: ContinueBy, run_name: str = "") -> Job:
    cluster = load_cluster(given.cluster, time=given.time, partition=given.partition)
    job = Job(
        cluster=cluster,
        run_directory=run_directory,
        code_directory=provenance.CODE_ROOT,
        submit_directory=Path.cwd(),
        nodes=given.nodes,
        continue_by=continue_by,
        recorded_environment=provenance.allowed_environment(cluster.record_environment),
        excluded_nodes=excluded_nodes(cluster),
        run_name=run_name,
    )
    check_job(job)
    return job


def _try_out(script: str, given: argparse.Namespace) -> int:
    if given.dry_run:
        print(script, end="")
    if given.test_only:
        with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
            file.write(script)
            file.flush()
            result = run_slurm(["sbatch", "--test-only", file.name])
        print(result.stderr.strip() or result.stdout.strip())
    return ExitCode.FINISHED


def _refuse_second_submission(job: Job, *, behind: bool) -> None:
    listing = run_slurm(["squeue", "--noheader", f"--user={os.getuid()}", f"--name={job.name}", "--format=%i %T"])
    existing = [line for line in listing.stdout.splitlines() if line.strip()]
    if existing and not behind:
        raise ClusterError(
            f"The run {job.run_directory} is in the queue already ({'; '.join(existing)}). Cancel it "
            f"with scancel --name={job.name}, or queue more jobs behind it with --behind."
        )


def _copy_code(job: Job) -> Job:
    """The job with a copy of the code in its run directory, if the cluster file wants one."""
    if not job.cluster.snapshot_code:
        return job
    return replace(job, code_directory=provenance.copy_code(job.run_directory))


def _write_script(job: Job, script: Path, text: str) -> None:
    (job.run_directory / "logs").mkdir(parents=True, exist_ok=True)
    provenance.record(job.run_directory, job.recorded_environment)
    write_text_atomic(script, text)


def _sbatch(arguments: list[str]) -> str:
    return run_slurm(["sbatch", "--parsable", *arguments]).stdout.strip().split(";")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
