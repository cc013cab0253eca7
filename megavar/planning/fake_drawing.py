"""The drawing of an image with tensors that have no values."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megavar.conditions import Condition
from megavar.config.choice import resolve
from megavar.data.text import Text
from megavar.planning.fake_model import (
    BLOCK,
    EMBEDDING,
    EXPERTS,
    HEAD,
    Observation,
    build,
    follow,
    kinds_of_blocks,
    spread_experts,
    tensors_in,
)
from megavar.planning.ledger import Ledger
from megavar.planning.measure import DrawRequest, Request
from megavar.sampling.noise import Noise


class _Apart:
    """A tokenizer whose work does not count."""

    def __init__(self, tokenizer: Any, ledger: Ledger) -> None:
        self._tokenizer, self._ledger = tokenizer, ledger

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tokenizer, name)
        if not callable(value):
            return value

        def uncounted(*arguments: Any, **options: Any) -> Any:
            account = self._ledger.account
            self._ledger.enter("tokenizer")
            result = value(*arguments, **options)
            self._ledger.enter(account)
            return result

        return uncounted


def _without_statistics(step: Any) -> Any:
    """A generator's step of decoding that records no routing: which samples count depends on values."""
    return lambda inputs, cache, counted=None: step(inputs, cache)


class _Repetitions:
    """Of a function whose operations follow from the shapes of its tensors: what it took is added at the next call."""

    def __init__(self, function: Callable[..., Any], ledger: Ledger) -> None:
        self._function, self._ledger = function, ledger
        self._known: dict[Any, tuple[Any, dict[str, float]]] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        given = [value for value in (*arguments, *options.values()) if not isinstance(value, nn.Module)]
        shapes = tuple(tuple(tensor.shape) for tensor in tensors_in(given))
        spent = self._ledger.forward
        if shapes not in self._known:
            before = dict(spent)
            result = self._function(*arguments, **options)
            self._known[shapes] = result, {name: flops - before.get(name, 0.0) for name, flops in spent.items()}
        else:
            for name, flops in self._known[shapes][1].items():
                spent[name] += flops
        return self._known[shapes][0]


def drawing_flops(request: DrawRequest, keep: Callable[[Ledger], None]) -> float:
    """Operations of one drawn image, without those of the tokenizer.

    Args:
        keep: is told the ledger of what comes next.
    """
    space, classes = request.tokenizer.space, request.choice.class_count
    procedure = resolve(request.sampling)(request.sampling)  # outside: grids of times have values
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        kinds, kind_of_block = kinds_of_blocks(request.choice, space)
        tokenizer = resolve(request.tokenizer)(request.tokenizer).eval()
        indices = torch.zeros(1, dtype=torch.long)
        captions = ("a photograph",) if classes is None else None
        rows = request.choice.text_rows
        text = None if rows is None else Text(torch.zeros(1, rows, dtype=torch.long), torch.ones(1, rows).bool())
        condition = Condition(indices, captions, -1 if classes is None else classes, text, text)
        drawn = []
        for number in kinds:
            model = build(Request(request.choice, space), number, 1, first=True, last=True).eval()
            spread_experts(model)
            ledger = Ledger()
            keep(ledger)
            follow(model, Observation(ledger, 1))
            model.step = _without_statistics(model.step)
            with ledger:
                model.forward = _Repetitions(model.forward, ledger)
                for name in getattr(procedure, "repeated", ()):
                    setattr(procedure, name, _Repetitions(getattr(type(procedure), name).__get__(procedure), ledger))
                procedure.draw(model, _Apart(tokenizer, ledger), condition, Noise(0, indices))
            drawn.append(ledger.forward)
    blocks = sum(drawn[kind][BLOCK] + drawn[kind][EXPERTS] for kind in kind_of_block)
    return blocks + drawn[-1][EMBEDDING] + drawn[-1][HEAD]
