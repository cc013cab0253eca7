"""The run directory: everything a run was made of and everything it produced, in one place.

``config.yaml``      the resolved configuration
``data.json``        the data: samples and fingerprint
``weights.json``     the frozen networks that the run uses, and the weights that it began with: path and hash of each
``deepspeed.json``   what DeepSpeed was given, per module
``code.patch``       uncommitted changes of the checkout at the first start
``attempts.jsonl``   one line per start: time, commit, versions, hosts, devices, layout, environment
``ledger.jsonl``     one line per orderly end of an attempt: outcome, steps, device hours, seconds by state
``metrics.jsonl``    the primary record of the run; lines with ``event`` hold validation losses, alerts, rollbacks
``console.log``      what the first rank showed
``routing/``         load of every expert by block and kind of token, and a picture of the newest
``logs/``            one file per rank
``samples/``         previews
``checkpoints/``     see ``megavar/training/checkpoint/store.py``
``wandb_id``         the W&B run to continue
``DONE``             written last: the run has reached and saved its last step
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megavar import frozen, storage
from megavar.config.loading import with_defaults
from megavar.config.root import Config
from megavar.errors import CheckpointError, ConfigError
from megavar.frozen import Identity
from megavar.training.checkpoint.lock import RunLock
from megavar.training.provenance import git, now, of_this_start

_log = logging.getLogger(__name__)

# What may differ when a run continues: it does not change what is trained. Prefixes of dotted keys. Data may move: that
# they are the same is checked by their fingerprint. Frozen weights may move, too: see RunDirectory.check.
CHANGEABLE = (
    "run.", "logging.", "sampling.", "evaluation.", "parallel.", "deepspeed", "data.workers", "data.prefetch",
    "data.damaged_samples", "data.source.path", "data.source.test_path", "data.source.url", "data.source.images.path",
    "train.micro_batch_size", "train.checkpoint.", "train.recovery.", "train.watchdog.", "train.fresh",
    "train.cpu_threads", "train.agreement_interval", "train.garbage_collection_interval", "validation.",
)  # fmt: skip
INITIAL = "initial"
"""Stands for the initial weights among the names of frozen networks in ``weights.json``."""


def decides(key: str) -> bool:
    """Whether the value of a dotted key decides what is trained."""
    return not f"{key}.".startswith(CHANGEABLE)


class RunDirectory:
    """Paths and marks of a run. Methods that write are for rank 0."""

    def __init__(
        self,
        path: Path | str,
        weights: Mapping[str, str] | None = None,
        initial: str | None = None,
        complete: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda tree: tree,
    ) -> None:
        """Name a run's directory; nothing is read or written yet.

        Args:
            weights: path of every frozen network that the run uses, by name.
            initial: path of the weights with which it begins, if not with random ones.
            complete: gives a stored configuration the keys that it lacks because an older version wrote it.
        """
        self.path = Path(path)
        self.weights = dict(weights or {})
        self.initial = initial
        self._complete = complete
        self._lock: RunLock | None = None
        self._known = False
        """Whether this run had begun when it was opened."""

    @classmethod
    def of(cls, config: Config, path: Path | None = None) -> "RunDirectory":
        """The directory of the run that ``config`` describes; ``path`` where it has been resolved."""
        path = path or Path(config.run.path)
        initial = config.train.initial_weights
        return cls(
            path,
            config.frozen_weights,
            initial.path if initial is not None else None,
            lambda tree: with_defaults(tree, str(path / "config.yaml")),
        )

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Previews."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints."""
        return self.path / "checkpoints"

    @property
    def done(self) -> bool:
        """Whether the run has reached and saved its last step."""
        return (self.path / "DONE").exists()

    def open(
        self,
        config: Mapping[str, Any],
        layout: Mapping[str, Any],
        deepspeed: Mapping[str, Any],
        fresh: bool = False,
        devices: Sequence[Mapping[str, Any]] = (),
        total_steps: int | None = None,
    ) -> dict[str, Identity]:
        """Create the directory, or check that it belongs to this run, and record this start.

        Args:
            config: the resolved configuration as plain values.
            layout: world size and parallel sizes, for the record.
            deepspeed: DeepSpeed's JSON by module.
            fresh: start the run anew although it is finished.
            devices: what it runs on, for the record: ``host``, ``name`` and ``count`` of each kind.
            total_steps: of the whole run, for the record.

        Returns:
            What the frozen networks are, by name, for :meth:`note_weights`; nothing for a finished run.

        Raises:
            ConfigError: the directory belongs to another run.
            CheckpointError: frozen weights are gone, or others than those that the run began with.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "logs").mkdir(exist_ok=True)
        for folder in (self.path, self.samples, self.checkpoints):
            storage.remove_leftovers(folder)
        known = self._known = self.config.exists() and self.begun
        if known:
            self.check(config, fresh)
            if self.done and not fresh:
                return {}
        identities = {name: frozen.identify(path) for name, path in self.weights.items()}
        if not fresh and known:
            self._check_weights(identities)
        if known:
            (self.path / "DONE").unlink(missing_ok=True)
        else:
            patch = git("diff", "HEAD", "--binary")
            if patch:
                storage.write_text_atomic(self.path / "code.patch", patch)
        storage.write_text_atomic(self.config, yaml.safe_dump(dict(config), sort_keys=False, width=120))
        storage.write_json_atomic(self.path / "deepspeed.json", dict(deepspeed))
        start = of_this_start() | {
            "time": round(time.time(), 3),
            "device": devices[0]["name"] if devices else None,
            "devices": [dict(device) for device in devices],
            "total_steps": total_steps,
            "layout": dict(layout),
        }
        storage.append_line(self.path / "attempts.jsonl", json.dumps(start))
        return identities

    def check(self, config: Mapping[str, Any], fresh: bool = False) -> None:
        """Compare with the configuration that the directory was created with.

        A key that the stored configuration lacks counts as its default. The path of frozen weights may differ if the
        weights are the same.

        Args:
            config: the resolved configuration as plain values.
            fresh: the run starts anew, so its frozen weights may be others.

        Raises:
            ConfigError: a key differs that decides what is trained.
            CheckpointError: a path differs, and it holds other weights.
        """
        tree = self._stored_config()
        if foreign := sorted(set(map(str, tree.get("plugins") or ())) - set(config.get("plugins") or ())):
            raise ConfigError(
                f"{self.path} belongs to a run with another configuration: its plugins are {foreign[0]!r} there and "
                f"not here, and a run directory is no reason to run code. Name them here if they are yours."
            )
        stored = _flatten(self._complete(tree))
        given = _flatten(json.loads(json.dumps(config)))
        differing = sorted(
            key for key in stored.keys() | given.keys()
            if stored.get(key) != given.get(key) and decides(key)
        )  # fmt: skip
        differing = [
            key for key in differing
            if not _same_place(stored.get(key), given.get(key))
            and not self._has_moved(stored.get(key), given.get(key), fresh)
        ]  # fmt: skip
        if differing:
            listed = "; ".join(f"{key} is {stored.get(key)!r} there and {given.get(key)!r} here" for key in differing)
            raise ConfigError(
                f"{self.path} belongs to a run with another configuration: {listed}. Restore them to continue it, use "
                f"another run.directory, or go on from its checkpoint: megavar fork {self.path} NEW {differing[0]}=..."
            )

    @property
    def begun(self) -> bool:
        """Whether something was trained here, or another process may be about to: then no other configuration fits."""
        held = self._lock is None and RunLock.in_use(self.path)
        trained = self.metrics.exists() and self.metrics.stat().st_size > 0
        return held or trained or self.done or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def _stored_config(self) -> dict[str, Any]:
        """The configuration that the directory was created with.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            tree = yaml.safe_load(self.config.read_text())
            if isinstance(tree, dict):
                return tree
            problem = "it holds no keys"
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            problem = " ".join(str(error).split())
        raise ConfigError(
            f"{self.config} is damaged ({problem}), so nothing says whether this run is the one that began there. "
            f"Restore it from a backup; or remove it, and the next start takes its own configuration for the run's."
        )

    def _has_moved(self, before: Any, now: Any, fresh: bool) -> bool:
        """Whether these values of a key are two places of the same frozen weights.

        Raises:
            CheckpointError: there are other weights in the new place.
        """
        known = self.weights | ({} if self.initial is None else {INITIAL: self.initial})
        recorded, records = self._recorded_weights(), self._weight_records()
        for name, path in known.items():
            if path != now or not isinstance(before, str) or records.get(name, {}).get("path", before) != before:
                continue
            if fresh:
                return True
            if name not in recorded:  # an older version began the run
                if not Path(before).exists():
                    continue
                recorded[name] = frozen.identify(before)
            self._check_weights({name: frozen.identify(now)}, recorded)
            return True
        return False

    def _check_weights(self, now: Mapping[str, Identity], before: Mapping[str, Identity] | None = None) -> None:
        before = self._recorded_weights() if before is None else before
        frozen.check_same(before, now, self.path, "start anew in another run.directory, or here with train.fresh=true.")

    @property
    def _weights_file(self) -> Path:
        return self.path / "weights.json"

    def _recorded_weights(self) -> dict[str, Identity]:
        """What the frozen networks were at the last start; nothing if an older version wrote the directory."""
        try:
            return frozen.identities(self._weight_records())
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"{self._weights_file} cannot be read ({error}). Restore it from a backup; removed, the next start "
                f"takes the weights that it finds for those of the run."
            ) from None

    def _weight_records(self) -> dict[str, dict[str, str]]:
        return json.loads(self._weights_file.read_text()) if self._weights_file.exists() else {}

    def identify_initial(self, fresh: bool = False) -> Identity:
        """What the initial weights are, when they are about to be read.

        Raises:
            CheckpointError: they are gone, or others than those with which the run began before (unless ``fresh``).
        """
        assert self.initial is not None
        identity = frozen.identify(self.initial)
        if not fresh and self._known:  # a start that trained nothing is no beginning
            self._check_weights({INITIAL: identity})
        return identity

    def note_weights(
        self, identities: Mapping[str, Identity], initial: Identity | None, begins: bool
    ) -> Identity | None:
        """Remember the frozen networks, once a checkpoint did not speak against them, and the initial weights.

        Args:
            begins: whether the run begins now, with ``initial``; else it continues, and what it began with is kept.

        Returns:
            The weights with which the run began, if not with random ones.
        """
        if not begins:
            initial = self._recorded_weights().get(INITIAL)
        record = {name: {"path": self.weights[name]} | identity.to_json() for name, identity in identities.items()}
        if initial is not None:
            record[INITIAL] = {"path": str(self.initial)} | initial.to_json()
        storage.write_json_atomic(self._weights_file, record)
        return initial

    def note_fresh_start(self) -> None:
        """``train.fresh`` is done: whoever starts the kept configuration from now on continues the run."""
        config = self._stored_config()
        config["train"]["fresh"] = False
        storage.write_text_atomic(self.config, yaml.safe_dump(config, sort_keys=False, width=120))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the DONE mark, after everything else."""
        storage.write_json_atomic(self.path / "DONE", {"finished_at": now(), **summary})

    def acquire(self) -> None:
        """Hold the run, so that a second start of it is refused, until :meth:`release` or the end of the process.

        Raises:
            RunInUseError: another process holds it.
        """
        self._lock = RunLock.acquire(self.path)

    def check_held(self) -> None:
        """Call before writing checkpoints.

        Raises:
            ClusterError: the run was suspended for so long that another start took it over.
        """
        if self._lock is not None:
            self._lock.check()

    def release(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _same_place(before: Any, now: Any) -> bool:
    """Whether two values are one path, relative and in full: earlier versions stored paths as they were written."""
    return isinstance(before, str) and isinstance(now, str) and Path(before).absolute() == Path(now).absolute()


def identity_of(config: Config) -> str:
    """Hash of all that decides what a run trains, wherever its data and frozen weights lie: 64 hexadecimal digits.

    Configurations with the same hash describe the same training, as far as files of weights with the same name are the
    same; their bytes are in ``weights.json``.
    """
    places = set(config.frozen_weights.values())
    values = {
        key: Path(value).name if isinstance(value, str) and value in places else value
        for key, value in _flatten(json.loads(config.model_dump_json())).items()
        if decides(key)
    }  # fmt: skip
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key. A list of sections is counted through, a list of values is one value."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        return {name: leaf for key, value in tree.items() for name, leaf in _flatten(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}

