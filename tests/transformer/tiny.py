"""A small VAR whose every part matters, and inputs for it."""

import functools

import torch
import torch.nn.functional as F

from megavar.config.experts.base import ExpertsChoice
from megavar.config.generators.var import VARConfig
from megavar.config.token_space import TokenSpace
from megavar.generators.base import Stage
from megavar.generators.inputs import ScaleInputs
from megavar.generators.var import VAR
from megavar.parallel.logical import initialize_parameters, logical_tensors

SCALES = (1, 2, 3)
TOKENS = sum(side * side for side in SCALES)
CODE, VOCABULARY, CLASSES, WIDTH = 5, 12, 4, 16
SPACE = TokenSpace.of_scales(SCALES, VOCABULARY, CODE, image_side=48)


def config(experts=None, **changes):
    if isinstance(experts, dict):
        experts = ExpertsChoice.make(**({"number": 4, "top_k": 2, "balance_coefficient": 0.05} | experts))
    small = {"depth": 2, "width": WIDTH, "heads": 2, "classes": CLASSES, "drop_path": 0.0}
    return VARConfig(experts=experts, **(small | changes))


def _visible_values(name, value, generator):
    """Large random values: at the real initialization blocks hardly change their input, and wrong ones would pass."""
    value.normal_(std=0.4, generator=generator)


def model(generator, parallel=None, *, stage: Stage | None = None, taps=(), heads=None):
    var = VAR(generator, SPACE, parallel=parallel, stage=stage, taps=taps, heads=heads)
    initialize_parameters(var, _visible_values, seed=1)
    return var


def inputs(batch=3, seed=0):
    """Model inputs and targets [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES + 1, (batch,), generator=generator)
    features = torch.randn(batch, TOKENS - 1, CODE, generator=generator)
    targets = torch.randint(0, VOCABULARY, (batch, TOKENS), generator=generator)
    return ScaleInputs(labels, features), targets


def rows(given, index):
    """Some samples of a batch."""
    keys = None if given.sample_keys is None else given.sample_keys[index]
    return ScaleInputs(given.labels[index], given.features[index], keys)


def loss(output, targets):
    return F.cross_entropy(output.prediction.flatten(0, 1), targets.flatten())


def gradients(module):
    """Gradients by logical name."""
    parameters = dict(module.named_parameters())
    return {tensor.name: tensor.local(parameters[tensor.parameter].grad) for tensor in logical_tensors(module)}


def copy_logical(source, target, rename=lambda name: name):
    """Give ``target`` the values of ``source``; ``rename`` maps the target's logical names to the source's."""
    given = dict(source.named_parameters())
    values = {tensor.name: tensor.local(given[tensor.parameter]) for tensor in logical_tensors(source)}
    parameters = dict(target.named_parameters())
    with torch.no_grad():
        for tensor in logical_tensors(target):
            if rename(tensor.name) is not None:
                tensor.local(parameters[tensor.parameter]).copy_(values[rename(tensor.name)])


def assert_same(one, other, rtol=1e-5, atol=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        named = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, msg=named)
