"""Public files of KL-VAEs: diffusers' own names, and latent diffusion's (``kl16.ckpt``, SD's and EQ-VAE's files)."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from megavar.weight_layout import NamedLayout, Shape

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of diffusers before 0.18, which most files on the hub still have."""
_REMEDY = (
    "Check tokenizer.latent_channels, base_channels, channel_multipliers, residual_blocks and attention: the defaults "
    "are KL-16's."
)


class DiffusersLayout(NamedLayout):
    """Our names without the prefix; names of attention from before diffusers 0.18 are read, too."""

    belongs_to = "an AutoencoderKL of diffusers"
    remedy = _REMEDY

    def names(self, name: str) -> tuple[str, ...]:
        """diffusers' name."""
        return (name.removeprefix("vae."),)

    def load(
        self, state: Mapping[str, Tensor], expected: Mapping[str, Shape], passed: Mapping[str, Shape] = {}
    ) -> dict[str, Tensor]:
        """See :meth:`megavar.weight_layout.WeightLayout.load`."""
        renamed = {}
        for name, value in state.items():
            before, _, last = name.rpartition(".")
            place, _, layer = before.rpartition(".")
            if "attentions." in name and layer in _OLD_ATTENTION:
                before, value = f"{place}.{_OLD_ATTENTION[layer]}", value.flatten(1) if value.dim() == 4 else value
            renamed[f"{before}.{last}"] = value
        return super().load(renamed, expected, passed)


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ENDS = {"conv_norm_out": "norm_out", "conv_in": "conv_in", "conv_out": "conv_out"}


class LDMLayout(NamedLayout):
    """Latent diffusion's names; its decoder counts levels from the lowest resolution's end backwards, and its attention
    is made of convolutions. What such files hold of training (losses, averages) is passed over."""

    belongs_to = "a KL autoencoder of latent diffusion"
    remedy = _REMEDY

    def names(self, name: str) -> tuple[str, ...]:
        """Latent diffusion's name."""
        layer, _, kind = name.removeprefix("vae.").rpartition(".")
        if layer in ("quant_conv", "post_quant_conv"):
            return (f"{layer}.{kind}",)
        coder, _, part = layer.partition(".")
        return (f"{coder}.{self._part(part)}.{kind}",)

    def _part(self, part: str) -> str:
        if part in _ENDS:
            return _ENDS[part]
        if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", part):
            return f"mid.block_{int(match[1]) + 1}.{_residual(match[2])}"
        if match := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", part):
            return f"mid.attn_1.{_ATTENTION[match[1]]}"
        layers = "resnets|attentions|downsamplers|upsamplers"
        match = re.fullmatch(rf"(down|up)_blocks\.(\d+)\.({layers})\.(\d+)\.(.+)", part)
        assert match is not None, part
        way, level, what, number, inner = match.groups()
        if way == "up":
            level = str(len(self.choice.channel_multipliers) - 1 - int(level))
        place = f"{way}.{level}"
        if what == "resnets":
            return f"{place}.block.{number}.{_residual(inner)}"
        if what == "attentions":
            return f"{place}.attn.{number}.{_ATTENTION[inner]}"
        return f"{place}.{'downsample' if way == 'down' else 'upsample'}.{inner}"

    def split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        """Linear layers of attention as convolutions."""
        return [value[..., None, None] if self._is_convolution(name) else value]

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Undo :meth:`split`."""
        (value,) = parts
        return value[..., 0, 0] if self._is_convolution(name) else value

    @staticmethod
    def _is_convolution(name: str) -> bool:
        return "attentions." in name and ".to_" in name and name.endswith("weight")

    def ignores(self, published: str) -> bool:
        """Losses, averages of weights, and the logarithm of the output's variance."""
        return published.startswith(("loss.", "model_ema.")) or published == "logvar"


def _residual(inner: str) -> str:
    return "nin_shortcut" if inner == "conv_shortcut" else inner
