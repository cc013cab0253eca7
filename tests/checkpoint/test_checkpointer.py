"""The protocol carried out by several ranks: death at every phase, damage, refusal, background saves."""

import errno
import logging
import resource
import shutil
import signal

import pytest
import torch
import torch.distributed as dist

from megavar.config.checkpoint import CheckpointConfig
from megavar.errors import CheckpointError, ExitCode
from megavar.training.checkpoint import Checkpointer, fault, find_checkpoint, master, read_weights, shards
from tests.checkpoint.conftest import assert_same, read_everything
from tests.checkpoint.layered import Layout, Run
from tests.distributed.harness import RankFailure, run_ranks

pytestmark = pytest.mark.distributed
TWO = Layout(2, 1)


def train(root, until, keep_last=2, asynchronous=False):
    """What a trainer does: continue if there is something to continue, save after every step."""
    run = Run(TWO)
    with Checkpointer(root, CheckpointConfig(keep_last=keep_last, asynchronous=asynchronous)) as checkpointer:
        state = checkpointer.load({"model": run.state})
        first = state["step"] if state else 0
        for step in range(first, until):
            run.step(step)
            checkpointer.save(step + 1, {"model": run.state}, {"step": step + 1})
    return first


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps with all its checkpoints."""
    root = tmp_path_factory.mktemp("straight")
    run_ranks(2, train, root, 4, 9)
    return root


@pytest.fixture
def root(straight, tmp_path):
    """A copy of the checkpoints of steps 3 and 4."""
    return shutil.copytree(straight, tmp_path / "checkpoints", ignore=shutil.ignore_patterns("*[12]"))


def load(root, layout=TWO, width=8, fresh=False, at_most=None):
    """Load on every rank; return the trainer's state, the log, and whether weights changed."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megavar").addHandler(handler)
    run = Run(layout, seed=5, width=width)
    before = [tensor.detach().clone() for tensor in master.master_tensors(run.engine)]
    try:
        state = Checkpointer(root, CheckpointConfig()).load({"model": run.state}, fresh=fresh, at_most=at_most)
    except CheckpointError as error:
        state = str(error)
    return state, "\n".join(records), not all(map(torch.equal, before, master.master_tensors(run.engine)))


@pytest.mark.parametrize(
    ("phase", "asynchronous"),
    [(phase, False) for phase in (*fault.PHASES, "before_shards:1", "inside_shard:1", "after_shards:1")]
    + [(phase, True) for phase in ("inside_shard", "inside_shard:1", "before_rename", "before_latest")],
)
def test_a_run_killed_at_any_phase_of_a_save_continues_bitwise(phase, asynchronous, straight, tmp_path, monkeypatch):
    shutil.copytree(straight / "step-00000002", tmp_path / "step-00000002")
    monkeypatch.setenv(fault.VARIABLE, phase)
    with pytest.raises(RankFailure, match=r"died with exit code -9|Connection (closed|reset) by peer"):
        run_ranks(2, train, tmp_path, 3, 2, asynchronous)
    monkeypatch.delenv(fault.VARIABLE)
    last_good = 3 if phase == "before_latest" else 2
    assert find_checkpoint(tmp_path)[1].step == last_good
    assert run_ranks(2, train, tmp_path, 4) == [last_good, last_good]
    assert_same(read_everything(tmp_path, 4), read_everything(straight, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def remove(path):
    path.unlink()


SHARDS = ("__0_0.distcp", "__1_0.distcp")


@pytest.mark.parametrize(
    ("damage", "name"),
    [(flip, name) for name in (*SHARDS, ".metadata", "manifest.json")]
    + [(truncate, name) for name in (SHARDS[1], "manifest.json")]
    + [(remove, name) for name in (SHARDS[0], ".metadata", "manifest.json")],
)
def test_damage_is_named_and_the_checkpoint_before_it_is_used(damage, name, root):
    damaged = root / "step-00000004" / name
    damage(damaged)
    with pytest.raises(CheckpointError, match=f"damaged.*{name}"):
        read_weights(root / "step-00000004", "model")
    (state, log, changed), (other_state, *_) = run_ranks(2, load, root)
    assert state == other_state == {"step": 3}
    assert changed
    assert f"CHECKPOINT DAMAGED: {damaged}" in log
    assert "Continuing from step 3" in log
    assert [path.name.partition("-")[2][:17] for path in sorted(root.glob("step-*"))] == [
        "00000003",
        "00000004.damaged-",
    ]


def test_without_any_whole_checkpoint_nothing_starts_silently(root):
    flip(root / "step-00000004" / "__0_0.distcp")
    (root / "step-00000003" / "manifest.json").unlink()
    for message, _, changed in run_ranks(2, load, root):
        assert "2 checkpoint(s), but none can be used" in message
        assert "__0_0.distcp" in message
        assert "manifest.json" in message
        assert "train.fresh=true" in message
        assert not changed
    assert len(list(root.glob("step-*"))) == 2


def test_a_fresh_start_is_made_when_asked_for_and_deletes_nothing(root):
    assert [state for state, *_ in run_ranks(2, load, root, TWO, 8, True)] == [None, None]
    (moved,) = root.parent.glob("checkpoints.before-*")
    assert find_checkpoint(moved)[1].step == 4


def test_a_new_run_starts_where_there_never_was_a_checkpoint(tmp_path):
    assert run_ranks(2, load, tmp_path / "none")[0][0] is None
    (tmp_path / "killed" / "step-00000001.tmp-ab").mkdir(parents=True)
    assert run_ranks(2, load, tmp_path / "killed")[0][0] is None


def test_the_checkpoint_of_another_model_is_refused_before_anything_is_written(root):
    for message, _, changed in run_ranks(2, load, root, TWO, 10):
        assert "step-00000004 is a checkpoint of another model" in message
        assert (
            "model/blocks.0.column.weight is shape [24, 8] in the checkpoint and shape [30, 10] in this model"
            in message
        )
        assert "more differences" in message
        assert "train.fresh=true" in message
        assert not changed
    assert len(list(root.glob("step-*"))) == 2


def test_going_back_to_an_earlier_step_sets_later_ones_aside(root):
    assert run_ranks(2, load, root, TWO, 8, False, 3)[1][0] == {"step": 3}
    assert find_checkpoint(root)[1].step == 3
    assert len(list(root.glob("step-00000004.abandoned-*"))) == 1


def _save_while_training(root):
    run = Run(TWO)
    with Checkpointer(root, CheckpointConfig(asynchronous=True)) as checkpointer:
        run.step(0)
        checkpointer.save(1, {"model": run.state}, {"step": 1})
        run.step(1)  # the copies must not follow
        checkpointer.save(2, {"model": run.state}, {"step": 2})
        run.step(2)
    assert checkpointer.last_save_seconds > checkpointer.last_stall_seconds > 0


def test_a_background_save_holds_the_moment_it_was_asked_for(tmp_path):
    run_ranks(2, _save_while_training, tmp_path / "background")
    for step in (1, 2):
        run_ranks(2, train, tmp_path / "foreground", step)
        actual = read_everything(tmp_path / "background", step)
        assert_same(actual, read_everything(tmp_path / "foreground", step))


def _save_with_a_full_disk(root, asynchronous):
    run = Run(TWO)
    checkpointer = Checkpointer(root, CheckpointConfig(asynchronous=asynchronous))
    checkpointer.save(1, {"model": run.state}, {})
    checkpointer.wait()
    original = shards.write

    def write(*arguments):
        names = original(*arguments)
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return names

    shards.write = write
    messages = []
    try:
        checkpointer.save(2, {"model": run.state}, {})
        checkpointer.wait()
    except CheckpointError as error:
        assert error.exit_code == ExitCode.FAILED, "a launcher starts the run again"
        messages.append(str(error))
    shards.write = original
    checkpointer.save(3, {"model": run.state}, {})
    checkpointer.close()
    return messages


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_of_one_rank_reaches_all_and_costs_no_checkpoint(tmp_path, asynchronous):
    for messages in run_ranks(2, _save_with_a_full_disk, tmp_path, asynchronous):
        assert len(messages) == 1
        assert "step-00000002 failed on rank 1: [Errno 28] No space left on device" in messages[0]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


def _save_on_a_disk_that_fills(root, full_rank, asynchronous):
    """The real thing, inside DCP: no file of this process may grow beyond 100 kB, as if the disk were full."""
    run = Run(TWO, width=64)
    checkpointer = Checkpointer(root, CheckpointConfig(asynchronous=asynchronous))
    checkpointer.save(1, {"model": run.state}, {})
    checkpointer.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    messages = []
    try:
        checkpointer.save(2, {"model": run.state}, {})
        checkpointer.wait()
    except CheckpointError as error:
        assert error.exit_code == ExitCode.FAILED, "a launcher starts the run again"
        messages.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(path.name for path in root.glob("step-*"))
    checkpointer.save(3, {"model": run.state}, {})
    checkpointer.close()
    return messages, left


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_disk_that_fills_inside_dcp_is_an_error_like_others(tmp_path, full_rank, asynchronous):
    """DCP's exception is no Exception: it passed every handler, left the attempt behind, and said nothing."""
    for messages, left in run_ranks(2, _save_on_a_disk_that_fills, tmp_path, full_rank, asynchronous):
        assert len(messages) == 1 and "step-00000002 failed on rank" in messages[0]
        assert "File too large" in messages[0]
        assert left == ["step-00000001"], "the attempt is discarded"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


def test_errors_of_dcp_in_reading_are_errors_for_people(root, monkeypatch):
    """A file system that fails under DCP, and shards that are not what the index says."""

    def fails(self, *_):
        raise OSError(errno.EIO, "Input/output error")

    path = root / "step-00000004"
    keys = shards.index(path)
    templates = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in keys.items()}
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem.FileSystemReader._slice_file", fails)
        with pytest.raises(OSError, match="Input/output error"):
            shards.read(path, templates)
    for shard in path.glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CheckpointError, match=r"on rank 0"):
        shards.read(path, templates)


def _skip_a_parameter(root, load_first):
    run = Run(Layout(1, 0))
    checkpointer = Checkpointer(root, CheckpointConfig())
    if load_first:
        checkpointer.load({"model": run.state})
    else:
        run.step(0)
        run.engine.module.blocks["0"].norm.weight.register_hook(lambda gradient: None)
        inner = run.engine.optimizer
        handle = inner.register_step_pre_hook(
            lambda *_: setattr(run.engine.module.blocks["0"].norm.weight, "grad", None)
        )
        run.step(1)
        handle.remove()
        checkpointer.save(2, {"model": run.state}, {})
    master.moments(run.engine)
    return sorted(master.get_steps(run.engine))


def test_parameters_that_skipped_steps_keep_their_own_count(tmp_path):
    (saved,) = run_ranks(1, _skip_a_parameter, tmp_path, False)
    assert saved[:2] == [1, 2]
    assert find_checkpoint(tmp_path)[1].modules["model"].step_exceptions == {"blocks.0.norm.weight": 1}
    assert run_ranks(1, _skip_a_parameter, tmp_path, True) == [saved]


def test_readers_without_a_run_get_clear_errors(straight, tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint and holds none"):
        read_weights(tmp_path, "model")
    with pytest.raises(CheckpointError, match="holds no module 'generator'; it holds model"):
        read_weights(straight, "generator")
