"""One real Slurm for all tests of this folder, and the runs that they watch."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launchers import slurm
from megavar.errors import ExitCode
from tests.slurm.loopback import LoopbackCluster, reason_to_skip

REPOSITORY = Path(__file__).parents[2]
SMALL_CONFIG = REPOSITORY / "configs/quickstart/tokenizer.yaml"
SMALL_TRAINER = Path(__file__).with_name("small_trainer.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(1200))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackCluster]:
    with LoopbackCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def slow_steps(seconds: float) -> str:
    """Lines of the batch script's trainer: each of its steps takes so much longer."""
    return f"""\
if [ "$3" = train ]; then
    exec "$python" -c '
import sys, time
from megavar.__main__ import main
from megavar.training.preemption import StopRequest
agreed = StopRequest.agreed
StopRequest.agreed = lambda self: time.sleep({seconds}) or agreed(self)
sys.exit(main(sys.argv[1:]))
' "${{@:3}}"
fi"""


class WatchedRun:
    """A run directory, its cluster file, and the jobs that were submitted for it.

    ``before`` is shell that its interpreter runs first, with the arguments in ``$@`` and the real one in ``$python``.
    """

    def __init__(
        self, cluster: LoopbackCluster, folder: Path, config: Path, *, before: str = "", **cluster_settings: object
    ) -> None:
        self.cluster, self.config, self.path, self.jobs = cluster, config, folder / "run", list[str]()
        self.path.mkdir(parents=True)
        python = folder / "python"
        python.write_text(f'#!/bin/bash\npython={sys.executable}\n{before}\nexec "$python" "$@"\n')
        python.chmod(0o755)
        settings = {
            "python": str(python),
            "time": "30",
            "gpus_per_node": 0,
            "cpus_per_task": 1,
            "memory": "500",
            "exclusive": False,
            "preflight": False,
            "signal_lead_seconds": 60,
            "node_local_directory": str(folder / "local"),
            "snapshot_code": False,
            "environment": {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
            **cluster_settings,
        }
        self.cluster_file = folder / "cluster.yaml"
        self.cluster_file.write_text(yaml.safe_dump(settings))

    def submit(self, *arguments: str, nodes: int = 2) -> None:
        """Submit through the command line that people use."""
        previous, folder = dict(os.environ), Path.cwd()
        os.environ.update(self.cluster.environment)
        os.chdir(REPOSITORY)
        try:
            code = slurm.main(["submit", str(self.config), "--nodes", str(nodes), "--cluster", str(self.cluster_file),
                               f"run.directory={self.path}", *arguments])  # fmt: skip
        finally:
            os.environ.clear()
            os.environ.update(previous)
            os.chdir(folder)
        assert code == ExitCode.FINISHED
        lines = (self.path / "submissions.jsonl").read_text().splitlines()
        self.jobs += json.loads(lines[-1])["jobs"]

    @property
    def job(self) -> str:
        """The only job, or the first of a chain."""
        return self.jobs[0]

    @property
    def attempts(self) -> list[dict]:
        """The ledger."""
        path = self.path / "restarts.json"
        return json.loads(path.read_text())["attempts"] if path.exists() else []

    @property
    def outcomes(self) -> list[str]:
        """How the attempts ended."""
        return [attempt.get("outcome", "RUNNING") for attempt in self.attempts]

    @property
    def newest_step(self) -> int:
        """Of the checkpoints."""
        from launchers.progress import newest_checkpoint_step

        return newest_checkpoint_step(self.path)

    def wait(self, condition: object, seconds: float = 600) -> None:
        """Wait until ``condition`` holds; fail with all logs."""
        assert self.cluster.wait(condition, seconds), self.story()

    def wait_for_progress(self, attempt: int) -> None:
        """Wait until the attempt of this number has saved a checkpoint of its own."""

        def saved() -> bool:
            attempts = self.attempts
            return len(attempts) >= attempt and self.newest_step > attempts[attempt - 1]["steps_before"][-1]

        self.wait(saved)

    def wait_for_end(self, seconds: float = 600) -> None:
        """Wait until no job of the run is left."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: all(self.cluster.state(job) in ended for job in self.jobs), seconds)

    def story(self) -> str:
        """Everything that explains a failure."""
        files = sorted((self.path / "logs").rglob("*"))
        texts = [f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.is_file()]
        queue = self.cluster.run("squeue", check=False)
        return "\n".join([queue, json.dumps(self.attempts, indent=1), *texts])


@pytest.fixture
def new_run(cluster: LoopbackCluster, tmp_path: Path):
    """Makes runs of the real trainer."""
    return lambda name, config, **settings: WatchedRun(cluster, tmp_path / name, config, **settings)


def small_run(cluster: LoopbackCluster, folder: Path, steps: dict, before: str = "", **settings: object) -> WatchedRun:
    """A run of the small trainer."""
    train = f'if [ "$3" = train ]; then exec "$python" {SMALL_TRAINER} "$4"; fi'
    run = WatchedRun(cluster, folder, SMALL_CONFIG, before=f"{before}\n{train}", **settings)
    (run.path / "small.json").write_text(json.dumps({"seconds_per_step": 0.2, "save_every": 1000, **steps}))
    return run


@pytest.fixture
def new_small_run(cluster: LoopbackCluster, tmp_path: Path):
    """Makes runs of the small trainer."""
    return lambda name, steps, **settings: small_run(cluster, tmp_path / name, steps, **settings)
