import errno
import hashlib
import json

import pytest

from megavar.errors import CheckpointError
from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint import store
from megavar.training.checkpoint.manifest import DamagedError, Manifest, ModuleEntry


@pytest.fixture
def directory(tmp_path):
    """A directory with two files and their manifest."""
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").write_bytes(b"")
    files = tuple(manifests.describe_file(tmp_path, name) for name in ("a", "b"))
    modules = {"generator": ModuleEntry({"head.weight": [3, 4]}, 7, {"head.weight": 6}, ["seen"], True)}
    state, weights = {"epoch": 1, "list": (1, 2)}, {"tokenizer": {"file": "vae.pth", "sha256": "12"}}
    manifests.write(tmp_path, Manifest(7, modules, state, {"world_size": 2}, {}, files, weights))
    return tmp_path


def test_round_trip(directory):
    manifest = manifests.read(directory)
    assert manifest.step == 7
    assert manifest.state == {"epoch": 1, "list": [1, 2]}
    assert manifest.modules["generator"] == ModuleEntry({"head.weight": [3, 4]}, 7, {"head.weight": 6}, ["seen"], True)
    assert [entry.name for entry in manifest.files] == ["a", "b"]
    assert manifest.frozen == {"tokenizer": {"file": "vae.pth", "sha256": "12"}}
    assert manifests.damage(directory, manifest.files) is None


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(DamagedError, match=r"manifest\.json is missing"):
        manifests.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_something_else_than_a_manifest_is_named(directory, content):
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"manifest\.json is not a manifest"):
        manifests.read(directory)


def test_any_changed_value_breaks_the_manifests_own_checksum(directory):
    path = directory / "manifest.json"
    original = json.loads(path.read_text())
    for key in original:
        changed = {**original, key: "x"}
        path.write_text(json.dumps(changed))
        with pytest.raises(DamagedError, match=r"manifest\.json does not match its own checksum"):
            manifests.read(directory)


def test_a_missing_file_and_a_wrong_size_are_found_without_reading_content(directory):
    (directory / "a").write_bytes(bytes(999))
    with pytest.raises(DamagedError, match="a has 999 bytes instead of 1000"):
        manifests.read(directory)
    (directory / "a").unlink()
    with pytest.raises(DamagedError, match="a is missing"):
        manifests.read(directory)


@pytest.mark.parametrize(("failures", "damaged"), [(2, None), (3, "Stale file handle")])
def test_a_read_that_fails_for_a_moment_is_no_damage(directory, monkeypatch, failures, damaged):
    answers = [OSError(errno.ESTALE, "Stale file handle")] * failures
    hash_file = manifests.storage.sha256_of_file

    def hash_or_fail(path):
        if path.name == "a" and answers:
            raise answers.pop()
        return hash_file(path)

    monkeypatch.setattr(manifests.storage, "sha256_of_file", hash_or_fail)
    monkeypatch.setattr(manifests, "READ_AGAIN_SECONDS", (0.0, 0.0))
    found = manifests.damage(directory, manifests.read(directory).files)
    assert found is None if damaged is None else damaged in found


def test_every_flipped_bit_is_found(directory):
    manifest = manifests.read(directory)
    for position in (0, 500, 999):
        content = bytearray(1000)
        content[position] ^= 1
        (directory / "a").write_bytes(content)
        assert manifests.read(directory).step == 7  # the size is right
        assert "a has changed since it was written" in manifests.damage(directory, manifest.files)


def test_identity_depends_on_names_and_shapes_only():
    one = ModuleEntry({"a": [1, 2], "b": [3]}, 5)
    assert one.identity == ModuleEntry({"b": [3], "a": [1, 2]}, 9, buffers=["x"]).identity
    assert one.identity != ModuleEntry({"a": [2, 1], "b": [3]}, 5).identity
    assert one.identity != ModuleEntry({"a": [1, 2], "c": [3]}, 5).identity


def _rewrite(directory, remove=(), **changes):
    """Write the manifest as another version or program would have done, with the right checksum."""
    path = directory / "manifest.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("checksum", *remove)}
    content |= changes
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({"checksum": checksum, **content}))


def test_an_older_format_is_read(directory):
    _rewrite(directory, remove=["frozen"], format=1)
    assert manifests.read(directory).frozen == {}


@pytest.mark.parametrize(
    "change", [{"format": "2"}, {"unknown": 1}, {"modules": []}, {"files": [{"name": "a"}]}, {"remove": ["format"]}]
)
def test_what_no_version_writes_is_damage(change, directory):
    _rewrite(directory, **change)
    with pytest.raises(DamagedError, match=r"manifest\.json is not a manifest"):
        manifests.read(directory)


def test_a_newer_format_is_not_taken_for_damage(directory):
    _rewrite(directory, format=manifests.FORMAT + 1, something=[])
    with pytest.raises(CheckpointError, match="written by a newer megavar"):
        manifests.read(directory)
    assert store.readable(directory) is None  # so it neither counts towards keep_last nor is deleted
