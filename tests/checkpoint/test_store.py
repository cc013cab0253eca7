import pytest

from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint import store
from megavar.training.checkpoint.manifest import Manifest


def write_attempt(root, step, text="content"):
    attempt = store.begin(root, step)
    (attempt / "shard").write_text(text)
    manifests.write(attempt, Manifest(step, {}, {}, files=(manifests.describe_file(attempt, "shard"),)))
    return attempt


def save(root, step, text="content"):
    final = store.commit(write_attempt(root, step, text))
    store.point_latest(final)
    return final


def names(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_checkpoint_appears_under_its_name_only_when_committed(tmp_path):
    attempt = write_attempt(tmp_path, 12)
    assert store.list_checkpoints(tmp_path) == []
    final = store.commit(attempt)
    assert final.name == "step-00000012"
    assert store.list_checkpoints(tmp_path) == [final]
    store.point_latest(final)
    assert (tmp_path / "latest").read_text() == "step-00000012\n"


def test_newest_first_by_number_not_by_spelling(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    assert [store.step_of(path) for path in store.list_checkpoints(tmp_path)] == [100_000_000, 99_999_999, 5]


def test_two_attempts_at_one_step_do_not_meet(tmp_path):
    assert store.begin(tmp_path, 3) != store.begin(tmp_path, 3)


def test_saving_a_step_again_replaces_the_old_checkpoint(tmp_path):
    save(tmp_path, 3, "old")
    final = save(tmp_path, 3, "new")
    assert (final / "shard").read_text() == "new"
    assert names(tmp_path) == ["step-00000003"]


def test_death_between_the_renames_of_a_replacement_loses_nothing(tmp_path):
    final = save(tmp_path, 3, "old")
    final.rename(tmp_path / "step-00000003.replaced-ab12")
    write_attempt(tmp_path, 3, "new")
    store.clean(tmp_path)
    assert names(tmp_path) == ["step-00000003"]
    assert (final / "shard").read_text() == "old"


def test_leftovers_are_removed_and_checkpoints_are_not(tmp_path):
    save(tmp_path, 3)
    write_attempt(tmp_path, 4)
    (tmp_path / "step-00000001.deleting-aa").mkdir()
    save(tmp_path, 5).rename(tmp_path / "step-00000003.replaced-bb")
    (tmp_path / "step-00000009.tmp-of a person").mkdir()
    store.set_aside(save(tmp_path, 6), "damaged")
    store.clean(tmp_path)
    remaining = names(tmp_path)
    assert remaining[:1] == ["step-00000003"]
    assert remaining[1].startswith("step-00000006.damaged-")
    assert remaining[2:] == ["step-00000009.tmp-of a person"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (1, 0, [60]),
        (3, 0, [40, 50, 60]),
        (1, 30, [30, 60]),
        (2, 20, [20, 40, 50, 60]),
        (9, 0, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention(tmp_path, keep_last, keep_every, kept):
    for step in range(10, 70, 10):
        final = save(tmp_path, step)
    store.prune(tmp_path, keep_last, keep_every, protect=final)
    assert [store.step_of(path) for path in reversed(store.list_checkpoints(tmp_path))] == kept


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path):
    finals = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    (finals[2] / "shard").unlink()
    store.prune(tmp_path, 2, 0, protect=finals[3])
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_nothing_is_deleted_if_the_new_checkpoint_cannot_be_read_back(tmp_path):
    finals = [save(tmp_path, step) for step in (1, 2, 3)]
    (finals[2] / "manifest.json").write_text("{}")
    assert store.prune(tmp_path, 1, 0, protect=finals[2]) == []
    assert len(names(tmp_path)) == 3


def test_newer_checkpoints_are_left_alone(tmp_path):
    finals = [save(tmp_path, step) for step in (1, 2, 3)]
    store.prune(tmp_path, 1, 0, protect=finals[1])
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_the_manifest_goes_first(tmp_path, monkeypatch):
    """A deletion that is interrupted leaves nothing that looks like a checkpoint."""
    finals = [save(tmp_path, step) for step in (1, 2)]
    monkeypatch.setattr(store.storage, "remove", lambda path: None)  # dies here
    store.prune(tmp_path, 1, 0, protect=finals[1])
    (doomed,) = (path for path in tmp_path.iterdir() if ".deleting-" in path.name)
    assert [path.name for path in doomed.iterdir()] == ["shard"]
    monkeypatch.undo()
    store.clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_a_deletion_that_is_interrupted_at_once_is_finished_later(tmp_path, monkeypatch):
    finals = [save(tmp_path, step) for step in (1, 2)]

    def die(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.storage, "fsync_directory", die)  # after the first thing that a deletion does
    with pytest.raises(KeyboardInterrupt):
        store.prune(tmp_path, 1, 0, protect=finals[1])
    monkeypatch.undo()
    store.clean(tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def link_to_another_run(tmp_path, name):
    """A link called ``name`` to the checkpoint of another run, which must survive."""
    other = save(tmp_path / "other", 7)
    root = tmp_path / "own"
    root.mkdir(exist_ok=True)
    (root / name).symlink_to(other, target_is_directory=True)
    return root, other


@pytest.mark.parametrize("kind", ["tmp", "deleting", "replaced", "damaged", "abandoned"])
def test_cleaning_and_pruning_unlink_links(tmp_path, kind):
    root, other = link_to_another_run(tmp_path, f"step-00000007.{kind}-ab12")
    newest = save(root, 7 if kind == "replaced" else 8)
    store.clean(root)
    store.prune(root, 1, 0, protect=newest)
    assert names(root) == [newest.name]
    assert store.readable(other) is not None


def test_pruning_a_linked_checkpoint_leaves_that_of_the_other_run(tmp_path):
    root, other = link_to_another_run(tmp_path, "step-00000007")
    store.prune(root, 1, 0, protect=save(root, 8))
    assert names(root) == ["step-00000008"]
    assert store.readable(other) is not None


def test_discarding_unlinks_a_link(tmp_path):
    root, other = link_to_another_run(tmp_path, "step-00000007.tmp-ab12")
    store.discard(root / "step-00000007.tmp-ab12")
    assert list(root.iterdir()) == [] and store.readable(other) is not None


@pytest.mark.parametrize("dangling", [False, True])
def test_a_commit_replaces_a_link(tmp_path, dangling):
    root, other = link_to_another_run(tmp_path, "step-00000007")
    if dangling:
        other = other.rename(other.with_name("step-00000007.damaged-1"))
    final = save(root, 7, "new")
    assert not final.is_symlink() and (final / "shard").read_text() == "new" and names(root) == [final.name]
    assert (other / "shard").read_text() == "content"


def test_set_aside_checkpoints_go_once_the_run_has_caught_up(tmp_path):
    store.set_aside(save(tmp_path, 5), "abandoned")
    store.prune(tmp_path, 2, 0, protect=save(tmp_path, 4))
    assert len(names(tmp_path)) == 2
    store.prune(tmp_path, 2, 0, protect=save(tmp_path, 6))
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


def test_a_fresh_start_moves_checkpoints_away_whole(tmp_path):
    root = tmp_path / "checkpoints"
    assert store.move_away(root) is None
    save(root, 5)
    moved = store.move_away(root)
    assert not root.exists()
    assert store.readable(moved / "step-00000005").step == 5
