"""Losses that combine with any recipe of a generator: one module per term; see :mod:`megavar.recipes.terms.base`."""
