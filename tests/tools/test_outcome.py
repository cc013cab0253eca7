"""Tools end with one paragraph when the disk is full, when they are interrupted, and when a process is killed."""

import multiprocessing
import os
import resource
import signal
import sys

import pytest

from megavar.data.progress import in_processes, only_one
from megavar.errors import DataError, ExitCode
from tests.sources.originals import content_of, write_class_folders
from tools import shard_images, verify_shards
from tools.outcome import INTERRUPTED


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("originals"), 24)


def run(log, work, *arguments) -> tuple[int, str]:
    """Exit code and standard error of ``work`` in a process group of its own."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(log, work, arguments))
    process.start()
    process.join()
    return process.exitcode, log.read_text()


def _child(log, work, arguments) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        code = work(*arguments)
        file.flush()
    os._exit(code)


def _with_little_space(arguments, limit) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return shard_images.main(arguments)


def _interrupted(arguments) -> int:
    main = os.getpid()

    def hook(event, _) -> None:
        if event == "os.rename" and os.getpid() != main:  # a worker has finished a shard
            os.killpg(0, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(hook)
    return shard_images.main(arguments)


def test_a_full_disk_is_one_paragraph_and_the_same_command_continues(originals, tmp_path):
    arguments = ["--images", str(originals), "--shards", "3", "--processes", "2", "--out"]
    assert shard_images.main([*arguments, str(tmp_path / "expected")]) == ExitCode.FINISHED
    code, text = run(tmp_path / "log", _with_little_space, [*arguments, str(tmp_path / "out")], 20_000)
    assert code == ExitCode.FAILED
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith("shard_images: [Errno 27] File too large. Correct that")
    assert not list((tmp_path / "out").rglob("*.tar*"))
    assert shard_images.main([*arguments, str(tmp_path / "out")]) == ExitCode.FINISHED
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")


def test_control_c_is_one_line_and_the_same_command_continues(originals, tmp_path):
    arguments = ["--images", str(originals), "--shards", "6", "--processes", "2", "--out"]
    assert shard_images.main([*arguments, str(tmp_path / "expected")]) == ExitCode.FINISHED
    code, text = run(tmp_path / "log", _interrupted, [*arguments, str(tmp_path / "out")])
    assert code == INTERRUPTED
    assert "Traceback" not in text
    assert text.splitlines()[-1] == "shard_images: interrupted. The same command continues."
    assert shard_images.main([*arguments, str(tmp_path / "out")]) == ExitCode.FINISHED
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")


def test_a_place_that_cannot_be_written_is_one_paragraph(originals, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert shard_images.main(["--images", str(originals), "--out", str(tmp_path / "file")]) == ExitCode.FAILED
    assert "Not a directory" in capsys.readouterr().err
    assert verify_shards.main([str(tmp_path / "file")]) == ExitCode.CONFIGURATION


def _die(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_process_is_explained():
    with pytest.raises(DataError, match="memory ran out"):
        list(in_processes(_die, range(3), 2))


def test_work_is_done_by_one_process_at_a_time(tmp_path):
    second = only_one(tmp_path / "lock", patience=0.1)
    with only_one(tmp_path / "lock"), pytest.raises(DataError, match="Another process is at work"), second:
        pass
    with only_one(tmp_path / "lock", patience=0.1):
        pass
