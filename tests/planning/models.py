"""Real generators whose costs are measured, without the time their initialization and products would take."""

from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES
from megavar.generators.var import VAR, VARInputs
from megavar.generators.var import model as var
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.planning.shape import GeneratorShape

MEPA = ExpertsChoice.make(number=8, top_k=3, backend="megatron")
CODE_DIMENSION, VOCABULARY = 32, 4096
aten = torch.ops.aten


def shape_of(config, resolution=256, scales=None):
    return GeneratorShape(config, scales or SCALES[resolution], CODE_DIMENSION, VOCABULARY)


def build(config, scales, **options):
    """A VAR whose parameters stay as the allocator gave them: initialization takes minutes for a large one."""
    with mock.patch.object(var, "initialize_parameters", lambda *arguments: None):
        return VAR(config, scales=scales, code_dimension=CODE_DIMENSION, vocabulary_size=VOCABULARY, **options)


def without_memory(config, scales):
    """A VAR of any size whose tensors have shapes but no memory."""
    with FakeTensorMode():
        return build(config, scales)


class SkipProducts(TorchDispatchMode):
    """Matrix products give zeros at once; everything else runs."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is aten.mm.default:
            a, b = arguments
            return a.new_zeros(a.shape[0], b.shape[1])
        if function is aten.bmm.default:
            a, b = arguments
            return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
        if function is aten.addmm.default:
            _, a, b = arguments
            return a.new_zeros(a.shape[0], b.shape[1])
        return function(*arguments, **(options or {}))


def inputs(model, images):
    tokens = model.layout.tokens - model.scales[0] ** 2
    labels, keys = torch.arange(images) % model.generator.classes, torch.arange(images)
    return VARInputs(labels, torch.zeros(images, tokens, CODE_DIMENSION), keys)


def forward_loss(model, images):
    output = model(inputs(model, images))
    targets = torch.zeros(images, model.layout.tokens, dtype=torch.long)
    return vocabulary_cross_entropy(output.logits, targets).mean()
