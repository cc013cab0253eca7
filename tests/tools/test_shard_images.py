"""The sharding tools as a person runs them."""

import os
import subprocess
import sys

import pytest

from megavar.data.webdataset import ShardFolder
from megavar.errors import ExitCode
from tests.sources.originals import content_of, flip_bit, write_class_folders, write_pairs
from tools import shard_images, verify_shards


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_class_folders(tmp_path_factory.mktemp("originals"), 24)


def test_from_class_folders_to_verified_shards(originals, tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = ["--images", str(originals), "--out", str(out), "--samples-per-shard", "7", "--processes", "2"]
    assert shard_images.main(arguments) == ExitCode.FINISHED
    assert "24 images in 4 shards, 10 classes" in capsys.readouterr().out
    assert len(ShardFolder("train", out)) == 24
    assert verify_shards.main([str(out)]) == ExitCode.FINISHED
    assert verify_shards.main([str(out), "--full", "--processes", "2"]) == ExitCode.FINISHED
    said = "24 images in 4 shards, 10 classes of 2 to 3 images, checked (every byte): 0 problems"
    assert said in capsys.readouterr().out

    before = content_of(out)
    flip_bit(out / "shard-000001.tar", 50_000)
    assert verify_shards.main([str(out)]) == ExitCode.FINISHED  # a quick look cannot see it
    assert verify_shards.main([str(out), "--full"]) == ExitCode.CONFIGURATION
    assert "shard-000001.tar: its hash is not the one in the manifest" in capsys.readouterr().out
    assert verify_shards.main([str(out), "--repair"]) == ExitCode.CONFIGURATION
    assert "--source" in capsys.readouterr().err
    assert verify_shards.main([str(out), "--repair", "--source", str(originals)]) == ExitCode.FINISHED
    assert content_of(out) == before


def test_the_command_line_in_a_process_of_its_own(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 6)
    command = [sys.executable, "-m", "tools.shard_images", "--pairs", str(pairs), "--out", str(tmp_path / "out")]
    result = subprocess.run([*command, "--shards", "2"], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "6 images in 2 shards" in result.stdout
    assert "sharding: 100%" in result.stderr


def test_machines_share_the_work(originals, tmp_path, capsys):
    arguments = ["--images", str(originals), "--out", str(tmp_path / "out"), "--shards", "4", "--processes", "1"]
    assert shard_images.main([*arguments, "--part", "0/2"]) == ExitCode.FINISHED
    assert "other parts" in capsys.readouterr().out
    assert shard_images.main([*arguments, "--part", "1/2"]) == ExitCode.FINISHED
    assert "24 images in 4 shards" in capsys.readouterr().out


def test_existing_shards_are_adopted(originals, tmp_path, capsys):
    out = tmp_path / "out"
    assert shard_images.main(["--images", str(originals), "--out", str(out), "--shards", "2"]) == ExitCode.FINISHED
    (out / "manifest.json").unlink()
    for path in out.glob("*.idx"):
        path.unlink()
    assert shard_images.main(["--existing", str(out)]) == ExitCode.FINISHED
    assert "24 images in 2 shards" in capsys.readouterr().out
    assert verify_shards.main([str(out), "--repair", "--source", str(originals)]) == ExitCode.CONFIGURATION
    assert "made by another tool" in capsys.readouterr().err


def test_what_is_wrong_is_one_paragraph(tmp_path, capsys):
    assert shard_images.main(["--images", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "none does not exist" in message
    assert not (tmp_path / "out").exists()
    assert verify_shards.main([str(tmp_path)]) == ExitCode.CONFIGURATION
    assert "no manifest.json" in capsys.readouterr().err
    for bad in (["--part", "2/2"], ["--shards", "0"]):
        with pytest.raises(SystemExit):
            shard_images.main(["--images", str(tmp_path), "--out", str(tmp_path / "out"), *bad])
    for bad in (["--images", str(tmp_path)], ["--existing", str(tmp_path), "--out", str(tmp_path / "out")]):
        with pytest.raises(SystemExit):
            shard_images.main(bad)
    for bad in (["--source", str(tmp_path)], ["--processes", "0"]):
        with pytest.raises(SystemExit):
            verify_shards.main([str(tmp_path), *bad])


def test_what_is_ignored_is_said(originals, tmp_path, capsys):
    (originals / "china" / "notes.txt").touch()
    assert shard_images.main(["--images", str(originals), "--out", str(tmp_path / "out")]) == ExitCode.FINISHED
    (originals / "china" / "notes.txt").unlink()
    assert "Beside the 24 images there are, and are ignored: 1 .txt" in capsys.readouterr().out
