"""What a run says about itself: ``metrics.jsonl``, the progress bar, W&B, sample grids. Output on rank 0 only."""

import json
import logging
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from megavar import storage
from megavar.config.logging import LoggingConfig
from megavar.training.console import Console
from megavar.training.run_directory import RunDirectory
from megavar.wording import duration

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)


class MetricsFile:
    """Appends one JSON object per line; a line is on disk whole or, after a crash, cut off and dropped at resume."""

    def __init__(self, path: Path, step: int) -> None:
        """Continue ``path`` after ``step``: later lines, of a crashed attempt, move to ``metrics.discarded.jsonl``."""
        self.path = path
        storage.drop_link(path)
        if path.exists():
            self._keep_until(step)
        self._file = storage.open_to_append(path)
        self._waiting = bytearray()
        self._writing = threading.Lock()

    def _keep_until(self, step: int) -> None:
        kept: list[bytes] = []
        discarded: list[bytes] = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                later = not line.endswith(b"\n") or json.loads(line)["step"] > step
            except (ValueError, KeyError):
                later = True
            (discarded if later else kept).append(line)
        if discarded:
            with storage.open_to_append(self.path.parent / "metrics.discarded.jsonl") as file:
                file.write(b"".join(discarded).rstrip(b"\n") + b"\n")
            storage.write_bytes_atomic(self.path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. A full disk ends no run: the line waits in memory, and goes out with a later one."""
        with self._writing:
            self._waiting += json.dumps(record).encode() + b"\n"
            try:
                while self._waiting:
                    del self._waiting[: self._file.write(self._waiting)]
            except OSError as error:
                _log.warning("%s cannot be written: %s. Its newest lines are kept in memory.", self.path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Stopwatch:
    """Where the wall time went: since the last log line, and since the start of the process."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.inside: str | None = None
        """The part that the trainer is in now; None: training."""
        self.totals: dict[str, float] = {}
        """Seconds of each part since the start."""
        self._steps: list[float] = []
        self._parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to the part ``name``."""
        began, self.inside = time.monotonic(), name
        try:
            yield
        finally:
            self.inside, seconds = None, time.monotonic() - began
            self._parts[name] = self._parts.get(name, 0.0) + seconds
            self.totals[name] = self.totals.get(name, 0.0) + seconds

    def step_done(self) -> None:
        """A step is complete; what happens until the next :meth:`step_begins` is not part of a step."""
        self._steps.append(time.monotonic() - self._last)

    def step_begins(self) -> None:
        """A step begins."""
        self._last = time.monotonic()

    def read(self, images_per_step: int) -> dict[str, float]:
        """Speed and shares since the last call."""
        if not self._steps:
            return {}
        steps, parts = self._steps, self._parts
        self._steps, self._parts = [], {}
        ordered, total = sorted(steps), sum(steps)
        record = {
            "images_per_second": images_per_step * len(steps) / total,
            "step_seconds": statistics.median(ordered),
            "step_seconds_p95": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
            "step_seconds_max": ordered[-1],
            "data_wait_share": parts.pop("data", 0.0) / total,
        }
        return record | {f"{name}_seconds": seconds for name, seconds in parts.items()}


class Monitor:
    """Everything a person sees of a run while it trains."""

    def __init__(self, config: LoggingConfig, directory: RunDirectory, name: str, rank: int, total_steps: int) -> None:
        self.config, self.directory, self.name, self.total_steps = config, directory, name, total_steps
        self.is_writer = rank == 0
        self.console = Console(directory.path, self.is_writer)
        self._metrics: MetricsFile | None = None
        self._bar: tqdm | None = None
        self._wandb: Any = None
        self._last_line = float("-inf")
        self._started, self._first_step = time.monotonic(), 0
        self._step, self._latest, self._held_out = 0, "", ""

    def open(self, step: int, config: dict[str, Any]) -> None:
        """Begin after ``step`` steps; ``config`` is shown in W&B. Also called after a rollback."""
        self._started, self._first_step, self._step = time.monotonic(), step, step
        if not self.is_writer:
            return
        if self._metrics is not None:
            self._metrics.close()
        self._metrics = MetricsFile(self.directory.metrics, step)
        bar = self.config.progress == "bar" or (self.config.progress == "auto" and sys.stderr.isatty())
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()
        elif bar:
            self._bar = tqdm(total=self.total_steps, initial=step, unit="step", desc=self.name, dynamic_ncols=True,
                             mininterval=0.5)  # fmt: skip
        if self._wandb is None and self.config.wandb.mode != "disabled":
            self._wandb = self._open_wandb(config)

    def _open_wandb(self, config: dict[str, Any]) -> Any:
        try:
            import wandb
        except ImportError:
            _log.warning("wandb is not installed; metrics go to %s only.", self.directory.metrics)
            return None
        place = self.directory.path / "wandb_id"
        settings = self.config.wandb
        try:
            identity = (place.read_text().strip() if place.exists() else "") or secrets.token_hex(4)
            storage.write_text_atomic(place, identity + "\n")
            return wandb.init(
                project=settings.project, entity=settings.entity, name=self.name, id=identity, resume="allow",
                mode=settings.mode, dir=str(self.directory.path), config=config, reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Exception as error:  # no network, no login, a service that hangs: never a reason not to train
            _log.warning("W&B does not start (%s); metrics go to %s only.", error, self.directory.metrics)
            return None

    def advance(self, step: int) -> None:
        """A step is complete."""
        self._step = step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        now = time.monotonic()
        if self.is_writer and self._latest and (
            now - self._last_line >= self.config.lines_seconds or step == self.total_steps
        ):
            self._last_line = now
            line = (f"{time.strftime('%H:%M:%S')}  {self.name}  step {step}/{self.total_steps}  {self._latest}  "
                    f"{self._held_out}{duration(self.seconds_left())} left")  # fmt: skip
            shown = self._bar is None and self.config.progress in ("auto", "lines")
            self.console.say(line) if shown else self.console.keep(line)

    def seconds_left(self) -> float:
        """Time to the last step at the pace since this start."""
        done = self._step - self._first_step
        pace = (time.monotonic() - self._started) / done if done else 0.0
        return pace * (self.total_steps - self._step)

    def log(self, record: dict[str, Any]) -> None:
        """Write one line of metrics; it must hold ``step``."""
        if not self.is_writer:
            return
        assert self._metrics is not None
        record = {"time": round(time.time(), 3)} | record
        self._metrics.write(record)
        self._latest = progress(record)
        if self._bar is not None:
            self._bar.set_postfix_str(self._latest, refresh=False)
        self.log_to_wandb(record["step"], {k: v for k, v in record.items() if k not in ("step", "time")})

    def log_to_wandb(self, step: int, values: dict[str, Any], picture: "Image.Image | None" = None) -> None:
        """Send values, or a picture of samples, to W&B, if it is there."""
        if self._wandb is None:
            return
        try:
            if picture is not None:  # its copy is a file of W&B's own
                import wandb

                values = {"samples": wandb.Image(picture)}
            self._wandb.log(values, step=step)
        except Exception as error:  # its service is a process of its own, and SIGTERM reaches all processes of a job
            _log.warning("W&B is lost (%s); metrics go to %s only.", error, self.directory.metrics)
            self._wandb = None

    def event(self, step: int, event: str, **facts: Any) -> None:
        """Record something that is not a regular metric (a rollback, a spike, a validation)."""
        if event == "validation" and "loss" in facts:
            self._held_out = f"held out {facts['loss']:.3f}  "
        if self.is_writer and self._metrics is not None:
            self._metrics.write({"time": round(time.time(), 3), "step": step, "event": event, **facts})

    def save_picture(self, step: int, picture: "Image.Image") -> None:
        """Write ``samples/step-<step>.png``. A picture that cannot be written ends no run."""
        if not self.is_writer:
            return
        path = self.directory.samples / f"step-{step:08d}.png"
        try:
            with storage.atomic_file(path) as file:
                picture.save(file, format="PNG")
        except OSError as error:
            _log.warning("The preview %s cannot be written: %s", path, error)
        if self._wandb is not None:
            self.log_to_wandb(step, {}, picture)

    def close(self) -> None:
        """Finish all outputs."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # a report that cannot be closed must not fail a finished run
                _log.warning("W&B could not finish its run (%s); %s is complete.", error, self.directory.metrics)
            self._wandb = None


def progress(record: dict[str, Any]) -> str:
    """Loss, accuracy, load of the experts and speed in a line.

    ``experts 0.9-1.2x``: the least and the most tokens that an expert of a block gets, relative to its fair share.
    """
    parts = [f"loss {record['loss']:.3f}"] if "loss" in record else []
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:.1%}")
    if (load := expert_load(record)) is not None:
        parts.append(f"experts {load[0]:.1f}-{load[1]:.1f}x")
    if "images_per_second" in record:
        parts.append(f"{record['images_per_second']:.4g} images/s")
    return "  ".join(parts)


def expert_load(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """Least and largest load of an expert in a block, relative to the fair share; None of a dense model."""
    ends = [record.get(f"expert_share/{end}_in_a_layer") for end in ("smallest", "largest")]
    if ends[0] is None or ends[1] is None:
        return None
    experts = sum(name.startswith("expert_share/") for name in record) - len(ends)
    return ends[0] * experts, ends[1] * experts
