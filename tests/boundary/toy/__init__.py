"""A family that megavar does not know: a 1-D tokenizer, a causal generator, a recipe that learns from its own tokens.

Written as a user would outside the library, loaded through ``plugins: [tests.boundary.toy.choices]``. The files of a
family in the library look the same (``docs/change-a-model.md``).
"""
