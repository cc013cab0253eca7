"""Real generators to hold measured costs against, without the time that initialization and products would take."""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import SCALES
from megavar.config.token_space import TokenSpace
from megavar.generators.var import VAR
from megavar.parallel.vocabulary import vocabulary_cross_entropy
from megavar.planning.measure import Request, measure
from megavar.transformer import backbone

MEPA = ExpertsChoice.make(number=8, top_k=3, backend="megatron")
CODE_DIMENSION, VOCABULARY = 32, 4096
aten = torch.ops.aten


def space_of(scales=SCALES[256]):
    return TokenSpace.of_scales(scales, VOCABULARY, CODE_DIMENSION, 16 * scales[-1])


def cost_of(config, scales=SCALES[256], **options):
    return measure([Request(config, space_of(scales), **options)])[0]


def build(config, scales, **options):
    """A VAR whose parameters stay as the allocator gave them: initialization takes minutes for a large one."""
    with mock.patch.object(backbone, "initialize_parameters", lambda *arguments: None):
        return VAR(config, space_of(scales), **options)


def _taking_output(formula):
    """A registered formula in the form that ``custom_mapping`` asks for: with the output instead of its shape."""

    def count(*arguments, out_val=None, **options):
        return formula(*arguments, out_val=out_val, **options)

    count._get_raw = True
    return count


def flop_counter():
    """PyTorch's. Before 2.12 it counted no attention on CPUs: there it is told how, in its own words."""
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }
    missing = {packet: _taking_output(formula) for packet, formula in known.items() if packet not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)


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


def forward_loss(generator, images):
    output = generator(generator.example(images))
    targets = torch.zeros(images, generator.space.length, dtype=torch.long)
    return vocabulary_cross_entropy(output.prediction, targets).mean()
