import json
import os

import pytest
import yaml

from launchers.provenance import allowed_environment, note_submission
from megavar.errors import ClusterError, ConfigError
from megavar.training.monitor import MetricsFile
from megavar.training.run_directory import RunDirectory

CONFIG = {
    "run": {"name": "a"}, "train": {"steps": 10, "micro_batch_size": 2, "seed": 0}, "logging": {"interval": 5},
    "data": {"source": {"name": "digits"}, "workers": 0}, "parallel": {"tensor": 1}, "scales": [1, 2],
}  # fmt: skip


def changed(section, key, value):
    return CONFIG | {section: CONFIG[section] | {key: value}}


def open_directory(path, config=CONFIG, **options):
    directory = RunDirectory(path)
    directory.open(config, {"world_size": 2}, {"generator": {"zero_optimization": {"stage": 1}}}, **options)
    return directory


def test_everything_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MY_SECRET_TOKEN", "hidden")
    directory = open_directory(tmp_path / "run")
    open_directory(tmp_path / "run")
    assert yaml.safe_load(directory.config.read_text()) == CONFIG
    assert json.loads((directory.path / "deepspeed.json").read_text())["generator"]["zero_optimization"]["stage"] == 1
    attempts = [json.loads(line) for line in (directory.path / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) == 2
    assert attempts[0]["layout"] == {"world_size": 2}
    assert attempts[0]["packages"]["torch"][0].isdigit()
    assert attempts[0]["environment"]["NCCL_DEBUG"] == "INFO"
    assert "hidden" not in json.dumps(attempts)


SECRETS = {
    "MASTER_PASSWORD": "a", "NCCL_TOKEN": "b", "CUDA_SECRET_KEY": "c", "TORCH_CREDENTIAL": "d", "MEGAVAR_API_KEY": "e",
    "NCCL_PROXY": "http://me:geheim@proxy:3128", "MEGAVAR_AUTH": "f", "PYTORCH_HUB": "hf_abcdefghijklmnop",
    "CUDA_PASSPHRASE": "g", "MEGAVAR_DB_PWD": "h",
}  # fmt: skip


def test_no_secret_is_recorded(tmp_path, monkeypatch):
    """One rule for everything that writes environment variables down."""
    for name, value in (SECRETS | {"NCCL_SOCKET_IFNAME": "eth0", "MASTER_ADDR": "node1"}).items():
        monkeypatch.setenv(name, value)
    open_directory(tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "attempts.jsonl").read_text())["environment"]
    assert recorded["NCCL_SOCKET_IFNAME"] == "eth0" and recorded["MASTER_ADDR"] == "node1"
    assert not set(recorded) & set(SECRETS)
    assert not set(allowed_environment(["*"])) & set(SECRETS)
    assert allowed_environment(["MASTER_*", "PWD"], {"MASTER_ADDR": "n", "PWD": "/home"}) == {
        "MASTER_ADDR": "n", "PWD": "/home",
    }  # fmt: skip


def test_nothing_is_written_through_links(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("precious\n")
    run = tmp_path / "run"
    run.mkdir()
    names = ("attempts.jsonl", "config.yaml", "deepspeed.json", "code.patch", "metrics.jsonl", "submissions.jsonl")
    for name in (*names, "metrics.discarded.jsonl"):
        (run / name).symlink_to(precious)
    (run / "config.yaml").unlink()  # else it is read
    open_directory(run)
    MetricsFile(run / "metrics.jsonl", 0).write({"step": 1})
    MetricsFile(run / "metrics.jsonl", 0)  # sets the line aside
    note_submission(run, job=1)
    assert precious.read_text() == "precious\n"
    assert json.loads((run / "attempts.jsonl").read_text())["layout"] == {"world_size": 2}
    assert json.loads((run / "metrics.discarded.jsonl").read_text()) == {"step": 1}
    assert json.loads((run / "submissions.jsonl").read_text())["job"] == 1


def test_what_killed_processes_left_is_removed_after_a_while(tmp_path):
    old, young, other = (tmp_path / name for name in (".DONE.abcd1234.tmp", ".DONE.abcd1235.tmp", ".notes.tmp"))
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, 0))
    open_directory(tmp_path)
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


def test_what_does_not_change_the_training_may_change(tmp_path):
    open_directory(tmp_path)
    for section, key, value in (
        ("logging", "interval", 7), ("parallel", "tensor", 2), ("train", "micro_batch_size", 1), ("data", "workers", 3)
    ):  # fmt: skip
        open_directory(tmp_path, changed(section, key, value))


@pytest.mark.parametrize(
    "config, key",
    [
        (changed("train", "steps", 20), "train.steps is 10 there and 20 here"),
        (changed("data", "source", {"name": "photographs"}), "data.source.name is 'digits' there"),
        (CONFIG | {"scales": [1, 3]}, "scales is [1, 2] there and [1, 3] here"),
        (CONFIG | {"generator": {"depth": 4}}, "generator.depth is None there and 4 here"),
    ],
)
def test_a_directory_of_another_run_is_refused_and_left_alone(tmp_path, config, key):
    directory = open_directory(tmp_path)
    before = directory.config.read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_directory(tmp_path, config)
    assert key in str(caught.value) and "run.directory" in str(caught.value)
    assert directory.config.read_bytes() == before


def test_done_is_kept_unless_the_run_starts_anew(tmp_path):
    directory = open_directory(tmp_path)
    assert not directory.done
    directory.finish({"steps": 10})
    assert directory.done and json.loads((tmp_path / "DONE").read_text())["steps"] == 10
    open_directory(tmp_path)
    assert directory.done
    open_directory(tmp_path, fresh=True)
    assert not directory.done


def test_one_process_at_a_time(tmp_path):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.acquire()
    with pytest.raises(ClusterError, match=r"in use by process \d+ on"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
