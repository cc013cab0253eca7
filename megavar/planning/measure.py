"""What models cost, measured on the real ones: one rank runs a generator's embedding, each kind of block and head.

The tensors have shapes but no memory, and the other ranks do not exist, so it takes seconds whatever the size. See
:mod:`megavar.planning.fake_run`, which does it in a process of its own.
"""

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

from megavar.config.generators.base import GeneratorChoice
from megavar.config.procedures.base import SamplingChoice
from megavar.config.teachers.base import TeacherChoice
from megavar.config.terms.base import TermChoice
from megavar.config.token_space import TokenSpace
from megavar.config.tokenizers.base import TokenizerChoice
from megavar.errors import ConfigError
from megavar.planning.cost import Cost, TokenizerCost

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16"]

_MEASURED: dict[str, Cost] = {}
_DRAWN: dict[str, float | None] = {}
_TOKENIZERS: dict[str, TokenizerCost] = {}


class UnmeasurableError(ConfigError):
    """A model cannot be run without values."""


@dataclass(frozen=True)
class Request:
    """A rank to measure. Pipeline stages, expert-parallel and data-parallel sizes follow from it by arithmetic."""

    choice: GeneratorChoice
    space: TokenSpace
    tensor: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    terms: tuple[TermChoice, ...] = ()
    """Losses whose heads are measured with the generator's own."""

    @cached_property
    def key(self) -> str:
        """Equal for equal requests."""
        kind = type(self.choice)
        terms = [f"{type(term).__module__} {term.model_dump_json()}" for term in self.terms]
        layout = (self.tensor, self.sequence, self.recompute, self.precision, terms)
        return f"{kind.__module__}:{kind.__qualname__} {self.choice.model_dump_json()} {self.space} {layout}"

    def with_recompute(self, recompute: Recompute) -> "Request":
        """The same with another way of recomputation."""
        return replace(self, recompute=recompute)


@dataclass(frozen=True)
class DrawRequest:
    """The drawing of an image, to measure."""

    choice: GeneratorChoice
    tokenizer: TokenizerChoice
    sampling: SamplingChoice

    @cached_property
    def key(self) -> str:
        """Equal for equal requests."""
        parts = (self.choice, self.tokenizer, self.sampling)
        return " ".join(f"{type(part).__module__}:{part.model_dump_json()}" for part in parts)


class _Laboratory:
    """The process in which requests are measured, from the first one to :meth:`close` or the end of this process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._owner = 0

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # a fork must not talk to the process of its parent
            self._process = self._complaints = None
            self._owner = os.getpid()
        if self._process is None:
            self._process = self._start()
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),  # plugins, too
        }
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        return subprocess.Popen(
            [sys.executable, "-m", "megavar.planning.fake_run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._complaints, env=os.environ | settings,
        )  # fmt: skip

    def answer(self, request: Request | DrawRequest | TokenizerChoice | TeacherChoice) -> Any:
        """The :class:`Cost` of a rank, the operations of a drawn image, or the :class:`TokenizerCost`."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(pickle.dumps(request), process.stdin)  # twice: one that cannot be read leaves the next readable
            process.stdin.flush()
            kind, value = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            kind, value = "died", ("the process that measures has died", self._last_words())
        if kind == "measured":
            return value
        reason, where = value
        raise UnmeasurableError(
            f"The costs of {_name_of(request)} cannot be measured with tensors that have no values: {reason}."
        ) from RuntimeError(where)

    def _last_words(self) -> str:
        assert self._complaints is not None
        self._complaints.seek(0)
        words = self._complaints.read().decode(errors="replace")
        self.close()
        return words

    def close(self) -> None:
        """End the process; it starts again when it is needed."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            assert process.stdin is not None and process.stdout is not None
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            assert self._complaints is not None
            self._complaints.close()


_LABORATORY = _Laboratory()
atexit.register(_LABORATORY.close)


def _name_of(request: Request | DrawRequest | TokenizerChoice | TeacherChoice) -> str:
    if isinstance(request, Request):
        return f"generator.name={request.choice.name}"
    if isinstance(request, DrawRequest):
        return f"sampling.procedure={request.sampling.procedure}"
    return f"{'teacher' if isinstance(request, TeacherChoice) else 'tokenizer'}.name={request.name}"


def measure(requests: Iterable[Request], progress: Callable[[int, int], None] | None = None) -> list[Cost]:
    """Costs of all requests, in their order. Each is measured once per process.

    Args:
        progress: called with the number of those that are measured and of all that must be.

    Raises:
        UnmeasurableError: a generator's code needs values.
    """
    wanted = list(requests)
    missing = list({request.key: request for request in wanted if request.key not in _MEASURED}.values())
    for number, request in enumerate(missing):
        if progress is not None:
            progress(number, len(missing))
        _MEASURED[request.key] = _LABORATORY.answer(request)
    if missing and progress is not None:
        progress(len(missing), len(missing))
    return [_MEASURED[request.key] for request in wanted]


def drawing_flops(request: DrawRequest) -> float | None:
    """Operations of one drawn image, without the tokenizer; None where the procedure needs values."""
    if request.key not in _DRAWN:
        try:
            _DRAWN[request.key] = _LABORATORY.answer(request)
        except UnmeasurableError:
            _DRAWN[request.key] = None
    return _DRAWN[request.key]


def tokenizer_cost(choice: TokenizerChoice | TeacherChoice) -> TokenizerCost:
    """Costs of a tokenizer, or of a teacher, which only encodes.

    Raises:
        UnmeasurableError: its code needs values.
    """
    key = f"{type(choice).__module__}:{choice.model_dump_json()}"
    if key not in _TOKENIZERS:
        _TOKENIZERS[key] = _LABORATORY.answer(choice)
    return _TOKENIZERS[key]


def release() -> None:
    """End the process that measures, where nothing more is to be measured soon (before a long training)."""
    _LABORATORY.close()
