"""Public files of DC-AE: diffusers' names."""

from megavar.weight_layout import NamedLayout


class DiffusersLayout(NamedLayout):
    """Our names without the prefix."""

    belongs_to = "an AutoencoderDC of diffusers"
    remedy = "Check tokenizer.channels, encoder_layers and decoder: the defaults are dc-ae-f32c32-sana-1.1's."

    def names(self, name: str) -> tuple[str, ...]:
        """diffusers' name."""
        return (name.removeprefix("vae."),)
