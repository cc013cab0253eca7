"""Preflight on good and bad settings: single checks, and whole runs of several "nodes" over a real store."""

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from launchers import checks, preflight
from launchers.checks import Finding, compare, guarded, slow
from launchers.preflight import Options, Place, Preflight, bad_nodes, exit_code, table
from launchers.rates import matmul_rate
from megavar.config.loading import dump, load_config
from megavar.errors import ExitCode
from megavar.tokenizers.multiscale_vq import MultiScaleVQ

CONFIG = Path(__file__).parents[2] / "configs/quickstart/tokenizer.yaml"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(CONFIG.parents[2])  # the configuration names files relative to it


def write_config(folder: Path, *overrides: str) -> Path:
    config = load_config(CONFIG, [f"run.directory={folder / 'run'}", *overrides])
    path = folder / "config.yaml"
    path.write_text(dump(config))
    (folder / "run").mkdir(exist_ok=True)
    return path


def preflight_on(folder: Path, path: Path, nodes: int, gpus: tuple[int, ...] | None = None) -> list[int]:
    """Exit codes of preflight on ``nodes`` processes that believe to be nodes n0, n1, ..."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(nodes):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                expected = gpus[rank] if gpus else 0
                options = Options(str(path), (), nodes, expected, 300.0, folder, 2**20)
                place = Place(rank, nodes, f"n{rank}", "127.0.0.1", port)
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


def test_one_node_without_its_gpus_is_replaced(tmp_path):
    """This machine has none, so the node that expects eight is the bad one."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without GPUs")
    path = write_config(tmp_path, "train.global_batch_size=30")
    assert preflight_on(tmp_path, path, 2, gpus=(0, 8)) == [ExitCode.PREFLIGHT] * 2
    assert "n1: 0 GPUs are visible, 8 are expected" in report_of(tmp_path)
    assert (tmp_path / "bad_nodes.txt").read_text() == "n1\n"


def test_a_taken_port_is_found(tmp_path, capsys):
    path = write_config(tmp_path)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        options = Options(str(path), (), 2, 0, None, None, 2**20)
        place = Place(0, 2, "n0", "127.0.0.1", other.getsockname()[1])
        assert Preflight(options, place).run() == ExitCode.PREFLIGHT
    assert "is taken on n0" in capsys.readouterr().out


def test_a_check_that_hangs_is_given_up(tmp_path):
    began = time.monotonic()
    finding = guarded("slow", 0.2, lambda: time.sleep(60) or "never")
    assert (finding.status, finding.detail) == ("fail", "no result within 0 s")
    assert time.monotonic() - began < 30


def test_a_check_that_raises_fails_with_its_message():
    def broken() -> str:
        raise OSError("Input/output error")

    assert guarded("x", 5, broken) == Finding("x", "fail", "OSError: Input/output error")
    assert guarded("x", 5, lambda: "good") == Finding("x", "pass", "good")


def test_a_directory_that_one_node_does_not_see(tmp_path):
    checks.write_mark(tmp_path, "n1")
    assert checks.read_marks(tmp_path, ["n1", "n2"], 0.3) == ["n2"]


def test_space_for_three_checkpoints(tmp_path):
    assert checks.free_space(tmp_path, 1000).status == "pass"
    finding = checks.free_space(tmp_path, 2**60)
    assert finding.status == "fail"
    assert "keep_last" in finding.detail


def test_save_time_against_lead(tmp_path):
    assert checks.save_time(tmp_path, 100 * 2**20, 2**20, 300).status == "pass"
    assert checks.save_time(tmp_path, 200 * 2**20, 2**20, 300).status == "warn"
    assert checks.save_time(tmp_path, 400 * 2**20, 2**20, 300).status == "fail"
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "step": 5, "last_save_seconds": 170.0}\n')
    measured = checks.save_time(tmp_path, 2**20, 2**30, 300)
    assert measured.status == "warn"
    assert "raise signal_lead_seconds to 340" in measured.detail


def test_checkpoint_size_is_that_of_the_newest_or_estimated(tmp_path):
    config = load_config(CONFIG)
    estimate = checks.checkpoint_bytes(config, tmp_path)
    assert estimate == 12 * sum(tensor.numel() for tensor in MultiScaleVQ(config.tokenizer).parameters())
    for step, size in ((1, 10), (2, 30)):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(b"x" * size)
        (folder / "manifest.json").write_text("{}")
    assert checks.checkpoint_bytes(config, tmp_path) == 32


def test_weights_must_exist_or_be_trained_first(tmp_path, monkeypatch):
    quickstart = CONFIG.parents[1] / "quickstart.yaml"
    config = load_config(quickstart)
    monkeypatch.chdir(CONFIG.parents[2])
    assert "runs/quickstart-tokenizer" in checks.weights(config)
    run = config.run.model_copy(update={"requires": ()})
    recipe = config.recipe.model_copy(update={"tokenizer_weights": str(tmp_path / "x")})
    alone = config.model_copy(update={"run": run, "recipe": recipe})
    with pytest.raises(FileNotFoundError, match="no required run makes it"):
        checks.weights(alone)


def test_shared_memory(tmp_path):
    assert checks.shared_memory(0, tmp_path / "absent").status == "warn"
    assert checks.shared_memory(2, tmp_path / "absent").status == "fail"
    assert checks.shared_memory(2, tmp_path).status == "pass"
    assert checks.shared_memory(10**9, tmp_path).status == "warn"


def test_outliers():
    assert slow({"a": 100, "b": 101, "c": 99, "d": 60}, 0.1) == ["d"]
    assert slow({"a": 100, "b": 104, "c": 97, "d": 95}, 0.1) == []
    assert slow({"a": 100, "b": 10}, 0.1) == [], "two cannot tell"
    assert slow({"a": 100, "b": 70, "c": 130, "d": 60}, 0.1) == [], "all differ: nobody stands out"


def test_an_outlier_fails_and_is_replaced():
    rates = {"a": 700.0, "b": 690.0, "c": 400.0}
    report = {node: [finding] for node, finding in compare("matmul", "TFLOP/s", rates, tolerance=0.1).items()}
    assert [report[node][0].status for node in "abc"] == ["pass", "pass", "fail"]
    assert exit_code(report) == ExitCode.PREFLIGHT
    assert bad_nodes(report) == ["c"]
    text = table(report)
    assert "matmul" in text and "FAIL" in text and "2/3" in text and "c: 400 TFLOP/s, the median is 690" in text


def test_clocks():
    found = checks.clock({"a": 0.01, "b": -2.5, "c": 120.0})
    assert [found[node].status for node in "abc"] == ["pass", "warn", "fail"]


def test_what_all_nodes_lack_is_nobodys_fault():
    report = {node: [Finding("run directory", "fail", "not seen")] for node in "abc"}
    assert exit_code(report) == ExitCode.PREFLIGHT
    assert bad_nodes(report) == []
    data = {node: [Finding("data", "fail", "missing")] for node in "ab"}
    assert exit_code(data) == ExitCode.CONFIGURATION
    data["b"] = [Finding("data", "pass", "")]
    assert exit_code(data) == ExitCode.PREFLIGHT
    assert bad_nodes(data) == ["a"]
    assert exit_code({"a": [Finding("gpus", "pass", "")]}, silent=1) == ExitCode.PREFLIGHT


def test_rates_are_measured():
    import torch

    assert matmul_rate(torch.device("cpu"), seconds=0.05) > 1e6


def test_command_line_refuses_unknown_words(capsys):
    with pytest.raises(SystemExit):
        preflight.main(["config.yaml", "--gpu", "3"])
    assert "'--gpu' is neither an option nor an override" in capsys.readouterr().err
