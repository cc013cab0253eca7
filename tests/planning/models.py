"""Real generators whose costs are measured, without the time their initialization and products would take."""

from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES
from megavar.config.token_space import TokenSpace
from megavar.generators.var import VAR
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.planning.shape import GeneratorShape
from megavar.transformer import backbone

MEPA = ExpertsChoice.make(number=8, top_k=3, backend="megatron")
CODE_DIMENSION, VOCABULARY = 32, 4096
aten = torch.ops.aten


def shape_of(config, resolution=256, scales=None):
    return GeneratorShape(config, scales or SCALES[resolution], CODE_DIMENSION, VOCABULARY)


def space_of(scales):
    return TokenSpace.of_scales(scales, VOCABULARY, CODE_DIMENSION, 16 * scales[-1])


def build(config, scales, **options):
    """A VAR whose parameters stay as the allocator gave them: initialization takes minutes for a large one."""
    with mock.patch.object(backbone, "initialize_parameters", lambda *arguments: None):
        return VAR(config, space_of(scales), **options)


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
    return model.example(images)


def forward_loss(model, images):
    output = model(inputs(model, images))
    targets = torch.zeros(images, model.space.length, dtype=torch.long)
    return vocabulary_cross_entropy(output.prediction, targets).mean()
