import contextlib
import dataclasses
import json
import os
import signal
import time

import pytest

from megavar.errors import ClusterError
from megavar.training.checkpoint import lock
from megavar.training.checkpoint.lock import Owner, RunLock


class Holder:
    """A forked process that holds the lock of a directory."""

    def __init__(self, directory):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            RunLock.acquire(directory)
            os.write(write, b"held")
            time.sleep(60)
            os._exit(0)
        assert os.read(read, 4) == b"held"
        os.close(read)
        os.close(write)

    def kill(self, reap=True):
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | (0 if reap else os.WNOWAIT))


@pytest.fixture
def holder(tmp_path):
    holder = Holder(tmp_path)
    yield holder
    with contextlib.suppress(ChildProcessError, ProcessLookupError):
        holder.kill()


def elsewhere(owner: Owner, **changes) -> Owner:
    """The same lock as if its owner ran on another machine."""
    return dataclasses.replace(owner, host="elsewhere", boot="another boot", **changes)


def plant(directory, owner: Owner) -> None:
    (directory / lock.FILE_NAME).write_text(json.dumps(dataclasses.asdict(owner)))


def test_a_second_live_run_is_refused_and_the_message_names_the_first(tmp_path, holder):
    with pytest.raises(ClusterError, match=rf"in use by process {holder.pid} on .*run\.directory"):
        RunLock.acquire(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    began = time.monotonic()
    with RunLock.acquire(tmp_path, stale_after=30) as mine:
        assert time.monotonic() - began < 5
        assert mine.owner.pid == os.getpid()
    assert not (tmp_path / lock.FILE_NAME).exists()


def test_a_process_that_died_but_was_not_reaped_counts_as_dead(tmp_path, holder):
    holder.kill(reap=False)
    RunLock.acquire(tmp_path, stale_after=30).release()


def test_another_process_with_the_same_id_does_not_count_as_the_owner(tmp_path):
    plant(tmp_path, dataclasses.replace(Owner.current(), started="1"))
    RunLock.acquire(tmp_path, stale_after=30).release()


def test_released_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        with RunLock.acquire(tmp_path):
            assert (tmp_path / lock.FILE_NAME).exists()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_machine_that_shows_life_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_EVERY", 0.1)
    here = Owner.current()
    path = tmp_path / lock.FILE_NAME
    there = elsewhere(here)
    plant(tmp_path, there)
    living = RunLock(path, there)  # its thread touches the file
    with pytest.raises(ClusterError, match=r"in use by process .* on elsewhere"):
        RunLock.acquire(tmp_path, stale_after=20)
    living.release()


def test_an_owner_on_another_machine_without_signs_of_life_is_taken_over(tmp_path):
    plant(tmp_path, elsewhere(Owner.current()))
    with RunLock.acquire(tmp_path, stale_after=0.3) as mine:
        assert mine.owner.host != "elsewhere"


def test_an_earlier_start_of_the_same_slurm_job_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    plant(tmp_path, elsewhere(Owner.current(), restart=0))
    began = time.monotonic()
    RunLock.acquire(tmp_path, stale_after=30).release()
    assert time.monotonic() - began < 5


def test_the_same_start_of_the_same_slurm_job_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_EVERY", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    there = elsewhere(Owner.current())
    plant(tmp_path, there)
    living = RunLock(tmp_path / lock.FILE_NAME, there)
    with pytest.raises(ClusterError, match="Slurm job 77"):
        RunLock.acquire(tmp_path, stale_after=20)
    living.release()


def test_a_run_whose_lock_was_taken_over_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_EVERY", 0.05)
    mine = RunLock.acquire(tmp_path)
    mine.check()
    plant(tmp_path, elsewhere(mine.owner, token="taken"))
    mine._thread.join(5)
    with pytest.raises(ClusterError, match="belongs to another run"):
        mine.check()
    mine.release()
    assert json.loads((tmp_path / lock.FILE_NAME).read_text())["token"] == "taken"


def test_a_dead_lock_is_removed_only_if_it_still_is_the_one_judged(tmp_path):
    judged, newer = Owner.current(), Owner.current()
    plant(tmp_path, newer)
    assert not lock._remove_dead(tmp_path / lock.FILE_NAME, judged)
    assert json.loads((tmp_path / lock.FILE_NAME).read_text())["token"] == newer.token


@pytest.mark.parametrize("target", ["nowhere", "file", "folder"])
def test_a_link_in_place_of_the_lock_is_removed_and_not_followed(tmp_path, target):
    """A dangling one was waited for for ever."""
    place = tmp_path / target
    if target == "file":
        place.write_text("precious")
    elif target == "folder":
        place.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.FILE_NAME).symlink_to(place)
    with RunLock.acquire(tmp_path / "run", stale_after=30) as mine:
        assert not mine.path.is_symlink() and json.loads(mine.path.read_text())["pid"] == os.getpid()
    assert not place.is_file() or place.read_text() == "precious"


def test_a_folder_in_place_of_the_lock_is_named(tmp_path):
    (tmp_path / lock.FILE_NAME).mkdir()
    with pytest.raises(ClusterError, match="is a folder, not a lock"):
        RunLock.acquire(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"token": 1}'])
def test_a_damaged_lock_counts_as_dead_after_a_while(tmp_path, content):
    (tmp_path / lock.FILE_NAME).write_bytes(content)
    with RunLock.acquire(tmp_path, stale_after=0.2) as mine:
        assert json.loads(mine.path.read_text())["pid"] == os.getpid()
