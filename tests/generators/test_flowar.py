"""FlowAR's published sizes."""

import pytest
import torch

from megavar.config.generators.flowar import FlowARConfig
from megavar.config.token_space import TokenSpace
from megavar.errors import ConfigError
from megavar.generators.flowar import FlowAR
from megavar.generators.flowar.published import FlowARLayout
from megavar.training.checkpoint.weights import shapes_of, tensors_of

KL16 = TokenSpace("latent", (16,), 256, None, 16, image_side=256)
SIZES = {
    "S": ({}, 171_718_072),
    "B": ({"encoder_depth": 12, "decoder_depth": 12}, 299_270_584),
    "L": (
        {"width": 1024, "encoder_depth": 8, "decoder_depth": 8, "heads": 16, "head_depth": 12,
         "head_cross_attention": True}, 586_862_912,
    ),
    "H": (
        {"width": 1536, "encoder_depth": 15, "decoder_depth": 15, "heads": 16, "head_depth": 12, "head_width": 1536,
         "head_cross_attention": True}, 1_913_316_880,
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_released_classes(size, single_process):
    options, expected = SIZES[size]
    with torch.device("meta"):
        model = FlowAR(FlowARConfig(**options), KL16)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_a_map_of_another_side_is_refused():
    with pytest.raises(ConfigError, match=r"generator.scales=\[1, 2, 4, 8, 16\] needs a map of 16 x 16 vectors"):
        FlowARConfig().limits(TokenSpace("latent", (32,), 1024, None, 4, image_side=256))


@pytest.mark.parametrize("cross", [False, True])
def test_both_heads_round_trip_through_the_published_layout(cross, single_process):
    choice = FlowARConfig(
        scales=(1, 2, 4), width=24, encoder_depth=1, decoder_depth=1, heads=2, head_depth=2, head_width=64, classes=5,
        rope_side=4, head_cross_attention=cross,
    )  # fmt: skip
    space = TokenSpace("latent", (4,), 16, None, 6, image_side=32)
    model = FlowAR(choice, space)
    layout, ours = FlowARLayout(choice, space), {name: value.clone() for name, value in tensors_of(model).items()}
    state = layout.export(ours)
    assert ("flownet.res_blocks.1.crossattn.kv.weight" in state) == cross
    back = layout.load(state, shapes_of(model))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
