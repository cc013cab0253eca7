"""Preflight on good and bad settings: whole runs of several "nodes" over a real store."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from launchers import checks, preflight
from launchers.preflight import Options, Place, Preflight
from megavar.config.loading import dump, load_config
from megavar.errors import ExitCode

CONFIG = Path(__file__).parents[2] / "configs/quickstart/tokenizer.yaml"


def write_config(folder: Path, *overrides: str) -> Path:
    config = load_config(CONFIG, [f"run.directory={folder / 'run'}", *overrides])
    path = folder / "config.yaml"
    path.write_text(dump(config))
    (folder / "run").mkdir(exist_ok=True)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def preflight_on(
    folder: Path,
    path: Path,
    nodes: int,
    gpus: tuple[int, ...] | None = None,
    configs: dict[int, Path] | None = None,
    lost: tuple[int, ...] = (),
) -> list[int]:
    """Exit codes of preflight on ``nodes`` processes that believe to be nodes n0, n1, ...

    Args:
        configs: what single ones read instead of ``path``.
        lost: those that do not reach the first one.
    """
    port, nowhere = free_port(), free_port()
    children = []
    for rank in range(nodes):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                expected = gpus[rank] if gpus else 0
                names = [f"n{number}" for number in range(nodes)]
                own = (configs or {}).get(rank, path)
                options = Options(str(own), (), nodes, expected, 300.0, folder, 2**20, names)
                place = Place(rank, nodes, f"n{rank}", "127.0.0.1", nowhere if rank in lost else port)
                with (folder / f"preflight-{rank}.log").open("w") as log, contextlib.redirect_stdout(log):
                    code = int(Preflight(options, place).run())
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def report_of(folder: Path) -> str:
    return (folder / "preflight-0.log").read_text()


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Once, before processes are forked."""
    import megavar.assembly
    import megavar.data.build
    import megavar.training.run  # noqa: F401


def test_good_settings_pass_on_three_nodes(tmp_path):
    path = write_config(tmp_path, "train.global_batch_size=33")
    assert preflight_on(tmp_path, path, 3) == [0, 0, 0]
    report = report_of(tmp_path)
    assert "batch 33 = 3 data-parallel ranks x 1 x 11, ZeRO stage" in report
    assert "1433 samples in 10 classes" in report
    assert f"{tmp_path}/run is shared" in report
    for row in ("clock", "all-reduce between nodes", "matmul", "save bandwidth", "port", "limits", "shared memory"):
        assert f"\n{row} " in report
    assert not (tmp_path / "run/.preflight").exists()
    assert not (tmp_path / "bad_nodes.txt").exists()


def test_a_batch_that_does_not_divide_is_the_configurations_fault(tmp_path):
    path = write_config(tmp_path, "train.global_batch_size=31")
    assert preflight_on(tmp_path, path, 2) == [ExitCode.CONFIGURATION] * 2
    assert "cannot be split evenly over 2 data-parallel ranks" in report_of(tmp_path)


def test_a_misspelled_key_is_found_on_all_nodes(tmp_path):
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("micro_batch_size", "micro_batchsize"))
    assert preflight_on(tmp_path, path, 2) == [ExitCode.CONFIGURATION] * 2
    assert "Did you mean 'micro_batch_size'?" in report_of(tmp_path)


def test_missing_data_is_the_configurations_fault(tmp_path):
    path = write_config(tmp_path, f"data.source={{name: image_folder, path: {tmp_path / 'nowhere'}}}")
    assert preflight_on(tmp_path, path, 1) == [ExitCode.CONFIGURATION]
    assert "nowhere" in report_of(tmp_path)


def test_scores_that_could_not_be_made_are_the_configurations_fault(tmp_path):
    """Before hours of training, not after them."""
    path = write_config(tmp_path, "evaluation.after_training=true", "evaluation.reconstruction.inception_weights=w.pth")
    assert preflight_on(tmp_path, path, 1) == [ExitCode.CONFIGURATION]
    assert "Inception weights w.pth do not exist" in report_of(tmp_path)


def test_one_node_without_its_gpus_is_replaced(tmp_path):
    """This machine has none, so the node that expects eight is the bad one."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs")
    path = write_config(tmp_path, "train.global_batch_size=30")
    assert preflight_on(tmp_path, path, 2, gpus=(0, 8)) == [ExitCode.PREFLIGHT] * 2
    assert "n1: 0 GPUs are visible, 8 are expected" in report_of(tmp_path)
    assert (tmp_path / "bad_nodes.txt").read_text() == "n1\n"


def test_a_node_that_cannot_write_is_replaced(tmp_path):
    """Its mount is gone, say: the others are not kept waiting and not blamed."""
    path = write_config(tmp_path, "train.global_batch_size=30")
    (tmp_path / "file").touch()
    broken = tmp_path / "broken.yaml"
    broken.write_text(path.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/file/run"))
    assert preflight_on(tmp_path, path, 3, configs={2: broken}) == [ExitCode.PREFLIGHT] * 3
    assert (tmp_path / "bad_nodes.txt").read_text() == "n2\n"
    assert "n2: NotADirectoryError" in report_of(tmp_path)


def test_a_node_with_a_folder_of_its_own_is_replaced(tmp_path):
    path = write_config(tmp_path, "train.global_batch_size=30")
    private = tmp_path / "private.yaml"
    private.write_text(path.read_text().replace(f"{tmp_path}/run", f"{tmp_path}/private"))
    (tmp_path / "private").mkdir()
    monkeyed = checks.read_marks
    checks.read_marks = lambda folder, names, seconds: monkeyed(folder, names, 1.0)  # in the forked nodes
    try:
        assert preflight_on(tmp_path, path, 3, configs={1: private}) == [ExitCode.PREFLIGHT] * 3
    finally:
        checks.read_marks = monkeyed
    assert (tmp_path / "bad_nodes.txt").read_text() == "n1\n"
    assert "n1: files of n0, n2 in" in report_of(tmp_path) and "not seen by n0, n2" in report_of(tmp_path)


def test_a_node_that_does_not_answer_is_named(tmp_path, monkeypatch):
    """It leaves without an error, because srun would end the others before the table is printed."""
    monkeypatch.setattr(preflight, "_PATIENCE_SECONDS", 10.0)
    path = write_config(tmp_path, "train.global_batch_size=30")
    assert preflight_on(tmp_path, path, 3, lost=(1,))[:2] == [ExitCode.PREFLIGHT, ExitCode.FINISHED]
    assert (tmp_path / "bad_nodes.txt").read_text() == "n1\n"
    assert "n1: gave no answer in time" in report_of(tmp_path)


def test_a_taken_port_is_found(tmp_path, capsys):
    path = write_config(tmp_path)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        options = Options(str(path), (), 2, 0, None, None, 2**20)
        place = Place(0, 2, "n0", "127.0.0.1", other.getsockname()[1])
        assert Preflight(options, place).run() == ExitCode.PREFLIGHT
    assert "is taken on n0" in capsys.readouterr().out


def test_data_that_a_run_had_when_it_began_are_not_its_fault(tmp_path):
    path = write_config(tmp_path, f"data.source={{name: image_folder, path: {tmp_path / 'unmounted'}}}")
    (tmp_path / "run/checkpoints/step-00000005").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000005/manifest.json").write_text("{}")
    assert preflight_on(tmp_path, path, 1) == [ExitCode.PREFLIGHT]
    assert "unmounted" in report_of(tmp_path)


def test_command_line_refuses_unknown_words(capsys):
    with pytest.raises(SystemExit):
        preflight.main(["config.yaml", "--gpu", "3"])
    assert "'--gpu' is neither an option nor an override" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, "127.0.0.1", 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, (0, 1, "127.0.0.1", 0)),  # a batch script
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (0, 1, "127.0.0.1", 0)),  # srun -n1
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "", "SLURM_PROCID": "", "MASTER_PORT": ""}, (0, 1, "127.0.0.1", 0)),
        ({"SLURM_STEP_ID": "", "SLURM_NTASKS": "2"}, (0, 1, "127.0.0.1", 0)),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29"},
         (1, 2, "n0", 29)),
    ],
)  # fmt: skip
def test_places_under_srun(variables, place):
    found = Place.from_environment(variables)
    assert (found.rank, found.nodes, found.master, found.port) == place


def test_processes_that_do_not_know_where_to_meet_say_so(monkeypatch, capsys):
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert preflight.main([str(CONFIG)]) == ExitCode.PREFLIGHT
    assert "MASTER_ADDR not set, so 2 processes do not know where to meet" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "n0")
    monkeypatch.setenv("MASTER_PORT", "tcp")
    assert preflight.main([str(CONFIG)]) == ExitCode.PREFLIGHT
    assert "MASTER_PORT='tcp' is not a number" in capsys.readouterr().err
