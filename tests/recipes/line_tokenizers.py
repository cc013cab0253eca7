"""Small TiTok and AliTok on digits of 16 pixels, and short training loops of their recipes."""

from typing import Any

import torch

from megavar.config.recipes.alitok import AliTokTrainingConfig, PhaseConfig
from megavar.config.recipes.proxy_codes import ProxyCodesConfig
from megavar.config.recipes.tokenizer import AdversarialConfig
from megavar.config.tokenizers.alitok import AliTokConfig
from megavar.config.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from megavar.config.tokenizers.titok import TiTokConfig
from megavar.config.tokenizers.vision import VisionTransformerConfig
from megavar.recipes.tokenizer.alitok import AliTokTraining
from megavar.recipes.tokenizer.proxy_codes import ProxyCodes
from megavar.tokenizers.maskgit_vqgan import MaskGITVQGAN
from megavar.tokenizers.titok import TiTok

CPU = torch.device("cpu")
STD = 0.02 * (1024 / 32) ** 0.5
"""Fresh layers of this width as those of TiTok's."""
SMALL = VisionTransformerConfig(width=32, depth=2, heads=2)
PIXEL = MaskGITVQGANConfig(side=4, vocabulary_size=16, code_dimension=8, base_channels=8, norm_groups=4,
                           channel_multipliers=(1, 1, 2), residual_blocks=1)  # fmt: skip
TITOK = TiTokConfig(tokens=8, vocabulary_size=64, code_dimension=8, encoder=SMALL, decoder=SMALL, patch=4,
                    decoder_patch=4, image_side=16, pixel=PIXEL, initial_std=STD)  # fmt: skip
VECTORS = TITOK.model_copy(update={"legacy": False, "quantization": "vae"})
ALITOK = AliTokConfig(image_side=16, patch=4, prefix=5, vocabulary_size=64, code_dimension=8, encoder=SMALL,
                      decoder=SMALL, registers=2, initial_std=STD)  # fmt: skip
BLURRED = AdversarialConfig(network="blurred", layers=2, base_channels=8, norm_groups=4, adaptive=False, weight=0.01)
PHASES = (
    PhaseConfig(length=1, stage=1),
    PhaseConfig(length=1, stage=1, rate=(1.0, 0.25), adversarial=True),
    PhaseConfig(length=1, stage=2, rate=(2.0, 2.0)),
    PhaseConfig(length=1, stage=2, rate=(2.0, 0.5), adversarial=True),
)
STAGED = AliTokTrainingConfig(phases=PHASES, adversarial=BLURRED)


def proxy(seed: int = 3) -> MaskGITVQGAN:
    """A VQGAN with random weights, whose codes differ from place to place all the same."""
    model = MaskGITVQGAN(PIXEL)
    model.initialize(torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(model.quantizer.embedding.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def first_stage(seed: int = 0, **options: Any) -> ProxyCodes:
    """TiTok's first stage on :func:`proxy`'s codes."""
    return ProxyCodes(ProxyCodesConfig(proxy_weights="unused", **options), TiTok(TITOK), proxy(), seed)


def staged(steps: int, config: AliTokTrainingConfig = STAGED, seed: int = 0) -> AliTokTraining:
    """AliTok's training of ``steps`` steps."""
    return AliTokTraining(config, ALITOK, seed, CPU, steps=steps)



def write_rows(
    parameter: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, moves: torch.Tensor | None = None
) -> None:
    """Into the module alone, which has no copies here."""
    with torch.no_grad():
        share = torch.ones(len(rows)) if moves is None else moves
        parameter[rows] = torch.lerp(parameter[rows], values, share[:, None])
