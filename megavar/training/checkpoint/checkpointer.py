"""Saving and loading a run: the protocol of notes/trainers.md §4.3 carried out by all ranks together.

Save: all ranks write and sync their shards into ``step-N.tmp-<attempt>/`` -> each hashes its own files and tells rank 0
-> rank 0 writes the manifest, renames the directory, points ``latest`` at it, deletes old checkpoints.
Load: rank 0 lists checkpoints, newest first -> all ranks together verify sizes and hashes -> the first whole one is
compared with the model, read and put in place. A damaged one is reported and the one before it is tried.
"""

import dataclasses
import importlib.metadata
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

import megavar
from megavar.config.checkpoint import CheckpointConfig
from megavar.errors import CheckpointError
from megavar.frozen import Identity, check_same, identities
from megavar.training.checkpoint import fault, shards, store
from megavar.training.checkpoint import manifest as manifests
from megavar.training.checkpoint.initial import InitialWeights, begin
from megavar.training.checkpoint.manifest import DamagedError, Manifest, ModuleEntry
from megavar.training.checkpoint.ranks import Ranks
from megavar.training.checkpoint.state import ModuleState, Restorer, describe, stage

_log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads the checkpoints of one run. All methods are collective.

    Args:
        root: directory of the checkpoints; rank 0 must hold the run's lock.
        config: what to keep, and whether to write in the background.
        layout: world size, parallel sizes and ZeRO stage, for people who read the manifest.
        provenance: git revision, hash of the configuration and the like, for the manifest.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        layout: dict[str, Any] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.root = Path(root)
        self.config = config
        self.layout = layout or {}
        self.provenance = {
            **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "megatron-core")},
            "megavar": megavar.__version__,
            **(provenance or {}),
        }
        self.frozen: dict[str, Identity] = {}
        """The frozen networks of the run, by name: written into every manifest, compared with the one loaded."""
        self.last_save_seconds: float | None = None
        """Wall time of the last committed save, for comparison with the lead time of a preemption signal."""
        self.last_stall_seconds: float | None = None
        """The part of it during which training stood still."""
        self._ranks = Ranks()
        self._writer: threading.Thread | None = None
        self._writer_error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def save(self, step: int, modules: dict[str, ModuleState], state: dict[str, Any]) -> None:
        """Save all ``modules`` and the trainer's ``state`` (JSON; rank 0's is written) as the checkpoint of ``step``.

        Returns when the checkpoint is in place, or, with ``asynchronous``, when everything is copied to host memory;
        a failure of a background save is raised by the next call.

        Raises:
            CheckpointAccessError: a rank could not write. No existing checkpoint was touched.
        """
        self.wait()
        began = time.monotonic()
        entries = {name: describe(module, self._ranks) for name, module in modules.items()}
        tensors: dict[str, Tensor] = {}
        for name, module in modules.items():
            tensors |= stage(name, module)
        provenance = {**self.provenance, "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        records = {name: identity.to_json() for name, identity in self.frozen.items()}
        manifest = Manifest(step, entries, state, self.layout, provenance, frozen=records)
        if not self.config.asynchronous:
            self._write(manifest, tensors, began)
            self.last_stall_seconds = time.monotonic() - began
            return

        def work() -> None:
            try:
                self._write(manifest, tensors, began)
            except BaseException as error:
                self._writer_error = error

        self._writer = threading.Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._writer.start()
        self.last_stall_seconds = time.monotonic() - began

    def wait(self) -> None:
        """Wait until the background save, if any, is in place.

        Raises:
            CheckpointAccessError: it failed.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        error, self._writer_error = self._writer_error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Finish the background save."""
        self.wait()

    def _write(self, manifest: Manifest, tensors: dict[str, Tensor], began: float) -> None:
        ranks, what = self._ranks, f"Saving {self.root / store.checkpoint_name(manifest.step)}"
        attempt: Path | None = None
        error: Exception | None = None
        if ranks.rank == 0:
            try:
                attempt = store.begin(self.root, manifest.step)
            except OSError as failure:
                error = failure
        ranks.agree(error, what)
        attempt = ranks.broadcast(attempt)
        assert attempt is not None
        try:
            files = self._write_shards(attempt, tensors, what)
            if ranks.rank == 0:
                try:
                    self._commit(attempt, manifest, files)
                except Exception as failure:  # a state that is not JSON, too: the others are waiting
                    error = failure
            ranks.agree(error, what)
        except CheckpointError:
            if ranks.rank == 0:
                store.discard(attempt)
            raise
        self.last_save_seconds = time.monotonic() - began

    def _write_shards(self, attempt: Path, tensors: dict[str, Tensor], what: str) -> tuple[manifests.FileEntry, ...]:
        """Write this rank's shards; return the files of all ranks."""
        ranks, error = self._ranks, None
        fault.point("before_shards", ranks.rank)
        files: list[manifests.FileEntry] = []
        try:
            files = [manifests.describe_file(attempt, name) for name in shards.write(attempt, tensors, ranks)]
        except Exception as failure:  # whatever a file system or DCP raises, perhaps on this rank only
            error = failure
        ranks.agree(error, what)
        fault.point("after_shards", ranks.rank)
        return tuple(sorted((entry for part in ranks.gather(files) for entry in part), key=lambda entry: entry.name))

    def _commit(self, attempt: Path, manifest: Manifest, files: tuple[manifests.FileEntry, ...]) -> None:
        fault.point("before_manifest", 0)
        manifests.write(attempt, dataclasses.replace(manifest, files=files))
        fault.point("before_rename", 0)
        final = store.commit(attempt)
        fault.point("before_latest", 0)
        store.point_latest(final)
        store.prune(self.root, self.config.keep_last, self.config.keep_every, protect=final)

    def load(
        self, modules: dict[str, ModuleState], fresh: bool = False, at_most: int | None = None
    ) -> dict[str, Any] | None:
        """Continue from the newest whole checkpoint, or start a new run if there never was one.

        Newer checkpoints than the one loaded are renamed (``.damaged-``, ``.abandoned-``), so that the run's own saves
        are the newest from now on.

        Args:
            modules: what to fill. Nothing is written into them unless everything could be read.
            fresh: move existing checkpoints away and start anew.
            at_most: consider no checkpoint of a later step (to go back to an earlier one).

        Returns:
            The ``state`` given to :meth:`save`, or None for a new run.

        Raises:
            CheckpointError: there are checkpoints but none is whole, or the newest whole one is of another model or
                version, or was made with other frozen networks.
            CheckpointAccessError: the newest whole one could not be read by every rank.
        """
        self.wait()
        candidates: list[Path] = []
        if self._ranks.rank == 0:
            candidates = self._candidates(fresh)
        candidates = self._ranks.broadcast(candidates)
        problems: list[str] = []
        aside: list[tuple[Path, str]] = []
        for path in candidates:
            if at_most is not None and store.step_of(path) > at_most:
                aside.append((path, "abandoned"))
                continue
            manifest = self._verify(path, problems)
            if manifest is None:
                aside.append((path, "damaged"))
                continue
            self._restore(path, manifest, modules)
            if self._ranks.rank == 0:
                for other, kind in aside:
                    store.set_aside(other, kind)
                if problems:
                    _log.warning("Continuing from step %d (%s) instead.", manifest.step, path)
            return manifest.state
        if candidates:
            raise CheckpointError(
                f"{self.root} holds {len(candidates)} checkpoint(s), but none can be used"
                f"{f' (of step {at_most} or earlier)' if at_most is not None else ''}: "
                f"{'; '.join(problems) or 'all are newer'}. Restore the files from a backup, or start anew with "
                f"train.fresh=true, which moves these directories away and deletes nothing."
            )
        return None

    def begin(self, name: str, state: ModuleState, initial: InitialWeights) -> None:
        """Put initial weights into module ``name`` of a new run; see ``megavar/training/checkpoint/initial.py``."""
        begin(name, state, initial, self._ranks)

    def _candidates(self, fresh: bool) -> list[Path]:
        if fresh:
            moved = store.move_away(self.root)
            if moved is not None:
                _log.warning("train.fresh: the checkpoints of an earlier run were moved to %s.", moved)
        store.clean(self.root)
        return store.list_checkpoints(self.root)

    def _verify(self, path: Path, problems: list[str]) -> Manifest | None:
        """The manifest of ``path`` if all its files are whole; else None, with the reason added to ``problems``."""
        manifest, problem, newer = None, None, None
        if self._ranks.rank == 0:
            try:
                manifest = manifests.read(path)
            except (DamagedError, OSError) as error:
                problem = str(error)
            except CheckpointError as error:
                newer = error
        manifest, problem, newer = self._ranks.broadcast((manifest, problem, newer))
        if newer is not None:
            raise newer
        if manifest is not None:  # every rank hashes its share of the files
            mine = manifest.files[self._ranks.rank :: self._ranks.size]
            problem = next((text for text in self._ranks.gather(manifests.damage(path, mine)) if text), None)
        if manifest is not None and problem is None:
            problem = self._ranks.broadcast(_index_problem(path) if self._ranks.rank == 0 else None)
        if problem is None:
            return manifest
        problems.append(problem)
        if self._ranks.rank == 0:
            _log.warning("CHECKPOINT DAMAGED: %s. Trying the one before it.", problem)
        return None

    def _restore(self, path: Path, manifest: Manifest, modules: dict[str, ModuleState]) -> None:
        entries = {name: describe(module, self._ranks) for name, module in modules.items()}
        difference = first_difference(manifest.modules, entries)
        if difference:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {difference}. Give the configuration it was trained with "
                f"(it is in the run directory, config.yaml), use another run directory, or start anew here with "
                f"train.fresh=true, which moves the old checkpoints away."
            )
        self._check_frozen(path, manifest)
        restorers, error = [], None
        try:
            for name, module in modules.items():
                restorers.append(Restorer(name, module, manifest.modules[name]))
            shards.read(path, {key: value for restorer in restorers for key, value in restorer.templates.items()})
        except Exception as failure:  # on this rank only: the others must not enter the collectives below
            error = failure
        self._ranks.agree(error, f"Reading {path}")
        for restorer in restorers:
            restorer.finish()

    def _check_frozen(self, path: Path, manifest: Manifest) -> None:
        """Refuse to train on with other frozen networks than those of the checkpoint."""
        remedy = "start anew in another run.directory, or here with train.fresh=true."
        check_same(identities(manifest.frozen), self.frozen, path, remedy)


def _index_problem(path: Path) -> str | None:
    """What is wrong with the index of a checkpoint whose files are those of its manifest."""
    try:
        shards.index(path)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def first_difference(stored: dict[str, ModuleEntry], wanted: dict[str, ModuleEntry], limit: int = 3) -> str | None:
    """In words, the first differences between the tensors of a checkpoint and of a model; None if there are none."""
    texts = []
    for name in sorted(set(stored) ^ set(wanted)):
        there, here = ("a", "none") if name in stored else ("no", "one")
        texts.append(f"it has {there} module {name!r}, this run has {here}")
    for name in sorted(set(stored) & set(wanted)):
        old, new = stored[name].tensors, wanted[name].tensors
        for tensor in sorted(set(old) | set(new)):
            if old.get(tensor) != new.get(tensor):
                there = f"shape {old[tensor]}" if tensor in old else "missing"
                here = f"shape {new[tensor]}" if tensor in new else "missing"
                texts.append(f"{name}/{tensor} is {there} in the checkpoint and {here} in this model")
        for buffer in sorted(set(stored[name].buffers) ^ set(wanted[name].buffers)):
            owner = "the checkpoint" if buffer in stored[name].buffers else "this model"
            texts.append(f"only {owner} has a buffer {name}/{buffer}")
    if not texts:
        return None
    more = f", and {len(texts) - limit} more differences" if len(texts) > limit else ""
    return "; ".join(texts[:limit]) + more
