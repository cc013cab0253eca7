"""Recipes: one module per algorithm; see :mod:`megavar.config.recipes.base`."""
