"""Qwen2's blocks as the backbone of a generator, and its weights in Hugging Face's layout."""

from megavar.generators.language_model.model import LanguageModel, positions_of

__all__ = ["LanguageModel", "positions_of"]
