import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from launchers.provenance import allowed_environment, note_submission
from megavar.config.loading import load_config
from megavar.errors import CheckpointError, ClusterError, ConfigError
from megavar.training.checkpoint.lock import Owner
from megavar.training.monitor import MetricsFile
from megavar.training.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
RESOLVED = json.loads((ROOT / "tests/config/data/resolved_9f0263a.json").read_text())
CONFIG = {
    "run": {"name": "a"}, "train": {"steps": 10, "micro_batch_size": 2, "seed": 0}, "logging": {"interval": 5},
    "data": {"source": {"name": "digits"}, "workers": 0}, "parallel": {"tensor": 1}, "scales": [1, 2],
}  # fmt: skip


def changed(section, key, value):
    return CONFIG | {section: CONFIG[section] | {key: value}}


def open_directory(path, config=CONFIG, weights=None, complete=lambda tree: tree, **options):
    directory = RunDirectory(path, weights, complete=complete)
    deepspeed = {"generator": {"zero_optimization": {"stage": 1}}}
    directory.note_weights(directory.open(config, {"world_size": 2}, deepspeed, **options), None, begins=False)
    if not directory.metrics.exists():
        directory.metrics.write_text('{"step": 1}\n')  # before, another configuration may take the place of this one
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
        (changed("train", "compile", "blocks"), "train.compile is None there and 'blocks' here"),
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


def test_a_start_that_trained_nothing_may_be_corrected(tmp_path):
    """Whatever it wrote down: its settings, the weights that it was to begin with, a lock that it left behind."""
    for name in ("wrong", "right"):
        (tmp_path / name).write_bytes(name.encode())
    run = tmp_path / "run"
    first = RunDirectory(run, initial=str(tmp_path / "wrong"))
    with subprocess.Popen(["true"]) as dead:
        pass
    for weights, steps in (("wrong", 10), ("right", 20)):
        directory = RunDirectory(run, initial=str(tmp_path / weights))
        directory.open(changed("train", "steps", steps), {}, {})
        directory.note_weights({}, directory.identify_initial(), begins=True)
        left = dataclasses.replace(Owner.current(), pid=dead.pid, started="1")
        (run / "run.lock").write_text(json.dumps(dataclasses.asdict(left)))
        assert not directory.begun
    assert yaml.safe_load(first.config.read_text())["train"]["steps"] == 20
    assert json.loads((run / "weights.json").read_text())["initial"]["file"] == "right"
    first.metrics.write_text('{"step": 1}\n')
    first.open(changed("train", "steps", 20), {}, {})
    with pytest.raises(CheckpointError, match="were replaced"):
        first.identify_initial()
    (run / "run.lock").write_text(json.dumps(dataclasses.asdict(Owner.current())))
    first.metrics.unlink()
    assert first.begun, "somebody else is about to train here"


def test_all_that_differs_is_named(tmp_path):
    open_directory(tmp_path)
    other = CONFIG | {"train": CONFIG["train"] | {"steps": 20, "seed": 1}, "scales": [1], "logging": {"interval": 1}}
    with pytest.raises(ConfigError) as caught:
        open_directory(tmp_path, other)
    assert [key for key in ("train.steps", "train.seed", "scales", "logging") if f"{key} is" in str(caught.value)] == [
        "train.steps", "train.seed", "scales",
    ]  # fmt: skip


def test_one_process_at_a_time(tmp_path):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.acquire()
    with pytest.raises(ClusterError, match=r"in use by process \d+ on"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


@pytest.fixture
def tokenizer(tmp_path):
    """A function that opens ``run`` with the tokenizer weights in ``name``, after perhaps writing them."""

    def use(name, content=None, terms=(), **options):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        recipe = {"name": "x", "tokenizer_weights": str(path), "terms": [{"weights": str(tmp_path / t)} for t in terms]}
        weights = {"tokenizer": str(path)} | {f"term{n}": str(tmp_path / t) for n, t in enumerate(terms)}
        return open_directory(tmp_path / "run", CONFIG | {"recipe": recipe}, weights, **options)

    return use


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def test_frozen_weights_may_move_but_not_change(tokenizer, tmp_path):
    tokenizer("a", b"one", terms=["a"])
    (tmp_path / "a").rename(tmp_path / "b")
    directory = tokenizer("b", terms=["b"])
    record = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert record["tokenizer"] == {"path": str(tmp_path / "b"), "file": "b", "sha256": hash_of(b"one")}
    assert yaml.safe_load(directory.config.read_text())["recipe"]["terms"][0]["weights"] == str(tmp_path / "b")
    before = {path: path.read_bytes() for path in (directory.config, tmp_path / "run" / "weights.json")}
    for name in ("b", "c"):  # replaced in place, and another file under another path
        with pytest.raises(CheckpointError, match="were replaced") as caught:
            tokenizer(name, b"two", terms=["b"])
        assert hash_of(b"one") in str(caught.value) and hash_of(b"two") in str(caught.value)
        assert "train.fresh=true" in str(caught.value)
        assert {path: path.read_bytes() for path in before} == before
    tokenizer("b", b"one", terms=["b"])


def test_a_changed_list_of_networks_is_another_configuration(tokenizer):
    tokenizer("a", b"one")
    with pytest.raises(ConfigError, match=r"recipe\.terms"):
        tokenizer("a", terms=["a"])


def test_weights_do_not_move_into_the_place_of_others(tokenizer, tmp_path):
    (tmp_path / "b").write_bytes(b"two")
    tokenizer("a", b"one", terms=["b"])
    with pytest.raises(CheckpointError, match="'term0' were replaced"):
        tokenizer("a", terms=["a"])


def test_a_fresh_start_takes_other_weights(tokenizer, tmp_path):
    tokenizer("a", b"one")
    tokenizer("b", b"two", fresh=True)
    assert json.loads((tmp_path / "run" / "weights.json").read_text())["tokenizer"]["sha256"] == hash_of(b"two")
    with pytest.raises(CheckpointError, match="were replaced"):
        tokenizer("a")


def test_a_run_of_an_older_version_learns_what_its_weights_are(tokenizer, tmp_path):
    tokenizer("a", b"one")
    (tmp_path / "run" / "weights.json").unlink()  # as if begun before weights were remembered
    with pytest.raises(CheckpointError, match="were replaced"):
        tokenizer("b", b"two")
    tokenizer("b", b"one")  # compared with what lies where the run says
    (tmp_path / "run" / "weights.json").unlink()
    (tmp_path / "b").unlink()
    with pytest.raises(ConfigError, match=r"recipe\.tokenizer_weights is"):  # nothing to compare with
        tokenizer("a")


def test_a_damaged_record_of_weights_is_named(tokenizer, tmp_path):
    tokenizer("a", b"one")
    (tmp_path / "run" / "weights.json").write_text('{"tokenizer": {"path": "a"}}')
    with pytest.raises(CheckpointError, match=r"weights\.json cannot be read"):
        tokenizer("a")


def test_a_key_that_the_stored_configuration_lacks_counts_as_its_default(tmp_path):
    def complete(tree):
        return {"deep": {"new": 1}} | tree

    open_directory(tmp_path, complete=complete)
    with pytest.raises(ConfigError, match=r"deep\.new is 1 there and 2 here"):
        open_directory(tmp_path, CONFIG | {"deep": {"new": 2}}, complete=complete)
    directory = open_directory(tmp_path, CONFIG | {"deep": {"new": 1}}, complete=complete)
    assert yaml.safe_load(directory.config.read_text())["deep"] == {"new": 1}


@pytest.mark.parametrize("content", [b"", b"- 1", b"a: [", b"\xff\xfe\x00", b"text", b"a: &x [*x"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    open_directory(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged.*Restore it") as caught:
        open_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_plugins_of_a_directory_alone_are_not_imported(tmp_path, monkeypatch):
    """Somebody else's run directory is no reason to run somebody else's code."""
    (tmp_path / "evil_plugin.py").write_text(f"from pathlib import Path; Path(r'{tmp_path}/ran').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    directory = RunDirectory(tmp_path / "run", complete=lambda tree: importlib.import_module(tree["plugins"][0]))
    directory.open(CONFIG | {"plugins": ["evil_plugin"]}, {}, {})
    directory.metrics.write_text('{"step": 1}\n')
    for given in (CONFIG, CONFIG | {"plugins": ["another"]}):
        with pytest.raises(ConfigError, match=r"plugins are 'evil_plugin' there.*no reason to run code"):
            directory.open(given, {}, {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", sorted(RESOLVED))
def test_runs_of_shipped_configurations_begun_at_9f0263a_belong_to_them(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(RESOLVED[path]))
    directory = RunDirectory.of(config, tmp_path)
    directory.check(config.model_dump(mode="json"))
    seed = config.train.model_copy(update={"seed": 3})
    with pytest.raises(ConfigError, match=r"train\.seed is 0 there and 3 here"):
        directory.check(config.model_copy(update={"train": seed}).model_dump(mode="json"))
