"""Single checks of preflight, and the judgement of what the nodes report."""

import os
import shutil
import time
from pathlib import Path

import pytest

from launchers import checks, judgement
from launchers.checks import Finding, guarded
from launchers.judgement import add_silent_nodes, bad_nodes, compare, exit_code, slow, table
from launchers.rates import matmul_rate
from megavar.config.loading import load_config
from megavar.config.train import InitialWeightsConfig
from megavar.errors import CheckpointError, ConfigError, DataAccessError, DataError, ExitCode
from megavar.tokenizers.multiscale_vq import MultiScaleVQ
from tests.launchers.test_preflight import CONFIG
from tests.sources.originals import shard, write_class_folders


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


@pytest.mark.parametrize(
    ("error", "of_the_run"),
    [(DataError("no such class"), True), (DataAccessError("Stale file handle"), False), (OSError("timeout"), False)],
)
def test_a_file_system_that_fails_is_no_reason_to_give_the_run_up(error, of_the_run):
    def broken() -> str:
        raise error

    report = {node: [guarded("data", 5, broken)] for node in "ab"}
    assert exit_code(report) == (ExitCode.CONFIGURATION if of_the_run else ExitCode.PREFLIGHT)


def test_streams_need_shards_for_all_ranks(tmp_path):
    shards = shard(write_class_folders(tmp_path / "originals", 24), tmp_path / "shards", shards=4)
    source = f"data.source={{name: webdataset, path: {shards}, order: stream, lanes: 4}}"
    config = load_config(CONFIG, [source, "data.transform={name: var}", "train.global_batch_size=12"])
    assert checks.data(config, 2) == "24 samples in 10 classes"
    with pytest.raises(ConfigError, match="a multiple of the 3 data-parallel ranks"):
        checks.data(config, 3)
    index = load_config(CONFIG, [source.replace("stream, lanes: 4", "index"), "data.transform={name: var}"])
    assert checks.data(index.model_copy(update={"train": config.train}), 3) == "24 samples in 10 classes"


def test_a_directory_that_one_node_does_not_see(tmp_path):
    checks.write_mark(tmp_path, "n1")
    assert checks.read_marks(tmp_path, ["n1", "n2"], 0.3) == ["n2"]


def test_space_for_three_checkpoints(tmp_path):
    assert checks.free_space(tmp_path, 1000).status == "pass"
    finding = checks.free_space(tmp_path, 2**60)
    assert finding.status == "fail"
    assert "keep_last" in finding.detail


def test_space_for_one_more_checkpoint_is_enough_where_others_exist(tmp_path):
    """A run whose disk is as large as it needs must be able to continue."""
    free = shutil.disk_usage(tmp_path).free
    statuses = [checks.free_space(tmp_path, int(free / 1.5), existing).status for existing in (0, 1, 2, 9)]
    assert statuses == ["fail", "fail", "pass", "pass"]


def test_save_time_against_lead(tmp_path):
    assert checks.save_time(tmp_path, 100 * 2**20, 2**20, 300).status == "pass"
    assert checks.save_time(tmp_path, 200 * 2**20, 2**20, 300).status == "warn"
    assert checks.save_time(tmp_path, 400 * 2**20, 2**20, 300).status == "fail"
    (tmp_path / "metrics.jsonl").write_text('{"time": 1.0, "step": 5, "last_save_seconds": 170.0}\n')
    measured = checks.save_time(tmp_path, 2**20, 2**30, 300)
    assert measured.status == "warn"
    assert "raise signal_lead_seconds to 340" in measured.detail
    saves = [20.0, 170.0, *[30.0] * 40]  # every line of metrics repeats the last save
    lines = [f'{{"time": {second}.0, "step": 5, "last_save_seconds": {save}}}\n' for second, save in enumerate(saves)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert checks.save_time(tmp_path, 2**20, 2**30, 300).status == "warn"


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


def test_weights_must_exist_or_be_trained_first(tmp_path):
    quickstart = CONFIG.parents[1] / "quickstart.yaml"
    config = load_config(quickstart)
    assert "runs/quickstart-tokenizer" in checks.weights(config, tmp_path)
    run = config.run.model_copy(update={"requires": ()})
    recipe = config.recipe.model_copy(update={"tokenizer_weights": str(tmp_path / "x")})
    alone = config.model_copy(update={"run": run, "recipe": recipe})
    with pytest.raises(CheckpointError, match=r"of 'tokenizer' in .*/x do not exist and no required run makes them"):
        checks.weights(alone, tmp_path)
    train = config.train.model_copy(update={"initial_weights": InitialWeightsConfig(path=str(tmp_path / "y"))})
    begun = config.model_copy(update={"train": train})
    with pytest.raises(CheckpointError, match=r"of 'initial weights' in .*/y do not exist"):
        checks.weights(begun, tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").write_text("{}")
    assert "tokenizer" in checks.weights(begun, tmp_path)  # it has them


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


def test_a_slow_gpu_among_those_of_one_node():
    assert judgement.matmul([700.0, 690.0, 710.0, 705.0]) == Finding("matmul", "pass", "", 690.0)
    assert judgement.matmul([0.1]) == Finding("matmul", "pass", "", 0.1)
    report = {"n1": [judgement.matmul([700.0, 690.0, 400.0, 705.0])]}
    assert report["n1"][0].detail == "GPU 2 does 400 TFLOP/s, the median is 695"
    assert bad_nodes(judgement.compared(report, {}, gpus=True)) == ["n1"]


def test_clocks():
    found = judgement.clock({"a": 0.01, "b": -2.5, "c": 120.0})
    assert [found[node].status for node in "abc"] == ["pass", "warn", "fail"]


def test_what_all_nodes_lack_is_nobodys_fault():
    report = {node: [Finding("run directory", "fail", "not seen")] for node in "abc"}
    assert exit_code(report) == ExitCode.PREFLIGHT
    assert bad_nodes(report) == []
    data = {node: [Finding("data", "fail", "missing", of_the_run=True)] for node in "ab"}
    assert exit_code(data) == ExitCode.CONFIGURATION
    data["b"] = [Finding("data", "pass", "")]
    assert exit_code(data) == ExitCode.PREFLIGHT
    assert bad_nodes(data) == ["a"]


NVIDIA_SMI = """#!/bin/bash
if [[ "$*" == *--query-compute-apps=gpu_uuid,pid* ]]; then
    {apps}
else
    echo "0, GPU-1111, {memory}, {temperature}, {errors}"
    echo "1, GPU-2222, 4, 31, [N/A]"
fi
"""


@pytest.mark.parametrize(
    ("answer", "failure", "warning"),
    [
        ({}, [], []),
        ({"memory": 700}, [], ["GPU 0 has 700 MiB in use before anything runs"]),
        ({"memory": 9000}, ["GPU 0 has 9000 MiB in use: a process was left behind"], None),
        ({"temperature": 71}, [], ["GPU 0 has 71 degrees Celsius before anything runs"]),
        ({"errors": 2}, ["GPU 0 has had 2 uncorrected memory errors"], None),
        ({"apps": "echo GPU-1111, 4711"}, ["GPU 0 is used by process 4711, which was left behind"], None),
    ],
)
def test_what_nvidia_smi_says(tmp_path, monkeypatch, answer, failure, warning):
    """In the place of the program stands one that answers in its format."""
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(**{"memory": 4, "temperature": 35, "errors": 0, "apps": ":"} | answer))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    states = checks.gpu_states()
    assert [state.index for state in states] == [0, 1]
    assert [text for state in states for text in state.failures()] == failure
    assert warning is None or [text for state in states for text in state.warnings()] == warning


def test_tensor_parallelism_wants_one_connection(monkeypatch):
    config = load_config(CONFIG, ["parallel.tensor=2"])
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    assert checks.settings(config, 8).status == "warn"
    assert checks.settings(load_config(CONFIG), 8).status == "pass"
    assert checks.settings(config, 0).status == "pass"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert checks.settings(config, 8).status == "pass"


def test_rates_are_measured():
    import torch

    assert matmul_rate(torch.device("cpu"), seconds=0.05) > 1e6


def test_silence_of_most_is_the_first_nodes_fault():
    def blamed(nodes: int, silent: int) -> list[str]:
        names = [f"n{number}" for number in range(nodes)]
        report = {name: [Finding("limits", "pass", "")] for name in names[: nodes - silent]}
        add_silent_nodes(report, names)
        assert exit_code(report) == (ExitCode.PREFLIGHT if silent else ExitCode.FINISHED)
        return bad_nodes(report)

    assert blamed(4, 0) == []
    assert blamed(4, 1) == ["n3"]
    assert blamed(4, 3) == ["n0"]
    assert blamed(2, 1) == ["n0", "n1"], "either may be cut off"


def test_whose_files_are_not_seen():
    def failed(unseen: dict[str, list[str]]) -> list[str]:
        return [node for node in unseen if checks.visibility(node, unseen, Path("/run")).status == "fail"]

    assert failed({"a": [], "b": [], "c": []}) == []
    assert failed({"a": ["b"], "b": ["a", "c"], "c": ["b"]}) == ["b"]
    assert failed({"a": ["b"], "b": [], "c": ["b"]}) == ["b"], "what it writes goes elsewhere"
    assert failed({"a": ["b"], "b": ["a"]}) == ["a", "b"]
    assert failed({"a": ["b"], "b": [], "c": [], "d": []}) == ["a"]
