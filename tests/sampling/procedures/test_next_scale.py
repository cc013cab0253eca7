"""Next-scale decoding of a small VAR; that its greedy guided tokens are VAR's is shown by tests/parity."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megavar.assembly import build_generator, build_sampler
from megavar.conditions import ClassConditions
from megavar.config.loading import load_config
from megavar.errors import CheckpointError
from megavar.generators.inputs import ScaleInputs
from megavar.sampling.noise import Noise
from megavar.sampling.procedures.next_scale import NextScale
from megavar.tokenizers.multiscale_vq import MultiScaleVQ

CPU = torch.device("cpu")
CLASSES = ClassConditions(10)


@pytest.fixture(scope="module")
def config():
    given = ["generator.depth=1", "generator.width=16", "generator.heads=2", "sampling.guidance=1.5"]
    return load_config(Path(__file__).parents[3] / "configs/quickstart.yaml", given)


@pytest.fixture
def tokenizer(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiScaleVQ(config.tokenizer).eval()


@pytest.fixture
def generator(config, one_process):
    return build_generator(config, None).eval()


def test_samples_do_not_depend_on_their_company(config, generator, tokenizer):
    sampler = build_sampler(config, generator, tokenizer, CLASSES, CPU)
    drawn = sampler.draw(torch.arange(20))
    assert drawn.images.shape == (20, 3, 16, 16) and drawn.arrays["tokens"].shape == (20, 21)
    assert len({row.tobytes() for row in drawn.arrays["tokens"]}) == 20
    mixed = torch.tensor([17, 3, 8])
    assert torch.equal(sampler.draw(mixed).images, drawn.images[mixed])  # one thread computes alike


def test_images_are_those_that_decoding_accumulated(config, generator, tokenizer):
    indices, settings = torch.arange(6), config.sampling
    drawn = build_sampler(config, generator, tokenizer, CLASSES, CPU).draw(indices)
    noise = Noise(settings.seed, indices)
    steps = list(NextScale(settings).steps(generator, tokenizer, CLASSES.at(indices), noise))
    tokens = torch.cat([step.ids for step in steps], dim=1)
    assert tokens.tolist() == drawn.arrays["tokens"].tolist()
    exact = tokenizer.decode_features(steps[-1].state)
    assert torch.equal(tokenizer.decode(tokens), exact)
    assert torch.equal(drawn.images, exact.mul(127.5).add(127.5).round().to(torch.uint8))


@pytest.mark.parametrize(("guidance", "temperature"), [(0.5, 1.0), (0.0, 0.6)])
def test_a_token_is_drawn_by_its_place_from_the_tempered_truncated_distribution(
    config, generator, tokenizer, guidance, temperature
):
    """Guided logits over the temperature, of which the 5 best stay; place i of a sample has its own number."""
    settings = config.sampling.model_copy(
        update={"guidance": guidance, "temperature": temperature, "top_k": 5, "top_p": 0.0}
    )
    indices = torch.arange(3)
    noise, start = Noise(7, indices), 0
    with torch.no_grad():
        generator.head.projection.weight.mul_(30)  # fresh logits are all alike
    for k, step in enumerate(NextScale(settings).steps(generator, tokenizer, CLASSES.at(indices), noise)):
        tokens = step.ids.shape[1]
        best, order = (step.logits / temperature).sort(dim=-1, descending=True)
        shares = torch.zeros_like(best).scatter(-1, order[..., :5], best[..., :5].softmax(-1)).double()
        uniform = noise.uniform(torch.arange(start, start + tokens))
        expected = (shares.cumsum(-1) <= uniform[..., None]).sum(-1)
        assert torch.equal(step.ids, expected), k
        start += tokens
    assert start == 21


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_guidance_grows_linearly_over_the_scales(config, generator, tokenizer, guidance):
    """(1 + t) c - t u with t = guidance k / (K - 1); any guidance above 0 counts."""
    settings = config.sampling.model_copy(update={"guidance": guidance, "top_k": 1})
    steps = list(NextScale(settings).steps(generator, tokenizer, CLASSES.at(torch.arange(3)), None))
    ids = torch.cat([step.ids for step in steps], 1)
    of = [generator(ScaleInputs(labels, tokenizer.inputs(ids))).prediction
          for labels in (torch.arange(3), torch.full((3,), 10))]  # fmt: skip
    start = 0
    for k, step in enumerate(steps):
        rows = slice(start, start := start + step.ids.shape[1])
        t = guidance * k / (len(steps) - 1)
        expected = (1 + t) * of[0][:, rows] - t * of[1][:, rows]
        torch.testing.assert_close(step.logits, expected, rtol=1e-4, atol=1e-5)


def test_routing_is_counted_for_the_samples_that_are_kept(config, generator, tokenizer):
    """Not for the halves without class that guidance adds."""
    settings, experts = config.sampling, config.generator.experts
    list(NextScale(settings).steps(generator, tokenizer, CLASSES.at(torch.arange(3)), None))
    load = generator.collect_routing()["load"]
    assert settings.guided and load.sum((1, 2)).tolist() == [3 * 21 * experts.top_k] * len(load)


def test_damaged_weights_are_noticed(config, generator, tokenizer):
    with torch.no_grad():
        next(generator.head.parameters()).fill_(torch.nan)
    with pytest.raises(CheckpointError, match="logits that are not finite"):
        build_sampler(config, generator, tokenizer, CLASSES, CPU).draw(torch.arange(2))


class Waits(TorchDispatchMode):
    """Counts operators that make the host wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if unsized or name.startswith(self.NAMES):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_host_waits_once_for_all_scales(config, tokenizer, one_process):
    # dispatch to experts waits for their loads, in Megatron-core
    dense = config.model_copy(update={"generator": config.generator.model_copy(update={"experts": None})})
    procedure, indices = NextScale(config.sampling), torch.arange(2)
    generator = build_generator(dense, None).eval()
    with Waits() as waits:
        procedure.draw(generator, tokenizer, CLASSES.at(indices), Noise(0, indices))
    assert len(waits.found) == 1, waits.found  # whether all logits were finite
    with Waits() as waits:
        torch.ones(3).nonzero()
        assert bool(torch.ones(1).all())
    assert len(waits.found) == 2  # such waits are seen
