"""MAR: an encoder of known tokens, a decoder of all places, and a diffusion head."""

from megavar.generators.mar.model import MAR

__all__ = ["MAR"]
