import json

import pytest
import yaml

from megavar.errors import ClusterError, ConfigError
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
