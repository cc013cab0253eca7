"""Drawings that are recorded once and replayed give the tokens and routing of drawing itself, for any noise and class.

A tape of the dispatcher's calls stands for a CUDA graph: it repeats the same calls on the same memory, whatever
the host would decide now.
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megavar.assembly import build_generator
from megavar.conditions import ClassConditions
from megavar.config.loading import load_config
from megavar.errors import CheckpointError, ConfigError
from megavar.sampling.graph import RepeatedDrawing
from megavar.sampling.noise import Noise
from megavar.sampling.procedures.next_scale import NextScale
from megavar.tokenizers.multiscale_vq import MultiScaleVQ

CLASSES = ClassConditions(10)


class Tape(TorchDispatchMode):
    """Keeps all calls with their memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, arguments, options, result in self.calls:
            for kept, new in zip(tree_leaves(result), tree_leaves(function(*arguments, **options)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def record(work):
    tape = Tape()
    with tape:
        work()
    return tape.replay


class Drawing:
    """A small STMoE-VAR, and how often it was called to draw."""

    def __init__(self, backend):
        given = ["generator.depth=2", "generator.width=16", "generator.heads=2", "sampling.guidance=1.5"]
        path = Path(__file__).parents[2] / "configs/quickstart.yaml"
        config = load_config(path, [*given, f"generator.experts.backend={backend}"])
        self.generator = build_generator(config, None).eval()
        self.tokenizer = MultiScaleVQ(config.tokenizer).eval()
        self.procedure, self.calls = NextScale(config.sampling), 0

    def __call__(self, condition, noise):
        self.calls += 1
        return self.procedure.draw(self.generator, self.tokenizer, condition, noise)

    def result(self, draw, indices):
        """Tokens and routing statistics."""
        self.generator.routing.clear()
        tokens = draw(CLASSES.at(indices), Noise(5, indices))
        return tokens, [(record.block, record.load) for record in self.generator.routing]


def test_a_repeated_drawing_is_the_drawing(one_process):
    drawing = Drawing("grouped")
    repeated = RepeatedDrawing(drawing.generator, drawing, record)
    batches = [torch.arange(6) + 6 * number for number in range(4)] + [torch.arange(2)]
    found = [drawing.result(repeated, batch) for batch in batches]
    assert drawing.calls == 3  # six samples as usual and recorded, two as usual
    for batch, (tokens, routing) in zip(batches, found, strict=True):
        expected, load = drawing.result(drawing, batch)
        assert torch.equal(tokens, expected) and len(routing) == len(load) > 0
        assert all(own == other and torch.equal(a, b) for (own, a), (other, b) in zip(routing, load, strict=True))
    assert len({tokens.numpy().tobytes() for tokens, _ in found}) == 5


def test_a_repeated_drawing_sees_damaged_weights(one_process):
    drawing = Drawing("grouped")
    repeated, indices = RepeatedDrawing(drawing.generator, drawing, record), torch.arange(2)
    for _ in range(2):
        drawing.result(repeated, indices)
    drawing.generator.head.projection.weight.data.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        drawing.result(repeated, indices)


def test_experts_whose_host_counts_tokens_are_refused(one_process):
    drawing = Drawing("megatron")
    with pytest.raises(ConfigError, match="backend=grouped"):
        RepeatedDrawing(drawing.generator, drawing, record)
